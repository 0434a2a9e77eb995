"""From a dictionary and text to the data of its dashboards."""

from __future__ import annotations

import time
from collections.abc import Container, Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from torch import Tensor

from sae_lens_writesae.conditions import norm
from sae_lens_writesae.errors import NothingToMeasureError
from sae_lens_writesae.evaluate import check_fits
from sae_lens_writesae.evaluation import describe
from sae_lens_writesae.firings import Firings, HeadHook, atom_factors, collect_firings, sample_firings
from sae_lens_writesae.page.dashboards.config import DashboardConfig
from sae_lens_writesae.page.dashboards.contexts import Text
from sae_lens_writesae.page.dashboards.data import (
    AtomPage,
    Bars,
    Cosines,
    Dashboard,
    Effect,
    Ends,
    KeySide,
    Readers,
    Spread,
    Substituted,
    TokenValue,
    ValueSide,
)
from sae_lens_writesae.page.dashboards.effects import Measured, direct_path, effect_firings, measured
from sae_lens_writesae.page.dashboards.joins import readers_measured, readers_of, substituted, substituted_here
from sae_lens_writesae.page.dashboards.memory import memory
from sae_lens_writesae.page.dashboards.sweep import FINE, Atoms, Sweep, sweep
from sae_lens_writesae.page.dashboards.token_text import TokenTexts
from sae_lens_writesae.substitution_result import SubstitutionResult

_BARS = 32
"""Most bars of a histogram of cosines."""
ZERO_ATOM = "atoms that are zero"
RARE = "atoms with fewer firings than min_firings"


class _Gathered(NamedTuple):
    """All that the pages are made from."""

    text: Text
    atoms: Atoms
    swept: Sweep
    direct: NDArray[np.float32]
    effects: Measured
    substitution: Mapping[int, list[Substituted]] | None
    readers: Mapping[int, Readers | None]
    config: DashboardConfig


def atom_dashboards(
    model: Any,
    sae: Any,
    tokens: Tensor,
    config: DashboardConfig | None = None,
    *,
    substitution: SubstitutionResult | None = None,
    readers: pd.DataFrame | None = None,
    progress: bool = True,
) -> Dashboard:
    """What there is to see of each atom, on held-out text.

    Args:
        model: a `HookedRecurrent` with a tokenizer.
        sae: a dictionary of one of its heads.
        tokens: [N,T] evaluation sequences.
        substitution: a substitution test of this dictionary, shown per atom; None: a small one is run
            (`substitution_firings`).
        readers: a table of later heads that change with the atom (`joins.readers_of`), for example `changes` of the
            evaluation `readers`; None: they are measured beside the effect on the logits.

    Cost: one forward up to the layer per sequence for firings and one for cosines; per atom `half_life_firings` vector
    recurrences, `effect_firings` pairs of short edited runs and five for each of `substitution_firings`.

    Raises:
        ValueError: the SAE does not fit the model, the model has no tokenizer or one of another vocabulary, the tokens
            are not [N,T] with room for the effect's horizon, no atom fires often enough, or a hand-picked one does not.
    """
    config, started = config or DashboardConfig(), time.perf_counter()
    check_fits(model, sae, config.label or "sae=")
    if tokens.ndim != 2 or tokens.shape[1] < config.effect_horizon + 2:
        raise ValueError(f"tokens must be [N,T] with T > {config.effect_horizon + 1}, found {list(tokens.shape)}")
    hook, texts = HeadHook.of(sae), TokenTexts(model)
    texts.check(tokens)
    joined = None if substitution is None else substituted(substitution, hook)
    read = None if readers is None else readers_of(readers, config.n_tokens)
    firings = collect_firings(model, sae, tokens, progress=progress)
    frequent = firings.alive(tokens.numel(), config.min_firings)
    alive = len(firings.alive(tokens.numel()))
    chosen, zero = _atoms(model, sae, hook, _chosen(firings, frequent, joined, config))
    if joined is None and config.substitution_firings:
        joined = substituted_here(model, sae, tokens, firings, chosen.number, config, progress)
    table = _table(firings, chosen)
    rng = np.random.default_rng([config.seed, 2])
    per_atom, last = config.half_life_firings, tokens.shape[1] - 2
    followed = sample_firings(firings, chosen.number, per_atom, first=0, last=last, rng=rng)
    swept = sweep(model, hook, tokens, table, chosen, _with_columns(followed, chosen), config, progress)
    effects = measured(model, hook, tokens, effect_firings(table, tokens.shape[1], config), chosen, config, progress)
    if read is None:
        read = dict(zip(chosen.number.tolist(), readers_measured(effects.changes, effects.heads, config.n_tokens)))
    direct = direct_path(model, hook, chosen)
    text = Text(tokens.cpu().numpy(), texts, config)
    gathered = _Gathered(text, chosen, swept, direct, effects, joined, read, config)
    pages = [_page(gathered, column) for column in range(len(chosen.number))]
    info = describe(
        model,
        sae,
        label=config.label,
        n_sequences=int(tokens.shape[0]),
        n_positions=int(tokens.shape[1]),
        n_alive=alive,
        n_frequent=len(frequent),
        settings=config.to_dict() | {"atoms": None if config.atoms is None else list(config.atoms)},
        omitted={RARE: alive - len(frequent), ZERO_ATOM: zero},
        seconds=round(time.perf_counter() - started, 2),
    )
    return Dashboard(info, pages)


