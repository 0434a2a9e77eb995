"""`AtomPagesData` as static HTML: an index, one page per atom, and data.json."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from markupsafe import Markup, escape
from matplotlib.image import imsave

from hookpoints.files import atomic_text
from writesae.files import check_ours
from writesae.page.atoms.data import AtomPagesData, Term
from writesae.page.atoms.text import EMPTY, symbol, visible
from writesae.page.format import number, percent
from writesae.page.template import environment


def write_atom_pages(data: AtomPagesData, folder: str | Path) -> Path:
    """Write index.html, atom-<n>.html and data.json into `folder`, which is made if need be; returns the index.

    The pages need no network and no server. Each file is written aside, then renamed.

    Raises:
        ValueError: a file of such a name is there and is no page (`check_pages`).
    """
    check_pages(Path(folder))
    templates = environment(pct=percent, num=number, signed=with_sign, visible=visible, inked=inked, heatmap=heatmap)
    numbers = [page.atom for page in data.atoms]
    target = Path(folder)
    shared = {"info": data.info, "label": data.info["label"], "shown": numbers}
    of_atom = templates.get_template("atoms/atom.html")
    for page, previous, following in zip(data.atoms, [None, *numbers], [*numbers[1:], None]):
        shown = {"page": page, "previous": previous, "following": following, **shared}
        atomic_text(target / f"atom-{page.atom}.html", of_atom.render(shown))
    data.save(target / "data.json")
    # The index last: what it links to is there.
    index = templates.get_template("atoms/index.html").render(data=data, **shared)
    return atomic_text(target / "index.html", index)


def check_pages(folder: Path) -> None:
    """Raise ValueError, which names it, where a folder has a file with the name of one of these and other contents."""
    check_ours(folder / "index.html", folder / "data.json", *folder.glob("atom-*.html"))


def with_sign(value: float, how: str = "+.2f") -> str:
    """A number with its sign, as a minus instead of a hyphen; what rounds to 0 has no sign."""
    written = format(value, how)
    return written.replace("-", "−") if float(written) else written.lstrip("+-")


def heatmap(terms: Sequence[Term]) -> Markup:
    """The matrix of singular terms [K,V] as a picture of K x V pixels: blue above 0, orange below, opaque at the
    largest entry. For 128 x 128 it is a few kB, where elements of a page would be a megabyte."""
    matrix = np.sum([term.size * np.outer(term.key, term.value) for term in terms], axis=0)
    largest = max(float(np.abs(matrix).max()), 1e-30)
    shades = 17 * np.rint(15 * np.abs(matrix) / largest)  # 16 opacities, which PNG packs into a few kB
    color = np.where(matrix[..., None] < 0, (0xE8, 0x6A, 0x2C), (0x3D, 0x7F, 0xF0))
    png = io.BytesIO()
    imsave(png, np.dstack([color, shades]).astype(np.uint8), format="png")
    data = base64.b64encode(png.getvalue()).decode()
    size = "{} by {}".format(*matrix.shape)
    return Markup(f'<img class="heat" alt="The atom, {size}" src="data:image/png;base64,{data}">')


@lru_cache(maxsize=65536)
def inked(text: str) -> Markup:
    """Escaped text, with faint symbols for what leaves no ink."""
    inked = [f"<i>{symbol(c)}</i>" if symbol(c) else str(escape(c)) for c in text]
    return Markup("".join(inked) or f"<i>{EMPTY}</i>")
