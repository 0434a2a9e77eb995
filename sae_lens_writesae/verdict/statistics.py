"""The statistics of the substitution test, each under its own name.

Everything works on plain 1-D arrays. `a` and `b` are paired unless a function says otherwise, `clusters`
holds one id per observation (sequence, atom, prompt: whatever is the independent unit), and NaN or empty
input raises `ValueError`. Tests and distributions come from scipy; what is written here are the cluster
bootstraps, permutations of clusters and Holm's rule.
"""

import itertools
import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import stats

Array = NDArray[np.float64]

#: A statistic of weighted observations: (values [N], weights [S, N]) -> [S], one number per row of weights.
WeightedStatistic = Callable[[Array, Array], Array]

_CHUNK_FLOATS = 8_000_000  # weights held at once by the bootstrap: 64 MB


class Interval(NamedTuple):
    """A two-sided confidence interval."""

    low: float
    high: float


class Bootstrap(NamedTuple):
    """A statistic and its percentile interval over resampled clusters."""

    estimate: float
    interval: Interval  # NaN where there is a single cluster: nothing can be said about others
    n: int
    n_clusters: int


class Rate(NamedTuple):
    """A share of paired observations, with an interval for independent and one for clustered ones."""

    rate: float
    successes: int
    ties: int  # count as failures
    n: int
    wilson: Interval  # takes observations as independent
    bootstrap: Interval  # resamples clusters; NaN where there is a single cluster
    n_clusters: int


class Significance(NamedTuple):
    """A test statistic and its two-sided p-value."""

    statistic: float
    p_value: float
    n: int


def wilson_interval(successes: int, n: int, level: float = 0.95) -> Interval:
    """Wilson's score interval of a share of `n` independent observations (E. B. Wilson, 1927)."""
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"a share needs 0 <= successes <= n and n >= 1, found {successes} of {n}")
    interval = stats.binomtest(int(successes), int(n)).proportion_ci(level, method="wilson")
    return Interval(float(interval.low), float(interval.high))


def weighted_mean(values: Array, weights: Array) -> Array:
    """Mean of `values` [N] under each row of `weights` [S, N]."""
    return (weights @ values) / weights.sum(axis=1)


def weighted_median(values: Array, weights: Array) -> Array:
    """Median of `values` [N] repeated `weights` [S, N] times: with whole weights exactly numpy's median."""
    order = np.argsort(values, kind="stable")
    ordered, total = values[order], np.cumsum(weights[:, order], axis=1)
    half = total[:, -1:] / 2
    low = ordered[(total < half).sum(axis=1)]  # first value that reaches half of the weight
    high = ordered[np.minimum((total <= half).sum(axis=1), len(values) - 1)]  # first that passes it
    return (low + high) / 2


