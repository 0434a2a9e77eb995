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
    assert moved["position"].between(2, 30).all() and sorted(moved["activation"]) == sorted(sample["activation"])
    assert (dense[moved["sequence"], moved["position"], moved["atom"]] == 0).all()
    always = at((slice(None), slice(None), 0), (slice(None), 3, 1))
    sample = F.sample_firings(always, np.array([0, 1]), 2, **BOUNDS, rng=rng())
    assert set(draws.silent_positions(sample, always, **BOUNDS, rng=rng())["atom"]) == {1}  # atom 0 is silent nowhere


def drawn(firings: F.Firings, **changes: Any) -> pd.DataFrame:
    return draws.draw_firings(firings, rng(), **{"horizon": 5, "n_atoms": None, "firings_per_atom": 30} | changes).table


def test_the_dominant_atom_is_written_at_positions_drawn_uniformly(dense: torch.Tensor, firings: F.Firings) -> None:
    table = drawn(firings, written="dominant")
    assert not table.duplicated(["sequence", "position"]).any()
    values = dense[table["sequence"].to_list(), table["position"].to_list()]
    assert (table["written_atom"].to_numpy() == values.argmax(1).numpy()).all()
    assert np.allclose(table["activation"], values.max(1).values)
    own = drawn(firings)
    assert (own["written_atom"] == own["atom"]).all() and own.duplicated(["sequence", "position"]).any()
    rare = drawn(at((0, 5, 2)), written="dominant", firings_per_atom=N * T)  # every position, firing or not
    assert len(rare) == N * (T - 1 - 5) and rare.query("activation > 0")["position"].tolist() == [5]


def test_atoms_fire_often_enough_in_both_halves(firings: F.Firings) -> None:
    split = draws.halves(N, seed=0)
    assert sorted([*split.select, *split.test]) == [*range(N)]  # no sequence is in both

    def picked(of: F.Firings, min_firings: int, **how: Any) -> list[int]:
        settings = {"min_firings": min_firings, "n_atoms": None} | how
        return draws.draw_atoms(of, split, BOUNDS, rng(), **settings).tolist()

    able = picked(firings, 15)
    for side in split:
        inside = np.isin(firings.sequence, side) & firings.between(**BOUNDS)
        assert (np.bincount(firings.atom[inside], minlength=ATOMS)[able] >= 15).all()
    assert len({*picked(firings, 15, n_atoms=2)} & {*able}) == 2 and picked(firings, 1, atoms=(7, 3)) == [7, 3]
    with pytest.raises(NothingToMeasureError):
        picked(firings, 10**4)
    test, fires = split.test, slice(3, 9)  # atom 0 fires in a single test sequence: it would have no interval
    once = at((split.select[0], fires, slice(2)), (test[0], fires, slice(2)), (test[1], fires, 1))
    assert picked(once, 2) == [1]
