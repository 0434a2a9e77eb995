"""Which atoms point along the writes they fire on: the paper's partition into registers and bundles, with its nulls.

Source: WriteSAE (arXiv 2605.12770), section on the partition.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, cast

import numpy as np
import pandas as pd
import torch
from scipy.stats import ks_2samp

from sae_lens_writesae.atom.low_rank import LowRank
from writesae.evaluations.substitution import RELEVANT, Substitution, wide_firings
from writesae.experiment.conditions import CONTROLS
from writesae.experiment.cosines import SIDES, firing_cosines
from writesae.experiment.evaluation import Evaluation, Result, described
from writesae.experiment.lab import Lab
from writesae.experiment.pca import fit_pca
from writesae.files import Json
from writesae.verdict import figures
from writesae.verdict import statistics as stats
from writesae.verdict.finding import Against, Claim, Figure, Finding, Paired, said
from writesae.verdict.format import percent, points, signed
from writesae.verdict.judge import Verdict, judge
from writesae.verdict.mixtures import COLUMNS as MIXTURE_COLUMNS
from writesae.verdict.mixtures import fisher_z, fit_mixtures
from writesae.verdict.paper import Outcome
from writesae.verdict.statistics import Estimate

SAMPLES: dict[str, str] = {"cosine": "atoms", "shuffled": "shuffled", "random": "random"}
"""Columns of the table `atoms` that hold medians of cosines, and the names of these samples in the other tables."""

STRONG = 10.0
"""Difference of BIC that counts as very strong evidence (Kass and Raftery, 1995)."""

RELEVANT_COSINE = 0.05
"""Gain in cosine over shuffled positions from which on atoms point along their writes. It is the
cosine from which on the paper calls an atom a register."""

RULES = ("Gated DeltaNet", "RWKV-7", "Mamba-2")
"""Update rules in the order of their registers' alignment, as the paper has it."""

_KINDS = ("register", "bundle")


