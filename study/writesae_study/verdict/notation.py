"""How differences and scores are written for a reader."""

from __future__ import annotations

import math


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
