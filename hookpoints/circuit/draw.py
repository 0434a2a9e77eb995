"""The picture of a graph: one SVG without scripts, fonts or network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
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
.circuit .node { cursor: pointer; } .circuit .node :is(circle, rect) { stroke: var(--paper); stroke-width: 1.5; }
.circuit .node.help :is(circle, rect) { fill: var(--help); }
.circuit .node.hurt :is(circle, rect) { fill: var(--hurt); }
.circuit .node:focus-visible { outline: 2px solid var(--ink); }
"""
_LEFT = 34
_ROW = 66
_TOP = 44
_EDGES = 2
"""Sources of a port that are drawn."""
_LEAST = 0.08
"""Share of the largest effect from which on an edge is drawn."""
LEGEND = (
    ("Circle: a write. Square: MLP, head or embedding. ", "Size and width: measured effect; blue helps, red hurts."),
    ("Lines into a value are solid, ", "into a key dotted, into a query or gate dashed."),
)


class Spot(NamedTuple):
    """A node in the picture."""

    node_id: str
    feature_type: str
    layer: int
    position: int
    effect: float
    """Measured; 0 where it was not."""
    said: str


class Line(NamedTuple):
    """An edge in the picture."""

    source: str
    target: str
    port: str
    effect: float


class Layout:
    """Columns of the tokens, and rows of the blocks, that a graph has something at."""

    def __init__(self, spots: Sequence[Spot], lines: Sequence[Line], last: int, width: int):
        tokens = {_token(line.source) for line in lines if line.source.startswith("stream@")}
        tokens |= {spot.position for spot in spots}
        self.tokens = sorted(tokens | {last})
        self.blocks = sorted({spot.layer for spot in spots if spot.layer >= 0})
        self.column = (width - _LEFT - 14) / len(self.tokens)
        self.floor = _TOP + _ROW * (len(self.blocks) + 0.55)
        self.places = {"logit": (self.across(last), _TOP - 10.0)}
        for token in self.tokens:
            self.places[f"stream@{token}"] = (self.across(token), self.floor)
        for spot in spots:
            self.places[spot.node_id] = self._place(spot, spots)

    def across(self, token: int) -> float:
        """The middle of a token's column."""
        return _LEFT + self.column * (self.tokens.index(token) + 0.5)

    def up(self, layer: int) -> float:
        """The line of a block."""
        return self.floor - _ROW * (self.blocks.index(layer) + 1)

    def _place(self, spot: Spot, spots: Sequence[Spot]) -> tuple[float, float]:
        x = self.across(spot.position)
        if spot.layer < 0:
            return x, self.floor - 14
        if spot.feature_type == "mlp":  # above the heads of its block
            return x, self.up(spot.layer) - 0.3 * _ROW
        heads = [other.node_id for other in spots if other.layer == spot.layer and other.position == spot.position]
        heads = [name for name in heads if not name.startswith("MLP")]
        step = min(self.column / len(heads), 24.0)
        return x + step * (heads.index(spot.node_id) - (len(heads) - 1) / 2), self.up(spot.layer)


def svg(nodes: pd.DataFrame, edges: pd.DataFrame, metadata: Mapping[str, object], width: int) -> str:
    """The picture of a pruned graph, as wide as so many pixels; tokens and blocks without a node are left out."""
    texts = cast(Sequence[str], metadata["tokens"])
    lines = list(_lines(edges))
    spots = list(_spots(nodes, lines))
    layout = Layout(spots, lines, len(texts) - 1, width)
    most = max([*(abs(spot.effect) for spot in spots), *(abs(line.effect) for line in lines), 1e-12])
    narrow = width < 560
    body = [f"<style>{STYLE}</style>", *_grid(layout, texts, width)]
    body += [_path(line, layout, most) for line in sorted(lines, key=lambda line: abs(line.effect))]
    body += _shapes(spots, layout, most, width)
    title = f"{metadata['title']}: {cast(float, metadata['metric']):+.2f}"
    body.append(_tag("text", title, x=width - 8, y=_TOP - 22.0, class_="title", text_anchor="end"))
    legend = [part for line in LEGEND for part in (line if narrow else ["".join(line)])]
    for row, words in enumerate(legend):
        body.append(_tag("text", words, x=6, y=layout.floor + 66 + 15 * row, class_="soft"))
    box = f"0 0 {width} {layout.floor + 66 + 15 * len(legend):.0f}"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" class="circuit" role="img" viewBox="{box}" width="100%"'
    return f'{head} style="max-width: {width}px">{"".join(body)}</svg>'


def _lines(edges: pd.DataFrame) -> Iterator[Line]:
    """The measured edges that are worth a line: for each port the largest sources, and a token's stream only where
    nothing that it holds has one."""
    measured = edges[edges.measured.notna()]
    measured = measured[measured.measured.abs() >= _LEAST * measured.measured.abs().max()]
    by_port: dict[tuple[str, str], list[Line]] = {}
    columns = [measured[name].tolist() for name in Line._fields[:3]]
    for line in map(Line, *columns, measured.measured.tolist()):
        by_port.setdefault((line.target, line.port), []).append(line)
    for (_, port), lines in by_port.items():
        lines = sorted(lines, key=lambda line: -abs(line.effect))
        parts = [line for line in lines if not line.source.startswith("stream@")]
        parts = parts if port == "direct" else parts[:_EDGES]
        tokens = {_token(line.source) for line in parts}
        yield from parts
        yield from [line for line in lines if line not in parts and _token(line.source) not in tokens][:1]


