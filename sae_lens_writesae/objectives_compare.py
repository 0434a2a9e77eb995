"""Measures of dictionaries with different objectives, and their differences with intervals."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from sae_lens_writesae.substitution_result import SubstitutionResult
from sae_lens_writesae.verdict import statistics as stats

SCALES = ("coefficient", "matched")
"""Scales of the substitution test, each a measure: the share of firings at which the atom beats deletion."""

MEASURES = ("explained", "reads", "alive", "cosine", *SCALES)
"""The larger the better, all of them."""

WITHIN_TARGET = ("explained", "reads")
"""Measures of what a dictionary was trained on, which mean the same within a target only."""

NAMES = {
    "explained": ": variance explained",
    "reads": ": reads explained",
    "alive": ": alive atoms",
    "cosine": ": cosine with writes",
    "coefficient": ": atoms, own coefficient",
    "matched": ": atoms, matched norm",
    "random": ": random direction",
    "shuffled": ": shuffled atom",
    "elsewhere": ": write from elsewhere",
    "state": ": state direction",
    "mean": ": mean write",
}
"""What follows a dictionary's label in a figure."""


class Units(NamedTuple):
    """Observations of one measure of one dictionary, and what each belongs to."""

    values: NDArray[np.float64]
    clusters: NDArray[np.int64]


def units(fits: Any, tests: Mapping[str, SubstitutionResult]) -> dict[tuple[str, str], Units]:
    """All observations, by (label, measure)."""
    made: dict[tuple[str, str], Units] = {}
    for label, test in tests.items():
        own = fits[fits["sae"] == label]
        for measure in WITHIN_TARGET:
            made[label, measure] = Units(own[measure].to_numpy(float), own["sequence"].to_numpy())
        atoms = np.arange(test.info.d_sae)
        made[label, "alive"] = Units((atoms < test.info.n_alive).astype(float), atoms)
        wide: Any = test.wide()
        made[label, "cosine"] = Units(wide["cosine"].to_numpy(float), wide["written_atom"].to_numpy())
        for scale in SCALES:
            made[label, scale] = _wins(wide, "atom", scale)
    return made


def _wins(wide: Any, condition: str, scale: str) -> Units:
    """Whether a condition beats deletion, by tested atom: a dictionary's atoms are what its rate is to hold for."""
    wins = (wide[f"{condition}/{scale}"] < wide["delete"]).to_numpy(float)
    return Units(wins, wide["written_atom"].to_numpy())


def measures(found: Any, tests: Mapping[str, SubstitutionResult], config: Any) -> pd.DataFrame:
    """The table `measures`, with the controls' win rates at the scale of the claims after each dictionary's own."""
    named = dict(found)
    for label, test in tests.items():
        wide = test.wide()
        named |= {(label, control): _wins(wide, control, config.scale) for control in config.controls}
    rows = []
    for (label, measure), unit in named.items():
        boot = stats.cluster_bootstrap(unit.values, unit.clusters, seed=config.seed)
        of = "sequences" if measure in WITHIN_TARGET else "atoms"
        rows.append((label, measure, boot.estimate, *boot.interval, boot.n, boot.n_clusters, of))
    return pd.DataFrame(rows, columns=["sae", "measure", "value", "low", "high", "n", "clusters", "unit"])


def contrasts(
    found: dict[tuple[str, str], Units], objectives: Mapping[str, tuple[str, str]], seed: int
) -> pd.DataFrame:
    """The table `contrasts`: every pair of dictionaries that can be compared, in both orders."""
    rows = []
    for measure in MEASURES:
        for a, b in itertools.permutations(objectives, 2):
            if measure in WITHIN_TARGET and objectives[a][0] != objectives[b][0]:
                continue
            x, y = found[a, measure], found[b, measure]
            if measure in WITHIN_TARGET:  # the same sequences, in the same order
                boot = stats.cluster_bootstrap(x.values - y.values, x.clusters, seed=seed)
            else:
                boot = stats.difference_bootstrap(x.values, y.values, x.clusters, y.clusters, seed=seed)
            rows.append((measure, a, b, boot.estimate, *boot.interval))
    return pd.DataFrame(rows, columns=["measure", "a", "b", "difference", "low", "high"])


def dictionaries(
    saes: Mapping[str, Any],
    objectives: Mapping[str, tuple[str, str]],
    fits: Any,
    tests: Mapping[str, SubstitutionResult],
    scale: str,
) -> pd.DataFrame:
    """The table `dictionaries`."""
    rows = []
    for label in saes:
        verdict = tests[label].summary().verdicts[scale]
        target, loss = objectives[label]
        row = {"sae": label, "target": target, "loss": loss, "d_sae": int(saes[label].cfg.d_sae)}
        row["l0"] = float(fits.loc[fits["sae"] == label, "l0"].mean())
        row["tested_atoms"] = len(set(tests[label].frame["written_atom"]))
        rows.append(row | {"outcome": verdict.outcome, "unbeaten": ", ".join(verdict.controls)})
    return pd.DataFrame(rows)


def firings(tests: Mapping[str, SubstitutionResult]) -> pd.DataFrame:
    """The table `firings`."""
    parts = []
    for label, test in tests.items():
        wide: Any = test.wide()
        own = wide[["sequence", "position", "atom", "cosine", "delete"]]
        parts.append(own.assign(sae=label, **{scale: wide[f"atom/{scale}"] for scale in SCALES}))
    return pd.concat(parts, ignore_index=True)
