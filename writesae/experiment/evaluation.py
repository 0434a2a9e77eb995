"""An evaluation is an object: its fields are the settings, its class says the question, the tables and the rule.

A subclass in `evaluations/` needs one file and nothing else. It is found by its `kind`; README's table, the docs, the
command `writesae eval KIND`, the protocol and the conformance tests read the class.
"""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from enum import Enum
from typing import TYPE_CHECKING, ClassVar, Self, cast

import pandas as pd
import torch
from sae_lens import SAE

from hookpoints import HookedRecurrent
from sae_lens_writesae.errors import NothingToMeasureError
from sae_lens_writesae.sae.factors import Collection
from writesae.choices import at_least
from writesae.experiment.lab import Lab
from writesae.experiment.result import Claim, Figure, Json, Result

if TYPE_CHECKING:
    from writesae.experiment.lab import Text


class Scope(Enum):
    """Which dictionaries of a head one run of an evaluation takes."""

    EACH = "each dictionary by itself"
    LAYER = "each dictionary by itself, or one for each of several heads of a layer, which act together"
    HEAD = "any dictionary of a head, which says which head it is; the atoms are not used"
    SEEDS = "dictionaries of one target that differ in their seed"
    TARGETS = "dictionaries of one head that differ in what they were trained for"
    VARIANTS = "dictionaries of one target that differ in their architecture"

    @property
    def compares(self) -> bool:
        """Whether a run takes several dictionaries at once."""
        return self not in (Scope.EACH, Scope.LAYER, Scope.HEAD)


def _own(text: Text) -> Text:
    """A clone of token ids, because gradients cannot be taken through inference tensors; a collection as it is."""
    return text if isinstance(text, Collection) else torch.as_tensor(text).clone()


