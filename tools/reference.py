"""Write docs/reference.md, and the table of docs/hooks.md, from docstrings and the table of hooks.

python tools/reference.py
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from tables import escape, table

import hookpoints
import sae_lens_writesae
import writesae
from hookpoints.hooks.table import HOOKS

DOCS = Path(__file__).parents[1] / "docs"
TEXT = """# All of hookpoints

Every public name with its signature, made from the docstrings by `python tools/reference.py`.
`help(Memory.without)` has the arguments, shapes and errors of a call.
B batch, T token, H head, K key channel, V value channel, F atom, R rank, D model width.
"""
PACKAGES = {
    hookpoints: "Import these from `hookpoints`. It loads torch and transformers with the first name that needs them.",
    sae_lens_writesae: "Import these from `sae_lens_writesae`, which registers the architectures in SAELens.",
    writesae: "Import these from `writesae`; [Commands](commands.md) has the command line.",
}


def reference() -> str:
    """The page."""
    return TEXT + "".join(
        f"\n## {package.__name__}\n\n{first}\n\n{''.join(entries(package))}" for package, first in PACKAGES.items()
    )


def entries(package: ModuleType) -> Iterator[str]:
    """Each public name of a package: functions and classes, and below a class its public methods."""
    for name in package.__all__:
        value = getattr(package, name)
        if not callable(value) or not hasattr(value, "__module__") or inspect.isbuiltin(value):
            yield f"* **`{name}`** {constant(package, name, value)}\n"
            continue
        yield f"* **`{name}{signature(value)}`** {summary(value)}\n"
        for method, member in public_members(value):
            yield f"    * `.{method}{signature(member)}` {summary(member)}\n"


def constant(package: ModuleType, name: str, value: object) -> str:
    """What a module says of itself, and what a table or a type is."""
    if inspect.ismodule(value):
        return f"The module: {summary(value)}"
    return {"HOOKS": "Every hook as a row of a table.", "RULES": "Every update rule."}.get(name, f"`{value}`")


def public_members(value: object) -> list[tuple[str, object]]:
    """Methods and properties that a class of these packages defines, in the order of its source. What it has from
    another public class, or only to serve SAELens' loading, is left out."""
    if not inspect.isclass(value) or issubclass(value, Exception):
        return []
    listed = {base for parent in public_classes() - {value} if issubclass(value, parent) for base in parent.__mro__}
    own = [
        base for base in reversed(value.__mro__) if base.__module__.partition(".")[0] in ROOTS and base not in listed
    ]
    members = {name: member for base in own for name, member in vars(base).items() if not name.startswith("_")}
    return [(name, member) for name, member in members.items() if docstring(member) and not UPSTREAM.match(name)]


def public_classes() -> set[type]:
    names = [getattr(package, name) for package in PACKAGES for name in package.__all__]
    return {each for each in names if inspect.isclass(each)}


UPSTREAM = re.compile("process_|fold_|initialize_weights|training_forward_pass|setup$")
"""Names of what SAELens and TransformerLens call."""
ROOTS = {package.__name__ for package in PACKAGES}


def plain(member: object) -> object:
    """The function behind a property, a class method or a static method."""
    for attribute in ("fget", "__func__", "func"):
        member = getattr(member, attribute, None) or member
    return member


def docstring(member: object) -> str:
    function = plain(member)
    if not (inspect.isclass(function) or inspect.isfunction(function) or inspect.ismodule(function)):
        return ""
    return inspect.cleandoc(vars(function).get("__doc__") or function.__doc__ or "")


def signature(member: object) -> str:
    """Names and defaults of the arguments; a property and an error have none."""
    function = plain(member)
    if isinstance(member, property) or (inspect.isclass(function) and issubclass(function, Exception)):
        return ""
    parameters = inspect.signature(function).parameters.values()  # pyright: ignore[reportArgumentType]
    if inspect.isclass(function) and "Made by" in docstring(function):
        return ""
    shown, keyword_only = [], False
    for parameter in parameters:
        if parameter.name in ("self", "cls"):
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            keyword_only = True
            shown.append("*")
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        default = "" if parameter.default is parameter.empty else f"={default_text(parameter.default)}"
        shown.append(f"{stars}{parameter.name}{default}")
        keyword_only |= parameter.kind is parameter.VAR_POSITIONAL
    return f"({', '.join(shown)})"


def default_text(value: object) -> str:
    """A default as it is written; an object without a short form is an ellipsis."""
    return repr(value) if isinstance(value, (str, int, float, bool, tuple, type(None))) else "..."


def summary(member: object) -> str:
    """The first sentence of a docstring, and of what it says of results and cost."""
    first, *others = re.split(r"\n\s*\n", docstring(member))
    parts = [sentence(first), *(sentence(each) for each in others if re.match(r"(Cost|Returns): ", each))]
    return escape(re.sub(r"``([^`]+)``", r"`\1`", " ".join(parts)))


def sentence(paragraph: str) -> str:
    """Up to the first period that ends one."""
    return re.split(r"(?<=[a-z0-9)`\]]\.) ", " ".join(paragraph.split()), maxsplit=1)[0]


def hook_table() -> str:
    """Every hook, in order of execution. What an edit does is said once, and then by the name of that hook."""
    first: dict[str, str] = {}
    rows = []
    for row in HOOKS:
        edit = f"as `{first[row.edit]}`" if row.edit in first else row.edit
        first.setdefault(row.edit, row.name)
        rows.append((f"`{row.full_name()}`", f"`{row.axes}`", row.meaning, edit))
    return table(("hook", "axes", "what it is", "an edit"), rows)


def hooks_page(page: str) -> str:
    """The page of hooks with its table as it is now."""
    return re.sub(r"(?<=<!-- hooks -->\n).*(?=<!-- /hooks -->)", lambda _: f"\n{hook_table()}\n", page, flags=re.DOTALL)


if __name__ == "__main__":
    (DOCS / "reference.md").write_text(reference(), encoding="utf-8")
    page = DOCS / "hooks.md"
    page.write_text(hooks_page(page.read_text(encoding="utf-8")), encoding="utf-8")
