"""Where a picture has the nodes and lines of a graph. Its markup is `picture.svg`: no scripts, fonts or network."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import cast

import numpy as np
import pandas as pd

from hookpoints.circuit.tables import by_size

_LEFT = 34
_ROW = 70
_BELOW = 30
"""From one node of a block to the next at the same token, or to the parts of a write or a state."""
_FIRST = 94
"""Where the highest block is; the logit is above."""
_LETTER = 6.4
"""Width of a letter, in fonts that are wide."""
_SHAPES = {"write": "circle", "state": "circle", "embedding": "square", "attn": "square", "mlp": "square"}
"""Of nodes that are no parts."""
_SOURCES = {"direct": 1000, "part": 4}
"""Sources of a port that are drawn."""
_LEAST = 0.08
"""Share of the largest edge from which on an edge is drawn that is not the largest of its source."""
_NOT_XML = "[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]"
"""Characters that a token may have and an SVG may not."""


def svg(nodes: pd.DataFrame, edges: pd.DataFrame, metadata: Mapping[str, object], width: int) -> str:
    """The picture of a pruned graph, as wide as so many pixels; tokens and blocks without a node are left out."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    lines = _visible_lines(edges)
    seen = nodes[nodes.node_id.isin([*lines.source, *lines.target])]
    spots = _visible_spots(seen)
    size = spots.measured.abs()
    most = max([*lines.measured.abs(), *size], default=0.0) or 1.0
    spots["radius"] = 4 + 11 * (size / most) ** 0.5
    # Columns of tokens, and rows of blocks, from above.
    tokens = sorted({len(cast("list[str]", metadata["tokens"])) - 1, *lines.token, *spots.position})
    column = (width - _LEFT - 14) / len(tokens)
    across = pd.Series([_LEFT + column * (n + 0.5) for n in range(len(tokens))], tokens)
    depth = spots[spots.layer >= 0].groupby("layer").number.max()[::-1]
    ends = _FIRST + (_ROW + _BELOW * depth).cumsum()
    rows = ends.shift(fill_value=_FIRST)
    floor = max([_FIRST, *ends])
    # Where nodes are, and where lines begin and end.
    x = spots.position.map(across)
    y = spots.layer.map(rows).fillna(floor - 14) + _BELOW * spots.number
    spots["x"] = x - 26 * np.sign(x - width / 2) * (spots["shape"] == "diamond")  # to where there is more room
    spots["y"] = y - 0.4 * _ROW * (spots.feature_type == "mlp")
    places = pd.DataFrame({"x": across, "y": floor}).rename("stream@{}".format)
    places.loc["logit"] = [across.iloc[-1], 36]
    places = pd.concat([places, spots.set_index("node_id")[["x", "y"]]])
    curves = _line_curves(lines.port, places.loc[lines.source].to_numpy(), places.loc[lines.target].to_numpy(), column)
    pages = Environment(
        loader=PackageLoader("hookpoints", "circuit"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = pages.get_template("picture.svg").render(
        metadata,
        width=width,
        rows=rows.items(),
        floor=floor,
        across=[*across.items()],
        most=most,
        lines=[*zip(lines.itertuples(), curves.round(1).tolist())][::-1],
        spots=[*spots.itertuples()],
        labels=_node_labels(spots, width, floor),
    )
    return re.sub(_NOT_XML, "�", page)


def _visible_lines(edges: pd.DataFrame) -> pd.DataFrame:
    """The edges that are worth a line, largest first: the largest sources of each port; the largest edge of each node,
    so that its path is drawn; and a token's stream where nothing that it holds has a line into the port."""
    token = edges.source.str.extract(r"@(\d+)")[0]
    edges = edges.assign(token=token).dropna(subset=["measured", "token"]).astype({"token": int})
    edges = edges.loc[by_size(edges.measured)]
    is_stream = edges.source.str.startswith("stream@")
    is_part = edges.port == "part"
    size = edges.measured.abs()
    is_large = size >= _LEAST * size[~is_stream].max()
    room = edges.port.map(_SOURCES).fillna(2).astype(int).where(~is_stream, 1)
    has_room = edges.groupby(["target", "port", is_stream]).cumcount() < room
    is_path = ~is_stream & ~is_part & ~edges.duplicated("source")
    lines = edges[is_path | (has_room & (is_part | is_large))]
    is_told = is_stream[lines.index] & lines.duplicated(["target", "port", "token"], keep=False)
    return lines[~is_told]


def _visible_spots(nodes: pd.DataFrame) -> pd.DataFrame:
    """The nodes, largest first, with their shape and label; and how many are above each in its block at its token:
    parts are below the others, and MLPs are on their own."""
    spots = nodes.loc[by_size(nodes.measured)]
    shape = spots.feature_type.map(_SHAPES).fillna("diamond")
    # A node without its token, which is below it, or without what a part is of; and its effect.
    name = spots.node_id.str.replace(r"^\S+ (?!state)|@\d+", "", regex=True)
    label = name + spots.measured.map(" {:+.2f}".format)
    stacked = spots.loc[(shape == "diamond").sort_values(kind="stable").index]
    beside = stacked.groupby(["layer", "position", stacked.feature_type == "mlp"])
    return spots.assign(shape=shape, label=label, number=beside.cumcount())


def _line_curves(ports: pd.Series, first: np.ndarray, last: np.ndarray, column: float) -> np.ndarray:
    """[N,4,2]: where each line begins, two places that it bends to, and where it ends. Those of one token bend aside,
    the more the longer they are, so that they pass what is between; and those from one source lie apart."""
    rise = last[:, 1] - first[:, 1]
    aside = np.minimum(0.25 * abs(rise), 0.6 * column) * (first[:, 0] == last[:, 0])
    side = ports.map({"key": 10, "query": -10}).fillna(0).to_numpy() + aside
    bend = np.stack([side, 0.35 * rise], 1)
    return np.stack([first, first + bend, last + bend * (1, -1), last], 1)


def _node_labels(spots: pd.DataFrame, width: int, floor: float) -> Iterator[tuple[str, float, float, int]]:
    """The names of nodes for which there is room, the largest first, where they are, and on which side of the node: on
    its left (-1), its right (1), or above or below it (0)."""
    nodes = [*zip(spots.x, spots.y, spots.radius)]
    # Middle, half width and half height of what no name may cover: edges of the picture, nodes, and names so far.
    covered = [(0.0, 0.0, 26.0, 9999.0), (width, 0.0, 0.0, 9999.0), (0.0, floor + 20, width, 12.0)]
    covered += [(x, y, radius, radius) for x, y, radius in nodes]
    for label, (x, y, radius) in zip(spots.label, nodes):
        half = _LETTER / 2 * len(label)
        beside = radius + 4 + half
        tried = [(x - beside, y, -1), (x + beside, y, 1), (x, y - radius - 9, 0), (x, y + radius + 9, 0)]
        for middle, height, side in tried:
            boxes = np.array(covered)
            distance = abs(boxes[:, :2] - (middle, height)) - boxes[:, 2:]
            if not (distance < (half + 3, 6)).all(1).any():
                covered.append((middle, height, half, 6.0))
                yield label, middle - side * half, height, side
                break
