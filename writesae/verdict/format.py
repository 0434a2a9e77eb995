"""How numbers are written for a reader."""

from __future__ import annotations

import math

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def percent(x: float) -> str:
    """A share in percent, one decimal; a dash for NaN. What is below -100% is not spelled out."""
    if math.isnan(x):
        return "–"
    if x < -1:  # a share of a small effect has no lower end
        return "below -100%"
    return f"{100 * x:.1f}%"


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


def signed(x: float) -> str:
    """A difference, with its sign and three significant digits."""
    return f"{x:+.3g}"


def points(x: float) -> str:
    """A difference of two shares in percentage points."""
    return f"{100 * x:+.1f}"


def r_squared(x: float) -> str:
    """Three decimals; whole numbers where a prediction is so far off that decimals say nothing."""
    return f"{x:.3f}" if abs(x) < 100 else f"{x:,.0f}"


def perplexity(nats: float) -> str:
    """A cost in nats per token as a change of perplexity."""
    return f"{100 * math.expm1(nats):+.3g}%"
