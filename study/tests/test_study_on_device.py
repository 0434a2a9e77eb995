"""What the study runs on a host runs on a device as well, and gives the same. Evaluations: `golden/test_golden.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import device
import pandas as pd
import pytest
from saes import LAYER, random_sae
from test_on_device import TEXT, home, host, there

from hookpoints import HookedRecurrent
from sae_lens_writesae.sae.collecting import collect
from writesae_study.evaluations.bits import Bits
from writesae_study.evaluations.substitution import Substitution
from writesae_study.experiment.terms import Terms
from writesae_study.known.board import board

__all__ = ["home", "host", "there"]  # fixtures


def same(one: pd.DataFrame, other: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(one, other, rtol=1e-4, atol=1e-5)


def test_terms_of_a_collection(host: HookedRecurrent, there: HookedRecurrent, tmp_path: Path) -> None:
    collection = collect(
        host, TEXT.flip(1), [LAYER], None, tmp_path / "c", targets=("write",), dtype="float32", progress=False
    )
    asked: Any = {"n_atoms": 2, "firings_per_atom": 1, "horizon": 3, "mean_write_sequences": 2}
    asked["controls"] = ("mean", "token_mean", "quantised", "pca")
    tables = []
    for model in (host, there):
        terms = Terms(model, collection)
        result = Substitution(**asked).run(model, random_sae(model), TEXT, reference=terms, progress=False)
        tables.append(result.tables["firings"])
    same(tables[1], tables[0])


def test_codes_at_equal_bits(host: HookedRecurrent, there: HookedRecurrent) -> None:
    few = Bits(budgets=(32,), steps=1, tune_steps=0)  # two stages: of fewer writes than codes nothing is left
    tables = [few.run(model, random_sae(model), TEXT, progress=False).tables["codes"] for model in (host, there)]
    # Adam's first step goes by the signs of gradients, those of rounding too.
    same(*(table[~table["code"].str.contains("WriteSAE")] for table in tables))
    same(*(table.drop(columns="kl") for table in tables))


def test_the_board_of_known_models(monkeypatch: pytest.MonkeyPatch) -> None:
    with device.pretended():
        monkeypatch.setattr("hookpoints.model.loading.default_device", lambda: "npu")
        found = board("recall", 1, 64, 4, 5, brief=True)
    assert found["plain"]["kept"] == 1
