"""A self-contained HTML report of one or several substitution tests, side by side, with its numbers as JSON
beside it.

It reads like the results section of a paper: claim, the paper's number, the number measured here, controls,
verdict. The words of the page are in `report_template.html`, figures in `plots.py`, verdict rules in
`summary.Verdict`.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import pandas as pd

from sae_lens_writesae import plots
from sae_lens_writesae import report_text as text
from sae_lens_writesae.conditions import CONTROLS, DEFINITIONS, NAMES, REFERENCES, SCALE_DEFINITIONS
from sae_lens_writesae.substitution_result import SubstitutionResult
from sae_lens_writesae.summary import EXACT_FLOOR, Summary, Verdict
from sae_lens_writesae.verdict.statistics import Rate, win_rate
from sae_lens_writesae.writing import write_aside

TITLE = "Can an atom stand in for the write it replaces?"


class ReportFiles(NamedTuple):
    """What was written."""

    html: Path
    json: Path


@dataclass(frozen=True)
class _Entry:
    """One test in the report."""

    result: SubstitutionResult
    summary: Summary
    scale: str
    """Scale of the headline."""
    name: str
    """Label, made unique within the report."""
    by_metric: dict[str, Rate]
    """Atom against deletion at the headline scale, for every metric that was measured."""

    @property
    def verdict(self) -> Verdict:
        return self.summary.verdicts[self.scale]

    @property
    def rivals(self) -> tuple[str, ...]:
        """Controls that confound the headline result: they beat deletion and the atom does not beat them."""
        return self.verdict.controls


def write_report(
    results: SubstitutionResult | Sequence[SubstitutionResult],
    path: str | Path,
    *,
    title: str = TITLE,
    metric: str = "kl_window",
    scale: str = "coefficient",
    cluster: str = "sequence",
    steps: Sequence[pd.DataFrame] | None = None,
) -> ReportFiles:
    """Write `path` (.html) and the same numbers beside it (.json). Each is written aside and renamed.

    Args:
        results: tests to show side by side, e.g. a write-trained and a state-trained SAE of one head, or many heads.
        path: where to write; the suffix becomes .html.
        title: heading of the page.
        metric: headline metric, of `substitution_result.METRICS`.
        scale: headline scale, by default what the SAE itself says; the others stand beside it, never mixed with it.
        cluster: "sequence" or "atom", what the bootstrap resamples.
        steps: for each result the table of `multistep.multistep_divergence`, which adds two figures.

    Raises:
        ValueError: no result, one without the metric or the scale, or not one table of steps for each.
    """
    entries = _entries([results] if isinstance(results, SubstitutionResult) else results, metric, scale, cluster)
    if steps is not None and len(steps) != len(entries):
        raise ValueError(f"steps needs one table for each of {len(entries)} results, found {len(steps)}")
    target = Path(path).with_suffix(".html")
    numbers = {
        "title": title,
        "metric": metric,
        "scale": scale,
        "tests": [{"name": e.name, "info": e.result.info.to_dict(), **e.summary.to_dict()} for e in entries],
    }
    beside = target.with_suffix(".json")
    for file, content in (
        (beside, json.dumps(numbers, indent=1, allow_nan=False)),
        (target, _render(entries, title, metric, steps or [])),
    ):
        write_aside(file, lambda aside, content=content: aside.write_text(content, encoding="utf-8"))
    return ReportFiles(target, beside)


def _entries(results: Sequence[SubstitutionResult], metric: str, scale: str, cluster: str) -> list[_Entry]:
    if not results:
        raise ValueError("a report needs at least one substitution result, found none")
    names = text.unique_names([result.info for result in results])
    entries = []
    for result, name in zip(results, names):
        scales = result.info.config.scales
        if scale not in scales:
            raise ValueError(f"scale {scale!r} was not run for {name}; there are {', '.join(scales)}")
        by_metric = {}
        for other in result.metrics:
            wide = result.wide(other)
            by_metric[other] = win_rate(wide[f"atom/{scale}"], wide["delete"], wide[cluster])
        entries.append(_Entry(result, result.summary(metric, cluster), scale, name, by_metric))
    return entries


def _render(entries: list[_Entry], title: str, metric: str, steps: Sequence[pd.DataFrame]) -> str:
    """The page."""
    loader = jinja2.PackageLoader("sae_lens_writesae", "")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"pct": text.percent, "span": text.span, "num": plots.number, "p": text.p_value}
    scale = entries[0].scale
    run = {s for e in entries for s in e.result.info.config.scales}
    scales = [scale, *(s for s in SCALE_DEFINITIONS if s in run and s != scale)]  # the headline's first
    return environment.get_template("report_template.html").render(
        title=title,
        metric=metric,
        metric_names=text.METRIC_NAMES,
        scale=scale,
        scales=scales,
        scale_names=plots.SCALE_NAMES,
        scale_definitions=SCALE_DEFINITIONS,
        names=NAMES,
        definitions=DEFINITIONS,
        controls=[c for c in (*CONTROLS, *REFERENCES) if any(c in e.result.info.config.controls for e in entries)],
        entries=entries,
        leads=[_lead(entries, each) for each in scales],
        infos=[e.result.info for e in entries],
        paper=text.PAPER,
        claims=_claims(entries, scales),
        figures=_figures(entries, steps),
        memory=_memory_figure(entries),
        outcome=text.outcome,
        kl_row=_kl_row,
        exact_floor=EXACT_FLOOR,
    )


def _lead(entries: list[_Entry], scale: str) -> str:
    """The sentence over all tests at one scale (over those that ran it)."""
    ran = [e for e in entries if scale in e.summary.verdicts]
    return text.lead([e.summary.verdicts[scale] for e in ran], [e.name for e in ran], scale)


def _claims(entries: list[_Entry], scales: list[str]) -> list[dict[str, Any]]:
    """Per scale, what the claims table shows of each entry (None where a scale was not run)."""
    blocks = []
    for scale in scales:
        cells = []
        for entry in entries:
            summary = entry.summary
            if scale not in summary.verdicts:
                cells.append(None)
                continue
            chains: Any = summary.chains
            chain = chains[(chains["scale"] == scale) & (chains["chain"] == "atom < delete < shuffled")]
            controls = [c for c in CONTROLS if c in entry.result.info.config.controls]
            best = max(controls, key=lambda c: summary.rate(c, "delete", scale)["rate"], default=None)
            cells.append(
                {
                    "win": summary.rate("atom", "delete", scale),
                    "chain": None if chain.empty else chain.iloc[0],
                    "medians": [_kl_row(summary, name, scale) for name in ("atom", "delete", "shuffled")],
                    "best": best,
                    "best_rate": None if best is None else summary.rate(best, "delete", scale),
                    "against_best": None if best is None else summary.rate("atom", best, scale),
                    "verdict": summary.verdicts[scale],
                }
            )
        blocks.append({"scale": scale, "cells": cells})
    return blocks


def _kl_row(summary: Summary, name: str, scale: str) -> Any:
    """The row of `summary.conditions`, None where the condition was not run."""
    table: Any = summary.conditions
    wanted = "none" if name in ("native", "delete") else scale
    rows = table[(table["condition"] == name) & (table["scale"] == wanted)]
    return None if rows.empty else rows.iloc[0]


def _figures(entries: list[_Entry], steps: Sequence[pd.DataFrame]) -> dict[str, list[str]]:
    """Panels by figure, one per entry."""
    wides = [e.result.wide(e.summary.metric) for e in entries]
    return {
        "wins": [plots.win_rate_figure(e.summary, e.rivals, e.name) for e in entries],
        "ratio": [plots.ratio_figure(w, e.scale, e.rivals, e.name) for e, w in zip(entries, wides)],
        "kl": [plots.kl_figure(w, e.scale, e.summary.floor, e.rivals, e.name) for e, w in zip(entries, wides)],
        "quartiles": [plots.quartile_figure(e.summary, e.scale, e.rivals, e.name) for e in entries],
        "cosines": [plots.cosine_figure(e.summary, e.scale, e.name) for e in entries],
        **{
            column: [plots.steps_figure(s, column, e.scale, e.rivals, e.name) for e, s in zip(entries, steps)]
            for column in ("state_gap", "residual_cosine")
        },
    }


def _memory_figure(entries: list[_Entry]) -> str | None:
    """The figure by half-life, where there is more than one head."""
    if len({(e.result.info.layer, e.result.info.head) for e in entries}) < 2:
        return None
    points = []
    for e in entries:
        rate, info = e.by_metric[e.summary.metric], e.result.info
        capped = info.half_life >= info.half_life_limit
        rivals: list[Any] = [
            e.summary.rate(c, "delete", e.scale)["rate"] for c in info.config.controls if c not in REFERENCES
        ]
        best = max(rivals, default=None)
        points.append(plots.HeadPoint(e.name, info.target, info.half_life, capped, rate.rate, *rate.bootstrap, best))
    return plots.half_life_figure(points)
