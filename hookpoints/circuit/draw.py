"""The picture of a graph: one SVG without scripts, fonts or network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from itertools import chain
from textwrap import wrap
from typing import NamedTuple, cast

import pandas as pd

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
_LEFT = 34
_ROW = 66
_TOP = 44
_PART = 30
"""Height of a part of a write or a state, which is drawn below it."""
_CIRCLE = "M-1 0a1 1 0 1 0 2 0a1 1 0 1 0-2 0z"
_SQUARE = "M-.75-.75h1.5v1.5h-1.5z"
_DIAMOND = "M0-1.06L1.06 0L0 1.06L-1.06 0z"
_SHAPES = {"write": _CIRCLE, "state": _CIRCLE, "embedding": _SQUARE, "attn": _SQUARE, "mlp": _SQUARE}
"""Of nodes that are no parts, of radius 1."""
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
    """0 where it was not."""

    @property
    def is_part(self) -> bool:
        """Whether it is drawn below what it is a part of."""
        return self.feature_type not in _SHAPES


class Line(NamedTuple):
    """An edge in the picture."""

    source: str
    target: str
    port: str
    measured: float


class Layout:
    """Columns of the tokens, and rows of the blocks, that a graph has something at."""

    def __init__(self, spots: Sequence[Spot], lines: Sequence[Line], last: int, width: int):
        self.width = width
        streams = {_token_of_node(line.source) for line in lines if line.source.startswith("stream@")}
        self.tokens = sorted({last, *streams, *(spot.position for spot in spots)})
        self.column = (width - _LEFT - 14) / len(self.tokens)
        self.rows: dict[int, float] = {}
        """The line of each block."""
        self.floor = _TOP + 0.55 * _ROW
        for block in sorted({spot.layer for spot in spots if spot.layer >= 0}, reverse=True):
            self.rows[block] = self.floor
            below = Counter(spot.position for spot in spots if spot.is_part and spot.layer == block)
            self.floor += _ROW + _PART * max(below.values(), default=0)
        self.places = {f"stream@{token}": (self.across(token), self.floor) for token in self.tokens}
        self.places |= {spot.node_id: self._spot_place(spot, spots) for spot in spots}
        self.places["logit"] = (self.across(last), _TOP - 10.0)

    def across(self, token: int) -> float:
        """The middle of a token's column."""
        return _LEFT + self.column * (self.tokens.index(token) + 0.5)

    def away(self, x: float) -> int:
        """Where a place has more room: 1 on its right, -1 on its left."""
        return 1 if x < self.width / 2 else -1

    def _spot_place(self, spot: Spot, spots: Sequence[Spot]) -> tuple[float, float]:
        x = self.across(spot.position)
        if spot.layer < 0:
            return x, self.floor - 14
        y = self.rows[spot.layer]
        if spot.feature_type == "mlp":  # above the heads of its block
            return x, y - 0.3 * _ROW
        there = [other for other in spots if (other.layer, other.position) == (spot.layer, spot.position)]
        alike = [other for other in there if other.is_part == spot.is_part and other.feature_type != "mlp"]
        number = alike.index(spot)
        if spot.is_part:
            return x + 26 * self.away(x), y + _PART * (number + 1)
        step = min(self.column / len(alike), 24.0)
        return x + step * (number - (len(alike) - 1) / 2), y


