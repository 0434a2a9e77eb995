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

That is the encoder `topk`. With `pursuit`, any matrix is coded, a state above all: as a sum of at most `n_pairs` pairs,
which matching pursuit takes (`sae.pursuit`). The parameters are the atoms of both sides, whose norms have no effect: an
activation is the coefficient of a pair of norm 1, and has a sign. The loss is the squared error of the sum, whose
gradient flows to both sides. (Coefficients are those of least squares, so that nothing is lost by holding them fixed.)
Atoms that are hardly used, and the less used one of two that are alike, are replaced by singular vectors of what is
left. With half as many atoms again as a side has directions, all of these are found; with as many, two share an atom
here and there.

Activations [N,d_sae] are indexed by pair, since then SAELens' evaluations, hooks and `decode` work as they are. No
matrix [d_sae,K*V] is built in training, `encode` or `decode`: both sides are multiplied one after the other.
"""

# No postponed annotations here: SAELens' command line evaluates those of config fields in another module.
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, cast

import torch
from sae_lens.saes.sae import TrainingSAE, TrainStepInput, TrainStepOutput
from torch import Tensor, nn
from torch.nn.functional import normalize

from sae_lens_writesae.atom.low_rank import LowRank
from sae_lens_writesae.sae.matrix import MatrixSAE, MatrixSAEConfig
from sae_lens_writesae.sae.pursuit import LEAST_STOP, Pairs, pursue
from sae_lens_writesae.sae.training import (
    MAX_COSINE,
    START_STEPS,
    MatrixTrainingSAE,
    MatrixTrainingSAEConfig,
    StartBias,
    draw_rows,
    exact_dtype,
)

ProductEncoder = Literal["topk", "pursuit"]

_RANK_ONE = 1e-2
"""Norm of what a rank-one matrix leaves of a row, as a share of the row's, up to which it counts as a write. It is
above the rounding of half precision."""

START_ROWS = 1024
"""Rows on which atoms are put. With 48 planted keys and values and as many atoms, 1024 rows find all of them; 128
rows find 40 to 45."""
UNUSED = 0.15
"""An atom whose contribution is below this share of its side's mean is replaced."""
ALIKE = 0.95
"""Two atoms of a side whose cosine, of either sign, is above this are one; the less used one is replaced."""


