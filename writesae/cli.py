"""The `writesae` command. The flags of a command are a dataclass: its fields are the flags, its docstrings the help.

Torch is imported with the function that does the work, after the flags are parsed, so that help and misspelt flags take
no seconds.
"""

from __future__ import annotations

import contextlib
import difflib
import inspect
import io
import re
import shutil
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, field, fields, is_dataclass, make_dataclass
from importlib.metadata import distributions, entry_points
from pkgutil import resolve_name
from textwrap import fill
from typing import Annotated, Any, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

import tyro
from docstring_parser import parse_from_object

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
    given: Any = words[1:]
    if command.flags:
        given = parse(resolve_name(command.flags), f"writesae {name}", words[1:])
        if hasattr(given, "check"):
            given.check()
    if name == "demo":
        print("loading PyTorch, transformers and SAELens", flush=True)  # ten seconds, and more beside other work
    written = resolve_name(command.work)(given)
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
    """The command line as a value of `command`. A flag `device` is obeyed at once, for all that this process does.

    Raises:
        ValueError: an argument is unknown, missing or refused; in one line.
    """
    if not {"-h", "--help"}.isdisjoint(arguments):
        print(reflowed(command), end="\n\n")
    shown = io.StringIO()
    form = make_dataclass("Form", form_fields(command, default), kw_only=True)
    try:
        with contextlib.redirect_stderr(shown):
            values, unknown = tyro.cli(form, prog=program, args=arguments, description="", return_unknown_args=True)
        if not unknown:
            choose_device(vars(values).get("device"))
            return filled(command, vars(values))
        refusal = unknown_arguments(unknown, form)
    except SystemExit as end:
        if not end.code:
            raise
        refusal = message_of(shown.getvalue())
    raise ValueError(f"{refusal.rstrip('.')}. {program} --help lists the flags")


def reflowed(command: type) -> str:
    """The docstring of a command in paragraphs as wide as the terminal, without its errors."""
    text, *_ = re.split(r"\n+(?:Args|Raises|Cost):", inspect.getdoc(command) or "")
    width = min(80, shutil.get_terminal_size().columns)
    paragraphs = re.split(r"\n\s*\n|\n(?=\* )", text)
    return "\n\n".join(fill(" ".join(part.split()), width) for part in paragraphs)


def form_fields(command: type, default: object) -> Iterator[tuple[str, object, object]]:
    """Name, type and default of the fields of a command, and of those in its fields, with docstrings as paragraphs:
    tyro would keep the lines of the source."""
    documented = {}
    for base in filter(is_dataclass, reversed(command.__mro__)):
        documented |= {
            each.arg_name: " ".join(str(each.description).split()) for each in parse_from_object(base).params
        }
    hints = get_type_hints(command, include_extras=True)
    for part in fields(command):
        hint = hints[part.name]
        value = part.default if default is None else getattr(default, part.name)
        plain = get_args(hint)[0] if get_origin(hint) is Annotated else hint
        if isinstance(plain, type) and is_dataclass(plain):
            yield from form_fields(plain, None if value is MISSING else value)
        else:
            yield part.name, Annotated[hint, tyro.conf.arg(help=documented.get(part.name))], field(default=value)


def filled(command: type[T], values: Mapping[str, object]) -> T:
    """A command of the values of a form. Raises what its checks raise."""
    hints = get_type_hints(command)
    given = {}
    for part in fields(command):  # pyright: ignore[reportArgumentType]
        kind = hints[part.name]
        is_nested = isinstance(kind, type) and is_dataclass(kind)
        given[part.name] = filled(kind, values) if is_nested else values[part.name]
    return command(**given)


def message_of(shown: str) -> str:
    """What tyro refuses, in one line: what its box on standard error has after the title, up to the next rule. Its
    errors as data are private, and may change in any release."""
    text = re.sub("[│╭╮╰╯]|[─-]{9,}", "", shown).strip()
    _, _, rest = text.partition("\n")
    message, *_ = re.split(r"\n\s*\n", rest.strip())
    return re.sub("^Error parsing (?=[A-Z]).*?: ", "", " ".join(message.split()))


def unknown_arguments(tokens: Sequence[str], form: type) -> str:
    """What is said of arguments that a command has not."""
    positional = get_args(tyro.conf.Positional[int])[1]
    given_alone: dict[str, bool] = {}
    for part in fields(form):
        given_alone["--" + part.name.replace("_", "-")] = positional in get_args(part.type)
    said = f"unknown {' '.join(tokens)}"
    if alone := [token for token in tokens if given_alone.get(token)]:
        return f"{said}: {alone[0].lstrip('-')} has no flag, give the value alone"
    flags = [flag for flag, alone in given_alone.items() if not alone]
    near = [name for token in tokens for name in difflib.get_close_matches(token, flags, 1)]
    return said + (f"; nearest: {', '.join(near)}" if near else "")


if __name__ == "__main__":
    main()
