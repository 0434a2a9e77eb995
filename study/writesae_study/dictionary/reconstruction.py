"""What dictionaries, and directions and projections without one, make of a head's matrices: what they reconstruct, what
queries read of it, what replaces one write, and what it costs to replace every write, or every state."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from sae_lens_writesae.atom.low_rank import LowRank
from sae_lens_writesae.sae.losses import read_queries
from writesae.dictionary.estimates import Estimate
from writesae.dictionary.traits import n_parameters
from writesae.experiment.lab import Site
from writesae.head.matrices import decoded, dominant, encoded, matrices_of
from writesae.head.upper import UpperModel
from writesae.head.writes import ROUNDING, head_writes, joined
from writesae_study.dictionary.traits import variant
from writesae_study.experiment.at_firings import MEAN_ENERGY
from writesae_study.experiment.bench import Bench, trials_at
from writesae_study.experiment.conditions import scaled
from writesae_study.experiment.evaluation import Result
from writesae_study.experiment.readout import kl_window
from writesae_study.head.components import MatrixPca, fit_pca
from writesae_study.head.writes import mean_write, nats, state_direction, torch_generator
from writesae_study.verdict.finding import Paired

NO_VARIANCE = "sequences on which the matrices of a dictionary, or all reads of them, do not vary"
ATOM, ATOM_SVD, SVD = "atom", "atom svd", "svd"
"""What a dictionary writes: its strongest atom, that atom cut to rank 1 (where it is of a higher rank), and the top-1
SVD of the reconstruction."""
EXCHANGED: dict[str, str] = {
    "sequence": "row of the evaluation tokens",
    "position": "token t that is edited",
    "sae": "label of the dictionary; empty where none is needed",
    "condition": "native, delete, random, mean, state, state_after, pca r; atom, atom svd, svd",
    "kl": "nats, mean over t..t+horizon of KL(native || edited)",
    "cosine": "cosine of what is written and the native write",
    "norm": "Frobenius norm of what is written over that of the native write",
}
"""Columns of `exchanged`."""

DICTIONARIES: dict[str, str] = {
    "sae": "label of the dictionary",
    "variant": "which of the paper's variants it is, or other",
    "d_sae": "number of atoms",
    "parameters": "numbers that are trained",
    "explained": "share of the variance of its target that it explains, mean over sequences",
    "l0": "active atoms per token",
    "alive": "number of atoms that fire",
    "dead": "number of atoms that never fire",
}
"""Columns of `dictionaries`."""
REPLACEMENT: dict[str, str] = {
    "sequence": "row of the evaluation tokens",
    "sae": "label of the dictionary; empty where none is needed",
    "hook": "what is replaced: write or state",
    "method": "itself, dictionary, mean, zero, pca r; for states rank r",
    "nats": "nats per token, more than without replacement",
    "native_nats": "nats per token without replacement",
}
"""Columns of `replacement_costs`."""


def reconstruction(lab: Bench, sequences: Sequence[int]) -> pd.DataFrame:
    """How well every dictionary of the laboratory reconstructs its own target, by sequence.

    Returns: columns sae, sequence, and

    * explained: 1 - sum_t |X_t - X^_t|^2 / sum_t |X_t - mean|^2, the mean over all tokens of `sequences`;
    * reads: 1 - sum_t |(X_t - X^_t)^T q_t|^2 / sum_t |X_t^T q_t|^2, the share of what queries read;
    * l0: active atoms per token.

    Both shares are 1 for a perfect dictionary and have no lower bound. Sequences without variance, or without reads,
    are left out and counted in `lab.skipped`. Cost: a forward per sequence up to the layer, and an encode and decode of
    each matrix by each dictionary.
    """
    rows, sums = [], []
    for sequence in lab.bar(list(sequences), "reconstruction"):
        recurrence = lab.recurrence(sequence)
        queries = read_queries(recurrence)[0, :, 0]
        for label, hook in lab.hooks.items():
            x = matrices_of(recurrence, hook.target)
            activations = encoded(lab.saes[label], x)
            lost = x - decoded(lab.saes[label], activations, x)
            row = {
                "sae": label,
                "target": hook.target,
                "sequence": sequence,
                "lost": _square_sum(lost),
                "square": _square_sum(x),
                "lost_read": _square_sum(_query_reads(lost, queries)),
                "read": _square_sum(_query_reads(x, queries)),
                "l0": float((activations > 0).sum(1).float().mean()),
            }
            rows.append(row)
            sums.append(x.flatten(1).double().sum(0))
    table = pd.DataFrame(rows)
    n_tokens = lab.tokens.shape[1]
    totals = torch.stack(sums)
    # The mean is that of all sequences, which is known after the last of them: sum |x - m|^2 of each sequence is
    # sum |x|^2 - 2 <sum x, m> + T |m|^2.
    variance = table["square"].copy()
    for label in lab.saes:
        of_sae = np.flatnonzero(table["sae"] == label)
        mean = totals[of_sae].mean(0) / n_tokens
        about_mean = n_tokens * (mean @ mean) - 2 * totals[of_sae] @ mean
        variance[of_sae] += about_mean.cpu().numpy()
    is_still = (variance <= ROUNDING * table["square"]) | (table["read"] == 0)
    lab.skipped[NO_VARIANCE] += len(table[is_still].drop_duplicates(["target", "sequence"]))
    explained = 1 - table["lost"] / variance
    reads = 1 - table["lost_read"] / table["read"]
    moving = table.assign(explained=explained, reads=reads)[~is_still]
    return moving[["sae", "sequence", "explained", "reads", "l0"]].reset_index(drop=True)


def _square_sum(x: Tensor) -> float:
    """Sum of all squares, in float64."""
    return float(x.double().square().sum())


def _query_reads(matrices: Tensor, queries: Tensor) -> Tensor:
    """[T,V] what queries [T,K] read of matrices [T,K,V]."""
    return torch.einsum("tkv,tk->tv", matrices, queries.to(matrices.dtype))


def dictionaries(lab: Bench, sequences: Sequence[int], alive_tokens: int) -> pd.DataFrame:
    """What each dictionary of the laboratory is, and how it does on some sequences (`reconstruction`).

    Raises:
        NothingToMeasureError: what one of them reconstructs does not vary.
    """
    fits = reconstruction(lab, sequences)
    n_tokens = min(alive_tokens, lab.tokens.numel())
    rows = []
    for label, sae in lab.saes.items():
        fit = fits[fits["sae"] == label]
        lab.require(not fit.empty, f"{label}: what it reconstructs does not vary on any test sequence")
        d_sae = int(sae.cfg.d_sae)
        alive = len(lab.firings(label).alive(n_tokens))
        row = {
            "sae": label,
            "variant": variant(sae),
            "d_sae": d_sae,
            "parameters": n_parameters(sae),
            "explained": fit["explained"].mean(),
            "l0": fit["l0"].mean(),
            "alive": alive,
            "dead": d_sae - alive,
        }
        rows.append(row)
    return pd.DataFrame(rows, columns=list(DICTIONARIES))


class Basis(NamedTuple):
    """What is known of a head from sequences that nothing is tested on."""

    pca: MatrixPca
    """Of the native writes."""
    mean: LowRank
    """The mean native write, N = 1."""
    target_mean: Tensor
    """[K*V] mean of what the dictionaries reconstruct: writes or states."""

    @classmethod
    def fit(cls, lab: Bench, sequences: Sequence[int], n_writes: int, n_components: int) -> Basis:
        """From some sequences; components from `n_writes` writes drawn evenly over them.

        Cost: a forward of each sequence up to the layer, and K V numbers for each of these writes.
        """
        rng = lab.rng(11)
        per_sequence = math.ceil(n_writes / len(sequences))
        writes, drawn, means = [], [], []
        for sequence in sequences:
            recurrence = lab.recurrence(sequence)
            of_sequence = head_writes(recurrence, 0)
            writes.append(of_sequence)
            rows = rng.choice(len(of_sequence), min(per_sequence, len(of_sequence)), replace=False)
            drawn.append(of_sequence.rows(np.sort(rows).tolist()))
            matrices = matrices_of(recurrence, lab.hook.target)
            means.append(matrices.flatten(1).double().mean(0))
        pca = fit_pca(joined(drawn).rows(slice(n_writes)), n_components)
        every_write = joined(writes)
        keys = every_write.keys.flatten(0, 1)
        values = every_write.values.flatten(0, 1)
        mean = mean_write(keys, values, MEAN_ENERGY)
        return cls(pca, mean, torch.stack(means).mean(0).to(pca.mean))


def of_dictionary(lab: Bench, label: str, matrices: Tensor, native: LowRank) -> dict[str, LowRank]:
    """What a dictionary writes for matrices [N,K,V] instead of native writes: its strongest atom by |a_i| |A_i|,
    cut to rank 1 where it is of a higher one, and the top term of its reconstruction."""
    sae = lab.saes[label]
    activations = encoded(sae, matrices)
    strongest = dominant(sae, activations)
    size = activations.gather(1, strongest[:, None])[:, 0]
    atoms = lab.atoms(strongest.cpu().numpy(), label)
    atom = (atoms * size.to(atoms.values)).to(native.values)
    written = {ATOM: atom}
    if atoms.rank > 1:
        written[ATOM_SVD] = LowRank.svd(atom.dense(), 1, balanced=True)
    rebuilt = decoded(sae, activations, matrices)
    written[SVD] = LowRank.svd(rebuilt, 1, balanced=True)
    return written


def exchanged(
    lab: Bench, site: Site, positions: list[int], basis: Basis, pca_ranks: Sequence[int], scale: str, window: int
) -> pd.DataFrame:
    """What each dictionary, and what needs none, does instead of the writes at some positions of one sequence.

    Args:
        scale: "matched", the norm of the native write, or "coefficient", the own size of what has one; a direction gets
            the projection of the native write on it, its best. What is zero, because nothing fires, stays zero.

    Cost: per position 2 edited rows and one for each baseline, of `window` tokens.
    """
    native = site.at(positions)
    noise = torch_generator(lab.rng(10, site.sequence))
    directions = {
        "random": native.random_like(noise),
        "mean": basis.mean.expand(len(native)),
        "state": state_direction(site.state_before(positions)),
        "state_after": state_direction(site.state_after(positions)),
    }
    best = "least_squares" if scale == "coefficient" else scale  # a direction alone has no coefficient
    written = {("", "native"): native, ("", "delete"): native * 0.0}
    for name, direction in directions.items():
        written["", name] = scaled(direction, native, best)
    dense = native.dense()
    for rank in pca_ranks:
        projected = basis.pca.project(dense.flatten(1), rank).view_as(dense)
        written["", f"pca {rank}"] = scaled(LowRank.svd(projected, balanced=True), native, scale)
    for label, hook in lab.hooks.items():
        matrices = matrices_of(site.recurrence, hook.target)[positions]
        for name, atom in of_dictionary(lab, label, matrices, native).items():
            written[label, name] = scaled(atom, native, scale)
    places = pd.DataFrame({"sequence": site.sequence, "position": positions})
    trials = []
    for (sae, condition), matrices in written.items():
        cosine = matrices.cosine(native).cpu().numpy()
        norm = (matrices.norm() / native.norm()).cpu().numpy()
        rows = places.assign(sae=sae, condition=condition, cosine=cosine, norm=norm)
        trials += trials_at(rows, lab.replace, matrices)
    return lab.read(site, trials, kl_window, window)


def replacement_costs(
    lab: Bench, sequence: int, basis: Basis, pca_ranks: tuple[int, ...], state_ranks: tuple[int, ...]
) -> pd.DataFrame:
    """What it costs on one sequence to replace all matrices that the dictionaries of the laboratory read.

    Returns: columns sequence, sae, hook, method, nats (per token, more than without replacement), native_nats. Methods
    are `itself` (the no-op), `dictionary`, `mean`, `zero`, for writes `pca r`, and for all states of the head `rank r`
    (ranks below the full one).

    Cost: a forward from the layer on for each row, and an SVD of each state.
    """
    _, layer, head, target = lab.hook
    upper = UpperModel.of(lab.model, [layer], lab.tokens[[sequence]])[layer]
    recurrence = upper.recurrence.select(heads=slice(head, head + 1))
    tokens = lab.tokens[sequence]
    native = nats(upper(), tokens)
    x = matrices_of(recurrence, target)
    methods = [("", target, "itself", x)]
    for label, sae in lab.saes.items():
        methods.append((label, target, "dictionary", decoded(sae, encoded(sae, x), x)))
    mean = basis.target_mean.to(x).view(x.shape[1:])
    methods.append(("", target, "mean", mean.expand_as(x)))
    methods.append(("", target, "zero", torch.zeros_like(x)))
    if target == "write":
        for rank in pca_ranks:
            projected = basis.pca.project(x.flatten(1), rank).view_as(x)
            methods.append(("", target, f"pca {rank}", projected))
    states = LowRank.svd(matrices_of(recurrence, "state"))
    for rank in state_ranks:
        if rank < states.rank:  # a full rank cuts nothing
            methods.append(("", "state", f"rank {rank}", states.terms(slice(rank)).dense()))
    rows = []
    for label, hook, method, matrices in methods:
        added = nats(upper(head, hook, matrices), tokens) - native
        rows.append((sequence, label, hook, method, added, native))
    return pd.DataFrame(rows, columns=list(REPLACEMENT))


def mean_cost(result: Result, method: str, minus: str | None = None, hook: str | None = None) -> Estimate:
    """Nats per token that a method ("label of the dictionary/method") costs, over sequences; with `minus` the paired
    difference. Its observations are tokens.

    Args:
        hook: what is replaced; None: the dictionaries' own target.
    """
    table = result.tables["replacement"]
    rows = table[table["hook"] == (hook or result.info["target"])]
    named = rows.assign(name=rows["sae"] + "/" + rows["method"])
    costs = Paired.of(named, "nats", by="name", seed=result.evaluation.seed)
    over_sequences = costs.mean(method, minus)
    return over_sequences._replace(n=over_sequences.n * int(result.fact("n_positions")))


def no_op_cost(result: Result) -> float:
    """What replacing all matrices by themselves costs: the floor, in nats per token (95th percentile)."""
    table = result.tables["replacement"]
    return float(table.loc[table["method"] == "itself", "nats"].abs().quantile(0.95))
