"""What the code has that needs a page: hooks, evaluations, errors."""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from pathlib import Path

from hookpoints.hooks.table import HOOKS, HookRow

ROOT = Path(__file__).parents[2]
PACKAGES = ("hookpoints", "sae_lens_writesae")
_ENDINGS = ("Error", "Warning")


@dataclass(frozen=True)
class ErrorClass:
    """An error or warning that the packages define, as their source has it."""

    name: str
    module: str
    bases: tuple[str, ...]
    docstring: str
    messages: list[str] = field(default_factory=list)
    """What it is raised with, each once, in order of the source; what is filled in stands in ‹›."""


def hook_page(row: HookRow) -> str:
    """Name of a hook's page: hooks of a mixer and of one head may have the same name."""
    return f"{row.scope}.{row.name}"


def hooks() -> dict[str, HookRow]:
    """Every row of the hook table, by the name of its page."""
    return {hook_page(row): row for row in HOOKS}


def errors() -> dict[str, ErrorClass]:
    """Every public error class of the packages, by name."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in _sources()}
    found = {
        node.name: ErrorClass(node.name, _module(path), _bases(node), ast.get_docstring(node) or "")
        for path, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and node.name.endswith(_ENDINGS) and not node.name.startswith("_")
    }
    for tree in trees.values():
        for call in _raised(tree):
            known = found.get(_name(call.func))
            message = _message(call)
            if known is not None and message and message not in known.messages:
                known.messages.append(message)
    return found


def _sources() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def _module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def _bases(node: ast.ClassDef) -> tuple[str, ...]:
    return tuple(ast.unparse(base) for base in node.bases)


def _raised(tree: ast.AST) -> list[ast.Call]:
    """Calls that make what is raised, and calls of warn."""
    nodes = list(ast.walk(tree))
    raised = [node.exc for node in nodes if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)]
    for node in nodes:  # warnings.warn(message, Class) as Class(message)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "warnings.warn" and len(node.args) > 1:
            raised.append(ast.Call(node.args[1], node.args[:1], []))
    return raised


def _name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else ""


def _message(call: ast.Call) -> str:
    return _text(call.args[0]).strip("… ") if call.args else ""


def _text(node: ast.expr) -> str:
    """An f-string as a reader would search for it; what is put in at run time becomes ‹name›."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return f"‹{_hole(node.value)}›"
    # A message made by a function: its last argument is the part that differs.
    if isinstance(node, ast.Call) and node.args:
        return f"… {_text(node.args[-1])}"
    return ""


def _hole(node: ast.expr) -> str:
    """A name for what is filled in: that of a variable or a field, or dots where it is computed."""
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else "…"
