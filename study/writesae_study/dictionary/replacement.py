"""What dictionaries, and directions and projections without one, write instead of one write of a head, or of all its
writes or states at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from sae_lens_writesae.atom.low_rank import LowRank
from writesae.dictionary.estimates import Estimate
from writesae.dictionary.traits import n_parameters
from writesae.experiment.lab import Site
from writesae.head.matrices import decoded, dominant, encoded, matrices_of
from writesae.head.upper import UpperModel
from writesae.head.writes import head_writes, joined
from writesae_study.dictionary.traits import variant
from writesae_study.experiment.at_firings import MEAN_ENERGY
from writesae_study.experiment.bench import Bench, trials_at
from writesae_study.experiment.conditions import scaled
from writesae_study.experiment.draws import ALIVE_TOKENS
from writesae_study.experiment.evaluation import Result
from writesae_study.experiment.readout import kl_window
from writesae_study.head.components import MatrixPca, fit_pca
from writesae_study.head.writes import mean_write, nats, state_direction, torch_generator
from writesae_study.verdict.finding import Paired

ATOM, ATOM_SVD, SVD = "atom", "atom svd", "svd"
"""What a dictionary writes: its strongest atom, that atom cut to rank 1 (where it is of a higher rank), and the top-1
SVD of the reconstruction."""
EXCHANGED: dict[str, str] = {
    "sequence": "row of the evaluation tokens",
    "position": "token t that is edited",
    "sae": "label of the dictionary; empty where none is needed",
    "condition": "native, delete, random, mean, state, state_after, pca r; atom, atom svd, svd",
    "kl": "nats, mean over t..t+horizon of KL(native || edited)",
}
"""Columns of `exchanged`."""

DICTIONARIES: dict[str, str] = {
    "sae": "label of the dictionary",
    "variant": "which of the paper's variants it is, or other",
    "d_sae": "number of atoms",
    "parameters": "numbers that are trained",
    "dead": "number of atoms that never fire",
}
"""Columns of `dictionaries`."""
REPLACEMENT: dict[str, str] = {
    "sequence": "row of the evaluation tokens",
    "sae": "label of the dictionary; empty where none is needed",
    "method": "itself, dictionary, mean, zero",
    "nats": "nats per token, more than without replacement",
}
"""Columns of `replacement_costs`."""


def dictionaries(lab: Bench) -> pd.DataFrame:
    """What each dictionary of the laboratory is, and how many of its atoms never fire."""
    rows = []
    for label, sae in lab.saes.items():
        d_sae = int(sae.cfg.d_sae)
        n_dead = d_sae - len(lab.firings(label).alive(ALIVE_TOKENS))
        rows.append((label, variant(sae), d_sae, n_parameters(sae), n_dead))
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
        # Components of the drawn writes, and means of all.
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
    lab: Bench, site: Site, positions: list[int], basis: Basis, pca_ranks: Sequence[int], window: int
) -> pd.DataFrame:
    """What each dictionary, and what needs none, does instead of the writes at some positions of one sequence, at its
    own size. A direction has none and gets the projection of the native write on it, its best.

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
    # What is written under each condition, by dictionary and name: first what needs no dictionary.
    written = {("", "native"): native, ("", "delete"): native * 0.0}
    for name, direction in directions.items():
        written["", name] = scaled(direction, native, "least_squares")
    dense = native.dense()
    for rank in pca_ranks:
        projected = basis.pca.project(dense.flatten(1), rank).view_as(dense)
        written["", f"pca {rank}"] = LowRank.svd(projected, balanced=True)
    for label, hook in lab.hooks.items():
        matrices = matrices_of(site.recurrence, hook.target)[positions]
        for name, atom in of_dictionary(lab, label, matrices, native).items():
            written[label, name] = atom
    places = pd.DataFrame({"sequence": site.sequence, "position": positions})
    trials = []
    for (sae, condition), matrices in written.items():
        trials += trials_at(places.assign(sae=sae, condition=condition), lab.replace, matrices)
    return lab.read(site, trials, kl_window, window)


def replacement_costs(lab: Bench, sequence: int, basis: Basis) -> pd.DataFrame:
    """What it costs on one sequence to replace all matrices that the dictionaries of the laboratory read.

    Returns: columns sequence, sae, method, nats (per token, more than without replacement). Methods are `itself` (the
    no-op), `dictionary`, `mean` and `zero`.

    Cost: a forward from the layer on for each row.
    """
    _, layer, head, target = lab.hook
    upper = UpperModel.of(lab.model, [layer], lab.tokens[[sequence]])[layer]
    recurrence = upper.recurrence.select(heads=slice(head, head + 1))
    tokens = lab.tokens[sequence]
    native = nats(upper(), tokens)
    x = matrices_of(recurrence, target)
    # What stands in for the matrices: themselves, each reconstruction, their mean, zero.
    methods = [("", "itself", x)]
    for label, sae in lab.saes.items():
        methods.append((label, "dictionary", decoded(sae, encoded(sae, x), x)))
    mean = basis.target_mean.to(x).view(x.shape[1:])
    methods.append(("", "mean", mean.expand_as(x)))
    methods.append(("", "zero", torch.zeros_like(x)))
    rows = []
    for label, method, matrices in methods:
        added = nats(upper(head, target, matrices), tokens) - native
        rows.append((sequence, label, method, added))
    return pd.DataFrame(rows, columns=list(REPLACEMENT))


def mean_cost(result: Result, method: str, minus: str | None = None) -> Estimate:
    """Nats per token that a method ("label of the dictionary/method") costs, over sequences; with `minus` the paired
    difference. Its observations are tokens."""
    rows = result.tables["replacement"]
    named = rows.assign(name=rows["sae"] + "/" + rows["method"])
    costs = Paired.of(named, "nats", by="name", seed=result.evaluation.seed)
    over_sequences = costs.mean(method, minus)
    return over_sequences._replace(n=over_sequences.n * int(result.fact("n_positions")))


def no_op_cost(result: Result) -> float:
    """What replacing all matrices by themselves costs: the floor, in nats per token (95th percentile)."""
    table = result.tables["replacement"]
    return float(table.loc[table["method"] == "itself", "nats"].abs().quantile(0.95))
