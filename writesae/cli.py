"""The `writesae` command. The flags of a command are a dataclass, which tyro fills: its fields are the flags, its
docstrings the help.

Torch is imported with the function that does the work, after the flags are parsed, so that help and misspelt flags take
no seconds.
"""

from __future__ import annotations

import difflib
import signal
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import distributions, entry_points
from pkgutil import resolve_name
from typing import Any, NamedTuple, TypeVar

import tyro

from writesae.processes import choose_device

T = TypeVar("T")


class Command(NamedTuple):
    """A command, by names that are imported when it is asked for."""

    summary: str
    """What it does, in one line."""
    work: str
    """`module:name` of the function that does it. What it returns is printed."""
    flags: str = ""
    """`module:name` of the dataclass that the function takes; without one it takes the rest of the command line."""


COMMANDS = {
    "demo": Command(
        "Read a memory back, cut a sentence out of it, and train dictionaries on one head; offline, in a minute.",
        "writesae.demo:run_demo",
        "writesae.flags:Demo",
    ),
    "collect": Command(
        "Run a model once and keep what its heads write; dictionaries train from it.",
        "writesae.collecting:run_collect",
        "writesae.flags:Collect",
    ),
    "train": Command(
        "Train dictionaries on heads of a model.",
        "writesae.training:run_train",
        "writesae.flags:Train",
    ),
    "show": Command(
        "Make a page for each atom of a dictionary.",
        "writesae.show:run_show",
        "writesae.flags:Show",
    ),
    "push": Command(
        "Publish dictionaries on the Hugging Face hub, with a card that loads them.",
        "writesae.push:run_push",
        "writesae.flags:Push",
    ),
    "export": Command(
        "Write atoms as Neuronpedia reads them.",
        "writesae.show:run_export",
        "writesae.flags:Export",
    ),
    "prompt": Command(
        "Read a text in a browser, change the memory of it, and ask why the model answers.",
        "writesae.page.prompt:run_prompt",
        "writesae.flags:Prompt",
    ),
    "models": Command(
        "List the models on this machine, and the update rules that can be hooked.",
        "writesae.models:list_models",
        "writesae.flags:Models",
    ),
    "hooks": Command(
        "List the hooks of a model with their shapes.",
        "writesae.models:list_hooks",
        "writesae.flags:Hooks",
    ),
}
"""Other distributions add tables of the same kind (entry points of `GROUP`)."""
GROUP = "writesae.commands"
PACKAGES = ("sae-lens-writesae", "torch", "transformers", "transformer-lens", "sae-lens", "flash-linear-attention")
"""Those whose versions matter to a result, and to whoever reads a report of a fault."""


LOST = "what was not saved is lost"
RESUMED = "the same command resumes"
STOPPED = {name: RESUMED for name in ("demo", "collect", "train", "reproduce")} | {
    "eval": "results that are finished stay; with --resume, eval all takes them",
    "push": "dictionaries that were uploaded stay; the same command uploads all of them again",
}
"""What an interrupt leaves of each command, where it is not `LOST`."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the console script. An error that says what to mend ends with status 2 and no traceback, an
    interrupt with status 130 and a line that says what it left."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if callable(signal.getsignal(signal.SIGINT)):  # SAELens' runner leaves its own handler, with its own exception
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        run_command(words)
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


def commands() -> dict[str, Command]:
    """`COMMANDS`, and those that other distributions add."""
    added = [point.load() for point in entry_points(group=GROUP)]
    return {name: command for table in (COMMANDS, *added) for name, command in table.items()}


def run_command(words: Sequence[str]) -> None:
    """Run the command that the first word names, and print what it returns."""
    known = commands()
    name = choose("writesae", words, {name: command.summary for name, command in known.items()})
    command = known[name]
    flags: Any = words[1:]
    if command.flags:
        flags = parse(resolve_name(command.flags), f"writesae {name}", words[1:])
        if hasattr(flags, "check"):
            flags.check()
    if name == "demo":
        print("loading PyTorch, transformers and SAELens", flush=True)  # ten seconds, and more beside other work
    result = resolve_name(command.work)(flags)
    if result is not None:
        print(result)


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


def parse(command: type[T], program: str, arguments: Sequence[str], default: T = tyro.MISSING_NONPROP) -> T:
    """The command line as a value of `command`, by tyro: it prints help, and what it refuses, and ends with status 2.
    A flag `device` is obeyed at once, for all that this process does.

    Raises:
        ValueError: this machine has no such device.
    """
    flags = tyro.cli(command, prog=program, args=arguments, default=default)
    for part in (flags, *vars(flags).values()):  # those of the study hold flags in their fields
        choose_device(getattr(part, "device", None))
    return flags


if __name__ == "__main__":
    main()
