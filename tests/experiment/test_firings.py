"""Finding, drawing and moving firings, on made-up activations."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pandas as pd
import pytest
import torch

from sae_lens_writesae.errors import NothingToMeasureError
from sae_lens_writesae.sae.target import HeadHook, atoms_of, check_plain_activations
from writesae.experiment import firings as F

N, T, ATOMS = 12, 40, 9


def dense(seed: int = 0) -> torch.Tensor:
    """Activations [N,T,F]: atom i fires with probability (i + 1) / 20; atom 8 never."""
    g = torch.Generator().manual_seed(seed)
    chance = (torch.arange(ATOMS) + 1) / 20
    chance[8] = 0
    return torch.rand(N, T, ATOMS, generator=g) * (torch.rand(N, T, ATOMS, generator=g) < chance)


class FakeModel:
    """Hands out the position as the hook's activation, so that a fake SAE can look its activations up."""

    def run_with_cache(self, tokens: torch.Tensor, names_filter: list[str], stop_at_layer: int):
        assert stop_at_layer == 4 and tokens.shape == (1, T)
        return None, {names_filter[0]: tokens[..., None].float()}


class FakeSAE(torch.nn.Module):
    def __init__(
        self, activations: torch.Tensor, hook: str = "blocks.3.mixer.heads.1.hook_write_vec", norm: str = "none"
    ):
        super().__init__()
        self.activations, self.place = activations, torch.nn.Parameter(torch.zeros(1))
        self.cfg = SimpleNamespace(metadata=SimpleNamespace(hook_name=hook), normalize_activations=norm)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return self.activations.flatten(0, 1)[x[:, 0].long()]


def collected(activations: torch.Tensor) -> F.Firings:
    tokens = torch.arange(N * T).view(N, T)
    return F.collect_firings(cast(Any, FakeModel()), cast(Any, FakeSAE(activations)), 3, tokens)


def test_collected_firings_are_the_positive_activations() -> None:
    activations = dense()
    firings = collected(activations)
    again = torch.zeros_like(activations)
    again[firings.sequence, firings.position, firings.atom] = torch.tensor(firings.activation)
    assert torch.equal(again, activations) and len(firings) == int((activations > 0).sum())
    assert (firings.n_sequences, firings.n_positions, firings.n_atoms) == (N, T, ATOMS)


def test_firings_of_some_sequences_keep_their_numbers() -> None:
    activations = dense()
    some = collected(activations).of_sequences(np.array([2, 7]))
    assert set(some.sequence) == {2, 7} and len(some) == int((activations[[2, 7]] > 0).sum())


def test_alive_counts_the_first_tokens_only() -> None:
    activations = torch.zeros(N, T, ATOMS)
    activations[0, 5, 2] = activations[1, 3, 4] = activations[1, 4, 4] = 1
    firings = collected(activations)
    assert firings.alive(N * T).tolist() == [2, 4]
    assert firings.alive(T + 3).tolist() == [2]  # token T + 3 is not among the first T + 3
    assert firings.alive(T + 4).tolist() == [2, 4]
    assert firings.alive(N * T, min_firings=2).tolist() == [4]


def test_strongest_atom_of_a_position() -> None:
    activations = dense()
    at = pd.DataFrame({"sequence": [3, 7, 3], "position": [5, 0, 5]}, index=[30, 10, 20])
    best = collected(activations).strongest(at)
    assert best.index.tolist() == [30, 10, 20]
    for (s, p), atom, activation in zip([(3, 5), (7, 0), (3, 5)], best["atom"], best["activation"]):
        assert activation == activations[s, p].max() and atom == activations[s, p].argmax()
    nothing = collected(dense() * 0 + (torch.arange(T) == 1)[None, :, None]).strongest(at)
    assert nothing["atom"].isna().all()


def test_the_sample_is_spread_over_sequences() -> None:
    firings = collected(dense())
    sample = F.sample_firings(firings, np.arange(ATOMS), 6, first=2, last=30, rng=np.random.default_rng(0))
    assert sample["position"].between(2, 30).all() and not sample.duplicated(["sequence", "position", "atom"]).any()
    for atom, rows in sample.groupby("atom"):
        inside = (firings.atom == atom) & (firings.position >= 2) & (firings.position <= 30)
        assert len(rows) == min(6, inside.sum())
        if len(np.unique(firings.sequence[inside])) >= 6:
            assert rows["sequence"].is_unique
    assert 8 not in set(sample["atom"])


