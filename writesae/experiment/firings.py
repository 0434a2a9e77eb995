"""Where the atoms of a dictionary fire on a text, and which of those firings a test looks at.

An atom *fires* at a token where its activation is positive. It is *alive* if it fires at least `min_firings` times on
the first `alive_tokens` tokens of the text; every evaluation uses this one meaning.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from sae_lens import SAE
from torch import Tensor
from tqdm.auto import tqdm

from hookpoints import HookedRecurrent
from sae_lens_writesae.errors import NothingToMeasureError

T = TypeVar("T")
Integers = NDArray[np.int64]
_ROOM = {"cpu": 1}
"""Tokens of a plain pass by device, at least one sequence; 8,192 elsewhere, whose writes of 128 x 128 are 512 MB."""
_COLUMNS = ("sequence", "position", "atom", "activation")


def bar(items: Sequence[T], name: str, progress: bool = True) -> Iterable[T]:
    """`items`, with a progress bar where standard error is a terminal; TQDM_DISABLE=1 takes every bar away."""
    return tqdm(items, desc=name, disable=None) if progress else items


def in_one_pass(tokens: Tensor, device: torch.device) -> list[slice]:
    """Stretches of the sequences [N,T] that a plain pass takes at once. On a CPU one sequence, which caches hold; a GPU
    would wait between the launches of passes so short."""
    count = max(_ROOM.get(device.type, 8192) // tokens.shape[1], 1)
    # Ends stay within, since callers slice a longer text with them.
    return [slice(first, min(first + count, len(tokens))) for first in range(0, len(tokens), count)]


@dataclass(frozen=True)
class Firings:
    """Every positive activation of a dictionary on [N,T] tokens: a sparse [N,T,F] as parallel arrays, ordered by
    sequence, then position."""

    sequence: Integers
    position: Integers
    atom: Integers
    activation: NDArray[np.float32]
    n_sequences: int
    """N"""
    n_positions: int
    """T"""
    n_atoms: int
    """F"""

    def __len__(self) -> int:
        return len(self.atom)

    def frame(self, rows: NDArray[np.generic] | slice = slice(None)) -> pd.DataFrame:
        """Some firings (all by default) as a table: sequence, position, atom, activation."""
        return pd.DataFrame({name: getattr(self, name)[rows] for name in _COLUMNS})

    def of_sequences(self, sequences: Integers) -> Firings:
        """The firings on some of the sequences, which keep their numbers."""
        inside = np.isin(self.sequence, sequences)
        return replace(self, **{name: getattr(self, name)[inside] for name in _COLUMNS})

    def between(self, first: int, last: int) -> NDArray[np.bool_]:
        """Which of the firings are at positions first..last."""
        return (self.position >= first) & (self.position <= last)

    def alive(self, n_tokens: int, min_firings: int = 1) -> Integers:
        """Atoms with at least `min_firings` among the first `n_tokens` tokens, read sequence by sequence."""
        early = self.sequence * self.n_positions + self.position < n_tokens
        counts = np.bincount(self.atom[early], minlength=self.n_atoms)
        return np.flatnonzero(counts >= min_firings)


@torch.no_grad()
def collect_firings(model: HookedRecurrent, sae: SAE, layer: int, tokens: Tensor, *, progress: bool = False) -> Firings:
    """Encode the dictionary's hook, which is in `layer`, on every token of `tokens` [N,T], some sequences at a time
    (`in_one_pass`).

    Raises:
        NothingToMeasureError: activations are not finite.

    Cost: N forwards up to the hook's layer; memory T (K V + F) floats a sequence, and 28 bytes per firing.
    """
    hook_name = str(sae.cfg.metadata.hook_name)
    place = next(sae.parameters())  # a dictionary may be on another device than its layer
    length = tokens.shape[1]
    parts: list[tuple[NDArray[np.generic], ...]] = []
    for stretch in bar(in_one_pass(tokens, model.cfg.device), "firings", progress):
        _, cache = model.run_with_cache(tokens[stretch], names_filter=[hook_name], stop_at_layer=layer + 1)
        activations = sae.encode(cache[hook_name].flatten(0, 1).to(place.device, place.dtype))
        finite = activations.isfinite().all(-1)
        if not bool(finite.all()):
            sequence = stretch.start + int(finite.int().argmin()) // length
            raise NothingToMeasureError(
                f"the SAE gives NaN or infinite activations of {hook_name} in sequence {sequence}"
            )
        places = (activations > 0).nonzero()
        values = activations[places[:, 0], places[:, 1]].float().cpu().numpy()
        row, atom = places.cpu().numpy().T
        sequence, position = np.divmod(row, length)
        parts.append((stretch.start + sequence, position, atom, values))
    sequence, position, atom, values = map(np.concatenate, zip(*parts))
    return Firings(sequence, position, atom, values, len(tokens), length, int(sae.cfg.d_sae))


def sample_firings(
    firings: Firings, atoms: Integers, per_atom: int, *, first: int, last: int, rng: np.random.Generator
) -> pd.DataFrame:
    """Up to `per_atom` firings of each of `atoms` at positions first..last, spread over sequences.

    Stratified: an atom's firings are dealt one per sequence in random order of sequences, then a second one per
    sequence, and so on, so that no sequence dominates. Columns: sequence, position, atom, activation.
    """
    table = firings.frame(firings.between(first, last) & np.isin(firings.atom, atoms))
    table = table.iloc[rng.permutation(len(table))]  # which firing of a sequence comes first
    table["turn"] = table.groupby(["atom", "sequence"]).cumcount()
    table = table.iloc[rng.permutation(len(table))]  # which sequence is dealt first in a turn
    table = table.sort_values(["atom", "turn"], kind="stable").groupby("atom").head(per_atom)
    return table.drop(columns="turn").sort_values(["sequence", "position", "atom"], ignore_index=True)


def picked(
    able: Integers,
    atoms: tuple[int, ...] | None,
    n_atoms: int | None,
    rng: np.random.Generator,
    needed: str,
    firings: Firings,
) -> Integers:
    """Of the atoms that can be tested those asked for, or a uniform draw; `needed` says what the others lack."""
    needed += f"; {len(np.unique(firings.atom))} of {firings.n_atoms} atoms fire"
    if len(able) == 0:
        raise NothingToMeasureError(f"no atom can be tested: {needed}; give more sequences, or lower min_firings")
    if atoms is not None:
        missing = sorted(set(atoms) - set(able.tolist()))
        if missing:
            raise ValueError(f"atoms {missing} cannot be tested: {needed}")
        return np.array(atoms)
    return able if n_atoms is None else np.sort(rng.choice(able, min(n_atoms, len(able)), replace=False))
