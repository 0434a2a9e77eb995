"""`AtomPagesData` as static HTML: an index, one page per atom, and the data beside them."""

from __future__ import annotations

import base64
import itertools
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from markupsafe import Markup, escape

from sae_lens_writesae.files import atomic_text
from writesae.page.atoms.data import AtomPage, AtomPagesData, Context, Term, TokenValue
from writesae.page.atoms.text import EMPTY, symbol, visible
from writesae.page.template import environment
from writesae.verdict.format import number, percent
from writesae.verdict.names import NAMES, SCALE_NAMES

_LEVELS = 15
"""Shades of a colour in `heatmap`."""


@dataclass(frozen=True)
class AtomPageFiles:
    """What was written."""

    index: Path
    pages: dict[int, Path]
    """By atom."""
    data: Path

    def __str__(self) -> str:
        return f"pages    {self.index} and {len(self.pages)} atoms\nnumbers  {self.data}"


def write_atom_pages(data: AtomPagesData, folder: str | Path) -> AtomPageFiles:
    """Write index.html, atom-<n>.html and data.json into `folder`, which is made if need be.

    The pages need nothing else: no network, no server. Each file is written aside, then renamed.

    Raises:
        ValueError: there is no atom to show.
    """
    if not data.atoms:
        raise ValueError("there is no atom to show: the data are empty")
    templates = environment()
    templates.filters |= {"pct": percent, "num": number, "signed": signed, "visible": visible}
    templates.filters |= {"token": token, "context": context, "excerpt": excerpt, "shaded": shaded, "heatmap": heatmap}
    templates.globals |= {"condition_names": NAMES, "scale_names": SCALE_NAMES}
    numbers, files, target = [page.atom for page in data.atoms], dict[int, Path](), Path(folder)
    shared = {"info": data.info, "label": data.info["label"], "shown": numbers}
    template = templates.get_template("atoms/atom.html")
    for page, previous, following in zip(data.atoms, [None, *numbers], [*numbers[1:], None]):
        content = template.render(page=page, lead=lead(page), previous=previous, following=following, **shared)
        files[page.atom] = atomic_text(target / f"atom-{page.atom}.html", content)
    index = atomic_text(target / "index.html", templates.get_template("atoms/index.html").render(data=data, **shared))
    return AtomPageFiles(index, files, data.save(target / "data.json"))


def signed(value: float, how: str = "+.2f") -> str:
    """A number with its sign, which is a minus and not a hyphen; no sign on what rounds to 0."""
    written = format(value, how)
    return written.replace("-", "−") if float(written) else written.lstrip("+-")


def token(value: TokenValue, titles: bool = True) -> Markup:
    """A token as a chip, with its exact form and its id in the title."""
    exact = escape(f"{value.text!r}, token {value.token}")
    title = f' title="{exact}"' if titles else ""
    return Markup(f'<span class="tok"{title}>{_inked(value.text)}</span>')


def context(shown: Context, scale: float, titles: bool = True) -> Markup:
    """The text around a firing, which is boxed."""
    return shaded(shown.tokens, shown.activations, shown.at, scale, titles)


def shaded(tokens: Sequence[str], values: Sequence[float], at: int, scale: float, titles: bool = True) -> Markup:
    """Text with token `at` boxed and every token shaded by its value relative to `scale`.

    A space is a faint dot, and lines may break before it.
    """
    parts = []
    for i, (piece, value) in enumerate(zip(tokens, values)):
        level = max(1, min(9, round(9 * value / scale))) if value > 0 and scale > 0 else 0
        tag = "mark" if i == at else "b" if level else ""
        title = f' title="{value:g}"' if titles else ""
        before = "<wbr>" if piece.startswith((" ", "\n")) else ""
        inked = _inked(piece)  # the only part that is not ours; escaped
        parts.append(f'{before}<{tag} class="a{level}"{title}>{inked}</{tag}>' if tag else before + inked)
    return Markup("".join(parts))


def heatmap(terms: Sequence[Term]) -> Markup:
    """The matrix of singular terms [K,V] as a picture of K x V pixels: blue above 0, orange below, opaque at the
    largest entry. For 128 x 128 it is a few kB, where elements of a page would be a megabyte."""
    matrix = sum(t.size * np.outer(t.key, t.value) for t in terms)
    strength = np.abs(matrix) / max(float(np.abs(matrix).max()), 1e-30)
    levels = np.rint(_LEVELS * strength).astype(np.uint8)
    pixels = np.where((matrix < 0) & (levels > 0), levels + _LEVELS, levels)
    colours = [(0x3D, 0x7F, 0xF0)] * (_LEVELS + 1) + [(0xE8, 0x6A, 0x2C)] * _LEVELS
    alphas = [*range(_LEVELS + 1), *range(1, _LEVELS + 1)]
    (height, width), packed = pixels.shape, b"".join(b"\0" + row.tobytes() for row in pixels)
    chunks = {
        b"IHDR": struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0),
        b"PLTE": bytes(itertools.chain(*colours)),
        b"tRNS": bytes(255 * alpha // _LEVELS for alpha in alphas),
        b"IDAT": zlib.compress(packed, 9),
        b"IEND": b"",
    }
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        for name, content in chunks.items()
    )
    source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    return Markup(f'<img class="heat" alt="The atom, {height} by {width}" src="{source}">')


def excerpt(shown: Context, before: int = 7, after: int = 3) -> Context:
    """Less of a context."""
    first = max(shown.first, shown.position - before)
    part = slice(first - shown.first, shown.at + after + 1)
    cut = {"first": first, "tokens": shown.tokens[part], "activations": shown.activations[part]}
    return shown.model_copy(update=cut)


@lru_cache(maxsize=65536)
def _inked(text: str) -> str:
    """Escaped text, with faint symbols for what leaves no ink."""
    return "".join(f"<i>{s}</i>" if (s := symbol(c)) else str(escape(c)) for c in text) or f"<i>{EMPTY}</i>"


def lead(page: AtomPage) -> str:
    """The atom in a few sentences: where it fires, how like the native write it is, how long its write lasts."""
    on = [f"“{visible(t.text)}”" for t in page.fires_on[:3]]
    share = sum(t.value for t in page.fires_on[:3])
    listed = on[0] if len(on) == 1 else f"{', '.join(on[:-1])} and {on[-1]}" if on else "no token"
    often = "mostly" if share > 0.5 else "most often"
    sentences = [f"Fires on {percent(page.rate)} of tokens, {often} on {listed} ({percent(share)} of its firings)."]
    if page.cosines is None:
        sentences.append("The native write is zero wherever it fires.")
    else:
        median = page.cosines.at_firings.median
        sentences.append(f"There its cosine with the native write is {median:.2f} (median).")
    memory = page.memory
    if memory.half_life is not None:
        unit = "token" if memory.half_life == 1 else "tokens"
        sentences.append(f"What it writes has lost half of its norm after {memory.half_life:g} {unit}.")
    elif memory.n:
        sentences.append(f"What it writes keeps more than half of its norm for longer than {memory.longest} tokens.")
    return " ".join(sentences)
