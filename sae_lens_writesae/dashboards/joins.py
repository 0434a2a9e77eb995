"""Results of other evaluations, by atom."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from sae_lens_writesae.dashboards.data import Reader, Substituted
from sae_lens_writesae.firings import HeadHook
from sae_lens_writesae.substitution_result import SubstitutionResult

READER_COLUMNS = ("atom", "layer", "head", "change")


def substituted(result: SubstitutionResult, hook: HeadHook) -> Mapping[int, list[Substituted]]:
    """Per written atom, one row for each scale.

    Raises:
        ValueError: the test is about another hook.
    """
    if result.info.hook_name != hook.name:
        raise ValueError(f"the substitution test is about {result.info.hook_name}, the SAE reads {hook.name}")
    wide: Any = result.wide("kl_window")
    config = result.info.config
    pages: dict[int, list[Substituted]] = {}
    for atom, rows in wide.groupby("written_atom"):
        pages[int(atom)] = [_row(rows, scale, config.controls) for scale in config.scales]
    return pages


def _row(rows: Any, scale: str, controls: tuple[str, ...]) -> Substituted:
    beats = {name: float((rows[f"{name}/{scale}"] < rows["delete"]).mean()) for name in ("atom", *controls)}
    best = max(controls, key=lambda name: beats[name], default=None)
    kl = rows[f"atom/{scale}"]
    medians = float(kl.median()), float(rows["delete"].median())
    return Substituted(scale, len(rows), beats["atom"], *medians, best, beats[best] if best else None)


def readers_of(table: pd.DataFrame, n: int) -> Mapping[int, list[Reader]]:
    """Per atom its n strongest readers: a table with the columns atom, layer, head, change (any measure of how much a
    later head changes; larger is more). Several rows of one head are averaged.

    Raises:
        ValueError: a column is missing.
    """
    if missing := [name for name in READER_COLUMNS if name not in table]:
        raise ValueError(
            f"a table of readers needs the columns {', '.join(READER_COLUMNS)}; {', '.join(missing)} missing"
        )
    grouped: Any = table.groupby(["atom", "layer", "head"])["change"]
    means = grouped.mean().reset_index()
    means = means.sort_values("change", ascending=False, kind="stable")
    pages: dict[int, list[Reader]] = {}
    for atom, rows in means.groupby("atom"):
        pages[int(atom)] = [Reader(int(r.layer), int(r.head), float(r.change)) for r in rows.head(n).itertuples()]
    return pages