def cluster_bootstrap(
    values: ArrayLike,
    clusters: ArrayLike,
    statistic: WeightedStatistic = weighted_mean,
    *,
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> Bootstrap:
    """Percentile interval of a statistic when observations of one cluster are dependent.

    Draws clusters with replacement, each with all of its observations (Davison and Hinkley, 1997, section
    3.8). A draw is a row of weights, so the whole bootstrap is a few matrix products: O(n_resamples * N)
    time, 64 MB at a time. Below about 20 clusters the percentile interval is known to be too narrow;
    `n_clusters` is returned so that a reader can see it.
    """
    x = _checked("values", values)
    codes = _cluster_codes(clusters, len(x))
    n_clusters = int(codes.max()) + 1
    estimate = float(statistic(x, np.ones((1, len(x))))[0])
    if n_clusters == 1:
        return Bootstrap(estimate, Interval(np.nan, np.nan), len(x), 1)
    draws = _cluster_draws(n_clusters, n_resamples, seed)
    if statistic is weighted_mean:  # needs no more than the sum and size of each cluster
        resampled = draws @ np.bincount(codes, x) / (draws @ np.bincount(codes))
    else:
        step = max(1, _CHUNK_FLOATS // len(x))
        chunks = [draws[i : i + step, codes].astype(float) for i in range(0, n_resamples, step)]
        resampled = np.concatenate([statistic(x, weights) for weights in chunks])
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    return Bootstrap(estimate, Interval(float(low), float(high)), len(x), n_clusters)


def difference_bootstrap(
    a: ArrayLike,
    b: ArrayLike,
    clusters_a: ArrayLike,
    clusters_b: ArrayLike,
    *,
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> Bootstrap:
    """mean(a) - mean(b) of two **independent** samples, with its percentile interval; clusters of each sample are
    resampled by themselves. `n` counts observations of both, `n_clusters` clusters of both; NaN interval where either
    sample is a single cluster."""
    samples = [(_checked("a", a), clusters_a), (_checked("b", b), clusters_b)]
    means, estimates, n_clusters = [], [], 0
    for i, (x, ids) in enumerate(samples):
        codes = _cluster_codes(ids, len(x))
        draws = _cluster_draws(int(codes.max()) + 1, n_resamples, seed + i)
        means.append(draws @ np.bincount(codes, x) / (draws @ np.bincount(codes)))
        estimates.append(x.mean())
        n_clusters += draws.shape[1]
        if draws.shape[1] == 1:
            means[-1] = np.full(n_resamples, np.nan)
    low, high = np.quantile(means[0] - means[1], [(1 - level) / 2, (1 + level) / 2])
    n = len(samples[0][0]) + len(samples[1][0])
    return Bootstrap(float(estimates[0] - estimates[1]), Interval(float(low), float(high)), n, n_clusters)


def two_way_bootstrap(
    values: ArrayLike,
    rows: ArrayLike,
    columns: ArrayLike,
    *,
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> Bootstrap:
    """Mean of observations that share two things, e.g. sequence and atom: the pigeonhole bootstrap (Owen, 2007).

    Both kinds of cluster are resampled, an observation counts as often as its row is drawn times its column. Somewhat
    too wide rather than too narrow. `n_clusters` is the smaller of the two numbers; NaN interval where that is 1.
    """
    x = _checked("values", values)
    codes = [_cluster_codes(ids, len(x)) for ids in (rows, columns)]
    sizes = [int(each.max()) + 1 for each in codes]
    if min(sizes) == 1:
        return Bootstrap(float(x.mean()), Interval(np.nan, np.nan), len(x), 1)
    draws = [_cluster_draws(size, n_resamples, seed + i) for i, size in enumerate(sizes)]
    step = max(1, _CHUNK_FLOATS // len(x))
    found = []
    for i in range(0, n_resamples, step):
        chosen = draws[0][i : i + step, codes[0]] * draws[1][i : i + step, codes[1]]
        weights: Array = chosen.astype(float)
        drawn = weights.sum(axis=1) > 0  # sparse tables can miss every cell
        found.append(weighted_mean(x, weights[drawn]))
    low, high = np.quantile(np.concatenate(found), [(1 - level) / 2, (1 + level) / 2])
    return Bootstrap(float(x.mean()), Interval(float(low), float(high)), len(x), min(sizes))


def success_rate(success: ArrayLike, clusters: ArrayLike, *, ties: int = 0, seed: int = 0) -> Rate:
    """Share of true entries of a boolean array, with Wilson and cluster-bootstrap intervals."""
    hits = _checked("success", success)
    boot = cluster_bootstrap(hits, clusters, seed=seed)
    wins = int(hits.sum())
    wilson = wilson_interval(wins, len(hits))
    return Rate(wins / len(hits), wins, ties, len(hits), wilson, boot.interval, boot.n_clusters)


def win_rate(a: ArrayLike, b: ArrayLike, clusters: ArrayLike, *, seed: int = 0) -> Rate:
    """Share of pairs with a < b strictly (for KL: `a` is closer to the native model). A tie is no win."""
    x, y = _pair(a, b)
    return success_rate(x < y, clusters, ties=int((x == y).sum()), seed=seed)


def chain_rate(*ordered: ArrayLike, clusters: ArrayLike, seed: int = 0) -> Rate:
    """Share of observations with ordered[0] < ordered[1] < ... strictly, e.g. atom < delete < random."""
    if len(ordered) < 2:
        raise ValueError(f"a chain needs at least two conditions, found {len(ordered)}")
    links = [_pair(low, high) for low, high in itertools.pairwise(ordered)]
    holds = np.logical_and.reduce([low < high for low, high in links])
    tied = np.logical_or.reduce([low == high for low, high in links])
    return success_rate(holds, clusters, ties=int(tied.sum()), seed=seed)


def paired_median_ratio(a: ArrayLike, b: ArrayLike, clusters: ArrayLike, *, seed: int = 0) -> Bootstrap:
    """Median over pairs of a / b, with its cluster-bootstrap interval. Pairs with b = 0 raise."""
    x, y = _pair(a, b)
    if (y == 0).any():
        raise ValueError(
            f"a ratio needs b != 0, found {int((y == 0).sum())} zeros among {len(y)}; drop those pairs first"
        )
    return cluster_bootstrap(x / y, clusters, weighted_median, seed=seed)


def cliffs_delta(a: ArrayLike, b: ArrayLike) -> float:
    """Cliff's delta of two **independent** samples: P(a > b) - P(a < b) over all n * m pairs (Cliff, 1993).

    -1 when every a is below every b. It ignores pairing; `paired_sign_rate` is the paired quantity that is
    often given its name.
    """
    x, y = _checked("a", a), _checked("b", b)
    u = stats.mannwhitneyu(x, y, method="asymptotic").statistic
    return float(2 * u / (len(x) * len(y)) - 1)


def paired_sign_rate(a: ArrayLike, b: ArrayLike) -> float:
    """Over pairs: share with a > b minus share with a < b. The sign convention of `cliffs_delta`, pairs only."""
    x, y = _pair(a, b)
    return float(np.sign(x - y).mean())


def paired_wilcoxon(a: ArrayLike, b: ArrayLike) -> Significance:
    """Wilcoxon's signed-rank test of paired samples (independent pairs).

    All pairs equal: statistic 0, p = 1.
    """
    x, y = _pair(a, b)
    if (x == y).all():
        return Significance(0.0, 1.0, len(x))
    result = stats.wilcoxon(x, y)
    return Significance(float(result.statistic), float(result.pvalue), len(x))  # pyright: ignore[reportAttributeAccessIssue]


def mann_whitney(a: ArrayLike, b: ArrayLike) -> Significance:
    """Mann-Whitney U of two independent samples; the statistic is the U of `a`."""
    x, y = _checked("a", a), _checked("b", b)
    result = stats.mannwhitneyu(x, y)
    return Significance(float(result.statistic), float(result.pvalue), len(x) + len(y))


def sign_flip_test(
    a: ArrayLike, b: ArrayLike, clusters: ArrayLike | None = None, *, n_resamples: int = 9999, seed: int = 0
) -> Significance:
    """Permutation test of paired samples: are differences a - b symmetric about 0? Statistic: their mean.

    With `clusters`, all differences of a cluster flip together, which keeps the level right under dependence.
    Exact where all 2^clusters sign patterns fit in `n_resamples`, else Monte Carlo with the observed pattern
    counted (p is never 0).
    """
    x, y = _pair(a, b)
    codes = np.arange(len(x)) if clusters is None else _cluster_codes(clusters, len(x))
    sums = np.bincount(codes, weights=x - y) / len(x)
    if len(sums) == 1:
        return Significance(float(sums[0]), 1.0, 1)  # one sign: nothing to permute
    signs, exact = _sign_patterns(len(sums), n_resamples, seed)
    observed = sums.sum()
    # the margin counts patterns that equal the observed one up to rounding, as scipy.stats.permutation_test does
    extreme = int((np.abs(signs @ sums) >= abs(observed) * (1 - 1e-12)).sum())
    p_value = extreme / len(signs) if exact else (extreme + 1) / (len(signs) + 1)
    return Significance(float(observed), p_value, len(sums))


def permutation_test(
    a: ArrayLike,
    b: ArrayLike,
    clusters_a: ArrayLike | None = None,
    clusters_b: ArrayLike | None = None,
    *,
    n_resamples: int = 9999,
    seed: int = 0,
) -> Significance:
    """Permutation test of two **independent** samples: are they exchangeable? Statistic: mean(a) - mean(b).

    With clusters, whole clusters change sides (a cluster lies in one sample: atoms of two kinds, say), which keeps
    the level right under dependence; the means stay those over observations. Exact where all ways to choose the
    clusters of `a` fit in `n_resamples`, else Monte Carlo with the observed way counted (p is never 0). Two-sided:
    the share of ways with an absolute difference at least as large.
    """
    x, y = _checked("a", a), _checked("b", b)
    codes_a = np.arange(len(x)) if clusters_a is None else _cluster_codes(clusters_a, len(x))
    codes_b = np.arange(len(y)) if clusters_b is None else _cluster_codes(clusters_b, len(y))
    sums = np.concatenate([np.bincount(codes_a, x), np.bincount(codes_b, y)])
    sizes = np.concatenate([np.bincount(codes_a), np.bincount(codes_b)]).astype(float)
    n_a = int(codes_a.max()) + 1
    sides, exact = _two_sides(len(sums), n_a, n_resamples, seed)
    observed = x.mean() - y.mean()
    drawn_sum, drawn_size = sides @ sums, sides @ sizes
    differences = drawn_sum / drawn_size - (sums.sum() - drawn_sum) / (sizes.sum() - drawn_size)
    extreme = int((np.abs(differences) >= abs(observed) * (1 - 1e-12) - 1e-15).sum())
    p_value = extreme / len(sides) if exact else (extreme + 1) / (len(sides) + 1)
    return Significance(float(observed), p_value, len(sums))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down adjusted p-values of a family of tests (Holm, 1979), in the order given."""
    if not p_values:
        raise ValueError("Holm's rule needs at least one p-value, found none")
    p = _checked("p_values", list(p_values.values()))
    if (p < 0).any() or (p > 1).any():
        raise ValueError(f"p-values lie in [0, 1], found {p.min()} to {p.max()}")
    order = np.argsort(p, kind="stable")
    stepped = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    adjusted = np.empty_like(stepped)
    adjusted[order] = stepped
    return dict(zip(p_values, adjusted.tolist(), strict=True))


def quartile(values: ArrayLike) -> NDArray[np.int64]:
    """Quartile 1-4 of every value among `values`, by rank;

    ties go in order of appearance, so sizes differ by at most 1.
    """
    x = _checked("values", values)
    ranks = stats.rankdata(x, method="ordinal") - 1
    return (1 + ranks * 4 // len(x)).astype(np.int64)


@lru_cache(maxsize=4)
def _cluster_draws(n_clusters: int, n_resamples: int, seed: int) -> NDArray[np.int64]:
    """How often each cluster is drawn in each resample: [n_resamples, n_clusters]. Kept, since a report asks for the
    same draws a hundred times."""
    rng = np.random.default_rng(seed)
    draws = rng.multinomial(n_clusters, np.full(n_clusters, 1 / n_clusters), size=n_resamples)
    draws.flags.writeable = False
    return draws


@lru_cache(maxsize=4)
def _sign_patterns(n: int, n_resamples: int, seed: int) -> tuple[NDArray[np.int8], bool]:
    """All 2^n rows of signs and True, or `n_resamples` random ones and False. Kept, as `_cluster_draws` are."""
    if 2**n <= n_resamples:
        return np.array(list(itertools.product((-1, 1), repeat=n)), dtype=np.int8), True
    rng = np.random.default_rng(seed)
    return rng.choice(np.array([-1, 1], dtype=np.int8), size=(n_resamples, n)), False


@lru_cache(maxsize=4)
def _two_sides(n: int, n_a: int, n_resamples: int, seed: int) -> tuple[NDArray[np.bool_], bool]:
    """Which of n clusters are in the first sample of n_a: all ways and True, or `n_resamples` random ones and False."""
    if math.comb(n, n_a) <= n_resamples:
        chosen = np.array(list(itertools.combinations(range(n), n_a)))
        exact = True
    else:
        rng = np.random.default_rng(seed)
        chosen = np.argsort(rng.random((n_resamples, n)), axis=1)[:, :n_a]
        exact = False
    sides = np.zeros((len(chosen), n), dtype=bool)
    np.put_along_axis(sides, chosen, True, axis=1)
    return sides, exact


def _checked(name: str, values: ArrayLike) -> Array:
    """A float copy of a 1-D input, or a ValueError that names what is wrong with it."""
    x = np.asarray(values, dtype=float)
    if x.ndim != 1 or x.size == 0:
        raise ValueError(f"{name} must be a non-empty 1-D array, found shape {x.shape}")
    if np.isnan(x).any():
        raise ValueError(f"{name} holds {int(np.isnan(x).sum())} NaN among {x.size} values; drop or mend them first")
    return x


def _pair(a: ArrayLike, b: ArrayLike) -> tuple[Array, Array]:
    """Two checked arrays of one length."""
    x, y = _checked("a", a), _checked("b", b)
    if len(x) != len(y):
        raise ValueError(f"paired samples need one length, found {len(x)} and {len(y)}")
    return x, y


def _cluster_codes(clusters: ArrayLike, n: int) -> NDArray[np.int64]:
    """Cluster ids of any type as 0..C-1."""
    ids = np.asarray(clusters)
    if ids.shape != (n,):
        raise ValueError(f"one cluster id per observation: {n} observations, clusters of shape {ids.shape}")
    if pd.isna(ids).any():
        raise ValueError("cluster ids hold missing values")
    codes, _ = pd.factorize(ids)
    return codes.astype(np.int64)