def test_a_second_turn_only_begins_when_the_first_is_over() -> None:
    firings = collected(dense())
    sample = F.sample_firings(firings, np.array([7]), 18, first=0, last=T - 1, rng=np.random.default_rng(1))
    counts = sample["sequence"].value_counts()
    assert counts.max() - counts.reindex(range(N), fill_value=0).min() == 1 and len(sample) == 18


def test_sequences_have_the_same_chance_however_often_an_atom_fires_in_them() -> None:
    """One firing in one sequence, nine in another: when one is drawn, each sequence has it half of the time."""
    activations = torch.zeros(N, T, ATOMS)
    activations[0, 5, 0] = 1
    activations[1, 6:15, 0] = 1
    firings, rng = collected(activations), np.random.default_rng(0)
    draws = [
        F.sample_firings(firings, np.array([0]), 1, first=0, last=T - 1, rng=rng)["sequence"][0] for _ in range(150)
    ]
    assert np.mean(draws) == pytest.approx(0.5, abs=0.12)  # 3 standard errors


def test_silent_positions_keep_everything_but_the_position() -> None:
    activations = dense()
    firings, rng = collected(activations), np.random.default_rng(0)
    sample = F.sample_firings(firings, np.arange(8), 5, first=1, last=30, rng=rng)
    moved = F.silent_positions(sample, firings, first=1, last=30, rng=rng)
    assert len(moved) == len(sample) and moved["position"].between(1, 30).all()
    assert (activations[moved["sequence"], moved["position"], moved["atom"]] == 0).all()
    assert sorted(moved["activation"]) == sorted(sample["activation"])


def test_atoms_that_are_never_silent_are_dropped() -> None:
    activations = torch.zeros(N, T, ATOMS)
    activations[:, :, 0] = activations[:, 3, 1] = 1
    firings, rng = collected(activations), np.random.default_rng(0)
    sample = F.sample_firings(firings, np.array([0, 1]), 2, first=1, last=30, rng=rng)
    assert set(F.silent_positions(sample, firings, first=1, last=30, rng=rng)["atom"]) == {1}


DRAW = {"horizon": 5, "n_atoms": 4, "firings_per_atom": 6}


def drawn(firings: F.Firings, seed: int = 0, **changes: Any) -> F.FiringDraw:
    return F.draw_firings(firings, np.random.default_rng(seed), **DRAW | changes)


def test_the_draw_is_seeded_and_says_what_it_drew_from() -> None:
    firings = collected(dense())
    one = drawn(firings)
    pd.testing.assert_frame_equal(one.table, drawn(firings).table)
    assert not drawn(firings, 1).table.equals(one.table)
    assert one.alive_tokens == N * T and one.alive.tolist() == list(range(8)) and one.n_testable == 8
    assert one.table["atom"].nunique() == 4 and one.table["firing"].tolist() == list(range(len(one.table)))
    assert one.table["position"].between(1, T - 1 - 5).all()  # the horizon follows each
    assert set(drawn(firings, atoms=(6, 2)).table["atom"]) == {2, 6}
    assert drawn(firings, n_atoms=None).table["atom"].nunique() == 8


def test_the_dominant_atom_is_written_and_a_position_counts_once() -> None:
    activations = dense()
    firings = collected(activations)
    table = drawn(firings, n_atoms=None, firings_per_atom=30, written="dominant").table
    assert not table.duplicated(["sequence", "position"]).any()
    at = activations[table["sequence"].to_list(), table["position"].to_list()]
    assert (table["written_atom"].to_numpy() == at.argmax(1).numpy()).all()
    assert np.allclose(table["activation"], at.max(1).values)
    own = drawn(firings, n_atoms=None, firings_per_atom=30).table
    assert (own["written_atom"] == own["atom"]).all() and own.duplicated(["sequence", "position"]).any()


def test_silent_positions_of_a_draw() -> None:
    firings = collected(dense())
    table = drawn(firings, silent=True).table
    fires = set(zip(firings.sequence, firings.position, firings.atom))
    assert not fires & set(zip(table["sequence"], table["position"], table["atom"])) and len(table)


