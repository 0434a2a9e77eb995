"""The substitution test: exchange one write of one head for an atom, or for a control, and see what the model says.

Source: WriteSAE (arXiv 2605.12770), section 4.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
from writesae.experiment.evaluation import Evaluation
from writesae.experiment.example import changed_words
from writesae.experiment.firings import FiringDraw, draw_firings, folds
from writesae.experiment.head import WriteKind, head_profile, head_writes
from writesae.experiment.head_baselines import BASELINES
from writesae.experiment.lab import Lab, Site, Trial
from writesae.experiment.readout import KL_METRICS, kl_metrics
from writesae.experiment.result import Claim, Figure, Result
from writesae.verdict import figures
from writesae.verdict import statistics as stats
from writesae.verdict.format import number, percent, span
from writesae.verdict.judge import Against, Verdict, judge
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

_NAMED = 6
"""Controls that the column of controls names, the best ones; the figures show all of them."""
_LINES = 5
"""Controls that are lines of one panel: more names do not fit beside it."""

_CLAIM_OF_RULE = {"Mamba-2": 11, "RWKV-7": 12, "DeltaNet": 13}
"""Rules for which the paper reports a substitution test of their own; for all others it is its first claim."""
_CLAIM_OF_MODEL = {"Qwen3.5-4B": 14}
"""Models of which the same is true, by a part of their name."""


_WORST_FIRST: tuple[Outcome, ...] = ("confounded", "undecided", "fails")


class Prepared(NamedTuple):
    """What is written at the firings of one sequence, before it is scaled."""

    site: Site
    native: LowRank
    """N = firings."""
    atom: LowRank
    """As the decoder has it, at activation 1."""
    activation: Tensor
    """[N]"""
    controls: dict[str, LowRank]
    """Directions, and baselines at their own size."""

    def products(self) -> pd.DataFrame:
        """What `common_factors` needs of this sequence: of the atom, and of each baseline."""
        own = {"atom": self.atom * self.activation} | {n: m for n, m in self.controls.items() if n in BASELINES}
        rows = [
            (self.site.sequence, name, float(matrix.inner(self.native).sum()), float(matrix.inner(matrix).sum()))
            for name, matrix in own.items()
        ]
        return pd.DataFrame(rows, columns=["sequence", "condition", "inner", "square"])


class Exchange(NamedTuple):
    """All conditions at the firings of one sequence."""

    site: Site
    native: LowRank
    """N = firings."""
    atom: LowRank
    """As the decoder has it, at activation 1."""
    conditions: list[Condition]

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
            "firing": "number of the firing within its choice, shared by all of its conditions",
            "sequence": "row of the evaluation tokens",
            "position": "token t that is edited",
            "atom": "atom whose firing was drawn",
            "written_atom": "atom that is written",
            "activation": "activation of the written atom",
            "cosine": "signed cosine of the written atom and the native write",
            "write_norm": "Frobenius norm of the native write",
            "condition": "what is written at t",
            "scale": "how the atom is scaled; none for native and delete",
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
            factors = self._common(lab, self._prepared(lab, draw, profile.mean_write))
        for site, native, atom, activation, controls in self._prepared(lab, draw, profile.mean_write):
            listed = conditions(native, atom, activation, controls, scales, factors.get(site.sequence))
            yield Exchange(site, native, atom, listed)

    def _prepared(self, lab: Lab, draw: FiringDraw, mean: LowRank) -> Iterator[Prepared]:
        for site in lab.sites(draw.table, self.kind):
            writes = site.writes if self.write == "additive" else head_writes(site.recurrence, 0, self.write)
            site = site._replace(writes=writes)
            native = writes.rows(site.rows["position"].tolist())
            atom = lab.atoms(site.rows["written_atom"].to_numpy()).to(native.values)
            activation = torch.tensor(site.rows["activation"].to_numpy()).to(native.values)
            fitted = None
            if set(self.controls) & set(BASELINES):
                fitted = lab.baselines(site.sequence, self.write, n_codes=self.n_codes, components=self.pca_components)
                lab.facts |= {"baseline_tokens": len(fitted.writes), "n_codes": len(fitted.drawn)}
            controls = control_directions(
                lab, site, site.rows, atom, self.controls, alive=draw.alive, mean=mean, native=native, baselines=fitted
            )
            yield Prepared(site, native, atom, activation, controls)

    def _common(self, lab: Lab, prepared: Iterator[Prepared]) -> dict[int, dict[str, float]]:
        """The factors of the scale "common" by sequence."""
        products = pd.concat([each.products() for each in prepared], ignore_index=True)
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

    def claims(self, result: Result) -> list[Claim]:
        """Claim 1 for every choice of atom and scale; claims 2 and 3 for the headline."""
        claims = []
        for choice in self.atom_choice:
            wide = wide_firings(result, choice=choice)
            for scale in self.scales_of(choice):
                headline = choice == self.atom_choice[0] and scale == self.scales[0]
                named = [] if choice == self.atom_choice[0] else [CHOICES[choice]]
                named += [] if scale == self.scales[0] else [f"at {SCALE_NAMES[scale]}"]
                claims.append(self._nearer(wide, scale, _claim_number(result) if headline else None, named))
        wide = wide_firings(result, choice=self.atom_choice[0])
        return [*claims, *self._chain(wide), *self._medians(wide)]

    def _nearer(self, wide: pd.DataFrame, scale: str, number_: int | None, named: Sequence[str]) -> Claim:
        """Claim 1 of one choice of atom at one scale; `named` says which, where it is not the headline."""
        verdict, rate, share = self.verdict(wide, scale)
        return Claim(
            number_,
            ", ".join(["an atom is nearer to the native write than deletion", *named]),
            f"recovers {percent(share.mean)} [{span(share.low, share.high)}]; wins {percent(rate.rate)} "
            f"[{span(*rate.over_clusters.interval)}]",
            rate.n,
            f"firings in {rate.over_clusters.n_clusters} sequences",
            self._controls_sentence(wide, scale),
            verdict.outcome,
            f"{verdict.sentence} {_floors(wide)}",
        )

    def verdict(self, wide: pd.DataFrame, scale: str) -> tuple[Verdict, stats.Rate, stats.Estimate]:
        """The ladder at one scale, with the win rate and the recovered share (NaN where no deletion has an effect)."""
        clusters, atom, deleted = wide["sequence"], wide[f"atom/{scale}"], wide["delete"]
        rate = stats.win_rate(atom, deleted, clusters)
        against: dict[str, Against] = {}
        if (deleted > 0).any():
            share = effect = stats.recovered_share(atom, deleted, clusters, seed=self.seed)
            for name in written_at(scale, self.controls):
                if name not in REFERENCES:
                    rival = wide[f"{name}/{scale}"]
                    ahead = stats.recovered_difference(atom, rival, deleted, clusters, seed=self.seed)
                    against[NAMES[name]] = Against(ahead)
        else:
            share = rate.over_clusters._replace(mean=np.nan, low=np.nan, high=np.nan)
            effect = share._replace(mean=0.0, low=0.0, high=0.0)  # of nothing, nothing is recovered
        verdict = judge(
            effect,
            against,
            typical=float(deleted.median()),
            floor=float(wide["native"].quantile(0.95)),
            relevant=RELEVANT_SHARE,
            large=True,
            what="the recovered share",
        )
        return verdict, rate, share

    def _controls_sentence(self, wide: pd.DataFrame, scale: str) -> str:
        """Each control's recovered share, the best one first, and how often the atom is the nearer of the two."""
        total = float(wide["delete"].sum())
        parts = []
        for name in written_at(scale, self.controls):
            rival = wide[f"{name}/{scale}"]
            share = 1 - float(rival.sum()) / total if total > 0 else np.nan
            ahead = percent(float((wide[f"atom/{scale}"] < rival).mean()))
            parts.append((share, f"{NAMES[name]} {percent(share)} (atom nearer at {ahead})"))
        listed = [text for _, text in sorted(parts, key=lambda p: -p[0])]
        more = f"; {len(listed) - _NAMED} more take back less" if len(listed) > _NAMED else ""
        return f"recovered: {', '.join(listed[:_NAMED])}{more}" if parts else ""

    def _chain(self, wide: pd.DataFrame) -> list[Claim]:
        scale = "matched" if "matched" in self.scales else self.scales[0]
        last = next((name for name in ("shuffled", "random") if f"{name}/{scale}" in wide), None)
        if last is None:
            return []
        rates = {
            name: stats.chain_rate(
                wide[f"atom/{scale}"],
                wide["delete"],
                wide[f"{name}/{scale}"],
                clusters=wide["sequence"],
            )
            for name in ("shuffled", "random")
            if f"{name}/{scale}" in wide
        }
        rate = rates[last]
        verdict = judge(
            rate.over_clusters,
            typical=float(wide["delete"].median()),
            floor=float(wide["native"].quantile(0.95)),
            chance=0.5,
            relevant=RELEVANT,
            what="the rate of the strict order",
        )
        other = ", ".join(f"atom < delete < {NAMES[n]} {percent(r.rate)}" for n, r in rates.items() if n != last)
        return [
            Claim(
                2,
                f"strict chain atom < delete < {NAMES[last]}, at {SCALE_NAMES[scale]}",
                f"{percent(rate.rate)} [{span(*rate.over_clusters.interval)}]",
                rate.n,
                f"firings in {rate.over_clusters.n_clusters} sequences",
                other,
                verdict.outcome,
                verdict.sentence,
            )
        ]

    def _medians(self, wide: pd.DataFrame) -> list[Claim]:
        scale = "matched" if "matched" in self.scales else self.scales[0]
        moved, unit = wide[wide["delete"] > 0], f"firings in {wide['sequence'].nunique()} sequences"
        if moved.empty:
            reason = "Every deletion has an effect of exactly 0, so that there is no ratio to one."
            claim = f"median KL of atom / delete, at {SCALE_NAMES[scale]}"
            return [Claim(3, claim, "–", len(wide), unit, "", "below the floor", reason)]
        names = ["delete", *(f"{n}/{scale}" for n in ("shuffled", "random") if f"{n}/{scale}" in wide)]
        atom = moved[f"atom/{scale}"]
        ratios = {
            name: stats.median_ratio(
                atom[moved[name] > 0],
                moved.loc[moved[name] > 0, name],
                moved.loc[moved[name] > 0, "sequence"],
                seed=self.seed,
            )
            for name in names
        }
        floor = float(wide["native"].quantile(0.95))
        others = {NAMES[n.split("/")[0]]: Against(_below_one(r)) for n, r in ratios.items() if n != "delete"}
        verdict = judge(
            ratios["delete"],
            others,
            typical=float(wide["delete"].median()),
            floor=floor,
            chance=1.0,
            less=True,
            relevant=RELEVANT,
            what="the median ratio of the atom's KL to deletion's",
        )
        medians = [f"{number(float(moved[n].median()))}" for n in (f"atom/{scale}", *names)]
        listed = " / ".join(["atom", *(NAMES[n.split("/")[0]] for n in names)])
        return [
            Claim(
                3,
                f"median KL of {listed}, at {SCALE_NAMES[scale]}",
                f"{' / '.join(medians)} nats; atom / delete {ratios['delete'].mean:.2f} "
                f"[{span(ratios['delete'].low, ratios['delete'].high, 1)}]",
                len(moved),
                f"firings in {ratios['delete'].n_clusters} sequences",
                f"no-op {number(floor)} nats (95th percentile)",
                verdict.outcome,
                verdict.sentence,
            )
        ]

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
            verdicts = [
                cast(Substitution, r.evaluation).verdict(wide_firings(r), cast(Substitution, r.evaluation).scales[0])
                for r in of_layer
            ]
            rates = pd.Series([rate.rate for _, rate, _ in verdicts])
            shares = pd.Series([share.mean for _, _, share in verdicts]).dropna()
            outcomes: list[Outcome] = [verdict.outcome for verdict, _, _ in verdicts]
            held = outcomes.count("holds")
            worst: list[Outcome] = [o for o in _WORST_FIRST if o in outcomes] or outcomes
            claim = Claim(
                5,
                "all heads of a layer",
                f"recovers {_over_heads(shares)}; wins {_over_heads(rates)} (SD over heads)",
                len(rates),
                "heads",
                f"confounded by a control on {outcomes.count('confounded')}",
                "holds" if held == len(rates) else worst[0],
                f"Claim 1 holds on {held} of {len(rates)} heads.",
            )
            claims.append((f"L{layer} {target}-trained", claim))
        return claims

    def summaries(self, result: Result) -> dict[str, pd.DataFrame]:
        """Every comparison by the headline metric, and the headline comparison by every metric."""
        by_metric = []
        for metric in KL_METRICS:
            if result.tables["firings"][metric].notna().any():
                table = comparisons(result, metric)
                by_metric.append(table[(table["a"] == "atom") & (table["b"] == "delete")].assign(metric=metric))
        return {
            **{f"comparisons, {choice} atom": comparisons(result, choice=choice) for choice in self.atom_choice},
            "atom against deletion, by metric": pd.concat(by_metric, ignore_index=True),
        }

    def notes(self, result: Result) -> list[str]:
        """Definitions of conditions and scales, and how long the head remembers."""
        life, limit = result.info["half_life"], result.info["half_life_limit"]
        more = " or more" if life == limit else ""
        listed = [f"{NAMES[n]}: {DEFINITIONS[n]}" for n in ("native", "delete", "atom", *self.controls)]
        scales = [f"{SCALE_NAMES[n]}: {SCALE_DEFINITIONS[n]}" for n in self.scales]
        notes = [
            f"A write of this head has lost half of its norm after {life} tokens{more} (median over writes).",
            "\n".join(["Conditions, which are written in the place of the native write:", *listed]),
            "\n".join(["Scales:", *scales]),
        ]
        if "baseline_tokens" in result.info:
            notes.append(
                f"Baselines were fitted on {result.fact('baseline_tokens'):,.0f} tokens of other text than they are "
                f"tested on; {result.fact('n_codes'):,.0f} writes were drawn, and as many codes fitted."
            )
        return notes

    @classmethod
    def front(cls, results: list[Result]) -> list[Figure]:
        """The recovered share of one atom of each dictionary, beside what needs no training, and one exchange in
        words."""
        settings = cast(Substitution, results[0].evaluation)
        scale, tables = settings.scales[0], [(result, wide_firings(result)) for result in results]
        tables = [(result, wide) for result, wide in tables if (wide["delete"] > 0).any()]
        if not tables:
            return []
        atoms = {result.label: _share(wide, f"atom/{scale}") for result, wide in tables}
        first = tables[0][1]
        rows = [figures.Row(f"atom, {label}", *share, colour="atom") for label, share in atoms.items()]
        rows += [
            figures.Row(NAMES[name], *_share(first, f"{name}/{scale}"))
            for name in BASELINES
            if f"{name}/{scale}" in first
        ]
        label, title = "share of the deletion's effect taken back", "One atom in the place of a write"
        caption = (
            "1 is the native model, 0 is a deleted write; a triangle lies further left. Grey: what needs no training, "
            f"at the firings of {tables[0][0].label}."
        )
        panel = Figure(title, figures.intervals(rows, label, title, least=-0.5), caption)
        return [panel, *_exchange_figure(max(results, key=headline_share))]

    def figures(self, result: Result) -> list[Figure]:
        """Recovered shares, win rates, divergences, ratios to deletion, quartiles of the effect, cosines; for every
        choice of atom."""
        panels = []
        for choice in self.atom_choice:
            wide = wide_firings(result, choice=choice)
            unbeaten = self.verdict(wide, self.scales[0])[0].unbeaten_controls
            panels += substitution_figures(self, result, wide, choice, unbeaten)
        return panels


