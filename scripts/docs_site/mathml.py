"""Blocks ```` ```math ````, and `$...$` of notebooks, become MathML where the site is built: browsers draw it without a
script or a network."""

from __future__ import annotations

import re
from typing import Any

from latex2mathml.converter import convert


def on_config(config: Any) -> Any:
    """MkDocs hook: SuperFences hands blocks of the language `math` to `fence`."""
    fences = config["mdx_configs"].setdefault("pymdownx.superfences", {}).setdefault("custom_fences", [])
    fences.append({"name": "math", "class": "math", "format": fence})
    return config


def fence(source: str, language: str, css_class: str, options: Any, md: Any, **_: Any) -> str:
    """One display formula a line; empty lines are skipped."""
    lines = [line for line in source.strip().splitlines() if line.strip()]
    return "".join(f'<div class="{css_class}">{convert(line, display="block")}</div>' for line in lines)


def formulas(text: str) -> str:
    """Markdown of a notebook with `$$...$$` and `$...$` as MathML; a dollar sign in code is left alone."""

    def convert_one(found: re.Match[str]) -> str:
        code, display, inline = found.groups()
        if code:
            return code
        if display:
            return fence(display.replace("\n", " "), "math", "math", None, None)
        # In a span, since Python-Markdown takes <math> at the start of a line for a block.
        return f"<span>{convert(inline)}</span>"

    return re.sub(
        r"(```.*?```|`[^`]*`)|\$\$(.+?)\$\$|\$([^\s$](?:[^$]*?[^\s$])?)\$", convert_one, text, flags=re.DOTALL
    )
