"""An evaluation is an object: its fields are the settings, its class says the question, the tables and the rule.

A subclass in `evaluations/` is one file and a row of `verdict.paper.QUESTIONS`. It is found by its `kind`; the docs,
the command `writesae eval KIND`, the protocol and the conformance tests read the class.

What a run leaves is a `Result`: settings, tidy tables, what was measured on what; and how it is saved in a folder.
"""

from __future__ import annotations

import hashlib
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from enum import Enum
from functools import cached_property
from operator import methodcaller
from pathlib import Path
from typing import ClassVar, Self, cast, get_type_hints

import pandas as pd
import torch
from pydantic import NonNegativeInt, PositiveInt
from sae_lens import SAE
from torch import Tensor

from hookpoints import HookedRecurrent
from hookpoints.files import CHECKSUMS, SealedFolder, atomic_folder, read_json, sealed_names, write_checksums
from sae_lens_writesae.errors import NothingToMeasureError
from writesae.choices import expect, once_each
from writesae.files import Json
from writesae_study.experiment.bench import Bench
from writesae_study.experiment.terms import Terms
from writesae_study.experiment.typed import checked_setting
from writesae_study.verdict.finding import Claim, Figure, Finding
from writesae_study.verdict.paper import QUESTIONS

_FORMAT = 3
"""Version of the files."""
_INFO = "info.json"


_COLUMNS = {
    "firing": "number of the firing, shared by all of its conditions",
    "sequence": "row of the evaluation tokens",
    "position": "token t that is edited",
    "atom": "atom whose firing was drawn",
    "condition": "what is written at t",
    "scale": "how the atom is scaled; none for native and delete",
    "token": "target T",
    "text": "the target as text",
    "sae": "label of the dictionary",
    "low": "lower end of its 95% interval",
    "high": "upper end of its 95% interval",
}
"""Columns that mean the same in many tables."""


def described(shared: str, **own: str) -> dict[str, str]:
    """What the columns of a table hold: shared ones by name, then its own with their meaning."""
    return {name: _COLUMNS[name] for name in shared.split()} | own


class Scope(Enum):
    """Which dictionaries of a head one run of an evaluation takes."""

    EACH = "each dictionary by itself"
    LAYER = "each dictionary by itself, or one for each of several heads of a layer, which act together"
    HEAD = "a head, as any dictionary of it, whose atoms are not used"
    SEEDS = "dictionaries of one target that differ in their seed"
    VARIANTS = "dictionaries of one target that differ in their architecture"

    @property
    def compares(self) -> bool:
        """Whether a run takes several dictionaries at once."""
        return self not in (Scope.EACH, Scope.LAYER, Scope.HEAD)


