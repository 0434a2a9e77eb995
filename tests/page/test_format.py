"""Numbers as a reader sees them."""

from __future__ import annotations

import math

from writesae.page import format as fmt
from writesae.page.template import share_text


def test_how_numbers_are_written() -> None:
    assert fmt.percent(0.8725) == "87.2%" and fmt.percent(float("nan")) == "–"
    written = {0: "0", 1.2345: "1.23", 0.0123: "0.0123", 3.2e-13: "3.2·10⁻¹³", 12345: "1.23e+04"}
    assert {x: fmt.number(x) for x in written} == written


def test_a_share_of_too_few_observations_has_no_ends() -> None:
    """A ratio of sums of a few KLs may have any interval; 24978389.2% says no more than that."""
    open_above = 249783.892
    assert fmt.interval(0.2, open_above, fmt.percent) == " [20.0%, above 10,000%]"
    assert fmt.interval(-3.0, open_above, fmt.number) == " [-3, 2.5e+05]"
    assert not fmt.interval(math.nan, math.nan, fmt.percent)
    assert share_text({"mean": 0.5, "low": -3.0, "high": open_above}) == "50.0% [not known]"
