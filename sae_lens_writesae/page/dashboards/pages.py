"""`Dashboard` as static HTML: an index, one page per atom, and the data beside them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import jinja2
from markupsafe import Markup, escape

from sae_lens_writesae import plots
from sae_lens_writesae import report_text as text
from sae_lens_writesae.conditions import NAMES
from sae_lens_writesae.page.dashboards.data import AtomPage, Context, Dashboard, TokenValue
from sae_lens_writesae.page.dashboards.token_text import pieces, visible
from sae_lens_writesae.writing import write_aside


@dataclass(frozen=True)
class DashboardFiles:
    """What was written."""

    index: Path
    pages: dict[int, Path]
    """By atom."""
    data: Path


def write_dashboards(data: Dashboard, folder: str | Path) -> DashboardFiles:
    """Write index.html, atom-<n>.html and data.json into `folder`, which is made if need be.

    The pages need nothing else: no network, no server. Each file is written aside, then renamed. Raises ValueError
    where there is no atom to show.
    """
    if not data.atoms:
        raise ValueError("there is no atom to show: the dashboard is empty")
    target = Path(folder)
    environment = _environment()
    numbers = [page.atom for page in data.atoms]
    shared = {"info": data.info, "label": data.info["label"]}
    pages = {}
    template = environment.get_template("page/dashboards/atom.html")
    for i, page in enumerate(data.atoms):
        around = {"previous": numbers[i - 1] if i else None, "following": [*numbers, None][i + 1]}
        content = template.render(page=page, lead=lead(page), **around, **shared)
        pages[page.atom] = _write(target / f"atom-{page.atom}.html", content)
    index = environment.get_template("page/dashboards/index.html").render(data=data, **shared)
    return DashboardFiles(_write(target / "index.html", index), pages, data.save(target / "data.json"))


def _write(file: Path, content: str) -> Path:
    return write_aside(file, lambda aside: aside.write_text(content, encoding="utf-8"))


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("sae_lens_writesae", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "pct": text.percent,
        "num": plots.number,
        "signed": signed,
        "visible": visible,
        "token": token,
        "chip": chip,
        "context": context,
        "excerpt": excerpt,
    }
    environment.globals |= {"condition_names": NAMES, "scale_names": plots.SCALE_NAMES}
    return environment


def signed(value: float, how: str = "+.2f") -> str:
    """A number with its sign, which is a minus and not a hyphen; no sign on what rounds to 0."""
    written = format(value, how)
    return written.replace("-", "−") if float(written) else written.lstrip("+-")


def token(value: TokenValue) -> Markup:
    """A token as a chip; its exact form and its id in the title."""
    title = escape(f"{value.text!r}, token {value.token}")
    return Markup(f'<span class="tok" title="{title}">{_inked(value.text)}</span>')


def chip(value: TokenValue) -> Markup:
    """A token as a chip, without more."""
    return Markup(f'<span class="tok">{_inked(value.text)}</span>')


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
    return dataclasses.replace(shown, **cut)


@lru_cache(maxsize=65536)
def _inked(text: str) -> str:
    """Escaped text, with faint symbols for what leaves no ink."""
    parts = (f"<i>{escape(p.shown)}</i>" if p.symbol else str(escape(p.shown)) for p in pieces(text))
    return "".join(parts)


def lead(page: AtomPage) -> str:
    """The atom in two sentences."""
    on = [f"“{visible(t.text)}”" for t in page.fires_on[:3]]
    share = sum(t.value for t in page.fires_on[:3])
    where = f"{'mostly' if share > 0.5 else 'most often'} on {_listed(on)}" if on else ""
    first = f"Fires on {text.percent(page.rate)} of tokens, {where} ({text.percent(share)} of its firings)."
    return f"{first} {_likeness(page)} {_lasting(page)}"


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _likeness(page: AtomPage) -> str:
    if page.cosines is None:
        return "The native write is zero wherever it fires."
    median = page.cosines.at_firings.median
    return f"There its cosine with the native write is {median:.2f} (median)."


def _lasting(page: AtomPage) -> str:
    memory = page.memory
    if memory.n == 0:
        return ""
    if memory.half_life is None:
        return f"What it writes keeps more than half of its norm for longer than {memory.longest} tokens."
    unit = "token" if memory.half_life == 1 else "tokens"
    return f"What it writes has lost half of its norm after {memory.half_life:g} {unit}."
