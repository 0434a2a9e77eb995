"""What the pages show, as plain data: the pages are a view of `AtomPagesData`, and `data.json` is all of it.

A file is data from outside: unknown fields, wrong types, sizes that do not agree and numbers that are not finite are
errors, and an atom is a non-negative integer, so that no page can be written to another path.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, field_validator, model_validator

from sae_lens_writesae.files import atomic_text
from writesae.experiment.conditions import Control, Scale
from writesae.experiment.downstream_heads import Mixer

Count = Annotated[int, Field(ge=0)]
_LARGEST = 10**9
"""Bytes of a file that are read."""
Share = Annotated[float, Field(ge=0, le=1)]

_SHOWN = (
    "label model layer head rule K V architecture d_sae n_sequences n_positions n_alive n_frequent n_skipped settings "
    "quality"
)
"""Entries of `AtomPagesData.info` that the pages show."""


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Context(_Data):
    """One firing with the text around it."""

    sequence: Count
    """Row of the evaluation tokens."""
    position: Count
    """Token t at which the atom fires."""
    first: Count
    """Position of the first token shown."""
    tokens: list[str]
    """The tokens as they are, spaces and newlines included."""
    activations: list[float]
    """Activation of this atom at each of them; 0 where it is silent."""
    cosine: float | None
    """Signed cosine of the atom and the native write at the firing; None where that write is zero."""

    @model_validator(mode="after")
    def _sizes_agree(self) -> Self:
        if len(self.activations) != len(self.tokens) or not 0 <= self.at < len(self.tokens):
            raise ValueError(
                f"a context has an activation per token, and its firing among them; found {len(self.tokens)} tokens, "
                f"{len(self.activations)} activations, the firing at {self.at}"
            )
        return self

    @property
    def at(self) -> int:
        """Index of the firing in `tokens`."""
        return self.position - self.first

    @property
    def activation(self) -> float:
        """Activation at the firing."""
        return self.activations[self.at]


class Band(_Data):
    """Contexts drawn at random from one share of the firings, ordered by activation."""

    share_low: Share
    share_high: Share
    low: float
    """Smallest activation in the band."""
    high: float
    contexts: list[Context]


class Bars(_Data):
    """A histogram: `values[i]` between `edges[i]` and `edges[i+1]`."""

    edges: list[float]
    values: list[float] = Field(min_length=1)

    @model_validator(mode="after")
    def _sizes_agree(self) -> Self:
        if len(self.edges) != len(self.values) + 1:
            raise ValueError(f"{len(self.values)} bars have one edge more, found {len(self.edges)} edges")
        return self


class Quartiles(_Data):
    """Quartiles of n numbers."""

    median: float
    q25: float
    q75: float
    n: Count


class TokenValue(_Data):
    """A token and a number about it."""

    token: Count
    text: str
    """The token as it is."""
    value: float
    n: Count
    """Occurrences behind the number; 0 where it comes from weights alone."""


class Ends(_Data):
    """Both ends of a list of tokens by value, the extreme ones first."""

    high: list[TokenValue]
    low: list[TokenValue]


class Cosines(_Data):
    """Signed cosines <A, W_t> / |A||W_t| of the atom and the native writes."""

    at_firings: Quartiles
    firings: Bars
    """Share of the firings per bin."""
    silent: Bars
    """The same for tokens at which the atom is silent, over the same bins."""


class Side(_Data):
    """One side of the leading term v w^T of the atom."""

    tokens: Ends
    at_firings: Quartiles | None
    """Cosine with the same side of the native write, at the firings; None where every native write there is zero."""


class Effect(_Data):
    """The derivative of every logit with respect to how much of the atom is written, in logits per norm of the native
    write, minus its mean over the vocabulary; mean over t..t+horizon and over firings. All first-order paths."""

    tokens: Ends
    direct_r: float | None
    """Pearson correlation with the direct path over the vocabulary; None where one of them is constant."""
    size: float
    """Standard deviation over the vocabulary."""
    n: Count
    horizon: Count


class Memory(_Data):
    """How long what the atom writes stays in the state, under decay and erase."""

    half_life: float | None
    """Tokens until half of the norm is left: median over firings (Kaplan-Meier, since sequences end). None: longer
    than `longest`."""
    longest: Count
    """Longest half-life that could have been seen."""
    ended: Count
    """Firings whose sequence ended, or whose limit was reached, before half was gone."""
    n: Count


class Timeline(_Data):
    """One firing and the tokens after it: where the head reads what the atom wrote."""

    sequence: Count
    position: Count
    """Token t at which the atom was written."""
    tokens: list[str]
    """The tokens from t on."""
    reads: list[float]
    """At each of them |a S^T q| / |o|: what the head reads of the atom, over all that it reads there. S is what decay
    and erase have left of the atom, a its activation. Above 1 where other writes cancel it."""

    @model_validator(mode="after")
    def _sizes_agree(self) -> Self:
        if len(self.reads) != len(self.tokens):
            raise ValueError(f"a timeline has a read per token, found {len(self.reads)} and {len(self.tokens)}")
        return self


class Timelines(_Data):
    """When what the atom writes is read."""

    lags: Bars
    """`Timeline.reads` by tokens since the write: mean over the firings that were followed."""
    firings: list[Timeline]
    """The strongest of them."""


class Term(_Data):
    """A rank-1 term size key value^T of the atom, both sides of unit length."""

    size: float
    share: float
    """Of the atom's squared norm."""
    key: list[float]
    """[K]"""
    value: list[float]
    """[V]"""


