"""Results of tests, by atom."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from torch import Tensor

from sae_lens_writesae.firings import Firings, HeadHook
from sae_lens_writesae.later_heads import Mixer
from sae_lens_writesae.page.dashboards.config import DashboardConfig
from sae_lens_writesae.page.dashboards.data import Reader, Readers, Substituted
from sae_lens_writesae.substitution import run_substitution
from sae_lens_writesae.substitution_config import SubstitutionConfig
from sae_lens_writesae.substitution_result import SubstitutionResult

READER_COLUMNS = ("atom", "layer", "head", "change")
_PER_WRITE = "per norm of the native write, to first order"


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


def substituted_here(
    model: Any,
    sae: Any,
    tokens: Tensor,
    firings: Firings,
    atoms: NDArray[np.int64],
    config: DashboardConfig,
    progress: bool,
) -> Mapping[int, list[Substituted]] | None:
    """A small substitution test of these atoms, at their own coefficients. None where none of them has a firing with
    room for the horizon."""
    last = firings.n_positions - 1 - config.effect_horizon
    room = np.unique(firings.atom[(firings.position >= 1) & (firings.position <= last)])
    if not len(tested := np.intersect1d(atoms, room)):
        return None
    test = SubstitutionConfig(
        atoms=tuple(tested.tolist()),
        atom_choice="own",
        firings_per_atom=config.substitution_firings,
        scales=("coefficient",),
        controls=("random", "state"),
        horizon=config.effect_horizon,
        last_position_firings=0,
        alive_tokens=tokens.numel(),
        mean_write_sequences=1,
        seed=config.seed,
    )
    return substituted(run_substitution(model, sae, tokens, test, progress=progress), HeadHook.of(sae))


def _row(rows: Any, scale: str, controls: tuple[str, ...]) -> Substituted:
    beats = {name: float((rows[f"{name}/{scale}"] < rows["delete"]).mean()) for name in ("atom", *controls)}
    best = max(controls, key=lambda name: beats[name], default=None)
    kl = rows[f"atom/{scale}"]
    medians = float(kl.median()), float(rows["delete"].median())
    return Substituted(scale, len(rows), beats["atom"], *medians, best, beats[best] if best else None)


def readers_of(table: pd.DataFrame, n: int) -> Mapping[int, Readers]:
    """Per atom its n strongest readers, from a table with the columns atom, layer, head, change (relative change of
    what a later head gives) and, where attention heads are among them, mixer; several rows of one head are averaged.

    The table `changes` of the evaluation `readers` is one: of its conditions, `atom` is the change and `random` what it
    is compared with.

    Raises:
        ValueError: a column is missing.
    """
    if missing := [name for name in READER_COLUMNS if name not in table]:
        raise ValueError(
            f"a table of readers needs the columns {', '.join(READER_COLUMNS)}; {', '.join(missing)} missing"
        )
    by_condition = "condition" in table
    if "mixer" not in table:
        table = table.assign(mixer="recurrence")
    own: Any = table[table["condition"] == "atom"] if by_condition else table
    places = ["atom", "layer", "mixer", "head"]
    means = own.groupby(places)["change"].mean().reset_index()
    means["typical"] = np.nan
    if by_condition:
        control: Any = table[table["condition"] == "random"]
        means = means.drop(columns="typical").merge(
            control.groupby(places)["change"].mean().rename("typical").reset_index(), on=places, how="left"
        )
    return {int(atom): _strongest(rows, n) for atom, rows in means.groupby("atom")}


def _strongest(rows: Any, n: int) -> Readers:
    ordered = rows.sort_values("change", ascending=False, kind="stable").head(n)
    heads = [
        Reader(int(r.layer), r.mixer, int(r.head), float(r.change), None if np.isnan(r.typical) else float(r.typical))
        for r in ordered.itertuples()
    ]
    return Readers(heads, "as given", "a random direction of the same norm")


def readers_measured(changes: NDArray[np.float64], heads: list[tuple[int, Mixer, int]], n: int) -> list[Readers | None]:
    """Per atom its n strongest readers, from the changes [atoms,heads] that `effects.measured` found, beside the median
    over the other atoms. None where nothing was measured, or there is no later head."""
    found: list[Readers | None] = []
    for atom, own in enumerate(changes):
        known = np.flatnonzero(~np.isnan(own))
        order = known[np.argsort(-own[known], kind="stable")][:n]
        others = np.delete(changes, atom, axis=0)[:, order]
        typical = [float(np.median(c)) if len(c := column[~np.isnan(column)]) else None for column in others.T]
        listed = [
            Reader(layer, mixer, head, float(f"{own[i]:.4g}"), middle)
            for i, (layer, mixer, head), middle in zip(order, (heads[i] for i in order), typical)
        ]
        found.append(Readers(listed, _PER_WRITE, "the other atoms shown (median)") if listed else None)
    return found
