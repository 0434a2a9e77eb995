"""How numbers are written for a reader."""

from __future__ import annotations

import math
from collections.abc import Callable

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


MOST_SHARE = 100
"""Shares of a small effect have no end: from here on, and below -1, they are not spelled out."""


def percent(x: float) -> str:
    """A share in percent, one decimal; a dash for NaN."""
    if math.isnan(x):
        return "–"
    if x < -1:
        return "below -100%"
    if x > MOST_SHARE:
        return f"above {100 * MOST_SHARE:,}%"
    return f"{100 * x:.1f}%"


def interval(low: float, high: float, write: Callable[[float], str]) -> str:
    """ " [low, high]"; nothing for NaN. Few observations of a share may leave both ends open."""
    if math.isnan(low):
        return ""
    if write is percent and low < -1 and high > MOST_SHARE:
        return " [not known]"
    return f" [{write(low)}, {write(high)}]"


def number(x: float) -> str:
    """Three significant digits; powers of ten below 0.001; a dash for NaN."""
    if math.isnan(x):
        return "–"
    if x == 0:
        return "0"  # which has no logarithm
    if abs(x) < 1e-3:
        exponent = math.floor(math.log10(abs(x)))
        return f"{x / 10**exponent:.1f}·10{str(exponent).translate(_SUPERSCRIPT)}"
    return f"{x:.3g}"
