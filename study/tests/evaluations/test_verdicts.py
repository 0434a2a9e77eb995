"""Outcomes of claims by rules of one evaluation, on tables of known answer. The shared rules: `verdict/test_judge.py`;
that each claim holds on an effect, and not on its null or on a few units: `test_nulls.py`."""

from __future__ import annotations

from functools import partial as of
from typing import Any

import numpy as np
import pytest
from made_up import logit_cells as cells
from test_amplify import counted
from test_baselines import made_up as compared
from test_erasure import sampled as erased
from test_install import shares
from test_logit_change import made_result as predicted
from test_multistep import known
from test_partition import made as aligned
from test_partition import normal, same
from test_passage import sampled as passages
from test_seeds import HIGH, LOW
from test_seeds import made as seeded
from test_sign import linear

SKEWED = 0.1 * np.random.default_rng(0).gamma(2, 1, 300)
TWO = np.concatenate([normal(0, 0.01, 150), normal(0.4, 0.05, 150)])
TWO_SHUFFLED = np.concatenate([normal(0, 0.01, 150, 5), normal(0.4, 0.05, 150, 6)])
TWO_BELOW = np.concatenate([normal(-0.4, 0.01, 150), normal(-0.2, 0.01, 150)])
JUMPING = np.random.default_rng(1).normal(size=320)
"""What an eps-free change does: no scale per cell helps."""

_ITSELF = {("", "zero"): 1e-9, ("", "itself"): 1e-8}


