"""What graphs are made of: names of nodes, tables of nodes and edges, and what a run has other than the plain pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from hookpoints.errors import InputError

FeatureType = Literal["embedding", "write", "state", "attn", "mlp", "bias", "atom", "error", "stream", "logit"]
"""What a node is: a token's embedding, the write of a recurrent head, all that it holds, the output of a softmax head
or of an MLP; an atom of a write or a state, what the dictionary adds to all and what it misses; all that the stream
holds at a token, a logit."""
PortName = Literal["value", "key", "query", "gate", "input", "part", "state", "direct"]
"""Where an edge enters: the value or the key of a write, the query that reads it, its gate (what decay and erase leave
of the state before it); values, keys, query or gate of a softmax head; the input of an MLP; the write or the state of
which the source is a part; or a logit: by all that a state does, or directly."""


_PLACE = "L{layer}H{head}@{position}"
_NAMES: dict[FeatureType, str] = {
    "embedding": "E@{position}",
    "write": _PLACE,
    "attn": "L{layer}A{head}@{position}",
    "mlp": "MLP{layer}@{position}",
    "atom": _PLACE + " atom {feature}",
    "stream": "stream@{position}",
}
_HOOKS: dict[FeatureType, str] = {
    "embedding": "hook_embed",
    "write": "blocks.{}.mixer.hook_read",
    "attn": "blocks.{}.attn.hook_z",
    "mlp": "blocks.{}.hook_mlp_out",
    "stream": "blocks.{}.hook_resid_pre",
}


class Node(NamedTuple):
    """One entry of a graph."""

    feature_type: FeatureType
    layer: int = -1
    head: int = -1
    position: int = -1
    feature: int = -1
    """Number of an atom."""

    @property
    def node_id(self) -> str:
        """A name, unique in a graph: "L4H0@13" a write, "L0A1@13" a softmax head, "MLP2@13", "E@13"."""
        alone = self.feature_type if self.position < 0 else f"{_PLACE} {self.feature_type}"
        form = _NAMES.get(self.feature_type, alone)
        if self.head < 0:  # all heads are one node
            form = form.replace("H{head}", "").replace("{head}", "")
        return form.format(**self._asdict())

    @property
    def hook(self) -> str:
        """Which hook sees what it is, all tokens and heads together; of a write, what is read of it."""
        is_mixer = self.feature_type == "attn" and self.head < 0
        return f"blocks.{self.layer}.hook_attn_out" if is_mixer else _HOOKS[self.feature_type].format(self.layer)


class RunAnswer(NamedTuple):
    """What a model says in a run without some nodes."""

    metric: float
    token: str
    """The most likely next one."""
    same: bool
    """Whether that is what the model says with all of them."""


class Change(NamedTuple):
    """What one run has other than the plain pass: values of hooks at one token."""

    layer: int
    """Lowest block that changes; -1: the embedding."""
    position: int
    values: Mapping[str, Tensor]
    """By the name of the hook, what its value [B,T,...] is at the token."""
    head: int = -1
    """The value of this head alone; -1: of all."""


NODE_COLUMNS = {
    "node_id": "str",
    "feature_type": "str",
    "layer": "int64",
    "head": "int64",
    "position": "int64",
    "feature": "int64",
    "predicted": "float64",
    "measured": "float64",
}
EDGE_COLUMNS = {
    "source": "str",
    "target": "str",
    "port": "str",
    "read": "int64",
    "predicted": "float64",
    "measured": "float64",
}


def by_size(effects: pd.Series) -> pd.Index:
    """Rows by the size of their effect, largest first."""
    return effects.abs().sort_values(ascending=False, kind="stable").index


def random_orders(rows: pd.DataFrame, draws: int) -> list[pd.DataFrame]:
    """So many, the same each time."""
    if draws < 1:
        raise InputError(f"draws: expected at least one random set, got {draws}")
    return [rows.sample(frac=1, random_state=draw) for draw in range(draws)]


class Predicted(NamedTuple):
    """Nodes of one kind in one block."""

    kind: Node
    effect: Tensor
    """[T,H], or [T] where the kind has no heads: predictions."""
    bound: Tensor
    """Of the same shape, bounds of these."""


def predicted_nodes(blocks: Sequence[Predicted]) -> pd.DataFrame:
    """All nodes, with bounds in the column ``bound``; in one copy to the host."""
    place = blocks[0].effect.device  # a model may lie on several
    sides = [torch.stack([block.effect, block.bound]).detach().flatten(1).to(place) for block in blocks]
    predicted, bounds = torch.cat(sides, 1).cpu().double().tolist()
    nodes: list[Node] = []
    for kind, effect, _ in blocks:
        places = np.ndindex(len(effect), *(effect.shape[1:] or (1,)))
        nodes += [kind._replace(position=position, head=kind.head + head) for position, head in places]
    return node_table(nodes, predicted, np.nan).assign(bound=bounds)


def node_table(nodes: Sequence[Node], predicted: Sequence[float], measured: np.ndarray | float) -> pd.DataFrame:
    table = pd.DataFrame(nodes, columns=list(Node._fields))
    ids = [node.node_id for node in nodes]
    return table.assign(node_id=ids, predicted=predicted, measured=measured)[list(NODE_COLUMNS)]


def node_of(row: object) -> Node:
    """The node of a row of a table."""
    return Node(*(getattr(row, name) for name in Node._fields))


def edge_table(rows: Sequence[tuple[object, ...]], measured: Sequence[float]) -> pd.DataFrame:
    """Of source, target, port, read and predicted effect of each edge, and its measured effect."""
    return pd.DataFrame(rows, columns=list(EDGE_COLUMNS)[:-1]).assign(measured=measured)


def largest(nodes: pd.DataFrame, n: int) -> pd.DataFrame:
    """The n rows with the largest measured effect, without those that have none but that of rounding."""
    size = nodes.measured.abs()
    return nodes.loc[size[size > 1e-5 * size.max()].nlargest(n).index]
