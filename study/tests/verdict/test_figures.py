"""Figures of small results."""

from writesae.dictionary.estimates import Estimate
from writesae_study.verdict import figures


def test_marks_say_their_numbers_and_names_stay_text() -> None:
    name = '<script>alert("&")</script>'
    svg = figures.intervals([figures.Row(name, Estimate(0.5, 0.25, 0.75, 9, 3))], "share", "one row")
    assert svg.count('<title>&lt;script&gt;alert("&amp;")&lt;/script&gt;: 0.5 [0.25, 0.75]</title>') == 2
    assert "<script" not in svg and "hover:" not in svg
