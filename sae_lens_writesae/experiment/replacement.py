"""Whole-matrix replacement: every write, or every state, of a head gives way to other matrices at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import pandas as pd
import torch
from torch import Tensor

from hookpoints import HookedRecurrent
from sae_lens_writesae.atom.low_rank import LowRank
from sae_lens_writesae.experiment.lab import Lab
from sae_lens_writesae.experiment.reconstruction import decoded, encoded, matrices_of

if TYPE_CHECKING:
    from sae_lens_writesae.experiment.approximations import Basis


class UpperModel(NamedTuple):
    """The model from the head's layer on, over one sequence."""

    model: HookedRecurrent
    layer: int
    head: int
    tokens: Tensor
    """[1,T]"""
    residual: Tensor
    """[1,T,D] that enters the layer."""

    @classmethod
    def at(cls, model: HookedRecurrent, layer: int, head: int, tokens: Tensor) -> UpperModel:
        """Cost: a forward of tokens [1,T] up to the layer."""
        name = f"blocks.{layer}.hook_resid_pre"
        _, cache = model.run_with_cache(tokens, names_filter=[name], stop_at_layer=layer + 1)
        return cls(model, layer, head, tokens, cache[name])

    @classmethod
    def of(cls, lab: Lab, sequence: int) -> UpperModel:
        """On a sequence of a laboratory."""
        return cls.at(lab.model, lab.hook.layer, lab.hook.head, lab.tokens[[sequence]])

    def logits(self, target: str = "write", matrices: Tensor | None = None) -> Tensor:
        """Logits [T,vocab].

        Args:
            target: what is replaced, "write" or "state". A replaced write goes into the state and is read from then on.
                A replaced state is what its own reads see, while the recurrence goes on from the native one.
            matrices: [T,K,V] in the place of all of the head's; None: nothing is replaced.

        Cost: a forward from the layer on.
        """
        hooks: list[tuple[str | Callable, Callable]] = []
        if matrices is not None:
            flat = matrices.flatten(1)[None]
            name = f"blocks.{self.layer}.mixer.heads.{self.head}.hook_{target}_vec"
            hooks = [(name, lambda x, hook: flat.to(x))]
        logits = self.model.run_with_hooks(
            self.residual, fwd_hooks=hooks, start_at_layer=self.layer, tokens=self.tokens
        )
        return logits[0]

    def nats(self, target: str = "write", matrices: Tensor | None = None) -> float:
        """Mean of -log p(next token) over the sequence, in nats per token; arguments and cost as of `logits`."""
        logits = self.logits(target, matrices).double()
        return float(torch.nn.functional.cross_entropy(logits[:-1], self.tokens[0, 1:].to(logits.device)))


def replacement_costs(
    lab: Lab, sequence: int, basis: Basis, pca_ranks: tuple[int, ...], state_ranks: tuple[int, ...]
) -> pd.DataFrame:
    """What it costs on one sequence to replace all matrices that the dictionaries of the laboratory read.

    Returns: columns sequence, sae, hook, method, nats (per token, more than without replacement), native_nats. Methods
    are `itself` (the no-op), `dictionary`, `mean`, `zero`, for writes `pca r`, and for all states of the head `rank r`
    (ranks below the full one).

    Cost: a forward from the layer on for each row, and an SVD of each state.
    """
    recurrence, upper = lab.recurrence(sequence), UpperModel.of(lab, sequence)
    native, target = upper.nats(), lab.hook.target
    x = matrices_of(recurrence, target)
    methods: list[tuple[str, str, str, Tensor]] = [("", target, "itself", x)]
    for label, sae in lab.saes.items():
        methods.append((label, target, "dictionary", decoded(sae, encoded(sae, x), x)))
    methods.append(("", target, "mean", basis.target_mean.to(x).view(x.shape[1:]).expand_as(x)))
    methods.append(("", target, "zero", torch.zeros_like(x)))
    if target == "write":
        flat = x.flatten(1)
        methods += [("", target, f"pca {rank}", basis.pca.project(flat, rank).view_as(x)) for rank in pca_ranks]
    states = LowRank.svd(matrices_of(recurrence, "state"))
    below = [rank for rank in state_ranks if rank < states.rank]
    methods += [("", "state", f"rank {rank}", states.terms(slice(rank)).dense()) for rank in below]
    rows = [
        (sequence, label, hook, method, upper.nats(hook, matrices) - native, native)
        for label, hook, method, matrices in methods
    ]
    return pd.DataFrame(rows, columns=["sequence", "sae", "hook", "method", "nats", "native_nats"])
