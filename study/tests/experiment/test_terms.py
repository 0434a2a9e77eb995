"""Equal terms: baselines see the writes that the dictionary saw, in its metric."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from made_up import HOLDS, made_up
from saes import HEAD, LAYER, close, random_sae

from hookpoints import HookedRecurrent
from sae_lens_writesae.sae.collecting import collect
from sae_lens_writesae.sae.metric_fit import fit_metrics
from writesae_study.experiment.bench import Bench
from writesae_study.experiment.terms import Terms
from writesae_study.head.baselines import HeadBaselines

TEXT = torch.randint(1, 64, (6, 24), generator=torch.Generator().manual_seed(3))


def told(model: HookedRecurrent, **about: Any) -> Any:
    sae = random_sae(model)
    for name, value in ({"n_training_rows": TEXT.numel()} | about).items():
        sae.cfg.metadata[name] = value
    return sae


def test_a_collection_and_its_text_are_the_same_terms(model: HookedRecurrent, tmp_path: Path) -> None:
    collection = collect(model, TEXT, [LAYER], [HEAD], tmp_path / "collection", dtype="float32")
    read, run = Terms(model, collection), Terms(model, TEXT)
    close(read.writes(LAYER, HEAD).dense(), run.writes(LAYER, HEAD).dense(), 1e-5)
    assert read.contexts.tolist() == run.contexts.tolist()


def test_baselines_are_those_of_the_dictionary_s_metric(model64: HookedRecurrent, varied: torch.Tensor) -> None:
    lab = Bench(model64, {"": told(model64, metric="gauss_newton", metric_sequences=4, metric_damping=0.1)}, varied[:1])
    lab.reference = Terms(model64, TEXT)
    metric = fit_metrics(model64, TEXT[:4], [(LAYER, HEAD)], damping=0.1)[LAYER, HEAD]
    moved = metric.move(lab.reference.writes(LAYER, HEAD))
    by_hand = HeadBaselines.fit(moved, lab.reference.contexts, rng=lab.rng(41, 0), n_codes=12)
    native, tokens = lab.native_writes([0]), Terms(model64, varied[:1]).contexts
    for name in ("quantised", "drawn", "pair_mean"):
        written = lab.baselines(0).written(name, native, tokens)
        close(metric.move(written).dense(), by_hand.written(name, metric.move(native), tokens).dense())


@pytest.mark.parametrize(
    ("about", "equal"),
    [
        ({}, True),
        ({"n_training_rows": 12}, True),
        ({"n_training_rows": TEXT.numel() + 1}, False),
        ({"n_training_rows": None}, False),
        ({"metric_sequences": 7}, False),
    ],
)
def test_a_dictionary_that_saw_more_than_its_baselines_does_not_hold(
    model: HookedRecurrent, about: dict[str, Any], equal: bool
) -> None:
    why, result = Terms(model, TEXT).unequal(told(model, **about)), made_up(HOLDS, controls=("drawn",))
    claim = replace(result, info=result.info | {"unequal": why}).claims()[0]
    assert (why == "", claim.outcome) == (equal, "holds" if equal else "undecided") and why in claim.sentence
