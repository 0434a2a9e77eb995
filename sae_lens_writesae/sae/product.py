"""`writesae_product`: atoms that are pairs of a key atom and a value atom: a write's address is coded apart from its
content.

Atom (i, j) is A_ij = a_i c_j^T, number i * F_value + j of d_sae = F_key F_value atoms, and has the encoder atom
p_i q_j^T. The parameters are the sides alone: F_key (K + V) numbers, say, give F_key^2 atoms. The activation of a pair
is <X, p_i q_j^T>, which for a write X = k u^T is (p_i.k)(q_j.u); active are the pairs of `k_key` key atoms with
`k_value` value atoms. Which ones follows from the strongest pair (i*, j*): the k_key strongest of its column j* and the
k_value strongest of its row i*, as far as they are positive. For a write these are the TopK of both sides, after
that of (k, u) and (-k, -u) was taken whose strongest pair is the stronger one; a matrix of a higher rank needs no
factors for it. There are no biases in the encoder: the code of s X is s times that of X, for s > 0.

Training needs writes of rank one, and has a squared error for each side, in units of the write:

    |u|^2 |k - k^|^2 + |k|^2 |u - u^|^2,      k^ = sum_i (p_i.k)_+ a_i,   u^ = sum_j (q_j.u)_+ c_j

To first order this is |k u^T - k^ u^^T|^2, and it is the same for every factorization of a write. (The joint error
diverged in training with several active atoms a side.) b_dec has no part in it: running means set it.
"""

# No postponed annotations here: SAELens' command line evaluates those of config fields in another module.
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from sae_lens.saes.sae import TrainingSAE, TrainStepInput, TrainStepOutput
from torch import Tensor, nn
from torch.nn.functional import normalize

from sae_lens_writesae.atom.low_rank import LowRank
from sae_lens_writesae.sae.matrix import MatrixSAE, MatrixSAEConfig
from sae_lens_writesae.sae.training import (
    MAX_COSINE,
    START_STEPS,
    MatrixTrainingSAE,
    MatrixTrainingSAEConfig,
    StartBias,
    draw_rows,
)

_RANK_ONE = 1e-2
"""Norm of what a rank-one matrix leaves of a row, as a share of the row's, up to which it counts as a write. It is
above the rounding of half precision."""

START_ROWS = 1024
"""Rows on which atoms are put. With 48 planted keys and values and as many atoms, 1024 rows find all of them; 128
rows find 40 to 45."""


