"""Whole-matrix replacement: every write, or every state, of a head gives way to an approximation of itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae_lens_writesae.baselines.pca import MatrixPca
from sae_lens_writesae.firings import HeadHook
from sae_lens_writesae.reconstruction import encoded, matrices_of, reconstructed


class Replacement(NamedTuple):
    """What a head's matrices were replaced by on one sequence, and what it cost."""

    sae: str  # label of the dictionary; empty where there is none
    hook: str  # write or state
    method: str
    nats: float  # per token, more than without replacement
    native_nats: float


class Basis(NamedTuple):
    """What is known of the head's writes and of the dictionaries' target from other sequences."""

    pca: MatrixPca  # of the writes
    target_mean: Tensor  # [K*V]


def replace_all(
    model: Any,
    saes: Mapping[str, Any],
    tokens: Tensor,
    hook: HeadHook,
    basis: Basis,
    pca_ranks: tuple[int, ...],
    state_ranks: tuple[int, ...],
) -> list[Replacement]:
    """Cost in nats per token on one sequence [1,T] of replacing all matrices at the dictionaries' hook (`itself`, the
    floor; `dictionary`; `mean`; `zero`; for writes `pca r`) and all states of the head (`rank r`).

    A replaced write goes into the state and is read from then on; a replaced state is what its reads see, while the
    recurrence goes on from its own. Cost: a forward from the layer on for each, and an SVD per state.
    """
    found = model.recurrence(tokens, hook.layer).select(heads=hook.head)
    above = Above.of(model, tokens, hook.layer)
    native = above.nats()
    state_hook = HeadHook.parse(hook.name.replace("_write_vec", "_state_vec"))
    ways = [(hook, *way) for way in _target(saes, matrices_of(found, hook.target), hook, basis, pca_ranks)]
    ways += [(state_hook, "", f"rank {r}", m) for r, m in _cut(matrices_of(found, "state"), state_ranks)]
    return [
        Replacement(sae, where.target, method, above.nats(where, matrices) - native, native)
        for where, sae, method, matrices in ways
    ]


class Above(NamedTuple):
    """The model from a layer on, over one sequence."""

    model: Any
    tokens: Tensor  # [1,T]
    layer: int
    residual: Tensor  # [1,T,D] that enters the layer

    @classmethod
    def of(cls, model: Any, tokens: Tensor, layer: int) -> Above:
        """Cost: a forward up to the layer."""
        name = f"blocks.{layer}.hook_resid_pre"
        _, cache = model.run_with_cache(tokens, names_filter=[name], stop_at_layer=layer + 1)
        return cls(model, tokens, layer, cache[name])

    def nats(self, hook: HeadHook | None = None, matrices: Tensor | None = None) -> float:
        """Mean of -log p(next token), in nats; with `matrices` [T,K,V] in the place of the hook's."""
        hooks = []
        if hook is not None and matrices is not None:
            flat = matrices.flatten(1)[None]
            hooks = [(hook.name, lambda x, hook: flat.to(x))]
        logits = self.model.run_with_hooks(
            self.residual, fwd_hooks=hooks, start_at_layer=self.layer, tokens=self.tokens
        )
        return float(torch.nn.functional.cross_entropy(logits[0, :-1].double(), self.tokens[0, 1:].to(logits.device)))


def _target(
    saes: Mapping[str, Any], matrices: Tensor, hook: HeadHook, basis: Basis, pca_ranks: tuple[int, ...]
) -> Iterator[tuple[str, str, Tensor]]:
    """(label, method, matrices [T,K,V]) at the dictionaries' own hook."""
    yield "", "itself", matrices
    for label, sae in saes.items():
        yield label, "dictionary", reconstructed(sae, encoded(sae, matrices), matrices)
    yield "", "mean", basis.target_mean.to(matrices).view(matrices.shape[1:]).expand_as(matrices)
    yield "", "zero", torch.zeros_like(matrices)
    if hook.target == "write":
        for rank in pca_ranks:
            yield "", f"pca {rank}", basis.pca.project(matrices.flatten(1), rank).view_as(matrices)


def _cut(states: Tensor, ranks: tuple[int, ...]) -> Iterator[tuple[int, Tensor]]:
    """States [T,K,V] as the nearest matrices of each rank below the full one."""
    left, sigma, right = torch.linalg.svd(states, full_matrices=False)
    for rank in ranks:
        if rank < sigma.shape[-1]:
            yield rank, (left[..., :rank] * sigma[:, None, :rank]) @ right[:, :rank]