def _token(node_id: str) -> int:
    return int(node_id.split(" ")[0].split("@")[1])


def _spots(nodes: pd.DataFrame, lines: Sequence[Line]) -> Iterator[Spot]:
    """The nodes that have a line, or an effect to speak of."""
    named = {name for line in lines for name in (line.source, line.target)}
    least = _LEAST * nodes.measured.abs().max()
    for row in nodes[nodes.feature_type.isin(["embedding", "write", "attn", "mlp"])].to_dict("records"):
        measured = row["measured"] if row["measured"] == row["measured"] else 0.0
        if row["node_id"] in named or abs(measured) >= least:
            known = f"{measured:+.2f} measured" if measured else "not measured"
            said = f"{row['node_id']}: {known}, {row['predicted']:+.2f} predicted"
            yield Spot(row["node_id"], row["feature_type"], row["layer"], row["position"], measured, said)


def _grid(layout: Layout, texts: Sequence[str], width: int) -> Iterator[str]:
    """Lines of the blocks, and the tokens below."""
    for block in layout.blocks:
        y = layout.up(block)
        yield _tag("line", x1=_LEFT, x2=width - 8, y1=y, y2=y)
        yield _tag("text", f"L{block}", x=6, y=y + 4, class_="soft")
    before = -1
    for token in layout.tokens:
        text = texts[token].replace("\n", "⏎").strip() or "␣"
        text = text if len(text) <= 11 else text[:10] + "…"
        text = f"… {text}" if token > before + 1 else text  # tokens in between have nothing
        before = token
        x = layout.across(token) + 4
        y = layout.floor + 16
        yield _tag("text", text, x=x, y=y, transform=f"rotate(-38 {x:.1f} {y:.1f})", text_anchor="end")


def _path(line: Line, layout: Layout, most: float) -> str:
    if line.source not in layout.places or line.target not in layout.places:
        return ""
    (x1, y1), (x2, y2) = layout.places[line.source], layout.places[line.target]
    side = {"key": 10, "query": -10}.get(line.port, 0)  # lines from one source lie side by side
    bend = 0.35 * (y2 - y1)
    points = [(x1, y1), (x1 + side, y1 + bend), (x2 + side, y2 - bend), (x2, y2)]
    start, *rest = (f"{x:.1f} {y:.1f}" for x, y in points)
    way = f"M{start}C{' '.join(rest)}"
    said = _tag("title", f"{line.source} into the {line.port} of {line.target}: {line.effect:+.2f} measured")
    wide = 1 + 6 * abs(line.effect) / most
    sign = "help" if line.effect > 0 else "hurt"
    return _raw("path", said, d=way, class_=f"{sign} {line.port}", stroke_width=wide)


def _shapes(spots: Sequence[Spot], layout: Layout, most: float, width: int) -> Iterator[str]:
    """Nodes, and as many of their labels as have room, the largest first."""
    taken: list[tuple[float, float, float]] = []
    labels = []
    for spot in sorted(spots, key=lambda spot: -abs(spot.effect)):
        x, y = layout.places[spot.node_id]
        radius = 4 + 11 * (abs(spot.effect) / most) ** 0.5
        name = spot.node_id.split("@")[0]
        words = f"{name} {spot.effect:+.2f}" if spot.effect else name
        half = 2.9 * len(words)
        middle = min(max(x, half + 4), width - half - 4)
        for height in (y - radius - 5, y + radius + 12):
            apart = [abs(middle - left) > half + size + 3 or abs(height - up) > 12 for left, up, size in taken]
            if all(apart):
                taken.append((middle, height, half))
                labels.append(_tag("text", words, x=middle, y=height, text_anchor="middle"))
                break
        shape = _tag("circle", cx=x, cy=y, r=radius)
        if spot.feature_type != "write":
            side = 1.5 * radius
            shape = _tag("rect", x=x - side / 2, y=y - side / 2, width=side, height=side, rx=2)
        sign = "hurt" if spot.effect < 0 else "help"
        content = _tag("title", spot.said) + shape
        yield _raw("g", content, class_=f"node {sign}", data_node=spot.node_id, tabindex=0)
    yield from labels


def _tag(name: str, text: str = "", **attributes: object) -> str:
    return _raw(name, escape(text), **attributes)


def _raw(name: str, content: str, **attributes: object) -> str:
    """An element; floats get one digit, and ``class_`` is ``class``."""
    said = []
    for key, value in attributes.items():
        shown = f"{value:.1f}" if isinstance(value, float) else escape(str(value))
        said.append(f' {key.rstrip("_").replace("_", "-")}="{shown}"')
    return f"<{name}{''.join(said)}>{content}</{name}>"
