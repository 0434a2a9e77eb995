"""`writesae eval`: evaluations of dictionaries from folders, saved and joined on one page."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from hookpoints import HookedRecurrent, embedded
from sae_lens_writesae.cli import choose, parse
from sae_lens_writesae.evaluations import EVALUATIONS
from sae_lens_writesae.experiment.evaluation import Evaluation
from sae_lens_writesae.experiment.result import Json
from sae_lens_writesae.experiment.suite import evaluate_all
from sae_lens_writesae.experiment.tokens import sample_sequences
from sae_lens_writesae.page.report import ReportFiles, write_report
from sae_lens_writesae.sae.load import folder_label, load_sae

_REFERENCE = 64
"""Sequences from which control dictionaries are made, and on which baselines are fitted."""


@dataclass(frozen=True, kw_only=True)
class Subjects:
    """What is evaluated, on which text."""

    saes: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of trained SAEs (cfg.json, sae_weights.safetensors) of one model."""
    out: Path = Path("writesae-out/eval")
    """Folder for results and report."""
    model: str | None = None
    """Model; by default the one named in the SAEs' metadata."""
    text: Path | None = None
    """Text file to test on; by default the held-out text of the package."""
    sequences: int = 100
    """Sequences to find firings in."""
    context_size: int = 128
    """Tokens per sequence."""
    control_dictionaries: bool = True
    """Evaluate an untrained dictionary and one of native writes beside each, by the same rules: three times the work.
    They are made from the training text of the package, on which baselines are then fitted too."""


@dataclass(frozen=True, kw_only=True)
class EvalAll:
    """Run every evaluation that fits the dictionaries, and write one report."""

    subjects: tyro.conf.OmitArgPrefixes[Subjects]
    seed: int = 0
    """Seed of all draws and controls."""
    set: tuple[str, ...] = ()
    """Settings as FIELD=VALUE, for every evaluation that has the field."""

    def evaluations(self) -> list[Evaluation]:
        """Every evaluation, with those settings that it has."""
        settings: dict[str, Json] = {"seed": self.seed}
        for pair in self.set:
            name, equals, value = pair.partition("=")
            if not equals:
                raise ValueError(f"--set takes FIELD=VALUE, found {pair!r}")
            try:
                settings[name] = json.loads(value)
            except json.JSONDecodeError:
                settings[name] = value
        fields = {kind: {f.name for f in dataclasses.fields(each)} for kind, each in EVALUATIONS.items()}
        if unknown := sorted(settings.keys() - {name for names in fields.values() for name in names}):
            raise ValueError(f"no evaluation has a setting {', '.join(unknown)}")
        return [
            each.from_dict({name: value for name, value in settings.items() if name in fields[kind]})
            for kind, each in EVALUATIONS.items()
        ]


def run_eval(arguments: Sequence[str]) -> ReportFiles:
    """`writesae eval KIND SAE...` with the settings of that evaluation as flags; `all` runs every evaluation."""
    kinds = {kind: evaluation.question for kind, evaluation in EVALUATIONS.items()}
    kinds["all"] = "Every evaluation that fits the dictionaries, on one page."
    kind = choose("writesae eval", arguments, kinds)
    program = f"writesae eval {kind}"
    if kind == "all":
        everything = parse(EvalAll, program, arguments[1:])
        return evaluate(everything.subjects, everything.evaluations())
    evaluation_class = tyro.conf.OmitArgPrefixes[EVALUATIONS[kind]]
    fields = [("subjects", tyro.conf.OmitArgPrefixes[Subjects]), ("evaluation", evaluation_class)]
    command_class = dataclasses.make_dataclass("Eval", fields, frozen=True)
    command_class.__doc__ = EVALUATIONS[kind].question
    command = parse(command_class, program, arguments[1:])
    return evaluate(command.subjects, [command.evaluation])


def evaluate(subjects: Subjects, evaluations: Sequence[Evaluation]) -> ReportFiles:
    """Run evaluations on the SAEs of some folders; save each result, and a page over all.

    Raises:
        ValueError: SAEs of different models, two folders of one name, or an evaluation that refuses them.
    """
    saes = {folder_label(folder): load_sae(folder) for folder in subjects.saes}
    if len(saes) < len(subjects.saes):
        raise ValueError(f"two of the SAEs' folders have the same name: {', '.join(map(str, subjects.saes))}")
    models = {subjects.model or str(sae.cfg.metadata.model_name) for sae in saes.values()}
    if len(models) != 1:
        named = ", ".join(sorted(models)) or "none"
        raise ValueError(f"the SAEs of one evaluation are of one model; found {named}. Evaluate them apart")
    model = HookedRecurrent.from_pretrained(models.pop())
    text = embedded.text("test") if subjects.text is None else subjects.text.read_text(encoding="utf-8")
    tokens = sample_sequences(model, text, subjects.context_size, subjects.sequences)
    reference = None
    if subjects.control_dictionaries:
        reference = sample_sequences(model, embedded.text("train"), subjects.context_size, _REFERENCE)
    results = evaluate_all(evaluations, model, saes, tokens, subjects.out, controls=reference)
    return write_report(results, subjects.out / "report.html")
