"""How much of a head's matrices dictionaries give back: of the matrices themselves, of what queries read, and of the
model's predictions where every write, or every state, of the head gives way to the reconstruction at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import pandas as pd
import torch
from sae_lens import SAE
from torch import Tensor

from hookpoints import HookedRecurrent, Recurrence
from sae_lens_writesae.atom.low_rank import LowRank
from sae_lens_writesae.sae.losses import read_queries
from sae_lens_writesae.sae.matrix import MatrixSAE
from writesae.experiment.lab import Lab

if TYPE_CHECKING:
    from writesae.experiment.approximations import Basis

NO_VARIANCE = "sequences on which the matrices of a dictionary, or all reads of them, do not vary"
ROUNDING = 1e-12
"""A variance below this share of the mean square is what rounding leaves of equal matrices."""


class HeadMatrices(NamedTuple):
    """What one head writes or holds on one sequence."""

    matrices: Tensor
    """[T,K,V] writes, or states after each token."""
    queries: Tensor
    """[T,K] the query that reads the state after each token."""

    @classmethod
    def of(cls, recurrence: Recurrence, target: str) -> HeadMatrices:
        """Of the recurrence of one head (H = 1) on one sequence. Memory: T K V numbers."""
        matrices = matrices_of(recurrence, target)
        return cls(matrices, read_queries(recurrence)[0, :, 0].to(matrices.dtype))


class Fit(NamedTuple):
    """One dictionary on one sequence: sums of squares over tokens."""

    sae: str
    target: str
    error: float
    read_error: float
    read: float
    l0: float


def matrices_of(recurrence: Recurrence, target: str) -> Tensor:
    """[T,K,V] writes, or states after each token, of the recurrence of one head (H = 1) on one sequence."""
    return (recurrence.states() if target == "state" else recurrence.write())[0, :, 0]


def encoded(sae: SAE, matrices: Tensor) -> Tensor:
    """Activations [T,F] of matrices [T,K,V], in the dtype of the SAE."""
    place = next(sae.parameters())
    return sae.encode(matrices.flatten(1).to(place.device, place.dtype))


def decoded(sae: SAE, activations: Tensor, like: Tensor) -> Tensor:
    """Decoded activations [T,F] as matrices of the shape and dtype of `like` [T,K,V]."""
    return sae.decode(activations).view(like.shape).to(like)


def dominant(sae: SAE, activations: Tensor) -> Tensor:
    """[T] the atom with the largest |a_i| |A_i| of activations [T,F]; atom 0 where none is active."""
    # SAELens' own dictionaries have no method for the norms.
    norms = sae.decoder_norm() if isinstance(sae, MatrixSAE) else sae.W_dec.norm(dim=-1)
    return (activations.abs() * norms).argmax(1)


def reconstruction(lab: Lab, sequences: Sequence[int]) -> pd.DataFrame:
    """How well every dictionary of the laboratory reconstructs its own target, by sequence.

    Returns: columns sae, sequence, and

    * explained: 1 - sum_t |X_t - X^_t|^2 / sum_t |X_t - mean|^2, the mean over all tokens of `sequences`;
    * reads: 1 - sum_t |(X_t - X^_t)^T q_t|^2 / sum_t |X_t^T q_t|^2, the share of what queries read;
    * l0: active atoms per token.

    Both shares are 1 for a perfect dictionary and have no lower bound. Sequences without variance, or without reads,
    are left out and counted in `lab.skipped`. Cost: a forward per sequence up to the layer, and an encode and decode of
    each matrix by each dictionary.
    """
    targets = dict.fromkeys(hook.target for hook in lab.hooks.values())
    fits: dict[int, list[Fit]] = {}
    sums: dict[tuple[str, int], Tensor] = {}
    squares: dict[tuple[str, int], float] = {}
    for i in lab.bar(list(sequences), "reconstruction"):
        recurrence = lab.recurrence(i)
        fits[i] = []
        for target in targets:
            x = HeadMatrices.of(recurrence, target)
            flat = x.matrices.flatten(1).double()
            sums[target, i], squares[target, i] = flat.sum(0), float(flat.square().sum())
            labels = [label for label, hook in lab.hooks.items() if hook.target == target]
            fits[i] += [_fit(label, target, lab.saes[label], x) for label in labels]
    n_tokens = lab.tokens.shape[1]
    rows: list[tuple[str, int, float, float, float]] = []
    left_out: set[tuple[str, int]] = set()
    for target in targets:
        mean = torch.stack([sums[target, i] for i in fits]).sum(0) / (n_tokens * len(fits))
        for i, of_sequence in fits.items():
            square = squares[target, i]
            variance = square - 2 * float(mean @ sums[target, i]) + n_tokens * float(mean @ mean)
            for fit in (fit for fit in of_sequence if fit.target == target):
                if variance <= ROUNDING * square or fit.read == 0:
                    left_out.add((target, i))
                else:
                    rows.append((fit.sae, i, 1 - fit.error / variance, 1 - fit.read_error / fit.read, fit.l0))
    lab.skipped[NO_VARIANCE] += len(left_out)
    return pd.DataFrame(rows, columns=["sae", "sequence", "explained", "reads", "l0"])


def _fit(label: str, target: str, sae: SAE, x: HeadMatrices) -> Fit:
    activations = encoded(sae, x.matrices)
    error = x.matrices - decoded(sae, activations, x.matrices)

    def read(m: Tensor) -> float:
        return float(torch.einsum("tkv,tk->tv", m, x.queries).double().square().sum())

    square = float(error.double().square().sum())
    return Fit(label, target, square, read(error), read(x.matrices), float((activations > 0).sum(1).float().mean()))


class UpperModel(NamedTuple):
    """The model from the head's layer on, over one sequence."""

    model: HookedRecurrent
    layer: int
    head: int
    tokens: Tensor
    """[1,T]"""
    residual: Tensor
    """[1,T,D] that enters the layer."""

    @classmethod
    def at(cls, model: HookedRecurrent, layer: int, head: int, tokens: Tensor) -> UpperModel:
        """Cost: a forward of tokens [1,T] up to the layer."""
        name = f"blocks.{layer}.hook_resid_pre"
        _, cache = model.run_with_cache(tokens, names_filter=[name], stop_at_layer=layer + 1)
        return cls(model, layer, head, tokens, cache[name])

    @classmethod
    def of(cls, lab: Lab, sequence: int) -> UpperModel:
        """On a sequence of a laboratory."""
        return cls.at(lab.model, lab.hook.layer, lab.hook.head, lab.tokens[[sequence]])

    def logits(self, target: str = "write", matrices: Tensor | None = None) -> Tensor:
        """Logits [T,vocab].

        Args:
            target: what is replaced, "write" or "state". A replaced write goes into the state and is read from then on.
                A replaced state is what its own reads see, while the recurrence goes on from the native one.
            matrices: [T,K,V] in the place of all of the head's; None: nothing is replaced.

        Cost: a forward from the layer on.
        """
        hooks: list[tuple[str | Callable, Callable]] = []
        if matrices is not None:
            flat = matrices.flatten(1)[None]
            name = f"blocks.{self.layer}.mixer.heads.{self.head}.hook_{target}_vec"
            hooks = [(name, lambda x, hook: flat.to(x))]
        logits = self.model.run_with_hooks(
            self.residual, fwd_hooks=hooks, start_at_layer=self.layer, tokens=self.tokens
        )
        return logits[0]

    def nats(self, target: str = "write", matrices: Tensor | None = None) -> float:
        """Mean of -log p(next token) over the sequence, in nats per token; arguments and cost as of `logits`."""
        logits = self.logits(target, matrices).double()
        return float(torch.nn.functional.cross_entropy(logits[:-1], self.tokens[0, 1:].to(logits.device)))


