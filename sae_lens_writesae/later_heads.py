"""Heads that a write can reach: those of later layers, recurrent or attention, and what each gives at a token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

from torch import Tensor

Mixer = Literal["recurrence", "attention"]


class LaterMixer(NamedTuple):
    """The heads of one mixer above a layer."""

    layer: int
    mixer: Mixer
    n_heads: int
    hook: str
    """`hook_read` of a recurrence, `hook_z` of attention: [B,T,H,V], what its heads give before they are mixed."""


def later_mixers(model: Any, layer: int) -> list[LaterMixer]:
    """Of all layers above `layer`, from below. Heads of its own layer and below cannot notice what is written there."""
    found: list[LaterMixer] = []
    for above in range(layer + 1, model.cfg.n_layers):
        if above in model.cfg.recurrent_layers:
            found.append(LaterMixer(above, "recurrence", model.cfg.layer(above).H, f"blocks.{above}.mixer.hook_read"))
        attention = model.attachment.layout.blocks[above].attn_heads
        if attention is not None:
            found.append(LaterMixer(above, "attention", attention.n, f"blocks.{above}.attn.hook_z"))
    return found


@contextmanager
def newest_reads(model: Any, mixers: Sequence[LaterMixer]) -> Iterator[dict[LaterMixer, Tensor]]:
    """What the heads of each mixer gave in the newest pass, while the scope is open."""
    newest: dict[LaterMixer, Tensor] = {}
    with model.hooks([(m.hook, lambda x, hook, m=m: newest.__setitem__(m, x)) for m in mixers]):
        yield newest


def head_name(layer: int, mixer: str, head: int) -> str:
    """L3H1; an attention head is L3A1."""
    return f"L{layer}{'A' if mixer == 'attention' else 'H'}{head}"
