"""Where a picture has the nodes of a graph: `picture.svg` is its markup, without scripts, fonts or network."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import chain
from textwrap import wrap
from typing import Any, cast

import pandas as pd
from jinja2 import Environment, PackageLoader

from hookpoints.circuit.tables import by_size

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


class Layout:
    """Columns of the tokens, and rows of the blocks, that a graph has something at."""

    def __init__(self, spots: pd.DataFrame, tokens: Collection[int], width: int):
        self.width = width
        self.tokens = sorted({*tokens, *spots.position})
        self.column = (width - _LEFT - 14) / len(self.tokens)
        parts = spots[spots["shape"] == "diamond"].groupby("layer").number.max() + 1
        self.rows: dict[int, float] = {}
        self.floor = float(_FIRST)
        for block in sorted({*spots.layer} - {-1}, reverse=True):
            self.rows[block] = self.floor
            self.floor += _ROW + _PART * parts.get(block, 0)
        self.places = {spot.node_id: self._spot_place(spot) for spot in spots.itertuples()}
        self.places |= {f"stream@{token}": (self.across(token), self.floor) for token in self.tokens}
        self.places["logit"] = (self.across(self.tokens[-1]), _FIRST - 46.0)

    def across(self, token: int) -> float:
        """The middle of a token's column."""
        return _LEFT + self.column * (self.tokens.index(token) + 0.5)

    def away(self, x: float) -> int:
        """Where a place has more room: 1 on its right, -1 on its left."""
        return 1 if x < self.width / 2 else -1

    def _spot_place(self, spot: Any) -> tuple[float, float]:
        x = self.across(spot.position)
        y = self.rows.get(spot.layer, self.floor - 14)
        if spot.shape == "diamond":
            return x + 26 * self.away(x), y + _PART * (spot.number + 1)
        aside = min(self.column / spot.count, 24.0) * (spot.number - (spot.count - 1) / 2)
        return x + aside, y - 0.3 * _ROW * (spot.feature_type == "mlp")  # above the heads of its block

    def token_labels(self, texts: Sequence[str]) -> Iterator[tuple[str, float]]:
        """Each token, short, and where it is."""
        for before, token in zip([-1, *self.tokens], self.tokens):
            text = texts[token].replace("\n", "⏎").strip() or "␣"
            text = text if len(text) <= 11 else text[:10] + "…"
            yield f"… {text}" if token > before + 1 else text, self.across(token)  # tokens in between have nothing

    def labels(self, spots: pd.DataFrame, radii: Sequence[float]) -> Iterator[tuple[str, float, float]]:
        """The names of nodes for which there is room, the largest first, and where they are."""
        taken = [(*self.places[name], radius, radius) for name, radius in zip(spots.node_id, radii)]
        taken.append((self.width / 2, self.floor + 20, self.width / 2, 12))  # the tokens
        for spot, (x, y, radius, _) in zip(cast("Iterator[Any]", spots.itertuples()), [*taken]):
            half = 2.9 * len(spot.label)
            middle = min(max(x, half + 4), self.width - half - 4)
            aside = x + self.away(x) * (radius + 5 + half)
            tried = [(middle, y - radius - 8), (middle, y + radius + 9), (aside, y)]
            for across, up in tried[2 * (" " in spot.node_id) :]:  # below a state are its parts
                if all(abs(across - x) > half + wide + 3 or abs(up - y) > 6 + tall for x, y, wide, tall in taken):
                    taken.append((across, up, half, 6))
                    yield spot.label, across, up
                    break


def svg(nodes: pd.DataFrame, edges: pd.DataFrame, metadata: Mapping[str, object], width: int) -> str:
    """The picture of a pruned graph, as wide as so many pixels; tokens and blocks without a node are left out."""
    words = cast(Mapping[str, str], metadata.get("labels", {}))
    texts = cast(Sequence[str], metadata["tokens"])
    lines = _visible_lines(edges)
    spots = _visible_spots(nodes[nodes.node_id.isin([*lines.source, *lines.target])], words)
    layout = Layout(spots, {len(texts) - 1, *lines.token.astype(int)}, width)
    most = max([*lines.measured.abs(), *spots.measured.abs().dropna()], default=0.0) or 1.0
    radii = (4 + 11 * (spots.measured.abs().fillna(0.0) / most) ** 0.5).tolist()
    legend = LEGEND[: 3 if "diamond" in {*spots["shape"]} else 2]
    page = Environment(
        loader=PackageLoader("hookpoints.circuit", ""), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return page.get_template("picture.svg").render(
        metadata,
        layout=layout,
        most=most,
        lines=[(line, layout.places[line.source], layout.places[line.target]) for line in lines[::-1].itertuples()],
        spots=[(spot, layout.places[spot.node_id], radius) for spot, radius in zip(spots.itertuples(), radii)],
        tokens=[*layout.token_labels(texts)],
        labels=[*layout.labels(spots, radii)],
        legend=[*chain.from_iterable(wrap(line, width // 6) for line in legend)],
    )


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


def _visible_spots(nodes: pd.DataFrame, words: Mapping[str, str]) -> pd.DataFrame:
    """The nodes, largest first, with shape and label, and what is beside what: MLPs, parts, or others of one block and
    token."""
    spots = nodes.loc[by_size(nodes.measured.fillna(0.0))]
    spots = spots.assign(
        shape=spots.feature_type.map(_SHAPES).fillna("diamond"),
        is_mlp=spots.feature_type == "mlp",
        label=[_spot_label(spot, words) for spot in spots.itertuples()],
    )
    beside = spots.groupby(["layer", "position", "is_mlp", "shape"]).node_id
    return spots.assign(number=beside.cumcount(), count=beside.transform("size"))


def _spot_label(spot: Any, words: Mapping[str, str]) -> str:
    """A node without its token, which is below it, or what a part is of; and its effect."""
    place, _, kind = spot.node_id.partition(" ")
    name = words.get(spot.node_id, kind) if spot.feature_type not in _SHAPES else f"{place.partition('@')[0]} {kind}"
    return name.strip() if pd.isna(spot.measured) else f"{name.strip()} {spot.measured:+.2f}"
