"""What can be computed from the factors of a recurrent layer: outputs, states, attention, responses and gradients.

    S_t = (diag(alpha_t) + a_t b_t^T) S_{t-1} + k_t u_t^T          S: [B,H,K,V], key-first
    o_t = S_t^T (scale * q_t)

A token may write several rank-1 terms, sum_r k_tr u_tr^T, and erase along several, sum_e a_te b_te^T (Gated
DeltaProduct, whose token is R delta steps: see `carried_keys`). The factors then have an axis for the
terms, [B,T,H,R,K]; everything per token (outputs, states, writes, positions) stays per token.

Each result is computed in two ways: `hookpoints.recurrence.reference` walks token by token and is the oracle;
`hookpoints.recurrence.chunked` is the fast path and the default.

Alphabet: B batch, T time, H head, K key side, V value side, R rank of a token's write, E rank of its erase (E = R in
all rules so far), N vector. Sources: gated delta rule, Yang et al. 2024 (arXiv 2412.06464), eq. 10;
per-channel decay, Kimi Linear (arXiv 2510.26692), eq. 1; additive rules, GLA (arXiv 2312.06635), eq. 3.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Literal, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from hookpoints.recurrence import chunked, reference
from hookpoints.recurrence.canonical import (
    CanonicalForm,
    Index,
    Loop,
    ScanResult,
    choice,
    pick,
    resolve_index,
    terms,
)

Method = Literal["chunked", "reference"]


class Recurrence(CanonicalForm):
    """Factors of one recurrent layer over one stretch of tokens, and what follows from them.

    The fields are those of `CanonicalForm`: `q`, `k`, `u`, `log_decay`, `a`, `b`, `scale`, `initial_state`,
    `read_before_write`, `beta`, `rates`. All methods are differentiable in every field, and ignore autocast.
    """

    @classmethod
    def of(cls, form: CanonicalForm) -> Self:
        """The recurrence that has the factors of ``form``."""
        return cls(**{field.name: getattr(form, field.name) for field in dataclasses.fields(form)})

    def scan(self, *, method: Method = "chunked") -> ScanResult:
        """Outputs and final state in one pass."""
        by_token = self._by_token(method)
        with self._full_precision():
            return reference.scan(self) if by_token else chunked.scan(self)

    def outputs(self, *, method: Method = "chunked") -> Tensor:
        """What the layer reads, o_t = S_t^T (scale q_t): [B,T,H,V]. Cost O(K V) per token and head."""
        return self.scan(method=method).outputs

    def final_state(self, *, method: Method = "chunked") -> Tensor:
        """State after the last token, [B,H,K,V]."""
        return self.scan(method=method).final_state

    def states(self, heads: Index = None, positions: Index = None, *, method: Method = "chunked") -> Tensor:
        """States after the write, [B,T',H',K,V], for the selected heads and positions (None: all; an int keeps
        its axis).

        Memory is the result's, K V numbers per token and head (64 KB in float32 at K = V = 128). Sums over tokens need
        no more than `state_blocks`, and reads no more than `outputs`.
        """
        selected = self.select(heads=heads)
        at = resolve_index(positions, self.T, "positions")
        by_token = selected._by_token(method) or not at
        with self._full_precision():
            return reference.states(selected, at) if by_token else chunked.states(selected, at)

    def write(self, heads: Index = None, positions: Index = None) -> Tensor:
        """Dense writes k_t u_t^T, what each token adds: [B,T',H',K,V]. Memory is the result's; the factors `k` and `u`
        say the same in K + V numbers."""
        selected = self.select(heads=heads)
        key = pick(selected.k.to(self.dtype), positions, 1, "positions")
        value = pick(selected.u.to(self.dtype), positions, 1, "positions")
        if key.ndim == 5:
            return key.mT @ value
        return key[..., :, None] * value[..., None, :]

    def by_channel(self) -> Self:
        """The same recurrence with one decay for each key channel at most: where each entry of the state has its own
        (`rates`), H V heads of V = 1, in the order of heads and then of value channels; else the recurrence itself.

        The log-decay becomes K V numbers per token and head, as many as a state has.
        """
        if self.rates is None or self.log_decay is None:
            return self

        def of_channels(x: Tensor) -> Tensor:  # [B,T,H,...] as [B,T,H V,...]
            return x.unsqueeze(3).expand(-1, -1, -1, self.V, *x.shape[3:]).flatten(2, 3)

        state = self.initial_state
        return dataclasses.replace(
            self,
            q=of_channels(self.q),
            k=of_channels(self.k),
            u=self.u.movedim(-1, 3).flatten(2, 3).unsqueeze(-1),
            log_decay=(self.log_decay[..., None] * self.rates.mT).flatten(2, 3),
            rates=None,
            initial_state=None if state is None else state.mT.flatten(1, 2).unsqueeze(-1),
        )

    def by_source(self, past_keys: Tensor | None = None) -> Self:
        """The same recurrence with one value channel for each term that a token writes, [S R], instead of V.

        Its reads are the weights of `attention`. Its states [B,H,K,S R] are the keys as the transitions since have
        left them, p_t(k_s): hand the last one to `by_source` of the tokens that follow, as `past_keys` [B,H,K,S' R],
        and their reads have S' more sources in front. Where each entry of the state has its own decay (`rates`), heads
        are those of `by_channel`, since there is a weight for each value channel.
        """
        r = self.by_channel()
        count = r.T * r.R
        past = 0 if past_keys is None else past_keys.shape[-1]
        # Each write gets a separate channel, and so leaves in a read the weight with which it is read.
        ones = torch.eye(count, dtype=r.dtype, device=r.device)
        values = F.pad(ones, (past, 0)).view(r.T, 1, r.R, -1).expand(r.B, -1, r.H, -1, -1)
        state = None if past_keys is None else F.pad(past_keys.to(r.dtype), (0, count))
        return dataclasses.replace(r, u=values if r.k.ndim == 5 else values.squeeze(3), initial_state=state)

    def attention(self, *, method: Method = "chunked") -> Tensor:
        """How much token t reads of what token s wrote, exactly: A[t,s] = <p_t(k_s), scale q_t>, [B,H,T,S], S = T.

        p_t(k_s) is the key of write s after the decays and erases of the tokens s+1 .. t, so that o_t is the sum over
        s of A[t,s] u_s, plus what is read of `initial_state`. Weights have a sign and do not add up to 1; what is
        above the diagonal is 0. Where a token writes R > 1 terms, [B,H,T,S,R]: each term has its own weight, and
        its own value. Where each entry of the state has its own decay (`rates`), each value channel has its own
        weights: [B,H V,T,S], as `by_channel` orders them.

        Cost O(K T R) per token and head, T / V times that of `outputs`; memory is the result's.
        """
        return pattern_of(self.by_source().outputs(method=method), self)

    def state_blocks(self, *, method: Method = "chunked") -> Iterator[Tensor]:
        """All states after the write, in order, as blocks [B,C,H,K,V] of a few tokens: `states` for sums over tokens,
        with memory that does not grow with the length."""
        by_token = self._by_token(method)
        with self._full_precision():
            yield from reference.state_blocks(self) if by_token else chunked.state_blocks(self)

    def adjoint(self, read_gradients: Tensor) -> Self:
        """The recurrence of the gradients of the writes, which is of the same form and runs backwards in time.

        With g_t = dL/do_t, the gradient of a write is that of the state it enters, for the transition hands it on:

            dL/dW_t = dL/dS_t = scale q_t g_t^T + (diag(alpha_{t+1}) + b_{t+1} a_{t+1}^T) dL/dS_{t+1}

        (q and g of t + 1 under `read_before_write`). Later erases react, as in the model (closed loop); take
        `without_erase().adjoint(...)` for the open loop. So state s of the result is dL/dW at token T - 1 - s, and its
        `states` and `state_blocks` (for sums over tokens) serve for gradients.

        Args:
            read_gradients: [B,T,H,V], g: the gradient of a number L with respect to what the layer reads.

        Costs nothing but views and copies of the factors.
        """
        # A token hands on what its own transition makes of it, so that factors of the transition come one step late.
        turned = _handed_back if self.read_before_write else partial(torch.flip, dims=(1,))
        keys = turned(self.q.to(self.dtype) * self.scale)
        values = turned(read_gradients.to(self.dtype))
        log_decay = None if self.log_decay is None else _handed_back(self.log_decay)
        a = None if self.b is None else _handed_back(self.b)  # (a b^T)^T = b a^T
        b = None if self.a is None else _handed_back(self.a)
        # What the result reads means nothing; its q may be any of the right shape.
        return type(self)(q=keys, k=keys, u=values, log_decay=log_decay, a=a, b=b, rates=self.rates)

    def value_gradients(self, read_gradients: Tensor, *, method: Method = "chunked") -> Tensor:
        """dL/du of the value of every write, like `u`: (dL/dW_t)^T k_t, which is the sum over tokens of A[i,t] g_i.

        So <u_t, dL/du_t> is the effect of the whole write on L, to first order. ``read_gradients`` and errors are those
        of `adjoint`; the cost is that of `outputs`, for each term.
        """
        adjoint = self.adjoint(read_gradients)
        # (dL/dW)^T k is a read of the adjoint's state by k; tokens turn around on the way in and out.
        readers = (adjoint.replace(q=key.flip(1)) for key in terms(self.k))
        gradients = [reader.outputs(method=method).flip(1) for reader in readers]
        if self.k.ndim == 4:
            return gradients[0]
        return torch.stack(gradients, dim=3)

    def propagate(
        self, x: Tensor, start: int, head: int, *, loop: Loop = "closed", method: Method = "chunked"
    ) -> Tensor:
        """Key side of an edit as later reads see it: p_start = x, p_t = (diag(alpha_t) + a_t b_t^T) p_{t-1}.

        Adding x y^T to the state at `start` adds exactly <p_t, scale q_t> y to o_t for every t >= start (t >
        start, with p_{t-1}, under `read_before_write`).

        Args:
            x: [N,K], the same vectors for every batch row, or [B,N,K].
            start: token after whose write the edit is added.
            head: head of the edit; no other head responds.
            loop: "closed" lets the erase react to the edited state, as the model would; "open" keeps decay
                only.

        Returns: [B,N,T-start,K].

        Raises ValueError where each entry of the state has its own decay (`rates`): a response is not of rank 1.
        """
        if self.rates is not None:
            raise ValueError(
                "each entry of this state has its own decay (rates, as in Mamba-1), so that a key changes in another "
                "way for each value channel, which by_channel() makes a head of. outputs(), states() and with_write() "
                "answer for whole writes"
            )
        start = resolve_index(int(start), self.T, "start")[0]
        selected = self.select(heads=int(head))
        selected = choice(loop, {"closed": lambda: selected, "open": selected.without_erase}, "loop")()
        vectors = x.to(self.dtype).expand(self.B, -1, -1)
        if start == self.T - 1:
            return vectors.unsqueeze(2)
        # The vectors are the columns of a state to which nothing is written.
        later = selected.select(tokens=slice(start + 1, None), initial_state=selected.starting_state())
        idle = later.replace(
            u=vectors.new_zeros(*later.u.shape[:-1], x.shape[-2]), initial_state=vectors.mT.unsqueeze(1)
        )
        moved = idle.states(method=method)[:, :, 0].permute(0, 3, 1, 2)
        return torch.cat([vectors.unsqueeze(2), moved], dim=2)

    def _by_token(self, method: Method) -> bool:
        """Whether the reference does the work: where it is asked for, and where chunks have no advantage."""
        return choice(method, {"chunked": not chunked.is_faster(self), "reference": True}, "method")

    def _full_precision(self) -> AbstractContextManager[object]:
        """Autocast off, where the device has it ("meta" has none): it would lower the products to half precision."""
        kind = self.device.type
        return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


def pattern_of(reads: Tensor, r: CanonicalForm) -> Tensor:
    """Reads [B,T,H,S R] of `r.by_source()` with TransformerLens' axes: [B,H,T,S], or [B,H,T,S,R] where R > 1."""
    pattern = reads.transpose(1, 2)
    if r.k.ndim == 4:
        return pattern
    return pattern.unflatten(-1, (-1, r.R))


def _handed_back(x: Tensor) -> Tensor:
    """[B,T,...] backwards in time, each one step late, after zeros: what a token hands to the one before it."""
    return torch.cat([torch.zeros_like(x[:, :1]), x[:, 1:].flip(1)], dim=1)