@dataclass(frozen=True, kw_only=True)
class Evaluation(ABC):
    """Base class of all evaluations. The docstring of a subclass is its page: definition, controls, verdict rule."""

    seed: int = 0
    """Seed of every draw and control."""
    label: str = ""
    """Name in reports; by default the head and the target."""
    rows_per_run: int = 256
    """Largest number of edited rows in one forward pass. Lower it when memory runs out; results stay the same."""

    kind: ClassVar[str]
    """Name of the evaluation: of its folder, its command and its page."""
    question: ClassVar[str]
    """The question that it asks, as a heading."""
    answers: ClassVar[tuple[int, ...]] = ()
    """Rows of `verdict.paper.PAPER_CLAIMS` that it answers."""
    scope: ClassVar[Scope] = Scope.EACH
    columns: ClassVar[dict[str, dict[str, str]]]
    """For each table, what its columns hold, with units."""
    min_sequences: ClassVar[int] = 2
    """Sequences that a run needs."""
    at_least: ClassVar[dict[str, float]] = {}
    """Smallest allowed value of a setting, checked when the evaluation is made."""
    choices: ClassVar[dict[str, tuple[str, ...]]] = {}
    """Allowed values of a setting, or of each entry of a setting that is a tuple."""

    def __post_init__(self) -> None:
        for name in (f.name for f in fields(self)):
            value = getattr(self, name)
            if isinstance(value, list):  # as JSON and the command line give them
                object.__setattr__(self, name, tuple(value))
        at_least(self, {"rows_per_run": 1, **self.at_least})
        for name, allowed in self.choices.items():
            value = getattr(self, name)
            entries = value if isinstance(value, tuple) else (value,)
            if unknown := [entry for entry in entries if entry not in allowed]:
                raise ValueError(f"{name} must be among {', '.join(allowed)}; found {', '.join(map(str, unknown))}")
            if len(set(entries)) != len(entries):
                raise ValueError(f"{name} names each value once; found {', '.join(map(str, entries))}")

    @abstractmethod
    def measure(self, lab: Lab) -> dict[str, pd.DataFrame]:
        """The tables, by name. `lab` has the model, the dictionaries and the text; facts that a reader needs go into
        `lab.facts`, units that could not be measured into `lab.skipped`.

        Raises:
            NothingToMeasureError: this dictionary and text give nothing to measure.
        """

    @abstractmethod
    def claims(self, result: Result) -> list[Claim]:
        """The claims, with verdicts by `verdict.judge.judge`, from the tables alone."""

    @abstractmethod
    def figures(self, result: Result) -> list[Figure]:
        """Panels for the report, from the tables alone."""

    def notes(self, result: Result) -> list[str]:
        """Sentences that a reader needs beside the numbers."""
        return []

    def summaries(self, result: Result) -> dict[str, pd.DataFrame]:
        """Further tables for the report, made from the measured ones."""
        return {}

    @classmethod
    def front(cls, results: list[Result]) -> list[Figure]:
        """Panels for the top of a page, from all results of this kind: what a reader should see first."""
        return []

    @classmethod
    def across(cls, results: list[Result]) -> list[tuple[str, Claim]]:
        """Claims about several results together (all heads of a layer, say), each with a label."""
        return []

    @property
    def shortest(self) -> int:
        """Tokens that a sequence needs at least."""
        return 2

    def to_dict(self) -> dict[str, Json]:
        """Settings as plain JSON values; `from_dict` gives the evaluation back."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_dict(cls, settings: Mapping[str, object]) -> Self:
        """The evaluation with settings from JSON; a refused value raises ValueError, an unknown name TypeError."""
        return cls(**cast(dict, settings))

    def run(
        self,
        model: HookedRecurrent,
        saes: SAE | Mapping[str, SAE],
        tokens: Text,
        *,
        reference: Text | None = None,
        progress: bool = True,
    ) -> Result:
        """Evaluate dictionaries on sequences that neither the model nor a dictionary was trained on.

        Args:
            model: the hooked model that the dictionaries read.
            saes: one dictionary, or several by label. Each reads `blocks.{l}.mixer.heads.{h}.hook_write_vec` or
                `hook_state_vec`, by its own metadata.
            tokens: [N,T] token ids, all sequences of one length, without padding; or a collection of the head, from
                whose shards firings are read.
            reference: [M,S] token ids of other text, on which baselines are fitted, or a collection of the head on such
                text; without it each half of `tokens` is the other one's.
            progress: show progress bars.

        Raises:
            ValueError: a dictionary does not fit the model, sequences are too few or too short, or dictionaries cannot
                be compared; before any work.
            NothingToMeasureError: the dictionary and the text give nothing to measure.
        """
        begin = time.perf_counter()
        with torch.inference_mode(False), torch.no_grad():
            lab = Lab(
                model,
                saes if isinstance(saes, Mapping) else {"": saes},
                _own(tokens),
                reference=None if reference is None else _own(reference),
                seed=self.seed,
                rows_per_run=self.rows_per_run,
                progress=progress,
                one_head=self.scope is not Scope.LAYER,
            )
            self._check(lab)
            tables = self.measure(lab)
        tables = {
            # Files hold no index: without one a loaded table equals the measured one.
            name: pd.DataFrame(tables[name], columns=list(columns)).reset_index(drop=True)
            for name, columns in self.columns.items()
        }
        info = lab.describe(self._label(lab)) | {"seconds": round(time.perf_counter() - begin, 3)}
        result = Result(self, info, tables)
        result.check()
        return result

    def run_or_skip(
        self,
        model: HookedRecurrent,
        saes: SAE | Mapping[str, SAE],
        tokens: Text,
        *,
        reference: Text | None = None,
        progress: bool = True,
    ) -> Result:
        """As `run`; where there is nothing to measure, a result that says why, so that a run over many goes on."""
        try:
            return self.run(model, saes, tokens, reference=reference, progress=progress)
        except NothingToMeasureError as error:
            given, one_head = saes if isinstance(saes, Mapping) else {"": saes}, self.scope is not Scope.LAYER
            lab = Lab(model, given, tokens, seed=self.seed, one_head=one_head)
            return Result(self, lab.describe(self._label(lab)), {}, skipped=str(error))

    def _label(self, lab: Lab) -> str:
        # A result about a head must not be named after the dictionary that only says which head it is.
        return self.label or (lab.hook.cell if self.scope is Scope.HEAD else "")

    def _check(self, lab: Lab) -> None:
        n, length = lab.tokens.shape
        if n < self.min_sequences or length < self.shortest:
            raise ValueError(
                f"{self.kind} needs at least {self.min_sequences} sequences of {self.shortest} tokens; tokens are "
                f"{[n, length]}"
            )
        if self.scope.compares and len(lab.saes) < 2:
            raise ValueError(f"{self.kind} compares {self.scope.value}: give at least two, found {len(lab.saes)}")
        if self.scope in (Scope.EACH, Scope.HEAD) and len(lab.saes) > 1:
            raise ValueError(f"{self.kind} takes {self.scope.value}; found {', '.join(lab.saes)}")
