"""The substitution test: planted truths, and verdicts on made-up tables."""

from __future__ import annotations

from typing import Any, cast, get_args

import numpy as np
import pytest
import torch
from made_up import CONFOUNDED, FAILS, HOLDS, NO_EFFECT, made_up, runner
from sae_lens import SAE
from saes import native_and_edited, native_writes, random_sae, tied_sae
from torch import Tensor

from hookpoints import HookedRecurrent
from writesae.page.format import percent
from writesae_study.evaluations.substitution import Substitution
from writesae_study.experiment.at_firings import wide_firings
from writesae_study.experiment.conditions import Scale
from writesae_study.experiment.evaluation import Result
from writesae_study.head.baselines import BASELINES
from writesae_study.verdict.finding import Claim, Finding, Paired, with_interval
from writesae_study.verdict.names import NAMES

T, HORIZON = 18, 4
run = runner(Substitution, n_atoms=4, firings_per_atom=2, horizon=HORIZON, mean_write_sequences=2)


def nearer(result: Result, scale: str) -> Finding:
    """Claim 1 of the first choice of atom at one scale."""
    return cast(Substitution, result.evaluation).nearer(wide_firings(result), scale)


# -- planted truths


def test_the_kl_of_a_substitution_is_that_of_the_formulas(model64: HookedRecurrent, varied: Tensor) -> None:
    """Against full passes in which the atom is written in the place of the write."""
    sae = random_sae(model64)
    table = run(model64, sae, varied, scales=("coefficient",), controls=("shuffled",)).tables["firings"]
    row = table.query("condition == 'atom'").iloc[0]
    start, atom = int(row["position"]), row["activation"] * sae.W_dec[row["written_atom"]]
    both = native_and_edited(model64, varied[[row["sequence"]]], atom.view_as, start)
    native, edited = (logits[start : start + HORIZON + 1].log_softmax(-1) for logits in both)
    kl = (native.exp() * (native - edited)).sum(-1)  # sum_y p(y) log(p(y) / q(y)) at each token from the write on
    assert row["kl_window"] == pytest.approx(float(kl.mean()), rel=1e-4) and kl[0] > 1e-5


def each_write(model: HookedRecurrent, tokens: Tensor) -> SAE:
    """An atom for each position of each sequence, which fires there alone."""
    sides = [native_writes(model, row[None]) for row in tokens]
    keys, values = (torch.nn.functional.normalize(torch.cat(side), dim=1) for side in zip(*sides))
    return tied_sae(keys, values, 1)


def test_atoms_that_are_the_writes_recover_all_and_more_than_other_text(
    model64: HookedRecurrent, varied: Tensor
) -> None:
    """Each write is one of the atoms, and other sequences hold none of these writes."""
    how: Any = {"atom_choice": ("dominant",), "n_atoms": None, "firings_per_atom": 1, "scales": get_args(Scale)}
    result = run(model64, each_write(model64, varied), varied, **how)
    assert np.allclose(wide_firings(result)["cosine"], 1)
    for scale in get_args(Scale):
        finding = nearer(result, scale)
        assert finding.shown["atom"].mean == pytest.approx(1) and "wins 100.0%" in finding.measured
    finding = nearer(result, "matched")  # where no size stands between what points along the write and it
    assert (finding.verdict.outcome, finding.verdict.unbeaten_controls) == ("holds", ())
    free = {name: finding.shown[NAMES[name]].mean for name in BASELINES}
    assert free["head_mean"] < free["drawn"] and max(free.values()) < 0.9


# -- verdicts of made-up tables


def claims(medians: dict[str, float], **settings: Any) -> dict[int | None, Claim]:
    return {claim.number: claim for claim in made_up(medians, **settings).claims()}


