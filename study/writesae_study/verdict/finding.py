"""What an evaluation found, as data. Verdict, sentence and panel of a claim follow from it, by one rule for all.

`Paired` turns a measured table into estimates: it is the only place that pairs conditions, resamples clusters and
averages. A `Finding` names the effect, its controls, and how a reader sees both. For a table with one row per firing
and condition,

    paired = Paired.of(table, "kl", "firing", seed=0)  # [firings, conditions], clustered by sequence
    Finding(
        claim="an atom is nearer to the native model than deletion",
        effect=paired.wins("atom", "delete"),
        chance=0.5,
        against={"mean write": Against(paired.wins("atom", "mean"), paired.wins("mean", "delete"), chance=0.5)},
        shown={"atom": paired.wins("atom", "delete"), "mean write": paired.wins("mean", "delete")},
        write=percent,
        axis="of firings",
        of="firings",
        **paired.size_of("delete"),
    )

is all that a question has to say.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypedDict

import pandas as pd

from writesae.dictionary.estimates import Estimate, recovered_share
from writesae.page import format as text
from writesae_study.verdict import figures
from writesae_study.verdict import statistics as stats
from writesae_study.verdict.judge import Against, Verdict, judge
from writesae_study.verdict.paper import PAPER_CLAIMS, Outcome

Values = str | pd.Series
"""A condition by its name, or one value for each unit."""


@dataclass(frozen=True)
class Claim:
    """One claim, what was measured of it here, and what became of it."""

    number: int | None
    """Row of `verdict.paper.PAPER_CLAIMS`; None for a claim of this project."""
    claim: str
    measured: str
    """The number with its interval, as a reader should see it."""
    n: int
    """Observations; `unit` names them: "firings in 40 sequences"."""
    unit: str
    controls: str
    """What could have refuted the claim, with its number. Empty: no control was run; `sentence` says why."""
    outcome: Outcome
    sentence: str
    """Why the outcome is what it is, by which rule."""
    null: str = ""
    """What has none of the atom's information, and was tested by the same rule. Empty: the claim is not tested."""

    @property
    def paper(self) -> str:
        """The paper's value, or a dash."""
        return PAPER_CLAIMS[self.number].value if self.number is not None else "–"


class Figure(NamedTuple):
    """One panel of the report: an inline SVG made by `verdict.figures`, which follows the page's colors."""

    title: str
    svg: str
    caption: str = ""

    def _repr_html_(self) -> str:
        """The panel as a notebook shows it, in the colors of a light page."""
        caption = f"<p><small>{html.escape(self.caption)}</small></p>"
        return f"<figure><b>{html.escape(self.title)}</b>{self.svg}{caption}</figure>"


class EffectSize(TypedDict):
    """How large what is measured is, and what a no-op moves."""

    typical: float
    floor: float


