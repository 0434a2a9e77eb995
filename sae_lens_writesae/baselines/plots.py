"""Figures of the baselines."""

from __future__ import annotations

import math
from typing import Any

from sae_lens_writesae.baselines.claims import _name
from sae_lens_writesae.baselines.result import Baselines
from sae_lens_writesae.baselines.writes import ATOM, ATOM_SVD, SVD
from sae_lens_writesae.evaluation import Figure
from sae_lens_writesae.interventions.common import Estimate
from sae_lens_writesae.interventions.plots import Row, interval_figure

_WORDS = {ATOM: "strongest atom", ATOM_SVD: "atom cut to rank 1", SVD: "top-1 SVD of code"}
_COLOURS = {ATOM: "atom", ATOM_SVD: "soft", SVD: "ink"}


def figures(result: Baselines) -> list[Figure]:
    """Win rates, costs of whole replacement, and, per dictionary, selectivity."""
    where = result.label
    made = [
        Figure(
            "Nearer to the native model than deletion",
            interval_figure(_wins(result), "% of positions", f"Win rates: {where}", zero=0.5, percent=True),
            "The same positions for all; above, what needs no dictionary.",
        ),
        Figure(
            f"All {result.info['target']}s replaced at once",
            interval_figure(_costs(result, result.info["target"]), "% of perplexity", f"Costs of replacement: {where}"),
            "Change of perplexity, mean over sequences.",
        ),
    ]
    states = [method for method in _methods(result, "state", "") if method.startswith("rank ")]
    if states:
        rows = [_cost(f"states: {m}", result.cost(m, hook="state"), "rival") for m in states]
        svg = interval_figure(rows, "% of perplexity", f"Costs of cut states: {where}")
        made.append(Figure("States cut to a low rank", svg, "What no dictionary is needed for."))
    rows = []
    for sae in result.info["saes"]:
        found = result.excess(sae)
        if found is not None:
            rows.append(Row(sae, found.estimate, *found.interval, "atom"))
    if rows:
        svg = interval_figure(rows, "share of firings, above chance", f"Selectivity: {where}")
        made.append(Figure("Firings at an atom's own token", svg, "Median over atoms, above as many random positions."))
    return made


def _wins(result: Baselines) -> list[Row]:
    free = [name for name in result.conditions("") if name not in ("native", "delete")]
    rows = [Row(_name(name), *result.win_rate(name)[:3], "rival") for name in free]
    for sae in result.info["saes"]:
        for name in result.conditions(sae):
            rows.append(Row(f"{sae}: {_WORDS[name]}", *result.win_rate(name, sae)[:3], _COLOURS[name]))
    return rows


def _costs(result: Baselines, hook: str) -> list[Row]:
    free = [m for m in _methods(result, hook, "") if not m.startswith("rank ")]
    rows = [_cost(_name(m) if m.startswith("pca") else m, result.cost(m), "rival") for m in free]
    return rows + [_cost(sae, result.cost("dictionary", sae), "atom") for sae in result.info["saes"]]


def _methods(result: Baselines, hook: str, sae: str) -> list[str]:
    table: Any = result.tables["replacement"]
    return list(dict.fromkeys(table.loc[(table["hook"] == hook) & (table["sae"] == sae), "method"]))


def _cost(name: str, cost: Estimate, colour: str) -> Row:
    mean, low, high = (100 * math.expm1(x) for x in cost[:3])
    return Row(name, mean, low, high, colour)
