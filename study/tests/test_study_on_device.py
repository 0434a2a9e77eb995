"""What the study runs on a host runs on a device as well, and gives the same."""

from __future__ import annotations

import pandas as pd
import pytest
from measured import FILE, result_of
from test_on_device import home, host, there

__all__ = ["home", "host", "there"]  # fixtures


@pytest.mark.nightly  # a minute or more
@pytest.mark.parametrize("kind", FILE["cases"])
def test_tables_of_an_evaluation(kind: str) -> None:
    """A device takes many sequences in a pass, whose float32 sums are rounded differently (largest seen: 3e-6)."""
    host, there = (result_of(kind, on_device=each).tables for each in (False, True))
    for name, keys in FILE["keys"][kind].items():
        one, other = (tables[name].sort_values(keys, ignore_index=True) for tables in (host, there))
        assert not one.duplicated(keys).any()
        pd.testing.assert_frame_equal(other, one, rtol=2e-4, atol=5e-5)
