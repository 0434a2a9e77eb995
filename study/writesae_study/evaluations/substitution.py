"""The substitution test: exchange one write of one head for an atom, or for a control, and see what the model says.

Source: WriteSAE (arXiv 2605.12770), section 4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, cast

import pandas as pd
from pydantic import PositiveInt

from writesae.dictionary.estimates import Estimate
from writesae.page.format import number, percent
from writesae_study.experiment.at_firings import CHOICES, RELEVANT_RATE, Exchanging, wide_firings
from writesae_study.experiment.bench import Bench
from writesae_study.experiment.conditions import REFERENCES
from writesae_study.experiment.evaluation import Result, described
from writesae_study.experiment.readout import kl_window
from writesae_study.head.baselines import BASELINES
from writesae_study.verdict import figures
from writesae_study.verdict.finding import Against, Claim, Figure, Finding, Paired, with_interval
from writesae_study.verdict.judge import Verdict
from writesae_study.verdict.names import NAMES, SCALE_NAMES
from writesae_study.verdict.paper import Outcome

RELEVANT_SHARE = 0.05
"""Recovered share that an atom has to exceed, and margin by which a control's may be smaller and still count as equal.
Where KL is quadratic in the write, c times the native write recovers 1 - (1 - c)^2: 5% is what a
fortieth of the write itself recovers."""

PRACTICAL_FLOOR = 1e-4
"""Nats: a median deletion effect below it is of no practical size, however far it exceeds rounding."""

_CHOICES = "; ".join(f"{name}: {text}" for name, text in CHOICES.items())
_CLAIM_OF_RULE = {"Mamba-2": 11, "RWKV-7": 12, "DeltaNet": 13}
"""Rules for which the paper reports a separate substitution test; for all others it is its first claim."""
_WORST_FIRST: tuple[Outcome, ...] = ("confounded", "undecided", "fails")


@dataclass(frozen=True, kw_only=True)
class Substitution(Exchanging):
    """At a position (sequence, token t), the conditions differ only in what is written at t. The edit enters the
    state at t and is read from t on, in closed loop: later erases react to it. A **win** is a position at which the KL
    divergence from the native next-token distributions, mean over t..t+horizon, is smaller than after deleting the
    write. The share of deletion's effect that a condition recovers has two estimates. The **total** is 1 - sum
    KL(condition) / sum KL(deletion) over all positions: how much. The **typical** share is the median over sequences
    of the same ratio. A few sequences hold most of the KL, so that the two differ by 10 points in most results.

    The headline draws positions uniformly and writes the dominant atom there (the paper's section 3.2; the paper draws
    firings of atoms). The other choice is weighted by atoms: an atom is drawn, then one of its firings, and this atom
    is written, at the first scale only. Controls are of two kinds.

    *Directions* have the norm of the atom condition. `shuffled`, another atom that does not fire there, is the paper's
    random; the Gaussian direction is ours. The state direction is that of the state **before** the write; the state
    after it contains the write, so that it is shown as a reference and never compared with an atom.

    *Baselines* (`head.baselines`) need no training, and have their own size: the mean write of the
    head, of the token and of the token pair, the best of as many native writes as the dictionary has atoms, drawn at
    random, the best code of a vector quantizer with as many, and the first principal components. They are fitted on
    text that nothing is tested on, in the metric of the dictionary: on `reference`, or each half of the sequences on
    the other. A claim of a dictionary that saw more writes than its baselines is undecided at best.

    A dictionary that was trained on states is tested in the same way: its firings are found on states, and its atoms
    replace the **write**.

    **Verdict** of claim 1 (11, 12, 13 by rule, 14 for the 4B model), at the first scale, and also at the others:
    the ladder of `judge` on the total that the atom recovers. It holds if the interval of the total is above 5%
    (`RELEVANT_SHARE`) and the interval of its difference from every control's total, over the same deletions, above 0.
    The win rate (chance 1/2) is shown too: against deletion it asks for the sign of the effect only, and a small
    piece of anything that points along the write wins most firings. Claim 2, at matched norm, as the paper's chain: the
    rate of atom < delete < another atom, chance 1/2. Claim 3: the paired median ratio of the atom's KL to deletion's
    is below 1, and to that of every control and baseline at matched norm too.
    """

    n_atoms: PositiveInt | None = 100
    """Atoms drawn uniformly from all alive atoms that can be tested. None: all of them. The headline draws `n_atoms`
    times `firings_per_atom` positions."""

    columns: ClassVar[dict[str, dict[str, str]]] = {
        "firings": {
            "choice": f"which atom is written: {_CHOICES}",
            **described("firing sequence position atom"),
            "written_atom": "atom that is written",
            "activation": "activation of the written atom",
            "cosine": "signed cosine of the written atom and the native write",
            **described("condition scale"),
            "kl_window": "nats, mean over t..t+horizon of KL(native || edited)",
        },
    }

    # -- measuring

    def measure(self, lab: Bench) -> dict[str, pd.DataFrame]:
        tables = []
        for choice in self.atom_choice:
            draw = self.drawn(lab, self.horizon, choice)
            for exchange in self.exchanges(lab, draw, self.scales_of(choice)):
                kl = lab.read(exchange.site, exchange.trials(lab), kl_window, self.horizon + 1)
                tables.append(kl.rename(columns={"kl": "kl_window"}).assign(choice=choice))
        return {"firings": pd.concat(tables, ignore_index=True)}

    # -- judging

    def findings(self, result: Result) -> list[Finding]:
        """Claim 1 for every choice of atom and scale; claims 2 and 3 for the headline."""
        findings = []
        headline = _CLAIM_OF_RULE.get(str(result.info["rule"]), 1)
        if "Qwen3.5-4B" in str(result.info["model"]):
            headline = 14  # the paper reports its larger model by itself
        for choice in self.atom_choice:
            wide = wide_firings(result, choice=choice)
            for scale in self.scales_of(choice):
                variation = []
                if choice != self.atom_choice[0]:
                    variation.append(CHOICES[choice])
                if scale != self.scales[0]:
                    variation.append(f"at {SCALE_NAMES[scale]}")
                findings.append(self.nearer(wide, scale, None if variation else headline, variation))
        findings += self._at_matched_norm(wide_firings(result, choice=self.atom_choice[0]))
        return [on_equal_terms(finding, result) for finding in findings]

    def nearer(
        self, wide: pd.DataFrame, scale: str, number_: int | None = None, variation: Sequence[str] = ()
    ) -> Finding:
        """Claim 1 of one choice of atom at one scale; `variation` says which, where it is not the headline. `shown` has
        the total that the atom and each control recovers; nothing where no deletion has an effect."""
        kl = Paired(wide, seed=self.seed)
        atom = f"atom/{scale}"
        wins = kl.wins(atom, "delete")
        measured = [f"wins {with_interval(wins, percent)} of firings"]
        size = kl.size_of("delete")
        remark = f"A deletion moves the model by a median of {number(size['typical'])} nats"
        remark += f" (a no-op: {number(size['floor'])})"
        if size["typical"] < PRACTICAL_FLOOR:
            remark += f", below {number(PRACTICAL_FLOOR)}: of no practical size"
        rivals = [name for name in self.controls if name not in REFERENCES]
        effect = wins._replace(mean=0.0, low=0.0, high=0.0)  # of nothing, nothing is recovered
        totals: dict[str, Estimate] = {}
        against: dict[str, Against] = {}
        if (wide["delete"] > 0).any():
            effect = kl.total(atom)
            # The total of each control by itself, and how far the atom exceeds it over the same deletions.
            controls = {NAMES[name]: kl.total(f"{name}/{scale}") for name in self.controls}
            strongest_first = sorted(controls.items(), key=lambda control: -control[1].mean)
            totals = {"atom": effect} | dict(strongest_first)
            against = {NAMES[name]: Against(kl.total(atom, than=f"{name}/{scale}")) for name in rivals}
            typical = with_interval(kl.recovered(atom), percent)
            measured.insert(0, f"{typical} in a typical sequence")
        return Finding(
            number=number_,
            claim=", ".join(["an atom is nearer to the native write than deletion", *variation]),
            effect=effect,
            what="the total recovered",
            null=NAMES[rivals[0]] if rivals else "",
            against=against,
            relevant=RELEVANT_SHARE,
            **size,
            remark=f"{remark}.",
            shown=totals,
            write=percent,
            axis="of deletion's total effect recovered",
            least=-0.5,
            measured="; ".join(measured),
            of="firings in {} sequences",
        )

    def _at_matched_norm(self, wide: pd.DataFrame) -> list[Finding]:
        """Claims 2 and 3, at matched norm: the strict order, and the paired ratio of KLs."""
        scale = "matched" if "matched" in self.scales else self.scales[0]
        other_atoms = {f"{name}/{scale}": NAMES[name] for name in ("shuffled", "random") if name in self.controls}
        if not other_atoms:  # the strict order ends with another atom
            return [self._medians_finding(wide, scale, {}, [])]
        rivals = [name for name in self.controls if name in BASELINES]
        return [
            self._chain_finding(wide, scale, other_atoms, rivals),
            self._medians_finding(wide, scale, other_atoms, rivals),
        ]

    def _chain_finding(
        self, wide: pd.DataFrame, scale: str, other_atoms: Mapping[str, str], rivals: Sequence[str]
    ) -> Finding:
        """Claim 2: atom < deletion < another atom; `other_atoms` has at least one."""
        kl = Paired(wide, seed=self.seed)
        atom = kl[f"atom/{scale}"]
        deleted = kl["delete"]
        chains = {}
        for column, shown in other_atoms.items():
            chains[f"atom < delete < {shown}"] = kl.mean((atom < deleted) & (deleted < kl[column]))
        first, *_ = chains
        rival, *_ = other_atoms

        def in_order(name: str) -> pd.Series:
            return (kl[f"{name}/{scale}"] < deleted) & (deleted < kl[rival])

        against = {}
        for name in rivals:
            of_rival = in_order(name)
            against[NAMES[name]] = Against(kl.mean(in_order("atom"), of_rival), kl.mean(of_rival))
        return Finding(
            number=2,
            claim=f"strict chain {first}, at {SCALE_NAMES[scale]}",
            effect=chains[first],
            what="the rate of the strict order",
            chance=0.5,
            relevant=RELEVANT_RATE,
            null=other_atoms[rival],
            against=against,
            **kl.size_of("delete"),
            shown=chains,
            write=percent,
            axis="of firings",
            of="firings in {} sequences",
        )

    def _medians_finding(
        self, wide: pd.DataFrame, scale: str, other_atoms: Mapping[str, str], rivals: Sequence[str]
    ) -> Finding:
        """Claim 3: the paired ratio of the atom's KL to that of deletion, of other atoms and of baselines."""
        size = Paired(wide, seed=self.seed).size_of("delete")
        moved = Paired(wide[wide["delete"] > 0], seed=self.seed)
        atom = moved[f"atom/{scale}"]
        names = {"delete": "delete", **other_atoms} | {f"{name}/{scale}": NAMES[name] for name in rivals}
        ratios = {}
        for column, shown in names.items():
            has_effect = moved[column] > 0  # nothing can be divided by the others
            if has_effect.any():
                ratios[shown] = moved.median((atom / moved[column]).where(has_effect))
        medians = [number(float(moved[column].median())) for column in (f"atom/{scale}", "delete", *other_atoms)]
        return Finding(
            number=3,
            claim=f"median KL of {' / '.join(['atom', 'delete', *other_atoms.values()])}, at {SCALE_NAMES[scale]}",
            effect=ratios.get("delete"),
            what="the median ratio of the atom's KL to deletion's",
            null=next(iter(other_atoms.values()), ""),
            against={name: Against(ratio, chance=1.0) for name, ratio in ratios.items() if name != "delete"},
            chance=1.0,
            less=True,
            relevant=RELEVANT_RATE,
            **size,
            ruled=None if ratios else Verdict("below the floor", "Every deletion has an effect of exactly 0."),
            shown=ratios,
            write="{:.2f}".format,
            axis="KL of the atom over that of deletion (controls: over theirs)",
            measured=f"{' / '.join(medians)} nats",
            controls=f"no-op {number(size['floor'])} nats (95th percentile)",
            n=len(moved.wide),
            of="firings in {} sequences",
        )

    @classmethod
    def across(cls, results: list[Result]) -> list[tuple[str, Claim]]:
        """Claim 5, by target: mean total recovered and win rate over the heads of a layer, their spread, and where
        claim 1 holds. Not where a head has several dictionaries of the target: taking one of them would be a choice
        after the fact."""
        layers: dict[tuple[str, ...], list[Result]] = {}
        for result in results:
            layer_of_target = tuple(str(result.info[name]) for name in ("model", "layer", "target"))
            layers.setdefault(layer_of_target, []).append(result)
        claims = []
        for (_, layer, target), of_layer in layers.items():
            heads = {str(result.info["head"]) for result in of_layer}
            if len(of_layer) < 2 or len(heads) < len(of_layer):
                continue
            # Claim 1 of each head, by the rules of its own result.
            tests, win_rates = [], []
            for result in of_layer:
                test = cast(Substitution, result.evaluation)
                scale = test.scales[0]
                wide = wide_firings(result)
                tests.append(on_equal_terms(test.nearer(wide, scale), result))
                win_rates.append((wide[f"atom/{scale}"] < wide["delete"]).mean())
            totals = [test.shown["atom"].mean for test in tests if test.shown]
            outcomes: list[Outcome] = [test.verdict.outcome for test in tests]
            # A layer is as good as its worst head.
            worst = min(outcomes, key=lambda outcome: (*_WORST_FIRST, outcome).index(outcome))
            finding = Finding(
                number=5,
                claim="all heads of a layer",
                null=tests[0].null,
                ruled=Verdict(worst, f"Claim 1 holds on {outcomes.count('holds')} of {len(tests)} heads."),
                measured=f"recovers {_mean_and_spread(totals)}; wins {_mean_and_spread(win_rates)} (SD over heads)",
                controls=f"confounded by a control on {outcomes.count('confounded')}",
                n=len(tests),
                of="heads",
            )
            claims.append((f"L{layer} {target}-trained", finding.row()))
        return claims

    def panels(self, result: Result) -> list[Figure]:
        """Where the headline's atom wins (the paper's table 13 and figure 14)."""
        wide = wide_firings(result)
        if len(wide) < 4:  # no quartiles
            return []
        rows = []
        for column, name in (("delete", "of deletion's effect"), ("cosine", "of the cosine with the write")):
            quartile = 1 + pd.qcut(wide[column].rank(method="first"), 4, labels=False)
            for number_, of_quartile in wide.groupby(quartile):
                rate = Paired(of_quartile).wins(f"atom/{self.scales[0]}", "delete")
                rows.append(figures.Row(f"Q{number_} {name}", rate))
        title = "Win rate of the atom by quartile"
        svg = figures.intervals(rows, "of firings", f"{title}: {result.label}", chance=0.5, write=percent)
        return [Figure(title, svg, "95% intervals. An effect that is real is largest in the last quartile, Q4.")]


def _mean_and_spread(shares: Sequence[float]) -> str:
    """Mean and standard deviation over heads."""
    over_heads = pd.Series(shares)
    return f"{percent(float(over_heads.mean()))} ± {percent(float(over_heads.std()))}"


def on_equal_terms(finding: Finding, result: Result) -> Finding:
    """The finding, which cannot hold where the dictionary was fitted to more than its baselines (`Terms.unequal`)."""
    why = result.info.get("unequal", "It is not known what baselines were fitted to.")
    has_baselines = any(NAMES[name] in finding.against for name in BASELINES)
    if why and has_baselines:
        return replace(finding, unless=Verdict("undecided", str(why)))
    return finding
