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
from typing import TYPE_CHECKING, Any, NamedTuple, Self, cast

import torch
from torch import Tensor

from sae_lens_writesae.atom.low_rank import LowRank
from sae_lens_writesae.sae.factors import Collection
from sae_lens_writesae.sae.fast import Stack
from sae_lens_writesae.sae.fused import FACTORS, Dead, Step, top_of_batch, top_of_rows, with_aux
from sae_lens_writesae.sae.target import HeadHook, RunnerConfig

if TYPE_CHECKING:
    from hookpoints.recurrence.chunked import Chunk
    from sae_lens_writesae.sae.architectures import WriteTopKTrainingSAEConfig as Config

SPAN = 64
"""Tokens of a chunk at most."""
TOKENS_APART = 16
"""Tokens between two rows of a chunk in one batch, about. Nearer rows are faster and resemble each other more, which
costs explained variance."""
STATE_BLOCK = 2**18
"""Numbers of one block: of states, or of probes. On a CPU a block stays in the cache."""
STATE_BLOCK_ON_DEVICE = 2**26
"""The same on a device, where each block costs its launches, and memory bounds it (256 MB)."""


def chunks_in_block(numbers: int, device: torch.device) -> int:
    """How many chunks of so many ``numbers`` are one block."""
    return max(1, (STATE_BLOCK if device.type == "cpu" else STATE_BLOCK_ON_DEVICE) // numbers)


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
        """The same in order, so many chunks at a time as make a block with `width` numbers a chunk."""
        count = chunks_in_block(width, self.start.device)
        yield from (type(self)(*part) for part in zip(*(x.split(count) for x in self)))

    def dense(self) -> Tensor:
        """[N,K,V]. Costs W K V a row."""
        keys = (self.keys[:, None] * self.between).flatten(0, 1)
        values = self.values.repeat_interleave(self.since.shape[1], dim=0)
        return torch.baddbmm((self.start[:, None] * self.since[..., None]).flatten(0, 1), keys.mT, values)

    def inners(self, v: Tensor, w: Tensor) -> Tensor:
        """<S_n, sum_r v_fr w_fr^T> [N,F] of [F,R,K] and [F,R,V], differentiable in both."""
        total: Tensor | float = 0.0
        for left, right in zip(v.mT.unbind(2), w.mT.unbind(2)):  # [F,K] and [F,V]
            probe = (self.start @ right.T) * left.T  # [G,K,F]
            seen = self.values @ right.T  # [G,W,F]
            if self.between.shape[3] == 1:  # a decay of the head comes out of the sum over channels
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
        hook = HeadHook.parse(cfg.hook_name)
        self.read = partial(collection.recurrence, hook.layer, hook.head)
        first_sequence = self.read(torch.zeros(1, dtype=torch.long))
        self.span = next(first_sequence.chunks(SPAN, torch.zeros(()))).size
        tokens = torch.arange(collection.context_size)[slice(*cfg.seqpos_slice)]
        chunk_numbers = tokens // self.span
        chunks = [tokens[chunk_numbers == number] for number in chunk_numbers.unique()]
        most = max(1, max(map(len, chunks)) // TOKENS_APART)
        self.together = max(n for n in range(1, most + 1) if cfg.train_batch_size_tokens % n == 0)
        self.units = torch.cat([_unit_tokens(chunk, self.together) for chunk in chunks])
        """[U,P] tokens of the units of a sequence."""
        self.inputs = collection.sha256
        super().__init__([cfg], [cast(Any, range(collection.n_sequences * len(self.units)))], [None])

    def place(self, writes: Any) -> torch.device:
        """Collections are on the host."""
        return torch.device("cpu")

    @torch.no_grad()
    def rows(self, m: int, index: Tensor) -> Any:
        """`States` of some units, in the order of their chunks."""
        like = self.p["b_dec"]
        units = self.units[index % len(self.units)]
        parts = list[States]()
        for chunk in self.read(index // len(self.units)).chunks(SPAN, like):
            # On the host, so that no device is waited for to say how many there are.
            in_chunk = (units[:, 0] // self.span == chunk.first // self.span).nonzero().flatten()
            tokens = units[in_chunk] - chunk.first
            parts.append(_chunk_states(chunk, in_chunk.to(like.device), tokens.to(like.device), self.scales[m]))
        return States(*(torch.cat(side).to(like) for side in zip(*parts)))

    def losses(self, p: dict[str, Tensor], batch: Sequence[Any], ks: Sequence[float], dead: Dead | None = None) -> Step:
        self.optimizer.zero_grad()  # gradients of blocks add up
        return step_on_states(p, batch[0], self.cfg, dead)

    def matrices(self, rows: Any) -> Tensor:
        return rows.dense().flatten(1)


def _unit_tokens(tokens: Tensor, P: int) -> Tensor:
    """[n,P] the tokens of a chunk; those of a unit are n apart."""
    n = -(-len(tokens) // P)
    index = torch.arange(n * P).clamp_max(len(tokens) - 1)
    return tokens[index].view(P, n).T


def _chunk_states(chunk: Chunk, sequences: Tensor, tokens: Tensor, scale: float) -> States:
    """`scale` times the states of G `sequences` of a chunk after some of its tokens [G,P]."""
    edges = chunk.span.decay.edges[sequences, chunk.place]  # [G,W+1,1 or K], logs of D(0->t)
    since = edges[torch.arange(len(sequences), device=tokens.device)[:, None], tokens + 1]
    between = since[:, :, None] - edges[:, None, 1:]
    is_later = tokens[..., None] < torch.arange(between.shape[2], device=tokens.device)
    between = between.masked_fill(is_later[..., None], -torch.inf).exp()
    keys = torch.cat([side[sequences] for side in chunk.keys], dim=1)
    values = torch.cat([side[sequences] for side in chunk.values], dim=1)
    # Writes and erases of a token have met the same decay.
    between = between.repeat(1, 1, len(chunk.values), 1)
    return States(chunk.state[sequences] * scale, since.exp(), keys, values * scale, between)


def step_on_states(p: dict[str, Tensor], rows: States, cfg: Config, dead: Dead | None = None) -> Step:
    """One step of one dictionary (M = 1), as `fused.step_on_writes`: scores of all atoms in chunks, and the loss of
    those that SAELens' TopK or BatchTopK selects on the states of some rows at a time. Adds to the gradients of `p`."""
    with torch.no_grad():
        scores, atoms = _selected_atoms(p, rows, cfg)
    P = rows.since.shape[1]
    split = partial(torch.split, split_size_or_sections=P * chunks_in_block(P * cfg.d_in, scores.device))
    errors = list[Tensor]()
    codes = list[Tensor]()
    for part, part_atoms, part_scores in zip(rows.blocks(P * cfg.d_in), split(atoms), split(scores)):
        error, code = _decoded_states(p, part.dense(), part_atoms, part_scores > 0, cfg)
        if torch.is_grad_enabled():
            (error.sum() / len(scores)).backward()  # now, so that no graph outlives its block
        errors.append(error.detach())
        codes.append(code.detach())
    step = Step(torch.cat(errors)[None], atoms[None], torch.cat(codes)[None])
    return with_aux(p, lambda v, w: rows.inners(v[0], w[0])[None], lambda: rows.dense()[None], step, cfg, dead)


def _selected_atoms(p: dict[str, Tensor], rows: States, cfg: Config) -> tuple[Tensor, Tensor]:
    """[N,k] scores and numbers of the selected atoms. A row of BatchTopK may have fewer: the rest has no score."""
    v, w, v_enc, w_enc = (p[name].flatten(0, 1) for name in FACTORS)
    shift = p["b_enc"][0]
    if cfg.apply_b_dec_to_input:
        shift = shift - (v_enc * (w_enc @ p["b_dec"].view(cfg.d_k, cfg.d_v).T)).sum((1, 2))
    gain = LowRank(v, w).norm() if cfg.rescale_acts_by_decoder_norm else torch.ones_like(shift)
    blocks = rows.blocks(cfg.d_k * cfg.d_sae)
    scores = torch.cat([(part.inners(v_enc, w_enc) + shift) * gain for part in blocks])  # [N,F]
    if cfg.architecture() != "writesae_batchtopk":
        return scores.topk(cfg.k, sorted=False)
    # As SAELens: so many of the whole batch, also where some tie.
    return top_of_rows(top_of_batch(scores, int(cfg.k * len(scores))))


def _decoded_states(
    p: dict[str, Tensor], x: Tensor, atoms: Tensor, selected: Tensor, cfg: Config
) -> tuple[Tensor, Tensor]:
    """Squared errors [n] of states [n,K,V], and the code [n,k] of their `atoms`, 0 where one is not `selected`."""
    n, k = atoms.shape
    v, w, v_enc, w_enc = (
        p[name].flatten(0, 1).index_select(0, atoms.flatten()).view(n, k * cfg.rank, -1) for name in FACTORS
    )
    bias = p["b_dec"].view(cfg.d_k, cfg.d_v)
    # Again, of the selected atoms alone and on the states themselves: these have gradients.
    inner = v_enc * (w_enc @ (x - bias if cfg.apply_b_dec_to_input else x).mT)  # [n,k R,K]
    code = (inner.sum(2).view(n, k, cfg.rank).sum(2) + p["b_enc"][0, atoms]).relu() * selected
    sizes = code.repeat_interleave(cfg.rank, dim=1)[..., None]  # of terms
    error = torch.baddbmm(x - bias, (sizes * v).mT, w, alpha=-1)
    return error.square().sum((1, 2)), code
