"""Blocks ```` ```math ```` become MathML where the site is built: browsers draw it without a script or a network."""

from __future__ import annotations

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
