"""What one head writes or holds, how long it keeps that, what a dictionary makes of it, and the model above."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, Self

import torch
from sae_lens import SAE
from torch import Tensor

from hookpoints import HookedRecurrent, Recurrence
from sae_lens_writesae.atom.low_rank import LowRank
from sae_lens_writesae.sae.matrix import MatrixSAE

ROUNDING = 1e-12
"""A variance below this share of the mean square is what rounding leaves of equal matrices."""

HALF_LIFE_LIMIT = 128
"""Longest half-life that is looked for, in tokens."""


def state_direction(states: Tensor) -> LowRank:
    """The top singular direction x y^T of states [N,K,V], at unit norm and with <S, x y^T> > 0. Costs an SVD each."""
    left, _, right = torch.linalg.svd(states, full_matrices=False)
    return LowRank.rank_one(left[:, :, 0], right[:, 0])


def mean_write(keys: Tensor, values: Tensor, energy: float = 1.0) -> LowRank:
    """The mean over tokens of k_t u_t^T from keys [T,K] and values [T,V], as one matrix (N = 1).

    It has the fewest singular terms, largest first, that hold the share `energy` of its squared norm (1: all of them).
    """
    return compact((keys.T @ values / len(keys))[None], energy)


def compact(matrices: Tensor, energy: float) -> LowRank:
    """Matrices [N,K,V] as the fewest singular terms that hold the share `energy` of each one's squared norm."""
    terms = LowRank.svd(matrices)
    square = terms.keys.square().sum(-1)
    held = square.cumsum(1) / square.sum(1, keepdim=True).clamp_min(torch.finfo(square.dtype).tiny)
    return terms.terms(slice(int((held < energy).sum(1).max()) + 1))


def random_units(like: LowRank, n: int, seed: int) -> LowRank:
    """n Gaussian directions of the rank of `like`, at unit norm."""
    drawn = like.rows([0]).expand(n).random_like(torch.Generator().manual_seed(seed))
    return drawn.with_norm(torch.ones(n).to(drawn.values))


def head_writes(recurrence: Recurrence, head: int) -> LowRank:
    """The T native writes of one head on batch row 0, in the dtype of the recurrence.

    A token that takes R delta steps writes a matrix of rank R.
    """
    one = recurrence.select(rows=slice(0, 1), heads=slice(head, head + 1))
    keys, values = (side[0, :, 0].to(one.dtype) for side in (one.k, one.u))
    return LowRank(keys, values) if keys.ndim == 3 else LowRank.rank_one(keys, values)


def joined(parts: Sequence[LowRank]) -> LowRank:
    """All matrices of some parts, one part after the other."""
    return LowRank(torch.cat([part.keys for part in parts]), torch.cat([part.values for part in parts]))


def half_lives(recurrence: Recurrence, limit: int = HALF_LIFE_LIMIT, n_starts: int = 24) -> Tensor:
    """Tokens until a write has lost half of its norm, [n,H] for n evenly spaced writes of each head on batch row 0.

    The key side p_t of a write is followed from p_t0 = k_t0 (its first term); the half-life is the first t - t0 with
    |p_t| < |k_t0| / 2, or `limit` if that comes later. Only writes with `limit` tokens after them are used; on
    sequences of fewer than 2 `limit` tokens the limit is T // 2. Cost: a vector recurrence for each, all in one batch.
    """
    limit = min(limit, recurrence.T // 2)
    starts = torch.linspace(0, recurrence.T - 1 - limit, n_starts).long().unique()
    keys = recurrence.k[0, starts].to(recurrence.dtype)  # [n,H,K]
    keys = keys if keys.ndim == 3 else keys[:, :, 0]
    over_time = {n: x for n, x in vars(recurrence).items() if isinstance(x, Tensor) and x.shape[1:2] == (recurrence.T,)}
    later = {name: x[0, starts[:, None] + 1 + torch.arange(limit)] for name, x in over_time.items() if x.ndim > 2}
    nothing = torch.zeros_like(later["u"][..., :1])
    # A vector is the only column of a state to which nothing is written.
    idle = dataclasses.replace(recurrence, **later | {"u": nothing, "initial_state": keys[..., None]})
    norms = torch.cat([keys.norm(dim=-1)[:, None], idle.states()[..., 0].norm(dim=-1)], 1)  # [n,1+limit,H]
    return (norms >= norms[:, :1] / 2).long().cumprod(1).sum(1).clamp_max(limit)


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


class UpperModel(NamedTuple):
    """The model from a layer on, over sequences, as a function of what is replaced there."""

    model: HookedRecurrent
    layer: int
    tokens: Tensor
    """[B,T]; B = 1 unless a method says otherwise."""
    stream: Tensor
    """[B,T,D], what enters the layer."""
    recurrence: Recurrence
    """Of all heads of the layer."""

    @classmethod
    def of(cls, model: HookedRecurrent, layers: Sequence[int], tokens: Tensor) -> dict[int, Self]:
        """For each of some layers, on tokens [B,T]. Cost: one forward up to the last of them."""
        names = {layer: f"blocks.{layer}.hook_resid_pre" for layer in layers}
        with model.recording(layers) as record:
            _, cache = model.run_with_cache(tokens, names_filter=[*names.values()], stop_at_layer=max(layers) + 1)
        return {n: cls(model, n, tokens, cache[name], record[n].recurrence) for n, name in names.items()}

    def __call__(self, head: int = 0, target: str = "write", matrices: Tensor | None = None) -> Tensor:
        """Logits [B T,vocab]. Cost: a forward from the layer on.

        Args:
            target: "write" or "state". A replaced write goes into the state and is read from then on. A replaced state
                is what its own reads see, while the recurrence resumes from the native one.
            matrices: [B T,K,V] that replace all of the head's; None: nothing is replaced.
        """
        name = f"blocks.{self.layer}.mixer.heads.{head}.hook_{target}_vec"
        hooks = [] if matrices is None else [(name, lambda x, hook: matrices.flatten(1).view_as(x).to(x))]
        return self._run(len(self.tokens), hooks).flatten(0, 1)

    def without(self, heads: Sequence[int]) -> Tensor:
        """Logits [1+n,T,vocab]: of nothing replaced, and of all writes of each of n heads deleted, which is a head that
        reads zeros. Cost: a forward from the layer on, of 1 + n rows."""

        mask = self.stream.new_ones(1 + len(heads), 1, self.recurrence.H, 1)
        mask[range(1, len(mask)), 0, list(heads)] = 0
        return self._run(len(mask), [(f"blocks.{self.layer}.mixer.hook_read", lambda read, hook: read * mask.to(read))])

    def _run(self, rows: int, hooks: list) -> Tensor:
        stream, tokens = (x.expand(rows, *x.shape[1:]) for x in (self.stream, self.tokens))
        return self.model.run_with_hooks(stream, fwd_hooks=hooks, start_at_layer=self.layer, tokens=tokens)


def nats(logits: Tensor, tokens: Tensor) -> float:
    """Mean of -log p(next token) over a sequence: logits [T,vocab], tokens [T]."""
    return float(torch.nn.functional.cross_entropy(logits[:-1].double(), tokens[1:].to(logits.device)))