@dataclass(frozen=True, kw_only=True)
class Partition(Evaluation):
    """For each alive atom, the median over its firings of the signed cosine cos(v_i, k_t) cos(w_i, u_t) between the
    atom and the native write. An atom is a **register** from 0.05 on and a **bundle** below. Whether there are two
    kinds at all is asked of Gaussian mixtures (1 to 4 components, BIC). Three nulls say what a dictionary without such
    atoms would show: `shuffled`, the writes of other positions of the same sequence; `random`, a random direction in
    the atom's place; and `untrained`, what as many random directions show where they fire, because an atom fires where
    its product with the write is large, learned or not.

    **Verdict of claim 6**, "atoms part into registers and bundles", by these rules in order:

    1. *not tested*: there are fewer than `min_atoms` alive atoms, or all cosines are alike.
    2. *fails*: on the cosines, BIC is lowest at another number of components than 2, or at 2 by less than 10 under
       that of one.
    3. *confounded*: the shuffled null, too, takes more than one component by at least 10, or the share of atoms at the
       threshold or above is no higher than in the shuffled null (by the ladder of `judge`, over atoms).
    4. *holds* otherwise.

    A claim of this project, "atoms point along the writes they fire on": the ladder of `judge` on the median over atoms
    of (cosine - shuffled), chance 0, a gain of 0.05 matters, against an untrained dictionary at its own firings
    (cosine - untrained).

    **Verdict of claim 4**, "register and bundle alike", from a substitution test of as many registers as bundles, each
    writing its own atom: the outcome is *below the floor*, *inconclusive*, *confounded* or *undecided* where that test
    is, or where `judge` finds so for one kind (its win rate against deletion over atoms, chance 1/2). It fails where a
    kind does not beat deletion. Else it holds where the 95 % interval of the difference of the two rates lies within 10
    points of zero, fails where it lies beyond, and is inconclusive where it reaches from one to the other: no
    difference found is no sameness shown.

    **Verdict of claim 26**, that registers point along their writes and the first principal component of the head's
    writes (centred, of `pca_writes` writes of the same text) does not: the ladder of `judge` on the median over
    registers of (cosine - pca), chance 0, a gain of 0.05 matters. **Verdict of claim 27**, over results of several
    update rules: it holds where every pair of rules differs by a Kolmogorov-Smirnov test of their atoms' cosines
    (Holm-adjusted p < 0.05) and the registers' medians have the paper's order; it is confounded where the cosines at
    shuffled positions do the same, and fails otherwise.
    """

    alive_tokens: int = 65_536
    """Aliveness is counted on the first so many evaluation tokens (all, where there are fewer)."""
    min_firings: int = 5
    """Firings on those tokens that make an atom alive; a median over fewer says little."""
    threshold: float = 0.05
    """Cosine from which on an atom is a register (the paper's operational rule)."""
    sweep: tuple[float, ...] = (0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.09, 0.10)
    """Thresholds at which atoms are counted beside it."""
    components: int = 4
    """Largest mixture that is fitted."""
    restarts: int = 3
    """Starts of each fit; the likeliest is kept."""
    min_atoms: int = 20
    """Alive atoms without which no claim is tested."""
    tested_atoms: int = 16
    """Atoms of each kind whose substitution is tested, drawn uniformly (claim 4). 0: none."""
    firings_per_atom: int = 4
    """Firings of each of these atoms."""
    controls: tuple[str, ...] = ("random", "state", "mean")
    """Controls of that test."""
    pca_writes: int = 1024
    """Native writes that the first principal component is fitted to."""

    kind: ClassVar[str] = "partition"
    question: ClassVar[str] = "Do atoms point along the writes they fire on, and are there two kinds?"
    answers: ClassVar[tuple[int, ...]] = (4, 6, 26, 27)
    at_least: ClassVar[dict[str, float]] = {
        "alive_tokens": 1,
        "min_firings": 1,
        "components": 1,
        "restarts": 1,
        "min_atoms": 1,
        "firings_per_atom": 1,
        "tested_atoms": 0,
        "pca_writes": 2,
    }
    choices: ClassVar[dict[str, tuple[str, ...]]] = {"controls": CONTROLS}
    columns: ClassVar[dict[str, dict[str, str]]] = {
        "atoms": {
            "atom": "index of an alive atom",
            "firings": "firings that the medians are over",
            "cosine": "median cosine of the atom and the native write over the atom's firings",
            "shuffled": "the same with writes of other positions of the same sequence",
            "random": "the same firings with a random direction in the atom's place",
            "untrained": "the same tokens with what an untrained dictionary of as many atoms fires there",
            "z": "Fisher's z of the cosine",
            "kind": "register (cosine >= threshold) or bundle",
            "key": "median |cosine| of the key sides of atom and write over the firings",
            "value": "the same of the value sides",
            "shuffled_key": "|cosine| of the key sides with writes of other positions of the same sequence",
            "shuffled_value": "the same of the value sides",
            "pca": "median cosine of the first principal component of the head's writes and the write, at the firings",
        },
        "mixtures": {
            "sample": "atoms, shuffled or random",
            "space": "cosine or z (Fisher's)",
            "components": "components of the mixture",
            "component": "number of the component, by its mean",
            "weight": "share of the component",
            "mean": "mean of the component",
            "sd": "standard deviation of the component",
            "bic": "BIC of the mixture; lower is better",
            "best": "whether this mixture has the lowest BIC of its sample and space",
        },
        "sweep": {
            "threshold": "cosine from which on an atom counts as a register",
            "sample": "atoms, shuffled or random",
            "registers": "atoms at or above the threshold",
            "share": "the same as a share of alive atoms",
        },
        "substitution": {
            "scale": "scale of the substitution test",
            "kind": "register or bundle",
            "rate": "share of firings on which the atom is nearer to native than deletion",
            **described("low high"),
            "n": "firings",
            "n_atoms": "atoms",
            "by_firings": "the rate with each atom weighted by how often it fires on the text",
        },
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, values in (("threshold", (self.threshold,)), ("sweep", self.sweep)):
            if wrong := [x for x in values if not -1 <= x <= 1]:
                raise ValueError(f"{name} holds cosines between -1 and 1, found {wrong[0]}")

    @property
    def substitution(self) -> Substitution:
        """The test of claim 4, without its atoms. The claim is about atoms of either kind and not about those that
        dominate a position, so that each firing's own atom is written."""
        return Substitution(
            atom_choice=("own",),
            firings_per_atom=self.firings_per_atom,
            scales=("coefficient",),
            controls=self.controls,
            last_position_firings=0,
            alive_tokens=self.alive_tokens,
            seed=self.seed,
            rows_per_run=self.rows_per_run,
        )

    # -- measuring

    def measure(self, lab: Lab) -> dict[str, pd.DataFrame]:
        firings = lab.firings()
        alive_tokens = min(self.alive_tokens, lab.tokens.numel())
        alive, ever = firings.alive(alive_tokens, self.min_firings), firings.alive(alive_tokens)
        lab.require(
            len(alive) > 0,
            f"no atom is alive: {len(ever)} of {firings.n_atoms} fire on {alive_tokens:,} tokens, none of them "
            f"{self.min_firings} times; give more tokens, or lower min_firings",
        )
        cosines = firing_cosines(lab, alive, directions={"pca": first_component(lab, self.pca_writes)})
        lab.skipped["firings at zero writes"] += cosines.zero_writes
        lab.require(not cosines.table.empty, "no cosine is defined, though atoms are alive")
        atoms = self.atom_table(cosines.table)
        lab.skipped[f"atoms that fire fewer than {self.min_firings} times"] += len(ever) - len(alive)
        lab.skipped["alive atoms that are zero matrices, or fire at zero writes only"] += len(alive) - len(atoms)
        mixtures = self.mixture_table(atoms, lab)
        by_kind = self._tested(lab, atoms)
        # After the substitution test, which counts an atom as alive from its first firing on.
        lab.facts |= {"alive_tokens": alive_tokens, "n_alive": len(atoms), "dead": firings.n_atoms - len(ever)}
        return {"atoms": atoms, "mixtures": mixtures, "sweep": self.sweep_table(atoms), "substitution": by_kind}

    def atom_table(self, cosines: pd.DataFrame) -> pd.DataFrame:
        """Medians over firings, and the kind of each atom."""
        grouped = cosines.groupby("atom")[[*SAMPLES, "untrained", *SIDES, "pca"]]
        atoms = grouped.median().assign(firings=grouped.size()).reset_index()
        kind = np.where(atoms["cosine"] >= self.threshold, *_KINDS)
        return atoms.assign(z=fisher_z(atoms["cosine"]), kind=kind)

    def mixture_table(self, atoms: pd.DataFrame, lab: Lab | None = None) -> pd.DataFrame:
        """Mixtures of each sample; those that could not be fitted are counted in `lab.skipped`."""
        tables: list[pd.DataFrame] = []
        for column, sample in SAMPLES.items():
            for space, x in (("cosine", atoms[column].to_numpy()), ("z", fisher_z(atoms[column]))):
                fits = fit_mixtures(x, self.components, restarts=self.restarts, seed=self.seed)
                tables.append(fits.table.assign(sample=sample, space=space))
                if lab is not None and fits.skipped:
                    missing = self.components - len(set(fits.table["components"]))
                    lab.skipped[f"mixtures of the {sample} sample not fitted: {fits.skipped}"] += missing
        return pd.DataFrame(pd.concat(tables, ignore_index=True), columns=["sample", "space", *MIXTURE_COLUMNS])

    def sweep_table(self, atoms: pd.DataFrame) -> pd.DataFrame:
        """Atoms at or above each threshold, in each sample."""
        reached = {(t, sample): atoms[column] >= t for t in self.sweep for column, sample in SAMPLES.items()}
        rows = [(*key, each.sum(), each.mean()) for key, each in reached.items()]
        return pd.DataFrame(rows, columns=list(self.columns["sweep"]))

    def _tested(self, lab: Lab, atoms: pd.DataFrame) -> pd.DataFrame:
        """The table `substitution`, empty where a kind has fewer than two atoms that can be tested."""
        drawn = self._draw(lab, atoms)
        if not drawn:
            return pd.DataFrame(columns=list(self.columns["substitution"]))
        settings = replace(self.substitution, atoms=drawn)
        table, lab.facts["compared"] = compare_kinds(Result(settings, {}, settings.measure(lab)), atoms, self.seed)
        return table

    def _draw(self, lab: Lab, atoms: pd.DataFrame) -> tuple[int, ...]:
        """Up to `tested_atoms` of each kind that fire where they can be tested."""
        firings, test = lab.firings(), self.substitution
        inside = firings.position >= test.first_position
        inside &= firings.position < firings.n_positions - test.horizon
        testable = atoms[atoms["atom"].isin(np.unique(firings.atom[inside]))]
        rng, drawn = lab.rng(4), []
        for kind in _KINDS:
            of_kind = testable.loc[testable["kind"] == kind, "atom"].to_numpy()
            n = min(len(of_kind), self.tested_atoms)
            if n < 2:
                return ()
            drawn += rng.choice(of_kind, n, replace=False).tolist()
        return tuple(sorted(drawn))

    # -- judging

    def findings(self, result: Result) -> list[Finding]:
        """Claims 6, 4 and 26, and whether atoms point along their writes."""
        table = result.tables["atoms"]
        medians = {name: float(table[name].median()) for name in (*SAMPLES, "untrained", *SIDES)}
        atoms = Paired(table, ("atom",), self.seed)
        gain, untrained = (atoms.median("cosine", null) for null in ("shuffled", "untrained"))
        few = Verdict("not tested", f"{len(table)} alive atoms are too few.")
        aligned = Finding(
            claim="atoms point along the writes they fire on",
            effect=gain,
            what="the median gain in cosine over shuffled positions",
            against={"an untrained dictionary at its own firings": Against(untrained)},
            relevant=RELEVANT_COSINE,
            ruled=few if len(table) < self.min_atoms else None,
            shown={
                "atoms": atoms.median("cosine"),
                "shuffled null": atoms.median("shuffled"),
                "an untrained dictionary at its own firings": atoms.median("untrained"),
                "random null": atoms.median("random"),
            },
            write="{:.3f}".format,
            axis="median cosine",
            measured=f"{said(gain, signed)} over shuffled positions",
            controls=f"|cosine| of key sides {medians['key']:.2f} (shuffled {medians['shuffled_key']:.2f}), of value "
            f"sides {medians['value']:.2f} (shuffled {medians['shuffled_value']:.2f})",
            of="alive atoms",
        )
        claim = "registers point along their writes, the first principal component of writes does not"
        registers = Paired(table[table["kind"] == "register"], ("atom",), self.seed)
        if len(registers.wide) < 2:
            pca = Finding.untested(claim, "It needs two registers.", 26, "registers", len(registers.wide))
        else:
            lead = registers.median("cosine", "pca")
            component = "first principal component at the same firings"
            pca = Finding(
                number=26,
                claim=claim,
                effect=lead,
                what="the median lead of registers over the component",
                relevant=RELEVANT_COSINE,
                shown={"registers": registers.median("cosine"), component: registers.median("pca")},
                write=signed,
                axis="median cosine of registers",
                measured=f"lead {lead}",
                of="registers",
            )
        return [self._two_kinds(result), aligned, self._alike(result), pca]

    @classmethod
    def across(cls, results: list[Result]) -> list[tuple[str, Claim]]:
        """Claim 27, over all results of the rules that the paper orders, dictionaries of writes."""
        of_writes = [result for result in results if result.info["target"] == "write"]
        tables = {
            rule: pd.concat(parts, ignore_index=True)
            for rule in RULES
            if (parts := [result.tables["atoms"] for result in of_writes if result.info["rule"] == rule])
        }
        return [(", ".join(tables), _by_rule(tables).row())] if len(tables) > 1 else []

    def _two_kinds(self, result: Result) -> Finding:
        """Claim 6: the rules of the class's docstring, in order."""
        atoms, mixtures = result.tables["atoms"], result.tables["mixtures"]
        fitted = {
            (sample, space): _fitted(mixtures, sample, space)
            for sample in SAMPLES.values()
            for space in ("cosine", "z")
        }
        (best, gap), (null, null_gap) = fitted["atoms", "cosine"], fitted["shuffled", "cosine"]
        registers = atoms[atoms["kind"] == "register"]
        measured = f"{len(registers)} register / {len(atoms) - len(registers)} bundle / {result.info['dead']} dead"
        if len(registers):
            share = float(registers["firings"].sum() / atoms["firings"].sum())
            measured += f"; register median cosine {registers['cosine'].median():.3f}"
            measured += f"; registers make {percent(share)} of firings"
        above = {name: (atoms[name] >= self.threshold).astype(float) for name in SAMPLES}
        finding = Finding(
            number=6,
            claim="atoms part into registers and bundles",
            measured=measured,
            controls="; ".join(
                f"{name} null: {percent(above[name].mean())} at {self.threshold:g} or above, "
                f"BIC prefers {fitted[name, 'cosine'][0] or 'nothing'}"
                for name in ("shuffled", "random")
            ),
            n=len(atoms),
            of="alive atoms",
        )
        fit = (
            f"BIC prefers {best} component{'s' * (best != 1)} on the cosine (by {gap:.0f} over one) and "
            f"{fitted['atoms', 'z'][0]} on Fisher's z"
        )
        share = f"{percent(above['cosine'].mean())} of atoms reach {self.threshold:g}"
        excess = Paired(atoms[["atom"]].assign(**above), ("atom",), self.seed).mean("cosine", "shuffled")
        ladder = judge(excess, what="the share of registers beyond that at shuffled positions")
        difference = f"[{points(excess.low)}, {points(excess.high)}] points"
        if len(atoms) < self.min_atoms or best is None:
            text = f"{len(atoms)} alive atoms are too few, or too alike, to tell kinds apart."
            verdict = Verdict("not tested", text)
        elif best != 2 or gap < STRONG:
            text = f"{fit}, so the cosine does not part the atoms into two kinds; {share}."
            verdict = Verdict("fails", text)
        elif null_gap >= STRONG:
            text = f"{fit}, but at shuffled positions, where nothing can point along its write, it prefers {null}: a "
            verdict = Verdict("confounded", f"{text}mixture fits what is not normal, and shows no kinds.")
        elif ladder.outcome == "fails":
            text = f"{fit}, but shuffled positions give as many registers (difference {difference})."
            verdict = Verdict("confounded", text)
        else:
            text = f"{fit}; {share}, {difference} more than at shuffled positions."
            verdict = Verdict("holds", text) if ladder.outcome == "holds" else ladder
        return replace(finding, ruled=verdict)

    def _alike(self, result: Result) -> Finding:
        """Claim 4: both kinds beat deletion, and the interval of their difference lies within 10 points of zero."""
        claim, table = "register and bundle atoms substitute alike", result.tables["substitution"]
        compared = cast(Mapping[str, Mapping[str, float]], result.info.get("compared"))
        if set(table["kind"]) != set(_KINDS):
            kinds = result.tables["atoms"]["kind"].tolist()
            counts = " and ".join(f"{kinds.count(kind)} {kind}" for kind in _KINDS)
            reason = f"It needs two tested atoms of each kind; of the alive atoms there are {counts}."
            return Finding.untested(claim, reason, 4, "firings")
        rates = {
            str(row["kind"]): Estimate(row["rate"], row["low"], row["high"], row["n"], row["n_atoms"])
            for row in table.to_dict("records")
        }
        gap, test = compared["difference"], cast(Mapping[str, str], compared["verdict"])
        atoms = ", ".join(f"{rate.n_clusters} {kind} atoms" for kind, rate in rates.items())
        weighted = ", ".join(f"{row['kind']} {percent(row['by_firings'])}" for row in table.to_dict("records"))
        return Finding(
            number=4,
            claim=claim,
            ruled=alike_verdict(rates, (gap["low"], gap["high"]), test),
            chance=0.5,
            shown={kind: rates[kind] for kind in _KINDS},
            write=percent,
            axis="of firings nearer to the native model than after deletion",
            measured=f"{atoms}; difference [{points(gap['low'])}, {points(gap['high'])}] points, p = "
            f"{gap['p_value']:.2g}; weighted by firings: {weighted}",
            controls=f"those of the substitution test: {', '.join(self.controls)}",
            n=sum(rate.n for rate in rates.values()),
            of="firings, by atom",
        )

    def panels(self, result: Result) -> list[Figure]:
        """Cosines of atoms and nulls, BIC by components, registers by threshold."""
        atoms, mixtures, sweep = (result.tables[name] for name in ("atoms", "mixtures", "sweep"))
        colours, shares = {"atoms": "atom", "shuffled": "control", "random": "soft"}, np.linspace(0, 1, 21)
        lines = [
            figures.Line(name, shares.tolist(), np.quantile(atoms[column], 1 - shares).tolist(), colours[name])
            for column, name in SAMPLES.items()
        ]
        parts = {"Cosine of each atom with the writes it fires on": (lines, "share of alive atoms, best first")}
        bic = []
        for (sample, space), rows in mixtures.groupby(["sample", "space"], sort=False):
            each = rows.drop_duplicates("components")
            if sample != "random" and len(each) > 1:
                gap = np.maximum(each["bic"] - each["bic"].min(), 1).tolist()
                name, colour = (f"{sample}, z", "soft") if space == "z" else (str(sample), colours[str(sample)])
                bic.append(figures.Line(name, each["components"].tolist(), gap, colour))
        parts["BIC of Gaussian mixtures, less that of the best"] = (bic, "components")
        by_sample = sweep.sort_values("threshold").groupby("sample", sort=False)
        of_sweep = [
            figures.Line(str(sample), rows["threshold"].tolist(), rows["share"].tolist(), colours[str(sample)])
            for sample, rows in by_sample
        ]
        parts["Share of atoms at or above a threshold"] = (of_sweep, "threshold on the cosine")
        return [
            Figure(title, figures.curves(lines, axis, f"{title}: {result.label}", log_y=lines is bic))
            for title, (lines, axis) in parts.items()
            if lines
        ]

    def notes(self, result: Result) -> list[str]:
        """What alive means, and what a mixture can say."""
        info = result.info
        return [
            f"Alive: at least {self.min_firings} firings on {info['alive_tokens']:,} held-out tokens; "
            f"{info['n_alive']:,} of {info['d_sae']:,} atoms, and {info['dead']:,} never fire there.",
            "Two components of a mixture are no proof of two kinds: one skewed distribution is fitted by two "
            "Gaussians, too, which is why the nulls are fitted in the same way.",
        ]


@torch.no_grad()
def first_component(lab: Lab, n_writes: int) -> LowRank:
    """The first principal component (N = 1) of up to `n_writes` native writes of the first 16 sequences, turned so that
    its mean inner product with them is positive; zero where the writes do not vary. Memory: n_writes K V numbers."""
    writes = lab.native_writes(range(min(16, len(lab.tokens))))
    drawn = np.sort(lab.rng(12).choice(len(writes), min(n_writes, len(writes)), replace=False)).tolist()
    rows = writes.rows(drawn).dense()
    pca = fit_pca(rows.flatten(1), 1)
    if len(pca.components) == 0:
        return writes.rows([0]) * 0.0
    turned = pca.components[0] * torch.sign(pca.components[0] @ pca.mean)
    return LowRank.svd(turned.view(1, *rows.shape[1:]))


def _by_rule(tables: Mapping[str, pd.DataFrame]) -> Finding:
    """Claim 27 from the tables `atoms` of several rules, in the paper's order."""
    ordered, p_values, medians = {}, {}, {}
    for column in ("cosine", "shuffled"):
        pairs = itertools.combinations(tables, 2)
        tests = {f"{a} / {b}": float(ks_2samp(tables[a][column], tables[b][column]).pvalue) for a, b in pairs}  # pyright: ignore
        p_values[column] = stats.holm(tests)
        of_rule = [float(table.loc[table["kind"] == "register", column].median()) for table in tables.values()]
        falling = all(a > b for a, b in itertools.pairwise(of_rule))
        ordered[column] = max(p_values[column].values()) < 0.05 and falling
        medians[column] = ", ".join(f"{rule} {'–' if np.isnan(m) else f'{m:.3f}'}" for rule, m in zip(tables, of_rule))
    if ordered["cosine"] and ordered["shuffled"]:
        verdict = Verdict("confounded", "At shuffled positions the rules differ in the same way.")
    elif ordered["cosine"]:
        verdict = Verdict("holds", "Every pair of rules differs, in the paper's order.")
    else:
        verdict = Verdict("fails", "The rules do not all differ, or not in the paper's order.")
    return Finding(
        number=27,
        claim="alignment of registers falls with the rank of the write rule",
        ruled=verdict,
        measured=f"median cosine of registers: {medians['cosine']}; Kolmogorov-Smirnov, Holm-adjusted: "
        + ", ".join(f"{pair} p = {p:.2g}" for pair, p in p_values["cosine"].items()),
        controls=f"at shuffled positions: {medians['shuffled']}",
        n=sum(map(len, tables.values())),
        of="alive atoms",
    )


def _fitted(mixtures: pd.DataFrame, sample: str, space: str) -> tuple[int | None, float]:
    """Components of the mixture with the lowest BIC (None where none was fitted), and how much lower that is than the
    BIC of a single Gaussian."""
    rows = mixtures[(mixtures["sample"] == sample) & (mixtures["space"] == space)]
    if rows.empty:
        return None, 0.0
    best = rows.nsmallest(1, "bic").iloc[0]
    return int(best["components"]), float(rows.loc[rows["components"] == 1, "bic"].iloc[0] - best["bic"])


def compare_kinds(test: Result, atoms: pd.DataFrame, seed: int) -> tuple[pd.DataFrame, dict[str, Json]]:
    """Register against bundle in a substitution test.

    Args:
        test: of the kind "substitution", of some of `atoms`.
        atoms: the table `atoms` of a partition.

    Returns: the table `substitution`, and the verdict of the test with the difference of the kinds.
    """
    settings = cast(Substitution, test.evaluation)
    wide, scale, known = wide_firings(test), settings.scales[0], atoms.set_index("atom")[["kind", "firings"]]
    wins = wide[["written_atom"]].assign(win=wide[f"atom/{scale}"] < wide["delete"])
    wins = wins.join(known, on="written_atom", how="inner")
    of_kind = {kind: Paired(wins[wins["kind"] == kind], ("written_atom",), seed) for kind in _KINDS}
    rows = []
    for kind, each in of_kind.items():
        if each["written_atom"].nunique() > 1:  # a single atom says nothing about others
            of_atom = each.wide.groupby("written_atom").agg(win=("win", "mean"), firings=("firings", "first"))
            by_firings = np.average(of_atom["win"], weights=of_atom["firings"])
            rows.append((scale, kind, *each.mean("win"), by_firings))
    verdict = settings.nearer(wide, scale).verdict
    facts: dict[str, Json] = {
        "verdict": {"outcome": verdict.outcome, "sentence": verdict.sentence},
        "without_kind": int(wide["written_atom"].nunique() - wins["written_atom"].nunique()),
    }
    if len(rows) == len(_KINDS):
        register, bundle = of_kind.values()
        samples = (register["win"], bundle["win"], register["written_atom"], bundle["written_atom"])
        difference = register.lead("win", bundle)
        ends = {name: getattr(difference, name) for name in ("mean", "low", "high")}
        facts["difference"] = ends | {"p_value": stats.permutation_test(*samples, seed=seed).p_value}
    return pd.DataFrame(rows, columns=list(Partition.columns["substitution"])), facts


def alike_verdict(rates: Mapping[str, Estimate], gap: tuple[float, float], test: Mapping[str, str]) -> Verdict:
    """The outcome of claim 4 from the win rate of each kind, the interval of their difference, and the verdict on all
    tested firings."""
    kinds = {
        kind: judge(rate, chance=0.5, relevant=RELEVANT, what=f"the win rate of {kind} atoms against deletion")
        for kind, rate in rates.items()
    }
    verdicts = [Verdict(cast(Outcome, test["outcome"]), test["sentence"]), *kinds.values()]
    for outcome in ("below the floor", "inconclusive", "confounded", "undecided"):
        if stops := [each for each in verdicts if each.outcome == outcome]:
            return stops[0]
    if failed := [kind for kind, each in kinds.items() if each.outcome == "fails"]:
        return Verdict("fails", f"Deletion is not beaten by {' and '.join(failed)} atoms.")
    (low, high), both, size = gap, "Both kinds beat deletion", percent(RELEVANT)
    if low >= -RELEVANT and high <= RELEVANT:
        return Verdict("holds", f"{both}, and differ by no more than {size}.")
    if low > RELEVANT or high < -RELEVANT:
        return Verdict("fails", f"{both}, but not alike: they differ by more than {size}.")
    reach = f"an interval of their difference of [{points(low)}, {points(high)}] points"
    return Verdict("inconclusive", f"{both}, but {reach} shows neither sameness nor a difference of {size}.")
