"""One file per question. An evaluation is found by being here: a file with one `Evaluation` that asks a `question`.

Which evaluations there are, and what each asks, is read off the files, so that a list of them loads no torch. A file is
imported when its evaluation is asked for.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from writesae_study.experiment.evaluation import Evaluation, Result


class Asked(NamedTuple):
    """What the file of an evaluation says of it."""

    class_name: str
    question: str
    answers: tuple[int, ...]
    """Rows of `verdict.paper.PAPER_CLAIMS`."""
    needs_dictionary: bool
    """False for a question about a head (`Scope.HEAD`)."""


def _asked_questions() -> dict[str, Asked]:
    """What each evaluation asks, by its kind: in the order of the paper's claims, then by name."""
    asked: dict[str, Asked] = {}
    for file in sorted(Path(__file__).parent.glob("[!_]*.py")):
        for definition in ast.parse(file.read_text(encoding="utf-8")).body:
            constants: dict[str, ast.expr] = {}
            for each in definition.body if isinstance(definition, ast.ClassDef) else ():
                if isinstance(each, ast.AnnAssign) and each.value is not None:
                    constants[ast.unparse(each.target)] = each.value
            if isinstance(definition, ast.ClassDef) and "question" in constants:
                question = ast.literal_eval(constants["question"])
                answers = ast.literal_eval(constants.get("answers", ast.Tuple([])))
                of_head = "scope" in constants and ast.unparse(constants["scope"]) == "Scope.HEAD"
                asked[file.stem] = Asked(definition.name, question, answers, not of_head)
    # Questions of this project, which answer no claim, come last.
    return dict(sorted(asked.items(), key=lambda entry: min(entry[1].answers, default=99)))


ASKED: dict[str, Asked] = _asked_questions()
"""What each evaluation asks, by its kind."""


class _Evaluations(Mapping[str, "type[Evaluation]"]):
    """Every evaluation by its kind; each is imported when it is asked for."""

    def __getitem__(self, kind: str) -> type[Evaluation]:
        class_name = ASKED[kind].class_name  # KeyError before an import
        return getattr(importlib.import_module(f"{__name__}.{kind}"), class_name)

    def __iter__(self) -> Iterator[str]:
        return iter(ASKED)

    def __contains__(self, kind: object) -> bool:
        return kind in ASKED

    def __len__(self) -> int:
        return len(ASKED)


EVALUATIONS: Mapping[str, type[Evaluation]] = _Evaluations()
"""Every evaluation by its kind; each is imported when it is asked for."""


def load_result(folder: str | Path) -> Result:
    """Read a saved result of any kind; ValueError for anything else."""
    from writesae_study.experiment.evaluation import Result

    return Result.load(folder, EVALUATIONS)
