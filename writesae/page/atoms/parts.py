"""Parts of what pages and exports show of an atom: contexts, ends of lists of tokens, histograms."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from writesae.experiment.firings import Integers
from writesae.page.atoms import data
from writesae.page.atoms.measure import AtomFacts
from writesae.page.atoms.text import short


def _shown_contexts(facts: AtomFacts, shown: pd.DataFrame, rows: pd.DataFrame) -> list[data.Context]:
    """A context for each firing of `shown`; `rows` has all firings of the atom."""
    activations = np.zeros(facts.ids.shape)
    before = facts.settings.before
    after = facts.settings.after
    activations[rows["sequence"], rows["position"]] = rows["activation"]
    contexts = []
    for s, t, cosine in shown[["sequence", "position", "cosine"]].itertuples(index=False, name=None):
        window = slice(max(0, t - before), t + after + 1)
        tokens = facts.texts.many(facts.ids[s, window])
        values = [short(x) for x in activations[s, window]]
        shown_cosine = None if np.isnan(cosine) else short(cosine)
        contexts.append(data.Context(s, t, min(t, before), tokens, values, shown_cosine))
    return contexts


def top(facts: AtomFacts, rows: pd.DataFrame) -> list[data.Context]:
    """Largest activations first, without firings that a context already shows."""
    settings = facts.settings
    shown = np.zeros(facts.ids.shape, dtype=bool)
    ordered = rows.sort_values("activation", ascending=False, kind="stable")
    chosen = list[int]()
    for n, (s, t) in enumerate(zip(ordered["sequence"], ordered["position"])):
        if not shown[s, t] and len(chosen) < settings.top:
            chosen.append(n)
            shown[s, max(0, t - settings.before) : t + settings.after + 1] = True
    return _shown_contexts(facts, ordered.iloc[chosen], rows)


def bands(facts: AtomFacts, rows: pd.DataFrame) -> Iterator[data.Band]:
    """Random contexts from equal shares of the firings, strongest share first."""
    n_bands = facts.settings.bands
    per_band = facts.settings.per_band
    ordered = rows.sort_values("activation", kind="stable")
    rng = np.random.default_rng([facts.settings.seed, int(rows["atom"].iloc[0])])
    edges = np.linspace(0, len(ordered), n_bands + 1).astype(int)
    for b in reversed(range(n_bands)):
        band = ordered.iloc[edges[b] : edges[b + 1]]
        if len(band) and per_band:
            drawn = rng.choice(len(band), min(per_band, len(band)), replace=False)
            strongest_first = np.sort(drawn)[::-1]
            contexts = _shown_contexts(facts, band.iloc[strongest_first], rows)
            low = short(band["activation"].min())
            high = short(band["activation"].max())
            yield data.Band(b / n_bands, (b + 1) / n_bands, low, high, contexts)


def listed(facts: AtomFacts, ids: Integers, values: NDArray[np.floating], n: Integers) -> list[data.TokenValue]:
    """Tokens with their texts, a value and a count each."""
    shown = [short(value) for value in values.tolist()]
    return list(map(data.TokenValue, ids.tolist(), facts.texts.many(ids), shown, n.tolist()))


def ends(facts: AtomFacts, ids: Integers, values: NDArray[np.floating], counts: Integers) -> data.Ends:
    """The tokens with the largest and with the smallest values, the furthest out first."""
    n = min(facts.settings.n_tokens, len(ids) // 2)  # no token is at both ends
    order = np.argsort(-values, kind="stable")
    high = order[:n]
    low = order[len(order) - n :][::-1]  # not [-n:], which is everything for n = 0
    return data.Ends(
        listed(facts, ids[high], values[high], counts[high]), listed(facts, ids[low], values[low], counts[low])
    )


def vocabulary(facts: AtomFacts, values: NDArray[np.float32]) -> data.Ends:
    """All tokens of the vocabulary by `values` [vocab], without rows of W_U that pad it."""
    ids = np.arange(facts.texts.size)
    return ends(facts, ids, values[: len(ids)], np.zeros_like(ids))


def bars(values: NDArray[np.floating], low: float | None = None, high: float | None = None) -> data.Bars:
    """Shares of `values` in 32 bars from `low` (None: the smallest) to `high` (None: the largest)."""
    start = float(values.min()) if low is None else low
    stop = float(values.max()) if high is None else high
    if not stop > start:
        stop = start + 1
    counts, edges = np.histogram(values, 32, (start, stop))
    shares = counts / max(len(values), 1)
    return data.Bars([short(edge) for edge in edges.tolist()], [short(share) for share in shares.tolist()])
