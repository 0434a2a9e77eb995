"""What control dictionaries say of a claim: one rule, whatever the evaluation."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from made_up import FAILS, HOLDS, made_up
from sae_lens import StandardSAE, StandardSAEConfig
from sae_lens.saes.sae import SAEMetadata
from saes import HOOK, STATE, make_sae
from torch.testing import assert_close

from hookpoints import HookedRecurrent
from writesae_study.dictionary.controls import (
    ControlKind,
    against_controls,
    answers,
    control_dictionaries,
)
from writesae_study.experiment.bench import Bench
from writesae_study.experiment.evaluation import Result
from writesae_study.verdict.finding import Claim
from writesae_study.verdict.paper import Outcome

FEW = {"scales": ("matched",), "controls": ("state", "shuffled"), "n_sequences": 12}


def claim(outcome: Outcome, measured: str = "80 %") -> Claim:
    return Claim(1, "atoms do it", measured, 100, "firings", "random 50 %", outcome, "By the rule.")


@pytest.mark.parametrize(
    "trained, untrained, native, outcome",
    [
        ("holds", "holds", "fails", "confounded"),
        ("holds", "holds", "holds", "confounded"),
        ("holds", "fails", "holds", "holds"),
        ("holds", "undecided", "fails", "holds"),
        ("fails", "holds", "holds", "fails"),
        ("undecided", "holds", "fails", "undecided"),
    ],
)
def test_what_an_untrained_dictionary_reaches_is_confounded(
    trained: Outcome, untrained: Outcome, native: Outcome, outcome: Outcome
) -> None:
    controls: dict[ControlKind, Claim] = {"untrained": claim(untrained), "native writes": claim(native, "80 %; of 9")}
    judged = against_controls(claim(trained), controls)
    assert judged.outcome == outcome
    assert judged.controls.split("; ")[1:] == [  # what one measured has commas
        f"untrained dictionary ({untrained}): 80 %",
        f"dictionary of native writes ({native}): 80 %, of 9",
    ]
    assert ("native writes" in judged.sentence) == (trained == native == "holds")


def of_control(result: Result, control: ControlKind, trained: Result) -> Result:
    info = {"label": f"{trained.label}, {control}", "control": control, "control_of": trained.label}
    return replace(result, info=result.info | info)


def test_answers_are_matched_with_the_controls_of_the_same_dictionary() -> None:
    a, b = made_up(HOLDS, label="a", **FEW), made_up(HOLDS, label="b", **FEW)
    controls = [of_control(a, "untrained", a), of_control(made_up(FAILS, **FEW), "untrained", b)]
    outcomes = {(row.label, row.claim.claim): row.claim.outcome for row in answers([a, b, *controls])}
    expected: dict[tuple[str, str], str] = {}
    for claim in a.claims():
        expected["b", claim.claim] = claim.outcome
        expected["a", claim.claim] = "confounded" if claim.outcome == "holds" else claim.outcome
    assert outcomes == expected and "holds" in expected.values()  # controls give no answers of their own


def test_claims_over_several_heads_have_controls_of_their_own() -> None:
    heads = [made_up(HOLDS, head=head, **FEW) for head in (1, 2, 3)]
    layer = [row.claim for row in answers([*heads, *(of_control(r, "untrained", r) for r in heads)])]
    assert [claim.outcome for claim in layer if claim.number == 5] == ["confounded"]


def test_dictionaries_are_made_from_the_reference_text(model: HookedRecurrent) -> None:
    tokens = torch.randint(1, 64, (5, 20), generator=torch.Generator().manual_seed(2))
    other = StandardSAE(StandardSAEConfig(d_in=48, d_sae=4, metadata=SAEMetadata(hook_name=HOOK)))
    saes = {"write": make_sae(model), "state": make_sae(model, hook=STATE), "other": other}
    made = control_dictionaries(model, saes, tokens)
    assert made.keys() == {"untrained", "native writes"} and made["untrained"].keys() == {"write", "state"}
    for control in made.values():  # a seed each
        assert not torch.allclose(control["write"].W_dec, control["state"].W_dec)
    lab = Bench(model, {"": saes["write"]}, tokens)
    with torch.no_grad():
        writes = lab.native_writes(range(5))
        for label in ("write", "state"):
            cosines = Bench(model, {"": made["native writes"][label]}, tokens).atoms(range(30)).cosines(writes)
            assert_close(cosines.amax(1), torch.ones(30), rtol=0, atol=1e-4)