@dataclass(frozen=True, kw_only=True)
class Evaluation(ABC):
    """Base class of all evaluations. The docstring of a subclass is its page: definition, controls, verdict rule."""

    seed: NonNegativeInt = 0
    """Seed of every draw and control."""
    label: str = ""
    """Name in reports; by default the head and the target."""
    rows_per_run: PositiveInt = 256
    """Largest number of edited rows in one forward pass. Lower it when memory runs out; results stay the same."""

    kind: ClassVar[str]
    """Name of the evaluation, and of its file, its command and its page."""
    question: ClassVar[str]
    """The question that it asks, as a heading: that of its kind in `verdict.paper.QUESTIONS`, as what it answers."""
    answers: ClassVar[tuple[int, ...]] = ()
    """Rows of `verdict.paper.PAPER_CLAIMS` that it answers."""
    scope: ClassVar[Scope] = Scope.EACH
    columns: ClassVar[dict[str, dict[str, str]]]
    """For each table, what its columns hold, with units."""
    min_sequences: ClassVar[int] = 2
    """Sequences that a run needs."""

    def __init_subclass__(cls) -> None:
        cls.kind = cls.__module__.rpartition(".")[2]
        if cls.kind in QUESTIONS:  # the other subclasses are parts of these
            _, cls.question, cls.answers = QUESTIONS[cls.kind]

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self), include_extras=True)
        for name in (setting.name for setting in fields(self)):
            # Settings from JSON are lists; as tuples they are equal to those given in Python, and hashable.
            value = checked_setting(name, getattr(self, name), hints[name])
            object.__setattr__(self, name, value)
            if isinstance(value, tuple):
                once_each(self, [name])
        expect(self, self.rules())

    def rules(self) -> dict[str, tuple[bool, str]]:
        """For each setting that must fit others, whether it does, and what is expected (`choices.expect`)."""
        return {}

    @abstractmethod
    def measure(self, lab: Bench) -> dict[str, pd.DataFrame]:
        """The tables, by name. `lab` has the model, the dictionaries and the text; facts that a reader needs go into
        `lab.facts`, units that could not be measured into `lab.skipped`.

        Raises:
            NothingToMeasureError: this dictionary and text give nothing to measure.
        """

    @abstractmethod
    def findings(self, result: Result) -> list[Finding]:
        """One finding for each claim, from the tables alone; verdict, sentence and a panel follow from it."""

    def panels(self, result: Result) -> list[Figure]:
        """Panels for the report besides those of the findings, from the tables alone."""
        return []

    @classmethod
    def across(cls, results: list[Result]) -> list[tuple[str, Claim]]:
        """Claims about several results together (all heads of a layer, say), each with a label."""
        return []

    @property
    def shortest(self) -> int:
        """Tokens that a sequence needs at least: a prompt, or up to the first position and to the horizon after it."""
        window = getattr(self, "first_position", 0) + getattr(self, "horizon", 1) + 1
        return getattr(self, "prompt_tokens", window)

    def to_dict(self) -> dict[str, Json]:
        """Settings as plain JSON values; `from_dict` gives the evaluation back."""
        # Through JSON, so that settings are equal before and after they are saved: it has lists for tuples.
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_dict(cls, settings: Mapping[str, object]) -> Self:
        """The evaluation with settings from JSON; a refused value raises ValueError, an unknown name TypeError."""
        return cls(**cast(dict, settings))

    def run(
        self,
        model: HookedRecurrent,
        saes: SAE | Mapping[str, SAE],
        tokens: Tensor,
        *,
        reference: Tensor | Terms | None = None,
        progress: bool = True,
        or_skip: bool = False,
    ) -> Result:
        """Evaluate dictionaries on sequences that neither the model nor a dictionary was trained on.

        Args:
            model: the hooked model that the dictionaries read.
            saes: one dictionary, or several by label. Each reads `blocks.{l}.mixer.heads.{h}.hook_write_vec` or
                `hook_state_vec`, by its own metadata.
            tokens: [N,T] token ids, all sequences of one length, without padding.
            reference: other text, on which baselines are fitted: [M,S] token ids, or `Terms` of the text that
                dictionaries were trained on; without it each half of `tokens` is the other one's.
            progress: show progress bars.
            or_skip: where there is nothing to measure, return a result that says why, so that a run over many resumes.

        Raises:
            ValueError: a dictionary does not fit the model, is missing or cannot be compared, or sequences are too few
                or too short; before any work.
            NothingToMeasureError: the dictionary and the text give nothing to measure.
        """
        begin = time.perf_counter()
        # Some questions take gradients (`torch.enable_grad`), which a caller's inference mode would forbid.
        with torch.inference_mode(False), torch.no_grad():
            lab = Bench(
                model,
                saes if isinstance(saes, Mapping) else {"": saes},
                tokens.clone(),  # gradients cannot be taken through inference tensors
                reference=reference,
                seed=self.seed,
                rows_per_run=self.rows_per_run,
                progress=progress,
                one_head=self.scope is not Scope.LAYER,
            )
            n, length = tokens.shape
            if n < self.min_sequences or length < self.shortest:
                raise ValueError(
                    f"{self.kind} needs at least {self.min_sequences} sequences of {self.shortest} tokens; tokens are "
                    f"{[n, length]}"
                )
            # A comparison needs several dictionaries of one hook, everything else a single one.
            if self.scope is not Scope.LAYER and self.scope.compares != (len(lab.saes) > 1):
                expected = "at least two dictionaries" if self.scope.compares else "one dictionary"
                raise ValueError(f"{self.kind}, {self.scope.value}: expected {expected}, got {', '.join(lab.saes)}")
            hooks = sorted({hook.name for hook in lab.hooks.values()})
            if self.scope in (Scope.SEEDS, Scope.VARIANTS) and len(hooks) > 1:
                raise ValueError(f"{self.kind}, {self.scope.value}: expected one hook, got {', '.join(hooks)}")
            # A result about a head must not be named after the dictionary that only says which head it is.
            label = self.label or (lab.hook.cell if self.scope is Scope.HEAD else "")
            try:
                tables = self.measure(lab)
            except NothingToMeasureError as error:
                if not or_skip:
                    raise
                return Result(self, lab.describe(label), {}, skipped=str(error))
        tables = {
            # Files hold no index: without one a loaded table equals the measured one.
            name: tables[name].reindex(columns=list(columns)).reset_index(drop=True)
            for name, columns in self.columns.items()
        }
        seconds = round(time.perf_counter() - begin, 3)
        result = Result(self, lab.describe(label) | {"seconds": seconds}, tables)
        result.info["rules"] = result.judged()  # in place, so that its findings are made once
        return result


