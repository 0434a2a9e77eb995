"""Gaussian mixtures: how many are fitted to few values, and which one is best of a planted mixture."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from writesae_study.verdict.mixtures import fit_mixtures


@pytest.mark.parametrize(
    ("values", "fitted"),
    [([0.3] * 50, 0), ([0.1, 0.2, 0.3], 0), (np.linspace(0, 1, 7), 1), (np.linspace(0, 1, 10), 2)],
)
def test_few_values_have_few_mixtures(values: Any, fitted: int) -> None:
    """One component for every five different values."""
    fits = fit_mixtures(values)
    assert fits["components"].nunique() == fitted and not fits.isna().to_numpy().any()


def test_a_planted_mixture_is_the_best_of_four() -> None:
    rng = np.random.default_rng(0)
    fits = fit_mixtures(1000 * np.concatenate([rng.normal(0.2, 0.02, 300), rng.normal(0.8, 0.05, 100)]))
    assert {*fits["components"]} == {1, 2, 3, 4}
    best = fits[fits["bic"] == fits["bic"].min()].set_index("component")
    assert best["weight"].to_dict() == pytest.approx({1: 0.75, 2: 0.25}, abs=0.01)
    assert best["mean"].to_dict() == pytest.approx({1: 200, 2: 800}, rel=0.02)
    assert best["sd"].to_dict() == pytest.approx({1: 20, 2: 50}, rel=0.15)
