"""Which firings a substitution test looks at."""

from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from sae_lens_writesae.errors import NothingToMeasureError
from sae_lens_writesae.firings import Firings, sample_firings, silent_positions
from sae_lens_writesae.substitution_config import SubstitutionConfig


class Sample(NamedTuple):
    """The firings that are tested, and how many atoms they were drawn from."""

    table: pd.DataFrame
    """firing, sequence, position, atom, written_atom, activation, to_end; ordered by sequence and position."""
    alive: NDArray[np.int64]
    """All alive atoms."""
    n_testable: int
    """Alive atoms with a firing at a position that can be tested."""
    alive_tokens: int
    """Tokens on which aliveness was counted."""


def draw(firings: Firings, config: SubstitutionConfig) -> Sample:
    """A uniform draw of the alive atoms that can be tested, and firings of each, dealt over sequences.

    Raises ValueError if no atom can be tested, or a hand-picked one cannot.
    """
    rng = np.random.default_rng(config.seed)
    last = firings.n_positions - 1 - config.horizon
    alive_tokens = min(config.alive_tokens, firings.n_sequences * firings.n_positions)
    alive = firings.alive(alive_tokens, config.min_firings)
    inside = (firings.position >= config.first_position) & (firings.position <= last)
    testable = np.intersect1d(alive, firings.atom[inside])
    if len(testable) == 0:
        raise NothingToMeasureError(
            f"no atom can be tested: {len(alive)} of {firings.n_atoms} fire on {alive_tokens} tokens, none of them "
            f"at positions {config.first_position}..{last}"
        )
    chosen = testable if config.atoms is None else _hand_picked(config.atoms, firings, testable)
    if config.atoms is None and config.n_atoms is not None:
        chosen = np.sort(rng.choice(testable, min(config.n_atoms, len(testable)), replace=False))
    bounds = {"first": config.first_position, "last": last}
    table = sample_firings(firings, chosen, config.firings_per_atom, **bounds, rng=rng)
    if config.positions == "silent":
        table = silent_positions(table, firings, **bounds, rng=rng)
    table["written_atom"] = table["atom"]
    if config.atom_choice == "dominant":
        table = table.drop_duplicates(["sequence", "position"])  # they write the same atom: one test
        strongest = firings.strongest(table)
        table = table.assign(written_atom=strongest["atom"].astype(int), activation=strongest["activation"])
    if table.empty:
        raise NothingToMeasureError(
            f"none of the {len(chosen)} atoms has a position of the kind {config.positions!r} to be tested at"
        )
    table = table.reset_index(drop=True).rename_axis("firing").reset_index()
    n_last = len(table) if config.last_position_firings is None else config.last_position_firings
    table["to_end"] = rng.permutation(len(table)) < n_last
    return Sample(table, alive, len(testable), alive_tokens)


def _hand_picked(atoms: tuple[int, ...], firings: Firings, testable: NDArray[np.int64]) -> NDArray[np.int64]:
    missing = [i for i in atoms if i not in testable]
    if missing:
        raise ValueError(
            f"atoms {missing} cannot be tested: the SAE has {firings.n_atoms} atoms, and these are not alive or fire "
            "only outside of the tested positions"
        )
    return np.array(atoms)