@pytest.mark.parametrize(
    ("make", "outcomes"),
    [
        # amplify
        (of(counted, -2.0), {0: "holds"}),  # either direction moves the token
        (of(counted, -2.0, other=-4.0), {0: "confounded"}),  # a control that moves it further
        # baselines
        # As in the paper, any direction is as selective.
        (of(compared), {0: "holds", 1: "holds", 2: "holds", 3: "holds", 4: "fails", 5: "fails"}),
        (of(compared, {("flat", "atom svd"): 0.01}, n_sequences=40), {0: "fails", 1: "holds", 2: "holds"}),
        (of(compared, {("flat", "svd"): 0.2}), {0: "holds", 1: "fails", 2: "holds"}),  # neither is ahead
        (of(compared, {("", "state"): 0.01}), {0: "confounded", 1: "confounded", 2: "confounded"}),
        (of(compared, {("", "pca 4"): 0.01}), {0: "holds", 1: "confounded", 2: "confounded"}),
        (of(compared, small=500), {2: "not tested"}),  # its rival has fewer parameters
        (of(compared, drop=("flat",)), {0: "not tested", 1: "not tested", 2: "holds", 4: "not tested"}),
        (of(compared, drop=("ours",)), {0: "not tested", 3: "not tested", 4: "not tested", 5: "not tested"}),
        (of(compared, nats={("two", "dictionary"): 0.0105}), {3: "holds"}),  # 0.05% more does not matter
        (of(compared, nats={("", "mean"): 0.005}), {3: "confounded"}),
        (of(compared, nats=_ITSELF), {3: "below the floor"}),
        (of(compared, dead={"flat": 300}), {4: "confounded"}),  # so does the dense encoder
        # erasure
        (of(erased, effect=-0.1, random=-0.15), {0: "confounded"}),
        (of(erased, effect=0.1), {0: "fails", 1: "fails"}),  # put in: as in the paper
        (of(erased, {"wrong": 0.1}, effect=-0.1), {1: "confounded"}),
        # install
        (of(shares, 0.5, 0.5, 0.0), {0: "confounded"}),
        # Ranks that improve, against a random direction.
        (of(shares, 0.9, 0.9, 0.0), {-1: "confounded"}),
        # logit_change
        (of(predicted, cells()), {0: "confounded", 1: "fails", 2: "holds"}),
        (of(predicted, cells(first=1, noise=0.1)), {0: "holds", 1: "holds", 2: "holds"}),
        (of(predicted, cells(curve=10.0)), {0: "confounded", 1: "fails", 2: "fails"}),
        (of(predicted, cells().assign(measured=JUMPING)), dict.fromkeys(range(3), "fails")),
        # Last: the numbers of the rebuttal, with a scale from other sequences (claim 22, and of Mamba-2 claim 23).
        (of(predicted, cells(first=2.0, noise=0.1)), {-1: "holds"}),  # a factor of 2 is what a scale is for
        (of(predicted, cells(first=0.3, noise=1.0), rule="Mamba-2"), {-2: "fails", -1: "fails"}),  # F0 is noise
        (of(predicted, cells().assign(F1=lambda t: 3 * t["measured"]), rule="Mamba-2"), {-2: "fails", -1: "holds"}),
        (
            of(predicted, cells(first=1.0, noise=0).assign(shuffled=lambda t: t["F2"]), rule="Mamba-2"),
            {-2: "confounded"},
        ),
        # multistep
        (of(known, {"atom": 0.2, "delete": 1.0, "mean": 0.5, "state_after": 0.1}), {0: "holds"}),
        (of(known, {"atom": 0.2, "delete": 1.0, "mean": 0.1, "state_after": 0.1}), {0: "confounded"}),
        # Any write is small here, so that atoms show nothing.
        (of(known, {"atom": 0.02, "delete": 0.03}), {1: "confounded"}),
        (of(known, {"atom": 0.3, "delete": 0.2}), {1: "fails"}),
        # partition
        (of(aligned, TWO, normal(0, 0.01, 300, 3)), {0: "holds"}),
        (of(aligned, SKEWED, normal(0, 0.01, 300)), {0: "fails"}),  # one kind, skewed
        (of(aligned, TWO, TWO_SHUFFLED), {0: "confounded"}),
        (of(aligned, TWO_BELOW, normal(0, 0.001, 300)), {0: "confounded"}),  # as many registers at random
        (of(aligned, np.full(300, 0.3), normal(0, 0.01, 300)), {0: "not tested"}),  # all are alike
        (of(aligned, normal(0.3, 0.1, 12), normal(0, 0.1, 12)), dict.fromkeys(range(4), "not tested")),
        # Random directions point nearer.
        (of(aligned, normal(-0.1, 0.02, 100), normal(-0.3, 0.02, 100, 1)), {1: "confounded"}),
        # Random atoms do, where they fire.
        (of(aligned, normal(0.07, 0.02, 100), normal(0, 0.02, 100, 1), 0.07), {1: "confounded"}),
        (of(aligned, normal(0.4, 0.03, 60), normal(0, 0.01, 60), pca=0.4), {3: "fails"}),
        # Sameness needs an interval within the margin.
        (of(same, -0.05, 0.08), {2: "holds"}),
        (of(same, -0.2, 0.15), {2: "inconclusive"}),
        (of(same, 0.12, 0.3), {2: "fails"}),
        # passage
        (of(passages, deleted=0.01, random=0.2, removed=0.01), {0: "confounded"}),
        (of(passages, deleted=0.3, random=0.2, removed=0.01), {0: "fails"}),
        # seeds
        (of(seeded, [100, 50], HIGH, LOW, LOW), {0: "fails"}),  # counts vary
        (of(seeded, [100, 99], HIGH + 0.25, LOW, LOW), {0: "fails"}),  # atoms are the same
        (of(seeded, [100, 99], LOW, LOW, LOW), {0: "inconclusive"}),
        (of(seeded, [100, 99], LOW + 0.03, LOW, LOW), {0: "inconclusive"}),  # as random atoms that fire
        # sign
        (of(linear, 0.8, 0.8), {0: "confounded"}),
        (of(linear, 1.0, 0.5, flip=-1), {0: "fails"}),
    ],
)
def test_outcomes(make: Any, outcomes: dict[int, str]) -> None:
    claims = make().claims()
    assert {i: claims[i].outcome for i in outcomes} == outcomes
    assert all(claim.n > 0 and "nan" not in claim.measured for claim in claims if claim.outcome != "not tested")
