"""One page per row of the hook table."""

from __future__ import annotations

from docs_site import texts
from hookpoints.hooks.table import HOOKS, HookRow
from hookpoints.rules import RULES

SCOPES = {
    "model": "the model (one)",
    "block": "each block",
    "mixer": "each recurrent mixer",
    "head": "each head of each recurrent mixer",
    "attn": "each block with attention",
}


def rows() -> dict[str, HookRow]:
    """Every row of the hook table by the name of its page; a mixer and a head may have hooks of one name."""
    return {f"{row.scope}.{row.name}": row for row in HOOKS}


def pages() -> dict[str, str]:
    """Path -> Markdown of every hook page, and of the index."""
    texts.check_no_strays("hooks", rows())
    listed = [(f"[`{row.full_name()}`]({name}.md)", f"`{row.axes}`", row.meaning) for name, row in rows().items()]
    index = texts.page("hooks", table=texts.table(("hook", "axes", "what it is"), listed))
    return {"hooks/index.md": index} | {f"hooks/{name}.md": page(name, row) for name, row in rows().items()}


def page(name: str, row: HookRow) -> str:
    """The page of one hook: what the table says of it, then its text with the example run."""
    text = texts.run(texts.read("hooks", name, ["Definition", "Example"]), f"hook {name}").markdown
    shape = "] or [".join(", ".join(axes).replace("(, K, V, )", "K·V") for axes in row.axes.split() if axes != "or")
    facts = {
        "name": f"`{row.full_name()}`",
        "one for": SCOPES[row.scope],
        "shape": f"`[{shape}]`",
        "fires": row.fires,
        "an edit": row.edit,
    }
    if row.per_step:
        facts["several steps a token"] = f"`{row.axes_of(2)}`: an axis R, where a token takes R > 1 steps"
    if row.factor is not None:
        have = {rule.name for rule in RULES if row.factor in rule.factor_names}
        facts["rules that have it"] = ", ".join(sorted(have))
        if lack := {rule.name for rule in RULES} - have:
            facts["rules that do not"] = ", ".join(sorted(lack))
    facts["memory"] = (
        "K × V (in patterns S) numbers per token and head: built for listeners only, and left out of `run_with_cache` "
        "unless named"
        if row.matrix
        else "a vector or a number per token; part of `run_with_cache`"
    )
    meaning = f"{row.meaning[0].upper()}{row.meaning[1:]}."
    return f"# `{row.name}`\n\n{meaning}\n\n{texts.table(('', ''), facts.items())}\n{text}\n"
