"""Training on states as a recurrence makes them, without rows [N,K*V]: a few tokens of each of some chunks.

Within a chunk of W writes that begins with the state S_0, decay alone links the states once erases are solved for
(`hookpoints.recurrence.chunked`), so that

    S_t = D(0->t) S_0 + sum_i D(i->t) k_i u_i^T,      <S_t, v w^T> = (D(0->t) v).(S_0 w) + sum_i (v.D(i->t) k_i)(u_i.w).

Scores of all F atoms need one probe S_0 w for all P rows of a chunk, and one product with F for each write: they cost
F K V / P + F W (K + V) / P multiply-adds a row (F W K more where each key channel has its own decay), and F K V on
matrices. All that follows is of the selected atoms alone, k K V a row, and is computed on the states of a few rows at a
time.

Example: K = V = 128, F 2048, W 64, P 4: 16 million multiply-adds a row for scores instead of 34, and none of the four
further products of that size in which SAELens decodes and goes backwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, Self, cast

import torch
from torch import Tensor

from sae_lens_writesae.atom.low_rank import LowRank
from sae_lens_writesae.sae.architectures import WriteBatchTopKTrainingSAE
from sae_lens_writesae.sae.architectures import WriteTopKTrainingSAEConfig as Config
from sae_lens_writesae.sae.factors import Collection
from sae_lens_writesae.sae.fast import Stack
from sae_lens_writesae.sae.fused import FACTORS, Dead, Step, with_aux
from sae_lens_writesae.sae.target import HeadHook, RunnerConfig

SPAN = 64
"""Tokens of a chunk at most."""
APART = 16
"""Tokens between two rows of a chunk in one batch, about. Nearer rows are faster and resemble each other more, which
costs explained variance."""
BLOCK = 2**18
"""Numbers of one block: of states, or of probes."""


class States(NamedTuple):
    """N = G P states: P of each of G chunks. They are indexed and sliced by chunk."""

    start: Tensor
    """[G,K,V] before the chunk."""
    since: Tensor
    """[G,P,1 or K], what that has met."""
    keys: Tensor
    """[G,W,K] of the chunk's writes."""
    values: Tensor
    """[G,W,V], corrected for what is erased."""
    between: Tensor
    """[G,P,W,1 or K], what each write has met; 0 for those that come later."""

    def blocks(self, width: int) -> Iterator[Self]:
        """The same in order, so many chunks at a time that `width` numbers a chunk are about `BLOCK`."""
        yield from (type(self)(*part) for part in zip(*(x.split(max(1, BLOCK // width)) for x in self)))

    def dense(self) -> Tensor:
        """[N,K,V]. Costs W K V a row."""
        keys = (self.keys[:, None] * self.between).flatten(0, 1)
        values = self.values.repeat_interleave(self.since.shape[1], dim=0)
        return torch.baddbmm((self.start[:, None] * self.since[..., None]).flatten(0, 1), keys.mT, values)

    def inners(self, v: Tensor, w: Tensor) -> Tensor:
        """<S_n, sum_r v_fr w_fr^T> [N,F] of [F,R,K] and [F,R,V], differentiable in both."""
        total: Tensor | float = 0.0
        for left, right in zip(v.mT.unbind(2), w.mT.unbind(2)):  # [F,K] and [F,V]
            probe, seen = (self.start @ right.T) * left.T, self.values @ right.T  # [G,K,F], [G,W,F]
            if self.between.shape[3] == 1:
                of_writes = self.between.squeeze(3) @ ((self.keys @ left.T) * seen)
            else:
                of_writes = (((self.keys[:, None] * self.between) @ left.T) * seen[:, None]).sum(2)
            total = total + self.since.expand(-1, -1, len(left.T)) @ probe + of_writes
        return cast(Tensor, total).flatten(0, 1)


class StateStack(Stack):
    """One dictionary in training on the states of a head of a collection, of a config with a `fast.shape_of`.

    A row's number is that of a unit: P tokens of one chunk of one sequence, an even distance apart. P divides the rows
    of a batch. Every token is in one unit; where P does not divide those of a chunk, its last one is taken more than
    once. A batch costs a walk over the sequences of its units, 3 K V multiply-adds a token.
    """

    def __init__(self, cfg: RunnerConfig, collection: Collection):
        hook, T = HeadHook.parse(cfg.hook_name), collection.context_size
        self.read = partial(collection.recurrence, hook.layer, hook.head)
        self.span = next(self.read(torch.zeros(1, dtype=torch.long)).chunks(SPAN, torch.zeros(()))).size
        at = torch.arange(T)[slice(*cfg.seqpos_slice)]
        chunks = [at[at // self.span == n] for n in (at // self.span).unique()]
        most = max(1, max(map(len, chunks)) // APART)
        self.together = P = max(p for p in range(1, most + 1) if cfg.train_batch_size_tokens % p == 0)
        self.units = torch.cat(
            [each[torch.arange(-(-len(each) // P) * P).clamp_max(len(each) - 1)].view(P, -1).T for each in chunks]
        )
        """[U,P] tokens of the units of a sequence."""
        self.inputs = collection.sha256
        super().__init__([(cfg, cast(Any, range(collection.n_sequences * len(self.units))), None)])

    def place(self, writes: Any) -> torch.device:
        """Collections are on the host."""
        return torch.device("cpu")

    @torch.no_grad()
    def rows(self, m: int, index: Tensor) -> Any:
        """`States` of some units, in the order of their chunks."""
        like, at = self.p["b_dec"], self.units[index % len(self.units)].to(self.p["b_dec"].device)
        parts, r, steps = list[States](), self.read(index // len(self.units)), torch.arange(self.span).to(at)
        for chunk in r.chunks(SPAN, like):
            here = (at[:, 0] // self.span == chunk.first // self.span).nonzero().flatten()
            own, edges = at[here] - chunk.first, chunk.span.decay.edges[here, chunk.place]
            met, later = edges[torch.arange(len(here))[:, None], own + 1], own[..., None] < steps
            between = (met[:, :, None] - edges[:, None, 1:]).masked_fill(later[..., None], -torch.inf).exp()
            keys, values = (torch.cat([x[here] for x in side], dim=1) for side in (chunk.keys, chunk.values))
            start, values = (x * self.scales[m] for x in (chunk.state[here], values))
            parts.append(States(start, met.exp(), keys, values, between.repeat(1, 1, len(chunk.values), 1)))
        return States(*(torch.cat(side).to(like) for side in zip(*parts)))

    def losses(self, p: dict[str, Tensor], batch: Sequence[Any], ks: Sequence[int], dead: Dead | None = None) -> Step:
        self.optimizer.zero_grad()
        done, sae = step_on_states(p, batch[0], self.cfg, dead), self.saes[0]
        if p is self.p and isinstance(sae, WriteBatchTopKTrainingSAE):
            sae.update_topk_threshold(
                done.code * (sae.get_W_dec_norm()[done.atoms] if self.cfg.rescale_acts_by_decoder_norm else 1)
            )
        return done

    def matrices(self, rows: Any) -> Tensor:
        return rows.dense().flatten(1)


def step_on_states(p: dict[str, Tensor], rows: States, cfg: Config, dead: Dead | None = None) -> Step:
    """One step of one dictionary (M = 1), as `fused.step_on_writes`: scores of all atoms in chunks, and the loss of
    those that SAELens' TopK or BatchTopK selects on the states of some rows at a time. Adds to the gradients of `p`."""
    (_, F, R, K), V, (P, done) = p["v"].shape, p["w"].shape[3], (rows.since.shape[1], list[tuple[Tensor, Tensor]]())
    (v, w, v_enc, w_enc), bias = (p[name].flatten(0, 1) for name in FACTORS), p["b_dec"].view(K, V)
    with torch.no_grad():
        shift = p["b_enc"][0] - cfg.apply_b_dec_to_input * (v_enc * (w_enc @ bias.T)).sum((1, 2))
        gain = LowRank(v, w).norm() if cfg.rescale_acts_by_decoder_norm else torch.ones_like(shift)
        scores = torch.cat([(part.inners(v_enc, w_enc) + shift) * gain for part in rows.blocks(K * F)])
        most = cfg.k
        if cfg.architecture() == "writesae_batchtopk":  # as SAELens: so many of the whole batch, also where some tie
            top = scores.flatten().topk(int(cfg.k * len(scores)), sorted=False).indices
            chosen = torch.zeros_like(scores, dtype=torch.bool).view(-1).index_fill(0, top, True).view_as(scores)
            scores, most = scores.masked_fill(~chosen, -torch.inf), max(1, int(chosen.sum(1).max()))
        best, atoms = scores.topk(most, sorted=False)
    split = partial(torch.split, split_size_or_sections=P * max(1, BLOCK // (P * K * V)))
    for part, at, score in zip(rows.blocks(P * K * V), split(atoms), split(best)):
        x, chosen = part.dense(), (side.index_select(0, at.flatten()) for side in (v, w, v_enc, w_enc))
        vd, wd, ve, we = (side.view(len(at), -1, side.shape[2]) for side in chosen)  # [n,k R,K or V]
        pre = ve * (we @ (x - bias if cfg.apply_b_dec_to_input else x).mT)
        code = (pre.sum(2).view(*at.shape, R).sum(2) + p["b_enc"][0, at]).relu() * (score > 0)
        error = torch.baddbmm(x - bias, (code.repeat_interleave(R, dim=1)[..., None] * vd).mT, wd, alpha=-1)
        done.append((error.square().sum((1, 2)), code.detach()))
        if torch.is_grad_enabled():
            (done[-1][0].sum() / len(scores)).backward()
    errors, codes = (torch.cat(each).detach()[None] for each in zip(*done))
    step = Step(errors, atoms[None], codes)
    return with_aux(p, lambda v, w: rows.inners(v[0], w[0])[None], lambda: rows.dense()[None], step, cfg, dead)
