"""Finding, drawing and moving firings, on made-up activations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from saes import HOOK, LAYER, random_sae

from hookpoints import HookedRecurrent
from sae_lens_writesae.errors import NothingToMeasureError
from writesae.experiment import firings as F

N, T, ATOMS = 12, 40, 9
BOUNDS: F.Bounds = {"first": 2, "last": 30}


def collected(activations: torch.Tensor) -> F.Firings:
    """Those of activations [N,T,F]."""
    places = activations.nonzero(as_tuple=True)
    return F.Firings(*(x.numpy() for x in (*places, activations[places])), N, T, ATOMS)


def at(*places: tuple[Any, Any, Any]) -> F.Firings:
    """Firings at some places alone, all of activation 1."""
    activations = torch.zeros(N, T, ATOMS)
    for place in places:
        activations[place] = 1
    return collected(activations)


@pytest.fixture(scope="module")
def dense() -> torch.Tensor:
    """Activations [N,T,F]: atom i fires with probability (i + 1) / 20; atom 8 never."""
    g, chance = torch.Generator().manual_seed(0), (torch.arange(ATOMS) + 1) / 20
    chance[8] = 0
    return torch.rand(N, T, ATOMS, generator=g) * (torch.rand(N, T, ATOMS, generator=g) < chance)


@pytest.fixture(scope="module")
def firings(dense: torch.Tensor) -> F.Firings:
    return collected(dense)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_firings_are_the_positive_activations_of_a_dictionary(model64: HookedRecurrent, varied: torch.Tensor) -> None:
    sae = random_sae(model64)
    with torch.no_grad():
        found = F.collect_firings(model64, sae, LAYER, varied)
        dense = sae.encode(model64.run_with_cache(varied, names_filter=[HOOK])[1][HOOK])
    again = torch.zeros_like(dense, dtype=torch.float32)
    again[found.sequence, found.position, found.atom] = torch.tensor(found.activation)
    torch.testing.assert_close(again, dense.float())
    assert (found.n_sequences, found.n_positions, found.n_atoms) == dense.shape
    torch.nn.init.constant_(sae.b_enc, torch.nan)
    with pytest.raises(NothingToMeasureError, match="sequence 0"):
        F.collect_firings(model64, sae, LAYER, varied)


def test_some_sequences_keep_their_numbers(dense: torch.Tensor, firings: F.Firings) -> None:
    some = firings.of_sequences(np.array([2, 7]))
    assert set(some.sequence) == {2, 7} and len(some) == int((dense[[2, 7]] > 0).sum())


def test_alive_counts_the_first_tokens_only() -> None:
    few = at((0, 5, 2), (1, 3, 4), (1, 4, 4))
    assert few.alive(T + 3).tolist() == [2]  # token T + 3 is not among the first T + 3
    assert few.alive(T + 4).tolist() == few.alive(N * T).tolist() == [2, 4]
    assert few.alive(N * T, min_firings=2).tolist() == [4]


def test_the_sample_is_spread_over_sequences(firings: F.Firings) -> None:
    sample = F.sample_firings(firings, np.arange(ATOMS), 6, **BOUNDS, rng=rng())
    assert sample["position"].between(2, 30).all() and not sample.duplicated(["sequence", "position", "atom"]).any()
    for atom, rows in sample.groupby("atom"):
        inside = (firings.atom == atom) & (firings.position >= 2) & (firings.position <= 30)
        assert len(rows) == min(6, inside.sum())
        assert rows["sequence"].is_unique or len(np.unique(firings.sequence[inside])) < 6
    more = F.sample_firings(firings, np.array([7]), 18, first=0, last=T - 1, rng=rng())
    counts = more["sequence"].value_counts().reindex(range(N), fill_value=0)
    assert counts.max() - counts.min() == 1 and len(more) == 18  # a second turn begins when the first is over


def test_sequences_have_the_same_chance_however_often_an_atom_fires_in_them() -> None:
    """One firing in one sequence, nine in another: when one is drawn, each sequence has it half of the time."""
    uneven, draw = at((0, 5, 0), (1, slice(6, 15), 0)), rng()
    draws = [F.sample_firings(uneven, np.array([0]), 1, **BOUNDS, rng=draw)["sequence"][0] for _ in range(150)]
    assert np.mean(draws) == pytest.approx(0.5, abs=0.12)  # 3 standard errors


def test_silent_positions_keep_everything_but_the_position(dense: torch.Tensor, firings: F.Firings) -> None:
    sample = F.sample_firings(firings, np.arange(8), 5, **BOUNDS, rng=rng())
    moved = F.silent_positions(sample, firings, **BOUNDS, rng=rng())
    assert len(moved) == len(sample) and moved["position"].between(2, 30).all()
    assert (dense[moved["sequence"], moved["position"], moved["atom"]] == 0).all()
    assert sorted(moved["activation"]) == sorted(sample["activation"])
    always = at((slice(None), slice(None), 0), (slice(None), 3, 1))
    sample = F.sample_firings(always, np.array([0, 1]), 2, **BOUNDS, rng=rng())
    assert set(F.silent_positions(sample, always, **BOUNDS, rng=rng())["atom"]) == {1}  # atom 0 is silent nowhere


def drawn(firings: F.Firings, seed: int = 0, **changes: Any) -> F.FiringDraw:
    return F.draw_firings(firings, rng(seed), **{"horizon": 5, "n_atoms": 4, "firings_per_atom": 6} | changes)


def test_the_draw_is_seeded_and_says_what_it_drew_from(firings: F.Firings) -> None:
    one = drawn(firings)
    pd.testing.assert_frame_equal(one.table, drawn(firings).table)
    assert not drawn(firings, 1).table.equals(one.table)
    assert one.alive.tolist() == list(range(8))
    assert one.table["atom"].nunique() == 4 and one.table["firing"].tolist() == list(range(len(one.table)))
    assert one.table["position"].between(1, T - 1 - 5).all()  # the horizon follows each
    assert set(drawn(firings, atoms=(6, 2)).table["atom"]) == {2, 6}
    assert drawn(firings, n_atoms=None).table["atom"].nunique() == 8


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
    nothing = firings.strongest(pd.DataFrame({"sequence": [0], "position": [T]}, index=[7]))
    assert nothing.index.tolist() == [7] and nothing["atom"].isna().all()


@pytest.mark.parametrize(
    ("changes", "error", "word"),
    [
        ({"atoms": (8,)}, ValueError, "8"),
        ({"firings": at()}, NothingToMeasureError, "0 of 9"),
        ({"first_position": T}, NothingToMeasureError, "8 of 9"),
    ],
)
def test_what_cannot_be_drawn_is_refused(firings: F.Firings, changes: Any, error: type[Exception], word: str) -> None:
    with pytest.raises(error, match=word):
        drawn(**{"firings": firings} | changes)


def test_halves_share_no_sequence() -> None:
    split = F.halves(9, seed=0)
    assert sorted([*split.select, *split.test]) == list(range(9)) and len(split.select) == 4
    assert F.halves(9, seed=0).test.tolist() == split.test.tolist() != F.halves(9, seed=3).test.tolist()
    with pytest.raises(NothingToMeasureError, match="3"):
        F.halves(3, seed=0)


def test_folds_are_two_halves_of_the_distinct_sequences() -> None:
    sequences = np.array([7, 7, 3, 5, 9, 3, 1])
    found = F.folds(sequences, seed=0)
    assert sorted(found) == [1, 3, 5, 7, 9] and sorted(found.values()) == [0, 0, 0, 1, 1]
    assert found == F.folds(sequences[::-1], seed=0)
    assert any(F.folds(sequences, seed=seed) != found for seed in (1, 2, 3))
    assert sorted(F.folds(np.array([4, 2]), seed=0).values()) == [0, 1]


def test_atoms_of_both_halves(firings: F.Firings) -> None:
    split = F.halves(N, seed=0)

    def picked(given: F.Firings = firings, min_firings: int = 15, n_atoms: int | None = None, **how: Any) -> list[int]:
        return F.draw_atoms(given, split, BOUNDS, rng(), min_firings=min_firings, n_atoms=n_atoms, **how).tolist()

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
