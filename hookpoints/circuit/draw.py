"""The picture of a graph: one SVG without scripts, fonts or network."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from html import escape
from itertools import chain
from textwrap import wrap
from typing import NamedTuple, cast

import pandas as pd

from hookpoints.circuit.tables import by_size

STYLE = """
.circuit { --paper: #fff; --ink: #1d2733; --soft: #667180; --line: #e4e8ee; --help: #2166ac; --hurt: #b2382e; }
@media (prefers-color-scheme: dark) {
  .circuit { --paper: #12161c; --ink: #e8ecf1; --soft: #9aa5b1; --line: #2a313a; --help: #6db1f0; --hurt: #f08a7e; }
}
.circuit text { font: 11px system-ui, sans-serif; fill: var(--ink); paint-order: stroke; stroke: var(--paper);
  stroke-width: 3px; stroke-linejoin: round; }
.circuit .soft { fill: var(--soft); } .circuit .title { font-weight: 600; font-size: 13px; }
.circuit line { stroke: var(--line); } .circuit path { fill: none; stroke-linecap: round; opacity: .7; }
.circuit .help { stroke: var(--help); } .circuit .hurt { stroke: var(--hurt); }
.circuit .key { stroke-dasharray: 0.1 5; } .circuit :is(.query, .gate) { stroke-dasharray: 6 5; }
.circuit .node { cursor: pointer; }
.circuit .node path { stroke: var(--paper); stroke-width: 1.5; vector-effect: non-scaling-stroke; opacity: 1; }
.circuit .node.help path { fill: var(--help); } .circuit .node.hurt path { fill: var(--hurt); }
.circuit .node:focus-visible { outline: 2px solid var(--ink); }
"""
_SVG = (
    '<svg xmlns="http://www.w3.org/2000/svg" class="circuit" role="img" width="100%" '
    'viewBox="0 0 {width} {height:.0f}" style="max-width: {width}px"><style>{style}</style>'
)
_BLOCK = (
    '<line x1="34" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/><text class="soft" x="6" y="{below:.1f}">L{block}</text>'
)
_TOKEN = '<text text-anchor="end" transform="translate({x:.1f} {y:.1f}) rotate(-38)">{text}</text>'
_LINE = '<path class="{sign} {port}" stroke-width="{wide:.1f}" d="M{x1:.1f} {y1:.1f}{way}"><title>{said}</title></path>'
_CURVE = "C{:.1f} {:.1f} {:.1f} {:.1f} {:.1f} {:.1f}"
_NODE = (
    '<g class="node {sign}" tabindex="0" data-node="{name}" transform="translate({x:.1f} {y:.1f})">'
    '<title>{name}: {known}, {predicted:+.2f} predicted</title><path d="{path}" transform="scale({radius:.2f})"/></g>'
)
_LABEL = '<text x="{x:.1f}" y="{y:.1f}" text-anchor="middle">{text}</text>'
_TITLE = '<text class="title" x="{x}" y="22" text-anchor="end">{title}: {metric:+.2f}</text>'
_LEGEND = '<text class="soft" x="6" y="{y:.1f}">{text}</text>'
_PATHS = {
    "circle": "M-1 0a1 1 0 1 0 2 0a1 1 0 1 0-2 0z",
    "square": "M-.75-.75h1.5v1.5h-1.5z",
    "diamond": "M0-1.06L1.06 0L0 1.06L-1.06 0z",
}
"""Of radius 1."""
_LEFT = 34
_ROW = 66
_PART = 30
"""Height of a part of a write or a state, which is drawn below it."""
_FIRST = 80
"""Where the highest block is; the logit is above."""
_SHAPES = {"write": "circle", "state": "circle", "embedding": "square", "attn": "square", "mlp": "square"}
"""Of nodes that are no parts."""
_SOURCES = {"direct": 1000, "part": 4}
"""Sources of a port that are drawn."""
_LEAST = 0.08
"""Share of the largest edge from which on an edge is drawn that is not the largest of its source."""
LEGEND = (
    "Circle: a write. Square: MLP, head or embedding. Size and width: measured effect; blue helps, red hurts.",
    "Lines into a value or an MLP are solid, into a key dotted, into a query or gate dashed.",
    "Diamonds: atoms of a write or a state, what they miss (error), and the bias.",
)
"""The last line is of graphs that have some."""


class Spot(NamedTuple):
    """A node in the picture."""

    node_id: str
    feature_type: str
    layer: int
    position: int
    predicted: float
    measured: float
    shape: str
    number: int
    """Among those of its kind in its block and token."""
    alike: int

    def label(self, words: Mapping[str, str]) -> str:
        """The node without its token, which is below it, or what a part is of; and its effect."""
        place, _, kind = self.node_id.partition(" ")
        name = words.get(self.node_id, kind) if self.shape == "diamond" else f"{place.partition('@')[0]} {kind}"
        return name.strip() if pd.isna(self.measured) else f"{name.strip()} {self.measured:+.2f}"


class Line(NamedTuple):
    """An edge in the picture."""

    source: str
    target: str
    port: str
    measured: float
    token: float


class Layout:
    """Columns of the tokens, and rows of the blocks, that a graph has something at."""

    def __init__(self, spots: Sequence[Spot], tokens: Collection[int], width: int):
        self.width = width
        self.tokens = sorted({*tokens, *(spot.position for spot in spots)})
        self.column = (width - _LEFT - 14) / len(self.tokens)
        self.rows: dict[int, float] = {}
        self.floor = float(_FIRST)
        for block in sorted({spot.layer for spot in spots} - {-1}, reverse=True):
            self.rows[block] = self.floor
            parts = [spot.number + 1 for spot in spots if spot.layer == block and spot.shape == "diamond"]
            self.floor += _ROW + _PART * max(parts, default=0)
        self.places = {spot.node_id: self._spot_place(spot) for spot in spots}
        self.places |= {f"stream@{token}": (self.across(token), self.floor) for token in self.tokens}
        self.places["logit"] = (self.across(self.tokens[-1]), _FIRST - 46.0)

    def across(self, token: int) -> float:
        """The middle of a token's column."""
        return _LEFT + self.column * (self.tokens.index(token) + 0.5)

    def away(self, x: float) -> int:
        """Where a place has more room: 1 on its right, -1 on its left."""
        return 1 if x < self.width / 2 else -1

    def _spot_place(self, spot: Spot) -> tuple[float, float]:
        x = self.across(spot.position)
        y = self.rows.get(spot.layer, self.floor - 14)
        if spot.shape == "diamond":
            return x + 26 * self.away(x), y + _PART * (spot.number + 1)
        aside = min(self.column / spot.alike, 24.0) * (spot.number - (spot.alike - 1) / 2)
        return x + aside, y - 0.3 * _ROW * (spot.feature_type == "mlp")  # above the heads of its block

    def token_labels(self, texts: Sequence[str]) -> Iterator[tuple[str, float]]:
        """Each token, short, and where it is."""
        for before, token in zip([-1, *self.tokens], self.tokens):
            text = texts[token].replace("\n", "⏎").strip() or "␣"
            text = text if len(text) <= 11 else text[:10] + "…"
            yield f"… {text}" if token > before + 1 else text, self.across(token)  # tokens in between have nothing

    def labels(
        self, spots: Sequence[Spot], radii: Sequence[float], words: Mapping[str, str]
    ) -> Iterator[tuple[str, float, float]]:
        """The names of nodes for which there is room, the largest first, and where they are."""
        taken = [(*self.places[spot.node_id], radius, radius) for spot, radius in zip(spots, radii)]
        taken.append((self.width / 2, self.floor + 20, self.width / 2, 12))  # the tokens
        for spot, (x, y, radius, _) in zip(spots, [*taken]):
            text = spot.label(words)
            half = 2.9 * len(text)
            middle = min(max(x, half + 4), self.width - half - 4)
            aside = x + self.away(x) * (radius + 5 + half)
            tried = [(middle, y - radius - 8), (middle, y + radius + 9), (aside, y)]
            for across, up in tried[2 * (" " in spot.node_id) :]:  # below a state are its parts
                gaps = [(abs(across - x) - wide, abs(up - y) - tall) for x, y, wide, tall in taken]
                if all(wide > half + 3 or tall > 6 for wide, tall in gaps):
                    taken.append((across, up, half, 6))
                    yield text, across, up
                    break


def svg(nodes: pd.DataFrame, edges: pd.DataFrame, metadata: Mapping[str, object], width: int) -> str:
    """The picture of a pruned graph, as wide as so many pixels; tokens and blocks without a node are left out."""
    words = cast(Mapping[str, str], metadata.get("labels", {}))
    texts = cast(Sequence[str], metadata["tokens"])
    seen = _visible_lines(edges)
    lines = [Line(*row) for row in seen[list(Line._fields)].to_numpy().tolist()]
    table = _visible_spots(nodes[nodes.node_id.isin([*seen.source, *seen.target])])
    spots = [Spot(*row) for row in table[list(Spot._fields)].to_numpy().tolist()]
    layout = Layout(spots, {len(texts) - 1, *(int(line.token) for line in lines)}, width)
    most = max([*seen.measured.abs(), *table.measured.abs().dropna()], default=0.0) or 1.0
    radii = (4 + 11 * (table.measured.abs().fillna(0.0) / most) ** 0.5).tolist()
    told = LEGEND[: 3 if any(spot.shape == "diamond" for spot in spots) else 2]
    legend = [*chain.from_iterable(wrap(line, width // 6) for line in told)]
    floor = layout.floor
    body = [_filled_element(_SVG, width=width, height=floor + 74 + 15 * len(legend), style=STYLE)]
    body += [
        _filled_element(_BLOCK, block=block, right=width - 8, y=y, below=y + 4) for block, y in layout.rows.items()
    ]
    body += [_filled_element(_TOKEN, text=text, x=x + 4, y=floor + 16) for text, x in layout.token_labels(texts)]
    body += [_line_markup(line, layout, most) for line in reversed(lines)]
    for spot, radius in zip(spots, radii):
        x, y = layout.places[spot.node_id]
        sign = "hurt" if spot.measured < 0 else "help"
        known = "not measured" if pd.isna(spot.measured) else f"{spot.measured:+.2f} measured"
        about = {"name": spot.node_id, "known": known, "predicted": spot.predicted, "path": _PATHS[spot.shape]}
        body.append(_filled_element(_NODE, sign=sign, x=x, y=y, radius=radius, **about))
    body += [_filled_element(_LABEL, text=text, x=x, y=y + 3) for text, x, y in layout.labels(spots, radii, words)]
    body.append(_filled_element(_TITLE, x=width - 8, title=metadata["title"], metric=metadata["metric"]))
    body += [_filled_element(_LEGEND, text=text, y=floor + 59 + 15 * row) for row, text in enumerate(legend, start=1)]
    return "".join(body) + "</svg>"


def _line_markup(line: Line, layout: Layout, most: float) -> str:
    (x1, y1), (x2, y2) = layout.places[line.source], layout.places[line.target]
    side = {"key": 10, "query": -10}.get(line.port, 0)  # lines from one source lie side by side
    bend = 0.35 * (y2 - y1)
    way = _CURVE.format(x1 + side, y1 + bend, x2 + side, y2 - bend, x2, y2)
    way = way if line.port != "part" else f"H{x2:.1f}V{y2:.1f}"
    into = {"direct": "into", "state": "into", "part": "a part of"}.get(line.port, f"into the {line.port} of")
    said = f"{line.source} {into} {line.target}: {line.measured:+.2f} measured"
    sign = "help" if line.measured > 0 else "hurt"
    wide = 1 + 6 * abs(line.measured) / most
    return _filled_element(_LINE, sign=sign, port=line.port, wide=wide, x1=x1, y1=y1, way=way, said=said)


def _filled_element(template: str, **values: object) -> str:
    """An element; texts are escaped."""
    return template.format(**{name: escape(x) if isinstance(x, str) else x for name, x in values.items()})


def _visible_lines(edges: pd.DataFrame) -> pd.DataFrame:
    """The edges that are worth a line, largest first: the largest sources of each port; the largest edge of each node,
    so that its path is drawn; and a token's stream where nothing that it holds has a line into the port."""
    token = pd.to_numeric(edges.source.str.extract(r"@(\d+)")[0])
    edges = edges.assign(token=token, is_part=edges.port == "part").dropna(subset=["measured", "token"])
    edges = edges.loc[by_size(edges.measured)]
    is_stream = edges.source.str.startswith("stream@")
    size = edges.measured.abs()
    is_large = size >= _LEAST * size[~is_stream].max()
    of_nodes = edges[~is_stream]
    room = [_SOURCES.get(port, 2) for port in of_nodes.port]
    has_room = of_nodes.groupby(["target", "port"]).cumcount() < room
    is_path = ~of_nodes.is_part & ~of_nodes.duplicated(["source", "is_part"])
    drawn = of_nodes[is_path | (has_room & (of_nodes.is_part | is_large[~is_stream]))]
    streams = edges[is_stream & is_large].drop_duplicates(["target", "port"])
    lines = pd.concat([drawn, streams])
    is_told = lines.duplicated(["target", "port", "token"]) & is_stream.reindex(lines.index)
    return lines[~is_told].loc[lambda some: by_size(some.measured)]


def _visible_spots(nodes: pd.DataFrame) -> pd.DataFrame:
    """The nodes, largest first, with their shape, and how many of a kind a block has at a token."""
    spots = nodes.loc[by_size(nodes.measured.fillna(0.0))]
    spots = spots.assign(shape=spots.feature_type.map(_SHAPES).fillna("diamond"), is_mlp=spots.feature_type == "mlp")
    alike = spots.groupby(["layer", "position", "is_mlp", "shape"]).node_id
    return spots.assign(number=alike.cumcount(), alike=alike.transform("size"))
