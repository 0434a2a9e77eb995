"""Settings of a class as its source states them: flags and help then load no torch."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, NamedTuple, TypeVar, cast

import tyro

from writesae.cli import parse

T = TypeVar("T")

_PACKAGES = ("writesae", "sae_lens_writesae")
_ROOT = Path(__file__).parents[1]


class Setting(NamedTuple):
    """One field of a class."""

    type: object
    default: object
    text: str
    """Its docstring."""


class EvaluationSource(NamedTuple):
    """Where an evaluation is, and what it asks."""

    module: str
    name: str
    question: str


class _Module(dict[str, object]):
    """The top-level names of a module of this package, each evaluated from the source when it is asked for."""

    def __init__(self, name: str):
        super().__init__()
        file = _ROOT.joinpath(*name.split("."))
        file = file / "__init__.py" if file.is_dir() else file.with_suffix(".py")
        self.classes: dict[str, ast.ClassDef] = {}
        self.imported: dict[str, tuple[str, str]] = {}
        self.assigned: dict[str, ast.expr] = {}
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                self.classes[node.name] = node
            elif isinstance(node, ast.ImportFrom) and node.module:
                self.imported |= {alias.asname or alias.name: (node.module, alias.name) for alias in node.names}
            elif isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
                target = node.targets[0] if isinstance(node, ast.Assign) else node.target
                self.assigned[ast.unparse(target)] = node.value

    def __missing__(self, name: str) -> object:
        if name in self.assigned:
            self[name] = self.evaluate(self.assigned[name])
        elif name in self.imported:
            module, attribute = self.imported[name]
            own = module.partition(".")[0] in _PACKAGES
            self[name] = _module(module)[attribute] if own else getattr(importlib.import_module(module), attribute)
        else:
            raise KeyError(name)  # then `eval` looks among the built-in names
        return self[name]

    def evaluate(self, node: ast.expr) -> object:
        """The value of an expression of this module."""
        return eval(ast.unparse(node), {}, self)

    def settings(self, name: str) -> dict[str, Setting]:
        """The fields of a dataclass, those of the classes that it extends first."""
        if name not in self.classes:
            module, attribute = self.imported[name]
            return _module(module).settings(attribute) if module.partition(".")[0] in _PACKAGES else {}
        found: dict[str, Setting] = {}
        for base in self.classes[name].bases:
            found |= self.settings(ast.unparse(base))
        body = self.classes[name].body
        for node, after in zip(body, [*body[1:], None]):
            if isinstance(node, ast.AnnAssign) and not ast.unparse(node.annotation).startswith("ClassVar"):
                field = ast.unparse(node.target)
                default = dataclasses.MISSING if node.value is None else self.evaluate(node.value)
                told = ast.literal_eval(after.value) if isinstance(after, ast.Expr) else None
                text = inspect.cleandoc(told) if isinstance(told, str) else found[field].text if field in found else ""
                found[field] = Setting(self.evaluate(node.annotation), default, text)
        return found


_module = cache(_Module)


def settings_of(module: str, name: str) -> dict[str, Setting]:
    """The fields of a dataclass of this package, in order, by name. Nothing that needs torch is imported; costs
    milliseconds.

    Args:
        module: in full, `writesae.evaluations.sign`.
    """
    return _module(module).settings(name)


def parse_with(
    command: type[T], module: str, name: str, program: str, arguments: Sequence[str]
) -> tuple[T, dict[str, object]]:
    """The command line as a value of `command`, and the settings that it gives to a class, which is not imported."""
    settings = dataclasses.make_dataclass(
        name,
        [
            (field, Annotated[setting.type, tyro.conf.arg(help=setting.text)], setting.default)
            for field, setting in settings_of(module, name).items()
        ],
        frozen=True,
        kw_only=True,
    )
    settings.__doc__ = ast.get_docstring(_module(module).classes[name])
    both = dataclasses.make_dataclass(
        "Command",
        [("command", tyro.conf.OmitArgPrefixes[command]), ("settings", tyro.conf.OmitArgPrefixes[settings])],
        frozen=True,
    )
    both.__doc__ = command.__doc__
    given = parse(both, program, arguments)
    return given.command, vars(given.settings)


@cache
def evaluations() -> dict[str, EvaluationSource]:
    """Every evaluation by its kind, in the order of `EVALUATIONS`."""
    found: list[tuple[int, str, EvaluationSource]] = []
    for file in (_ROOT / "writesae" / "evaluations").glob("[!_]*.py"):
        module = f"writesae.evaluations.{file.stem}"
        for name, node in _module(module).classes.items():
            values = {
                ast.unparse(line.target): line.value
                for line in node.body
                if isinstance(line, ast.AnnAssign) and line.value is not None
            }
            if "kind" in values:
                kind, question = (cast(str, ast.literal_eval(values[each])) for each in ("kind", "question"))
                answers = ast.literal_eval(values["answers"]) if "answers" in values else ()
                found.append((min(answers, default=99), kind, EvaluationSource(module, name, question)))
    return {kind: source for _, kind, source in sorted(found)}
