"""Where the atoms of a dictionary fire on a text, and which of those firings a test looks at.

An atom *fires* at a token where its activation is positive. It is *alive* if it fires at least `min_firings` times on
the first `alive_tokens` tokens of the text; every evaluation uses this one meaning.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, TypeVar

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
Bounds = dict[Literal["first", "last"], int]
"""First and last position of a firing that is looked at."""
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

    def strongest(self, at: pd.DataFrame) -> pd.DataFrame:
        """The most active atom at each (sequence, position) of `at`: columns atom and activation, index of `at`; NaN
        where nothing fires. This is the paper's dominant atom (section 3.2)."""
        places = at[["sequence", "position"]]
        firings = self.frame().merge(places.drop_duplicates()).sort_values("activation")
        top = firings.drop_duplicates(["sequence", "position"], keep="last")
        in_order = places.merge(top, how="left").set_index(at.index)  # a merge loses the index
        return in_order[["atom", "activation"]]


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
    alive_tokens: int = 65_536,
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
    alive = firings.alive(alive_tokens, min_firings)
    testable = np.intersect1d(alive, firings.atom[firings.between(first_position, last)])
    needed = f"alive atoms with a firing at positions {first_position}..{last} are"
    chosen = picked(testable, atoms, n_atoms, rng, needed, firings)
    table = sample_firings(firings, chosen, firings_per_atom, first=first_position, last=last, rng=rng)
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
        strongest = firings.strongest(table).fillna(0).astype({"atom": int})
        table = table.assign(
            atom=table.get("atom", strongest["atom"]),
            written_atom=strongest["atom"],
            activation=strongest["activation"],
        )
        table = table.drop_duplicates(["sequence", "position"])  # two atoms that were picked may fire at one place
    table = table.reset_index(drop=True).rename_axis("firing").reset_index()
    return FiringDraw(table, alive)
