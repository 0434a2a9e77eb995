"""The substitution test: exchange one write of one head for an atom, or for a control, and see what the model says.

Source: WriteSAE (arXiv 2605.12770), section 4.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, NamedTuple, cast

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from sae_lens_writesae.atom.low_rank import LowRank
from writesae.experiment.conditions import (
    CONTROLS,
    REFERENCES,
    SCALES,
    Condition,
    Scale,
    common_factors,
    conditions,
    control_directions,
    edits_of,
    written_at,
)
from writesae.experiment.evaluation import Evaluation, Result, described
from writesae.experiment.example import changed_words
from writesae.experiment.firings import FiringDraw, draw_firings, folds
from writesae.experiment.head import WriteKind, head_profile, head_writes
from writesae.experiment.head_baselines import BASELINES
from writesae.experiment.lab import Lab, Site, Trial
from writesae.experiment.readout import KL_METRICS, kl_metrics
from writesae.verdict import figures
from writesae.verdict import statistics as stats
from writesae.verdict.finding import Against, Claim, Figure, Finding, Paired, said
from writesae.verdict.format import number, percent
from writesae.verdict.judge import Verdict
from writesae.verdict.names import DEFINITIONS, NAMES, SCALE_DEFINITIONS, SCALE_NAMES
from writesae.verdict.paper import Outcome

Choice = Literal["dominant", "own"]
CHOICES: dict[str, str] = {
    "dominant": "the dominant atom of the position (the paper's test)",
    "own": "the atom whose firing was drawn, however small its activation",
}

RELEVANT = 0.1
"""Distance of a win rate from 1/2 from which on it matters, and margin by which a control may be worse."""

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


class Exchange(NamedTuple):
    """What is written at the firings of one sequence."""

    site: Site
    native: LowRank
    """N = firings."""
    atom: LowRank
    """As the decoder has it, at activation 1."""
    activation: Tensor
    """[N]"""
    controls: dict[str, LowRank]
    """Directions, and baselines at their own size, before they are scaled."""
    conditions: Sequence[Condition] = ()
    """All conditions, scaled."""

    @property
    def positions(self) -> list[int]:
        """Token t of each firing."""
        return self.site.rows["position"].tolist()


@dataclass(frozen=True, kw_only=True)
class Substitution(Evaluation):
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
    firings_per_atom: int = 10
    """At most this many firings of an atom, dealt over sequences."""
    atoms: tuple[int, ...] | None = None
    """A hand-picked list instead of a draw. Conclusions then hold for these atoms only."""
    atom_choice: tuple[Choice, ...] = ("dominant", "own")
    """Atom that is written, in tests side by side; the first one is the headline."""
    positions: Literal["firing", "silent"] = "firing"
    """Where: at the firings, or (a null) at random positions of the same sequences where the atom is silent, with the
    activation of the firing."""
    write: WriteKind = "additive"
    """The native write: k_t u_t^T, keeping the erase (the paper's), or k_t u~_t^T, which takes the erase along."""
    scales: tuple[Scale, ...] = ("coefficient", "matched", "common")
    """How what is written is scaled; the first one is the headline's. Directions have the norm of the atom; baselines
    are scaled in the same way as the atom is, from a size of their own."""
    controls: tuple[str, ...] = (*CONTROLS, *REFERENCES)
    """Controls and references to run. Directions are not run at the scale "common"."""
    n_codes: int | None = None
    """Native writes that `drawn` draws, and codes of `quantised`. None: as many as the dictionary has atoms."""
    pca_components: int = 4
    """Principal components of `pca`."""
    horizon: int = 16
    """KL is averaged over t..t+horizon, both included. Firings closer to the end are left out."""
    first_position: int = 1
    """Firings before this token are left out: at token 0 the state holds nothing but the write itself."""
    last_position_firings: int | None = 100
    """Firings, drawn from those tested, that are run on to the last token of the sequence and measured there too, at
    many times the cost. None: all firings; 0: none."""
    alive_tokens: int = 65_536
    """An atom is alive if it fires on the first so many evaluation tokens (all, where there are fewer)."""
    min_firings: int = 1
    """Firings on those tokens that make an atom alive."""
    mean_write_sequences: int = 16
    """Sequences from which the head's mean write and half-life are estimated."""
    mean_write_energy: float = 0.99
    """The mean write is kept as the fewest rank-1 terms that hold this share of its squared norm."""

    kind: ClassVar[str] = "substitution"
    question: ClassVar[str] = "Can an atom stand in for the write it replaces?"
    answers: ClassVar[tuple[int, ...]] = (1, 2, 3, 5, 11, 12, 13, 14)
    min_sequences: ClassVar[int] = 1
    at_least: ClassVar[dict[str, float]] = {
        "n_atoms": 1,
        "firings_per_atom": 1,
        "horizon": 1,
        "first_position": 0,
        "last_position_firings": 0,
        "alive_tokens": 1,
        "min_firings": 1,
        "mean_write_sequences": 1,
        "n_codes": 1,
        "pca_components": 1,
    }
    choices: ClassVar[dict[str, tuple[str, ...]]] = {
        "atom_choice": tuple(CHOICES),
        "positions": ("firing", "silent"),
        "write": ("additive", "corrected"),
        "scales": SCALES,
        "controls": (*CONTROLS, *REFERENCES),
    }
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
            "kl_window": "nats, mean over t..t+horizon of KL(native || edited)",
            "kl_at": "nats, at t",
            "kl_next": "nats, at t + 1",
            "kl_last": "nats, at the last token (missing for firings that were not run to the end)",
            **{name: "the same for KL(edited || native)" for name in KL_METRICS if name.startswith("reverse")},
        },
        "example": {
            "firing": "number of the firing, of the headline's choice: the one whose deletion has the largest effect",
            "text": "the sentence; the edited token is in brackets, and the prediction is the one made at the bar",
            "read_at": "tokens after t at which the prediction is made",
            "condition": "what is written at t",
            "word": "a next token, of those whose probability the deletion changes most",
            "probability": "of this next token",
        },
    }

    def __post_init__(self) -> None:
        if isinstance(self.atom_choice, str):
            object.__setattr__(self, "atom_choice", (self.atom_choice,))
        super().__post_init__()
        for name in ("scales", "atom_choice"):
            if not getattr(self, name):
                raise ValueError(f"{name} must name at least one of {', '.join(self.choices[name])}")
        if not 0 < self.mean_write_energy <= 1:
            raise ValueError(f"mean_write_energy is a share in (0, 1], found {self.mean_write_energy}")
        if self.atoms is not None and (not self.atoms or len(set(self.atoms)) != len(self.atoms)):
            raise ValueError(f"atoms names each atom once, and at least one; found {list(self.atoms)}")

    @property
    def shortest(self) -> int:
        return self.first_position + self.horizon + 1

    def scales_of(self, choice: str) -> tuple[Scale, ...]:
        """Scales at which a choice of atom is run: the headline at all, what stands beside it at the first one."""
        return self.scales if choice == self.atom_choice[0] else self.scales[:1]

    def written(self, choice: str) -> list[tuple[str, str]]:
        """Condition and scale of all that is written at each firing of a choice, in order."""
        scaled = [(n, scale) for scale in self.scales_of(choice) for n in ("atom", *written_at(scale, self.controls))]
        return [("native", "none"), ("delete", "none"), *scaled]

    # -- measuring

    def measure(self, lab: Lab) -> dict[str, pd.DataFrame]:
        tables = []
        for choice in self.atom_choice:
            exchanges = self.exchanges(lab, self.draw(lab, choice), self.scales_of(choice))
            tables += [self._measured(lab, exchange).assign(choice=choice) for exchange in exchanges]
        firings = pd.concat(tables, ignore_index=True)
        return {"firings": firings, "example": self._example(lab, firings)}

    def _example(self, lab: Lab, firings: pd.DataFrame) -> pd.DataFrame:
        """The firing of the headline whose deletion moves the model most, in words."""
        deleted = firings[(firings["choice"] == self.atom_choice[0]) & (firings["condition"] == "delete")]
        row = deleted.loc[[deleted["kl_window"].idxmax()]]
        draw, scale = (
            self.draw(lab, self.atom_choice[0]),
            self.scales[0] if self.scales[0] != "common" else "coefficient",
        )
        of_row = (draw.table["sequence"] == row["sequence"].item()) & (draw.table["firing"] == row["firing"].item())
        (exchange,) = self.exchanges(lab, draw._replace(table=draw.table[of_row]), (scale,))
        named = {each.name: each for each in exchange.conditions}
        trials = [
            Trial({"condition": name}, exchange.positions[0], edit)
            for name in ("delete", "atom", "token_mean")
            if name in named
            for edit in edits_of(lab, named[name], exchange.native, exchange.positions, self.write)
        ]
        words = changed_words(lab, exchange.site, trials, self.horizon + 1)
        lab.count_edited_runs(-len(trials) - 1)  # a reader counts conditions, not this
        return words.assign(firing=row["firing"].item())

    def draw(self, lab: Lab, choice: str) -> FiringDraw:
        """The firings that are tested, the same for the same settings, whatever else is run. The column `to_end` says
        which of them are followed to the end of their sequence."""
        rng = np.random.default_rng(self.seed)
        draw = draw_firings(
            lab.firings(),
            rng,
            horizon=self.horizon,
            n_atoms=self.n_atoms,
            firings_per_atom=self.firings_per_atom,
            atoms=self.atoms,
            first_position=self.first_position,
            alive_tokens=self.alive_tokens,
            min_firings=self.min_firings,
            written="dominant" if choice == "dominant" else "own",
            silent=self.positions == "silent",
        )
        lab.facts |= {
            "n_alive": len(draw.alive),
            "alive_tokens": draw.alive_tokens,
            "n_testable": draw.n_testable,
        }
        n = len(draw.table)
        n_last = n if self.last_position_firings is None else self.last_position_firings
        return draw._replace(table=draw.table.assign(to_end=rng.permutation(n) < n_last))

    def exchanges(self, lab: Lab, draw: FiringDraw, scales: Sequence[Scale] | None = None) -> Iterator[Exchange]:
        """The conditions of each sequence that has firings, one sequence at a time, at all scales by default. Cost: one
        plain forward each, two where a scale is "common"."""
        scales = self.scales if scales is None else scales
        sequences = range(min(self.mean_write_sequences, len(lab.tokens)))
        profile = head_profile(map(lab.recurrence, sequences), self.write, self.mean_write_energy)
        lab.facts |= {
            "half_life": profile.half_life,
            "half_life_limit": profile.half_life_limit,
            "mean_write_rank": profile.mean_write.rank,
        }
        factors: dict[int, dict[str, float]] = {}
        if "common" in scales:
            factors = self._common(lab, self._unscaled(lab, draw, profile.mean_write))
        for each in self._unscaled(lab, draw, profile.mean_write):
            of_sequence = factors.get(each.site.sequence)
            listed = conditions(each.native, each.atom, each.activation, each.controls, scales, of_sequence)
            yield each._replace(conditions=listed)

    def _unscaled(self, lab: Lab, draw: FiringDraw, mean: LowRank) -> Iterator[Exchange]:
        for site in lab.sites(draw.table, self.kind):
            if self.write != "additive":
                site = site._replace(writes=head_writes(site.recurrence, 0, self.write))
            native = site.writes.rows(site.rows["position"].tolist())
            atom = lab.atoms(site.rows["written_atom"].to_numpy()).to(native.values)
            activation = torch.tensor(site.rows["activation"].to_numpy()).to(native.values)
            fitted = None
            if set(self.controls) & set(BASELINES):
                fitted = lab.baselines(site.sequence, self.write, n_codes=self.n_codes, components=self.pca_components)
                lab.facts |= {"baseline_tokens": len(fitted.writes), "n_codes": len(fitted.drawn)}
            controls = control_directions(
                lab, site, site.rows, atom, self.controls, alive=draw.alive, mean=mean, native=native, baselines=fitted
            )
            yield Exchange(site, native, atom, activation, controls)

    def _common(self, lab: Lab, exchanges: Iterator[Exchange]) -> dict[int, dict[str, float]]:
        """The factors of the scale "common" by sequence, of the atom and of each baseline."""
        rows = []
        for each in exchanges:
            own = {"atom": each.atom * each.activation} | {n: m for n, m in each.controls.items() if n in BASELINES}
            for name, matrix in own.items():
                inner, square = float(matrix.inner(each.native).sum()), float(matrix.inner(matrix).sum())
                rows.append((each.site.sequence, name, inner, square))
        products = pd.DataFrame(rows, columns=["sequence", "condition", "inner", "square"])
        fold = folds(products["sequence"].to_numpy(), self.seed)
        needed = "the scale 'common' is fitted on other sequences than it is used on, and all firings are in one"
        lab.require(len(fold) > 1, f"{needed}; give more text, or leave it out of scales")
        factors = common_factors(products, fold)
        return {sequence: factors[half] for sequence, half in fold.items()}

    def _measured(self, lab: Lab, exchange: Exchange) -> pd.DataFrame:
        site, native = exchange.site, exchange.native
        described = site.rows.assign(
            cosine=exchange.atom.cosine(native).cpu().numpy(), write_norm=native.norm().cpu().numpy()
        )
        rows = cast(list[dict[str, object]], described.to_dict("records"))
        trials: list[Trial] = []
        for condition in exchange.conditions:
            edits = edits_of(lab, condition, native, exchange.positions, self.write)
            written = condition.written
            sizes = [0.0] * len(rows) if written is None else written.norm().cpu().tolist()
            for row, position, edit, size in zip(rows, exchange.positions, edits, sizes):
                named = row | {"condition": condition.name, "scale": condition.scale, "norm": size}
                trials.append(Trial(named, position, edit))
        parts = []
        for to_end, window in ((False, self.horizon + 1), (True, None)):
            of_kind = [trial for trial in trials if trial.row["to_end"] == to_end]
            if of_kind:
                parts.append(lab.read(site, of_kind, kl_metrics(self.horizon, to_end), window))
        return pd.concat(parts, ignore_index=True)

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


def headline_share(result: Result) -> float:
    """The recovered share of the headline's atom; -inf where no deletion has an effect."""
    wide = wide_firings(result)
    total, scale = float(wide["delete"].sum()), cast(Substitution, result.evaluation).scales[0]
    return 1 - float(wide[f"atom/{scale}"].sum()) / total if total > 0 else -np.inf


def wide_firings(result: Result, metric: str = "kl_window", choice: str | None = None) -> pd.DataFrame:
    """One row per firing where `metric` was measured: its description, and one column per condition and scale
    ("atom/matched", "delete")."""
    if metric not in KL_METRICS:
        raise ValueError(f"metric must be one of {', '.join(KL_METRICS)}, found {metric!r}")
    table = result.tables["firings"]
    table = table[table["choice"] == (choice or table["choice"].iloc[0])]
    names = (table["condition"] + "/" + table["scale"]).str.removesuffix("/none")
    units = ["firing", "sequence", "position", "atom", "written_atom", "activation", "cosine", "write_norm"]
    values = table.assign(name=names).pivot(index="firing", columns="name", values=metric)
    described = table[units].groupby("firing").first()
    return described.join(values, how="inner").dropna(subset=["delete"]).reset_index()


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
