"""Heads that a write can reach: those of later layers, recurrent or attention, and what each gives at a token.

A write leaves its head through that head's own reads, so that heads of the same layer and below cannot notice it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple

from torch import Tensor

from hookpoints import HookedRecurrent


class DownstreamHeads(NamedTuple):
    """The heads of one mixer above a layer."""

    layer: int
    mixer: Literal["recurrence", "attention"]
    n_heads: int
    hook: str
    """`hook_read` of a recurrence, `hook_z` of attention: [B,T,H,V], what its heads give before they are mixed."""


def downstream_heads(model: HookedRecurrent, layer: int) -> list[DownstreamHeads]:
    """The heads of all layers above `layer`, from below. A block that has both mixers is listed with both."""
    mixers: list[DownstreamHeads] = []
    for above in range(layer + 1, model.cfg.n_layers):
        if above in model.cfg.recurrent_layers:
            mixers.append(
                DownstreamHeads(above, "recurrence", model.cfg.layer(above).H, f"blocks.{above}.mixer.hook_read")
            )
        if (n_heads := model.cfg.attention_heads(above)) is not None:
            mixers.append(DownstreamHeads(above, "attention", n_heads, f"blocks.{above}.attn.hook_z"))
    return mixers


@contextmanager
def newest_outputs(model: HookedRecurrent, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """What was at each of some hooks in the newest forward pass, by name, while the scope is open.

    A readout that `Lab.read` calls inside of the scope finds the outputs of its batch here.
    """
    newest: dict[str, Tensor] = {}
    with model.hooks([(name, lambda x, hook, name=name: newest.__setitem__(name, x)) for name in names]):
        yield newest
