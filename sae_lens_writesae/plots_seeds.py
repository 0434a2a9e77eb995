"""Figure of a comparison of seeds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from sae_lens_writesae.evaluation import Figure
from sae_lens_writesae.plots import ATOM, GRID, MUTED, RIVAL, SOFT, _legend, _panel, _svg

if TYPE_CHECKING:
    from sae_lens_writesae.seeds import Seeds

_COLOURS = {"atoms": ATOM, "writes": RIVAL, "random": SOFT}
_NAMES = {"atoms": "atoms", "writes": "native writes", "random": "random directions"}


def figures(result: Seeds) -> list[Figure]:
    """One panel: how alike matched atoms are, and matched nulls."""
    pairs: Any = result.tables["pairs"]
    figure, axes = _panel(2.3)
    for sample, colour in _COLOURS.items():
        for i, (_, part) in enumerate(pairs[pairs["sample"] == sample].groupby(["a", "b"])):
            x = np.sort(part["cosine"])[::-1]
            label = _NAMES[sample] if i == 0 else None
            axes.plot(np.linspace(0, 1, len(x)), x, color=colour, lw=1.6, alpha=0.8, label=label)
    axes.axhline(result.info["config"]["same"], color=MUTED, lw=0.8, ls=(0, (3, 3)))
    axes.set_ylim(-0.02, 1.03)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100 %"])
    axes.grid(axis="y", color=GRID, lw=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel("matched pairs, best first")
    axes.tick_params(axis="y", labelcolor=MUTED)
    _legend(figure, 3)
    svg = _svg(figure, f"Matched atoms of seeds: {result.label}")
    return [Figure("How alike matched atoms are", svg, "|cosine| of every pair, one line per pair of seeds.")]