@dataclass(frozen=True)
class Paired:
    """One row for each unit, one column for each condition that it was measured under.

    Units that lack a condition are left out of the estimates that need it. Cost of an estimate: 2,000 resamples.
    """

    wide: pd.DataFrame
    clusters: tuple[str, ...] = ("sequence",)
    """One or two columns of `wide` that are resampled. Two: units share both, a sequence and an atom say."""
    seed: int = 0

    @classmethod
    def of(
        cls,
        table: pd.DataFrame,
        value: str,
        *units: str,
        by: str = "condition",
        clusters: tuple[str, ...] = ("sequence",),
        seed: int = 0,
    ) -> Paired:
        """From a table with one row for each unit and condition; a unit that was measured several times under one
        condition gets the mean."""
        index = list(dict.fromkeys([*units, *clusters]))
        means = table.groupby([*index, by])[value].mean().dropna()  # as `pivot_table`, in half of the time
        return cls(means.unstack(by).reset_index(), clusters, seed)

    def __getitem__(self, condition: str) -> pd.Series:
        return self.wide[condition]

    def __contains__(self, condition: str) -> bool:
        return condition in self.wide

    def mean(self, a: Values, minus: Values | None = None) -> Estimate:
        """The mean under a condition, or of the paired difference of two. Truth values without `minus` are a share,
        whose interval is another one (`statistics.share`)."""
        values, clusters = self._clustered_values(a, minus)
        # Wilson's interval is of one way to cluster; two are resampled.
        if len(clusters) == 1 and values.dtype == bool:
            return stats.share(values, *clusters)
        return stats.estimate(values, *clusters, seed=self.seed)

    def median(self, a: Values, minus: Values | None = None) -> Estimate:
        """The median under a condition, or of the paired difference of two."""
        values, clusters = self._clustered_values(a, minus)
        return stats.estimate(values, clusters[0], statistic=stats.weighted_median, seed=self.seed)

    def lead(self, a: str, other: Paired) -> Estimate:
        """The mean of `a` minus that of another sample, which shares no cluster with this one."""
        x, x_ids = self._clustered_values(a, None)
        y, y_ids = other._clustered_values(a, None)
        return stats.estimate_difference(x, y, x_ids[0], y_ids[0], seed=self.seed)

    def wins(self, a: str, b: str) -> Estimate:
        """The share of units at which `a` is smaller than `b` (of KL: nearer to the native model). A tie is no win."""
        both = self.wide.dropna(subset=[a, b])  # a comparison with NaN would be a loss
        return self.mean(both[a] < both[b])

    def recovered(self, a: str) -> Estimate:
        """The share of deletion's effect that `a` recovers in a typical sequence: the median over clusters."""
        kl, (ids,) = self._complete_units(a, "delete")
        return recovered_share(kl[a], kl["delete"], ids)

    def total(self, a: str, than: str = "delete") -> Estimate:
        """The share of all that deletions do which `a` recovers, more than `than` does: a ratio of sums."""
        kl, (ids,) = self._complete_units(a, than, "delete")
        return stats.total(kl[than] - kl[a], kl["delete"], ids, seed=self.seed)

    def means(self, names: Mapping[str, str]) -> dict[str, Estimate]:
        """The mean under each condition of `names`, by the name that a reader sees."""
        return {shown: self.mean(name) for name, shown in names.items()}

    def beaten(self, a: str, names: Mapping[str, str]) -> dict[str, Against]:
        """The controls `names` as rivals of `a`, by their paired differences."""
        return {shown: Against(self.mean(a, name)) for name, shown in names.items()}

    def size_of(self, name: str, no_op: str = "native") -> EffectSize:
        """The typical size of a condition and what a no-op measures, as a `Finding` takes them."""
        typical = float(self[name].abs().median())
        floor = float(self[no_op].abs().quantile(0.95))
        return {"typical": typical, "floor": floor}

    def _complete_units(self, *names: str) -> tuple[pd.DataFrame, list[pd.Series]]:
        """The units that have all of these conditions, and their clusters."""
        units = self.wide.dropna(subset=[*dict.fromkeys(names)])
        return units, [units[name] for name in self.clusters]

    def _clustered_values(self, a: Values, minus: Values | None) -> tuple[pd.Series, list[pd.Series]]:
        values = self.wide[a] if isinstance(a, str) else a
        if minus is not None:
            subtracted = self.wide[minus] if isinstance(minus, str) else minus
            values = values.astype(float) - subtracted.astype(float)  # truth values have no difference
        values = values.dropna()
        return values, [self.wide.loc[values.index, name] for name in self.clusters]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One claim: an effect, the controls that it must exceed, and how a reader sees both."""

    claim: str
    null: str
    """The dictionary or direction that has none of the atom's information: one of `against`, or what the effect is a
    distance from. Empty: none could be run, and the claim is not tested."""
    number: int | None = None
    """Row of the paper's claims."""

    effect: Estimate | None = None
    """What the ladder of `judge` is applied to; the fields up to `less` are its arguments."""
    what: str = "the effect"
    against: Mapping[str, Against] = field(default_factory=dict)
    chance: float = 0.0
    relevant: float = 0.0
    typical: float | None = None
    floor: float = 0.0
    less: bool = False
    unless: Verdict | None = None
    """What becomes of a claim whose effect is there, by a further rule of the question."""
    ruled: Verdict | None = None
    """A verdict by the question's own rule instead of the ladder's."""
    remark: str = ""
    """What a reader must know besides, after the sentence."""

    shown: Mapping[str, Estimate] = field(default_factory=dict)
    """What the subject (first) and the controls reach by themselves; a panel has a row for each."""
    write: Callable[[float], str] = text.number
    """How these numbers are written."""
    axis: str = ""
    """What they are, with their unit."""
    least: float | None = None
    """Numbers below it are drawn there."""
    measured: str = ""
    """More numbers; all of them where nothing is `shown`."""
    controls: str = ""
    """The same of controls."""
    n: int | None = None
    """Observations; by default those of the effect."""
    of: str = ""
    """Units of observation; {} is the number of clusters: "firings in {} sequences"."""

    @classmethod
    def untested(cls, claim: str, why: str, number: int | None = None, of: str = "dictionaries", n: int = 0) -> Finding:
        """A claim for which something is missing."""
        return cls(claim=claim, null="", number=number, ruled=Verdict("not tested", why), measured="–", of=of, n=n)

    @property
    def verdict(self) -> Verdict:
        """By the question's own rule where there is one, otherwise by the ladder of `judge`."""
        if self.ruled is not None or self.effect is None:
            return self.ruled or Verdict("not tested", "Nothing was measured.")
        if not self.null:
            return Verdict("not tested", "No null was run that could show the effect too.")
        verdict = judge(
            self.effect,
            self.against,
            typical=self.typical,
            floor=self.floor,
            chance=self.chance,
            less=self.less,
            relevant=self.relevant,
            what=self.what,
        )
        return self.unless or verdict if verdict.outcome == "holds" else verdict

    def row(self) -> Claim:
        """The claim in words."""
        numbers = {name: with_interval(estimate, self.write) for name, estimate in self.shown.items()}
        subject = next(iter(numbers.values()), "")
        beside = [f"{name} {control}" for name, control in list(numbers.items())[1:]]
        n = clusters = 0
        if self.effect is not None:
            n = self.effect.n
            clusters = self.effect.n_clusters
        verdict = self.verdict
        return Claim(
            number=self.number,
            claim=self.claim,
            measured="; ".join(filter(None, [f"{subject} {self.axis}".strip(), self.measured])),
            n=n if self.n is None else self.n,
            unit=self.of.format(clusters),
            controls="; ".join(filter(None, [*beside, self.controls])),
            outcome=verdict.outcome,
            sentence=f"{verdict.sentence} {self.remark}".strip(),
            null=self.null,
        )

    def panel(self, label: str) -> Figure:
        """Subject and controls with their intervals; a control that is not beaten is orange."""
        rows: list[figures.Row] = []
        unbeaten = self.verdict.unbeaten_controls
        for name, estimate in self.shown.items():
            colour = "control" if name in unbeaten else "soft"
            rows.append(figures.Row(name, estimate, colour if rows else "atom"))  # the subject comes first
        return self.figure(rows, label, "95% intervals; dashed: chance. The subject does not beat controls in orange.")

    def figure(self, rows: Sequence[figures.Row], label: str, caption: str) -> Figure:
        """Some rows on the axis of this claim."""
        title = f"{self.claim}: {label}"
        svg = figures.intervals(rows, self.axis, title, chance=self.chance, write=self.write, least=self.least)
        return Figure(self.claim[0].upper() + self.claim[1:], svg, caption)


def with_interval(estimate: Estimate, write: Callable[[float], str] = text.number) -> str:
    """A number with its interval, where it has one: "0.55 [0.51, 0.6]". A share recovered below -100% has no lower end:
    the ratio of the KLs is written in its stead."""
    mean, low, high, *_ = estimate
    if write is text.percent and mean < -1:
        ratio = estimate._replace(mean=1 - mean, low=1 - high, high=1 - low)
        return f"none (KL {with_interval(ratio)} times that of deletion)"
    return f"{write(mean)}{text.interval(low, high, write)}"


__all__ = ["Against", "Claim", "Figure", "Finding", "Paired", "with_interval"]
