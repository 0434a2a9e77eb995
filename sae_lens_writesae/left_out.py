"""An evaluation that gave nothing, kept like one that did: what a report says in its place."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from sae_lens_writesae.errors import NothingToMeasureError
from sae_lens_writesae.evaluation import Claim, Evaluation, Figure, describe, saved_head
from sae_lens_writesae.suite import EVALUATIONS
from sae_lens_writesae.verdict.paper import OTHER_MODELS


class LeftOut(Evaluation):
    """What was asked for and could not be measured on this dictionary and text, with the reason and what would mend it.

    Each claim that it would have answered is "not tested".
    """

    kind: ClassVar[str] = "left_out"
    title: ClassVar[str] = "What could not be measured"
    COLUMNS: ClassVar[dict[str, dict[str, str]]] = {}

    @classmethod
    def of(cls, name: str, model: Any, sae: Any, label: str, error: NothingToMeasureError) -> LeftOut:
        """The record of evaluation `name` (or of another step of a run), which raised `error`."""
        return cls(describe(model, sae, label=f"{name} of {label}", evaluation=name, reason=str(error)), {})

    def claims(self) -> list[Claim]:
        entry = EVALUATIONS.get(self.info["evaluation"])
        if entry is None:
            return []
        numbers = [number for number in entry.claims if number not in OTHER_MODELS] or [None]
        reason = self.info["reason"]
        return [Claim(number, entry.question, "–", 0, "measured", "", "not tested", reason) for number in numbers]

    def figures(self) -> list[Figure]:
        return []

    def notes(self) -> list[str]:
        return [self.info["reason"]]


def evaluate_or_leave_out(
    name: str, model: Any, saes: Mapping[str, Any], tokens: Tensor, config: Any, label: str, **more: Any
) -> Evaluation:
    """`Entry.run_on` of one evaluation, or where there is nothing to measure, the record of why, under `label`."""
    try:
        return EVALUATIONS[name].run_on(model, saes, tokens, config, **more)
    except NothingToMeasureError as error:
        return LeftOut.of(name, model, next(iter(saes.values())), label, error)


def load_result(folder: Path) -> Evaluation:
    """A saved evaluation of any kind, or the record of why there is none; ValueError for anything else."""
    kind = saved_head(folder)["kind"]
    if kind == LeftOut.kind:
        return LeftOut.load(folder)
    if kind not in EVALUATIONS:
        raise ValueError(f"{folder} holds an evaluation {kind!r}; known here: {', '.join(EVALUATIONS)}")
    return EVALUATIONS[kind].result_class.load(folder)
