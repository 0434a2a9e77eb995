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

To first order this is |k u^T - k^ u^^T|^2, and it is the same for every factorisation of a write. (The joint error
diverged in training with several active atoms a side.) b_dec has no part in it: `calibrate_b_dec` sets it afterwards.
"""

# No postponed annotations here: SAELens' command line evaluates those of config fields in another module.
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import torch
from sae_lens.saes.sae import TrainCoefficientConfig, TrainingSAE, TrainStepInput, TrainStepOutput
from torch import Tensor, nn
from torch.nn.functional import normalize

from sae_lens_writesae.atom.low_rank import Index, LowRank
from sae_lens_writesae.sae.base import Activations, MatrixSAE, MatrixSAEConfig, MatrixWeights, check_finite, require
from sae_lens_writesae.sae.training import MatrixTrainingSAE, MatrixTrainingSAEConfig, draw_rows, exact_dtype, unpack

Side = Literal["key", "value"]
SIDES: tuple[Side, Side] = ("key", "value")

_RANK_ONE = 1e-2
"""Norm of what a rank-one matrix leaves of a row, as a share of the row's, up to which it counts as a write. It lies
above the rounding of half precision."""
_MAX_COSINE = 0.9
"""Two directions that are closer than this count as one where atoms are put on rows."""


@dataclass(kw_only=True)
class _ProductConfig(MatrixSAEConfig):
    """Fields of both configs.

    Raises:
        ValueError: d_sae is not f_key * f_value, more atoms are to be active than there are, or an option that
            products of sides cannot have.
    """

    f_key: int = 0
    """F_key, the number of key atoms. 0: `d_sae // f_value`, and if that is 0 too the root of d_sae."""
    f_value: int = 0
    """F_value, the number of value atoms. 0: `d_sae // f_key`."""
    k_key: int = 1
    """Active key atoms per matrix."""
    k_value: int = 1
    """Active value atoms per matrix; L0 is k_key * k_value."""
    apply_b_dec_to_input: bool = False
    """Must be False: a write less b_dec has no sides."""

    def __post_init__(self) -> None:
        given = self.f_key, self.f_value
        root = math.isqrt(max(self.d_sae, 0))
        self.f_key = given[0] or (self.d_sae // given[1] if given[1] else root)
        self.f_value = given[1] or (self.d_sae // given[0] if given[0] else root)
        fits = self.f_key >= 1 and self.f_value >= 1 and self.f_key * self.f_value == self.d_sae
        require(fits, "d_sae", self.d_sae, f"f_key * f_value, found {given[0]} and {given[1]}")
        for name, most in (("k_key", self.f_key), ("k_value", self.f_value)):
            require(1 <= getattr(self, name) <= most, name, getattr(self, name), f"between 1 and {most}")
        for name, only in (("encoder", "bilinear"), ("decoder", "rank"), ("rank", 1), ("apply_b_dec_to_input", False)):
            require(getattr(self, name) == only, name, getattr(self, name), f"{only!r} for products of two sides")
        super().__post_init__()

    @property
    def k(self) -> int:
        """Active atoms per matrix."""
        return self.k_key * self.k_value

    @classmethod
    def architecture(cls) -> str:
        return "writesae_product"


@dataclass
class WriteProductSAEConfig(_ProductConfig):
    """Inference config of `writesae_product`."""


@dataclass
class WriteProductTrainingSAEConfig(_ProductConfig, MatrixTrainingSAEConfig):
    """Training config of `writesae_product`.

    Raises:
        ValueError: a loss other than `mse`, a mean in b_dec, or unit norm.
    """

    unit_norm_every: int = 0
    """Must be 0: moving norms into the encoder changes which atoms are on top."""

    b_dec_init: Literal["mean", "zeros"] = "zeros"
    """Must be `zeros`: b_dec is not trained, but set at the end (`b_dec_rows`)."""

    def __post_init__(self) -> None:
        require(self.loss == "mse", "loss", self.loss, "'mse': each side has a squared error of its own")
        require(self.b_dec_init == "zeros", "b_dec_init", self.b_dec_init, "'zeros': sides are coded without b_dec")
        require(
            self.unit_norm_every == 0,
            "unit_norm_every",
            self.unit_norm_every,
            "0, because moving norms into the encoder changes which atoms are on top",
        )
        super().__post_init__()


class SideCode(NamedTuple):
    """One side of a batch of writes."""

    rows: Tensor
    """[N,D] keys or values, in the orientation in which they are coded."""
    pre: Tensor
    """[N,F_side] inner products with encoder atoms."""
    acts: Tensor
    """[N,F_side], the strongest of them that are positive."""
    reconstruction: Tensor
    """[N,D]"""


class _Product(MatrixSAE):
    """The parameters `key_atoms` [F_key,K], `value_atoms` [F_value,V], `key_encoder`, `value_encoder` and `b_dec`
    [K*V], and what differs for products of sides. `v`, `w`, `v_enc`, `w_enc` are views for each pair, [d_sae,1,K] and
    [d_sae,1,V]: what is written to their `.data` is lost."""

    cfg: WriteProductSAEConfig | WriteProductTrainingSAEConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    key_atoms: nn.Parameter
    value_atoms: nn.Parameter
    key_encoder: nn.Parameter
    value_encoder: nn.Parameter

    v: Any = property(lambda self: self._pairs("key", self.key_atoms))
    w: Any = property(lambda self: self._pairs("value", self.value_atoms))
    v_enc: Any = property(lambda self: self._pairs("key", self.key_encoder))
    w_enc: Any = property(lambda self: self._pairs("value", self.value_encoder))

    def _pairs(self, side: Side, atoms: Tensor) -> Tensor:
        """The atoms of a side, repeated for every pair: [F_side,D] -> [d_sae,1,D]."""
        grid = atoms[:, None] if side == "key" else atoms[None]
        return grid.expand(self.cfg.f_key, self.cfg.f_value, -1).reshape(self.cfg.d_sae, 1, -1)

    @property
    def n_factors(self) -> int:
        return max(self.cfg.f_key, self.cfg.f_value)

    def initialize_weights(self) -> None:
        """Random sides, the encoder equal to the decoder; atoms have norm `decoder_init_norm`."""
        cfg, like = self.cfg, {"dtype": self.dtype, "device": self.device}
        scale = math.sqrt(getattr(cfg, "decoder_init_norm", None) or math.sqrt(2.0))
        self.b_dec = nn.Parameter(torch.zeros(cfg.d_in, **like))
        keys = scale * normalize(torch.randn(cfg.f_key, cfg.d_k, **like), dim=1)
        values = scale * normalize(torch.randn(cfg.f_value, cfg.d_v, **like), dim=1)
        self.key_atoms, self.value_atoms = nn.Parameter(keys), nn.Parameter(values)
        self.key_encoder, self.value_encoder = nn.Parameter(keys.clone()), nn.Parameter(values.clone())
        self._keep_start(keys[:, None], values[:, None])

    # ---------------------------------------------------------------------------------------- maps

    def encode_linear(self, x: Tensor) -> Tensor:
        """<X, p_i q_j^T>: [...,K*V] -> [...,d_sae]. Costs F_key V (K + F_value) a row."""
        matrices = x.unflatten(-1, (self.cfg.d_k, self.cfg.d_v))
        return (self.key_encoder @ matrices @ self.value_encoder.T).flatten(-2)

    def encode_linear_rows(self, rows: LowRank) -> Tensor:
        """`encode_linear` of N low-rank matrices of R terms: [N,d_sae]. Costs R d_sae a row."""
        left, right = rows.keys @ self.key_encoder.T, rows.values @ self.value_encoder.T
        return (left.mT @ right).flatten(1)

    def decode_linear(self, acts: Tensor, atoms: slice = slice(None)) -> Tensor:
        """sum_ij acts_ij a_i c_j^T, without bias: [...,d_sae] -> [...,K*V]. Costs F_key V (K + F_value) a row."""
        if atoms != slice(None):
            acts = acts.new_zeros(*acts.shape[:-1], self.cfg.d_sae).index_copy(
                -1, torch.arange(self.cfg.d_sae, device=acts.device)[atoms], acts
            )
        grid = acts.unflatten(-1, (self.cfg.f_key, self.cfg.f_value))
        return (self.key_atoms.T @ (grid @ self.value_atoms)).flatten(-2)

    def _activate(self, linear: Tensor) -> Activations:
        pre = self.hook_sae_acts_pre(linear)
        grid = pre.unflatten(-1, (self.cfg.f_key, self.cfg.f_value))
        best = pre.argmax(-1, keepdim=True)[..., None]
        column = grid.take_along_dim(best % self.cfg.f_value, -1).squeeze(-1)
        row = grid.take_along_dim(best // self.cfg.f_value, -2).squeeze(-2)
        active = _strongest(column, self.cfg.k_key)[..., None] & _strongest(row, self.cfg.k_value)[..., None, :]
        acts = torch.where(active, grid, 0).clamp_min(0).flatten(-2)
        return Activations(self.hook_sae_acts_post(acts), pre)

    def decoder_norm(self) -> Tensor:
        return torch.outer(self.key_atoms.norm(dim=1), self.value_atoms.norm(dim=1)).flatten()

    def encoder_norm(self) -> Tensor:
        return torch.outer(self.key_encoder.norm(dim=1), self.value_encoder.norm(dim=1)).flatten()

    # ---------------------------------------------------------------------------------------- atoms

    @torch.no_grad()
    def atoms(self, indices: Index = slice(None), rank: int | None = None) -> LowRank:
        """Decoder atoms a_i c_j^T as matrices of rank one, which they are whatever `rank` says."""
        numbers = torch.arange(self.cfg.d_sae, device=self.device)[indices]
        keys = self.key_atoms[numbers // self.cfg.f_value]
        return LowRank.rank_one(keys, self.value_atoms[numbers % self.cfg.f_value])

    @torch.no_grad()
    def replace_atoms(self, indices: Tensor, atoms: LowRank, alive: Tensor) -> None:
        """Put the sides of rank-one `atoms` at key atoms and value atoms `indices` [n], each below `n_factors`, as far
        as a side has so many. (No pair can be replaced alone.) Norms become the mean ones of the side where `alive`
        [n_factors]."""
        for side, rows in zip(SIDES, (atoms.keys[:, 0], atoms.values[:, 0])):
            n = len(self._side(side)[0])
            self._put(side, indices[indices < n], rows[indices < n], alive[:n])

    def _side(self, side: Side) -> tuple[nn.Parameter, nn.Parameter]:
        """Atoms and encoder of a side."""
        return (self.key_atoms, self.key_encoder) if side == "key" else (self.value_atoms, self.value_encoder)

    def _put(self, side: Side, indices: Tensor, rows: Tensor, alive: Tensor) -> None:
        """Put directions [n,D] into atoms and encoder of a side, with the mean norms of those where `alive`."""
        for parameter in self._side(side):
            norms = parameter.norm(dim=1)
            size = norms[alive].mean() if bool(alive.any()) else norms.mean()
            parameter.data[indices] = normalize(rows.to(parameter), dim=1) * size

    def _scaled(self, decoder: Tensor, encoder: Tensor) -> dict[str, Tensor]:
        """As in the base, for scales that are products of one for each side, which those of norms are."""
        out: dict[str, Tensor] = {}
        for names, scale in ((("key_atoms", "value_atoms"), decoder), (("key_encoder", "value_encoder"), encoder)):
            logs = scale.log().expand(self.cfg.d_sae).view(self.cfg.f_key, self.cfg.f_value)
            for n, name in enumerate(names):
                out[name] = getattr(self, name) * (logs.mean(1 - n) - logs.mean() / 2).exp()[:, None]
        return out

    def fold_and_get_W_dec_norm(self) -> Tensor:
        """Refused: norms in the encoder change which atoms are on top."""
        raise NotImplementedError(
            "Moving the norms of atoms into the encoder of writesae_product changes which atoms are on top. Multiply "
            "activations by decoder_norm() where contributions are wanted."
        )


class WriteProductSAE(_Product):
    """Products of key atoms and value atoms, for inference."""

    cfg: WriteProductSAEConfig  # pyright: ignore[reportIncompatibleVariableOverride]


class _SideStep(TrainingSAE[Any]):
    """SAELens' training step with the errors of both sides, on writes of rank one [N,K] and [N,V].

    `feature_acts` of what it returns are sparse, and `hidden_pre` [N,F_key+F_value] are those of the sides.
    """

    code: Callable[[LowRank], tuple[SideCode, SideCode]]

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        writes = cast(LowRank, step_input.sae_in)
        key, value = self.code(writes)
        sizes = [side.rows.square().sum(1) for side in (key, value)]
        errors = [(side.rows - side.reconstruction).square().sum(1) for side in (key, value)]
        losses = {"key_loss": (sizes[1] * errors[0]).mean(), "value_loss": (sizes[0] * errors[1]).mean()}
        return TrainStepOutput(
            sae_in=cast(Tensor, writes),
            sae_out=cast(Tensor, LowRank.rank_one(key.reconstruction, value.reconstruction)),
            feature_acts=_pair_acts(key.acts.detach(), value.acts.detach()),  # pyright: ignore  (untyped decorator)
            hidden_pre=torch.cat([key.pre, value.pre], dim=1),
            loss=losses["key_loss"] + losses["value_loss"],
            losses=losses,
        )


class WriteProductTrainingSAE(_Product, MatrixTrainingSAE, _SideStep, MatrixWeights):
    """Products of key atoms and value atoms, in training. Resampling and starts from rows go side by side."""

    cfg: WriteProductTrainingSAEConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    _started: dict[Side, int] | None = None
    """Atoms of each side that were put on rows of the first batches."""

    def get_coefficients(self) -> dict[str, float | TrainCoefficientConfig]:
        return {}

    def calculate_aux_loss(self, *args: object, **kwargs: object) -> dict[str, Tensor]:
        return {}

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """Upkeep, then the step on the sides.

        Raises:
            ValueError: NaN or infinite input or weights, or rows of a rank above one.
        """
        output = super().training_forward_pass(step_input)
        if step_input.sae_in.shape[1] >= self.cfg.d_in:  # what SAELens logs is of matrices then
            output.sae_in = step_input.sae_in
            output.sae_out = cast(LowRank, output.sae_out).dense().flatten(1) + self.b_dec
        return output

    def split_batch(self, batch: Tensor) -> tuple[LowRank, Tensor]:
        """The writes of a batch of matrices or packed factors."""
        cfg, width = self.cfg, batch.shape[1]
        if width < cfg.d_in:
            rows = unpack(batch, cfg.d_k, cfg.d_v)
            return rows if rows.rank == 1 else rank_one_rows(rows.dense()), batch[:, :0]
        check_finite(batch, batch)
        return rank_one_rows(batch[:, : cfg.d_in].unflatten(1, (cfg.d_k, cfg.d_v))), batch[:, :0]

    def code(self, writes: LowRank) -> tuple[SideCode, SideCode]:
        """Both sides of writes of rank one, in at least fp32. Their outer product is what `encode` gives."""
        exact = exact_dtype(self.b_dec)
        with torch.autocast(self.b_dec.device.type, enabled=False):
            rows = [side[:, 0].to(exact) for side in (writes.keys, writes.values)]
            pre = [x @ self._side(side)[1].to(exact).T for side, x in zip(SIDES, rows)]
            check_finite(torch.cat(pre, dim=1), *rows)
            ahead, behind = ((s * pre[0]).amax(1).clamp_min(0) * (s * pre[1]).amax(1).clamp_min(0) for s in (1, -1))
            sign = torch.where(behind > ahead, -1.0, 1.0).to(exact)[:, None]
            found: list[SideCode] = []
            for side, x, linear, k in zip(SIDES, rows, pre, (self.cfg.k_key, self.cfg.k_value)):
                linear = sign * linear
                acts = torch.where(_strongest(linear, k), linear, 0)
                found.append(SideCode(sign * x, linear, acts, acts @ self._side(side)[0].to(exact)))
        return found[0], found[1]

    def squared_errors(self, reconstruction: Any, target: Any) -> Tensor:
        """As in the base; [N,1] for reconstructions k^ u^^T of a step on the sides, to which b_dec is added."""
        if isinstance(reconstruction, LowRank):
            error, bias = LowRank.cat([target, reconstruction * -1.0]), self._bias_matrix()
            return (error.inner(error) - 2 * error.products(bias) + bias.square().sum())[:, None]
        return super().squared_errors(reconstruction, target)

    # ---------------------------------------------------------------------------------------- upkeep

    @torch.no_grad()
    def start_from_rows(self, x: Tensor | LowRank, *, first: bool = True) -> int:
        """Put atoms of both sides that still wait for it on sides of rows of a batch, in decoder and encoder; returns
        how many of the side with fewer have such a start by now.

        Rows are drawn in proportion to their squared norm; a direction near to an earlier one is left out. Values are
        taken in the orientation in which their key agrees with its key atom.
        """
        if first:
            self._started = dict.fromkeys(SIDES, 0)
        if self._started is None:
            return min(self.cfg.f_key, self.cfg.f_value)
        writes = x if isinstance(x, LowRank) else self.split_batch(x)[0]
        sizes = writes.inner(writes)
        drawn = writes.rows(draw_rows(sizes, len(sizes)))
        for side in SIDES:
            if side == "key":
                rows = drawn.keys[:, 0]
            else:
                keys = self.key_atoms[: max(1, self._started["key"])]
                agreement = drawn.keys[:, 0].to(keys) @ keys.T
                best = agreement.abs().argmax(1, keepdim=True)
                rows = drawn.values[:, 0] * agreement.gather(1, best).sign()
            done, atoms = self._started[side], self._side(side)[0]
            new = _distinct(rows.to(self.dtype), atoms[:done], either_sign=side == "key")[: len(atoms) - done]
            index = torch.arange(done, done + len(new), device=self.device)
            self._put(side, index, new, torch.ones(len(atoms), dtype=torch.bool, device=self.device))
            self._started[side] = done + len(new)
        return min(self._started.values())

    @torch.no_grad()
    def resample(self, x: Tensor | LowRank, dead: Tensor) -> int:
        """Put dead atoms of a side on that side of rows of a batch, drawn in proportion to its squared error; returns
        how many. A key atom or a value atom is dead where all its pairs are (`dead` [d_sae])."""
        grid = dead.view(self.cfg.f_key, self.cfg.f_value)
        codes, replaced = self.code(x if isinstance(x, LowRank) else self.split_batch(x)[0]), 0
        for side, code, other, dead_side in zip(SIDES, codes, codes[::-1], (grid.all(1), grid.all(0))):
            errors = other.rows.square().sum(1) * (code.rows - code.reconstruction).square().sum(1)
            rows = code.rows[draw_rows(errors, int(dead_side.sum()))]
            rows = _distinct(rows, rows[:0], either_sign=side == "key")
            self._put(side, torch.nonzero(dead_side).flatten()[: len(rows)], rows, ~dead_side)
            replaced += len(rows)
        return replaced

    def _put(self, side: Side, indices: Tensor, rows: Tensor, alive: Tensor) -> None:
        """A replaced atom starts anew."""
        super()._put(side, indices, rows, alive)
        start = self.start_keys if side == "key" else self.start_values
        start[indices] = self._side(side)[0].data[indices, None]

    @torch.no_grad()
    def start_cosine(self) -> float:
        """Median over pairs of the cosine with their start, which is the product of those of the sides."""
        keys, values = (
            torch.cosine_similarity(side.float(), start[:, 0].float(), dim=1)
            for side, start in ((self.key_atoms, self.start_keys), (self.value_atoms, self.start_values))
        )
        return float(torch.outer(keys, values).median())


def rank_one_rows(matrices: Tensor) -> LowRank:
    """Matrices [N,K,V] of rank one as k u^T: u is the row with the largest entry, k the projections on it.

    Raises:
        ValueError: a matrix of a higher rank; names the first one.
    """
    strongest = matrices.abs().amax(2).argmax(1)
    u = matrices[torch.arange(len(matrices), device=matrices.device), strongest]
    size = u.norm(dim=1, keepdim=True)
    unit = torch.where(size > 0, u / size, 0)
    k = (matrices @ unit[..., None]).squeeze(-1)
    rest = (matrices - k[..., None] * unit[:, None]).flatten(1).norm(dim=1)
    above = torch.nonzero(rest > _RANK_ONE * matrices.flatten(1).norm(dim=1)).flatten()
    if len(above):
        raise ValueError(
            f"writesae_product is trained on writes of rank one, and row {int(above[0])} of the batch has a higher "
            "rank; train it on the writes of a head (target='write'), and states with another architecture"
        )
    return LowRank.rank_one(k, unit)


def _strongest(acts: Tensor, k: int) -> Tensor:
    """Where the k largest of the last axis are, as far as they are positive."""
    top = torch.zeros_like(acts, dtype=torch.bool).scatter(-1, acts.topk(k, dim=-1, sorted=False).indices, True)
    return top & (acts > 0)


@torch.compiler.disable
def _pair_acts(key: Tensor, value: Tensor) -> Tensor:
    """The activations of all pairs, sparse [N,F_key*F_value], from those of the sides."""
    n, i = key.nonzero(as_tuple=True)
    m, j = value[n].nonzero(as_tuple=True)
    index = torch.stack([n[m], i[m] * value.shape[1] + j])
    size = (len(key), key.shape[1] * value.shape[1])
    return torch.sparse_coo_tensor(index, key[n[m], i[m]] * value[n[m], j], size, check_invariants=False)


def _distinct(rows: Tensor, taken: Tensor, *, either_sign: bool) -> Tensor:
    """Those of the directions [n,D] that are not near to one before them or to one that is `taken` [m,D]."""
    rows, taken = normalize(rows, dim=1), normalize(taken, dim=1)
    among, with_taken = rows @ rows.T, rows @ taken.T
    if either_sign:
        among, with_taken = among.abs(), with_taken.abs()
    near = torch.cat([among.tril(-1), with_taken], dim=1) > _MAX_COSINE
    return rows[~near.any(1)]
