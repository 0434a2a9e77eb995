"""Tables of nodes and edges: how the parts of a graph become rows, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from torch import Tensor

from hookpoints.circuit.node import FeatureType, Node, PortName

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


def nodes_of_block(kind: FeatureType, layer: int, effect: Tensor) -> pd.DataFrame:
    """Nodes of one kind in one block, with predictions [T,H] or [T]."""
    values = effect.detach().double().cpu().reshape(len(effect), -1)
    nodes = []
    for position, head in np.ndindex(*values.shape):
        nodes.append(Node(kind, layer, head if effect.ndim == 2 else -1, position))
    return node_table(nodes, values.flatten().tolist(), np.nan)


def node_table(nodes: Sequence[Node], predicted: Sequence[float], measured: np.ndarray | float) -> pd.DataFrame:
    table = pd.DataFrame(nodes, columns=list(Node._fields))
    ids = [node.node_id for node in nodes]
    return table.assign(node_id=ids, predicted=predicted, measured=measured)[list(NODE_COLUMNS)]


def node_of(row: object) -> Node:
    """The node of a row of a table."""
    return Node(*(getattr(row, name) for name in Node._fields))


def edge_table(
    sources: Mapping[Node, float], target: str, port: PortName, read: int, measured: np.ndarray
) -> pd.DataFrame:
    """A row for each source; the last ones may have no measurement."""
    table = {
        "source": [source.node_id for source in sources],
        "target": target,
        "port": port,
        "read": read,
        "predicted": list(sources.values()),
        "measured": np.pad(measured, (0, len(sources) - len(measured)), constant_values=np.nan),
    }
    return pd.DataFrame(table)


def largest(nodes: pd.DataFrame, n: int) -> pd.DataFrame:
    """The n rows with the largest measured effect."""
    return nodes.loc[nodes.measured.abs().dropna().nlargest(n).index]
