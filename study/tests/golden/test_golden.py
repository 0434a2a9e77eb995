"""Every evaluation still gives the tables that were kept before it was rebuilt.

The files in `tables/` were made by `golden.make`. Names, integers, strings and truth values must agree exactly, floats
within `tolerance`. The order of rows means nothing: they are named by the columns in `cases.KEYS`.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from golden.cases import (
    CASES,
    KEYS,
    KL_ROUNDING,
    LOGIT_ROUNDING,
    ROUNDED,
    SCORE_ROUNDING,
    SIZE_ROUNDING,
    Case,
)
from golden.make import FIRST, load, result_of
from numpy.typing import NDArray

RELATIVE, ABSOLUTE = 1e-5, 1e-9
BATCHED = 1e-5
"""A device takes many sequences in a pass, whose float32 sums are rounded differently (largest seen: 3e-6)."""


def tolerance(values: NDArray[np.float64], rounding: str) -> NDArray[np.float64]:
    """How far a float may be from `values`; `rounding` is "kl", "logit", "score", or "" for what no logits enter."""
    size = np.abs(values)
    more = {
        "": SIZE_ROUNDING * float(np.nanmax(size, initial=0.0)),
        "kl": KL_ROUNDING * np.sqrt(size),
        "logit": LOGIT_ROUNDING,
        "score": SCORE_ROUNDING * np.maximum(1, size),
    }
    return ABSOLUTE + RELATIVE * size + more[rounding]


def as_dtype(strings: pd.Series, like: pd.Series) -> pd.Series:
    """Strings of a file as the kind of values in `like`; an empty string is a missing float."""
    if like.dtype.kind == "f":
        return strings.replace("", "nan").astype(float)
    if like.dtype.kind == "b":
        return strings.map({"True": True, "False": False})
    return strings.astype(like.dtype if like.dtype.kind in "iu" else str)


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=case.name, marks=[] if case.name in FIRST.values() else pytest.mark.slow) for case in CASES],
)
def test_tables_are_what_they_were(case: Case) -> None:
    # Torch 2.8 rounds float32 sums differently, and an SVD of close singular values magnifies that: 5e-6 in a cosine.
    assert_kept(case, result_of(case.name).tables, BATCHED if torch.__version__.startswith("2.8.") else 0.0)


@pytest.mark.slow
@pytest.mark.parametrize("name", FIRST.values())
def test_tables_are_the_same_on_a_device(name: str) -> None:
    (case,) = (case for case in CASES if case.name == name)
    assert_kept(case, result_of(name, on_device=True).tables, BATCHED)


def assert_kept(case: Case, measured: dict[str, pd.DataFrame], more: float = 0.0) -> None:
    """Raise where a table differs from the one that was kept by more than its rounding, and `more` times 1 + 10 x."""
    for name, kept in load(case.name).items():
        keys, rounding = list(KEYS[case.kind, name]), ROUNDED.get((case.kind, name), {})
        fresh = measured[name].sort_values(keys, ignore_index=True)
        golden = pd.DataFrame({column: as_dtype(kept[column], fresh[column]) for column in kept})
        golden = golden.sort_values(keys, ignore_index=True)
        assert len(golden) == len(fresh) and not fresh.duplicated(keys).any()
        for column in golden:
            old, new, how = golden[column].to_numpy(), fresh[column].to_numpy(), rounding.get(str(column), "")
            if fresh[column].dtype.kind == "f":
                room = tolerance(old, how) + more * (1 + 10 * np.abs(old))
                far = ~(np.abs(new - old) <= room) & ~(np.isnan(old) & np.isnan(new))
            else:
                far = old != new
            assert not far.any(), f"{name}.{column}:\n{fresh[far][[*keys, column]]}\nwas {old[far]}"
