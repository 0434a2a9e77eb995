"""`writesae_product`: atoms that are pairs of a key atom and a value atom: a write's address is coded apart from its
content. Two dictionaries share the architecture: `sae.sides` (encoder `topk`) codes both sides of a write, `sae.pairs`
(encoder `pursuit`) any matrix, as a sum of pairs.

Atom (i, j) is A_ij = a_i c_j^T, number i * F_value + j of d_sae = F_key F_value atoms. The parameters are the sides
alone: F_key (K + V) numbers, say, give F_key^2 atoms. There are no biases in the encoder: the code of s X is s times
that of X, for s > 0.

Activations [N,d_sae] are indexed by pair, since then SAELens' evaluations, hooks and `decode` work as they are. No
matrix [d_sae,K*V] is built in training, `encode` or `decode`: both sides are multiplied one after the other.
"""

# No postponed annotations here: SAELens' command line evaluates those of config fields in another module.
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, cast

import torch
from sae_lens.saes.sae import TrainingSAE
from torch import Tensor, nn
from torch.nn.functional import normalize

from sae_lens_writesae.atom.low_rank import LowRank
from sae_lens_writesae.errors import check_fields
from sae_lens_writesae.sae.matrix import MatrixSAE, MatrixSAEConfig
from sae_lens_writesae.sae.pursuit import LEAST_STOP, Pairs, pairs_of
from sae_lens_writesae.sae.training import MAX_COSINE, MatrixTrainingSAE, MatrixTrainingSAEConfig, StartBias

ProductEncoder = Literal["topk", "pursuit"]


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
        most = {"k_key": self.f_key, "k_value": self.f_value, "n_pairs": self.d_sae}
        rules: dict[str, tuple[bool, object]] = {
            "d_sae": (self.f_key * self.f_value == self.d_sae, f"f_key * f_value = {self.f_key} * {self.f_value}"),
            "stop": (LEAST_STOP <= self.stop < 1, f"at least {LEAST_STOP}, and below 1"),
            **{name: (1 <= getattr(self, name) <= n, f"1 to {n}") for name, n in most.items()},
        }
        fixed: dict[str, object] = {"decoder": "rank", "rank": 1, "apply_b_dec_to_input": False, "loss": "mse"}
        # b_dec is set by the means of training, and norms in the encoder would change which atoms are on top.
        fixed |= {"b_dec_init": "zeros", "unit_norm_every": 0}
        if self.encoder == "pursuit":
            fixed |= {"normalize_activations": "none", "metric": "frobenius"}
        rules |= {name: (getattr(self, name, only) == only, f"{only!r} for two sides") for name, only in fixed.items()}
        check_fields(self, rules)
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


