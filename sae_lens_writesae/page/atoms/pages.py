"""`AtomPagesData` as static HTML: an index, one page per atom, and the data beside them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from markupsafe import Markup, escape

from sae_lens_writesae.files import atomic_text
from sae_lens_writesae.page.atoms.data import AtomPage, AtomPagesData, Context, TokenValue
from sae_lens_writesae.page.atoms.text import EMPTY, symbol, visible
from sae_lens_writesae.page.template import environment
from sae_lens_writesae.verdict.format import number, percent
from sae_lens_writesae.verdict.names import NAMES, SCALE_NAMES


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
    templates.filters |= {"token": token, "context": context, "excerpt": excerpt}
    templates.globals |= {"condition_names": NAMES, "scale_names": SCALE_NAMES}
    target, shared = Path(folder), {"info": data.info, "label": data.info["label"]}
    numbers, files, template = (
        [page.atom for page in data.atoms],
        dict[int, Path](),
        templates.get_template("atoms/atom.html"),
    )
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
    """The text around a firing: the firing token boxed, every token shaded by its activation relative to `scale`.

    A space is a faint dot, and lines may break before it.
    """
    parts = []
    for i, (piece, activation) in enumerate(zip(shown.tokens, shown.activations)):
        level = max(1, min(9, round(9 * activation / scale))) if activation > 0 and scale > 0 else 0
        tag = "mark" if i == shown.at else "b" if level else ""
        title = f' title="{activation:g}"' if titles else ""
        before = "<wbr>" if piece.startswith((" ", "\n")) else ""
        inked = _inked(piece)  # the only part that is not ours; escaped
        parts.append(f'{before}<{tag} class="a{level}"{title}>{inked}</{tag}>' if tag else before + inked)
    return Markup("".join(parts))


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
