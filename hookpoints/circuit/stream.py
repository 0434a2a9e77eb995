"""One text through the model: what hooks saw, and the factors of recurrent layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from hookpoints.circuit.tables import Node
from hookpoints.recurrence.canonical import tensors
from hookpoints.recurrence.recurrence import Recurrence

if TYPE_CHECKING:
    from hookpoints.model.recurrent import HookedRecurrent


class Text(NamedTuple):
    """One text through the model."""

    tokens: Tensor
    """[1,T]."""
    recurrences: Mapping[int, Recurrence]
    values: Mapping[str, Tensor]
    """What hooks saw, [1,T,...], by name."""

    def at(self, name: str) -> Tensor:
        """[T,...]."""
        return self.values[name][0].to(self.tokens.device)


def head_kinds(model: HookedRecurrent, layer: int) -> list[Node]:
    """Kinds of a block's heads: recurrent ones, softmax ones, or both; softmax ones may be one node. A kind is a node
    of no token, whose head is 0 where there are heads."""
    kinds = [Node("write", layer, 0)] if layer in model.cfg.layers else []
    if layer in model.cfg.attention or not kinds:
        kinds.append(Node("attn", layer, 0 if layer in model.cfg.attention else -1))
    return kinds


def moved(recurrences: Mapping[int, Recurrence], place: torch.device) -> dict[int, Recurrence]:
    """The same factors on another device."""
    return {layer: replace(r, **{name: x.to(place) for name, x in tensors(r)}) for layer, r in recurrences.items()}
