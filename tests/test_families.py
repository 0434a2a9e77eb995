"""docs/families.md says what the rules say of every model type, and its errors are within the tolerances."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from tiny_models import MAKERS
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from hookpoints.fla import MODEL_TYPES as FLA_TYPES
from hookpoints.rules.refused import NOT_HOOKED

sys.path.append(str(Path(__file__).parents[1] / "tools"))

import families

ROWS = json.loads(families.DATA.read_text(encoding="utf-8"))
OP, LOGITS = 1e-10, 2e-5
FACTS = ("rule", "rank", "decay", "sizes", "op_oracle")
OURS = [row for row in ROWS if row["source"] == "transformers"]


def test_every_model_type_has_a_row_and_the_page_has_every_row():
    not_installed = {row["model_type"] for row in OURS} - CONFIG_MAPPING_NAMES.keys() - MAKERS.keys()
    rows = [row for row in ROWS if row not in OURS or row["model_type"] not in not_installed]
    names = [(row["source"] == "fla", row["model_type"]) for row in rows]
    assert names == sorted(
        [(False, name) for name in MAKERS] + [(True, name) for name in FLA_TYPES - NOT_HOOKED.keys()]
    )
    assert families.PAGE.read_text(encoding="utf-8") == families.page(ROWS)


@pytest.mark.parametrize("row", OURS, ids=lambda row: row["model_type"])
def test_measured_again_a_family_is_what_its_row_says(row):
    found = families.measured(row["model_type"])
    assert [found[name] for name in FACTS] == [row[name] for name in FACTS]
    assert found["op_error"] < OP and found["logits_error"] < LOGITS < found["largest_logit"]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['source']}-{row['model_type']}")
def test_every_error_is_within_the_tolerance(row):
    assert 0 < row["op_error"] < OP and 0 < row["logits_error"] < LOGITS < row["largest_logit"]
    if row["kernels_error"]:
        # RWKV-7's chunked kernel solves in float16: tools/oracles/test_fla_kernels.py has the proof.
        assert row["source"] == "fla" and row["kernels_error"] < (1e-4 if row["model_type"] == "rwkv7" else LOGITS)
