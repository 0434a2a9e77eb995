"""Every claim on its null: made-up tables in which the atom and the null have the same distribution, heavy-tailed as
measured effects are. At most 1 of 8 hold, and 5 of 100 at night. The same tables with an effect hold
mostly, and a few units of them never.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import test_amplify
import test_baselines
import test_erasure
import test_install
import test_logit_change
import test_multistep
import test_partition
import test_passage
import test_seeds
import test_sign
import torch
from made_up import logit_cells, made_up, replaced
from measured import PLACE, load_model, make_dictionary, sequences
from torch.nn.functional import normalize

from writesae.dictionary import estimates
from writesae_study.dictionary.controls import control_dictionary
from writesae_study.dictionary.kinds import compare_kinds
from writesae_study.evaluations import EVALUATIONS
from writesae_study.evaluations import sign as sign_module
from writesae_study.evaluations.baselines import SMALL_COST
from writesae_study.evaluations.erasure import Erasure
from writesae_study.evaluations.multistep import Multistep
from writesae_study.evaluations.partition import RULES, Partition
from writesae_study.evaluations.sign import Sign
from writesae_study.evaluations.substitution import Substitution
from writesae_study.experiment.evaluation import Result
from writesae_study.verdict import statistics as stats
from writesae_study.verdict.finding import Claim
from writesae_study.verdict.fits import with_control
from writesae_study.verdict.judge import Verdict

_POOL = pd.read_csv(Path(__file__).parents[1] / "verdict" / "pool.csv.xz")["quantised"].to_numpy()[:1200]
FACTORS = _POOL / np.median(_POOL)
"""Measured KLs of one head over their median: 5% of them hold a third of the sum."""


def heavy(
    rng: np.random.Generator, result: Result, name: str, *columns: str, by: str | None = "condition", power: float
) -> Result:
    """The columns of a table times measured factors: one for each row, and one for the rows of a sequence (under a
    condition)."""
    table = result.tables[name]
    codes = table.groupby(["sequence", *([by] if by else [])]).ngroup()
    factors = {}
    for column in columns:
        of_sequence = rng.choice(FACTORS, codes.max() + 1)[codes] ** 0.3
        factors[column] = table[column] * (rng.choice(FACTORS, len(table)) * of_sequence) ** power
    return replaced(result, **{name: table.assign(**factors)})


Draw = Callable[[np.random.Generator, bool], list[Result]]
"""Results of random tables, with the null in the place of the atom or with an effect."""


def substitution(rng: np.random.Generator, null: bool) -> list[Result]:
    kl = {"delete": 1.0, "atom": 0.2, "shuffled": 0.2 if null else 3.0, "random": 3.0}
    how: Any = {"scales": ("matched",), "controls": ("shuffled", "random", "drawn"), "n_sequences": 24}
    heads = [made_up(kl, head=head, seed=int(rng.integers(2**31)), per_sequence=6, **how) for head in range(2)]
    return [heavy(rng, each, "firings", "kl_window", power=0.4) for each in heads]


def multistep(rng: np.random.Generator, null: bool) -> list[Result]:
    kl = dict.fromkeys(("atom", "delete", "mean"), 0.038) if null else {"atom": 0.02, "delete": 0.3, "mean": 0.3}
    result = test_multistep.known(kl, 60)
    steps = result.tables["steps"].assign(far=lambda t: 1 - t["residual_cosine"])
    moved = heavy(rng, replaced(result, steps=steps), "steps", "state_gap", "far", power=0.4)
    return [replaced(moved, steps=moved.tables["steps"].assign(residual_cosine=lambda t: 1 - t["far"]))]


def amplify(rng: np.random.Generator, null: bool) -> list[Result]:
    result = test_amplify.counted(3.0, random=3.0 if null else 0.0, n_tokens=6)
    return [heavy(rng, result, "counts", "count", power=0.3)]


def erasure(rng: np.random.Generator, null: bool) -> list[Result]:
    random = 0.1 if null else 0.01
    result = test_erasure.sampled({"random": random}, effect=-0.1, random=-random)
    moved = heavy(rng, result, "firings", "effect", "elsewhere", "random", by=None, power=0.5)
    return [heavy(rng, moved, "doses", "effect", "wrong", "random", by=None, power=0.5)]


def install(rng: np.random.Generator, null: bool) -> list[Result]:
    result = test_install.shares(0.0, 0.0, 0.0)
    table, chance = result.tables["continuations"], {"nothing": 0.1, "target": 0.9, "random": 0.9 if null else 0.1}
    hit, better = (rng.random(len(table)) < table["condition"].map(chance) for _ in range(2))
    wrong, ranks = rng.random(len(table)) < 0.1, np.where(better, 100, 300)
    return [replaced(result, continuations=table.assign(hit=hit, wrong_hit=wrong, edited_rank=ranks))]


def sign(rng: np.random.Generator, null: bool) -> list[Result]:
    result = test_sign.linear(0.85, 0.5, 0.85 if null else 0.5, n=120, seed=rng)
    return [heavy(rng, result, "writes", "measured", by="direction", power=0.5)]


def logit_change(rng: np.random.Generator, null: bool) -> list[Result]:
    cells = logit_cells(first=1.0, noise=0.05).drop(columns="shuffled")
    factor = cells["firing"].map(pd.Series(rng.choice(FACTORS, cells["firing"].nunique()) ** 0.3))
    cells = cells.assign(**{name: cells[name] * factor for name in ("measured", "F0", "F1", "F2")})
    own, other = (with_control(cells, "F2", int(rng.integers(2**31)))["shuffled"] for _ in range(2))
    cells = cells.assign(**dict.fromkeys(("F0", "F1", "F2"), own) if null else {}, shuffled=other)
    return [test_logit_change.made_result(cells, rule="Mamba-2")]


def passage(rng: np.random.Generator, null: bool) -> list[Result]:
    result = test_passage.sampled(deleted=0.02, removed=0.02 if null else 0.2, random=0.3)
    return [heavy(rng, result, "passages", "bits", power=0.5)]


def partition(rng: np.random.Generator, null: bool) -> list[Result]:
    """Claim 4 has no smaller effect than sameness: its null are kinds that differ by as much as matters, 10 points."""
    results = []
    for rule, mean in zip(RULES, (0.2, 0.15, 0.1)):
        own, untrained, shuffled = (mean * rng.gamma(4, 0.25, 80) for _ in range(3))
        if not null:
            own = np.concatenate([rng.normal(0, 0.01, 30), rng.normal(3 * mean, 0.05, 50)])
            untrained, shuffled = (rng.normal(0, 0.01, 80) for _ in range(2))
        result = test_partition.made(own, shuffled, untrained, components=2)
        results.append(replaced(result, {"rule": rule, "target": "write"}))
    wide = pd.DataFrame({"written_atom": np.arange(960) % 80, "delete": 1.0})
    wins = rng.random(960) < np.where((wide["written_atom"] % 2 == 1) & null, 0.8, 0.9)
    wide["atom/matched"] = np.where(wins, 0.5, 2.0)
    kinds = results[0].tables["atoms"].assign(kind=np.tile(["register", "bundle"], 40))
    table, results[0].info["compared"] = compare_kinds(wide, "matched", Verdict("holds", ""), kinds, 0)
    return [replaced(results[0], substitution=table), *results[1:]]


def seeds(rng: np.random.Generator, null: bool) -> list[Result]:
    atoms, *nulls = (rng.beta(2, 4, 30) for _ in range(3))
    return [test_seeds.made([100, 98], atoms if null else rng.normal(0.7, 0.05, 30), *nulls)]


def baselines(rng: np.random.Generator, null: bool) -> list[Result]:
    kl = dict.fromkeys([("flat", "svd"), ("flat", "atom svd"), ("small", "svd")], 0.2) if null else {}
    cost = {("two", "dictionary"): 0.01 + SMALL_COST} if null else {}
    shares = (0.3, 0.3, 0.3) if null else (0.05, 0.5, 0.5)
    dead = {name: int(rng.binomial(400, share)) for name, share in zip(("ours", "flat", "dense"), shares)}
    how: Any = {"selectivity": 0.98 if null else 0.999, "seed": int(rng.integers(2**31))}
    result = test_baselines.made_up(kl, cost, dead, **how)
    writes = result.tables["writes"].assign(of=lambda t: t["sae"] + t["condition"])
    return [heavy(rng, replaced(result, writes=writes), "writes", "kl", by="of", power=0.4)]


DRAWS: tuple[Draw, ...] = (
    *(substitution, multistep, amplify, erasure, install, sign, logit_change),
    *(passage, partition, seeds, baselines),
)


def claims(results: list[Result]) -> list[Claim]:
    """Of the first result, and of all results together."""
    return [*results[0].claims(), *(claim for _, claim in type(results[0].evaluation).across(results))]


_draws = cache(estimates.resample_counts.__wrapped__)


@pytest.fixture(autouse=True)
def _cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimates, "N_RESAMPLES", 400)
    for module in (estimates, stats):
        monkeypatch.setattr(module, "resample_counts", _draws)
    monkeypatch.setattr(stats, "permutation_test", partial(stats.permutation_test, n_resamples=99))


@pytest.mark.parametrize(("runs", "most", "power"), [(8, 1, 4), pytest.param(100, 5, 10, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("draw", DRAWS)
def test_a_claim_holds_where_its_effect_is_and_not_on_its_null(draw: Draw, runs: int, most: int, power: int) -> None:
    """And the page of verdicts names the null."""
    kind = draw.__name__
    held: dict[bool, Counter[Any]] = {}
    for null, n in ((True, runs), (False, power)):
        rng, held[null] = np.random.default_rng(0 if null else 1), Counter()
        for claim in itertools.chain.from_iterable(claims(draw(rng, null)) for _ in range(n)):
            held[null][claim.number, claim.claim, claim.null] += claim.outcome == "holds"
    assert {claim: n for claim, n in held[True].items() if n > most} == {}
    assert {claim: n for claim, n in held[False].items() if n <= power / 2} == {}
    asked = held[False].keys()
    assert {1 if 11 <= n <= 14 else n for n in EVALUATIONS[kind].answers} <= {number for number, *_ in asked}
    page = (Path(__file__).parents[2] / "docs" / "verdicts.md").read_text().splitlines()
    assert {f"| {number or '–'} | [{kind}](evaluations/{kind}.md) | {null} |" for number, _, null in asked} <= {*page}


def few(table: pd.DataFrame) -> pd.DataFrame:
    """Four units of a table, or four units said to be behind each of its numbers."""
    unit = next((name for name in ("sequence", "atom", "first") if name in table), None)
    if unit is None:
        return table.assign(**{name: 4 for name in ("n_atoms", "n", "clusters", "d_sae") if name in table})
    return table[table[unit].isin(np.sort(table[unit].unique())[[0, 1, -2, -1]])]


@pytest.mark.parametrize("draw", DRAWS)
def test_too_few_units_one_head_or_no_null_give_no_verdict(draw: Draw) -> None:
    results = draw(np.random.default_rng(0), False)
    poor = [replaced(each, **{name: few(table) for name, table in each.tables.items()}) for each in results]
    assert {claim.outcome for claim in claims(poor)} <= {"inconclusive", "not tested", "below the floor"}
    evaluation = results[0].evaluation
    assert type(evaluation).across(results[:1]) == []
    if isinstance(evaluation, (Substitution, Multistep)):
        claim = Result(replace(evaluation, controls=()), results[0].info, results[0].tables).claims()[0]
        assert (claim.outcome, claim.null) == ("not tested", "")


# -- real nulls


UNTRAINED = sequences()[:24]


@pytest.mark.parametrize(
    "seed", [pytest.param(n, marks=pytest.mark.nightly if n else pytest.mark.slow) for n in range(3)]
)
def test_an_untrained_dictionary_and_random_writes_hold_nothing(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claims 8, 24, 26 and 9 in full: random atoms of unit norm; writes toward a token at random value sides."""
    model, (layer, head) = load_model(), PLACE
    writes = model.recurrence(UNTRAINED[:4], layer).write(head)[:, :, 0].flatten(0, 1).flatten(1)
    sae, small = control_dictionary(make_dictionary(), writes, seed=seed), {"n_atoms": 10, "seed": seed}
    sides = torch.Generator().manual_seed(seed)
    monkeypatch.setattr(sign_module, "value_direction", lambda *_: normalize(torch.randn(32, generator=sides), dim=0))
    evaluations = [
        Erasure(**small, select_firings=6, test_firings=6, min_firings=3, horizon=2, injected=(4.0,)),
        Partition(min_firings=3, min_atoms=10, tested_atoms=0, restarts=1, components=2, seed=seed),
        Sign(n_positions=24, ranks=((1, 10),), sizes=(1.0,), seed=seed),
    ]
    made = [claim for each in evaluations for claim in each.run(model, sae, UNTRAINED, progress=False).claims()]
    assert [claim for claim in made if claim.outcome == "holds"] == []
