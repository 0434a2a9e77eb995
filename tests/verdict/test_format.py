"""Numbers as a reader sees them."""

from __future__ import annotations

from writesae.verdict import format as fmt


def test_how_numbers_are_written() -> None:
    assert fmt.percent(0.8725) == "87.2%" and fmt.percent(float("nan")) == "–"
    written = {0: "0", 1.2345: "1.23", 0.0123: "0.0123", 3.2e-13: "3.2·10⁻¹³", 12345: "1.23e+04"}
    assert {x: fmt.number(x) for x in written} == written