def headline_share(result: Result) -> float:
    """The recovered share of the headline's atom; -inf where no deletion has an effect."""
    wide = wide_firings(result)
    total = float(wide["delete"].sum())
    scale = cast(Substitution, result.evaluation).scales[0]
    return 1 - float(wide[f"atom/{scale}"].sum()) / total if total > 0 else -np.inf


def _share(wide: pd.DataFrame, column: str) -> tuple[float, float, float]:
    share = stats.recovered_share(wide[column], wide["delete"], wide["sequence"])
    return share.mean, share.low, share.high


def _exchange_figure(result: Result) -> list[Figure]:
    """The example of a result as bars; nothing where it has none."""
    example = result.tables["example"]
    if example.empty:
        return []
    text, offset = str(example["text"].iloc[0]), int(example["read_at"].iloc[0])
    wide = example.pivot_table(index="word", columns="condition", values="probability", sort=False)
    bars = {NAMES[str(name)]: wide[name].tolist() for name in wide.columns}
    later = f", {offset} token{'s' * (offset > 1)} later" if offset else ""
    title = "One write exchanged, in words"
    return [
        Figure(
            title,
            figures.bars([repr(str(word))[1:-1] for word in wide.index], bars, "probability of the next token", title),
            f"{text} · The write at the token in brackets is exchanged; the next token is predicted at the bar{later}. "
            f"This is the firing of {result.label} whose deletion moves the model most.",
        )
    ]


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

    Returns: scale, a, b, the rate of a < b with both intervals, ties, n, recovered (share of the deletion's effect that
    a takes back) and gap (the same minus that of b) with their intervals, the paired median ratio, Cliff's delta, the
    paired sign rate, p-values, and `holm_p` over all rows.
    """
    settings = result.evaluation
    assert isinstance(settings, Substitution)
    wide, seed = wide_firings(result, metric, choice), settings.seed
    deleted, ids = wide["delete"], wide[cluster]
    rows = []
    for scale in settings.scales_of(choice or settings.atom_choice[0]):
        controls = written_at(scale, settings.controls)
        for a, b in [*((name, "delete") for name in ("atom", *controls)), *(("atom", name) for name in controls)]:
            x, y = wide[f"{a}/{scale}"], deleted if b == "delete" else wide[f"{b}/{scale}"]
            rate = stats.win_rate(x, y, ids)
            moved = (y > 0).to_numpy()  # a ratio to an effect of exactly 0 says nothing
            ratio = stats.median_ratio(x[moved], y[moved], ids[moved], seed=seed) if moved.any() else None
            row = {"scale": scale, "a": a, "b": b, "rate": rate.rate, "low": rate.over_clusters.low}
            row |= {"high": rate.over_clusters.high, "wilson_low": rate.wilson.low, "wilson_high": rate.wilson.high}
            row |= {"ties": rate.ties, "n": rate.n, "n_clusters": rate.over_clusters.n_clusters}
            shares = [None, None]
            if (deleted > 0).any():
                shares = [
                    stats.recovered_share(x, deleted, ids, seed=seed),
                    stats.recovered_difference(x, y, deleted, ids, seed=seed),
                ]
            for name, share in zip(("recovered", "gap"), shares):
                row |= dict(zip((name, f"{name}_low", f"{name}_high"), share[:3] if share else [np.nan] * 3))
            row |= dict(zip(("median_ratio", "ratio_low", "ratio_high"), ratio[:3] if ratio else [np.nan] * 3))
            row |= {"cliffs_delta": stats.cliffs_delta(x, y), "sign_rate": stats.paired_sign_rate(x, y)}
            row |= {"wilcoxon_p": stats.paired_wilcoxon(x, y).p_value}
            row |= {"sign_flip_p": stats.sign_flip_test(x, y, ids, seed=seed).p_value}
            rows.append(row)
    table = pd.DataFrame(rows)
    names = table["scale"] + "/" + table["a"] + "/" + table["b"]
    return table.assign(holm_p=list(stats.holm(dict(zip(names, table["sign_flip_p"]))).values()))


def _claim_number(result: Result) -> int:
    """Row of the paper's claims that a test of this model answers: by model, then by rule."""
    model, rule = str(result.info["model"]), str(result.info["rule"])
    return next((n for name, n in _CLAIM_OF_MODEL.items() if name in model), _CLAIM_OF_RULE.get(rule, 1))