def _chosen(
    firings: Firings, frequent: NDArray[np.int64], tested: Container[int] | None, config: DashboardConfig
) -> NDArray[np.int64]:
    """The atoms of the config, or a draw from those that fire often enough (and were tested, if any were)."""
    if config.atoms is not None:
        if missing := sorted(set(config.atoms) - set(frequent.tolist())):
            raise ValueError(
                f"atoms {missing} have fewer than {config.min_firings} firings on {firings.n_sequences} sequences of "
                f"{firings.n_positions} tokens (the SAE has {firings.n_atoms} atoms, {len(frequent)} fire often "
                "enough); give more text, or lower min_firings"
            )
        return np.array(config.atoms)
    if len(frequent) == 0:
        raise NothingToMeasureError(
            f"no atom fires {config.min_firings} times on {firings.n_sequences} sequences of {firings.n_positions} "
            f"tokens: {len(firings)} firings of {firings.n_atoms} atoms in all; give more text, or lower min_firings"
        )
    among = frequent if tested is None else np.array([atom for atom in frequent if int(atom) in tested], dtype=int)
    if len(among) == 0:
        raise NothingToMeasureError(
            f"none of the {len(frequent)} atoms that fire {config.min_firings} times on this text was looked at by the "
            "substitution test; name atoms, or leave the test out"
        )
    n = len(among) if config.n_atoms is None else min(config.n_atoms, len(among))
    return np.sort(np.random.default_rng(config.seed).choice(among, n, replace=False))


def _atoms(model: Any, sae: Any, hook: HeadHook, number: NDArray[np.int64]) -> tuple[Atoms, int]:
    """The atoms that are not zero, and how many are."""
    shape = model.cfg.layer(hook.layer)
    factors = atom_factors(sae, number, shape.K, shape.V)
    kept = norm(factors) > 0
    if not bool(kept.any()):
        raise NothingToMeasureError(
            f"all {len(number)} chosen atoms are zero matrices: there is nothing to show of them"
        )
    return Atoms.of(number[kept.cpu().numpy()], factors.rows(kept)), int((~kept).sum())


def _table(firings: Firings, atoms: Atoms) -> pd.DataFrame:
    return _with_columns(firings.frame(np.isin(firings.atom, atoms.number)), atoms)


def _with_columns(rows: pd.DataFrame, atoms: Atoms) -> pd.DataFrame:
    """With the place of each row's atom among the chosen ones."""
    place = {int(atom): column for column, atom in enumerate(atoms.number)}
    return rows.assign(column=np.array([place[int(atom)] for atom in rows["atom"]], dtype=np.int64)).reset_index(
        drop=True
    )


