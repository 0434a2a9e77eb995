"""One page per row of the hook table."""

from __future__ import annotations

from docs_site import catalogue, texts
from hookpoints.hooks.table import HookRow
from hookpoints.rules import RULES

SCOPES = {
    "model": "the model (one)",
    "block": "each block",
    "mixer": "each recurrent mixer",
    "head": "each head of each recurrent mixer",
    "attn": "each block with attention",
}
AXES = {
    "B": "batch",
    "T": "time (token)",
    "H": "head",
    "K": "key channel",
    "V": "value channel",
    "D": "model width",
}
WANTED = "its definition as a formula and an example that runs on the embedded model"


def pages() -> dict[str, str]:
    """Path -> Markdown of every hook page, and of the index."""
    rows = catalogue.hooks()
    texts.check_no_strays("hooks", list(rows))
    made = {f"hooks/{name}.md": page(name, row) for name, row in rows.items()}
    return {"hooks/index.md": index(rows)} | made


def title(row: HookRow) -> str:
    """What the navigation calls it."""
    return f"{row.scope}: {row.name}" if row.scope in ("head", "mixer", "attn") else row.name


def page(name: str, row: HookRow) -> str:
    """The page of one hook: the table's facts, then the text with its example run."""
    for field in ("meaning", "edit", "axes", "fires"):
        if not getattr(row, field).strip():
            raise texts.MissingTextError(f"row {row.full_name()} of the hook table has no {field}")
    ran = texts.run(texts.read("hooks", name, WANTED), f"hook {name}")
    if ran.raised is not None:
        raise RuntimeError(f"the example of hook {name} raised {ran.raised!r}") from ran.raised
    return "\n".join([f"# `{row.name}`", "", f"{_sentence(row.meaning)}", "", *_facts(row), "", ran.markdown])


def index(rows: dict[str, HookRow]) -> str:
    """All hooks in order of execution."""
    lines = [
        "# Hooks",
        "",
        "Every hook point, in order of execution. `l` counts blocks, `h` heads, both from 0. Axes: "
        + ", ".join(f"**{letter}** {word}" for letter, word in AXES.items())
        + "; `(KV)` is one row-major axis of length K·V. States and writes are key-first (K × V) everywhere.",
        "",
        "| hook | axes | what it is |",
        "|---|---|---|",
    ]
    lines += [f"| [`{row.full_name()}`]({name}.md) | `{row.axes}` | {row.meaning} |" for name, row in rows.items()]
    lines += [
        "",
        "An unknown name raises [UnknownHookError](../errors/UnknownHookError.md) and names the nearest; a hook that "
        "was set and did not fire raises [HookDidNotFireError](../errors/HookDidNotFireError.md). Attention layers "
        "have no writes and say so. While nobody listens, outputs are bit-identical to the unhooked model's.",
        "",
        "Matrix hooks (write and state) are computed for the heads that somebody listens to, and `run_with_cache` "
        "leaves them out unless they are named.",
    ]
    return "\n".join(lines)


def _facts(row: HookRow) -> list[str]:
    facts = {
        "name": f"`{row.full_name()}`",
        "one for": SCOPES[row.scope],
        "shape": f"`[{_shape(row)}]`",
        "fires": row.fires,
        "an edit": row.edit,
    }
    if row.per_step:
        facts["several steps a token"] = f"`{row.axes_of(2)}`: an axis R, where a token takes R > 1 steps"
    if row.factor is not None:
        have = sorted({rule.name for rule in RULES if row.factor in rule.factor_names})
        lack = sorted({rule.name for rule in RULES} - set(have))
        facts["rules that have it"] = ", ".join(have)
        if lack:
            facts["rules that do not"] = ", ".join(lack)
    facts["memory"] = (
        "a K × V matrix per token: built for listeners only, and left out of `run_with_cache` unless named"
        if row.matrix
        else "a vector or a number per token; part of `run_with_cache`"
    )
    return ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in facts.items())]


def _shape(row: HookRow) -> str:
    words = [word for word in row.axes.split() if word != "or"]
    return "] or [".join(", ".join(axes).replace("(, K, V, )", "K·V") for axes in words)


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."
