"""Fits of the Gauss-Newton metric of writes: gradients of sampled log-likelihoods, and their Kronecker factors.

One backward pass a sequence gives the gradient, at every read of a head, of sum_t log p_t(y_t): each y_t is drawn from
the model's own distribution, so that the tokens' terms have mean zero and do not mix on average. The adjoint recurrence
turns it into the gradient Gamma_t of every write, later erases included, and

    E[Gamma_t Gamma_t^T] = the Gauss-Newton matrix of the KL of all tokens from t on,

where Gamma_t is meant as a vector of K V entries and the mean is over draws.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from hookpoints import HookedRecurrent, Recurrence
from sae_lens_writesae.atom.low_rank import LowRank
from sae_lens_writesae.sae.metric import DAMPING, Metric
from sae_lens_writesae.sae.target import head_target


class ReadScores(NamedTuple):
    """One layer on a batch of sequences."""

    recurrence: Recurrence
    """Its factors, [B,T,H,...], without a graph."""
    gradients: Tensor
    """[B,T,H,V], of the sampled log-likelihood of each sequence, at what its heads read."""


def read_scores(
    model: HookedRecurrent, tokens: Tensor, layers: Sequence[int], generator: torch.Generator
) -> dict[int, ReadScores]:
    """Gradients of sum_t log p_t(y_t) with respect to the reads of some layers, all in one backward pass.

    Args:
        tokens: [B,T]; rows are sequences, drawn for separately.
        layers: recurrent layers.
        generator: draws y, on its own device: one of the host draws the same y for a model on any device.

    Cost: a forward, and a backward down to the lowest of the layers with its activations kept.
    """
    lowest = min(layers)
    leaves: dict[int, Tensor] = {}

    def mark(value: Tensor, hook: HookPoint) -> Tensor:
        leaf = torch.zeros_like(value, requires_grad=True)
        leaves[hook.layer()] = leaf
        return value + leaf

    hooks: list[tuple[str | Callable, Callable]] = [
        (f"blocks.{lowest}.hook_resid_pre", lambda value, hook: value.detach()),  # what is below needs no graph
        *((f"blocks.{layer}.mixer.hook_read", mark) for layer in layers),
    ]
    with torch.enable_grad(), model.recording() as record:
        logits = model.run_with_hooks(tokens, fwd_hooks=hooks)
        log_p = logits.flatten(0, 1).float().log_softmax(-1)
        # Drawn from the model, not taken from the text: only then is the second moment of gradients the metric.
        p = log_p.detach().exp().to(generator.device)
        drawn = torch.multinomial(p, 1, generator=generator).to(log_p.device)
        likelihood = log_p.gather(1, drawn).sum()
        gradients = torch.autograd.grad(likelihood, [leaves[layer] for layer in layers])
    return {layer: ReadScores(record[layer].recurrence, gradient) for layer, gradient in zip(layers, gradients)}


def fit_metrics(
    model: HookedRecurrent,
    tokens: Tensor,
    heads: Sequence[tuple[int, int]],
    *,
    damping: float = DAMPING,
    batch_size: int = 8,
    seed: int = 0,
) -> dict[tuple[int, int], Metric]:
    """The metrics of the writes of some heads, from one backward pass a sequence for all of them.

    A is the mean of Gamma Gamma^T and B that of Gamma^T Gamma, over tokens and draws, each scaled to unit mean
    eigenvalue and damped; they are exact where G is a Kronecker product. (Alternating A = E[Gamma B^-1 Gamma^T] and
    B = E[Gamma^T A^-1 Gamma] to the end predicted the KL of held-out edits neither better nor worse.) The scale is such
    that deleting writes costs on average what the exact gradients say. Everything is summed in float64.

    Args:
        tokens: [N,T] sequences of the text that the dictionaries are trained on.
        heads: (layer, head) each.
        damping: share of the identity in A and B, above 0 and at most 1, where the metric is Frobenius' again.
        batch_size: sequences in one pass.
        seed: of the draws, which are the same on every device.

    Raises:
        ValueError: no sequence, no head, a damping out of range, or a head that nothing reads.
        UnknownHookError, UnsupportedModelError: a head or layer that the model lacks.

    Cost: a forward and a backward of the model a batch, and about 2 K V (K + V) multiply-adds a token and head. Held
    besides a batch: the factors of the writes, K + V numbers a token and head.
    """
    if not 0 < damping <= 1:
        raise ValueError(f"damping: expected a number above 0, at most 1, got {damping}")
    for layer, head in heads:
        head_target(model, layer, head)
    generator = torch.Generator().manual_seed(seed)
    layers = sorted({layer for layer, _ in heads})
    sums = {place: Sums() for place in heads}
    for batch in tokens.split(batch_size):
        scores = read_scores(model, batch, layers, generator)
        for (layer, head), of_head in sums.items():
            of_layer, gradients = scores[layer]
            of_head.add(ReadScores(of_layer.select(heads=head), gradients[:, :, head : head + 1]))
    return {place: of_head.metric(damping, len(tokens)) for place, of_head in sums.items()}


class Sums:
    """Sums over the writes of one head."""

    def __init__(self) -> None:
        self.key_side = self.value_side = self.cost = torch.zeros((), dtype=torch.float64)
        """[K,K] sum of Gamma Gamma^T, [V,V] sum of Gamma^T Gamma, and the sum of <Gamma, W>^2."""
        self.writes: list[LowRank] = []
        """In float32."""

    def add(self, scores: ReadScores) -> None:
        r = scores.recurrence
        wide = r.replace(q=r.q.double())  # one field in float64 makes the whole recurrence compute in it
        keys = r.k[:, :, 0].double().reshape(r.B, r.T, r.R, -1)
        values = r.u[:, :, 0].double().reshape(r.B, r.T, r.R, -1)
        self.writes.append(LowRank(keys.flatten(0, 1), values.flatten(0, 1)).to(torch.float32))
        stop = r.T
        for block in wide.adjoint(scores.gradients).state_blocks():  # of the last tokens first
            gamma = block[:, :, 0].flip(1)
            start = stop - gamma.shape[1]
            inner = torch.einsum("btkv,btrk,btrv->bt", gamma, keys[:, start:stop], values[:, start:stop])
            self.cost = self.cost + inner.square().sum()
            rows = gamma.flatten(0, 2)
            columns = gamma.mT.flatten(0, 2)
            self.value_side = self.value_side + rows.mT @ rows
            self.key_side = self.key_side + columns.mT @ columns
            stop = start

    def metric(self, damping: float, n_sequences: int) -> Metric:
        """The damped Kronecker factors, scaled so that a write keeps its squared norm on average."""
        key_side = _damped_factor(self.key_side, damping)
        value_side = _damped_factor(self.value_side, damping)
        keys = torch.cat([batch.keys for batch in self.writes]).double()
        values = torch.cat([batch.values for batch in self.writes]).double()
        writes = LowRank(keys, values)
        plain = writes.inner(writes).sum()
        sides = LowRank(keys @ key_side, values @ value_side)
        balance = (plain / writes.inner(sides).sum()).sqrt()
        return Metric.of(key_side * balance, value_side * balance, float(self.cost / plain), damping, n_sequences)


def _damped_factor(matrix: Tensor, share: float) -> Tensor:
    """(1 - share) of a matrix with unit mean eigenvalue, and `share` of the identity."""
    identity = torch.eye(len(matrix)).to(matrix)
    return matrix * ((1 - share) * len(matrix) / matrix.trace()) + share * identity
