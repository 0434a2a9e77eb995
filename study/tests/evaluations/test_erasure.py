"""Erasure against full passes with the write changed by hand, on dictionaries with a known code; its verdicts."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
import torch
from made_up import runner
from sae_lens import SAE
from saes import native_and_edited
from torch import Tensor

from hookpoints import HookedRecurrent
from writesae_study.evaluations.erasure import Erasure
from writesae_study.experiment.evaluation import Result

run = runner(Erasure, **{"n_atoms": 3, "select_firings": 4, "test_firings": 3, "min_firings": 2, "horizon": 3})


def test_an_atom_is_erased_where_it_fires_and_elsewhere_its_norm_is_taken_or_it_is_put_in(
    model64: HookedRecurrent, equal_rows: Tensor, planted: SAE
) -> None:
    """All sequences are equal, so that the median activation is that of each firing."""
    result = run(model64, planted, equal_rows)
    row = result.tables["firings"].iloc[0]
    token = int(result.tables["atoms"].set_index("atom")["token"][row["atom"]])
    there, atom = int(row["elsewhere_position"]), planted.W_dec[int(row["atom"])].detach().double()
    assert there != row["position"]
    doses = result.tables["doses"].query("atom == @row.atom and sequence == @row.sequence and position == @there")

    def moved(at: int, change: Callable[[Tensor], Tensor]) -> float:
        both = native_and_edited(model64, equal_rows[:1], change, at)
        native, edited = (logits.log_softmax(-1)[at : at + 4, token].mean() for logits in both)
        return float(edited - native)

    erased = moved(int(row["position"]), lambda write: write - row["activation"] * atom.view_as(write))
    taken = moved(there, lambda write: write - row["activation"] * write / torch.linalg.matrix_norm(write))
    put_in = moved(there, lambda write: write + 4 * row["activation"] * atom.view_as(write))
    assert [row["effect"], row["elsewhere"]] == pytest.approx([erased, taken], rel=1e-4)
    assert doses.set_index("dose")["effect"][4.0] == pytest.approx(put_in, rel=1e-4)


N = np.arange(128)
UNITS = pd.DataFrame({"atom": N % 8, "sequence": N // 8, "position": N, "activation": 1.0})
NOISE = 1 + 0.02 * np.random.default_rng(3).standard_normal(128)


def sampled(doses: dict[str, float] | None = None, **means: float) -> Result:
    """Firings of eight atoms in 16 sequences; put in, atoms do the opposite, or as `doses` say, for each dose."""
    erased = {"effect": 0.0, "elsewhere": 0.0, "random": 0.0, "wrong": 0.0} | means
    put_in = {"effect": -erased["effect"], "random": 0.0, "wrong": 0.0} | (doses or {})
    parts = [UNITS.assign(dose=m, **{name: m * mean * NOISE for name, mean in put_in.items()}) for m in (1.0, 2.0, 4.0)]
    atoms = pd.DataFrame({"atom": range(8), "token": 1, "text": "a", "n_select": 8, "selected": 2 * erased["effect"]})
    firings = UNITS.assign(**{name: mean * NOISE for name, mean in erased.items()})
    tables = {"atoms": atoms, "firings": firings, "doses": pd.concat(parts, ignore_index=True)}
    return Result(Erasure(), {"label": "x", "floor": 1e-5}, tables)
