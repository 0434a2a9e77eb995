"""The mixing buffer of SAELens with random numbers of its own and a state that a resumed run rebuilds exactly."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import torch
from sae_lens.constants import ACTIVATIONS_STORE_STATE_FILENAME
from safetensors.torch import load_file, save_file
from torch import Tensor

State = dict[str, Tensor]


class RowSource(Protocol):
    """Where a buffer takes its rows from, batch by batch. A batch has a key (token ids, numbers of sequences), from
    which its rows can be made again."""

    position: int
    """How much of the present epoch has been drawn; it says which batch is next."""

    def draw(self) -> Tensor:
        """Key of the next batch, always of one shape. Raises StopIteration at the end of an epoch, after which the next
        call begins another one."""
        ...

    def rows(self, key: Tensor) -> Tensor:
        """[N,D] rows of a batch. The same key gives the same rows."""
        ...

    def seek(self, position: int) -> None:
        """Go on from that position of an epoch."""
        ...


class MixingBuffer(Iterator[Tensor]):
    """Shuffled batches [batch_size,D] without end, by the algorithm of SAELens' `mixing_buffer`.

    Rows are kept in memory, and for each the batch of the source that it is of. A checkpoint holds only the keys of
    those batches, the places of the rows and the state of the random numbers; rows are made again on loading. A row
    survives a refill with probability `mix_fraction`; at one half a buffer of n batches has rows of about
    n/2 log2(rows) of them.

    Args:
        size: rows held, at least `batch_size`.
        mix_fraction: share of the rows that stay for the next mixing. 0: served in order.
        seed: of the shuffling.
    """

    def __init__(self, source: RowSource, size: int, batch_size: int, mix_fraction: float, seed: int):
        if size < batch_size:
            raise ValueError(f"the buffer holds {size} rows, fewer than one batch of {batch_size}")
        self.source, self.size, self.batch_size, self.mix_fraction = source, size, batch_size, mix_fraction
        self.generator = torch.Generator().manual_seed(seed)
        self.between_draws: Callable[[], object] = lambda: None
        """Called before each batch is drawn, where an exception loses nothing: an interrupt may be raised there."""
        self._rows: Tensor | None = None
        self._places = torch.zeros(0, 2, dtype=torch.long)
        """[N,2] of each row: the number of its batch, and which row of it."""
        self._keys: dict[int, Tensor] = {}
        self._drawn = self._begin = self._end = 0
        """Batches drawn so far; the stretch of rows that is to be served before the next refill."""
        self._before: State | None = None
        """While a refill is under way: the state before it."""

    def __next__(self) -> Tensor:
        if self._begin >= self._end:
            self._refill()
        assert self._rows is not None
        self._begin += self.batch_size
        return self._rows[self._begin - self.batch_size : self._begin]

    @torch.no_grad()
    def _refill(self) -> None:
        """Draw until the buffer is full, shuffle, and set aside what is served next."""
        # Exceptions may come anywhere in here; the state before, by which a run resumes, is given until it is whole.
        self._before = self._before or self.state_dict()
        rows = [] if self._rows is None else [self._rows[self._end :]]
        places, held = [self._places[self._end :]], len(self._places) - self._end
        self._rows = None
        while len(places) == 1 or held < self.size:
            self.between_draws()
            key = self._draw()
            new = self.source.rows(key)
            self._keys[self._drawn] = key.cpu()
            places.append(torch.stack([torch.full((len(new),), self._drawn), torch.arange(len(new))], dim=1))
            rows.append(new)
            held += len(new)
            self._drawn += 1
        self._rows, self._places = torch.cat(rows), torch.cat(places)
        del rows
        if self.mix_fraction > 0:
            order = torch.randperm(held, generator=self.generator)
            self._rows, self._places = self._rows[order.to(self._rows.device)], self._places[order]
        served = max(1, (held - int(self.size * self.mix_fraction)) // self.batch_size) * self.batch_size
        alive = set(self._places[:, 0].unique().tolist())
        self._keys = {number: key for number, key in self._keys.items() if number in alive}
        self._begin, self._end = 0, served
        self._before = None

    def _draw(self) -> Tensor:
        try:
            return self.source.draw()
        except StopIteration:
            said = "All samples in the training dataset have been exhausted, beginning new epoch."  # as SAELens says it
            warnings.warn(said, stacklevel=3)
        try:
            return self.source.draw()
        except StopIteration as error:
            raise ValueError("the training data is too short for one batch of sequences") from error

    # -- resuming

    @property
    def filling(self) -> bool:
        """Whether a refill is under way, or was broken off."""
        return self._before is not None

    def state_dict(self) -> State:
        """From which `load_state_dict` rebuilds the buffer; its size is that of the keys, not of the rows."""
        if self._before is not None:
            return self._before
        places = self._places[self._begin :]
        numbers = sorted(set(places[:, 0].tolist()))
        return {
            "position": torch.tensor(self.source.position),
            "generator": self.generator.get_state(),
            "drawn": torch.tensor(self._drawn),
            "to_serve": torch.tensor(self._end - self._begin),
            "places": places.clone(),
            "numbers": torch.tensor(numbers, dtype=torch.long),
            "keys": torch.stack([self._keys[n] for n in numbers]) if numbers else torch.zeros(0, dtype=torch.long),
        }

    @torch.no_grad()
    def load_state_dict(self, state: State) -> None:
        """Rebuild the buffer. Cost: every batch of which a row is left is made once more."""
        self.source.seek(int(state["position"]))
        self.generator.set_state(state["generator"])
        self._drawn, self._begin, self._end = int(state["drawn"]), 0, int(state["to_serve"])
        self._places, self._before, self._rows = state["places"], None, None
        self._keys = dict(zip(state["numbers"].tolist(), state["keys"]))
        for number, key in self._keys.items():
            of_batch = self._places[:, 0] == number
            made = self.source.rows(key)
            if self._rows is None:
                self._rows = made.new_empty(len(self._places), made.shape[1])
            self._rows[of_batch.to(made.device)] = made[self._places[of_batch, 1].to(made.device)]

    def save_to_checkpoint(self, folder: str | Path) -> None:
        """Write the state where SAELens keeps its own."""
        save_file(self.state_dict(), Path(folder) / ACTIVATIONS_STORE_STATE_FILENAME)

    def load_from_checkpoint(self, folder: str | Path) -> None:
        """Go on from the state in a checkpoint."""
        self.load_state_dict(load_file(Path(folder) / ACTIVATIONS_STORE_STATE_FILENAME))
