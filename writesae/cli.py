"""The `writesae` command. Each command is a dataclass: its fields are the flags, its docstrings the help (tyro).

A command is imported when it is asked for, and imports torch when its flags are parsed and it runs, so that help and
misspelt flags take no seconds.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import is_dataclass, make_dataclass
from importlib.metadata import distributions
from typing import Annotated, TypeVar, get_args, get_origin, get_type_hints

import tyro

try:
    from tyro._errors import on_parse_error
except ImportError:  # no public part of tyro: without it, tyro prints its own messages
    on_parse_error = contextlib.nullcontext

S = TypeVar("S")
T = TypeVar("T")


COMMANDS = {
    "demo": (
        "Train dictionaries on one head and test their atoms; offline, in minutes.",
        "writesae.demo:Demo",
    ),
    "collect": (
        "Run a model once and keep what its heads write; dictionaries train from it.",
        "writesae.dictionaries:Collect",
    ),
    "train": (
        "Train dictionaries on heads of a model.",
        "writesae.dictionaries:Train",
    ),
    "eval": (
        "Evaluate trained dictionaries: one evaluation by name, or all.",
        "writesae.evaluate:run_eval",
    ),
    "show": (
        "Make a page for each atom of a dictionary.",
        "writesae.show:run_show",
    ),
    "push": (
        "Publish dictionaries on the Hugging Face hub, with a card that loads them.",
        "writesae.push:Push",
    ),
    "export": (
        "Write atoms as Neuronpedia reads them.",
        "writesae.show:run_export",
    ),
    "prompt": (
        "Type a text in a browser: what heads write and read, which atoms fire.",
        "writesae.show:Prompt",
    ),
    "report": (
        "Write one page from saved results.",
        "writesae.evaluate:Report",
    ),
    "reproduce": (
        "The paper's whole table for a model: train, evaluate and report, as a workflow.",
        "writesae.reproduce.command:Reproduce",
    ),
    "zoo": (
        "Measure what dictionaries find in models whose mechanism is known.",
        "writesae.zoo:Zoo",
    ),
    "models": (
        "List the models on this machine, and the update rules that can be hooked.",
        "writesae.models:Models",
    ),
    "hooks": (
        "List the hooks of a model with their shapes.",
        "writesae.models:Hooks",
    ),
}
"""What each does, in one line, and `module:name` of a dataclass with a method `run`, or of a function that is given the
rest of the command line."""
PACKAGES = ("sae-lens-writesae", "torch", "transformers", "transformer-lens", "sae-lens", "flash-linear-attention")
"""Those whose versions matter to a result, and to whoever reads a report of a fault."""


LOST = "what was not saved is lost"
RESUMED = "the same command resumes"
STOPPED = {name: RESUMED for name in ("demo", "collect", "train", "reproduce")} | {
    "eval": "results that are finished stay; with --resume, eval all takes them",
    "push": "nothing was uploaded, or all",
}
"""What an interrupt leaves of each command, where it is not `LOST`."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the console script. An error that says what to mend ends with status 2 and no traceback, an
    interrupt with status 130 and a line that says what it left."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if callable(signal.getsignal(signal.SIGINT)):  # SAELens' runner leaves its own handler, with its own exception
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        _run(words)
    except KeyboardInterrupt as interrupt:
        print(f"stopped; {STOPPED.get(words[0] if words else '', LOST)}", file=sys.stderr)
        raise SystemExit(130) from interrupt  # as shells have it: 128 + SIGINT
    except BrokenPipeError:
        raise
    except Exception as error:
        errors = sys.modules.get("hookpoints.errors")  # not loaded: then none of its errors was raised
        if not isinstance(error, (ValueError, OSError, errors.HookpointsError if errors else ValueError)):
            raise
        # In one line, for transformers' have many; plain text, for a path may hold what a markup language would take.
        print("error:", " ".join(str(error).split()) if isinstance(error, OSError) else error, file=sys.stderr)
        raise SystemExit(2) from error


