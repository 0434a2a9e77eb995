"""Dictionaries whose code is known in advance, for tests of evaluations."""

from __future__ import annotations

from typing import Any

import torch
from from_atoms import sae_of
from torch import Tensor

from sae_lens_writesae.atom.low_rank import LowRank

LAYER, HEAD = 1, 2


def make_sae(
    keys: Tensor,
    values: Tensor,
    k: int,
    *,
    target: str = "write",
    layer: int = LAYER,
    head: int = HEAD,
    bias: float = 0,
) -> Any:
    """Tied atoms keys [F,K] values [F,V]^T: activation i is <A_i, X> + bias where that is positive and among the k
    largest."""
    hook = f"blocks.{layer}.mixer.heads.{head}.hook_{target}_vec"
    sae = sae_of(hook, None, LowRank.rank_one(keys, values), k, rescale_acts_by_decoder_norm=False)
    with torch.no_grad():
        sae.b_enc.fill_(bias)
    return sae


def random_sae(model: Any, d_sae: int = 12, k: int = 3, **place: Any) -> Any:
    """Atoms of random directions, as those of an untrained dictionary."""
    shape = model.cfg.layer(place.get("layer", LAYER))
    drawn = torch.Generator().manual_seed(0)
    sides = [torch.randn(d_sae, n, generator=drawn, dtype=torch.float64) for n in (shape.K, shape.V)]
    keys, values = (torch.nn.functional.normalize(side, dim=1).to(model.cfg.dtype) for side in sides)
    return make_sae(keys, values, k, **place)


def native_writes(model: Any, tokens: Tensor, layer: int = LAYER, head: int = HEAD) -> tuple[Tensor, Tensor]:
    """Keys [T,K] and values [T,V] of what the head writes on one sequence [1,T]."""
    with torch.no_grad():
        found = model.recurrence(tokens, layer)
    return found.k[0, :, head], found.u[0, :, head]


def one_atom_a_position(model: Any, tokens: Tensor, **place: Any) -> Any:
    """Atom t is the direction of the write at t of `tokens` [1,T]; with k = 1 it fires there alone (no other direction
    has a larger product with that write), with the norm of the write as its activation."""
    sides = native_writes(model, tokens)
    return make_sae(*(torch.nn.functional.normalize(side, dim=1) for side in sides), 1, **place)


def exact_sae(model: Any, layer: int = LAYER, head: int = HEAD) -> Any:
    """An atom for each sign of each entry of the write, all of which may be active: every write is the sum of its
    atoms."""
    shape = model.cfg.layer(layer)
    one = {"dtype": model.cfg.dtype}
    keys = torch.eye(shape.K, **one).repeat_interleave(shape.V, 0)
    values = torch.eye(shape.V, **one).repeat(shape.K, 1)
    n = 2 * len(keys)
    return make_sae(torch.cat([keys, keys]), torch.cat([values, -values]), n, layer=layer, head=head)


def logits_with_write(model: Any, tokens: Tensor, change: Any, layer: int = LAYER, head: int = HEAD) -> Tensor:
    """Logits [T,vocab] of a full pass over `tokens` [1,T] in which the head's writes [T,K,V] are `change` of them."""

    def hook(writes: Tensor, hook: Any) -> Tensor:
        return change(writes[0].clone())[None]

    with torch.no_grad(), model.hooks(fwd_hooks=[(f"blocks.{layer}.mixer.heads.{head}.hook_write", hook)]):
        return model(tokens)[0]