class Product(MatrixSAE):
    """The parameters `key_atoms` [F_key,K], `value_atoms` [F_value,V] and `b_dec` [K*V], and what differs for products
    of sides. `v`, `w`, `v_enc`, `w_enc` are computed for each pair, [d_sae,1,K] and [d_sae,1,V]."""

    cfg: WriteProductSAEConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    coder: ClassVar[str]
    """The word of `encoder` that means this class."""
    kinds: ClassVar[tuple[str, ...]] = ("atoms",)
    """What a side has."""
    key_atoms: nn.Parameter
    value_atoms: nn.Parameter
    directions: tuple[Tensor, Tensor]
    """Atoms [F_key,K] and [F_value,V] as they are decoded."""
    readers: tuple[Tensor, Tensor]
    """What a matrix is multiplied by on both sides: [F_key,K] and [F_value,V]."""
    v: Any = property(lambda self: self._of_pairs(self.directions[0][:, None]))
    w: Any = property(lambda self: self._of_pairs(self.directions[1]))
    v_enc: Any = property(lambda self: self._of_pairs(self.readers[0][:, None]))
    w_enc: Any = property(lambda self: self._of_pairs(self.readers[1]))

    def __new__(cls, cfg: WriteProductSAEConfig | None = None, *args: object, **kwargs: object) -> Self:
        """Of the two dictionaries the one whose encoder the config has. (A copy is made without a config.)"""
        meant = [each for each in cls.__subclasses__() if cfg is not None and each.coder == cfg.encoder]
        return super().__new__(meant[0] if meant else cls)

    def _of_pairs(self, side: Tensor) -> Tensor:
        """A side [F_key,1,K] or [F_value,V], repeated for every pair: [d_sae,1,D]."""
        return side.expand(self.cfg.f_key, self.cfg.f_value, -1).reshape(self.cfg.d_sae, 1, -1)

    @property
    def sides(self) -> list[list[nn.Parameter]]:
        """Atoms of the keys, and of the values; and behind each its encoder, where it has one."""
        return [[self.get_parameter(f"{side}_{kind}") for kind in self.kinds] for side in ("key", "value")]

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

    def _start_weights(self, norm: float, **like: Any) -> None:
        """Random sides; where they have encoders, these are equal to the decoder."""
        cfg = self.cfg
        keys = math.sqrt(norm) * normalize(torch.randn(cfg.f_key, cfg.d_k, **like), dim=1)
        values = math.sqrt(norm) * normalize(torch.randn(cfg.f_value, cfg.d_v, **like), dim=1)
        for kind in self.kinds:
            self.register_parameter(f"key_{kind}", nn.Parameter(keys.clone()))
            self.register_parameter(f"value_{kind}", nn.Parameter(values.clone()))

    def pursue(self, matrices: Tensor, n: int | None = None, stop: float | None = None) -> Pairs:
        """The pairs of matrices [N,K,V]; `n` and `stop` instead of those of the config."""
        keys, values = (normalize(side, dim=1) for side in self.directions)
        return pairs_of(matrices, keys, values, n or self.cfg.n_pairs, stop or self.cfg.stop)

    @torch.no_grad()
    def replace_atoms(self, indices: Tensor, atoms: LowRank, alive: Tensor) -> None:
        """Put the sides of rank-one `atoms` at key atoms and value atoms `indices` [n], each below `n_factors`, as far
        as a side has so many. (No pair can be replaced alone.) Norms become the mean ones of the side where `alive`
        [n_factors]."""
        for side, rows in enumerate((atoms.keys[:, 0], atoms.values[:, 0])):
            n = len(self.sides[side][0])
            exists = indices < n
            self._put_directions(side, indices[exists], rows[exists], alive[:n])

    def _put_directions(self, side: int, indices: Tensor, rows: Tensor, alive: Tensor) -> None:
        """Put directions [n,D] into atoms and encoder of a side, with the mean norm of those where `alive`."""
        if not alive.any():
            alive = ~alive
        for parameter in self.sides[side]:
            size = parameter.norm(dim=1)[alive].mean()
            parameter.data[indices] = normalize(rows.to(parameter), dim=1) * size

    def _scaled_weights(self, decoder: Tensor, encoder: Tensor) -> dict[str, Tensor]:
        """As in the base, for scales that are products of one for each side, which those of norms are."""
        scaled: dict[str, Tensor] = {}
        for kind, scales in zip(self.kinds, (decoder, encoder)):
            logs = scales.log().expand(self.cfg.d_sae)
            grid = logs.view(self.cfg.f_key, -1)
            half = logs.mean() / 2  # the mean log belongs to the pair; each side takes half of it
            for axis, side in enumerate(("value", "key")):
                of_side = (grid.mean(axis) - half).exp()[:, None]
                scaled[f"{side}_{kind}"] = getattr(self, f"{side}_{kind}") * of_side
        return scaled

    def fold_and_get_W_dec_norm(self) -> Tensor:
        """Refused: norms in the encoder change which atoms are on top."""
        raise NotImplementedError(
            "Moving the norms of atoms into the encoder of writesae_product changes which atoms are on top. Multiply "
            "activations by decoder_norm() where contributions are wanted."
        )


def _sums_of_pairs(self: Product, feature_acts: Tensor) -> Tensor:
    """Reconstructions [...,K*V] of activations [...,d_sae], with SAELens' hooks. b_dec is not learned."""
    out = self.hook_sae_recons(self.weighted_sum(feature_acts) + self.b_dec.detach())
    return self.reshape_fn_out(self.run_time_activation_norm_fn_out(out), self.d_head)


class WriteProductSAE(Product):
    """Products of key atoms and value atoms, for inference."""

    encode = cast(Any, TrainingSAE.encode)  # which SAELens has in training alone
    decode = cast(Any, _sums_of_pairs)


class _ProductDecoder(TrainingSAE[Any]):
    decode = cast(Any, _sums_of_pairs)


class WriteProductTrainingSAE(Product, MatrixTrainingSAE, _ProductDecoder):  # pyright: ignore  (cfg)
    """Products of key atoms and value atoms, in training. Resampling and starts from rows go side by side."""

    get_coefficients = calculate_aux_loss = cast(Any, lambda self, *args, **kwargs: {})  # the step has all losses

    def _put_distinct(self, spare: Sequence[Tensor], candidates: Sequence[Tensor], either_sign: bool) -> int:
        """Put distinct directions among `candidates` [n,D] of each side into the atoms that are `spare` [F_side], as
        many as there are; returns how many. Keys are distinct in either sign anyway."""
        count = 0
        for side, (of_side, rows) in enumerate(zip(spare, candidates)):
            new = distinct_rows(rows, either_sign=either_sign or side == 0)[: int(of_side.sum())]
            replaced = torch.nonzero(of_side).flatten()[: len(new)]
            self._put_directions(side, replaced, new, ~of_side)
            if either_sign:  # with pursuit: their means begin anew
                for means in (self.mean_contribution, self.mean_batches):
                    means.view(self.cfg.f_key, -1).index_fill_(side, replaced, 0)
            count += len(new)
        return count


def distinct_rows(rows: Tensor, *, either_sign: bool, count: int = 2**31) -> Tensor:
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
