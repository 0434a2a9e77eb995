"""The `writesae` command. Each command is a dataclass: its fields are the flags, its docstrings the help (tyro).

A command is imported when it is asked for, and imports torch when it runs, so that help costs nothing. Settings of a
class that needs torch are read off its source.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple, TypeVar

import tyro

T = TypeVar("T")


class Command(NamedTuple):
    """One command."""

    text: str
    """What it does, in one line."""
    target: str
    """`module:name` of a dataclass with a method `run`, or of a function that is given the rest of the command line."""


COMMANDS: dict[str, Command] = {
    "demo": Command(
        "Train dictionaries on one head and test their atoms; offline, in minutes.",
        "writesae.demo:Demo",
    ),
    "collect": Command(
        "Run a model once and keep what its heads write; dictionaries train from it.",
        "writesae.dictionaries:Collect",
    ),
    "train": Command(
        "Train dictionaries on heads of a model.",
        "writesae.dictionaries:Train",
    ),
    "eval": Command(
        "Evaluate trained dictionaries: one evaluation by name, or all.",
        "writesae.evaluate:run_eval",
    ),
    "show": Command(
        "Make a page for each atom of a dictionary.",
        "writesae.show:run_show",
    ),
    "push": Command(
        "Publish dictionaries on the Hugging Face hub, with a card that loads them.",
        "writesae.push:Push",
    ),
    "export": Command(
        "Write atoms as Neuronpedia or delphi read them.",
        "writesae.show:run_export",
    ),
    "prompt": Command(
        "Type a text in a browser: what heads write and read, which atoms fire.",
        "writesae.show:Prompt",
    ),
    "report": Command(
        "Write one page from saved results.",
        "writesae.evaluate:Report",
    ),
    "reproduce": Command(
        "The paper's whole table for a model: train, evaluate and report, as a workflow.",
        "writesae.reproduce.command:Reproduce",
    ),
    "models": Command(
        "List the models on this machine, and the update rules that can be hooked.",
        "writesae.models:Models",
    ),
    "hooks": Command(
        "List the hooks of a model with their shapes.",
        "writesae.models:Hooks",
    ),
}

PACKAGES = ("sae-lens-writesae", "torch", "transformers", "transformer-lens", "sae-lens", "flash-linear-attention")
"""Those whose versions matter to a result, and to whoever reads a report of a fault."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the console script. An error that says what to mend ends with status 2 and no traceback."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        name = choose("writesae", given, {name: command.text for name, command in COMMANDS.items()})
        module, _, attribute = COMMANDS[name].target.partition(":")
        target = getattr(importlib.import_module(module), attribute)
        if isinstance(target, type):
            from_arguments = getattr(target, "from_arguments", None)
            command = from_arguments(given[1:]) if from_arguments else parse(target, f"writesae {name}", given[1:])
            written = command.run()
        else:
            written = target(given[1:])
        if written is not None:
            print(written)
    except Exception as error:
        errors = sys.modules.get("hookpoints.errors")  # not loaded: then none of its errors was raised
        if not isinstance(error, (ValueError, OSError, errors.HookpointsError if errors else ValueError)):
            raise
        text = " ".join(str(error).split()) if isinstance(error, OSError) else str(error)  # of transformers: many lines
        print(f"error: {text}", file=sys.stderr)  # plain text: a path may hold what a markup language would take
        raise SystemExit(2) from error


def choose(program: str, arguments: Sequence[str], names: Mapping[str, str]) -> str:
    """The first argument, if it is one of `names`. Without one, or with --help, the names are printed and the program
    ends.

    Raises:
        ValueError: the argument is not a name; the error names the nearest one.
    """
    name = arguments[0] if arguments else "--help"
    if name in names:
        return name
    if name == "--version":
        print("\n".join(f"{package:26}{_version(package)}" for package in PACKAGES))
        raise SystemExit(0)
    if name not in ("-h", "--help"):
        hint = "".join(f"Did you mean {near!r}? " for near in difflib.get_close_matches(name, names, n=1))
        raise ValueError(f"{program} has no command {name!r}. {hint}There are {', '.join(names)}")
    width = max(map(len, names))
    lines = [f"  {name:{width}}  {text}" for name, text in names.items()]
    print(
        f"usage: {program} COMMAND ...\n", *lines, f"\n{program} COMMAND --help shows the flags of a command.", sep="\n"
    )
    raise SystemExit(0 if arguments else 2)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def parse(command: type[T], program: str, arguments: Sequence[str], default: T | None = None) -> T:
    """The command line as a value of `command`. Where an argument is unknown, missing or refused, tyro prints why and
    the program ends with status 2."""
    return tyro.cli(command, prog=program, args=arguments, default=tyro.MISSING_NONPROP if default is None else default)


if __name__ == "__main__":
    main()
