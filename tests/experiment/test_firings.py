"""Finding and sampling firings, on made-up activations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from made_firings import ATOMS, BOUNDS, N, T, at, collected, drawn_activations
from saes import HOOK, LAYER, random_sae

from hookpoints import HookedRecurrent
from sae_lens_writesae.errors import NothingToMeasureError
from writesae.experiment import firings as F


@pytest.fixture(scope="module")
def dense() -> torch.Tensor:
    return drawn_activations()


@pytest.fixture(scope="module")
def firings(dense: torch.Tensor) -> F.Firings:
    return collected(dense)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_firings_are_the_positive_activations_of_a_dictionary(model64: HookedRecurrent, varied: torch.Tensor) -> None:
    sae = random_sae(model64)
    with torch.no_grad():
        firings = F.collect_firings(model64, sae, LAYER, varied)
        dense = sae.encode(model64.run_with_cache(varied, names_filter=[HOOK])[1][HOOK])
    again = torch.zeros_like(dense, dtype=torch.float32)
    again[firings.sequence, firings.position, firings.atom] = torch.tensor(firings.activation)
    torch.testing.assert_close(again, dense.float())
    assert (firings.n_sequences, firings.n_positions, firings.n_atoms) == dense.shape
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


def test_stretches_of_a_text_end_within_it() -> None:
    """Callers slice a longer text with them."""
    assert F.in_one_pass(torch.zeros(3, 4096), torch.device("cuda"))[1] == slice(2, 3)
