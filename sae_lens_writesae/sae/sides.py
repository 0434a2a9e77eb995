"""`writesae_product` with the encoder `topk`: codes of both sides of a write.

Atom (i, j) has the encoder atom p_i q_j^T. The activation of a pair
is <X, p_i q_j^T>, which for a write X = k u^T is (p_i.k)(q_j.u); active are the pairs of `k_key` key atoms with
`k_value` value atoms. Which ones follows from the strongest pair (i*, j*): the k_key strongest of its column j* and the
k_value strongest of its row i*, as far as they are positive. For a write these are the TopK of both sides, after
that of (k, u) and (-k, -u) was taken whose strongest pair is the stronger one; a matrix of a higher rank needs no
factors for it.

Training needs writes of rank one, and has a squared error for each side, in units of the write:

    |u|^2 |k - k^|^2 + |k|^2 |u - u^|^2,      k^ = sum_i (p_i.k)_+ a_i,   u^ = sum_j (q_j.u)_+ c_j

To first order this is |k u^T - k^ u^^T|^2, and it is the same for every factorization of a write. (The joint error
diverged in training with several active atoms a side.) b_dec has no part in it: running means set it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from sae_lens.saes.sae import TrainingSAE, TrainStepInput, TrainStepOutput
from torch import Tensor, nn
from torch.nn.functional import normalize

from sae_lens_writesae.atom.low_rank import LowRank
from sae_lens_writesae.sae.product import (
    Product,
    WriteProductSAE,
    WriteProductSAEConfig,
    WriteProductTrainingSAE,
    distinct_rows,
)
from sae_lens_writesae.sae.training import START_STEPS, dense_rows, draw_rows

_RANK_ONE = 1e-2
"""Norm of what a rank-one matrix leaves of a row, as a share of the row's, up to which it counts as a write. It is
above the rounding of half precision."""

START_ROWS = 1024
"""Rows on which atoms are put. With 48 planted keys and values and as many atoms, 1024 rows find all of them; 128
rows find 40 to 45."""


class SideCode(NamedTuple):
    """One side of a batch of writes."""

    rows: Tensor
    """[N,D] keys or values, in the orientation in which they are coded."""
    acts: Tensor
    """[N,F_side], the strongest inner products with encoder atoms, as far as they are positive."""
    reconstruction: Tensor
    """[N,D]"""

    def size(self) -> Tensor:
        """[N] squared norms of the rows."""
        return self.rows.square().sum(1)

    def error(self) -> Tensor:
        """[N] squared errors."""
        return (self.rows - self.reconstruction).square().sum(1)


class Sides(Product):
    """Codes of both sides. Further parameters: `key_encoder` [F_key,K] and `value_encoder` [F_value,V]."""

    coder = "topk"
    kinds = ("atoms", "encoder")
    key_encoder: nn.Parameter
    value_encoder: nn.Parameter
    directions = cast(Any, property(lambda self: (self.key_atoms, self.value_atoms)))
    readers = cast(Any, property(lambda self: (self.key_encoder, self.value_encoder)))

    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Activations and pre-activations [...,d_sae] of [...,K*V]."""
        cfg = self.cfg
        matrices = self.process_sae_in(x).unflatten(-1, (cfg.d_k, cfg.d_v))
        grid = self.key_encoder @ matrices @ self.value_encoder.T
        pre = self.hook_sae_acts_pre(grid.flatten(-2))
        grid = pre.unflatten(-1, (cfg.f_key, cfg.f_value))
        # Without factors of x at hand, scores of its two sides are read off the grid: the column and the row of the
        # strongest pair are both, each times a positive number.
        strongest_pair = pre.argmax(-1, keepdim=True)[..., None]
        column = grid.take_along_dim(strongest_pair % cfg.f_value, -1).squeeze(-1)
        row = grid.take_along_dim(strongest_pair // cfg.f_value, -2).squeeze(-2)
        key_is_active = _strongest_acts(column, cfg.k_key)
        value_is_active = _strongest_acts(row, cfg.k_value)
        active = key_is_active[..., None] & value_is_active[..., None, :]
        acts = torch.where(active, grid, 0).clamp_min(0).flatten(-2)
        return self.hook_sae_acts_post(acts), pre


class SidesSAE(Sides, WriteProductSAE):
    """For inference."""


class _SideStep(TrainingSAE[Any]):
    """The training step, with the errors of both sides, on rows [N,K*V] of rank one."""

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        x = step_input.sae_in
        key, value = cast(SidesTrainingSAE, self).code(rank_one_rows(self.cfg, x))
        key_loss = (value.size() * key.error()).mean()
        value_loss = (key.size() * value.error()).mean()
        # Of pairs, for counts of dead atoms and running means; gradients go through the sides alone.
        acts = (key.acts.detach()[:, :, None] * value.acts.detach()[:, None]).flatten(1)
        write = LowRank.rank_one(key.reconstruction, value.reconstruction).dense().flatten(1)
        return TrainStepOutput(
            sae_in=x,
            sae_out=write + self.b_dec.detach(),
            feature_acts=acts,
            hidden_pre=acts,
            loss=key_loss + value_loss,
            losses={"key_loss": key_loss, "value_loss": value_loss},
        )


class SidesTrainingSAE(Sides, WriteProductTrainingSAE, _SideStep):  # pyright: ignore  (cfg)
    """In training."""

    _first_rows: Sequence[LowRank] = ()
    """Of the batches so far, until atoms have been put on them."""

    def code(self, writes: LowRank) -> tuple[SideCode, SideCode]:
        """Both sides of writes of rank one. Their outer product is what `encode` gives."""
        keys = writes.keys[:, 0].to(self.dtype)
        values = writes.values[:, 0].to(self.dtype)
        key_scores = keys @ self.key_encoder.T
        value_scores = values @ self.value_encoder.T

        def strongest_pair(sign: int) -> Tensor:
            """[N] activation of the strongest pair, in one orientation."""
            return (sign * key_scores).amax(1).clamp_min(0) * (sign * value_scores).amax(1).clamp_min(0)

        # k u^T = (-k)(-u)^T: a write has no sign of its sides. Coded is the orientation with the stronger pair.
        ahead = strongest_pair(1)
        turned = strongest_pair(-1)
        sign = torch.where(turned > ahead, -1.0, 1.0).to(self.dtype)[:, None]
        some = torch.maximum(ahead, turned)[:, None] > 0  # else no pair is active, and so no atom of either side

        def side_code(rows: Tensor, scores: Tensor, k: int, atoms: Tensor) -> SideCode:
            oriented = sign * scores
            acts = torch.where(some & _strongest_acts(oriented, k), oriented, 0)
            return SideCode(sign * rows, acts, acts @ atoms)

        return (
            side_code(keys, key_scores, self.cfg.k_key, self.key_atoms),
            side_code(values, value_scores, self.cfg.k_value, self.value_atoms),
        )

    @torch.no_grad()
    def start_from_rows(self, x: Tensor | LowRank, *, first: bool = True) -> int:
        """Put atoms of both sides on sides of rows [N,K*V], in decoder and encoder, as far as these have distinct ones;
        returns how many of the side with fewer.

        This is done with the first batch, and once more with all rows of the first batches, as soon as they are
        `START_ROWS`. One batch may lack a key or a value, and in few rows some keep the wrong orientation; two then
        share an atom for the whole run, and no atom is dead. Rows are drawn in proportion to their squared norm, and
        all are brought into one orientation (`_oriented`); a direction near to an earlier one is left out.

        The rows that wait are in no checkpoint. A run that resumes before they are enough keeps its first start.
        """
        writes = rank_one_rows(self.cfg, x)
        if first:
            self._first_rows = [writes]
        elif self._first_rows:
            self._first_rows = [*self._first_rows, writes]
        enough = sum(map(len, self._first_rows)) >= START_ROWS or len(self._first_rows) == START_STEPS
        if first or enough:
            self._start_sides(self._first_rows)
        if enough:
            self._first_rows = []
        return int(self.n_started)

    def _start_sides(self, batches: Sequence[LowRank]) -> None:
        """Put the atoms of both sides on sides of these writes, and begin the running means anew."""
        keys = torch.cat([batch.keys for batch in batches])
        values = torch.cat([batch.values for batch in batches])
        writes = LowRank(keys, values)
        drawn = _oriented_writes(writes.rows(draw_rows(writes.inner(writes), len(writes))))
        self.mean_batches.zero_()
        self.n_started.fill_(self.cfg.d_sae)
        for side, rows in enumerate((drawn.keys[:, 0], drawn.values[:, 0])):
            alive = torch.ones(len(self.sides[side][0]), dtype=torch.bool, device=self.device)
            rows = distinct_rows(rows, either_sign=False, count=len(alive))
            self._put_directions(side, torch.arange(len(rows), device=self.device), rows, alive)
            # Counted are as many as both sides have; the rest of a side stays random.
            self.n_started.clamp_max_(len(rows))

    @torch.no_grad()
    def resample(self, x: Tensor | LowRank, dead: Tensor) -> int:
        """Put dead atoms of a side on that side of rows of a batch [N,K*V], drawn in proportion to its squared error;
        returns how many. A key atom or a value atom is dead where all its pairs are (`dead` [d_sae])."""
        grid = dead.view(self.cfg.f_key, self.cfg.f_value)
        codes = self.code(rank_one_rows(self.cfg, x))
        dead_sides = grid.all(1), grid.all(0)
        candidates = list[Tensor]()
        for side, dead_side in enumerate(dead_sides):
            code = codes[side]
            errors = codes[1 - side].size() * code.error()  # in units of the write, as the loss is
            candidates.append(code.rows[draw_rows(errors, int(dead_side.sum()))])
        return self._put_distinct(dead_sides, candidates, either_sign=False)


def rank_one_rows(cfg: WriteProductSAEConfig, rows: Tensor | LowRank) -> LowRank:
    """Rows [N,K*V] of rank one as k u^T: u is the row of the matrix with the largest entry, k the projections on it.

    Raises:
        ValueError: a matrix of a higher rank; names the first one.
    """
    rows = dense_rows(rows)
    matrices = rows.unflatten(1, (cfg.d_k, cfg.d_v))
    # Every row of k u^T is a multiple of u; that with the largest entry is the least rounded.
    largest_row = matrices.abs().amax(2).argmax(1)
    numbers = torch.arange(len(matrices), device=matrices.device)
    values = normalize(matrices[numbers, largest_row], dim=1)
    keys = (matrices @ values[..., None]).squeeze(-1)
    writes = LowRank.rank_one(keys, values)
    rest = (rows - writes.dense().flatten(1)).norm(dim=1)
    of_higher_rank = rest > _RANK_ONE * rows.norm(dim=1)
    if of_higher_rank.any():
        first = int(of_higher_rank.nonzero()[0])
        raise ValueError(
            f"row {first}: expected a write of rank one, which encoder='topk' is trained on, got a higher rank; train "
            "it on the writes of a head, and on states with encoder='pursuit'"
        )
    return writes


def _oriented_writes(writes: LowRank) -> LowRank:
    """The same writes of rank one [N], each as (k, u) or as (-k, -u), so that equal keys and equal values agree in sign
    as far as they can: signs of the first eigenvector of cos(k_n, k_m)^5 + cos(u_n, u_m)^5, in which likeness outweighs
    chance (synchronization of signs, Singer 2011, arXiv 0905.3174). Costs N^3.

    Values that are sums (of attributes, say) have sparse non-negative codes in one orientation only.
    """
    keys = normalize(writes.keys[:, 0].float(), dim=1)
    values = normalize(writes.values[:, 0].float(), dim=1)
    likeness = (keys @ keys.T) ** 5 + (values @ values.T) ** 5
    first_eigenvector = torch.linalg.eigh(likeness).eigenvectors[:, -1, None, None]
    turned = first_eigenvector < 0
    return LowRank(
        torch.where(turned, -writes.keys, writes.keys),
        torch.where(turned, -writes.values, writes.values),
    )


def _strongest_acts(acts: Tensor, k: int) -> Tensor:
    """Where the k largest of the last axis are, as far as they are positive."""
    indices = acts.topk(k, dim=-1, sorted=False).indices
    top = torch.zeros_like(acts, dtype=torch.bool).scatter(-1, indices, True)
    return top & (acts > 0)
