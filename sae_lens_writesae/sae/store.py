"""SAELens' activation store with what a training loss compares with, as further columns of each row."""

from __future__ import annotations

from typing import Any, cast

import torch
from sae_lens.training.activations_store import ActivationsStore
from torch import Tensor

from sae_lens_writesae.firings import HeadHook
from sae_lens_writesae.sae.losses import Loss, n_columns

COLUMN_SCALE = 1e-3
"""Factor on the columns. The losses do not depend on their size, and SAELens' estimate of the activations' norm, which
is taken over whole rows, must not."""


class AlignedStore(ActivationsStore):
    """Rows [K*V + columns]: a head's state or write, then the query that reads it, or the write of the same token.

    Made by `aligned`; buffer, shuffling, filters and resuming are SAELens'. One forward per batch of prompts, up to the
    hooked layer.
    """

    loss: Loss

    @classmethod
    def aligned(cls, model: Any, cfg: Any, dataset: Any) -> AlignedStore:
        """A store for a runner config whose SAE has a loss other than ``mse``.

        Raises:
            ValueError: cached activations, which hold no columns, or a hook that is not one of a head.
        """
        if cfg.use_cached_activations:
            raise ValueError(
                f"loss={cfg.sae.loss!r} needs queries or writes beside the matrices; cached activations hold none: "
                "set use_cached_activations=False"
            )
        store = cls.from_config(model, cfg, override_dataset=dataset)
        assert isinstance(store, AlignedStore)
        store.loss = cfg.sae.loss
        hook = HeadHook.parse(cfg.hook_name)
        recurrence = model.recurrence(torch.zeros(1, 1, dtype=torch.long, device=model.cfg.device), hook.layer)
        store.d_in = cfg.sae.d_in + n_columns(store.loss, cfg.sae.d_k, cfg.sae.d_v, recurrence.R)
        return store

    @torch.no_grad()
    def get_activations(self, batch_tokens: Tensor) -> Tensor:
        """[B,T',K*V + columns] for tokens [B,T]."""
        hook, model = HeadHook.parse(self.hook_name), cast(Any, self.model)
        with torch.autocast(batch_tokens.device.type, dtype=torch.bfloat16, enabled=self.autocast_lm):
            found = model.recurrence(batch_tokens, hook.layer, **self.model_kwargs)
        one = found.select(heads=hook.head)
        matrices = one.states() if hook.target == "state" else one.write()
        columns = read_queries(one)[:, :, 0] if self.loss == "reads" else _writes(one)
        rows = torch.cat([matrices[:, :, 0].flatten(2), COLUMN_SCALE * columns.to(matrices.dtype)], dim=-1)
        return rows[:, slice(*self.seqpos_slice)].float().to(self.device)


def read_queries(r: Any) -> Tensor:
    """[B,T,H,K] the query that reads the state of each token: its own, or the next token's where a rule reads before it
    writes (then zero for the last)."""
    if not r.read_before_write:
        return r.q
    return torch.cat([r.q[:, 1:], torch.zeros_like(r.q[:, :1])], dim=1)


def _writes(r: Any) -> Tensor:
    """[B,T,R*(K+V)] keys, then values."""
    return torch.cat([r.k[:, :, 0].flatten(2), r.u[:, :, 0].flatten(2)], dim=-1)
