"""SAELens' activation store: repeatable and resumable, and with what a training loss compares with as further columns
of each row."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import cast

import torch
from datasets import Dataset
from sae_lens.training.activations_store import ActivationsStore, _get_input_token_device
from torch import Tensor

from hookpoints import HookedRecurrent, Recurrence
from sae_lens_writesae.sae.buffer import MixingBuffer
from sae_lens_writesae.sae.collection import Collection
from sae_lens_writesae.sae.losses import Loss, n_columns, read_queries
from sae_lens_writesae.sae.target import HeadHook, HookTarget, RunnerConfig
from sae_lens_writesae.sae.training import MatrixTrainingSAEConfig

COLUMN_SCALE = 1e-3
"""Factor on the columns. The losses do not depend on it, and it keeps the columns out of SAELens' estimate of the
activations' norm, which is taken over whole rows."""


class SeededStore(ActivationsStore):
    """SAELens' store, whose order depends on the seed of the config alone and goes on exactly where a checkpoint was
    made. Tokens, activations and filters are SAELens'.

    `seeded` makes one.
    """

    position: int = 0
    """Sequences drawn in this epoch; with cached activations, the number of the next one."""
    buffer: MixingBuffer

    @classmethod
    def seeded(cls, model: HookedRecurrent, cfg: RunnerConfig, dataset: Dataset | None) -> SeededStore:
        """A store for a runner config."""
        store = cast(SeededStore, cls.from_config(model, cfg, override_dataset=dataset))
        held = store.n_batches_in_buffer * store.training_context_size
        mixing = store.activations_mixing_fraction
        store.buffer = MixingBuffer(store, held, store.train_batch_size_tokens, mixing, cfg.seed)
        return store

    def get_data_loader(self) -> Iterator[Tensor]:
        return self.buffer

    # -- as a source of rows

    def draw(self) -> Tensor:
        """Token ids [B,T] of the next prompts, or the number of the first cached sequence."""
        cached = self.cached_activation_dataset
        if cached is None:
            return self.get_batch_tokens(raise_at_epoch_end=True)
        if self.position > len(cached) - self.store_batch_size_prompts:
            self.position = 0
            raise StopIteration
        self.position += self.store_batch_size_prompts
        return torch.tensor(self.position - self.store_batch_size_prompts)

    def rows(self, key: Tensor) -> Tensor:
        """[N,d_in] activations of a batch, without those of excluded tokens."""
        if self.cached_activation_dataset is not None:
            self.current_row_idx = int(key)
            return self.get_filtered_llm_batch()
        activations = (
            self.get_activations(key.to(_get_input_token_device(self.model))).to(self.device).reshape(-1, self.d_in)
        )
        if self.exclude_special_tokens is None:
            return activations
        tokens = key[:, slice(*self.seqpos_slice)].reshape(-1).to(self.device)
        return activations[~torch.isin(tokens, self.exclude_special_tokens)]

    def seek(self, position: int) -> None:
        """Go on from that position of an epoch; the text before is tokenized again."""
        if self.cached_activation_dataset is None:
            self.iterable_sequences = self._iterate_tokenized_sequences()
            for _ in range(position):
                next(self.iterable_sequences)
        self.position = position

    def _iterate_tokenized_sequences(self) -> Iterator[Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.position = 0
        for sequence in super()._iterate_tokenized_sequences():
            self.position += 1
            yield sequence

    # -- checkpoints

    def save_to_checkpoint(self, checkpoint_path: str | Path) -> None:
        self.buffer.save_to_checkpoint(checkpoint_path)

    def load_from_checkpoint(self, checkpoint_path: str | Path) -> None:
        self.buffer.load_from_checkpoint(checkpoint_path)


class CollectedRows:
    """Rows of one head from a collection, as `SeededStore` gives them for the same sequences: a source for a
    `MixingBuffer`, without a language model. States are rebuilt for one batch of sequences at a time.

    Raises:
        ValueError: the collection lacks what the config asks for, or has other sizes; says both.
    """

    def __init__(self, collection: Collection, cfg: RunnerConfig):
        self.collection, self.hook, self.position = collection, HeadHook.parse(cfg.hook_name), 0
        place = collection.head_target(self.hook.layer, self.hook.head, self.hook.target)
        d_k, d_v = getattr(cfg.sae, "d_k", place.d_k), getattr(cfg.sae, "d_v", place.d_v)
        found = (collection.context_size, place.d_k, place.d_v, place.d_in)
        asked = (cfg.context_size, d_k, d_v, cfg.sae.d_in)
        if found != asked:
            raise ValueError(
                f"{collection.folder} has (context_size, K, V, K*V) = {found}, and the config asks for {asked}"
            )
        excluded = cfg.exclude_special_tokens
        if excluded is True:
            raise ValueError("a collection has no tokenizer: name the ids in exclude_special_tokens")
        self._excluded = torch.tensor(excluded or [], dtype=torch.long)
        self._positions = slice(*cfg.seqpos_slice)
        self._loss: Loss = getattr(cfg.sae, "loss", "mse")
        self._prompts, self._device = cfg.store_batch_size_prompts, torch.device(str(cfg.act_store_device))

    def draw(self) -> Tensor:
        """Numbers [B] of the next sequences."""
        if self.position + self._prompts > self.collection.n_sequences:
            self.position = 0
            raise StopIteration
        self.position += self._prompts
        return torch.arange(self.position - self._prompts, self.position)

    @torch.no_grad()
    def rows(self, key: Tensor) -> Tensor:
        """[N,K*V + columns] for the sequences of a batch."""
        hook, collection, numbers = self.hook, self.collection, slice(int(key[0]), int(key[-1]) + 1)
        alone = hook.target == "write" and self._loss != "reads"
        recurrence = (collection.writes if alone else collection.recurrence)(hook.layer, hook.head, numbers)
        rows = head_rows(recurrence, hook.target, self._loss, self._positions).float().flatten(0, 1)
        kept = ~torch.isin(collection.tokens[numbers, self._positions].flatten(), self._excluded)
        return (rows[kept] if len(self._excluded) else rows).to(self._device)

    def seek(self, position: int) -> None:
        self.position = position


class PairedActivationsStore(SeededStore):
    """Rows [K*V + columns]: a head's state or write, then the query that reads it, or the write of the same token.

    `paired` makes one. Buffer, shuffling, filters and resuming are those of any store. Costs one forward for each batch
    of prompts, up to the hooked layer.
    """

    loss: Loss

    @classmethod
    def paired(cls, model: HookedRecurrent, cfg: RunnerConfig, dataset: Dataset | None) -> PairedActivationsStore:
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
        store = cast(PairedActivationsStore, cls.seeded(model, cfg, dataset))
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
        return head_rows(recurrence, hook.target, self.loss, slice(*self.seqpos_slice)).float().to(self.device)


def head_rows(recurrence: Recurrence, target: HookTarget, loss: Loss, positions: slice = slice(None)) -> Tensor:
    """[B,T',K*V + columns] writes or states of head 0, flattened, and what `loss` compares them with."""
    at = list(range(recurrence.T))[positions]
    one = recurrence.select(heads=0)
    matrices = (one.states(positions=at) if target == "state" else one.write(positions=at))[:, :, 0].flatten(2)
    if loss == "mse":
        return matrices
    columns = read_queries(one)[:, :, 0] if loss == "reads" else _writes(one)
    return torch.cat([matrices, COLUMN_SCALE * columns[:, positions].to(matrices.dtype)], dim=-1)


def _writes(recurrence: Recurrence) -> Tensor:
    """[B,T,R*(K+V)] keys of head 0, then values."""
    return torch.cat([recurrence.k[:, :, 0].flatten(2), recurrence.u[:, :, 0].flatten(2)], dim=-1)
