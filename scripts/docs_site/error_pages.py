"""One page per error class: what it says, when it is raised, how to mend it, and one that is really raised."""

from __future__ import annotations

from docs_site import catalogue, texts
from docs_site.catalogue import ErrorClass

WANTED = (
    "the headings '## When it is raised' and '## How to mend it', and '## Example' with a Python block that raises it"
)
HEADINGS = ("## When it is raised", "## How to mend it", "## Example")


def pages() -> dict[str, str]:
    """Path -> Markdown of every error page, and of the index."""
    found = catalogue.errors()
    texts.check_no_strays("errors", list(found))
    return {"errors/index.md": index(found)} | {f"errors/{name}.md": page(error) for name, error in found.items()}


def page(error: ErrorClass) -> str:
    """The page of one error; its example must raise it (or, for a base class, one of its kinds)."""
    if not error.docstring:
        raise texts.MissingTextError(f"{error.module}.{error.name} has no docstring")
    text = texts.read("errors", error.name, WANTED)
    missing = [heading for heading in HEADINGS if heading not in text]
    if missing:
        raise texts.MissingTextError(f"the text of {error.name} lacks {', '.join(missing)}")
    ran = texts.run(text, error.name)
    lines = [
        f"# `{error.name}`",
        "",
        error.docstring,
        "",
        "| | |",
        "|---|---|",
        f"| defined in | `{error.module}` |",
        f"| is also | {', '.join(f'`{base}`' for base in error.bases)} |",
        "",
        ran.markdown.rstrip(),
        "",
        *_shown(error, ran.raised),
        *_messages(error),
    ]
    return "\n".join(lines)


def index(found: dict[str, ErrorClass]) -> str:
    """All errors with what they mean."""
    lines = [
        "# Errors",
        "",
        "Every message says what was asked, what was found and how to mend it. Errors of `hookpoints` have the base "
        "[HookpointsError](HookpointsError.md); settings that make no sense raise `ValueError` and name the field.",
        "",
        "| error | meaning |",
        "|---|---|",
    ]
    first = {name: error.docstring.split("\n\n")[0].replace("\n", " ") for name, error in found.items()}
    return "\n".join([*lines, *(f"| [`{name}`]({name}.md) | {meaning} |" for name, meaning in first.items())])


def _shown(error: ErrorClass, raised: BaseException | None) -> list[str]:
    """What the example raised. A warning is printed by its example, since nothing is raised."""
    if error.name.endswith("Warning"):
        if raised is not None:
            raise RuntimeError(f"the example of {error.name} raised {raised!r}") from raised
        return []
    kinds = [] if raised is None else [kind.__name__ for kind in type(raised).__mro__]
    if error.name not in kinds:
        raise RuntimeError(f"the example of {error.name} raised {raised!r}") from raised
    return ["raises", "", "```text", f"{type(raised).__name__}: {raised}", "```", ""]


def _messages(error: ErrorClass) -> list[str]:
    if not error.messages:
        return []
    lines = ["## What it says", "", "Every message, from the source; `‹…›` is filled in.", ""]
    for message in error.messages:
        lines += [f"* {_escaped(message)}"]
    return lines


def _escaped(message: str) -> str:
    for character in "\\`*_{}[]<>#|":
        message = message.replace(character, "\\" + character)
    return message.replace("\n", " ")
