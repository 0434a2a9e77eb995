"""What graphs are made of: names of nodes, and what a run has other than the plain pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

from torch import Tensor

FeatureType = Literal["embedding", "write", "state", "attn", "mlp", "skip", "bias", "atom", "error", "stream", "logit"]
"""What a node is: a token's embedding, the write of a recurrent head, all that it holds, the output of a softmax head,
of an MLP, what a recurrent head hands on besides its state (Mamba-2's D x, RWKV's bonus), what biases add, a part of a
write or a state and what the parts miss, all that the stream holds at a token, a logit."""
PortName = Literal["value", "key", "query", "gate", "part", "direct"]
"""Where an edge enters: the value or the key of a write, the query that reads it, its gate (what decay and erase leave
of the state before it); values, keys, query or gate of a softmax head; the write or the state of which the source is a
part; or a logit."""


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
        head = "" if self.head < 0 else f"H{self.head}"
        place = f"L{self.layer}{head}@{self.position}"
        names: dict[FeatureType, str] = {
            "embedding": f"E@{self.position}",
            "write": place,
            "state": f"{place} state",
            "attn": place.replace("H", "A") if head else f"L{self.layer}A@{self.position}",
            "mlp": f"MLP{self.layer}@{self.position}",
            "skip": f"{place} skip",
            "atom": f"{place} atom {self.feature}",
            "error": f"{place} error",
            "stream": f"stream@{self.position}",
            "bias": "bias" if self.position < 0 else f"{place} bias",
            "logit": "logit",
        }
        return names[self.feature_type]


class Change(NamedTuple):
    """What one run has other than the plain pass: values of hooks at one token."""

    layer: int
    """Lowest block that changes; -1: the embedding."""
    position: int
    values: Mapping[str, Tensor]
    """By the name of the hook, what its value [B,T,...] is at the token."""
    head: int = -1
    """The value of this head alone; -1: of all."""
