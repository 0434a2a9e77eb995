"""What the pages show, as plain data: the pages are a view of `Dashboard`, and `data.json` is all of it."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from sae_lens_writesae.later_heads import Mixer
from sae_lens_writesae.writing import write_aside

FORMAT = 1


@dataclass(frozen=True)
class Context:
    """One firing with the text around it."""

    sequence: int
    """Row of the evaluation tokens."""
    position: int
    """Token t at which the atom fires."""
    first: int
    """Position of the first token shown."""
    tokens: list[str]
    """The tokens as they are, spaces and newlines included."""
    activations: list[float]
    """Of this atom at each of them; 0 where it is silent."""
    cosine: float | None
    """Signed cosine of the atom and the native write at the firing; None where that write is zero."""

    @property
    def at(self) -> int:
        """Index of the firing in `tokens`."""
        return self.position - self.first

    @property
    def activation(self) -> float:
        """At the firing."""
        return self.activations[self.at]


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
class Spread:
    """Quartiles of n numbers."""

    median: float
    q25: float
    q75: float
    n: int


@dataclass(frozen=True)
class TokenValue:
    """A token and a number about it."""

    token: int
    text: str
    """As it is."""
    value: float
    n: int
    """Occurrences behind the number; 0 where it comes from weights alone."""


@dataclass(frozen=True)
class Ends:
    """Both ends of a list of tokens by value, the extreme ones first."""

    high: list[TokenValue]
    low: list[TokenValue]


@dataclass(frozen=True)
class Cosines:
    """Likeness of the atom and the native writes, as matrices: <A, W_t> / |A||W_t|, signed."""

    at_firings: Spread
    firings: Bars
    """Share of the firings per bin."""
    silent: Bars
    """The same for tokens at which the atom is silent."""


@dataclass(frozen=True)
class KeySide:
    """cos(v, k_t): `tokens` has its mean over all occurrences of a token, firing or not."""

    tokens: Ends
    at_firings: Spread | None
    """None where every native write at a firing is zero."""


@dataclass(frozen=True)
class ValueSide:
    """w^T W_O^h W_U, |w| = 1, minus its mean over the vocabulary: what the value side says along the direct path.

    Norms and gate of the head, later layers and the final norm are not in it.
    """

    tokens: Ends
    at_firings: Spread | None
    """cos(w, u_t)."""


@dataclass(frozen=True)
class Effect:
    """The derivative of every logit with respect to how much of the atom is written, in logits per norm of the native
    write, minus its mean over the vocabulary; mean over t..t+horizon and over firings. All first-order paths."""

    tokens: Ends
    direct_r: float | None
    """Pearson correlation with the direct path over the vocabulary; None where one of them is constant."""
    size: float
    """Standard deviation over the vocabulary."""
    n: int
    horizon: int


@dataclass(frozen=True)
class Memory:
    """How long what the atom writes stays in the state, under decay and erase."""

    half_life: float | None
    """Tokens until half of the norm is left: median over firings (Kaplan-Meier, since sequences end). None: longer
    than `longest`."""
    longest: int
    """Longest half-life that could have been seen."""
    ended: int
    """Firings whose sequence ended, or whose limit was reached, before half was gone."""
    n: int


@dataclass(frozen=True)
class Reader:
    """A later head that reads what the atom writes."""

    layer: int
    mixer: Mixer
    head: int
    change: float
    """Of what it gives over t..t+horizon (the reads S^T q, or attention's z), relative to its norm."""
    typical: float | None
    """The same for what `Readers.typical` names, so that heads which notice anything can be told apart."""


@dataclass(frozen=True)
class Readers:
    """Later heads by how much what they give changes with the atom, the largest change first. Heads of the same layer
    and below cannot change."""

    heads: list[Reader]
    what: str
    """What `change` is a change under."""
    typical: str
    """What `typical` is."""


@dataclass(frozen=True)
class Substituted:
    """The substitution test on firings of this atom alone, at one scale (mean KL over the horizon)."""

    scale: str
    n: int
    win_rate: float
    """Share of firings at which the atom is nearer to the native model than deletion."""
    median_kl: float
    median_kl_delete: float
    best_control: str | None
    """The control that beats deletion most often."""
    best_control_rate: float | None


@dataclass(frozen=True)
class AtomPage:
    """Everything about one atom. Its sign, which a product v w^T leaves open, is such that cos(v, k_t) has a positive
    median at its firings."""

    atom: int
    rank_share: float
    """Share of the atom's squared norm in the leading term v w^T that key and value side describe; 1 for rank 1."""
    n_firings: int
    rate: float
    """Share of tokens at which it fires."""
    max_activation: float
    mean_activation: float
    fires_on: list[TokenValue]
    """Tokens at which it fires most often: share of its firings, and their number."""
    top: list[Context]
    bands: list[Band]
    positions: Bars
    """Firing rate by position."""
    cosines: Cosines | None
    """None where every native write at a firing is zero."""
    keys: KeySide
    values: ValueSide
    effect: Effect | None
    memory: Memory
    readers: Readers | None
    substitution: list[Substituted] | None


@dataclass(frozen=True)
class Dashboard:
    """The pages of one dictionary, as data."""

    info: dict[str, Any]
    """`evaluation.describe`, the settings, the text, and `omitted`: what has no page and why."""
    atoms: list[AtomPage]

    def __getitem__(self, atom: int) -> AtomPage:
        """The page of an atom, by its number. KeyError names those that have one."""
        for page in self.atoms:
            if page.atom == atom:
                return page
        raise KeyError(f"atom {atom} has no dashboard; there are {[page.atom for page in self.atoms]}")

    def save(self, path: str | Path) -> Path:
        """Write everything as JSON; written aside, then renamed."""
        content = json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, allow_nan=False, ensure_ascii=False)
        return write_aside(Path(path), lambda aside: aside.write_text(content, encoding="utf-8"))

    @classmethod
    def load(cls, path: str | Path) -> Dashboard:
        """Read what `save` wrote. ValueError for anything else."""
        file = Path(path)
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{file} is no JSON, or is cut short: {error}") from error
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            found = values.get("format") if isinstance(values, dict) else type(values).__name__
            raise ValueError(f"{file} has format {found}, this version reads dashboards of format {FORMAT}")
        try:
            return _build(cls, values)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{file} is no dashboard: {error} is missing or of another kind") from error


def _build(kind: Any, value: Any) -> Any:
    """The inverse of `dataclasses.asdict` for the classes of this file."""
    if dataclasses.is_dataclass(kind):
        hints = get_type_hints(kind)
        return kind(**{f.name: _build(hints[f.name], value[f.name]) for f in dataclasses.fields(kind)})  # type: ignore[operator]
    if get_origin(kind) is list:
        return [_build(get_args(kind)[0], each) for each in value]
    if value is not None and type(None) in get_args(kind):
        return _build(next(k for k in get_args(kind) if k is not type(None)), value)
    return value