def _floors(wide: pd.DataFrame) -> str:
    """How large a deletion's effect is, beside what rounding moves and what is of a practical size."""
    typical, no_op = float(wide["delete"].median()), float(wide["native"].quantile(0.95))
    small = f", below {number(PRACTICAL_FLOOR)}: of no practical size" if typical < PRACTICAL_FLOOR else ""
    return f"A deletion moves the model by a median of {number(typical)} nats (a no-op: {number(no_op)}){small}."


def _over_heads(values: pd.Series) -> str:
    return f"{percent(float(values.mean()))} ± {percent(float(values.std()))}"


def _below_one(ratio: stats.Estimate) -> stats.Estimate:
    """A ratio as a difference from 1, so that chance is 0."""
    return ratio._replace(mean=ratio.mean - 1, low=ratio.low - 1, high=ratio.high - 1)


def substitution_figures(
    settings: Substitution, result: Result, wide: pd.DataFrame, choice: str, unbeaten: Sequence[str]
) -> list[Figure]:
    """The panels of one choice of atom."""
    scale, name = settings.scales[0], f"{result.label}, {choice} atom"
    table = comparisons(result, choice=choice)
    floor = float(wide["native"].quantile(0.95))
    accents = [key for key, shown in NAMES.items() if shown in unbeaten]
    relative = []
    if (wide["delete"] > 0).any():  # a ratio to an effect of exactly 0 says nothing
        title = f"KL relative to deletion: {name}"
        relative.append(
            Figure(
                "The same against deletion",
                figures.boxes(_ratios(wide, scale), "KL over deletion's", accents, title, line=1.0),
                "Left of 1 is a win; how far left is how much of the deletion's effect is taken back.",
            )
        )
    against = table[table["b"] == "delete"]
    shares = []
    if against["recovered"].notna().any():
        shares.append(
            Figure(
                f"How much of a deletion's effect is taken back ({choice} atom)",
                figures.recovered_shares(against, accents, name),
                "Recovered share: 100 is the native model, 0 is deletion; triangles lie further to the left. Orange "
                "controls are not beaten by the atom at the first scale.",
            )
        )
    return [
        *shares,
        Figure(
            f"Does anything else do as well? ({choice} atom)",
            figures.win_rates(against, accents, name),
            "Share of firings on which each condition is nearer to the native model than deletion, by however little.",
        ),
        Figure(
            "How far each moves the model",
            figures.boxes(
                _of_scale(wide, scale), "KL from native, nats", accents, f"KL by condition: {name}", floor=floor
            ),
            "Median, quartiles and 5-95 % over firings.",
        ),
        *relative,
        Figure(
            "By the size of the effect",
            figures.quartiles(_strongest(wide, scale), wide["delete"], wide["sequence"], accents, name),
            f"A result that is real should be strongest in Q4. Of the controls, the {_LINES} that win most often.",
        ),
        Figure(
            "By the likeness of atom and write",
            figures.wins_by_cosine(wide["cosine"], wide[f"atom/{scale}"] < wide["delete"], wide["written_atom"], name),
            "At matched norm only a cosine above 1/2 (shaded) makes an atom nearer to the write than nothing is.",
        ),
    ]


def _of_scale(wide: pd.DataFrame, scale: str) -> dict[str, pd.Series]:
    """KL of the conditions at one scale, by condition."""
    return {c.removesuffix(f"/{scale}"): wide[c] for c in wide.columns if c.endswith(f"/{scale}") or c == "delete"}


def _strongest(wide: pd.DataFrame, scale: str) -> dict[str, pd.Series]:
    """The atom and those controls that beat deletion most often."""
    of_scale = _of_scale(wide, scale)
    controls = [name for name in of_scale if name not in ("atom", "delete", *REFERENCES)]
    controls.sort(key=lambda name: -float((of_scale[name] < wide["delete"]).mean()))
    return {name: of_scale[name] for name in ("atom", *controls[:_LINES])}


def _ratios(wide: pd.DataFrame, scale: str) -> dict[str, pd.Series]:
    moved = wide[wide["delete"] > 0]
    return {name: kl / moved["delete"] for name, kl in _of_scale(moved, scale).items() if name != "delete"}
