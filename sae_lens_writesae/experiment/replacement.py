"""Whole-matrix replacement: every write, or every state, of a head gives way to other matrices at once."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sae_lens_writesae.experiment.lab import Lab


class UpperModel(NamedTuple):
    """The model from the head's layer on, over one sequence."""

    lab: Lab
    tokens: Tensor
    """[1,T]"""
    residual: Tensor
    """[1,T,D] that enters the layer."""

    @classmethod
    def of(cls, lab: Lab, sequence: int) -> UpperModel:
        """Cost: a forward up to the layer."""
        tokens, layer = lab.tokens[[sequence]], lab.hook.layer
        name = f"blocks.{layer}.hook_resid_pre"
        _, cache = lab.model.run_with_cache(tokens, names_filter=[name], stop_at_layer=layer + 1)
        return cls(lab, tokens, cache[name])

    def nats(self, target: str = "write", matrices: Tensor | None = None) -> float:
        """Mean of -log p(next token) over the sequence, in nats per token.

        Args:
            target: what is replaced, "write" or "state". A replaced write goes into the state and is read from then on.
                A replaced state is what its own reads see, while the recurrence goes on from the native one.
            matrices: [T,K,V] in the place of all of the head's; None: nothing is replaced.

        Cost: a forward from the layer on.
        """
        hooks = []
        if matrices is not None:
            hook = self.lab.hook
            flat = matrices.flatten(1)[None]
            name = f"blocks.{hook.layer}.mixer.heads.{hook.head}.hook_{target}_vec"
            hooks = [(name, lambda x, hook: flat.to(x))]
        logits = self.lab.model.run_with_hooks(
            self.residual, fwd_hooks=hooks, start_at_layer=self.lab.hook.layer, tokens=self.tokens
        )
        return float(torch.nn.functional.cross_entropy(logits[0, :-1].double(), self.tokens[0, 1:].to(logits.device)))
