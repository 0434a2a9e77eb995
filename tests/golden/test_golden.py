"""Every evaluation still gives the tables that were kept before it was rebuilt.

The files in `tables/` were made by `golden.make`. Names, integers, strings and truth values must agree exactly, floats
within `tolerance`. The order of rows means nothing: they are named by the columns in `cases.KEYS`.
"""

from __future__ import annotations

import os
from typing import cast

import numpy as np
import pandas as pd
import pytest
from golden.cases import (
    CASES,
    CHANGED,
    KEYS,
    KL_ROUNDING,
    LOGIT_ROUNDING,
    RENAMED,
    RENAMED_VALUES,
    ROUNDED,
    SCORE_ROUNDING,
    SIZE_ROUNDING,
    Case,
)
from golden.make import digest, load, tables_of
from numpy.typing import NDArray

RELATIVE, ABSOLUTE = 1e-5, 1e-9
STRICT = os.environ.get("GOLDEN_STRICT") == "1"


def tolerance(values: NDArray[np.float64], rounding: str) -> NDArray[np.float64]:
    """How far a float may be from `values`; `rounding` is "kl", "logit", "score", or "" for what no logits
    enter."""
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


def kept_rows(table: pd.DataFrame, kind: str, name: str) -> pd.DataFrame:
    """The rows and words that are compared, sorted by what names them."""
    if (kind, name) in CHANGED:
        column, values, _ = CHANGED[kind, name]
        table = table[~table[column].isin(values)]
    for (of_kind, of_table, column), words in RENAMED_VALUES.items():
        if (of_kind, of_table) == (kind, name):
            table = table.copy()
            table[column] = table[column].replace(words)
    renamed = RENAMED.get((kind, name), {})
    keys = [renamed.get(key, key) for key in KEYS[kind, name]]
    assert not table.duplicated(keys).any(), f"rows of {name} are not named by {keys}"
    return table.sort_values(keys).reset_index(drop=True)


def differences(kind: str, name: str, golden: pd.DataFrame, fresh: pd.DataFrame, strict: bool = STRICT) -> list[str]:
    """What is not the same in a table, one line a column. `golden` has strings, as `make.load` gives them."""
    golden = golden.rename(columns=RENAMED.get((kind, name), {}))
    if missing := [column for column in golden if column not in fresh]:
        return [f"{name} lacks the columns {missing}"]
    golden = pd.DataFrame({column: as_dtype(golden[column], fresh[column]) for column in golden})
    golden, fresh = kept_rows(golden, kind, name), kept_rows(fresh, kind, name)
    if len(golden) != len(fresh):
        return [f"{name} has {len(fresh)} rows, had {len(golden)}"]
    rounding = {} if strict else ROUNDED.get((kind, name), {})
    rounding = {RENAMED.get((kind, name), {}).get(column, column): how for column, how in rounding.items()}
    lines = []
    for column in golden:
        old, new = golden[column].to_numpy(), fresh[column].to_numpy()
        if fresh[column].dtype.kind == "f":
            gap = np.abs(new - old)
            wrong = ~(gap <= tolerance(old, rounding.get(str(column), ""))) & ~(np.isnan(old) & np.isnan(new))
        else:
            wrong = old != new
        if wrong.any():
            row = int(np.flatnonzero(wrong)[0])
            where = fresh.loc[row, list(KEYS[kind, name])].to_dict() if not RENAMED.get((kind, name)) else row
            lines.append(
                f"{name}.{column}: {wrong.sum()} of {len(wrong)}, first {new[row]!r}, was {old[row]!r} at {where}"
            )
    return lines


FIRST = {case.kind: case for case in reversed(CASES)}
"""One case of each evaluation, which runs with the fast tests."""


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=case.name, marks=[] if case is FIRST[case.kind] else pytest.mark.slow) for case in CASES],
)
def test_tables_are_what_they_were(case: Case) -> None:
    golden, fresh = load(case), tables_of(case)
    assert set(golden) <= set(fresh), f"tables are gone: {sorted(set(golden) - set(fresh))}"
    lines = [line for name in golden for line in differences(case.kind, name, golden[name], fresh[name])]
    assert not lines, "\n".join([case.name, *lines])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["substitution", "erasure", "passage", "readers", "seeds"])
def test_a_second_run_gives_the_same_bits(name: str) -> None:
    case = next(case for case in CASES if case.name == name)
    assert digest(tables_of(case)) == digest(tables_of(case))


def test_the_comparison_sees_a_change() -> None:
    """In each column of each kind of table; otherwise the tests above could not fail."""
    seen = set()
    for case in CASES:
        for name, golden in load(case).items():
            if (case.kind, name) in seen or golden.empty:
                continue
            seen.add((case.kind, name))
            fresh = golden.apply(lambda column: pd.to_numeric(column) if _numeric(column) else column)
            assert differences(case.kind, name, golden, fresh) == []
            row = kept_rows(fresh.assign(at=fresh.index), case.kind, name)["at"].iloc[-1]
            for column in set(golden) - set(KEYS[case.kind, name]):
                changed, value = fresh.copy(), fresh.loc[row, column]
                moved = (
                    cast(float, value) + 0.05 * (1 + abs(cast(float, value)))
                    if _numeric(golden[column])
                    else f"{value}?"
                )
                changed[column] = changed[column].astype(float if _numeric(golden[column]) else object)
                changed.loc[row, column] = 1.0 if pd.isna(moved) else moved
                assert differences(case.kind, name, golden, changed), f"{case.name} {name}.{column}"
    assert seen == set(KEYS)


def _numeric(column: pd.Series) -> bool:
    return bool(pd.to_numeric(column.replace("", "nan"), errors="coerce").notna()[column != ""].all())
