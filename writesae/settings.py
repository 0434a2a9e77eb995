"""Settings of evaluations and of atom pages, read off the source, so that a command line is parsed without torch.

The type and the default of a setting may use names of the same file, of `typing`, and of files of this project where
the same holds. A test compares what is read with the classes themselves.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import itertools
from dataclasses import field, make_dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import tyro

_PACKAGES = ("hookpoints", "sae_lens_writesae", "writesae", "writesae_study")


@cache
def definitions(module: str) -> dict[str, ast.stmt]:
    """The statement at the top of a module of this project that defines each name."""
    package, *inside = module.split(".")
    spec = find_spec(package)  # of the package: a module inside is found without an import
    root = Path(str(spec and spec.origin)).parent
    file = root.joinpath(*inside).with_suffix(".py")
    defined: dict[str, ast.stmt] = {}
    for statement in ast.parse(file.read_text(encoding="utf-8")).body:
        match statement:
            case ast.ClassDef(name=name):
                defined[name] = statement
            case ast.ImportFrom(names=aliases):
                defined |= {alias.name: statement for alias in aliases}
            case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
                defined[name] = statement
    return defined


class Words(dict[str, object]):
    """What the names of a module stand for; each is evaluated when it is asked for, and no class."""

    def __init__(self, module: str):
        super().__init__()
        self.module = module

    def __missing__(self, name: str) -> object:
        match definitions(self.module).get(name):
            case ast.ImportFrom(module=str(home)):
                # Modules of this project are read and not imported, but for the one that is written to be cheap.
                loads_torch = home.partition(".")[0] in _PACKAGES and home != "writesae.choices"
                return Words(home)[name] if loads_torch else getattr(importlib.import_module(home), name)
            case ast.Assign(value=expression) | ast.AnnAssign(value=ast.expr() as expression):
                return self.value(expression)
        raise KeyError(name)  # `eval` then looks among Python's own names

    def value(self, expression: ast.expr) -> object:
        """What an expression of the module stands for."""
        # The source is this project's own: nothing that a user gives is evaluated.
        return eval(compile(ast.Expression(expression), self.module, "eval"), {}, self)


def class_constants(definition: ast.ClassDef) -> dict[str, ast.expr]:
    """The value of each annotated name of a class that has one."""
    statements = [statement for statement in definition.body if isinstance(statement, ast.AnnAssign)]
    return {ast.unparse(each.target): each.value for each in statements if each.value is not None}


def settings_of(module: str, name: str) -> type:
    """A dataclass with the settings of a class of this project, for `cli.parse_with`: names, types, defaults and
    docstrings of its fields, and of those of its bases. Values are not checked; the class itself does that.

    Raises:
        NameError: a type or a default names something that only an import gives.
    """
    documented = {"__doc__": ast.get_docstring(_class(module, name)[1])}
    return make_dataclass(name, _fields(module, name).values(), frozen=True, kw_only=True, namespace=documented)


def docstrings(definition: ast.ClassDef) -> dict[str, str]:
    """The docstring of each field of a class, as one paragraph."""
    documented = {}
    # A field's docstring is the statement after it; the last field may have none.
    for statement, following in itertools.pairwise([*definition.body, ast.Pass()]):
        match statement, following:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                documented[name] = " ".join(text.split())
    return documented


def docstrings_of(command: type) -> dict[str, str]:
    """The same of a dataclass with those that it extends, as far as they are of this project."""
    documented = {}
    for base in reversed(command.__mro__):
        in_project = base.__module__.partition(".")[0] in _PACKAGES
        definition = definitions(base.__module__).get(base.__name__) if in_project else None
        if isinstance(definition, ast.ClassDef):
            documented |= docstrings(definition)
    return documented


def _class(module: str, name: str) -> tuple[str, ast.ClassDef]:
    """Where a class of this project is defined, and its definition; KeyError for one that is defined elsewhere."""
    match definitions(module).get(name):
        case ast.ClassDef() as definition:
            return module, definition
        case ast.ImportFrom(module=str(home)) if home.partition(".")[0] in _PACKAGES:
            return _class(home, name)
    raise KeyError(name)


def _fields(module: str, name: str) -> dict[str, tuple[str, object, object]]:
    """Name, type and default of each field, as `make_dataclass` takes them."""
    home, definition = _class(module, name)
    words = Words(home)
    fields: dict[str, tuple[str, object, object]] = {}
    for base in reversed(definition.bases):  # the order in which a dataclass has the fields of its bases
        with contextlib.suppress(KeyError):
            fields |= _fields(home, ast.unparse(base))
    documented = docstrings(definition)
    for statement in definition.body:
        if isinstance(statement, ast.AnnAssign) and not ast.unparse(statement.annotation).startswith("ClassVar"):
            setting = ast.unparse(statement.target)
            kind = Annotated[words.value(statement.annotation), tyro.conf.arg(help=documented.get(setting))]
            default = field() if statement.value is None else words.value(statement.value)
            fields[setting] = (setting, kind, default)
    return fields