class Neighbour(_Data):
    """Another atom that fires on the text."""

    atom: Count
    cosine: float
    n_firings: Count


class Reader(_Data):
    """A head of a later layer that reads what the atom writes."""

    layer: Count
    mixer: Mixer
    head: Count
    change: float
    """Change of what the head gives over t..t+horizon (the reads S^T q, or attention's z), relative to its norm."""
    typical: float | None
    """The same under what `Readers.typical` names, so that heads which notice anything can be told apart."""


class Readers(_Data):
    """Heads of later layers by how much what they give changes with the atom, the largest change first."""

    heads: list[Reader]
    what: str
    """The unit of `change`."""
    typical: str
    """What the change is compared with."""


class Substituted(_Data):
    """The substitution test on firings of this atom alone, at one scale (mean KL over the horizon)."""

    scale: Scale
    n: Count
    win_rate: Share
    """Share of firings at which the atom is nearer to the native model than deletion."""
    median_kl: float
    median_kl_delete: float
    best_control: Control | None
    """The control that beats deletion most often."""
    best_control_rate: Share | None


class AtomPage(_Data):
    """Everything about one atom. Its sign, which a product v w^T leaves open, is such that cos(v, k_t) has a positive
    median at its firings."""

    atom: Count
    terms: list[Term] = Field(min_length=1)
    """The largest singular terms of the atom. Key and value side describe the leading one."""
    nearest: list[Neighbour]
    """Largest cosine of the matrices first."""
    n_firings: Count
    rate: Share
    """Share of tokens at which it fires."""
    max_activation: float
    mean_activation: float
    density: Bars
    """Share of its firings by activation."""
    logits: Bars
    """Share of the vocabulary by `effect`, or along the direct path (`values`) where no effect was measured."""
    fires_on: list[TokenValue]
    """Tokens at which it fires most often: share of its firings, and their number."""
    top: list[Context]
    """The strongest firings."""
    bands: list[Band]
    positions: Bars
    """Firing rate by position."""
    cosines: Cosines | None
    """None where every native write at a firing is zero."""
    keys: Side
    """v: `tokens` has the mean of cos(v, k_t) over all occurrences of a token, firing or not."""
    values: Side
    """w, along the direct path: `tokens` has w^T W_O^h W_U, |w| = 1, minus its mean over the vocabulary. Norms and gate
    of the head, later layers and the final norm are not in it."""
    effect: Effect | None
    memory: Memory
    timelines: Timelines | None
    """None where no firing was followed."""
    readers: Readers | None
    substitution: list[Substituted] | None


class AtomPagesData(_Data):
    """The pages of one dictionary, as data."""

    format: Literal[3] = 3
    info: dict[str, JsonValue]
    """What was looked at on what (`Lab.describe`), the settings, the dictionary's `quality` (`DictionaryQuality`; None:
    not measured), and `n_skipped`: what has no page, by reason."""
    atoms: list[AtomPage]

    @field_validator("info")
    @classmethod
    def _is_complete(cls, info: dict[str, JsonValue]) -> dict[str, JsonValue]:
        if missing := [name for name in _SHOWN.split() if name not in info]:
            raise ValueError(f"info lacks {', '.join(missing)}")
        return info

    @field_validator("atoms")
    @classmethod
    def _differ(cls, atoms: list[AtomPage]) -> list[AtomPage]:
        if len({page.atom for page in atoms}) != len(atoms):
            raise ValueError("two pages are of one atom")
        return atoms

    def __getitem__(self, atom: int) -> AtomPage:
        """The page of an atom, by its number; KeyError where it has none."""
        return {page.atom: page for page in self.atoms}[atom]

    def save(self, path: str | Path) -> Path:
        """Write everything as JSON, whole or not at all."""
        return atomic_text(Path(path), self.model_dump_json())

    @classmethod
    def load(cls, path: str | Path) -> AtomPagesData:
        """Read what `save` wrote.

        Raises:
            ValueError: the file holds something else, is cut short or too large; names the file and the field.
        """
        if (size := Path(path).stat().st_size) > _LARGEST:
            raise ValueError(f"{path} has {size / 1e6:,.0f} MB, and {_LARGEST / 1e6:,.0f} MB at most are read")
        try:
            return cls.model_validate_json(Path(path).read_bytes())
        except ValidationError as error:
            raise ValueError(f"{path} is not the data of atom pages, or is cut short: {error}") from error
