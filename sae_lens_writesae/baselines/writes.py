"""What every baseline writes in the place of a native write, at positions that all of them share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sae_lens_writesae.baselines.config import BaselinesConfig
from sae_lens_writesae.baselines.pca import MatrixPca
from sae_lens_writesae.conditions import (
    Condition,
    Factors,
    cosine,
    inner,
    norm,
    random_directions,
    scaled,
    state_direction,
)
from sae_lens_writesae.firings import HeadHook, atom_factors
from sae_lens_writesae.head_memory import head_writes
from sae_lens_writesae.reconstruction import encoded, matrices_of, reconstructed
from sae_lens_writesae.substitution_edits import edits_of, measure
from sae_lens_writesae.substitution_result import METRICS

ATOM, ATOM_SVD, SVD = "atom", "atom svd", "svd"
"""A dictionary's strongest atom as its decoder has it; the same cut to rank 1, where it is not; the top-1 SVD of the
whole reconstruction."""


class Setting(NamedTuple):
    """What stays the same over sequences."""

    model: Any
    saes: Mapping[str, Any]
    hook: HeadHook
    config: BaselinesConfig
    pca: MatrixPca
    mean: Factors  # N = 1


class Written(NamedTuple):
    """One baseline at the N positions of a sequence."""

    sae: str  # label of the dictionary; empty where there is none
    condition: str
    factors: Factors
    has_size: bool  # what it writes has a size of its own


def exchanged(setting: Setting, tokens: Tensor, sequence: int) -> list[dict[str, Any]]:
    """Rows of the table `writes` for one sequence [1,T]; none where the writes at all drawn positions are zero.

    Cost: one forward, and per position 2 edited rows and one for each baseline, of horizon + 1 tokens.
    """
    config, test = setting.config, setting.config.substitution()
    session = setting.model.edit_session(tokens)
    writes = head_writes(session.recurrence(setting.hook.layer), setting.hook.head, "additive")
    written = np.flatnonzero((norm(writes.native) > 0).cpu().numpy())
    positions = _positions(written, tokens.shape[1], sequence, config)
    if not positions:
        return []
    native = writes.native.rows(positions)
    made = [
        Written("", "native", native, True),
        Written("", "delete", scaled(native, torch.zeros_like(norm(native))), True),
        *_without_dictionary(setting, writes.recurrence, native, positions, sequence),
    ]
    for label, sae in setting.saes.items():
        matrices = matrices_of(writes.recurrence, setting.hook.target)[positions]
        made += _of_dictionary(label, sae, matrices, native)
    sized = [_sized(each, native, config.scale) for each in made]
    edits = [
        edits_of(setting.hook, test, Condition(m.condition, "", f), native, positions) for m, f in zip(made, sized)
    ]
    kl = measure(session, edits, positions, [False] * len(positions), test)[:, :, METRICS.index("kl_window")]
    return [
        {
            "sequence": sequence,
            "position": t,
            "sae": each.sae,
            "condition": each.condition,
            "kl": float(kl[c, n]),
            "cosine": float(alike[n]),
            "norm": float(size[n]),
        }
        for c, (each, factors) in enumerate(zip(made, sized))
        for alike, size in [(cosine(factors, native), norm(factors) / norm(native))]
        for n, t in enumerate(positions)
    ]


def _positions(written: NDArray[np.int64], n_tokens: int, sequence: int, config: BaselinesConfig) -> list[int]:
    """A uniform draw of the positions with a write that leave room for the window, in order."""
    able = written[(written >= config.first_position) & (written < n_tokens - config.horizon)]
    rng = np.random.default_rng([config.seed, 9, sequence])
    chosen = rng.choice(able, min(config.positions_per_sequence, len(able)), replace=False)
    return sorted(chosen.tolist())


def _without_dictionary(
    setting: Setting, recurrence: Any, native: Factors, positions: list[int], sequence: int
) -> Iterator[Written]:
    rng = np.random.default_rng([setting.config.seed, 10, sequence])
    seed = torch.Generator().manual_seed(int(rng.integers(2**62)))
    yield Written("", "random", random_directions(native, seed), False)
    yield Written("", "mean", setting.mean.expand(len(native)), False)
    after, dense = recurrence.states(positions=positions)[0, :, 0], native.dense()
    yield Written("", "state", state_direction(after - dense), False)
    yield Written("", "state_after", state_direction(after), False)
    for rank in setting.config.pca_ranks:
        projected = setting.pca.project(dense.flatten(1), rank).view_as(dense)
        yield Written("", f"pca {rank}", Factors.svd(projected, min(dense.shape[1:]), balanced=True), True)


def _of_dictionary(label: str, sae: Any, matrices: Tensor, native: Factors) -> Iterator[Written]:
    """Its strongest atom by |a_i| |A_i|, and its reconstruction, of matrices [N,K,V]."""
    acts = encoded(sae, matrices)
    sizes = sae.decoder_norm() if hasattr(sae, "decoder_norm") else sae.W_dec.norm(dim=-1)
    strongest = (acts.abs() * sizes).argmax(1)
    found = atom_factors(sae, strongest.cpu().numpy(), matrices.shape[1], matrices.shape[2])
    atom = scaled(found, acts.gather(1, strongest[:, None])[:, 0].to(found.values))
    atom = Factors(atom.keys.to(native.keys), atom.values.to(native.values))
    yield Written(label, ATOM, atom, True)
    if atom.keys.shape[1] > 1:
        yield Written(label, ATOM_SVD, Factors.svd(atom.dense(), 1, balanced=True), True)
    yield Written(label, SVD, Factors.svd(reconstructed(sae, acts, matrices), 1, balanced=True), True)


def _sized(each: Written, native: Factors, scale: str) -> Factors:
    """At its own size, at its best, or at the norm of the native write; what is zero (nothing fires) stays so."""
    if each.condition in ("native", "delete") or (scale == "coefficient" and each.has_size):
        return each.factors
    square = inner(each.factors, each.factors)
    wanted = inner(each.factors, native) if scale == "coefficient" else norm(native).to(square) * square.sqrt()
    return scaled(each.factors, torch.where(square > 0, wanted / square.clamp_min(torch.finfo(square.dtype).tiny), 0))
