"""What a sweep reads off its dictionaries in numbers, and how it draws them over the grid."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import cast

import numpy as np
import pandas as pd
import torch
from sae_lens import SAE
from torch import Tensor

from hookpoints import HookedRecurrent
from writesae.evaluations.substitution import Substitution, wide_firings
from writesae.experiment.lab import Lab
from writesae.experiment.reconstruction import reconstruction
from writesae.experiment.result import Result
from writesae.verdict import figures
from writesae.verdict import statistics as stats

_FIT_SEQUENCES = 16
"""Evaluation sequences on which reconstruction is measured."""


@torch.no_grad()
def fit_of(model: HookedRecurrent, sae: SAE, tokens: Tensor) -> dict[str, float]:
    """How a dictionary fits its target and fires: share of variance, L0, shares of dead atoms and of tokens at which
    any atom fires."""
    lab = Lab(model, {"": sae}, tokens)
    fit = reconstruction(lab, range(min(_FIT_SEQUENCES, len(tokens))))[["explained", "l0"]].mean()
    firings = lab.firings()
    places = np.unique(firings.sequence * firings.n_positions + firings.position)
    dead = firings.n_atoms - len(firings.alive(tokens.numel()))
    share = len(places) / tokens.numel()
    return {
        "explained": float(fit["explained"]),
        "l0": float(fit["l0"]),
        "dead": dead / firings.n_atoms,
        "coverage": share,
    }


def substitution_measures(result: Result) -> dict[str, stats.Estimate]:
    """Recovered share and win rate of the headline atom, at the first scale."""
    test = cast(Substitution, result.evaluation)
    wide = wide_firings(result, choice=test.atom_choice[0])
    kl, deleted, sequence = wide[f"atom/{test.scales[0]}"], wide["delete"], wide["sequence"]
    measures = {"wins": stats.win_rate(kl, deleted, sequence).over_clusters}
    if (deleted > 0).any():
        measures = {"recovered": stats.recovered_share(kl, deleted, sequence, seed=test.seed)} | measures
    return measures


def partition_measures(result: Result) -> dict[str, stats.Estimate]:
    """Median cosine of registers, and shares of registers and bundles among all atoms (their counts over d_sae)."""
    atoms, d_sae = result.tables["atoms"], int(result.fact("d_sae"))
    measures: dict[str, stats.Estimate] = {}
    for kind in ("register", "bundle"):
        share = int((atoms["kind"] == kind).sum()) / d_sae
        measures[f"{kind}s"] = stats.Estimate(share, share, share, d_sae, d_sae)  # a count of this dictionary
    cosines = atoms.loc[atoms["kind"] == "register", "cosine"]
    if len(cosines) > 1:
        median = stats.estimate(cosines, np.arange(len(cosines)), statistic=stats.weighted_median)
        measures = {"register_cosine": median} | measures
    return measures


MEASURES: Mapping[str, Callable[[Result], dict[str, stats.Estimate]]] = {
    "substitution": substitution_measures,
    "partition": partition_measures,
}
"""What a sweep reads off a result in numbers; of any other evaluation it keeps the outcomes of claims."""
MEASURE_NAMES: Mapping[str, str] = {
    "recovered": "recovered share",
    "wins": "win rate against deletion",
    "register_cosine": "median cosine of registers",
    "registers": "share of atoms that are registers",
    "bundles": "share of atoms that are bundles",
}
"""Measures, as a reader meets them, in the order of the page."""


def figure(table: pd.DataFrame, measure: str, varied: list[str]) -> str:
    """One measure over the grid: lines over k or d_sae, where one of them varies, or else an interval for each point.
    Seeds are joined: their mean, and the range of their intervals."""
    axis = next((name for name in ("k", "d_sae") if name in varied), None)
    names = [name for name in varied if name not in (axis, "seed")]
    columns = [measure, f"{measure}_low", f"{measure}_high"]
    joined = (
        table.dropna(subset=[measure])
        .groupby([*names, *([axis] if axis else [])] or ["target"], sort=False)[columns]
        .agg({measure: "mean", f"{measure}_low": "min", f"{measure}_high": "max"})
        .reset_index()
    )
    title = f"{MEASURE_NAMES[measure]} over {axis or 'the grid'}"
    labels = joined[names].astype(str).agg(", ".join, axis=1) if names else pd.Series("all", index=joined.index)
    if axis is None:
        numbers = joined[columns].to_numpy().tolist()
        rows = [figures.Row(label, mean, low, high, "atom") for label, (mean, low, high) in zip(labels, numbers)]
        return figures.intervals(rows, MEASURE_NAMES[measure], title)
    lines = []
    for n, (label, part) in enumerate(joined.groupby(labels, sort=False)):
        part = part.sort_values(axis)
        x, (y, low, high) = part[axis].astype(float).tolist(), part[columns].to_numpy().T.tolist()
        lines.append(figures.Line(str(label), x, y, ("atom", "ink", "control", "soft")[n % 4], (low, high)))
    return figures.curves(lines, axis, title, log_x=True)
