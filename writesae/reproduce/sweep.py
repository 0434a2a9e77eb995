"""`writesae sweep`: one dictionary of a head at every point of a grid, the same evaluations of each, one table.

The paper's sweep of k (table 15), its comparison of architectures (figure 8) and its ladder of model sizes (figure 12)
are each one command:

    writesae sweep --k 16 32 64 --d-sae 2048
    writesae sweep --architecture writesae_batchtopk writesae_jumprelu
    writesae sweep --model Qwen/Qwen3.5-0.8B Qwen/Qwen3.5-4B --layer 9 12 --head 4 8 --dataset my-texts
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from sae_lens_writesae.files import atomic_csv, atomic_text, check_writable, keep_settings, taken
from writesae.choices import DictionaryName, Target, at_least
from writesae.dictionaries import Collect, Train, check_text
from writesae.evaluate import EvalAll, Subjects
from writesae.reproduce.config import ReproduceConfig
from writesae.reproduce.texts import write_texts
from writesae.settings import evaluations

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from hookpoints import HookedRecurrent

Say = Callable[[str], object]


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
    def dictionary(self) -> str:
        """Its name as `writesae train` has it."""
        return str(DictionaryName(self.target, variant=self.variant, seed=self.seed))


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
    table with a figure for each measure, and a page of all claims. The same command resumes where it was stopped.

    At least one of model, layer, head, target, architecture, variant, d_sae, k and seed must differ from its default.
    """

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
    k: tuple[int, ...] = (1,)
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
        from sae_lens_writesae.choices import VARIANTS

        sizes = ("d_sae", "k", "training_tokens", "train_batch_size_tokens", "context_size", "eval_sequences")
        at_least(self, dict.fromkeys((*sizes, "n_atoms", "firings_per_atom"), 1) | {"seed": 0})
        for name in ("layer", "head"):
            if len(getattr(self, name)) not in (1, len(self.model)):
                raise ValueError(f"{name} names one, or one for each of the {len(self.model)} models")
        if unknown := [each for each in self.variant if each not in VARIANTS]:
            raise ValueError(f"there is no variant {', '.join(unknown)}; there are {', '.join(VARIANTS)}")
        if unknown := [each for each in self.evaluation if each not in evaluations()]:
            raise ValueError(f"there is no evaluation {', '.join(unknown)}; there are {', '.join(evaluations())}")
        points = list(self.points())
        if not points or len(set(points)) < len(points):
            raise ValueError("every axis of a sweep names at least one value, and each value once")
        if all(getattr(self, axis) == getattr(Sweep, axis) for axis in Point._fields):
            raise ValueError(f"expected what to vary, one of --{', --'.join(Point._fields)}; got only their defaults")

    def points(self) -> Iterator[Point]:
        """The grid, model by model."""
        n = len(self.model)
        places = zip(self.model, self.layer * (n // len(self.layer)), self.head * (n // len(self.head)))
        axes = (self.target, self.architecture, self.variant, self.d_sae, self.k, self.seed)
        for place in places:
            for rest in itertools.product(*axes):
                yield Point(*place, *rest)

    def train(self, point: Point, collection: Path) -> Train:
        """What trains one point."""
        return Train(
            collection=collection,
            layers=(point.layer,),
            heads=(point.head,),
            names=(point.dictionary,),
            architecture=point.architecture,
            d_sae=point.d_sae,
            k=point.k,
            normalize_activations="expected_average_only_in",
            training_tokens=self.training_tokens,
            train_batch_size_tokens=self.train_batch_size_tokens,
            lr=self.lr,
            out=self.out / point.folder,
        )

    def run(self, say: Say = print) -> SweepFiles:
        """Do what is not done, and write table and pages.

        Raises:
            ValueError: a head that is not there, an evaluation that compares dictionaries, or a folder with other
                settings; before any training of that model.
        """
        import pandas as pd

        from writesae.evaluations import EVALUATIONS

        if several := [each for each in self.evaluation if EVALUATIONS[each].scope.compares]:
            raise ValueError(f"a sweep evaluates each dictionary by itself, which {', '.join(several)} cannot")
        check_writable(self.out)
        for name in self.model:
            check_text(name, self.dataset)
        axes = {"out", "evaluation", *Point._fields}
        fixed = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in axes}
        with taken(self.out, say):
            keep_settings(self.out, fixed)
            return self._write(pd.DataFrame(list(self._rows(say))))

    def _rows(self, say: Say) -> Iterator[dict[str, object]]:
        """One dictionary after the other, with what is measured of it."""
        from hookpoints import HookedRecurrent

        for name, of_model in itertools.groupby(self.points(), lambda point: point.model):
            points, model = list(of_model), HookedRecurrent.from_pretrained(name)
            tokens, collection = self._texts(points[0], model, say)
            for point in points:
                self.train(point, collection).run(lambda line: None)
                row = self._row(point, model, tokens)
                say(f"{point.folder}: {', '.join(_said(row))}")
                yield row

    def _texts(self, point: Point, model: HookedRecurrent, say: Say) -> tuple[Tensor, Path]:
        """Tokens to evaluate on, and the folder of the head's factors on the training text."""
        from datasets import load_dataset

        from writesae.experiment.tokens import sample_sequences

        folder = self.out / point.folder.parent
        sizes = {name: getattr(self, name) for name in ("dataset", "training_tokens", "context_size", "eval_sequences")}
        write_texts(ReproduceConfig(model=point.model, **sizes), folder / "texts", model)
        states = any(target != "write" for target in self.target)
        collect = Collect(
            model=point.model,
            layers=(point.layer,),
            heads=(point.head,),
            targets=("write", "state") if states else ("write",),
            context_size=self.context_size,
            out=folder / "collection",
        )
        collect.of(model, load_dataset(str(folder / "texts" / "train"), split="train"), say)
        held_out = (folder / "texts" / "held-out.txt").read_text(encoding="utf-8")
        return sample_sequences(model, held_out, self.context_size, self.eval_sequences), collect.out

    def _row(self, point: Point, model: HookedRecurrent, tokens: Tensor) -> dict[str, object]:
        """Evaluate one dictionary, where that is not done; its row of the table."""
        from sae_lens_writesae.sae.load import load_sae
        from writesae.experiment.suite import evaluate_all
        from writesae.reproduce.measures import MEASURES, fit_of

        own = self.out / point.folder / f"L{point.layer}H{point.head}" / point.dictionary
        sae = load_sae(own / "sae", device=str(model.cfg.device))
        row: dict[str, object] = {**point._asdict(), **fit_of(model, sae, tokens)}
        sizes = tuple(f"{name}={getattr(self, name)}" for name in ("n_atoms", "firings_per_atom"))
        chosen = EvalAll(subjects=Subjects(saes=()), kinds=self.evaluation, per="dictionary", set=sizes).evaluations()
        for result in evaluate_all(
            chosen, model, {point.name: sae}, tokens, own, resume=True, progress=False, say=lambda line: None
        ):
            if result.skipped is None and result.kind in MEASURES:
                for name, estimate in MEASURES[result.kind](result).items():
                    row |= {name: estimate.mean, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
            for claim in result.claims():
                if claim.number is not None:
                    row.setdefault(f"claim {claim.number}", claim.outcome)
        return row

    def _write(self, table: pd.DataFrame) -> SweepFiles:
        from writesae.page.report import find_results, write_report
        from writesae.page.template import environment
        from writesae.reproduce.measures import MEASURE_NAMES, figure

        csv = atomic_csv(self.out / "sweep.csv", table)
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


def _said(row: Mapping[str, object]) -> Iterator[str]:
    from writesae.reproduce.measures import MEASURE_NAMES

    for name in ("explained", *MEASURE_NAMES):
        if name in row:
            yield f"{MEASURE_NAMES.get(name, name)} {row[name]:.3g}"