def _run(words: Sequence[str]) -> None:
    name = choose("writesae", words, {name: text for name, (text, _) in COMMANDS.items()})
    module, _, attribute = COMMANDS[name][1].partition(":")
    target = getattr(importlib.import_module(module), attribute)
    arguments = words[1:]
    if isinstance(target, type):
        from_arguments = getattr(target, "from_arguments", None)
        command = from_arguments(arguments) if from_arguments else parse(target, f"writesae {name}", arguments)
        written = command.run()
    else:
        written = target(arguments)
    if written is not None:
        print(written)


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
        installed = {distribution.name: distribution.version for distribution in distributions()}
        print("\n".join(f"{package:26}{installed.get(package, 'not installed')}" for package in PACKAGES))
        raise SystemExit(0)
    if name not in ("-h", "--help"):
        hint = "".join(f"Did you mean {near!r}? " for near in difflib.get_close_matches(name, names, n=1))
        raise ValueError(f"{program} has no command {name!r}. {hint}There are {', '.join(names)}")
    width = max(map(len, names))
    print(f"usage: {program} COMMAND ...\n", *(f"  {name:{width}}  {text}" for name, text in names.items()), sep="\n")
    print(f"\n{program} COMMAND --help shows the flags of a command.")
    raise SystemExit(0 if arguments else 2)


def parse(command: type[T], program: str, arguments: Sequence[str], default: T | None = None) -> T:
    """The command line as a value of `command`.

    Raises:
        ValueError: an argument is unknown, missing or refused; in one line.
    """

    def refuse(event: object) -> None:
        if told := _told(event, command):
            raise ValueError(f"{' '.join(told.split()).rstrip('.')}. {program} --help lists the flags")

    with on_parse_error(refuse):
        return tyro.cli(
            command, prog=program, args=arguments, default=tyro.MISSING_NONPROP if default is None else default
        )


def parse_with(command: type[T], settings: type[S], program: str, arguments: Sequence[str]) -> tuple[T, S]:
    """The command line as a value of `command` and one of `settings`, whose docstring the help shows."""
    # One parser for both, so that help lists all flags and each of them may come anywhere.
    parts = [("command", tyro.conf.OmitArgPrefixes[command]), ("settings", tyro.conf.OmitArgPrefixes[settings])]
    both = make_dataclass("Command", parts, frozen=True, namespace={"__doc__": command.__doc__})
    parsed = parse(both, program, arguments)
    return parsed.command, parsed.settings


def _told(event: object, command: type) -> str | None:
    """What tyro refuses. None: an event that is not known here, for which tyro prints its own message."""
    from tyro import _errors

    match event:
        case _errors.InstantiationFailure(message=message, argument=argument):
            return f"{argument.display_name()}: {message}" if argument else str(message)
        case _errors.InvalidChoice(argument=argument, value=value, choices=choices):
            return f"{argument.display_name()}: expected one of {', '.join(choices)}, got {value!r}"
        case _errors.BadValue(argument=argument):
            return f"{argument.display_name()}: expected {argument.lowered.metavar}, got no value"
        case _errors.MissingArgs(missing_arguments=missing, unrecognized_tokens=tokens):
            names = ", ".join(argument.arg.display_name().rpartition(".")[2] for argument in missing)
            return f"missing {names}" + (f"; unknown {' '.join(tokens)}" if tokens else "")
        case _errors.UnrecognizedArgs(tokens=tokens):
            flags = dict(_flags(command))
            if positional := [token for token in tokens if flags.get(token) is False]:
                return f"unknown {' '.join(tokens)}: {positional[0].lstrip('-')} has no flag, give the value alone"
            named = [flag for flag, has_flag in flags.items() if has_flag]
            near = [name for token in tokens for name in difflib.get_close_matches(token, named, 1)]
            return f"unknown {' '.join(tokens)}" + (f"; nearest: {', '.join(near)}" if near else "")


def _flags(command: object) -> Iterator[tuple[str, bool]]:
    """The fields of a dataclass, and of those in its fields, spelt as flags; and whether they are flags, not values
    that are given by their position."""
    positional = get_args(tyro.conf.Positional[int])[1]
    for name, hint in get_type_hints(command, include_extras=True).items():
        plain, *marks = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        if is_dataclass(plain):
            yield from _flags(plain)
        else:
            yield f"--{name.replace('_', '-')}", positional not in marks


if __name__ == "__main__":
    main()
