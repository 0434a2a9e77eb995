"""Where the atoms of an SAE fire on evaluation sequences, and which of those firings a test looks at."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from sae_lens_writesae.errors import NothingToMeasureError
from sae_lens_writesae.progress import bar
from sae_lens_writesae.sae.target import HeadHook, check_plain_activations
from sae_lens_writesae.sae.target import HookTarget as Target
from sae_lens_writesae.sae.target import atoms_of as atom_factors

__all__ = ["Target", "atom_factors"]  # the old place of these names


@dataclass(frozen=True)
class Firings:
    """Every activation > 0 of an SAE on [N,T] tokens: a sparse [N,T,F] as parallel arrays, ordered by sequence, then
    position."""

    sequence: NDArray[np.int64]
    position: NDArray[np.int64]
    atom: NDArray[np.int64]
    activation: NDArray[np.float32]
    n_sequences: int
    """N"""
    n_positions: int
    """T"""
    n_atoms: int
    """F"""

    def __len__(self) -> int:
        return len(self.atom)

    def frame(self, rows: NDArray[Any] | slice = slice(None)) -> pd.DataFrame:
        """Chosen firings (all by default) as a table: sequence, position, atom, activation."""
        names = ("sequence", "position", "atom", "activation")
        return pd.DataFrame({name: getattr(self, name)[rows] for name in names})

    def alive(self, n_tokens: int, min_firings: int = 1) -> NDArray[np.int64]:
        """Atoms with at least `min_firings` among the first `n_tokens` tokens, read sequence by sequence."""
        early = self.sequence * self.n_positions + self.position < n_tokens
        counts = np.bincount(self.atom[early], minlength=self.n_atoms)
        return np.flatnonzero(counts >= min_firings)

    def active(self, sequence: int, position: int) -> NDArray[np.int64]:
        """Atoms that fire at one token."""
        start, stop = np.searchsorted(self.sequence, [sequence, sequence + 1])
        first, last = start + np.searchsorted(self.position[start:stop], [position, position + 1])
        return self.atom[first:last]

    def strongest(self, at: pd.DataFrame) -> pd.DataFrame:
        """The most active atom at each (sequence, position) of `at`: columns atom and activation, index of
        `at`.

        NaN where nothing fires.
        """
        spot = self.sequence * self.n_positions + self.position
        wanted = (at["sequence"] * self.n_positions + at["position"]).to_numpy()
        table = self.frame(np.isin(spot, wanted)).sort_values("activation")
        top = table.drop_duplicates(["sequence", "position"], keep="last")
        columns = ["sequence", "position"]
        found = pd.merge(at[columns], top, on=columns, how="left").set_index(at.index)
        return pd.DataFrame(found, columns=["atom", "activation"])


@torch.no_grad()
def collect_firings(model: Any, sae: Any, tokens: Tensor, *, progress: bool = False) -> Firings:
    """Encode the SAE's hook on every token of `tokens` [N,T], one sequence at a time.

    Cost: N forwards up to the hook's layer; memory T (K V + F) floats, and 28 bytes per firing.
    """
    hook = HeadHook.of(sae)
    check_plain_activations(sae)
    place = next(sae.parameters(), tokens)
    dtype = place.dtype if place.is_floating_point() else torch.float32
    parts: list[tuple[NDArray[Any], ...]] = []
    n_atoms = 0
    for i in bar(range(len(tokens)), "firings", progress):
        _, cache = model.run_with_cache(tokens[i : i + 1], names_filter=[hook.name], stop_at_layer=hook.layer + 1)
        activations = sae.encode(cache[hook.name][0].to(place.device, dtype))
        n_atoms = activations.shape[-1]
        if not bool(activations.isfinite().all()):
            raise NothingToMeasureError(f"the SAE gives NaN or infinite activations on sequence {i} of {hook.name}")
        position, atom = (activations > 0).nonzero(as_tuple=True)
        values = activations[position, atom].float().cpu().numpy()
        parts.append((np.full(len(values), i), position.cpu().numpy(), atom.cpu().numpy(), values))
    sequence, position, atom, values = (np.concatenate(column) for column in zip(*parts))
    n_sequences, n_positions = tokens.shape
    return Firings(sequence, position, atom, values, n_sequences, n_positions, n_atoms)


def sample_firings(
    firings: Firings,
    atoms: NDArray[np.int64],
    per_atom: int,
    *,
    first: int,
    last: int,
    rng: np.random.Generator,
) -> pd.DataFrame:
    """Up to `per_atom` firings of each of `atoms` at positions first..last, spread over sequences.

    Stratified: an atom's firings are dealt one per sequence in random order of sequences, then a second one
    per sequence, and so on, so no sequence dominates. Columns: sequence, position, atom, activation.
    """
    inside = (firings.position >= first) & (firings.position <= last)
    table = firings.frame(inside & np.isin(firings.atom, atoms))
    table = table.iloc[rng.permutation(len(table))]  # which firing of a sequence comes first
    table["turn"] = table.groupby(["atom", "sequence"]).cumcount()
    table = table.iloc[rng.permutation(len(table))]  # which sequence is dealt first in a turn
    table = table.sort_values(["atom", "turn"], kind="stable").groupby("atom").head(per_atom)
    return table.drop(columns="turn").sort_values(["sequence", "position", "atom"], ignore_index=True)


def silent_positions(
    sample: pd.DataFrame, firings: Firings, *, first: int, last: int, rng: np.random.Generator
) -> pd.DataFrame:
    """The same firings moved to a random position of their sequence, in first..last, where their atom is
    silent.

    Activations stay those of the firing. Firings of atoms that are silent nowhere in the sequence are
    dropped.
    """
    table = firings.frame(np.isin(firings.atom, sample["atom"].to_numpy()))
    busy = {key: set(part["position"]) for key, part in table.groupby(["sequence", "atom"])}
    choices = np.arange(first, last + 1)
    moved = sample.copy()
    moved["position"] = [
        rng.choice(free) if len(free := np.setdiff1d(choices, list(busy[key]))) else -1
        for key in zip(sample["sequence"], sample["atom"])
    ]
    moved = moved.query("position >= 0")
    return moved.sort_values(["sequence", "position", "atom"], ignore_index=True)
