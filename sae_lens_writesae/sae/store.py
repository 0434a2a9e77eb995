"""SAELens' activation store with rows that its own cannot give: what a training loss compares with as further columns
of each row, or the factors of writes."""

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
    """Rows [K*V + columns]: a head's state or write, then the query that reads it, or the write of the same token. With
    `inputs="factors"` rows [R*(K+V)]: the packed factors of a write (`sae.training.pack`).

    `paired` makes one. Buffer, shuffling, filters and resuming are SAELens'. Costs one forward for each batch of
    prompts, up to the hooked layer.
    """

    loss: Loss
    factors: bool
    """Whether rows hold factors."""

    @classmethod
    def paired(cls, model: HookedRecurrent, cfg: RunnerConfig, dataset: Dataset) -> PairedActivationsStore:
        """A store for a runner config whose SAE has a loss other than `mse`, or trains on factors.

        Raises:
            ValueError: cached activations, which hold neither columns nor factors, a hook that is not one of a head,
                or factors of states, or factors that are not smaller than the matrix.
        """
        sae = cast(MatrixTrainingSAEConfig, cfg.sae)
        if cfg.use_cached_activations:
            raise ValueError(
                f"loss={sae.loss!r} with inputs={sae.inputs!r} needs queries, writes or factors; cached activations "
                "hold matrices only: set use_cached_activations=False"
            )
        store = cast(PairedActivationsStore, cls.from_config(model, cfg, override_dataset=dataset))
        store.loss = sae.loss
        one_token = torch.zeros(1, 1, dtype=torch.long, device=model.cfg.device)
        terms = model.recurrence(one_token, HeadHook.parse(cfg.hook_name).layer).R
        store.factors = sae.inputs == "factors"
        if store.factors:
            store.d_in = n_columns("write", sae.d_k, sae.d_v, terms)
            _check_factors(cfg, store.d_in)
        else:
            store.d_in = sae.d_in + n_columns(sae.loss, sae.d_k, sae.d_v, terms)
        return store

    @torch.no_grad()
    def get_activations(self, batch_tokens: Tensor) -> Tensor:
        """[B,T',K*V + columns] for tokens [B,T]."""
        hook, model = HeadHook.parse(self.hook_name), cast(HookedRecurrent, self.model)
        with torch.autocast(batch_tokens.device.type, dtype=torch.bfloat16, enabled=self.autocast_lm):
            recurrence = model.recurrence(batch_tokens, hook.layer, **self.model_kwargs).select(heads=hook.head)
        if self.factors:
            return _writes(recurrence)[:, slice(*self.seqpos_slice)].float().to(self.device)
        matrices = recurrence.states() if hook.target == "state" else recurrence.write()
        columns = read_queries(recurrence)[:, :, 0] if self.loss == "reads" else _writes(recurrence)
        rows = torch.cat([matrices[:, :, 0].flatten(2), COLUMN_SCALE * columns.to(matrices.dtype)], dim=-1)
        return rows[:, slice(*self.seqpos_slice)].float().to(self.device)


def _check_factors(cfg: RunnerConfig, width: int) -> None:
    sae = cast(MatrixTrainingSAEConfig, cfg.sae)
    if HeadHook.parse(cfg.hook_name).target != "write":
        raise ValueError(f"inputs='factors' is for writes, the hook is {cfg.hook_name!r}: use inputs='matrices'")
    if width >= sae.d_in:
        raise ValueError(
            f"the factors of a write are {width} numbers and its matrix {sae.d_in}: inputs='factors' saves nothing "
            "here, use inputs='matrices'"
        )


def _writes(recurrence: Recurrence) -> Tensor:
    """[B,T,R*(K+V)] keys of head 0, then values."""
    return torch.cat([recurrence.k[:, :, 0].flatten(2), recurrence.u[:, :, 0].flatten(2)], dim=-1)