@dataclass(kw_only=True)
class WriteProductSAEConfig(MatrixSAEConfig):
    """Inference config of `writesae_product`, whose fields that of training has too.

    Raises:
        ValueError: d_sae is not f_key * f_value, more atoms are to be active than there are, or an option that
            products of sides cannot have.
    """

    f_key: int = 0
    """F_key, the number of key atoms. 0: `d_sae // f_value`, and if that is 0 too the root of d_sae, rounded down."""
    f_value: int = 0
    """F_value, the number of value atoms. 0: `d_sae // f_key`."""
    k_key: int = 1
    """Active key atoms per matrix."""
    k_value: int = 1
    """Active value atoms per matrix; L0 is k_key * k_value."""
    apply_b_dec_to_input: bool = False
    """Must be False: a write less b_dec has no sides."""

    def __post_init__(self) -> None:
        root = math.isqrt(max(self.d_sae, 0))
        self.f_key = self.f_key or (self.d_sae // self.f_value if self.f_value else root)
        self.f_value = self.f_value or self.d_sae // max(self.f_key, 1)
        if self.f_key * self.f_value != self.d_sae:
            raise ValueError(f"d_sae={self.d_sae!r}: must be f_key * f_value.")
        for name, most in (("k_key", self.f_key), ("k_value", self.f_value)):
            k = getattr(self, name)
            if not 1 <= k <= most:
                raise ValueError(f"{name}={k!r}: must be between 1 and {most}.")
        fixed = {"encoder": "bilinear", "decoder": "rank", "rank": 1, "apply_b_dec_to_input": False, "loss": "mse"}
        # b_dec is set by the means of training, and norms in the encoder would change which atoms are on top.
        fixed |= {"b_dec_init": "zeros", "unit_norm_every": 0}
        for name, only in fixed.items():
            value = getattr(self, name, only)
            if value != only:
                raise ValueError(f"{name}={value!r}: must be {only!r} for two sides.")
        super().__post_init__()

    @property
    def k(self) -> int:
        """Active atoms per matrix."""
        return self.k_key * self.k_value


@dataclass
class WriteProductTrainingSAEConfig(WriteProductSAEConfig, MatrixTrainingSAEConfig):
    """Training config of `writesae_product`."""

    unit_norm_every: int = 0
    """Must be 0."""
    b_dec_init: StartBias = "zeros"
    """Must be `zeros`: sides are coded without b_dec."""


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


class _Product(MatrixSAE):
    """The parameters `key_atoms` [F_key,K], `value_atoms` [F_value,V], `key_encoder`, `value_encoder` and `b_dec`
    [K*V], and what differs for products of sides. `v`, `w`, `v_enc`, `w_enc` are computed for each pair, [d_sae,1,K]
    and [d_sae,1,V]."""

    cfg: WriteProductSAEConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    v: Any = property(lambda self: self._pairs(self.key_atoms[:, None]))
    w: Any = property(lambda self: self._pairs(self.value_atoms))
    v_enc: Any = property(lambda self: self._pairs(self.key_encoder[:, None]))
    w_enc: Any = property(lambda self: self._pairs(self.value_encoder))

    def _pairs(self, side: Tensor) -> Tensor:
        """A side [F_key,1,K] or [F_value,V], repeated for every pair: [d_sae,1,D]."""
        return side.expand(self.cfg.f_key, self.cfg.f_value, -1).reshape(self.cfg.d_sae, 1, -1)

    @property
    def sides(self) -> tuple[tuple[nn.Parameter, nn.Parameter], tuple[nn.Parameter, nn.Parameter]]:
        """Atoms and encoder of the keys, and of the values."""
        return (self.key_atoms, self.key_encoder), (self.value_atoms, self.value_encoder)

    @property
    def n_factors(self) -> int:
        return max(self.cfg.f_key, self.cfg.f_value)

    def _start(self, norm: float, **like: Any) -> None:
        """Random sides, the encoder equal to the decoder."""
        cfg = self.cfg
        keys = math.sqrt(norm) * normalize(torch.randn(cfg.f_key, cfg.d_k, **like), dim=1)
        values = math.sqrt(norm) * normalize(torch.randn(cfg.f_value, cfg.d_v, **like), dim=1)
        self.key_atoms = nn.Parameter(keys)
        self.key_encoder = nn.Parameter(keys.clone())
        self.value_atoms = nn.Parameter(values)
        self.value_encoder = nn.Parameter(values.clone())

    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Activations and pre-activations [...,d_sae] of [...,K*V]."""
        cfg = self.cfg
        pre = self.hook_sae_acts_pre(self.process_sae_in(x) @ self.W_enc)
        grid = pre.unflatten(-1, (cfg.f_key, cfg.f_value))
        # Without factors of x at hand, scores of its two sides are read off the grid: the column and the row of the
        # strongest pair are both, each times a positive number.
        strongest_pair = pre.argmax(-1, keepdim=True)[..., None]
        column = grid.take_along_dim(strongest_pair % cfg.f_value, -1).squeeze(-1)
        row = grid.take_along_dim(strongest_pair // cfg.f_value, -2).squeeze(-2)
        key_is_active = _strongest(column, cfg.k_key)
        value_is_active = _strongest(row, cfg.k_value)
        active = key_is_active[..., None] & value_is_active[..., None, :]
        acts = torch.where(active, grid, 0).clamp_min(0).flatten(-2)
        return self.hook_sae_acts_post(acts), pre

    @torch.no_grad()
    def replace_atoms(self, indices: Tensor, atoms: LowRank, alive: Tensor) -> None:
        """Put the sides of rank-one `atoms` at key atoms and value atoms `indices` [n], each below `n_factors`, as far
        as a side has so many. (No pair can be replaced alone.) Norms become the mean ones of the side where `alive`
        [n_factors]."""
        for side, rows in enumerate((atoms.keys[:, 0], atoms.values[:, 0])):
            n = len(self.sides[side][0])
            exists = indices < n
            self._put(side, indices[exists], rows[exists], alive[:n])

    def _put(self, side: int, indices: Tensor, rows: Tensor, alive: Tensor) -> None:
        """Put directions [n,D] into atoms and encoder of a side, with the mean norm of those where `alive`."""
        if not alive.any():
            alive = ~alive
        for parameter in self.sides[side]:
            size = parameter.norm(dim=1)[alive].mean()
            parameter.data[indices] = normalize(rows.to(parameter), dim=1) * size

    def _scaled(self, decoder: Tensor, encoder: Tensor) -> dict[str, Tensor]:
        """As in the base, for scales that are products of one for each side, which those of norms are."""
        scaled: dict[str, Tensor] = {}
        for kind, scales in (("atoms", decoder), ("encoder", encoder)):
            logs = scales.log().expand(self.cfg.d_sae)
            grid = logs.view(self.cfg.f_key, -1)
            half = logs.mean() / 2  # the mean log belongs to the pair; each side takes half of it
            scaled[f"key_{kind}"] = getattr(self, f"key_{kind}") * (grid.mean(1) - half).exp()[:, None]
            scaled[f"value_{kind}"] = getattr(self, f"value_{kind}") * (grid.mean(0) - half).exp()[:, None]
        return scaled

    def fold_and_get_W_dec_norm(self) -> Tensor:
        """Refused: norms in the encoder change which atoms are on top."""
        raise NotImplementedError(
            "Moving the norms of atoms into the encoder of writesae_product changes which atoms are on top. Multiply "
            "activations by decoder_norm() where contributions are wanted."
        )


class WriteProductSAE(_Product):
    """Products of key atoms and value atoms, for inference."""

    # SAELens has them in training alone.
    encode = cast(Any, TrainingSAE.encode)
    decode = cast(Any, TrainingSAE.decode)


class _SideStep(TrainingSAE[Any]):
    """The training step with the errors of both sides, on rows [N,K*V] of rank one."""

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        x = step_input.sae_in
        key, value = cast(WriteProductTrainingSAE, self).code(rank_one_rows(self, x))
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


class WriteProductTrainingSAE(_Product, MatrixTrainingSAE, _SideStep):  # pyright: ignore  (cfg)
    """Products of key atoms and value atoms, in training. Resampling and starts from rows go side by side."""

    _first_rows: Sequence[LowRank] = ()
    """Of the batches so far, until atoms have been put on them."""

    get_coefficients = calculate_aux_loss = cast(Any, lambda self, *args, **kwargs: {})  # the step has both losses

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
            acts = torch.where(some & _strongest(oriented, k), oriented, 0)
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
        writes = rank_one_rows(self, x)
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
        drawn = _oriented(writes.rows(draw_rows(writes.inner(writes), len(writes))))
        self.mean_batches.zero_()
        self.n_started.fill_(self.cfg.d_sae)
        for side, rows in enumerate((drawn.keys[:, 0], drawn.values[:, 0])):
            alive = torch.ones(len(self.sides[side][0]), dtype=torch.bool, device=self.device)
            rows = _distinct(rows, either_sign=False, count=len(alive))
            self._put(side, torch.arange(len(rows), device=self.device), rows, alive)
            # Counted are as many as both sides have; the rest of a side stays random.
            self.n_started.clamp_max_(len(rows))

    @torch.no_grad()
    def resample(self, x: Tensor | LowRank, dead: Tensor) -> int:
        """Put dead atoms of a side on that side of rows of a batch [N,K*V], drawn in proportion to its squared error;
        returns how many. A key atom or a value atom is dead where all its pairs are (`dead` [d_sae])."""
        grid = dead.view(self.cfg.f_key, self.cfg.f_value)
        codes = self.code(rank_one_rows(self, x))
        count = 0
        for side, dead_side in enumerate((grid.all(1), grid.all(0))):
            code = codes[side]
            errors = codes[1 - side].size() * code.error()  # in units of the write, as the loss is
            drawn = draw_rows(errors, int(dead_side.sum()))
            rows = _distinct(code.rows[drawn], either_sign=side == 0)
            replaced = torch.nonzero(dead_side).flatten()[: len(rows)]
            self._put(side, replaced, rows, ~dead_side)
            count += len(rows)
        return count


def rank_one_rows(sae: _Product | _SideStep, rows: Tensor | LowRank) -> LowRank:
    """Rows [N,K*V] of rank one as k u^T: u is the row of the matrix with the largest entry, k the projections on it.

    Raises:
        ValueError: a matrix of a higher rank; names the first one.
    """
    if isinstance(rows, LowRank):
        rows = rows.dense().flatten(1)
    matrices = rows.unflatten(1, (sae.cfg.d_k, sae.cfg.d_v))
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
            f"row {first}: expected a write of rank one, which writesae_product is trained on, got a "
            "higher rank; train it on the writes of a head, and states with another architecture"
        )
    return writes


def _oriented(writes: LowRank) -> LowRank:
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


def _strongest(acts: Tensor, k: int) -> Tensor:
    """Where the k largest of the last axis are, as far as they are positive."""
    indices = acts.topk(k, dim=-1, sorted=False).indices
    top = torch.zeros_like(acts, dtype=torch.bool).scatter(-1, indices, True)
    return top & (acts > 0)


def _distinct(rows: Tensor, *, either_sign: bool, count: int = 2**31) -> Tensor:
    """Those of the directions [n,D] that are not near to one before them: at most `count`, with cosines below 0.5 if
    there are so many, and else below the next limit, up to `MAX_COSINE`."""
    rows = normalize(rows, dim=1)
    cosines = (rows @ rows.T).tril(-1)
    if either_sign:
        cosines = cosines.abs()
    distinct = rows
    for limit in (0.5, 0.6, 0.7, 0.8, MAX_COSINE):
        distinct = rows[~(cosines > limit).any(1)]
        if len(distinct) >= count:
            return distinct[:count]
    return distinct
