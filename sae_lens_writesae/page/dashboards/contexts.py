"""Firings with the text around them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from sae_lens_writesae.page.dashboards.config import DashboardConfig
from sae_lens_writesae.page.dashboards.data import Band, Context, TokenValue
from sae_lens_writesae.page.dashboards.token_text import TokenTexts


class Text:
    """The evaluation tokens [N,T], cut into contexts."""

    def __init__(self, tokens: NDArray[np.int64], texts: TokenTexts, config: DashboardConfig) -> None:
        self.tokens, self.texts, self.config = tokens, texts, config

    def context(self, row: Any, activations: NDArray[np.float64]) -> Context:
        """The context of one firing; `activations` [T] are those of its atom on its sequence."""
        first = max(0, row.position - self.config.before)
        shown = slice(first, row.position + self.config.after + 1)
        return Context(
            sequence=int(row.sequence),
            position=int(row.position),
            first=int(first),
            tokens=self.texts.many(self.tokens[row.sequence, shown]),
            activations=[_short(value) for value in activations[shown]],
            cosine=None if np.isnan(row.cosine) else _short(row.cosine),
        )

    def contexts(self, rows: pd.DataFrame, own: pd.DataFrame) -> list[Context]:
        """One for each of `rows`; `own` has all firings of the atom."""
        dense = np.zeros(self.tokens.shape)
        dense[own["sequence"].to_numpy(), own["position"].to_numpy()] = own["activation"].to_numpy()
        each: Any = rows.itertuples(index=False)
        return [self.context(row, dense[row.sequence]) for row in each]

    def top(self, own: pd.DataFrame) -> list[Context]:
        """Largest activations first; firings that a context already shows are passed over."""
        chosen = []
        shown: set[tuple[int, int]] = set()
        ordered: Any = own.sort_values("activation", ascending=False, kind="stable")
        for index, row in zip(ordered.index, ordered.itertuples(index=False)):
            if (row.sequence, row.position) in shown:
                continue
            chosen.append(index)
            around = range(row.position - self.config.before, row.position + self.config.after + 1)
            shown |= {(row.sequence, position) for position in around}
            if len(chosen) == self.config.top:
                break
        return self.contexts(own.loc[chosen], own)

    def bands(self, own: pd.DataFrame) -> Iterator[Band]:
        """Random contexts from equal shares of the firings, strongest share first."""
        if not self.config.per_band:
            return
        ordered: Any = own.sort_values("activation", kind="stable")
        rng = np.random.default_rng([self.config.seed, int(ordered["atom"].iloc[0])])
        edges = np.linspace(0, len(ordered), self.config.bands + 1).astype(int)
        for b in reversed(range(self.config.bands)):
            part = ordered.iloc[edges[b] : edges[b + 1]]
            if part.empty:
                continue
            drawn = part.iloc[np.sort(rng.choice(len(part), min(self.config.per_band, len(part)), replace=False))[::-1]]
            low, high = (_short(value) for value in (part["activation"].min(), part["activation"].max()))
            share = (b / self.config.bands, (b + 1) / self.config.bands)
            yield Band(*share, low, high, self.contexts(drawn, own))

    def fires_on(self, own: pd.DataFrame) -> list[TokenValue]:
        """The tokens of most firings, with their share of the firings."""
        fired = self.tokens[own["sequence"].to_numpy(), own["position"].to_numpy()]
        ids, counts = np.unique(fired, return_counts=True)
        order = np.argsort(-counts, kind="stable")[: self.config.n_tokens]
        return [
            TokenValue(int(ids[i]), self.texts(int(ids[i])), _short(counts[i] / len(own)), int(counts[i]))
            for i in order
        ]


def _short(value: Any) -> float:
    """Four significant digits, which is what a reader can use and keeps files small."""
    return float(f"{float(value):.4g}")
