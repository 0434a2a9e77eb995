"""What the pages show, as plain data: the pages are a view of `AtomPagesData`, and `data.json` is all of it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from hookpoints.files import atomic_text
from writesae.files import GENERATOR, Json


@dataclass(frozen=True)
class Context:
    """One firing with the text around it."""

    sequence: int
    """Row of the evaluation tokens."""
    position: int
    """Token t at which the atom fires."""
    at: int
    """Index of the firing in `tokens`."""
    tokens: list[str]
    """The tokens as they are, spaces and newlines included."""
    values: list[float]
    """At each of them the activation of this atom, 0 where it is silent."""
    cosine: float | None = None
    """Signed cosine of the atom and the native write at the firing; None where that write is zero."""


@dataclass(frozen=True)
class Band:
    """Contexts drawn at random from one share of the firings, ordered by activation."""

    share_low: float
    share_high: float
    low: float
    """Smallest activation in the band."""
    high: float
    contexts: list[Context]


@dataclass(frozen=True)
class Bars:
    """A histogram: `values[i]` between `edges[i]` and `edges[i+1]`."""

    edges: list[float]
    values: list[float]


@dataclass(frozen=True)
class TokenValue:
    """A token and a number about it."""

    token: int
    text: str
    """The token as it is."""
    value: float
    n: int
    """Occurrences behind the number; 0 where it comes from weights alone."""


@dataclass(frozen=True)
class Ends:
    """Both ends of a list of tokens by value, the extreme ones first."""

    high: list[TokenValue]
    low: list[TokenValue]


@dataclass(frozen=True)
class AtomSide:
    """One side of the leading term v w^T of the atom."""

    tokens: Ends
    median: float | None
    """Cosine with the same side of the native write, at the firings; None where every native write there is zero."""


@dataclass(frozen=True)
class Effect:
    """The derivative of every logit with respect to how much of the atom is written, in logits per norm of the native
    write, minus its mean over the vocabulary; mean over t..t+horizon and over firings. All first-order paths."""

    tokens: Ends
    direct_r: float
    """Pearson correlation with the direct path over the vocabulary; 0 where one of them is constant."""
    n: int
    """Firings."""


@dataclass(frozen=True)
class AtomMemory:
    """How long what the atom writes stays in the state, under decay and erase."""

    half_life: float | None
    """Tokens until half of the norm is left: median over firings. None: `limit` or longer."""
    limit: int
    """Longest half-life that was looked for."""
    n: int
    """Firings that were followed, which have so many tokens after them."""


@dataclass(frozen=True)
class Term:
    """A rank-1 term size key value^T of the atom, both sides of unit length."""

    size: float
    share: float
    """Of the atom's squared norm."""
    key: list[float]
    """[K]"""
    value: list[float]
    """[V]"""


@dataclass(frozen=True)
class AtomPage:
    """Everything about one atom. Its sign, which a product v w^T leaves open, is such that cos(v, k_t) has a positive
    median at its firings."""

    atom: int
    terms: list[Term]
    """The largest singular terms of the atom. Key and value side describe the leading one."""
    n_firings: int
    rate: float
    """Share of tokens at which it fires."""
    max_activation: float
    density: Bars
    """Share of its firings by activation."""
    logits: Bars
    """Share of the vocabulary by `effect`, or along the direct path (`values`) where no effect was measured."""
    fires_on: list[TokenValue]
    """Tokens at which it fires most often: share of its firings, and their number."""
    fires_after: list[TokenValue]
    """The same for the token before. A firing at the first token of a sequence has none."""
    top: list[Context]
    """The strongest firings."""
    bands: list[Band]
    cosine: float | None
    """Signed cosine <A, W_t> / |A||W_t| of the atom and the native write, median over its firings. None where every
    native write there is zero."""
    keys: AtomSide
    """v: `tokens` has the mean of cos(v, k_t) over all occurrences of a token, firing or not."""
    values: AtomSide
    """w, along the direct path: `tokens` has w^T W_O^h W_U, |w| = 1, minus its mean over the vocabulary. Norms and gate
    of the head, later layers and the final norm are not in it."""
    effect: Effect | None
    """None where it was not measured."""
    memory: AtomMemory

    @property
    def after(self) -> bool:
        """Whether the token before says more about where it fires: the three most frequent tokens before its firings
        have a larger share than those at its firings."""
        on, after = (sum(token.value for token in tokens[:3]) for tokens in (self.fires_on, self.fires_after))
        return after > on


@dataclass(frozen=True)
class AtomPagesData:
    """The pages of one dictionary, as data."""

    info: dict[str, Json]
    """What was looked at on what (`Lab.describe`), the settings, the dictionary's `quality` (`DictionaryQuality`; None:
    not measured), and `n_skipped`: what has no page, by reason."""
    atoms: list[AtomPage]

    def save(self, path: str | Path) -> Path:
        """Write everything as JSON, whole or not at all."""
        return atomic_text(Path(path), json.dumps(GENERATOR | asdict(self), allow_nan=False))
