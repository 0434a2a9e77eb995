"""`writesae sweep`: one dictionary of a head at every point of a grid, the same evaluations of each, one table.

The paper's sweep of k (table 15), its comparison of architectures (figure 8) and its ladder of model sizes (figure 12)
are each one command:

    writesae sweep --k 16 32 64 --d-sae 2048
    writesae sweep --architecture writesae_batchtopk writesae_jumprelu
    writesae sweep --model Qwen/Qwen3.5-0.8B Qwen/Qwen3.5-4B --layer 9 12 --head 4 8 --dataset my-texts
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import pandas as pd
import torch

from sae_lens_writesae.evaluations import EVALUATIONS, load_result
from sae_lens_writesae.evaluations.substitution import Substitution, wide_firings
from sae_lens_writesae.experiment.evaluation import Scope
from sae_lens_writesae.experiment.lab import Lab
from sae_lens_writesae.experiment.reconstruction import reconstruction
from sae_lens_writesae.experiment.result import Result
from sae_lens_writesae.files import atomic_text
from sae_lens_writesae.page.report import find_results, write_report
from sae_lens_writesae.page.template import environment
from sae_lens_writesae.reproduce.config import Dictionary, ReproduceConfig
from sae_lens_writesae.reproduce.workspace import Trainer, Workspace
from sae_lens_writesae.sae.base import VARIANTS
from sae_lens_writesae.sae.target import Target
from sae_lens_writesae.verdict import figures
from sae_lens_writesae.verdict import statistics as stats

_FIT_SEQUENCES = 16
"""Evaluation sequences on which reconstruction is measured."""


class Point(NamedTuple):
    """One point of the grid: one dictionary."""

    model: str
    layer: int
    head: int
    target: Target
    architecture: str
    variant: str
    d_sae: int
    k: int
    seed: int

    @property
    def name(self) -> str:
        """What tells it from the other points of its head."""
        return f"{self.target}-{self.architecture}-{self.variant}-d{self.d_sae}-k{self.k}-seed{self.seed}"

    @property
    def folder(self) -> Path:
        """Its folder in the sweep."""
        return Path(self.model.replace("/", "-").strip(".-")) / f"L{self.layer}H{self.head}" / self.name

    @property
    def dictionary(self) -> Dictionary:
        """What a `Workspace` trains and evaluates."""
        return Dictionary(
            self.layer, self.head, self.target, "" if self.variant == "WriteSAE" else self.variant, self.seed
        )


class SweepFiles(NamedTuple):
    """What was written."""

    html: Path
    table: Path
    report: Path

    def __str__(self) -> str:
        return f"sweep    {self.html}\ntable    {self.table}\nclaims   {self.report}"


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Train one dictionary of a head at every point of a grid, run the same evaluations of each, and write one tidy
    table with a figure for each measure, and a page of all claims. The same command goes on where it was stopped."""

    model: tuple[str, ...] = ("embedded",)
    """Models: names on the hub, folders, or those that ship with the package."""
    layer: tuple[int, ...] = (2,)
    """Recurrent layer: one, or one for each model."""
    head: tuple[int, ...] = (1,)
    """Head: one, or one for each model."""
    target: tuple[Target, ...] = ("write",)
    """What dictionaries are trained on."""
    architecture: tuple[str, ...] = ("writesae_topk",)
    """Training architectures."""
    variant: tuple[str, ...] = ("WriteSAE",)
    """Of `sae_lens_writesae.VARIANTS`: encoder, decoder and rank."""
    d_sae: tuple[int, ...] = (256,)
    """Numbers of atoms."""
    k: tuple[int, ...] = (1, 4, 32)
    """Active atoms per token; architectures that have no k take no notice of it."""
    seed: tuple[int, ...] = (0,)
    """Seeds of training."""
    evaluation: tuple[str, ...] = ("substitution", "partition")
    """Evaluations of each dictionary; those that compare dictionaries cannot be swept."""
    training_tokens: int = 100_000
    """Tokens that each dictionary is trained on."""
    train_batch_size_tokens: int = 128
    """Rows of an optimizer step."""
    lr: float = 2e-3
    """Learning rate of Adam."""
    context_size: int = 128
    """Tokens per sequence."""
    dataset: str | None = None
    """Dataset on the hub with a `text` column, or a folder of one; None: the held-out text of this package."""
    eval_sequences: int = 64
    """Sequences that no dictionary is trained on."""
    n_atoms: int = 60
    """Atoms that an evaluation draws."""
    firings_per_atom: int = 5
    """Firings of each."""
    out: Path = Path("writesae-out/sweep")
    """Folder of the sweep."""

    def __post_init__(self) -> None:
        for name in ("layer", "head"):
            if len(getattr(self, name)) not in (1, len(self.model)):
                raise ValueError(f"{name} names one, or one for each of the {len(self.model)} models")
        if unknown := [each for each in self.variant if each not in VARIANTS]:
            raise ValueError(f"there is no variant {', '.join(unknown)}; there are {', '.join(VARIANTS)}")
        if unknown := [each for each in self.evaluation if each not in EVALUATIONS]:
            raise ValueError(f"there is no evaluation {', '.join(unknown)}; there are {', '.join(EVALUATIONS)}")
        if several := [each for each in self.evaluation if EVALUATIONS[each].scope not in (Scope.EACH, Scope.LAYER)]:
            raise ValueError(f"a sweep evaluates each dictionary by itself, which {', '.join(several)} cannot")
        points = list(self.points())
        if not points or len(set(points)) < len(points):
            raise ValueError("every axis of a sweep names at least one value, and each value once")

    def points(self) -> Iterator[Point]:
        """The grid, model by model."""
        n = len(self.model)
        places = zip(self.model, self.layer * (n // len(self.layer)), self.head * (n // len(self.head)))
        axes = (self.target, self.architecture, self.variant, self.d_sae, self.k, self.seed)
        for place in places:
            for rest in itertools.product(*axes):
                yield Point(*place, *rest)

    def config(self, point: Point) -> ReproduceConfig:
        """The settings of one point, as `writesae reproduce` has them."""
        return ReproduceConfig(
            model=point.model,
            layers=(point.layer,),
            heads=(point.head,),
            targets=(point.target,),
            losses=(),
            seeds=(point.seed,),
            variants=() if point.variant == "WriteSAE" else (point.variant,),
            variant_seeds=1,
            evaluations=self.evaluation,
            architecture=point.architecture,
            d_sae=point.d_sae,
            k=point.k,
            training_tokens=self.training_tokens,
            train_batch_size_tokens=self.train_batch_size_tokens,
            lr=self.lr,
            context_size=self.context_size,
            dataset=self.dataset,
            eval_sequences=self.eval_sequences,
            n_atoms=self.n_atoms,
            firings_per_atom=self.firings_per_atom,
            dashboards=0,
            settings={kind: {"label": point.name} for kind in self.evaluation},
        )

    def run(self, say: Callable[[str], object] = print, trainer: Trainer | None = None) -> SweepFiles:
        """Do what is not done, and write table and pages.

        Args:
            trainer: trains one dictionary; by default SAELens' runner.

        Raises:
            ValueError: a head that is not there, or a folder with other settings; before any training of that model.
        """
        rows: list[dict[str, object]] = []
        for _, of_model in itertools.groupby(self.points(), lambda point: point.model):
            points = list(of_model)
            shared = Workspace(self.config(points[0]), self.out / points[0].folder, trainer=trainer)
            shared.check()
            for point in points:
                config, folder = self.config(point), self.out / point.folder
                config.keep_in(folder)
                rows.append(self._row(shared.at(config, folder), point))
                say(f"{point.folder}: {', '.join(_said(rows[-1]))}")
        return self._write(pd.DataFrame(rows))

    def _row(self, work: Workspace, point: Point) -> dict[str, object]:
        """Train and evaluate one dictionary, where that is not done; its row of the table."""
        dictionary = point.dictionary
        own = work.folder / dictionary.key
        if not (own / "sae").exists():
            work.train(dictionary)
        row: dict[str, object] = {**point._asdict(), **fit_of(work, dictionary)}
        for kind in self.evaluation:
            if not (own / kind).exists():
                work.evaluate(kind, f"{dictionary.key}/{kind}", [dictionary])
            result = load_result(own / kind)
            if result.skipped is None and kind in MEASURES:
                for name, estimate in MEASURES[kind](result).items():
                    row |= {name: estimate.mean, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
            for claim in result.claims():
                if claim.number is not None:
                    row.setdefault(f"claim {claim.number}", claim.outcome)
        return row

    def _write(self, table: pd.DataFrame) -> SweepFiles:
        csv = atomic_text(self.out / "sweep.csv", table.to_csv(index=False))
        report = write_report(find_results([self.out]), self.out / "report.html", title="Claims at every point")
        varied = [axis for axis in Point._fields if table[axis].nunique() > 1]
        panels = [(MEASURE_NAMES[name], figure(table, name, varied)) for name in MEASURE_NAMES if name in table]
        columns = [column for column in table if column not in Point._fields or column in varied]
        page = environment().get_template("sweep.html").render(
            title="Sweep over " + (", ".join(varied) or "nothing"),
            fixed={axis: table[axis].iloc[0] for axis in Point._fields if axis not in varied},
            columns=columns,
            rows=table[columns].to_dict("records"),
            panels=panels,
        )  # fmt: skip
        return SweepFiles(atomic_text(self.out / "sweep.html", page), csv, report.html)


@torch.no_grad()
def fit_of(work: Workspace, dictionary: Dictionary) -> dict[str, float]:
    """How a dictionary fits its target and fires: share of variance, L0, shares of dead atoms and of tokens at which
    any atom fires."""
    tokens = work.tokens
    lab = Lab(work.model, {dictionary.label: work.sae(dictionary)}, tokens)
    fit = reconstruction(lab, range(min(_FIT_SEQUENCES, len(tokens))))[["explained", "l0"]].mean()
    firings = lab.firings()
    places = np.unique(firings.sequence * firings.n_positions + firings.position)
    dead = firings.n_atoms - len(firings.alive(tokens.numel()))
    share = len(places) / tokens.numel()
    return {
        "explained": float(fit["explained"]),
        "l0": float(fit["l0"]),
        "dead": dead / firings.n_atoms,
        "coverage": share,
    }


def substitution_measures(result: Result) -> dict[str, stats.Estimate]:
    """Recovered share and win rate of the headline atom, at the first scale."""
    test = cast(Substitution, result.evaluation)
    wide = wide_firings(result, choice=test.atom_choice[0])
    kl, deleted, sequence = wide[f"atom/{test.scales[0]}"], wide["delete"], wide["sequence"]
    measures = {"wins": stats.win_rate(kl, deleted, sequence, seed=test.seed).over_clusters}
    if (deleted > 0).any():
        measures = {"recovered": stats.recovered_share(kl, deleted, sequence, seed=test.seed)} | measures
    return measures


def partition_measures(result: Result) -> dict[str, stats.Estimate]:
    """Median cosine of registers, and shares of registers and bundles among all atoms (their counts over d_sae)."""
    atoms, d_sae = result.tables["atoms"], int(result.fact("d_sae"))
    measures: dict[str, stats.Estimate] = {}
    for kind in ("register", "bundle"):
        share = int((atoms["kind"] == kind).sum()) / d_sae
        measures[f"{kind}s"] = stats.Estimate(share, share, share, d_sae, d_sae)  # a count of this dictionary
    cosines = atoms.loc[atoms["kind"] == "register", "cosine"]
    if len(cosines) > 1:
        median = stats.estimate(cosines, np.arange(len(cosines)), statistic=stats.weighted_median)
        measures = {"register_cosine": median} | measures
    return measures


MEASURES: Mapping[str, Callable[[Result], dict[str, stats.Estimate]]] = {
    "substitution": substitution_measures,
    "partition": partition_measures,
}
"""What a sweep reads off a result in numbers; of any other evaluation it keeps the outcomes of claims."""
MEASURE_NAMES: Mapping[str, str] = {
    "recovered": "recovered share",
    "wins": "win rate against deletion",
    "register_cosine": "median cosine of registers",
    "registers": "share of atoms that are registers",
    "bundles": "share of atoms that are bundles",
}
"""Measures, as a reader meets them, in the order of the page."""


def figure(table: pd.DataFrame, measure: str, varied: list[str]) -> str:
    """One measure over the grid: lines over k or d_sae, where one of them varies, or else an interval for each point.
    Seeds are joined: their mean, and the range of their intervals."""
    axis = next((name for name in ("k", "d_sae") if name in varied), None)
    names = [name for name in varied if name not in (axis, "seed")]
    columns = [measure, f"{measure}_low", f"{measure}_high"]
    joined = (
        table.dropna(subset=[measure])
        .groupby([*names, *([axis] if axis else [])] or ["target"], sort=False)[columns]
        .agg({measure: "mean", f"{measure}_low": "min", f"{measure}_high": "max"})
        .reset_index()
    )
    title = f"{MEASURE_NAMES[measure]} over {axis or 'the grid'}"
    labels = joined[names].astype(str).agg(", ".join, axis=1) if names else pd.Series("all", index=joined.index)
    if axis is None:
        numbers = joined[columns].to_numpy().tolist()
        rows = [figures.Row(label, mean, low, high, "atom") for label, (mean, low, high) in zip(labels, numbers)]
        return figures.intervals(rows, MEASURE_NAMES[measure], title)
    lines = []
    for n, (label, part) in enumerate(joined.groupby(labels, sort=False)):
        part = part.sort_values(axis)
        x, (y, low, high) = part[axis].astype(float).tolist(), part[columns].to_numpy().T.tolist()
        lines.append(figures.Line(str(label), x, y, ("atom", "ink", "control", "soft")[n % 4], (low, high)))
    return figures.curves(lines, axis, title, log_x=True)


def _said(row: Mapping[str, object]) -> Iterator[str]:
    for name in ("explained", *MEASURE_NAMES):
        if name in row:
            yield f"{MEASURE_NAMES.get(name, name)} {row[name]:.3g}"
