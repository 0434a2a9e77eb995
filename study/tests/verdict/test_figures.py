"""Figures of small results."""

import re
from pathlib import Path

from writesae import page
from writesae_study.verdict import figures
from writesae_study.verdict.finding import Figure


def test_marks_say_their_numbers_and_names_stay_text() -> None:
    name = '<script>alert("&")</script>'
    svg = figures.intervals([figures.Row(name, 0.5, 0.25, 0.75)], "share", "one row")
    assert svg.count('<title>&lt;script&gt;alert("&amp;")&lt;/script&gt;: 0.5 [0.25, 0.75]</title>') == 2
    assert "<script" not in svg and "hover:" not in svg


def test_colours_are_the_pages_and_those_of_its_light_side_elsewhere() -> None:
    """In a notebook nothing defines the variables."""
    light = Path(page.__file__).with_name("style.css").read_text(encoding="utf-8").split("@media")[0]
    svg = figures.intervals([figures.Row("a", 0.5, 0.25, 0.75, "atom")], "share", "a panel")
    used = dict(re.findall(r"var\(--(\w+),(#\w+)\)", svg))
    assert used["atom"] == "#1d5fd1" and used.items() <= dict(re.findall(r"--(\w+): ?(#\w+);", light)).items()
    assert svg in Figure("a panel", svg)._repr_html_()


def test_shares_are_percentages() -> None:
    svg = figures.curves([figures.Curve("a", [0, 1], [0.5, 1.0])], "step", "shares", percent=True)
    assert ">90%<" in svg