def _page(found: _Gathered, column: int) -> AtomPage:
    """The page of one atom."""
    own: Any = found.swept.table[found.swept.table["column"] == column]
    atom, tokens = int(found.atoms.number[column]), found.text.tokens
    written = own[own["cosine"].notna()]
    sign = -1.0 if len(written) and float(written["key_cosine"].median()) < 0 else 1.0
    return AtomPage(
        atom=atom,
        rank_share=float(found.atoms.rank_share[column]),
        n_firings=len(own),
        rate=len(own) / tokens.size,
        max_activation=float(own["activation"].max()),
        mean_activation=float(own["activation"].mean()),
        fires_on=found.text.fires_on(own),
        top=found.text.top(own),
        bands=list(found.text.bands(own)),
        positions=_positions(own["position"].to_numpy(), tokens.shape, found.config.position_bins),
        cosines=_cosines(written["cosine"], found.swept.silent[column]) if len(written) else None,
        keys=KeySide(_key_tokens(found, sign * found.swept.key_means[column]), _spread(sign * written["key_cosine"])),
        values=ValueSide(_vocabulary(found, sign * found.direct[column]), _spread(sign * written["value_cosine"])),
        effect=_effect(found, column, sign),
        memory=memory(found.swept.lives[column]),
        readers=found.readers.get(atom),
        substitution=None if found.substitution is None else list(found.substitution.get(atom, [])),
    )


def _spread(values: Any) -> Spread | None:
    if not len(values):
        return None
    median, q25, q75 = (float(q) for q in np.quantile(np.asarray(values), (0.5, 0.25, 0.75)))
    return Spread(median, q25, q75, len(values))


def _positions(positions: NDArray[np.int64], shape: tuple[int, ...], bins: int) -> Bars:
    """Firing rate by position; bins are whole tokens."""
    edges = np.unique(np.linspace(0, shape[1], min(bins, shape[1]) + 1).astype(int))
    rates = np.histogram(positions, edges)[0] / (np.diff(edges) * shape[0])
    return Bars([float(edge) for edge in edges], [float(rate) for rate in rates])


def _cosines(firing: Any, silent: NDArray[np.int64]) -> Cosines:
    """Both histograms over the range where there is anything, in at most `_BARS` bars."""
    counts = np.histogram(np.clip(firing, -1, 1), FINE)[0]
    seen = np.flatnonzero(counts + silent)
    low, high = int(seen[0]) // 10 * 10, int(seen[-1]) // 10 * 10 + 10  # whole tenths
    merge = next(size for size in (1, 2, 5, 10) if (high - low) // size <= _BARS)
    edges = [round(float(FINE[i]), 2) for i in range(low, high + 1, merge)]
    spread = _spread(firing)
    assert spread is not None

    def bars(fine: NDArray[np.int64]) -> Bars:
        merged = fine[low:high].reshape(-1, merge).sum(1)
        return Bars(edges, [round(float(x), 5) for x in merged / max(merged.sum(), 1)])

    return Cosines(spread, bars(counts), bars(silent))


def _key_tokens(found: _Gathered, means: NDArray[np.float64]) -> Ends:
    """Tokens of the text by the mean cosine of their keys."""
    swept = found.swept
    counted = np.flatnonzero(swept.token_counts >= found.config.min_token_count)
    return _ends(found, swept.token_ids[counted], means[counted], swept.token_counts[counted])


def _vocabulary(found: _Gathered, values: NDArray[Any]) -> Ends:
    """All tokens of the vocabulary by `values` [vocab]; rows of W_U that pad it are no tokens."""
    ids = np.arange(min(len(values), found.text.texts.size))
    return _ends(found, ids, values, np.zeros(len(ids), dtype=int))


def _ends(found: _Gathered, ids: NDArray[Any], values: NDArray[Any], counts: NDArray[Any]) -> Ends:
    n = min(found.config.n_tokens, len(ids) // 2)
    order = np.argsort(-values[: len(ids)], kind="stable")

    def listed(places: NDArray[Any]) -> list[TokenValue]:
        return [
            TokenValue(int(ids[i]), found.text.texts(int(ids[i])), float(f"{values[i]:.4g}"), int(counts[i]))
            for i in places
        ]

    return Ends(listed(order[:n]), listed(order[len(order) - n :][::-1]))


def _effect(found: _Gathered, column: int, sign: float) -> Effect | None:
    """None where it was not measured. The sign of an atom does not matter to it, but to the direct path."""
    n = int(found.effects.n[column])
    if n == 0:
        return None
    mean, direct = found.effects.mean[column], sign * found.direct[column]
    size, varied = float(mean.std()), bool(mean.std() > 0 and direct.std() > 0)
    r = float(np.corrcoef(mean, direct)[0, 1]) if varied else None
    return Effect(_vocabulary(found, mean), r, size, n, found.config.effect_horizon)
