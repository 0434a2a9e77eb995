"""SAELens' activation store, with what a training loss compares with as further columns of each row."""

from __future__ import annotations

from typing import cast

import torch
from datasets import Dataset
from sae_lens.training.activations_store import ActivationsStore
from torch import Tensor

from hookpoints import HookedRecurrent, Recurrence
from sae_lens_writesae.sae.losses import Loss, n_columns, read_queries
from sae_lens_writesae.sae.target import HeadHook, RunnerConfig
from sae_lens_writesae.sae.training import MatrixTrainingSAEConfig

COLUMN_SCALE = 1e-3
"""Factor on the columns. The losses do not depend on it, and it keeps the columns out of SAELens' estimate of the
activations' norm, which is taken over whole rows."""


class PairedActivationsStore(ActivationsStore):
    """Rows [K*V + columns]: a head's state or write, then the query that reads it, or the write of the same token.

    `paired` makes one. Buffer, shuffling, filters and resuming are SAELens'. Costs one forward for each batch of
    prompts, up to the hooked layer.
    """

    loss: Loss

    @classmethod
    def paired(cls, model: HookedRecurrent, cfg: RunnerConfig, dataset: Dataset) -> PairedActivationsStore:
        """A store for a runner config whose SAE has a loss other than `mse`.

        Raises:
            ValueError: cached activations, which hold no columns, or a hook that is not one of a head.
        """
        sae = cast(MatrixTrainingSAEConfig, cfg.sae)
        if cfg.use_cached_activations:
            raise ValueError(
                f"loss={sae.loss!r} needs queries or writes beside the matrices; cached activations hold none: "
                "set use_cached_activations=False"
            )
        store = cast(PairedActivationsStore, cls.from_config(model, cfg, override_dataset=dataset))
        store.loss = sae.loss
        one_token = torch.zeros(1, 1, dtype=torch.long, device=model.cfg.device)
        terms = model.recurrence(one_token, HeadHook.parse(cfg.hook_name).layer).R
        store.d_in = sae.d_in + n_columns(sae.loss, sae.d_k, sae.d_v, terms)
        return store

    @torch.no_grad()
    def get_activations(self, batch_tokens: Tensor) -> Tensor:
        """[B,T',K*V + columns] for tokens [B,T]."""
        hook, model = HeadHook.parse(self.hook_name), cast(HookedRecurrent, self.model)
        with torch.autocast(batch_tokens.device.type, dtype=torch.bfloat16, enabled=self.autocast_lm):
            recurrence = model.recurrence(batch_tokens, hook.layer, **self.model_kwargs).select(heads=hook.head)
        matrices = recurrence.states() if hook.target == "state" else recurrence.write()
        columns = read_queries(recurrence)[:, :, 0] if self.loss == "reads" else _writes(recurrence)
        rows = torch.cat([matrices[:, :, 0].flatten(2), COLUMN_SCALE * columns.to(matrices.dtype)], dim=-1)
        return rows[:, slice(*self.seqpos_slice)].float().to(self.device)


def _writes(recurrence: Recurrence) -> Tensor:
    """[B,T,R*(K+V)] keys of head 0, then values."""
    return torch.cat([recurrence.k[:, :, 0].flatten(2), recurrence.u[:, :, 0].flatten(2)], dim=-1)
