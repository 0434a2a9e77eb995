"""One page per error class: what it says, when it is raised, how to mend it, and an example that really raises it."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass, field
from pathlib import Path

from docs_site import texts

ROOT = Path(__file__).parents[2]
HEADINGS = ("When it is raised", "How to mend it", "Example")


@dataclass(frozen=True)
class ErrorClass:
    """An error or a warning that the packages define, as their source has it."""

    name: str
    module: str
    bases: tuple[str, ...]
    docstring: str
    messages: list[str] = field(default_factory=list)
    """What it is raised with, each once, in order of the source; `‹name›` is filled in at run time."""


def errors() -> dict[str, ErrorClass]:
    """Every public error class of the two packages, by name, with the messages of all places that raise it."""
    files = sorted(
        path for package in ("hookpoints", "sae_lens_writesae", "writesae") for path in (ROOT / package).rglob("*.py")
    )
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in files}
    classes: dict[str, ErrorClass] = {}
    for path, tree in trees.items():
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and re.fullmatch(r"[^_].*(Error|Warning)", node.name):
                bases = tuple(ast.unparse(base) for base in node.bases)
                classes[node.name] = ErrorClass(node.name, module, bases, ast.get_docstring(node) or "")
    for node in (node for tree in trees.values() for node in ast.walk(tree)):
        name, message = "", None
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
            name, message = ast.unparse(node.exc.func), node.exc.args[0]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "warnings.warn" and len(node.args) > 1:
            name, message = ast.unparse(node.args[1]), node.args[0]
        if name in ("error", "self.error"):  # of a folder: the reader's own class, and this one where it has none
            name = "ChecksumError"
        if name in classes and message is not None:
            text = _text(message).strip("… ")
            if text and text not in classes[name].messages:
                classes[name].messages.append(text)
    return classes


def _text(node: ast.expr) -> str:
    """An f-string as a reader would search for it, with ‹name› for what is put in at run time."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(map(_text, node.values))
    if isinstance(node, ast.FormattedValue):
        return f"‹{getattr(node.value, 'attr', getattr(node.value, 'id', '…'))}›"
    if isinstance(node, ast.Call) and node.args:  # a message made by a function: its last argument is what differs
        return f"… {_text(node.args[-1])}"
    return ""


def pages() -> dict[str, str]:
    """Path -> Markdown of every error page, and of the index."""
    classes = errors()
    texts.check_no_strays("errors", classes)
    rows = [(f"[`{name}`]({name}.md)", error.docstring.split("\n\n")[0]) for name, error in classes.items()]
    index = texts.page("errors", table=texts.table(("error", "meaning"), rows))
    return {"errors/index.md": index} | {f"errors/{name}.md": page(error) for name, error in classes.items()}


def page(error: ErrorClass) -> str:
    """The page of one error. Its example must raise it, or a subclass of it; the example of a warning prints it."""
    if not error.docstring:
        raise texts.MissingTextError(f"{error.module}.{error.name} has no docstring")
    ran = texts.run(texts.read("errors", error.name, HEADINGS), error.name, may_raise=True)
    kinds = [kind.__name__ for kind in type(ran.raised).__mro__]
    is_warning = error.name.endswith("Warning")
    if (ran.raised is not None) if is_warning else (error.name not in kinds):
        raise RuntimeError(f"the example of {error.name} raised {ran.raised!r}") from ran.raised
    bases = ", ".join(f"`{base}`" for base in error.bases)
    facts = texts.table(("", ""), [("defined in", f"`{error.module}`"), ("is also", bases)])
    shown = "" if is_warning else f"\nraises\n\n```text\n{type(ran.raised).__name__}: {ran.raised}\n```\n"
    parts = [f"# `{error.name}`\n", f"{error.docstring}\n", facts, ran.markdown, shown]
    if error.messages:
        parts.append("\n## What it says\n\nEvery message, from the source; `‹…›` is filled in.\n")
        parts += [f"* {_plain(message)}" for message in error.messages]
    return "\n".join(parts) + "\n"


def _plain(message: str) -> str:
    """A message without any Markdown in it."""
    return re.sub(r"([\\`*_{}\[\]<>#|])", r"\\\1", message).replace("\n", " ")
