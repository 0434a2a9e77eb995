"""Whether there is enough data to judge a claim at all."""

import math

MIN_CLUSTERS = 5
"""Independent units below which no verdict is given."""
MIN_OBSERVATIONS = 20
"""Observations below which no verdict is given."""
RELEVANT_RATE = 0.6
"""A win rate from which on an advantage over chance (1/2) matters."""

NO_DATA = "There are too few observations, or they spread too widely, to tell chance from a relevant effect."
"""The sentence of an inconclusive verdict."""


def too_little(
    n: int, n_clusters: int, low: float = 0.0, high: float = 0.0, *, chance: float = 0.0, relevant: float | None = None
) -> bool:
    """Whether a measurement is inconclusive: fewer than 5 clusters or 20 observations, no interval (NaN), or, where
    `relevant` is given, an interval [low, high] that contains both chance and an effect of the relevant size. A measure
    without a unit of its own has no `relevant`, and then only the amount of data is judged."""
    if n < MIN_OBSERVATIONS or n_clusters < MIN_CLUSTERS or math.isnan(low) or math.isnan(high):
        return True
    return relevant is not None and all(low <= value <= high for value in (chance, relevant))


def too_few_wins(n: int, n_clusters: int, low: float, high: float) -> bool:
    """`too_little` of a win rate, whose chance is 1/2."""
    return too_little(n, n_clusters, low, high, chance=0.5, relevant=RELEVANT_RATE)
