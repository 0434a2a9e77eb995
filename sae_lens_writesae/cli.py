"""The `writesae` command. Each command is a dataclass: its fields are the flags, its docstrings the help (tyro)."""

from __future__ import annotations

import dataclasses
import difflib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import tyro

from hookpoints import HookedRecurrent, embedded
from hookpoints.errors import HookpointsError
from sae_lens_writesae import __version__
from sae_lens_writesae.demo import Demo
from sae_lens_writesae.evaluations import EVALUATIONS
from sae_lens_writesae.experiment.evaluation import Evaluation
from sae_lens_writesae.experiment.suite import evaluate_all
from sae_lens_writesae.experiment.tokens import sample_sequences
from sae_lens_writesae.page.atoms import Show
from sae_lens_writesae.page.report import ReportFiles, find_results, write_report
from sae_lens_writesae.reproduce.command import SMALL_RUN, Reproduce
from sae_lens_writesae.sae.load import folder_label, load_sae
from sae_lens_writesae.sae.runner import train_from_arguments

T = TypeVar("T")


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


@dataclass(frozen=True, kw_only=True)
class EvalAll:
    """Run every evaluation that fits the dictionaries, and write one report."""

    subjects: tyro.conf.OmitArgPrefixes[Subjects]
    seed: int = 0
    """Seed of all draws and controls."""
    set: tuple[str, ...] = ()
    """Settings as FIELD=VALUE, for every evaluation that has the field."""


@dataclass(frozen=True)
class Report:
    """Write one page from saved results: claims, the paper's values, the values here, controls, verdicts."""

    results: tyro.conf.Positional[tuple[Path, ...]]
    """Folders in or below which `writesae eval`, `demo` or `reproduce` left results."""
    out: Path = Path("report.html")
    """Page to write."""


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
    return write_report(evaluate_all(evaluations, model, saes, tokens, subjects.out), subjects.out / "report.html")


def run_eval(arguments: Sequence[str]) -> None:
    """`writesae eval KIND SAE...` with the settings of that evaluation as flags; `all` runs every evaluation."""
    kinds = {kind: evaluation.question for kind, evaluation in EVALUATIONS.items()}
    kinds["all"] = "Every evaluation that fits the dictionaries, on one page."
    kind = choose("writesae eval", arguments, kinds)
    if kind == "all":
        command = parse(EvalAll, "writesae eval all", arguments[1:])
        evaluations = [with_settings(each, command) for each in EVALUATIONS.values()]
        return say_where(evaluate(command.subjects, evaluations))
    fields = [
        ("subjects", tyro.conf.OmitArgPrefixes[Subjects]),
        ("evaluation", tyro.conf.OmitArgPrefixes[EVALUATIONS[kind]]),
    ]
    command_class = dataclasses.make_dataclass("Eval", fields, frozen=True)
    command_class.__doc__ = EVALUATIONS[kind].question
    command = parse(command_class, f"writesae eval {kind}", arguments[1:])
    say_where(evaluate(command.subjects, [command.evaluation]))


def with_settings(evaluation: type[Evaluation], command: EvalAll) -> Evaluation:
    """An evaluation with those settings of the command that it has."""
    known = {field.name for field in dataclasses.fields(evaluation)}
    settings: dict[str, object] = {"seed": command.seed}
    for pair in command.set:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"--set takes FIELD=VALUE, found {pair!r}")
        try:
            settings[name] = json.loads(value)
        except json.JSONDecodeError:
            settings[name] = value
    return evaluation(**{name: value for name, value in settings.items() if name in known})


def run_report(arguments: Sequence[str]) -> None:
    """`writesae report`."""
    command = parse(Report, "writesae report", arguments)
    say_where(write_report(find_results(command.results), command.out))


def run_demo(arguments: Sequence[str]) -> None:
    """`writesae demo`."""
    say_where(parse(Demo, "writesae demo", arguments).run())


def run_show(arguments: Sequence[str]) -> None:
    """`writesae show`."""
    files = parse(Show, "writesae show", arguments).run()
    print(f"pages    {files.index} and {len(files.pages)} atoms\nnumbers  {files.data}")


def run_reproduce(arguments: Sequence[str]) -> None:
    """`writesae reproduce`."""
    default = SMALL_RUN if "--small" in arguments else Reproduce()
    files = parse(Reproduce, "writesae reproduce", arguments, default).run()
    if files is not None:
        say_where(files)


COMMANDS: dict[str, tuple[str, Callable[[Sequence[str]], object]]] = {
    "demo": ("Train two dictionaries on one head and test their atoms; offline, on a CPU, in minutes.", run_demo),
    "train": ("Train a dictionary with SAELens' own command line.", train_from_arguments),
    "eval": ("Evaluate trained dictionaries: one evaluation by name, or all.", run_eval),
    "show": ("Make a page for each atom of a dictionary.", run_show),
    "report": ("Write one page from saved results.", run_report),
    "reproduce": ("Train and evaluate every dictionary of the paper's table for a model.", run_reproduce),
}
"""Every command: what it does, and the function that is given the rest of the command line."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the console script. Errors that say what to mend end with status 2 and no traceback."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        name = choose("writesae", given, {name: text for name, (text, _) in COMMANDS.items()})
        COMMANDS[name][1](given[1:])
    except (HookpointsError, ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)  # plain text: a path may hold what a markup language would take
        raise SystemExit(2) from error


def choose(program: str, arguments: Sequence[str], names: Mapping[str, str]) -> str:
    """The first argument, if it is one of `names`; without one, or with --help, prints the names and ends.

    Raises:
        ValueError: the argument is not a name; names the nearest one.
    """
    name = arguments[0] if arguments else "--help"
    if name in names:
        return name
    if name in ("--version",):
        print(f"{program} {__version__}")
        raise SystemExit(0)
    if name not in ("-h", "--help"):
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{program} has no command {name!r}{hint} There are {', '.join(names)}")
    width = max(map(len, names))
    print(f"usage: {program} COMMAND ...\n")
    print("\n".join(f"  {name:{width}}  {text}" for name, text in names.items()))
    print(f"\n{program} COMMAND --help shows the flags of a command.")
    raise SystemExit(0 if arguments else 2)


def parse(command: type[T], program: str, arguments: Sequence[str], default: T | None = None) -> T:
    """The command line as a value of `command`."""
    return tyro.cli(command, prog=program, args=arguments, default=default)


def say_where(files: ReportFiles) -> None:
    """The files of a report."""
    print(f"report   {files.html}\nnumbers  {files.json}")


if __name__ == "__main__":
    main()