def replacement_costs(
    lab: Lab, sequence: int, basis: Basis, pca_ranks: tuple[int, ...], state_ranks: tuple[int, ...]
) -> pd.DataFrame:
    """What it costs on one sequence to replace all matrices that the dictionaries of the laboratory read.

    Returns: columns sequence, sae, hook, method, nats (per token, more than without replacement), native_nats. Methods
    are `itself` (the no-op), `dictionary`, `mean`, `zero`, for writes `pca r`, and for all states of the head `rank r`
    (ranks below the full one).

    Cost: a forward from the layer on for each row, and an SVD of each state.
    """
    recurrence, upper = lab.recurrence(sequence), UpperModel.of(lab, sequence)
    native, target = upper.nats(), lab.hook.target
    x = matrices_of(recurrence, target)
    methods: list[tuple[str, str, str, Tensor]] = [("", target, "itself", x)]
    for label, sae in lab.saes.items():
        methods.append((label, target, "dictionary", decoded(sae, encoded(sae, x), x)))
    methods.append(("", target, "mean", basis.target_mean.to(x).view(x.shape[1:]).expand_as(x)))
    methods.append(("", target, "zero", torch.zeros_like(x)))
    if target == "write":
        flat = x.flatten(1)
        methods += [("", target, f"pca {rank}", basis.pca.project(flat, rank).view_as(x)) for rank in pca_ranks]
    states = LowRank.svd(matrices_of(recurrence, "state"))
    below = [rank for rank in state_ranks if rank < states.rank]
    methods += [("", "state", f"rank {rank}", states.terms(slice(rank)).dense()) for rank in below]
    rows = [
        (sequence, label, hook, method, upper.nats(hook, matrices) - native, native)
        for label, hook, method, matrices in methods
    ]
    return pd.DataFrame(rows, columns=["sequence", "sae", "hook", "method", "nats", "native_nats"])