@dataclass(frozen=True)
class Result:
    """The result of one evaluation of one dictionary, of a head, or of several dictionaries that are compared.

    Claims and figures are made from the tables alone, so that a loaded result gives the same page as a fresh one.
    They are made once: a table is not changed after it was measured; another one makes another result (`replace`).
    """

    evaluation: Evaluation
    """The evaluation with its settings."""
    info: dict[str, Json]
    """What was evaluated on what: model, head, dictionaries, text, `seconds`, `n_edited_runs`, `rules` (what
    `judged` gave at that time), and `n_skipped`, which maps a reason to the number of units that could not be
    measured."""
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    """Tidy tables by name, with the columns that the evaluation documents. No NaN stands for a failure: what could not
    be measured is left out and counted in `info["n_skipped"]`."""
    skipped: str | None = None
    """Why nothing could be measured, where that is so; then there are no tables, and each claim is "not tested"."""

    @property
    def kind(self) -> str:
        """Name of the evaluation."""
        return self.evaluation.kind

    @property
    def label(self) -> str:
        """Name of what was evaluated, for reports."""
        return str(self.info["label"])

    def fact(self, name: str) -> float:
        """A number of `info`; KeyError or ValueError where there is none."""
        return float(cast(float, self.info[name]))

    def findings(self) -> list[Finding]:
        """The findings, one for every claim that the evaluation answers. Cost: resamples, the first time."""
        return list(self._cached_findings)

    @cached_property
    def _cached_findings(self) -> list[Finding]:
        # A page asks for them a dozen times: for claims, panels, comparisons and notes.
        if self.skipped is None:
            return self.evaluation.findings(self)
        question = self.evaluation.question
        numbers = self.evaluation.answers or (None,)
        return [Finding.untested(question, self.skipped, number, "measured") for number in numbers]

    def claims(self) -> list[Claim]:
        """Every claim that the evaluation answers, with its verdict."""
        return [finding.row() for finding in self.findings()]

    def judged(self) -> str:
        """A hash of what the rules of today make of the tables: the verdict and the effect of each finding, to four
        digits. It changes with the rules and not with their source text or their words."""
        judged = []
        for finding in self.findings():
            effect = finding.effect[:3] if finding.effect is not None else ()
            # Four digits: another version of scipy may round the last ones differently.
            digits = [f"{number:.4g}" for number in effect]
            judged.append([finding.number, finding.verdict.outcome, *digits])
        return hashlib.sha256(json.dumps(judged).encode()).hexdigest()[:12]

    def figures(self) -> list[Figure]:
        """Panels for the report: of findings, then the evaluation's own; none where nothing was measured."""
        panels = [finding.panel(self.label) for finding in self.findings() if finding.shown]
        return panels if self.skipped is not None else [*panels, *self.evaluation.panels(self)]

    def notes(self) -> list[str]:
        """Sentences that a reader needs besides the numbers."""
        if self.skipped is not None:
            return [self.skipped]
        notes = []
        # Tables are saved and verdicts are not: a page of an old result has the verdicts of today's rules.
        if self.info.get("rules") != self.judged():
            notes.append("When this was measured, the rules of verdicts gave other verdicts or other numbers.")
        left_out = cast(Mapping[str, int], self.info["n_skipped"])
        for why, n in left_out.items():
            if n:
                notes.append(f"Left out: {n:,} ({why}).")
        return notes

    @property
    def pace(self) -> str:
        """Time taken; where edits were run, how many runs and how fast."""
        seconds = self.fact("seconds")
        runs = int(self.fact("n_edited_runs"))
        speed = f", {runs:,} edited runs, {runs / seconds:.0f} a second" if seconds and runs else ""
        return f"{seconds:.0f} s{speed}"

    def save(self, folder: str | Path) -> Path:
        """Write a folder with info.json, one parquet file a table, and their checksums. The folder appears whole: it is
        written aside, then renamed, and replaces an earlier result that was there.

        Raises:
            OSError: it cannot be written, or holds something that no result has (`check_folder`); names the folder.
        """
        target = Path(folder)
        text = json.dumps(
            {
                "format": _FORMAT,
                "kind": self.kind,
                "settings": self.evaluation.to_dict(),
                "skipped": self.skipped,
                "info": self.info,
            },
            indent=1,
            default=methodcaller("item"),  # of numpy's numbers
            allow_nan=False,
        )

        def write(aside: Path) -> None:
            (aside / _INFO).write_text(text, encoding="utf-8")
            for name, table in self.tables.items():
                table.to_parquet(aside / f"{name}.parquet", index=False)
            write_checksums(aside, sorted(file.name for file in aside.iterdir()))

        return atomic_folder(target, write, result_files)

    @classmethod
    def load(cls, folder: str | Path, known: Mapping[str, type[Evaluation]]) -> Result:
        """Read what `save` wrote.

        Args:
            known: evaluations by name; `evaluations.load_result` passes all of them.

        Raises:
            ValueError: the folder holds something else, is cut short, was changed, has links, or is of a kind or format
                that this version does not know; names the file.
        """
        sealed = SealedFolder(Path(folder), ValueError)
        file = sealed.file(_INFO)
        head = cast(dict, read_json(file))
        if head.get("format") != _FORMAT or head.get("kind") not in [*known]:
            got = f"format {head.get('format')!r} of the kind {head.get('kind')!r}"
            raise ValueError(f"{file}: expected format {_FORMAT} of a kind among {', '.join(known)}, got {got}")
        sealed.require()
        kind = known[head["kind"]]
        try:
            # Names in files are data: only declared tables are read, so that no path leaves the folder.
            columns = {} if head["skipped"] is not None else kind.columns
            tables = {name: pd.read_parquet(sealed.file(f"{name}.parquet")) for name in columns}
            lacking = []
            for name, table in tables.items():
                lacking += [f"{name}.{column}" for column in columns[name] if column not in table]
            if lacking:
                raise ValueError(f"tables lack the columns {', '.join(lacking)}")
            return cls(kind.from_dict(head["settings"]), head["info"], tables, head["skipped"])
        except (KeyError, OSError, TypeError, ValueError) as error:
            raise ValueError(f"{folder} cannot be read as {kind.kind}: {error}") from error


def result_files(folder: Path) -> list[str]:
    """Names of the files in a folder that `Result.save` wrote there: those that its checksums list. An empty list where
    it wrote none."""
    names = sealed_names(folder)
    return [CHECKSUMS, *names] if _INFO in names else []
