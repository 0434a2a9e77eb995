"""Figures of small results."""

import pandas as pd

from sae_lens_writesae.verdict import figures


def test_fewer_than_four_firings_leave_quartiles_out() -> None:
    deletion = pd.Series([0.2, 0.1])
    rows = {"atom": pd.Series([0.1, 0.05]), "delete": deletion}
    svg = figures.quartiles(rows, deletion, pd.Series([0, 1]), [], "two firings")
    assert "Q1" in svg and "Q3" in svg and "Q2" not in svg and "Q4" not in svg