@dataclass(kw_only=True)
class WriteProductSAEConfig(MatrixSAEConfig):
    """Inference config of `writesae_product`, whose fields that of training has too.

    Raises:
        ValueError: d_sae is not f_key * f_value, more atoms are to be active than there are, or an option that
            products of sides cannot have.
    """

    _encoders: ClassVar[Any] = ProductEncoder
    encoder: ProductEncoder = "topk"  # pyright: ignore[reportIncompatibleVariableOverride]
    """`topk`: the strongest atoms of both sides, for writes. `pursuit`: at most `n_pairs` pairs, one after the other,
    for any matrix."""

    f_key: int = 0
    """F_key, the number of key atoms. 0: `d_sae // f_value`, and if that is 0 too the root of d_sae, rounded down."""
    f_value: int = 0
    """F_value, the number of value atoms. 0: `d_sae // f_key`."""
    k_key: int = 1
    """Active key atoms per matrix."""
    k_value: int = 1
    """Active value atoms per matrix; L0 is k_key * k_value."""
    n_pairs: int = 4
    """Most pairs of a matrix with `pursuit`."""
    stop: float = 0.05
    """Share of a matrix's norm: `pursuit` takes no pair whose inner product with what is left is not above it."""
    apply_b_dec_to_input: bool = False
    """Must be False: a write less b_dec has no sides."""

    def __post_init__(self) -> None:
        root = math.isqrt(max(self.d_sae, 0))
        self.f_key = self.f_key or (self.d_sae // self.f_value if self.f_value else root)
        self.f_value = self.f_value or self.d_sae // max(self.f_key, 1)
        if self.f_key * self.f_value != self.d_sae:
            raise ValueError(f"d_sae={self.d_sae!r}: must be f_key * f_value.")
        for name, most in (("k_key", self.f_key), ("k_value", self.f_value), ("n_pairs", self.d_sae)):
            k = getattr(self, name)
            if not 1 <= k <= most:
                raise ValueError(f"{name}={k!r}: must be between 1 and {most}.")
        if not LEAST_STOP <= self.stop < 1:
            raise ValueError(f"stop={self.stop!r}: must be at least {LEAST_STOP} and below 1.")
        fixed: dict[str, object] = {"decoder": "rank", "rank": 1, "apply_b_dec_to_input": False, "loss": "mse"}
        # b_dec is set by the means of training, and norms in the encoder would change which atoms are on top.
        fixed |= {"b_dec_init": "zeros", "unit_norm_every": 0}
        if self.encoder == "pursuit":
            fixed |= {"normalize_activations": "none", "metric": "frobenius"}
        for name, only in fixed.items():
            value = getattr(self, name, only)
            if value != only:
                raise ValueError(f"{name}={value!r}: must be {only!r} for two sides.")
        super().__post_init__()

    @property
    def k(self) -> int:
        """Active atoms per matrix, at most."""
        if self.encoder == "pursuit":
            return self.n_pairs
        return self.k_key * self.k_value


@dataclass
class WriteProductTrainingSAEConfig(WriteProductSAEConfig, MatrixTrainingSAEConfig):  # pyright: ignore  (encoder)
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
    v: Any = property(lambda self: self._pairs(self.directions[0][:, None]))
    w: Any = property(lambda self: self._pairs(self.directions[1]))
    v_enc: Any = property(lambda self: self._pairs(self._readers[0][:, None]))
    w_enc: Any = property(lambda self: self._pairs(self._readers[1]))

    def _pairs(self, side: Tensor) -> Tensor:
        """A side [F_key,1,K] or [F_value,V], repeated for every pair: [d_sae,1,D]."""
        return side.expand(self.cfg.f_key, self.cfg.f_value, -1).reshape(self.cfg.d_sae, 1, -1)

    @property
    def sides(self) -> tuple[tuple[nn.Parameter, ...], tuple[nn.Parameter, ...]]:
        """Atoms of the keys, and of the values; and behind each its encoder, which `pursuit` does not have."""
        if self.cfg.encoder == "pursuit":
            return (self.key_atoms,), (self.value_atoms,)
        return (self.key_atoms, self.key_encoder), (self.value_atoms, self.value_encoder)

    @property
    def directions(self) -> tuple[Tensor, Tensor]:
        """Atoms [F_key,K] and [F_value,V] as they are decoded: with `pursuit` of norm 1."""
        if self.cfg.encoder == "pursuit":
            return normalize(self.key_atoms, dim=1), normalize(self.value_atoms, dim=1)
        return self.key_atoms, self.value_atoms

    @property
    def _readers(self) -> tuple[Tensor, Tensor]:
        """What a matrix is multiplied by on both sides: [F_key,K] and [F_value,V]."""
        if self.cfg.encoder == "pursuit":
            return self.directions
        return self.key_encoder, self.value_encoder

    def decoder_norm(self) -> Tensor:
        keys, values = self.directions
        return torch.outer(keys.norm(dim=1), values.norm(dim=1)).flatten()

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """Sums of all pairs [...,K*V] with weights [...,d_sae]. Costs F_value K (F_key + V)."""
        keys, values = self.directions
        grid = weights.unflatten(-1, (self.cfg.f_key, self.cfg.f_value))
        return (keys.T @ grid @ values).flatten(-2)

    @property
    def n_factors(self) -> int:
        return max(self.cfg.f_key, self.cfg.f_value)

    def _start(self, norm: float, **like: Any) -> None:
        """Random sides, the encoder equal to the decoder."""
        cfg = self.cfg
        keys = math.sqrt(norm) * normalize(torch.randn(cfg.f_key, cfg.d_k, **like), dim=1)
        values = math.sqrt(norm) * normalize(torch.randn(cfg.f_value, cfg.d_v, **like), dim=1)
        self.key_atoms = nn.Parameter(keys)
        self.value_atoms = nn.Parameter(values)
        if cfg.encoder == "topk":
            self.key_encoder = nn.Parameter(keys.clone())
            self.value_encoder = nn.Parameter(values.clone())

    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Activations and pre-activations [...,d_sae] of [...,K*V]."""
        cfg = self.cfg
        matrices = self.process_sae_in(x).unflatten(-1, (cfg.d_k, cfg.d_v))
        if cfg.encoder == "pursuit":
            pairs = self.pursue(matrices.flatten(0, -3))
            pre = self.hook_sae_acts_pre(pairs.scores.view(*x.shape[:-1], -1))
            return self.hook_sae_acts_post(pairs.acts().view_as(pre)), pre
        grid = self.key_encoder @ matrices @ self.value_encoder.T
        pre = self.hook_sae_acts_pre(grid.flatten(-2))
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

    def pursue(self, matrices: Tensor, n: int | None = None, stop: float | None = None) -> Pairs:
        """The pairs of matrices [N,K,V]; `n` and `stop` instead of those of the config."""
        keys, values = (normalize(side, dim=1) for side in self.directions)
        return pursue(matrices, keys, values, n or self.cfg.n_pairs, stop or self.cfg.stop)

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
        for kind, scales in (("atoms", decoder), ("encoder", encoder))[: len(self.sides[0])]:
            logs = scales.log().expand(self.cfg.d_sae)
            grid = logs.view(self.cfg.f_key, -1)
            half = logs.mean() / 2  # the mean log belongs to the pair; each side takes half of it
            scaled[f"key_{kind}"] = getattr(self, f"key_{kind}") * (grid.mean(1) - half).exp()[:, None]
            scaled[f"value_{kind}"] = getattr(self, f"value_{kind}") * (grid.mean(0) - half).exp()[:, None]
        return scaled

    def fold_activation_norm_scaling_factor(self, scaling_factor: float) -> None:
        """Refused with `pursuit`, which is trained on inputs as they are."""
        if self.cfg.encoder == "pursuit":
            raise NotImplementedError(
                "writesae_product with pursuit has atoms of norm 1, and the code of s X is s times that of X: give it "
                "inputs as they are."
            )
        super().fold_activation_norm_scaling_factor(scaling_factor)

    def fold_and_get_W_dec_norm(self) -> Tensor:
        """Refused: norms in the encoder change which atoms are on top."""
        raise NotImplementedError(
            "Moving the norms of atoms into the encoder of writesae_product changes which atoms are on top. Multiply "
            "activations by decoder_norm() where contributions are wanted."
        )


def _decode(self: _Product, feature_acts: Tensor) -> Tensor:
    """Reconstructions [...,K*V] of activations [...,d_sae], with SAELens' hooks. b_dec is not learned."""
    out = self.hook_sae_recons(self.weighted_sum(feature_acts) + self.b_dec.detach())
    return self.reshape_fn_out(self.run_time_activation_norm_fn_out(out), self.d_head)


class WriteProductSAE(_Product):
    """Products of key atoms and value atoms, for inference."""

    encode = cast(Any, TrainingSAE.encode)  # which SAELens has in training alone
    decode = cast(Any, _decode)


class _SideStep(TrainingSAE[Any]):
    """The training step: with the errors of both sides, on rows [N,K*V] of rank one; or with that of pairs."""

    decode = cast(Any, _decode)

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        x = step_input.sae_in
        sae = cast(WriteProductTrainingSAE, self)
        if sae.cfg.encoder == "pursuit":
            return super().training_forward_pass(step_input)
        key, value = sae.code(rank_one_rows(self, x))
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

        With `pursuit` it is done with the first batch alone, on the first singular vectors of its rows.
        """
        if self.cfg.encoder == "pursuit":
            if first:
                everywhere = [atoms.isfinite().all(1) for atoms in (self.key_atoms, self.value_atoms)]
                self._put_in(everywhere, _singular_vectors(self._matrices(x)), either_sign=True)
            return int(self.n_started)
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
        returns how many. A key atom or a value atom is dead where all its pairs are (`dead` [d_sae]).

        With `pursuit`, put spare atoms (`_spare`) on singular vectors of what is left of the rows, those first of which
        most is left. Costs N SVDs.
        """
        if self.cfg.encoder == "pursuit":
            self._turn_to_positive()
            used = self.mean_contribution.view(self.cfg.f_key, -1).abs()
            spare = [_spare(side, used.sum(1 - number)) for number, side in enumerate(self.directions)]
            matrices = self._matrices(x)
            left = matrices - self._matrices(self.weighted_sum(self.encode(matrices.flatten(1))))
            by_size = left.square().sum((1, 2)).argsort(descending=True)
            return self._put_in(spare, _singular_vectors(left[by_size]), either_sign=True)
        grid = dead.view(self.cfg.f_key, self.cfg.f_value)
        codes = self.code(rank_one_rows(self, x))
        dead_sides = grid.all(1), grid.all(0)
        candidates = list[Tensor]()
        for side, dead_side in enumerate(dead_sides):
            code = codes[side]
            errors = codes[1 - side].size() * code.error()  # in units of the write, as the loss is
            candidates.append(code.rows[draw_rows(errors, int(dead_side.sum()))])
        return self._put_in(dead_sides, candidates, either_sign=False)

    def _put_in(self, spare: Sequence[Tensor], candidates: Sequence[Tensor], either_sign: bool) -> int:
        """Put distinct directions among `candidates` [n,D] of each side into the atoms that are `spare` [F_side], as
        many as there are; returns how many. Keys are distinct in either sign anyway."""
        count = 0
        for side, (of_side, rows) in enumerate(zip(spare, candidates)):
            new = _distinct(rows, either_sign=either_sign or side == 0)[: int(of_side.sum())]
            replaced = torch.nonzero(of_side).flatten()[: len(new)]
            self._put(side, replaced, new, ~of_side)
            if either_sign:  # with pursuit: their means begin anew
                for means in (self.mean_contribution, self.mean_batches):
                    means.view(self.cfg.f_key, -1).index_fill_(side, replaced, 0)
            count += len(new)
        return count

    def _matrices(self, x: Tensor | LowRank) -> Tensor:
        """Rows [N,K*V] as matrices [N,K,V] in the dtype of the atoms."""
        return _dense_rows(x).to(self.dtype).unflatten(1, (self.cfg.d_k, self.cfg.d_v))

    def _turn_to_positive(self) -> None:
        """Turn atoms to their negative, so that most contributions are positive: by the first singular vectors of
        the signs of mean contributions. Where the signs of all pairs follow from those of their sides, this gives them
        (Perron and Frobenius). Sizes are left out: a pair that all states have would outweigh the others."""
        grid = self.mean_contribution.view(self.cfg.f_key, -1)
        left, _, right = torch.linalg.svd(grid.sign(), full_matrices=False)
        one = torch.ones_like(grid[0, 0])
        of_keys = one.copysign(left[:, :1])
        of_values = one.copysign(right[0])
        self.key_atoms.data.mul_(of_keys)
        self.value_atoms.data.mul_(of_values[:, None])
        grid.mul_(of_keys * of_values)


def _spare(directions: Tensor, used: Tensor) -> Tensor:
    """[F] which atoms of a side, of norm 1, are hardly `used` [F] or are the less used one of two that are alike."""
    spare = used < UNUSED * used.mean()
    alike = (directions @ directions.T).abs().triu(1) > ALIKE
    one, other = alike.nonzero().T
    spare[torch.where(used[one] < used[other], one, other)] = True
    return spare


def _dense_rows(x: Tensor | LowRank) -> Tensor:
    """Rows [N,K*V] of matrices that may be of low rank."""
    return x.dense().flatten(1) if isinstance(x, LowRank) else x


def _singular_vectors(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """The first left and right singular vectors [N,K] and [N,V]."""
    left, _, right = torch.linalg.svd(matrices.to(exact_dtype(matrices)), full_matrices=False)
    return left[..., 0], right[:, 0]


def rank_one_rows(sae: _Product | _SideStep, rows: Tensor | LowRank) -> LowRank:
    """Rows [N,K*V] of rank one as k u^T: u is the row of the matrix with the largest entry, k the projections on it.

    Raises:
        ValueError: a matrix of a higher rank; names the first one.
    """
    rows = _dense_rows(rows)
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
            f"row {first}: expected a write of rank one, which encoder='topk' is trained on, got a higher rank; train "
            "it on the writes of a head, and on states with encoder='pursuit'"
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
