"""Which firings a test looks at, and which sequences something is chosen on."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import pandas as pd

from sae_lens_writesae.errors import NothingToMeasureError
from writesae.experiment.firings import Firings, Integers, picked, sample_firings

ALIVE_TOKENS = 65_536
"""An atom is alive if it fires often enough on the first so many evaluation tokens (all, where there are fewer)."""

Bounds = dict[Literal["first", "last"], int]
"""First and last position of a firing that is looked at."""


def silent_positions(
    sample: pd.DataFrame, firings: Firings, *, first: int, last: int, rng: np.random.Generator
) -> pd.DataFrame:
    """The same firings moved to a random position of their sequence, in first..last, where their atom is silent.

    Activations stay those of the firing. Firings of atoms that are silent nowhere in the sequence are dropped.
    """
    table = firings.frame(np.isin(firings.atom, sample["atom"].to_numpy()))
    busy = {key: set(group["position"]) for key, group in table.groupby(["sequence", "atom"])}
    choices = np.arange(first, last + 1)
    positions = []
    for key in zip(sample["sequence"], sample["atom"]):
        silent = np.setdiff1d(choices, list(busy[key]))
        positions.append(rng.choice(silent) if len(silent) else -1)  # -1 is dropped below
    moved = sample.assign(position=positions)
    return moved.query("position >= 0").sort_values(["sequence", "position", "atom"], ignore_index=True)


def strongest_atoms(firings: Firings, at: pd.DataFrame) -> pd.DataFrame:
    """The most active atom at each (sequence, position) of `at`: columns atom and activation, index of `at`; NaN where
    nothing fires. This is the paper's dominant atom (section 3.2)."""
    places = at[["sequence", "position"]]
    active = firings.frame().merge(places.drop_duplicates()).sort_values("activation")
    top = active.drop_duplicates(["sequence", "position"], keep="last")
    in_order = places.merge(top, how="left").set_index(at.index)  # a merge loses the index
    return in_order[["atom", "activation"]]


class Halves(NamedTuple):
    """Sequences that something is chosen on, and sequences that it is tested on; no sequence is in both."""

    select: Integers
    test: Integers


def halves(n_sequences: int, seed: int) -> Halves:
    """A random split of the sequences.

    Raises:
        NothingToMeasureError: fewer than 4 sequences; an interval needs two on each side.
    """
    if n_sequences < 4:
        raise NothingToMeasureError(
            f"choosing on one half and testing on the other needs at least 4 sequences, got {n_sequences}"
        )
    # A separate stream (17; that of `folds` is 19), so that no draw of an evaluation depends on the split.
    order = np.random.default_rng([seed, 17]).permutation(n_sequences)
    return Halves(np.sort(order[: n_sequences // 2]), np.sort(order[n_sequences // 2 :]))


def folds(sequences: Integers, seed: int) -> dict[int, int]:
    """A half, 0 or 1, for each distinct sequence, at random: what is used on one half is fitted on the other. Of two
    sequences or more, neither half is empty."""
    order = np.random.default_rng([seed, 19]).permutation(np.unique(sequences))
    return {int(sequence): n % 2 for n, sequence in enumerate(order)}


def draw_atoms(
    firings: Firings,
    split: Halves,
    bounds: Bounds,
    rng: np.random.Generator,
    *,
    min_firings: int,
    n_atoms: int | None,
    atoms: tuple[int, ...] | None = None,
) -> Integers:
    """Atoms with `min_firings` firings in both halves (in two sequences of the test half) at positions first..last of
    `bounds`: those of `atoms`, or a uniform draw of `n_atoms`.

    Raises:
        ValueError: an atom asked for fires too rarely.
        NothingToMeasureError: all atoms do.
    """

    def counts(sequences: Integers) -> pd.DataFrame:
        """Firings of each atom inside the bounds, and the sequences that they are in."""
        table = firings.frame(firings.between(**bounds) & np.isin(firings.sequence, sequences))
        return table.groupby("atom")["sequence"].agg(["size", "nunique"])

    chosen = counts(split.select)
    tested = counts(split.test)
    can_be_chosen = chosen["size"] >= min_firings
    can_be_tested = (tested["size"] >= min_firings) & (tested["nunique"] >= 2)
    able = chosen.index[can_be_chosen].intersection(tested.index[can_be_tested])
    needed = f"each must fire {min_firings} times in both halves of the sequences, in two sequences of the test half"
    return picked(np.sort(able.to_numpy(np.int64)), atoms, n_atoms, rng, needed, firings)


class FiringDraw(NamedTuple):
    """The firings that a test looks at, and the alive atoms."""

    table: pd.DataFrame
    """firing, sequence, position, atom, written_atom, activation; ordered by sequence and position."""
    alive: Integers
    """All alive atoms."""


def draw_firings(
    firings: Firings,
    rng: np.random.Generator,
    *,
    horizon: int,
    n_atoms: int | None,
    firings_per_atom: int,
    atoms: tuple[int, ...] | None = None,
    first_position: int = 1,
    min_firings: int = 1,
    written: Literal["own", "dominant"] = "own",
) -> FiringDraw:
    """A uniform draw of the alive atoms that can be tested, and firings of each, dealt over sequences; or a uniform
    draw of positions.

    Args:
        horizon: tokens that must follow a firing.
        atoms: a hand-picked list instead of a draw.
        written: the atom that is written: the firing's own, or the dominant one of the position, which has the largest
            activation there (the paper's section 3.2).
            Without a hand-picked list, as many positions as that would be (atoms times firings) are drawn uniformly
            from all, whichever atom fires there; where none fires, nothing is written.

    Raises:
        ValueError: a hand-picked atom cannot be tested.
        NothingToMeasureError: no atom can be tested.
    """
    last = firings.n_positions - 1 - horizon
    alive = firings.alive(ALIVE_TOKENS, min_firings)
    testable = np.intersect1d(alive, firings.atom[firings.between(first_position, last)])
    needed = f"alive atoms with a firing at positions {first_position}..{last} are"
    # Firings of atoms that are drawn or picked.
    chosen = picked(testable, atoms, n_atoms, rng, needed, firings)
    table = sample_firings(firings, chosen, firings_per_atom, first=first_position, last=last, rng=rng)
    # The headline draws positions instead, each with the same chance.
    if written == "dominant" and atoms is None:
        per_sequence = last + 1 - first_position
        n_able = firings.n_sequences * per_sequence
        count = min(len(chosen) * firings_per_atom, n_able)
        drawn = np.sort(rng.choice(n_able, count, replace=False))
        sequence, position = np.divmod(drawn, per_sequence)
        table = pd.DataFrame({"sequence": sequence, "position": position + first_position})
    if written == "own":
        table = table.assign(written_atom=table["atom"])
    else:
        # Where nothing fires, an activation of 0 writes nothing, whichever atom it belongs to.
        strongest = strongest_atoms(firings, table).fillna(0).astype({"atom": int})
        table = table.assign(
            atom=table.get("atom", strongest["atom"]),
            written_atom=strongest["atom"],
            activation=strongest["activation"],
        )
        table = table.drop_duplicates(["sequence", "position"])  # two atoms that were picked may fire at one place
    table = table.reset_index(drop=True).rename_axis("firing").reset_index()
    return FiringDraw(table, alive)
