"""Drawing and moving firings, on made-up activations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from made_firings import ATOMS, BOUNDS, N, T, at, collected, drawn_activations

from sae_lens_writesae.errors import NothingToMeasureError
from writesae.experiment import firings as F
from writesae_study.experiment import draws


@pytest.fixture(scope="module")
def dense() -> torch.Tensor:
    return drawn_activations()


@pytest.fixture(scope="module")
def firings(dense: torch.Tensor) -> F.Firings:
    return collected(dense)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_silent_positions_keep_everything_but_the_position(dense: torch.Tensor, firings: F.Firings) -> None:
    sample = F.sample_firings(firings, np.arange(8), 5, **BOUNDS, rng=rng())
    moved = draws.silent_positions(sample, firings, **BOUNDS, rng=rng())
    assert len(moved) == len(sample) and moved["position"].between(2, 30).all()
    assert (dense[moved["sequence"], moved["position"], moved["atom"]] == 0).all()
    assert sorted(moved["activation"]) == sorted(sample["activation"])
    always = at((slice(None), slice(None), 0), (slice(None), 3, 1))
    sample = F.sample_firings(always, np.array([0, 1]), 2, **BOUNDS, rng=rng())
    assert set(draws.silent_positions(sample, always, **BOUNDS, rng=rng())["atom"]) == {1}  # atom 0 is silent nowhere


def drawn(firings: F.Firings, seed: int = 0, **changes: Any) -> draws.FiringDraw:
    return draws.draw_firings(firings, rng(seed), **{"horizon": 5, "n_atoms": 4, "firings_per_atom": 6} | changes)


def test_the_dominant_atom_is_written_at_positions_drawn_uniformly(dense: torch.Tensor, firings: F.Firings) -> None:
    table = drawn(firings, n_atoms=None, firings_per_atom=30, written="dominant").table
    assert not table.duplicated(["sequence", "position"]).any()
    values = dense[table["sequence"].to_list(), table["position"].to_list()]
    assert (table["written_atom"].to_numpy() == values.argmax(1).numpy()).all()
    assert np.allclose(table["activation"], values.max(1).values)
    own = drawn(firings, n_atoms=None, firings_per_atom=30).table
    assert (own["written_atom"] == own["atom"]).all() and own.duplicated(["sequence", "position"]).any()
    rare = drawn(at((0, 5, 2)), written="dominant", firings_per_atom=N * T).table  # every position, firing or not
    assert len(rare) == N * (T - 1 - 5) and rare.query("activation > 0")[["sequence", "position"]].values.tolist() == [
        [0, 5]
    ]
    nothing = draws.strongest_atoms(firings, pd.DataFrame({"sequence": [0], "position": [T]}, index=[7]))
    assert nothing.index.tolist() == [7] and nothing["atom"].isna().all()


def test_atoms_of_both_halves(firings: F.Firings) -> None:
    split = draws.halves(N, seed=0)

    def picked(given: F.Firings = firings, min_firings: int = 15, n_atoms: int | None = None, **how: Any) -> list[int]:
        return draws.draw_atoms(given, split, BOUNDS, rng(), min_firings=min_firings, n_atoms=n_atoms, **how).tolist()

    for side in split:
        inside = np.isin(firings.sequence, side) & (firings.position >= 2) & (firings.position <= 30)
        assert (np.bincount(firings.atom[inside], minlength=ATOMS)[picked()] >= 15).all()
    assert len(set(picked(n_atoms=2))) == 2 and set(picked(n_atoms=2)) <= set(picked())
    assert picked(min_firings=1, atoms=(7, 3)) == [7, 3]
    with pytest.raises(ValueError, match="8"):
        picked(min_firings=1, atoms=(8,))
    with pytest.raises(NothingToMeasureError):
        picked(min_firings=10**4)
    test, fires = split.test, slice(3, 9)  # atom 0 fires in a single test sequence: it would have no interval
    once = at((split.select[0], fires, slice(2)), (test[0], fires, slice(2)), (test[1], fires, 1))
    assert picked(once, min_firings=2) == [1]
