"""Halves of the sequences, and atoms that fire often enough in both: chosen on one, tested on the other."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from sae_lens_writesae.errors import NothingToMeasureError
from sae_lens_writesae.firings import Firings


class Halves(NamedTuple):
    """Sequences that something is chosen on, and those it is tested on; none is in both."""

    select: NDArray[np.int64]
    test: NDArray[np.int64]


class AtomDraw(Protocol):
    """The settings of a draw of atoms."""

    @property
    def atoms(self) -> tuple[int, ...] | None: ...
    @property
    def n_atoms(self) -> int | None: ...
    @property
    def min_firings(self) -> int: ...


def halves(n_sequences: int, seed: int) -> Halves:
    """A random split of the sequences. Raises ValueError for fewer than 4: an interval needs two on each side."""
    if n_sequences < 4:
        raise NothingToMeasureError(
            f"choosing on one half and testing on the other needs at least 4 sequences, found {n_sequences}"
        )
    order = np.random.default_rng([seed, 17]).permutation(n_sequences)
    return Halves(np.sort(order[: n_sequences // 2]), np.sort(order[n_sequences // 2 :]))


def of_sequences(firings: Firings, sequences: NDArray[np.int64]) -> Firings:
    """The firings on some of the sequences, which keep their numbers."""
    own = np.isin(firings.sequence, sequences)
    columns = {name: getattr(firings, name)[own] for name in ("sequence", "position", "atom", "activation")}
    return replace(firings, **columns)


def draw_atoms(
    firings: Firings, split: Halves, bounds: dict[str, int], config: AtomDraw, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Atoms with `min_firings` firings in both halves (two sequences in the test half) at positions first..last of
    `bounds`: those asked for, or a uniform draw.

    Raises ValueError if an atom asked for fires too rarely, or all do.
    """
    inside = (firings.position >= bounds["first"]) & (firings.position <= bounds["last"])
    counted = []
    for side in split:
        table = firings.frame(inside & np.isin(firings.sequence, side))
        counted.append(table.groupby("atom").agg(n=("position", "size"), sequences=("sequence", "nunique")))
    enough = counted[0][counted[0]["n"] >= config.min_firings].index
    enough = enough.intersection(counted[1].query(f"n >= {config.min_firings} and sequences >= 2").index)
    able = np.sort(enough.to_numpy(np.int64))
    if config.atoms is not None:
        if missing := sorted(set(config.atoms) - set(able.tolist())):
            raise ValueError(
                f"atoms {missing} cannot be tested: each must fire {config.min_firings} times in both halves of the "
                f"sequences, in two sequences of the test half; the SAE has {firings.n_atoms} atoms"
            )
        return np.array(config.atoms)
    if len(able) == 0:
        n = len(np.unique(firings.atom))
        raise NothingToMeasureError(
            f"no atom can be tested: {n} of {firings.n_atoms} fire, none {config.min_firings} times in each half; give "
            "more sequences, or lower min_firings"
        )
    if config.n_atoms is None:
        return able
    return np.sort(rng.choice(able, min(config.n_atoms, len(able)), replace=False))