def test_what_cannot_be_drawn_is_refused() -> None:
    firings = collected(dense())
    with pytest.raises(ValueError, match="8"):
        drawn(firings, atoms=(8,))
    with pytest.raises(NothingToMeasureError, match="0 of 9"):
        drawn(collected(dense() * 0))
    with pytest.raises(NothingToMeasureError, match="fire"):
        drawn(firings, first_position=T)


def test_halves_share_no_sequence() -> None:
    split = F.halves(9, seed=0)
    assert sorted([*split.select, *split.test]) == list(range(9)) and len(split.select) == 4
    assert F.halves(9, seed=0).test.tolist() == split.test.tolist() != F.halves(9, seed=3).test.tolist()
    with pytest.raises(NothingToMeasureError, match="3"):
        F.halves(3, seed=0)


def test_atoms_of_both_halves() -> None:
    firings, split, rng = collected(dense()), F.halves(N, seed=0), np.random.default_rng(0)
    bounds = {"first": 2, "last": 30}
    atoms = F.draw_atoms(firings, split, bounds, rng, min_firings=15, n_atoms=None)
    for side in split:
        inside = np.isin(firings.sequence, side) & (firings.position >= 2) & (firings.position <= 30)
        assert (np.bincount(firings.atom[inside], minlength=ATOMS)[atoms] >= 15).all()
    two = F.draw_atoms(firings, split, bounds, rng, min_firings=15, n_atoms=2)
    assert len(set(two)) == 2 and set(two) <= set(atoms)
    assert F.draw_atoms(firings, split, bounds, rng, min_firings=1, n_atoms=None, atoms=(7, 3)).tolist() == [7, 3]
    with pytest.raises(ValueError, match="8"):
        F.draw_atoms(firings, split, bounds, rng, min_firings=1, n_atoms=2, atoms=(8,))
    with pytest.raises(NothingToMeasureError):
        F.draw_atoms(firings, split, bounds, rng, min_firings=10**4, n_atoms=2)


def test_an_atom_of_a_single_test_sequence_is_not_drawn() -> None:
    """All of its firings there are dependent, so that they would have no interval."""
    split, activations = F.halves(N, seed=0), torch.zeros(N, T, ATOMS)
    activations[split.select[0], 3:9, :2] = 1
    activations[split.test[0], 3:9, :2] = 1
    activations[split.test[1], 3:9, 1] = 1
    bounds, rng = {"first": 2, "last": 30}, np.random.default_rng(0)
    assert F.draw_atoms(collected(activations), split, bounds, rng, min_firings=2, n_atoms=None).tolist() == [1]


def test_hook_names() -> None:
    hook = HeadHook.parse("blocks.12.mixer.heads.3.hook_state_vec")
    assert hook[1:] == (12, 3, "state") and hook.cell == "L12H3"
    for other in (
        "blocks.1.hook_resid_pre",
        "blocks.1.mixer.heads.2.hook_write",
        "xblocks.1.mixer.heads.2.hook_write_vec",
    ):
        with pytest.raises(ValueError, match="hook_write_vec"):
            HeadHook.parse(other)


def test_activations_must_be_coefficients() -> None:
    normed = cast(Any, FakeSAE(dense(), norm="expected_average_only_in"))
    with pytest.raises(ValueError, match="expected_average_only_in"):
        check_plain_activations(normed)
    with pytest.raises(NothingToMeasureError, match="sequence 0"):
        collected(dense().index_fill(1, torch.tensor([4]), torch.nan))


def test_atoms_are_the_factors_or_those_of_the_decoder() -> None:
    v, w = torch.randn(6, 2, 3), torch.randn(6, 2, 5)
    assert torch.equal(atoms_of(cast(Any, SimpleNamespace(v=v, w=w)), [4, 1], 3, 5).keys, v[[4, 1]])
    rows = (v.mT @ w).flatten(1)
    flat = atoms_of(cast(Any, SimpleNamespace(W_dec=rows)), np.array([4, 1]), 3, 5)
    torch.testing.assert_close(flat.dense(), (v.mT @ w)[[4, 1]])
    torch.testing.assert_close(flat.norm(), rows[[4, 1]].norm(dim=1))
