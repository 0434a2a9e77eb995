"""The substitution test: exchange one write of one head for an atom, or for a control, and see what the model says.

Source: WriteSAE (arXiv 2605.12770), section 4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, cast

import numpy as np
import pandas as pd

from writesae.experiment.at_firings import CHOICES, RELEVANT, Exchanging, headline_share, wide_firings
from writesae.experiment.conditions import REFERENCES, written_at
from writesae.experiment.evaluation import Result, described
from writesae.experiment.head_baselines import BASELINES
from writesae.experiment.lab import Lab
from writesae.experiment.readout import EXAMPLE, KL_METRICS
from writesae.verdict import figures
from writesae.verdict import statistics as stats
from writesae.verdict.finding import Against, Claim, Figure, Finding, Paired, said
from writesae.verdict.format import number, percent
from writesae.verdict.judge import Verdict
from writesae.verdict.names import DEFINITIONS, NAMES, SCALE_DEFINITIONS, SCALE_NAMES
from writesae.verdict.paper import Outcome

RELEVANT_SHARE = 0.05
"""Recovered share that an atom has to exceed, and margin by which a control's may be smaller and still count as equal.
Where KL is quadratic in the write, c times the native write recovers 1 - (1 - c)^2: 5 % is what a
fortieth of the write itself takes back."""

PRACTICAL_FLOOR = 1e-4
"""Nats: a median deletion effect below it is of no practical size, however far it lies above rounding."""

_QUARTILES = (0.5, 0.25, 0.75)
_LINES = 5
"""Controls that are lines of one panel: more names do not fit beside it."""

_CLAIM_OF_RULE = {"Mamba-2": 11, "RWKV-7": 12, "DeltaNet": 13}
"""Rules for which the paper reports a substitution test of their own; for all others it is its first claim."""
_CLAIM_OF_MODEL = {"Qwen3.5-4B": 14}
"""Models of which the same is true, by a part of their name."""

_WORST_FIRST: tuple[Outcome, ...] = ("confounded", "undecided", "fails")


@dataclass(frozen=True, kw_only=True)
class Substitution(Exchanging):
    """At a firing (sequence, token t, atom i), the conditions differ only in what is written at t. The edit enters the
    state at t and is read from t on, in closed loop: later erases react to it. A **win** is a firing at which the KL
    divergence from the native next-token distributions, mean over t..t+horizon, is smaller than after deleting the
    write. The **recovered share** is 1 - sum KL(condition) / sum KL(deletion).

    The headline writes the dominant atom of the position, as the paper does (section 3.2); beside it stands the
    firing's own atom, under its own name and at the first scale only. Controls are of two kinds.

    *Directions* have the norm of the atom condition. `shuffled`, another atom that does not fire there, is the paper's
    random; the Gaussian direction is ours. The state direction is that of the state **before** the write; the state
    after it contains the write, so that it is shown as a reference and never held against an atom.

    *Baselines* (`experiment.head_baselines`) need no training, and have a size of their own: the mean write of the
    head, of the token and of the token pair, the best of as many native writes as the dictionary has atoms, drawn at
    random, the best code of a vector quantiser with as many, and the first principal components. They are fitted on
    text that nothing is tested on: on `reference`, or each half of the sequences on the other.

    A dictionary that was trained on states is tested in the same way: its firings are found on states, and its atoms
    replace the **write**.

    **Verdict** of claim 1 (11, 12, 13 by rule, 14 for the 4B model), at the first scale, and beside it at the others:
    the ladder of `judge` on the recovered share of the atom. It holds if the interval of the share lies above 5 %
    (`RELEVANT_SHARE`) and the interval of its difference from every control's share, over the same deletions, above 0.
    The win rate (chance 1/2) stands beside it: against deletion it asks for the sign of the effect only, and a small
    piece of anything that points along the write wins most firings. Claim 2, at matched norm, as the paper's chain: the
    rate of atom < delete < another atom, chance 1/2. Claim 3: the paired median ratio of the atom's KL to deletion's
    lies below 1, and to another atom's too.
    """

    n_atoms: int | None = 100
    """Atoms drawn uniformly from all alive atoms that can be tested. None: all of them."""

    kind: ClassVar[str] = "substitution"
    question: ClassVar[str] = "Can an atom stand in for the write it replaces?"
    answers: ClassVar[tuple[int, ...]] = (1, 2, 3, 5, 11, 12, 13, 14)
    columns: ClassVar[dict[str, dict[str, str]]] = {
        "firings": {
            "choice": "which atom is written: " + "; ".join(f"{k}: {v}" for k, v in CHOICES.items()),
            **described("firing sequence position atom"),
            "written_atom": "atom that is written",
            "activation": "activation of the written atom",
            "cosine": "signed cosine of the written atom and the native write",
            "write_norm": "Frobenius norm of the native write",
            **described("condition scale"),
            "norm": "Frobenius norm of what is written",
            **KL_METRICS,
        },
        "example": {
            "firing": "number of the firing, of the headline's choice: the one whose deletion has the largest effect",
            **EXAMPLE,
        },
    }

    # -- measuring

    def measure(self, lab: Lab) -> dict[str, pd.DataFrame]:
        tables = []
        for choice in self.atom_choice:
            exchanges = self.exchanges(lab, self.draw(lab, choice), self.scales_of(choice))
            tables += [self.measured(lab, exchange).assign(choice=choice) for exchange in exchanges]
        firings = pd.concat(tables, ignore_index=True)
        return {"firings": firings, "example": self.example(lab, firings)}

    # -- judging

    def findings(self, result: Result) -> list[Finding]:
        """Claim 1 for every choice of atom and scale; claims 2 and 3 for the headline."""
        found, model, rule = [], str(result.info["model"]), str(result.info["rule"])
        by_model = (n for name, n in _CLAIM_OF_MODEL.items() if name in model)
        for choice in self.atom_choice:
            wide = wide_firings(result, choice=choice)
            for scale in self.scales_of(choice):
                named = [] if choice == self.atom_choice[0] else [CHOICES[choice]]
                named += [] if scale == self.scales[0] else [f"at {SCALE_NAMES[scale]}"]
                number_ = None if named else next(by_model, _CLAIM_OF_RULE.get(rule, 1))
                found.append(self.nearer(wide, scale, number_, named))
        return [*found, *self._chain_and_medians(wide_firings(result, choice=self.atom_choice[0]))]

    def nearer(self, wide: pd.DataFrame, scale: str, number_: int | None = None, named: Sequence[str] = ()) -> Finding:
        """Claim 1 of one choice of atom at one scale; `named` says which, where it is not the headline. `shown` has the
        share that the atom and each control recovers; nothing where no deletion has an effect."""
        kl, atom = Paired(wide, seed=self.seed), f"atom/{scale}"
        wins, size, controls = kl.wins(atom, "delete"), kl.size_of("delete"), written_at(scale, self.controls)
        small = f", below {number(PRACTICAL_FLOOR)}: of no practical size" * (size["typical"] < PRACTICAL_FLOOR)
        finding = Finding(
            number=number_,
            claim=", ".join(["an atom is nearer to the native write than deletion", *named]),
            effect=wins._replace(mean=0.0, low=0.0, high=0.0),  # of nothing, nothing is recovered
            what="the recovered share",
            relevant=RELEVANT_SHARE,
            large=True,
            **size,
            remark=f"A deletion moves the model by a median of {number(size['typical'])} nats (a no-op: "
            f"{number(size['floor'])}){small}.",
            write=percent,
            axis="of deletion's effect recovered",
            least=-0.5,
            measured=f"wins {said(wins, percent)} of firings",
            of="firings in {} sequences",
        )
        if not (wide["delete"] > 0).any():
            return finding
        shares = {NAMES[name]: kl.recovered(f"{name}/{scale}") for name in controls}
        best_first = dict(sorted(shares.items(), key=lambda share: -share[1].mean))
        against = {
            NAMES[name]: Against(kl.recovered(atom, than=f"{name}/{scale}"))
            for name in controls
            if name not in REFERENCES
        }
        share = kl.recovered(atom)
        return replace(finding, effect=share, against=against, shown={"atom": share} | best_first)

    def _chain_and_medians(self, wide: pd.DataFrame) -> list[Finding]:
        """Claims 2 and 3, at matched norm: the strict order, and the paired ratio of KLs."""
        scale = "matched" if "matched" in self.scales else self.scales[0]
        kl, at, of = Paired(wide, seed=self.seed), SCALE_NAMES[scale], "firings in {} sequences"
        atom, deleted = kl[f"atom/{scale}"], kl["delete"]
        others = {f"{name}/{scale}": NAMES[name] for name in ("shuffled", "random") if f"{name}/{scale}" in kl}
        chains = {f"atom < delete < {n}": kl.mean((atom < deleted) & (deleted < kl[c])) for c, n in others.items()}
        found = [
            Finding(
                number=2,
                claim=f"strict chain {chain}, at {at}",
                effect=chains[chain],
                what="the rate of the strict order",
                chance=0.5,
                relevant=RELEVANT,
                **kl.size_of("delete"),
                shown=chains,
                write=percent,
                axis="of firings",
                of=of,
            )
            for chain in [*chains][:1]
        ]
        moved, claim = wide[wide["delete"] > 0], f"median KL of atom / delete, at {at}"
        if moved.empty:
            reason = "Every deletion has an effect of exactly 0, so that there is no ratio to one."
            empty = Finding.untested(claim, reason, 3, f"firings in {wide['sequence'].nunique()} sequences", len(wide))
            return [*found, replace(empty, ruled=Verdict("below the floor", reason))]
        ratios, medians = {}, [number(float(moved[f"atom/{scale}"].median()))]
        for column, name in ({"delete": "delete"} | others).items():
            rows = moved[moved[column] > 0]
            ratios[name] = Paired(rows, seed=self.seed).median(rows[f"atom/{scale}"] / rows[column])
            medians.append(number(float(moved[column].median())))
        medians_of = Finding(
            number=3,
            claim=f"median KL of {' / '.join(['atom', *ratios])}, at {at}",
            effect=ratios["delete"],
            what="the median ratio of the atom's KL to deletion's",
            against={name: Against(ratio, chance=1.0) for name, ratio in ratios.items() if name != "delete"},
            chance=1.0,
            less=True,
            relevant=RELEVANT,
            **kl.size_of("delete"),
            shown=ratios,
            write="{:.2f}".format,
            axis="KL of the atom over that of deletion (controls: over theirs)",
            measured=f"{' / '.join(medians)} nats",
            controls=f"no-op {number(kl.size_of('delete')['floor'])} nats (95th percentile)",
            n=len(moved),
            of=of,
        )
        return [*found, medians_of]

    @classmethod
    def across(cls, results: list[Result]) -> list[tuple[str, Claim]]:
        """Claim 5, by target: mean recovered share and win rate over the heads of a layer, their spread, and where
        claim 1 holds. Not where a head has several dictionaries of the target: taking one of them would be a choice
        after the fact."""
        groups: dict[tuple[object, ...], list[Result]] = {}
        for result in results:
            place = (result.info["model"], result.info["layer"], result.info["target"])
            groups.setdefault(place, []).append(result)
        claims = []
        for (_, layer, target), of_layer in groups.items():
            if len(of_layer) < 2 or len({str(result.info["head"]) for result in of_layer}) < len(of_layer):
                continue
            found, wins = [], []
            for result in of_layer:
                wide, test = wide_firings(result), cast(Substitution, result.evaluation)
                found.append(test.nearer(wide, test.scales[0]))
                wins.append((wide[f"atom/{test.scales[0]}"] < wide["delete"]).mean())
            shares = pd.Series([each.shown["atom"].mean for each in found if each.shown])
            outcomes = [each.verdict.outcome for each in found]
            held = outcomes.count("holds")
            worst: Outcome = next((outcome for outcome in _WORST_FIRST if outcome in outcomes), outcomes[0])
            spread = [f"{percent(float(x.mean()))} ± {percent(float(x.std()))}" for x in (shares, pd.Series(wins))]
            finding = Finding(
                number=5,
                claim="all heads of a layer",
                ruled=Verdict(worst, f"Claim 1 holds on {held} of {len(found)} heads."),
                measured=f"recovers {spread[0]}; wins {spread[1]} (SD over heads)",
                controls=f"confounded by a control on {outcomes.count('confounded')}",
                n=len(found),
                of="heads",
            )
            claims.append((f"L{layer} {target}-trained", finding.row()))
        return claims

    def summaries(self, result: Result) -> dict[str, pd.DataFrame]:
        """Every comparison by the headline metric, and the headline comparison by every metric."""
        by_metric = [
            comparisons(result, metric).query("a == 'atom' and b == 'delete'").assign(metric=metric)
            for metric in KL_METRICS
            if result.tables["firings"][metric].notna().any()
        ]
        return {
            **{f"comparisons, {choice} atom": comparisons(result, choice=choice) for choice in self.atom_choice},
            "atom against deletion, by metric": pd.concat(by_metric, ignore_index=True),
        }

    def notes(self, result: Result) -> list[str]:
        """Definitions of conditions and scales, and how long the head remembers."""
        life, limit = result.info["half_life"], result.info["half_life_limit"]
        listed = [f"{NAMES[n]}: {DEFINITIONS[n]}" for n in ("native", "delete", "atom", *self.controls)]
        notes = [
            f"A write of this head has lost half of its norm after {life} tokens{' or more' * (life == limit)} (median "
            "over writes).",
            "\n".join(["Conditions, which are written in place of the native write:", *listed]),
            "\n".join(["Scales:", *(f"{SCALE_NAMES[n]}: {SCALE_DEFINITIONS[n]}" for n in self.scales)]),
        ]
        if "baseline_tokens" in result.info:
            notes.append(
                f"Baselines were fitted on {result.fact('baseline_tokens'):,.0f} tokens of other text than they are "
                f"tested on; {result.fact('n_codes'):,.0f} writes were drawn, and as many codes fitted."
            )
        return notes

    @classmethod
    def front(cls, results: list[Result]) -> list[Figure]:
        """The recovered share of one atom of each dictionary and of what needs no training, and one exchange in
        words."""
        settings = cast(Substitution, results[0].evaluation)
        found = {result.label: settings.nearer(wide_firings(result), settings.scales[0]) for result in results}
        shown = {label: finding.shown for label, finding in found.items() if finding.shown}
        if not shown:
            return []
        rows = [figures.Row(f"atom, {label}", *shares["atom"][:3], "atom") for label, shares in shown.items()]
        first = next(iter(shown))
        free = [NAMES[name] for name in BASELINES if NAMES[name] in shown[first]]
        rows += [figures.Row(name, *shown[first][name][:3]) for name in free]
        label, title = "of deletion's effect recovered", "One atom in place of a write"
        caption = (
            "100% is the native model, 0% is a deleted write; a triangle lies further left. Grey: what needs no "
            f"training, at the firings of {first}."
        )
        panels = [Figure(title, figures.intervals(rows, label, title, write=percent, least=-0.5), caption)]
        best = max(results, key=headline_share)
        example = best.tables["example"]
        if example.empty:
            return panels
        offset, title = int(example["read_at"].iloc[0]), "One write replaced, in words"
        wide = example.pivot_table(index="word", columns="condition", values="probability", sort=False)
        bars = {NAMES[str(name)]: wide[name].tolist() for name in wide.columns}
        words = [repr(str(word))[1:-1] for word in wide.index]
        later = f", {offset} token{'s' * (offset > 1)} later" if offset else ""
        caption = (
            f"{example['text'].iloc[0]} · The write at the token in brackets is replaced; the next token is predicted "
            f"at the bar{later}. This is the firing of {best.label} whose deletion moves the model most."
        )
        return [*panels, Figure(title, figures.bars(words, bars, "probability of the next token", title), caption)]

    def panels(self, result: Result) -> list[Figure]:
        """For every choice of atom: how far each condition moves the model, and where the atom wins."""
        panels, scale = [], self.scales[0]
        for choice in self.atom_choice:
            wide, name = wide_firings(result, choice=choice), f"{result.label}, {choice} atom"
            columns = {"delete": "delete", f"atom/{scale}": "atom"}
            columns |= {f"{name}/{scale}": name for name in written_at(scale, self.controls)}
            logs = {short: np.log10(np.quantile(wide[c].clip(lower=1e-16), _QUARTILES)) for c, short in columns.items()}
            colours = {"atom": "atom", "delete": "ink"}
            rows = [
                figures.Row(NAMES[n], float(ends[0]), float(ends[1]), float(ends[2]), colours.get(n, "soft"))
                for n, ends in logs.items()
            ]
            title, level = f"KL by condition: {name}", float(logs["delete"][0])
            svg = figures.intervals(
                rows, "KL from native, nats", title, chance=level, write=lambda log: number(10**log)
            )
            caption = "Median and quartiles over firings. Dashed: deletion."
            panels.append(Figure("How far each moves the model", svg, caption))
            of_controls = [c for c, short in columns.items() if short not in ("atom", "delete", *REFERENCES)]
            wins = (wide[of_controls].lt(wide["delete"], axis=0)).mean().sort_values(ascending=False, kind="stable")
            shown = {c: NAMES[columns[c]].split(" (")[0] for c in (*wins.index[:_LINES], f"atom/{scale}")}
            for column, what in (("delete", "deletion's effect"), ("cosine", "the cosine of atom and write")):
                panels.append(_by_quartile(wide, column, shown, what, name))
        return panels


def _by_quartile(wide: pd.DataFrame, column: str, shown: Mapping[str, str], what: str, name: str) -> Figure:
    """Win rates against deletion by quartile of a column; the last condition of `shown` is the atom. Fewer than four
    firings leave quartiles out."""
    quartile, lines = stats.quartile(wide[column]), []
    parts = {float(q): Paired(wide[quartile == q]) for q in sorted(set(quartile.tolist()))}
    for condition, text in shown.items():
        rates = [part.wins(condition, "delete") for part in parts.values()]
        own = condition == [*shown][-1]
        band = ([r.low for r in rates], [r.high for r in rates]) if own else None
        lines.append(figures.Line(text, [*parts], [r.mean for r in rates], "atom" if own else "soft", band))
    ends = [number(float(part[column].median())) for part in (*parts.values(),)]
    label, ticks = f"quartile of {what}\n(medians {ends[0]} to {ends[-1]})", {q: f"Q{q:.0f}" for q in parts}
    title = f"Win rate by {what}: {name}"
    svg = figures.curves(lines, label, title, percent=True, chance=0.5, ticks=ticks)
    caption = f"Of the controls, the {_LINES} that win most often. An effect that is real is largest in Q4."
    return Figure(f"By {what}", svg, caption)


def comparisons(
    result: Result, metric: str = "kl_window", *, choice: str | None = None, cluster: str = "sequence"
) -> pd.DataFrame:
    """Every condition against deletion, then the atom against every control, at every scale.

    Args:
        metric: one of `KL_METRICS`.
        cluster: "sequence" or "atom": what the bootstrap resamples.

    Returns: scale, a, b, n, n_clusters; with their intervals (`_low`, `_high`) the `rate` of a < b, `recovered` (share
    of deletion's effect that a recovers), `gap` (the same minus that of b) and the median `ratio` a / b, missing where
    no deletion has an effect; the p-value of sign flips by cluster, and `holm_p` over all rows.
    """
    settings = cast(Substitution, result.evaluation)
    wide = wide_firings(result, metric, choice)
    kl, rows = Paired(wide, (cluster,), settings.seed), []
    for scale in settings.scales_of(choice or settings.atom_choice[0]):
        controls = written_at(scale, settings.controls)
        for a, b in [*((name, "delete") for name in ("atom", *controls)), *(("atom", name) for name in controls)]:
            x, y = f"{a}/{scale}", b if b == "delete" else f"{b}/{scale}"
            moved = wide[wide[y] > 0]  # a ratio to an effect of exactly 0 says nothing
            wins = kl.wins(x, y)
            none = wins._replace(mean=np.nan, low=np.nan, high=np.nan)
            some = bool((wide["delete"] > 0).any())
            numbers = {
                "rate": wins,
                "recovered": kl.recovered(x) if some else none,
                "gap": kl.recovered(x, than=y) if some else none,
                "ratio": none if moved.empty else replace(kl, wide=moved).median(moved[x] / moved[y]),
            }
            row = {"scale": scale, "a": a, "b": b, "n": wins.n, "n_clusters": wins.n_clusters}
            for name, each in numbers.items():
                row |= {name: each.mean, f"{name}_low": each.low, f"{name}_high": each.high}
            flips = stats.sign_flip_test(wide[x], wide[y], wide[cluster], seed=settings.seed)
            rows.append(row | {"sign_flip_p": flips.p_value})
    table = pd.DataFrame(rows)
    names = table["scale"] + "/" + table["a"] + "/" + table["b"]
    return table.assign(holm_p=list(stats.holm(dict(zip(names, table["sign_flip_p"]))).values()))
