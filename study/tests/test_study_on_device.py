"""What the study runs on a host runs on a device as well, and gives the same."""

from __future__ import annotations

import numpy as np
import pytest
from measured import FILE, result_of
from numpy.typing import NDArray
from test_on_device import home, host, there

__all__ = ["home", "host", "there"]  # fixtures


def tolerance(values: NDArray[np.float64], rounding: str) -> NDArray[np.float64]:
    """How far a float of the device may be from `values`; `rounding` is "kl", "logit", or "" for what no logits
    enter.

    A device takes many sequences in a pass, whose float32 sums are rounded differently (largest seen: 3e-6). Logits of
    about 10 are rounded by about 1e-6; KL is quadratic in their change, so that it moves by this times its root.
    """
    size = np.abs(values)
    more = {
        "": 1e-6 * float(np.nanmax(size, initial=0.0)),
        "kl": 1.2e-5 * np.sqrt(size),
        "logit": 3e-5,
    }
    return 1e-5 + 1.1e-4 * size + more[rounding]


@pytest.mark.nightly  # a minute or more
@pytest.mark.parametrize("kind", FILE["cases"])
def test_tables_of_an_evaluation(kind: str) -> None:
    host, there = (result_of(kind, on_device=each).tables for each in (False, True))
    for name, keys in FILE["keys"][kind].items():
        one, other = (tables[name].sort_values(keys, ignore_index=True) for tables in (host, there))
        assert len(one) == len(other) and not one.duplicated(keys).any()
        rounding = {
            column: how for how, columns in FILE["rounded"].get(kind, {}).get(name, {}).items() for column in columns
        }
        for column in one:
            old, new = one[column].to_numpy(), other[column].to_numpy()
            far = old != new
            if one[column].dtype.kind == "f":
                room = tolerance(old, rounding.get(str(column), ""))
                far = ~(np.abs(new - old) <= room) & ~(np.isnan(old) & np.isnan(new))
            assert not far.any(), f"{name}.{column}:\n{other[far][[*keys, column]]}\nwas {old[far]}"