def svg(nodes: pd.DataFrame, edges: pd.DataFrame, metadata: Mapping[str, object], width: int) -> str:
    """The picture of a pruned graph, as wide as so many pixels; tokens and blocks without a node are left out."""
    texts = cast(Sequence[str], metadata["tokens"])
    words = cast(Mapping[str, str], metadata.get("labels", {}))
    lines = _visible_lines(edges)
    spots = _visible_spots(nodes, lines)
    layout = Layout(spots, lines, len(texts) - 1, width)
    most = max([abs(shown.measured) for shown in (*spots, *lines)], default=0) or 1.0
    body = [f"<style>{STYLE}</style>", *_grid_elements(layout, texts)]
    body += [_line_element(line, layout, most) for line in reversed(lines)]
    body += _spot_elements(spots, layout, most, words)
    title = f"{metadata['title']}: {cast(float, metadata['metric']):+.2f}"
    body.append(_text_element("text", title, x=width - 8, y=_TOP - 22.0, class_="title", text_anchor="end"))
    legend = LEGEND if any(spot.is_part for spot in spots) else LEGEND[:-1]
    below = layout.floor + 74
    for row in chain.from_iterable(wrap(line, width // 6) for line in legend):
        body.append(_text_element("text", row, x=6, y=below, class_="soft"))
        below += 15
    box = f"0 0 {width} {below:.0f}"
    attributes = {"xmlns": "http://www.w3.org/2000/svg", "viewBox": box, "style": f"max-width: {width}px"}
    return _raw_element("svg", "".join(body), class_="circuit", role="img", width="100%", **attributes)


def _visible_lines(edges: pd.DataFrame) -> list[Line]:
    """The measured edges that are worth a line, largest first: for each port the largest sources, and a token's stream
    only where nothing that it holds has one. The largest edge of each node has one, so that its path is drawn."""
    measured = edges.dropna(subset="measured")
    lines = sorted(map(Line._make, measured[list(Line._fields)].to_numpy().tolist()), key=_drawn_size)
    least = _LEAST * max((abs(line.measured) for line in lines), default=0.0)
    of_nodes = [line for line in lines if not line.source.startswith("stream@")]
    paths = {line.source: line for line in reversed(of_nodes) if line.port != "part"}
    drawn = list[Line]()
    taken = Counter[tuple[str, str]]()
    for line in of_nodes:
        is_large = line.port == "part" or abs(line.measured) >= least
        has_room = taken[line.target, line.port] < _SOURCES.get(line.port, 2)
        if line is paths.get(line.source) or (is_large and has_room):
            drawn.append(line)
            taken[line.target, line.port] += 1
    told = {(line.target, line.port, _token_of_node(line.source)) for line in drawn}
    for line in lines:
        places = {(line.target, line.port, token) for token in (_token_of_node(line.source), -1)}
        if line.source.startswith("stream@") and abs(line.measured) >= least and not told & places:
            drawn.append(line)
            told |= places
    return sorted(drawn, key=_drawn_size)


def _drawn_size(shown: Spot | Line) -> float:
    """The largest first."""
    return -abs(shown.measured)


def _token_of_node(node_id: str) -> int:
    return int(node_id.split(" ")[0].split("@")[1])


def _visible_spots(nodes: pd.DataFrame, lines: Sequence[Line]) -> list[Spot]:
    """The nodes that have a line, the largest first."""
    named = {name for line in lines for name in (line.source, line.target)}
    known = nodes[nodes.node_id.isin(named)].fillna({"measured": 0.0})
    return sorted(map(Spot._make, known[list(Spot._fields)].to_numpy().tolist()), key=_drawn_size)


def _grid_elements(layout: Layout, texts: Sequence[str]) -> Iterator[str]:
    """Lines of the blocks, and the tokens below."""
    for block, y in layout.rows.items():
        yield _text_element("line", x1=_LEFT, x2=layout.width - 8, y1=y, y2=y)
        yield _text_element("text", f"L{block}", x=6, y=y + 4, class_="soft")
    before = -1
    for token in layout.tokens:
        text = texts[token].replace("\n", "⏎").strip() or "␣"
        text = text if len(text) <= 11 else text[:10] + "…"
        text = f"… {text}" if token > before + 1 else text  # tokens in between have nothing
        before = token
        x = layout.across(token) + 4
        y = layout.floor + 16
        yield _text_element("text", text, x=x, y=y, transform=f"rotate(-38 {x:.1f} {y:.1f})", text_anchor="end")


def _line_element(line: Line, layout: Layout, most: float) -> str:
    (x1, y1), (x2, y2) = layout.places[line.source], layout.places[line.target]
    side = {"key": 10, "query": -10}.get(line.port, 0)  # lines from one source lie side by side
    bend = 0.35 * (y2 - y1)
    points = [(x1, y1), (x1 + side, y1 + bend), (x2 + side, y2 - bend), (x2, y2)]
    start, *rest = (f"{x:.1f} {y:.1f}" for x, y in points)
    way = f"M{start}C{' '.join(rest)}" if line.port != "part" else f"M{start}H{x2:.1f}V{y2:.1f}"
    into = {"direct": "into", "state": "into", "part": "a part of"}.get(line.port, f"into the {line.port} of")
    said = _text_element("title", f"{line.source} {into} {line.target}: {line.measured:+.2f} measured")
    wide = 1 + 6 * abs(line.measured) / most
    sign = "help" if line.measured > 0 else "hurt"
    return _raw_element("path", said, d=way, class_=f"{sign} {line.port}", stroke_width=wide)


def _spot_elements(spots: Sequence[Spot], layout: Layout, most: float, labels: Mapping[str, str]) -> Iterator[str]:
    """Nodes, and as many of their labels as have room, the largest first."""
    radii = [4 + 11 * (abs(spot.measured) / most) ** 0.5 for spot in spots]
    taken = [(*layout.places[spot.node_id], radius, radius) for spot, radius in zip(spots, radii)]
    taken.append((layout.width / 2, layout.floor + 20, layout.width / 2, 12))  # the tokens
    texts = []
    for spot, radius in zip(spots, radii):
        x, y = layout.places[spot.node_id]
        place, _, kind = spot.node_id.partition(" ")
        head, _, _ = place.partition("@")
        name = labels.get(spot.node_id, kind) if spot.is_part else f"{head} {kind}".strip()
        words = f"{name} {spot.measured:+.2f}" if spot.measured else name
        half = 2.9 * len(words)
        middle = min(max(x, half + 4), layout.width - half - 4)
        tried = [(middle, y - radius - 8), (middle, y + radius + 9), (x + layout.away(x) * (radius + 5 + half), y)]
        for across, up in tried[2 * (spot.is_part or spot.feature_type == "state") :]:
            apart = [abs(across - x) > half + wide + 3 or abs(up - y) > 6 + tall for x, y, wide, tall in taken]
            if all(apart):
                taken.append((across, up, half, 6))
                texts.append(_text_element("text", words, x=across, y=up + 3, text_anchor="middle"))
                break
        known = f"{spot.measured:+.2f} measured" if spot.measured else "not measured"
        title = _text_element("title", f"{spot.node_id}: {known}, {spot.predicted:+.2f} predicted")
        shape = _text_element("path", d=_SHAPES.get(spot.feature_type, _DIAMOND), transform=f"scale({radius:.2f})")
        sign = "hurt" if spot.measured < 0 else "help"
        place = {"data_node": spot.node_id, "transform": f"translate({x:.1f} {y:.1f})"}
        yield _raw_element("g", title + shape, class_=f"node {sign}", tabindex=0, **place)
    yield from texts


def _text_element(name: str, text: str = "", **attributes: object) -> str:
    return _raw_element(name, escape(text), **attributes)


def _raw_element(name: str, content: str, **attributes: object) -> str:
    """An element; floats get one digit, and ``class_`` is ``class``."""
    said = []
    for key, value in attributes.items():
        shown = f"{value:.1f}" if isinstance(value, float) else escape(str(value))
        said.append(f' {key.rstrip("_").replace("_", "-")}="{shown}"')
    return f"<{name}{''.join(said)}>{content}</{name}>"
