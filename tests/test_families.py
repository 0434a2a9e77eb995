"""docs/families.md says what the code has: every rule and model type, with its state, rank, erase, decay and hooks; and
its errors, which are measured, keep within the tolerances."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from conftest import MAKERS

from hookpoints.fla import MODEL_TYPES as FLA_TYPES
from hookpoints.rules import REFUSED, REFUSED_LAYERS, RULES

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "scripts"))

from families_measure import ModelType, calls_of, facts_of, measure, model_types  # noqa: E402
from families_page import markdown  # noqa: E402
from families_table import load  # noqa: E402

FAMILIES = load(ROOT / "docs" / "families.json")
OP, LOGITS = 1e-10, 2e-5
AGAIN = "run scripts/families_table.py again"


def test_every_model_type_has_a_row():
    found = {ModelType(family.source, family.model_type) for family in FAMILIES}
    assert len(found) == len(FAMILIES) == len(MAKERS) + len(FLA_TYPES)
    assert found == set(model_types()), AGAIN


def test_every_rule_has_a_row():
    assert {rule.name for rule in RULES} <= {family.facts.rule for family in FAMILIES}, AGAIN


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: f"{family.source}-{family.model_type}")
def test_what_a_row_says_is_what_the_model_does(family):
    """Where fla is not installed, its rows are skipped."""
    assert facts_of(calls_of(ModelType(family.source, family.model_type))[0]) == family.facts, AGAIN


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: f"{family.source}-{family.model_type}")
def test_every_error_was_measured_and_is_within_the_tolerance(family):
    assert all(family.oracles())
    assert 0 < family.op_error < OP
    assert 0 < family.logits_error < LOGITS < family.largest_logit
    if family.kernels_error is not None:
        # RWKV-7's chunked kernel solves in float16: tests/hookpoints/fla/test_fla_kernels.py has the proof.
        assert family.source == "fla" and 0 < family.kernels_error < (1e-4 if family.model_type == "rwkv7" else LOGITS)


@pytest.mark.parametrize("name", ["mamba2", "qwen3_5"])
def test_measured_again_it_is_within_the_tolerance(name):
    found = measure(ModelType("transformers", name), kernels=None)
    assert found.op_error < OP and found.logits_error < LOGITS


def test_the_page_is_made_of_the_data():
    page = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    assert page == markdown(FAMILIES), f"{AGAIN}, with --page"
    assert all(f"`{name}`" in page and f" {reason} |" in page for name, reason in (REFUSED | REFUSED_LAYERS).items())
