"""Runs the baselines on dictionaries of one head."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from sae_lens_writesae.baselines.config import BaselinesConfig
from sae_lens_writesae.baselines.pca import fit_pca
from sae_lens_writesae.baselines.replacement import Basis, Replacement, replace_all
from sae_lens_writesae.baselines.result import Baselines
from sae_lens_writesae.baselines.selectivity import selectivity
from sae_lens_writesae.baselines.variants import parameters, variant
from sae_lens_writesae.baselines.writes import Setting, exchanged
from sae_lens_writesae.conditions import mean_write
from sae_lens_writesae.errors import NothingToMeasureError
from sae_lens_writesae.evaluate import check_fits
from sae_lens_writesae.evaluation import describe
from sae_lens_writesae.firings import Firings, HeadHook, collect_firings
from sae_lens_writesae.interventions.common import check_tokens, column_table
from sae_lens_writesae.interventions.draw import halves
from sae_lens_writesae.progress import bar
from sae_lens_writesae.reconstruction import matrices_of, reconstruction


@torch.no_grad()
def run_baselines(
    model: Any, saes: Mapping[str, Any], tokens: Tensor, config: BaselinesConfig | None = None, progress: bool = True
) -> Baselines:
    """Compare dictionaries of one head and target with each other, and with what needs no dictionary.

    Args:
        saes: label -> SAE; at least two, trained alike but for their architecture (`VARIANTS`, `matched_flat`).
        tokens: [N,T] held-out sequences.

    Raises:
        ValueError: fewer than two SAEs, SAEs of different hooks, too few or too short sequences, or writes that are
            all alike.

    Cost: per dictionary N forwards up to its layer; per tested position 2 + 3 + pca_ranks + 2 or 3 per dictionary
    edited rows; per replaced sequence 4 + dictionaries + ranks forwards.
    """
    begin, config = time.perf_counter(), config or BaselinesConfig()
    _check(model, saes)
    check_tokens(tokens, config.first_position + config.horizon + 2)
    hook = HeadHook.of(next(iter(saes.values())))
    split = halves(len(tokens), config.seed)
    setting, basis = _setting(model, saes, tokens[split.select], hook, config)
    tested = split.test[: config.test_sequences]
    rows: list[dict[str, Any]] = []
    for n in bar(tested.tolist(), "writes", progress):
        rows += exchanged(setting, tokens[[n]], n)
    if len({row["sequence"] for row in rows}) < 2:
        raise NothingToMeasureError(
            "the head writes nothing at the drawn positions of all but one sequence: nothing to exchange"
        )
    costs: list[dict[str, Any]] = []
    for n in bar(split.test[: config.replacement_sequences].tolist(), "replacement", progress):
        found = replace_all(model, saes, tokens[[n]], hook, basis, config.pca_ranks, config.state_ranks)
        costs += [{"sequence": n, **each._asdict()} for each in found]
    firings = {label: collect_firings(model, sae, tokens, progress=progress) for label, sae in saes.items()}
    fits = reconstruction(model, saes, tokens[tested])
    wanted = len(tested) * config.positions_per_sequence
    info = describe(
        model,
        next(iter(saes.values())),
        label=config.label or f"L{hook.layer}H{hook.head} baselines, {hook.target}s",
        config=asdict(config),
        saes=list(saes),
        n_sequences=len(tokens),
        n_positions=tokens.shape[1],
        omitted={
            "positions with a zero native write, or no room for the window": wanted - len({*_places(rows)}),
            "sequences on which what is reconstructed does not vary": fits.without_variance,
        },
        conditions=len(rows),
        seconds=time.perf_counter() - begin,
    )
    chosen = {label: selectivity(own, tokens, config.min_firings, config.seed) for label, own in firings.items()}
    tables = {
        "dictionaries": _dictionaries(saes, fits.table, firings, min(config.alive_tokens, tokens.numel())),
        "writes": column_table(rows, Baselines.COLUMNS["writes"]),
        "replacement": pd.DataFrame(costs, columns=["sequence", *Replacement._fields]),
        "selectivity": pd.concat([t.assign(sae=label) for label, t in chosen.items()], ignore_index=True),
    }
    return Baselines(info | {"seconds": time.perf_counter() - begin}, tables)


def _check(model: Any, saes: Mapping[str, Any]) -> None:
    if len(saes) < 2:
        raise ValueError(f"baselines need at least two SAEs to compare, found {len(saes)}")
    for label, sae in saes.items():
        check_fits(model, sae, label)
    hooks = {label: HeadHook.of(sae).name for label, sae in saes.items()}
    if len(set(hooks.values())) > 1:
        found = "; ".join(f"{label}: {name}" for label, name in hooks.items())
        raise ValueError(f"baselines are compared on one hook, found {found}")


def _setting(
    model: Any, saes: Mapping[str, Any], tokens: Tensor, hook: HeadHook, config: BaselinesConfig
) -> tuple[Setting, Basis]:
    """Means and principal components, from the half of the sequences that nothing is tested on. Cost: a forward of
    each up to the layer; K V numbers for each of `pca_writes` writes."""
    rng = np.random.default_rng([config.seed, 11])
    each = -(-config.pca_writes // len(tokens))
    keys, values, rows, total, n = [], [], [], 0, 0
    for i in range(len(tokens)):
        one = model.recurrence(tokens[[i]], hook.layer).select(heads=hook.head)
        terms = [x.to(one.dtype).reshape(one.T, -1, x.shape[-1]) for x in (one.k[0, :, 0], one.u[0, :, 0])]
        keys.append(terms[0].flatten(0, 1))
        values.append(terms[1].flatten(0, 1))
        at = np.sort(rng.choice(one.T, min(each, one.T), replace=False)).tolist()
        rows.append(one.write(positions=at)[0, :, 0].flatten(1))
        target = matrices_of(one, hook.target).flatten(1)
        total, n = total + target.double().sum(0), n + len(target)
    pca = fit_pca(torch.cat(rows)[: config.pca_writes], config.pca_ranks[-1])
    terms_of_mean = mean_write(torch.cat(keys), torch.cat(values), 0.99)
    setting = Setting(model, saes, hook, config, pca, terms_of_mean)
    return setting, Basis(pca, (torch.as_tensor(total) / n).to(pca.mean))


def _places(rows: list[dict[str, Any]]) -> set[tuple[int, int]]:
    return {(row["sequence"], row["position"]) for row in rows}


def _dictionaries(saes: Mapping[str, Any], fits: Any, firings: Mapping[str, Firings], n_tokens: int) -> pd.DataFrame:
    """The table `dictionaries`."""
    rows = []
    for label, sae in saes.items():
        own, alive = fits[fits["sae"] == label], len(firings[label].alive(n_tokens))
        if own.empty:
            raise NothingToMeasureError(f"{label}: what it reconstructs does not vary on any test sequence")
        rows.append(
            {
                "sae": label,
                "variant": variant(sae),
                "d_sae": int(sae.cfg.d_sae),
                "parameters": parameters(sae),
                "explained": float(own["explained"].mean()),
                "l0": float(own["l0"].mean()),
                "alive": alive,
                "dead": int(sae.cfg.d_sae) - alive,
            }
        )
    return pd.DataFrame(rows, columns=list(Baselines.COLUMNS["dictionaries"]))
