"""Pairing, clustering, verdict, sentence and panel of a claim: tested here once, for all evaluations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from writesae.dictionary.estimates import Estimate, recovered_share
from writesae.page.format import percent
from writesae_study.verdict import statistics as stats
from writesae_study.verdict.finding import Finding, Paired, with_interval


def tidy(**kl: float) -> pd.DataFrame:
    """KL of 60 firings in 20 sequences under each condition: a shared effect of the firing, and 1% of noise."""
    rng, n = np.random.default_rng(0), 60
    shared = rng.normal(0, 0.5, n)
    units = pd.DataFrame({"firing": np.arange(n), "sequence": np.arange(n) // 3, "feature": np.arange(n) % 7})
    parts = [units.assign(condition=c, kl=x * np.exp(shared + 0.01 * rng.normal(size=n))) for c, x in kl.items()]
    return pd.concat(parts).sample(frac=1, random_state=1)  # the order of rows means nothing


@pytest.fixture
def paired() -> Paired:
    return Paired.of(tidy(native=1e-9, delete=1.0, atom=0.3, mean=0.8), "kl", "firing", "feature")


@pytest.mark.parametrize(
    ("estimated", "expected"),
    [
        (lambda p: p.mean(p["atom"] < 0.3), lambda w, ids: stats.share(w["atom"] < 0.3, ids)),  # truth values
        (lambda p: p.wins("atom", "atom"), lambda w, ids: stats.share(w["atom"] < 0, ids)),  # a tie is no win
        (
            lambda p: Paired(p.wide, ("sequence", "feature"), seed=3).mean("atom"),
            lambda w, ids: stats.estimate(w["atom"], ids, w["feature"], seed=3),
        ),
        (lambda p: p.mean("delete", "atom"), lambda w, ids: stats.estimate(w["delete"] - w["atom"], ids)),
        (
            lambda p: p.median("delete", "atom"),
            lambda w, ids: stats.estimate(w["delete"] - w["atom"], ids, statistic=stats.weighted_median),
        ),
        (
            lambda p: p.size_of("delete"),
            lambda w, _: {"typical": w["delete"].median(), "floor": w["native"].quantile(0.95)},
        ),
        (lambda p: p.recovered("atom"), lambda w, ids: recovered_share(w["atom"], w["delete"], ids)),
        (lambda p: p.total("atom"), lambda w, ids: stats.total(w["delete"] - w["atom"], w["delete"], ids)),
        (
            lambda p: p.total("atom", than="mean"),
            lambda w, ids: stats.total(w["mean"] - w["atom"], w["delete"], ids),
        ),
        (
            lambda p: p.lead("delete", Paired(p.wide.assign(sequence=p["sequence"] + 100, delete=2 * p["atom"]))),
            lambda w, ids: stats.estimate_difference(w["delete"], 2 * w["atom"], ids, ids + 100),
        ),
    ],
)
def test_estimates_are_those_of_the_statistics(paired: Paired, estimated: Any, expected: Any) -> None:
    assert estimated(paired) == expected(paired.wide, paired.wide["sequence"])


def test_units_measured_twice_count_once_and_units_without_a_condition_are_left_out() -> None:
    table = tidy(delete=1.0, atom=0.3, mean=0.8)
    assert Paired.of(pd.concat([table, table]), "kl", "firing").mean("atom").n == 60
    for lacking in ("atom", "delete", "mean"):
        fewer = Paired.of(table.query(f"not (condition == '{lacking}' and firing < 6)"), "kl", "firing")
        complete = Paired(fewer.wide.dropna())
        n = 60 if lacking == "mean" else 54
        assert {fewer.mean("atom", "delete").n, fewer.wins("atom", "delete").n, fewer.recovered("atom").n} == {n}
        assert fewer.total("atom", "mean") == complete.total("atom", "mean")


def test_numbers_are_said_with_their_intervals(paired: Paired) -> None:
    wins, of_mean = paired.wins("atom", "delete"), paired.wins("mean", "delete")
    shown = {"atom": wins, "mean write": of_mean}
    more: Any = {"measured": "KL 0.3 nats", "controls": "no-op 0", "of": "firings in {} sequences"}
    row = Finding(claim="", null="", effect=wins, shown=shown, write=percent, axis="of firings", **more).row()
    assert row.measured == f"{with_interval(wins, percent)} of firings; KL 0.3 nats"
    assert row.controls == f"mean write {with_interval(of_mean, percent)}; no-op 0"
    assert (row.n, row.unit) == (60, "firings in 20 sequences")
    worse = Estimate(-63.9, -114.0, -37.0, 60, 20)
    assert with_interval(worse, percent) == "none (KL 64.9 [38, 115] times that of deletion)"
    assert with_interval(Estimate(0.25, np.nan, np.nan, 9, 1), percent) == "25.0%"  # one cluster gives no interval
