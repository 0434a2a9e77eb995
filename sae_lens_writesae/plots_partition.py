"""Figures of a partition: cosines with nulls, BIC, threshold sweep."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from sae_lens_writesae.evaluation import Figure
from sae_lens_writesae.plots import ATOM, GRID, MUTED, PAPER, RIVAL, SOFT, _legend, _panel, _svg

if TYPE_CHECKING:
    from sae_lens_writesae.partition import Partition

_NAMES = {"atoms": "atoms", "shuffled": "shuffled positions", "random": "random directions"}
_COLOURS = {"atoms": ATOM, "shuffled": RIVAL, "random": SOFT}


def figures(result: Partition) -> list[Figure]:
    """All panels."""
    made = [
        Figure(
            "Cosine of each atom with the writes it fires on",
            _histogram(result),
            "Medians over firings, one count per alive atom. Dashed: where registers begin.",
        ),
        Figure(
            "How many are at or above a threshold",
            _sweep(result),
            "Share of alive atoms, and of the same atoms in both nulls.",
        ),
    ]
    if len(result.tables["mixtures"]):
        caption = "BIC of Gaussian mixtures, less that of the best; filled: cosine, open: Fisher's z."
        made.insert(1, Figure("How many kinds BIC sees", _bic(result), caption))
    return made


def _histogram(result: Partition) -> str:
    atoms: Any = result.tables["atoms"]
    samples = {"atoms": atoms["cosine"], "shuffled": atoms["shuffled"], "random": atoms["random"]}
    low = min(-0.1, *(float(x.min()) for x in samples.values()))
    high = max(0.2, *(float(x.max()) for x in samples.values()))
    edges = np.linspace(low, high, 41)
    figure, axes = _panel(2.3)
    for name in ("atoms", "shuffled", "random"):
        counts, _ = np.histogram(samples[name], edges)
        fill: Any = {"fill": True, "alpha": 0.35, "lw": 0} if name == "atoms" else {"lw": 1.2}
        axes.stairs(counts, edges, color=_COLOURS[name], label=_NAMES[name], **fill)
    top = axes.get_ylim()[1]
    tallest = np.histogram(samples["atoms"], edges)[0].max()
    axes.set_ylim(0, min(top, 2.5 * tallest))  # the random null is one spike
    axes.axvline(result.info["config"]["threshold"], color=MUTED, lw=0.8, ls=(0, (3, 3)))
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.set_xlabel("median signed cosine with the native write")
    axes.tick_params(axis="y", labelcolor=MUTED)
    _legend(figure, 3)
    return _svg(figure, f"Cosines of atoms and writes: {result.label}")


def _bic(result: Partition) -> str:
    table: Any = result.tables["mixtures"]
    figure, axes = _panel(2.2)
    for name in ("atoms", "shuffled"):
        for space, face in (("cosine", _COLOURS[name]), ("z", PAPER)):
            rows = table[(table["sample"] == name) & (table["space"] == space)].drop_duplicates("components")
            if rows.empty:
                continue
            gap = rows["bic"] - rows["bic"].min()
            style = "-" if space == "cosine" else ":"
            label = _NAMES[name] if space == "cosine" else None
            axes.plot(rows["components"], gap, "o" + style, color=_COLOURS[name], mfc=face, ms=4.5, lw=1.3, label=label)
    axes.set_xticks(sorted(set(table["components"])))
    axes.set_yscale("symlog", linthresh=10)
    axes.set_ylim(bottom=-1)
    axes.minorticks_off()
    axes.grid(axis="y", color=GRID, lw=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel("components")
    axes.tick_params(axis="y", labelcolor=MUTED)
    _legend(figure, 2)
    return _svg(figure, f"BIC of mixtures: {result.label}")


def _sweep(result: Partition) -> str:
    table: Any = result.tables["sweep"]
    figure, axes = _panel(2.2)
    for name in ("atoms", "shuffled", "random"):
        rows = table[table["sample"] == name].sort_values("threshold")
        axes.plot(rows["threshold"], rows["share"], "-o", color=_COLOURS[name], ms=3.5, lw=1.4, label=_NAMES[name])
    axes.axvline(result.info["config"]["threshold"], color=MUTED, lw=0.8, ls=(0, (3, 3)))
    axes.set_ylim(-0.03, 1.03)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "", "50 %", "", "100 %"])
    axes.grid(axis="y", color=GRID, lw=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel("threshold on the cosine")
    _legend(figure, 3)
    return _svg(figure, f"Registers by threshold: {result.label}")
