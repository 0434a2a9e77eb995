"""Where a picture has the nodes and lines of a graph. Its markup is `picture.svg`: no scripts, fonts or network."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from textwrap import wrap
from typing import cast

import pandas as pd

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


def svg(nodes: pd.DataFrame, edges: pd.DataFrame, metadata: Mapping[str, object], width: int) -> str:
    """The picture of a pruned graph, as wide as so many pixels; tokens and blocks without a node are left out."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    texts = cast("Sequence[str]", metadata["tokens"])
    words = cast("Mapping[str, str]", metadata.get("labels", {}))
    lines = _visible_lines(edges)
    spots = _visible_spots(nodes[nodes.node_id.isin([*lines.source, *lines.target])], words)
    most = max([*lines.measured.abs(), *spots.measured.abs().dropna()], default=0.0) or 1.0
    spots["radius"] = 4 + 11 * (spots.measured.abs().fillna(0.0) / most) ** 0.5
    tokens = sorted({len(texts) - 1, *lines.token, *spots.position})
    column = (width - _LEFT - 14) / len(tokens)
    across = pd.Series([_LEFT + column * (n + 0.5) for n in range(len(tokens))], tokens)
    rows, floor = _block_rows(spots)
    spots = _placed_spots(spots, across, spots.layer.map(rows).fillna(floor - 14), width)
    places = {f"stream@{token}": (x, floor) for token, x in across.items()}
    places |= {spot.node_id: (spot.x, spot.y) for spot in spots.itertuples()}
    legend = [*chain.from_iterable(wrap(line, width // 6) for line in LEGEND[: 2 + spots.is_part.any()])]
    pages = Environment(
        loader=PackageLoader("hookpoints", "circuit"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return pages.get_template("picture.svg").render(
        title=metadata["title"],
        metric=metadata["metric"],
        width=width,
        rows=rows.items(),
        floor=floor,
        tokens=zip(_token_labels(texts, tokens), across),
        most=most,
        lines=lines[::-1].itertuples(),
        spots=spots.itertuples(),
        places=places | {"logit": (across.iloc[-1], _FIRST - 46.0)},
        labels=_node_labels(spots, width, floor),
        legend=legend,
    )


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


def _visible_spots(nodes: pd.DataFrame, words: Mapping[str, str]) -> pd.DataFrame:
    """The nodes, largest first, with their shape and label, and how many of a kind a block has at a token."""
    spots = nodes.loc[by_size(nodes.measured.fillna(0.0))]
    shape = spots.feature_type.map(_SHAPES).fillna("diamond")
    is_part = shape == "diamond"
    label = [_label_text(*row, words) for row in zip(spots.node_id, spots.measured)]
    spots = spots.assign(shape=shape, is_part=is_part, is_mlp=spots.feature_type == "mlp", label=label)
    alike = spots.groupby(["layer", "position", "is_mlp", "shape"]).node_id
    return spots.assign(number=alike.cumcount(), alike=alike.transform("size"))


def _label_text(node: str, measured: float, words: Mapping[str, str]) -> str:
    """A node without its token, which is below it, or without what a part is of; and its effect."""
    name = words.get(node, re.sub(r"^\S+ (?!state)|@\d+", "", node))
    return name if pd.isna(measured) else f"{name} {measured:+.2f}"


def _block_rows(spots: pd.DataFrame) -> tuple[dict[int, float], float]:
    """Where each block is that has a node, from above, and where the tokens are, below all."""
    parts = spots[spots.is_part].groupby("layer").number.max() + 1
    rows = {}
    floor = float(_FIRST)
    for block in sorted({*spots.layer} - {-1}, reverse=True):
        rows[block] = floor
        floor += _ROW + _PART * parts.get(block, 0)
    return rows, floor


def _placed_spots(spots: pd.DataFrame, across: pd.Series, y: pd.Series, width: int) -> pd.DataFrame:
    """The nodes with places: around the middle of their token, ``across``, and ``y``, the height of their block."""
    x = spots.position.map(across)
    column = (width - _LEFT - 14) / len(across)
    gap = (column / spots.alike).clip(upper=24)
    away = 1 - 2 * (x >= width / 2)  # where there is more room: 1 on the right, -1 on the left
    aside = (gap * (spots.number - (spots.alike - 1) / 2)).mask(spots.is_part, 26 * away)
    below = (_PART * (spots.number + 1)).where(spots.is_part, -0.3 * _ROW * spots.is_mlp)  # MLPs are above the heads
    return spots.assign(x=x + aside, y=y + below)


def _token_labels(texts: Sequence[str], tokens: Sequence[int]) -> Iterator[str]:
    """Each token, short."""
    for before, token in zip([-1, *tokens], tokens):
        text = texts[token].replace("\n", "⏎").strip() or "␣"
        text = text if len(text) <= 11 else text[:10] + "…"
        yield f"… {text}" if token > before + 1 else text  # tokens in between have nothing


def _node_labels(spots: pd.DataFrame, width: int, floor: float) -> Iterator[tuple[str, float, float]]:
    """The names of nodes for which there is room, the largest first, and where they are."""
    taken = [*zip(spots.x, spots.y, spots.radius, spots.radius)]
    taken.append((width / 2, floor + 20, width / 2, 12))  # the tokens
    for label, is_alone, (x, y, radius, _) in zip(spots.label, ~spots.node_id.str.contains(" "), [*taken]):
        half = 2.9 * len(label)
        middle = min(max(x, half + 4), width - half - 4)
        aside = x + (1 if x < width / 2 else -1) * (radius + 5 + half)
        around = [(middle, y - radius - 8), (middle, y + radius + 9)] * is_alone  # below a state are its parts
        for across, up in [*around, (aside, y)]:
            gaps = [(abs(across - x) - wide, abs(up - y) - tall) for x, y, wide, tall in taken]
            if all(wide > half + 3 or tall > 6 for wide, tall in gaps):
                taken.append((across, up, half, 6))
                yield label, across, up
                break