@pytest.mark.parametrize(
    ("medians", "floor", "outcome", "unbeaten"),
    [
        (HOLDS, 0.0, "holds", ()),
        (FAILS, 0.0, "fails", ()),
        (CONFOUNDED, 0.0, "confounded", ("state before the write",)),
        (NO_EFFECT, 1e-12, "below the floor", ()),
        ({"delete": 1.0, "atom": 0.1, "state": 0.5}, 0.0, "holds", ()),  # a control that beats deletion, not the atom
        ({"delete": 1.0, "atom": 0.3, "state_after": 0.01}, 0.0, "holds", ()),  # a reference confounds nothing
    ],
)
def test_verdicts(medians: dict[str, float], floor: float, outcome: str, unbeaten: tuple[str, ...]) -> None:
    result = made_up(medians, floor=floor, scales=("coefficient",))
    verdict = nearer(result, "coefficient").verdict
    assert (verdict.outcome, verdict.unbeaten_controls) == (outcome, unbeaten)
    assert result.claims()[0].outcome == outcome


@pytest.mark.parametrize(
    ("medians", "expected"),
    [
        (HOLDS, {2: "holds", 3: "holds"}),
        (FAILS, {2: "fails", 3: "fails"}),
        (HOLDS | {"shuffled": 0.5}, {2: "fails"}),
        (NO_EFFECT, {2: "below the floor", 3: "below the floor"}),
        ({"delete": 1.0, "atom": 0.9, "shuffled": 1.01}, {3: "inconclusive"}),  # in order, but by chance
        (HOLDS | {"shuffled": 0.1}, {3: "confounded"}),  # another atom moves the model less
        (HOLDS | {"pair_mean": 0.1}, {3: "confounded"}),  # so does the mean write of the token pair
        (HOLDS | {"quantised": 0.1}, {3: "confounded"}),
    ],
)
def test_claims_2_and_3_are_judged_at_matched_norm_with_intervals(
    medians: dict[str, float], expected: dict[int, str]
) -> None:
    made = claims(medians, floor=1e-12)
    assert {number: made[number].outcome for number in expected} == expected


@pytest.mark.parametrize(
    ("info", "number"),
    [
        ({"rule": "Mamba-2"}, 11),
        ({"rule": "RWKV-7"}, 12),
        ({"rule": "DeltaNet"}, 13),
        ({"rule": "GLA"}, 1),
        ({"model": "Qwen/Qwen3.5-4B-Base"}, 14),
    ],
)
def test_the_claim_of_a_rule_and_of_the_larger_model(info: dict[str, str], number: int) -> None:
    result = made_up(HOLDS, scales=("matched",))
    result.info.update(info)
    assert result.claims()[0].number == number


def test_all_heads_of_a_layer() -> None:
    heads = [made_up(HOLDS if n < 3 else FAILS, head=n, seed=n, scales=("matched",)) for n in range(4)]
    ((label, claim),) = Substitution.across(heads)
    assert (label, claim.number, claim.n, claim.outcome) == ("L1 write-trained", 5, 4, "fails")
    assert Substitution.across(heads[:3])[0][1].outcome == "holds"
    assert Substitution.across(heads[:1]) == []  # one head says nothing about others
    assert Substitution.across([*heads, heads[0]]) == []  # which dictionary of that head would be a choice
    rates = [(w["atom/matched"] < w["delete"]).mean() for w in map(wide_firings, heads)]
    assert f"{100 * np.mean(rates):.1f}" in claim.measured


def test_how_much_is_the_total_and_a_typical_sequence_is_named_so() -> None:
    result = made_up(HOLDS, scales=("matched",))
    kl, finding = Paired(wide_firings(result)), result.findings()[0]
    assert finding.effect == kl.total("atom/matched")
    assert f"; {with_interval(kl.recovered('atom/matched'), percent)} in a typical sequence; " in finding.row().measured


def test_wins_are_shown_by_quartile() -> None:
    """The paper's table 13 and figure 14."""
    result = made_up(HOLDS, scales=("matched",))
    (panel,) = result.evaluation.panels(result)
    assert "Q4 of deletion's effect" in panel.svg and "Q1 of the cosine with the write" in panel.svg
