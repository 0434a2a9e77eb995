"""The route of a firing through the study, traced as those of the product are."""

from __future__ import annotations

import torch
from saes import random_sae
from test_routes import assert_route

from hookpoints import HookedRecurrent
from writesae_study.evaluations.substitution import Substitution


def test_a_firing_reaches_the_report_by_sixty(model: HookedRecurrent) -> None:
    tokens = torch.randint(1, 60, (12, 24), generator=torch.Generator().manual_seed(0))
    test = Substitution(n_atoms=2, firings_per_atom=2, controls=("random",))

    def answered() -> list[object]:
        return [*test.run(model, random_sae(model), tokens).claims()]

    assert_route(
        answered,
        60,
        "study/writesae_study/experiment/evaluation.py",
        "study/writesae_study/evaluations/substitution.py",
        "writesae/experiment/lab.py",
        "study/writesae_study/verdict/finding.py",
        "study/writesae_study/verdict/judge.py",
    )
