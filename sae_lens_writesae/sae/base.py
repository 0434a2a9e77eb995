"""What all matrix-atom autoencoders share: their config, their parameters, and encode and decode.

Inputs are flattened K x V matrices, key-first (`d_in = d_k * d_v`). Atom f is `A_f = sum_r v_f,r w_f,r^T`. With a
factored encoder, the pre-activation of atom f is `sum_r v_enc^T X w_enc` (WriteSAE, arXiv 2605.12770, eq. 1, written
key-first). The factors are the only parameters of a factored side, and `W_enc` and `W_dec` are computed on demand.

An architecture `WriteXSAE(MatrixSAE, XSAE, MatrixWeights)` takes SAELens' class X between two bases. `MatrixSAE` comes
first, so that encode and decode go through the factors instead of `sae_in @ self.W_enc`, which would build the whole
dictionary at each call. `MatrixWeights` comes last, so that `super().initialize_weights()` and the folds of SAELens
end there. SAELens writes to its weights through `W_enc.data` and `W_dec.data`, which does nothing to a computed matrix:
every method that does so is overridden, and a test reads the installed SAELens to see that none was missed.
"""

# No postponed annotations here: SAELens' command line evaluates those of config fields in another module.
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from numpy.typing import NDArray
from sae_lens.registry import SAE_CLASS_REGISTRY
from sae_lens.saes.sae import SAE, SAEConfig
from torch import Tensor, nn

from hookpoints.files import write_checksums
from sae_lens_writesae.atom import sparse
from sae_lens_writesae.atom.low_rank import Index, LowRank
from sae_lens_writesae.choices import Decoder, Encoder
from sae_lens_writesae.files import named_errors

REQUIRES = "import sae_lens_writesae (package sae-lens-writesae), which registers the architecture in SAELens"
"""What the metadata of every saved autoencoder says. SAELens has no entry points: without the import it raises a bare
KeyError with the architecture's name."""


def require(condition: bool, field: str, value: object, wanted: str) -> None:
    """Raise ValueError unless `condition` holds; the message names the field, its value and what is needed."""
    if not condition:
        raise ValueError(f"{field}={value!r}: must be {wanted}.")


def check_finite(result: Tensor, *inputs: Tensor) -> None:
    """Raise if the result of a linear map holds NaN or infinity, which it does whichever of its inputs held them.

    Costs one sum over `result` when all is finite; does nothing on the meta device and in compiled graphs.

    Raises:
        ValueError: names the input that is not finite and its first bad row, or blames the weights.
    """
    if torch.compiler.is_compiling() or result.is_meta:
        return
    if torch.isfinite(result.detach().sum(dtype=torch.promote_types(result.dtype, torch.float32))):
        return
    for x in inputs:
        rows = torch.nonzero(~torch.isfinite(x.detach()).reshape(-1, x.shape[-1]).all(-1)).flatten()
        if len(rows):
            raise ValueError(
                f"Input of shape {list(x.shape)} has NaN or infinite values in {len(rows)} rows, the first being row "
                f"{int(rows[0])}. Check the model's dtype (fp16 overflows easily) and leave those positions out."
            )
    if torch.isfinite(result).all():  # only the sum overflowed
        return
    raise ValueError(
        f"The input is finite but the pre-activations of shape {list(result.shape)} are not: the weights hold NaN or "
        "infinite values, or have grown beyond the dtype. Lower the learning rate or load an earlier checkpoint."
    )


@dataclass(kw_only=True)
class MatrixSAEConfig(SAEConfig):
    """Fields that the training and the inference config of every architecture share.

    Raises:
        ValueError: the shapes do not fit, an option is unknown, or matrix atoms cannot have it.
    """

    d_k: int = 0
    """K, the key side (rows) of the matrices. 0: `d_in // d_v`. At least one of the two must be given."""
    d_v: int = 0
    """V, the value side (columns). 0: `d_in // d_k`."""
    rank: int = 1
    """R of every atom and of a bilinear encoder; 1, 2 and 4 are the paper's. Unused by `dense` and `flat`."""
    encoder: Encoder = "bilinear"
    """`bilinear`: separate factors; `tied`: the decoder's atoms; `dense`: a plain [d_in, d_sae] matrix."""
    decoder: Decoder = "rank"
    """`rank`: atoms of rank R; `flat`: a plain [d_sae, d_in] matrix."""

    def __post_init__(self) -> None:
        self.d_k, self.d_v = _matrix_shape(self.d_in, self.d_k, self.d_v)
        require(self.d_sae >= 1, "d_sae", self.d_sae, "a number of atoms of at least 1")
        require(self.encoder in get_args(Encoder), "encoder", self.encoder, f"one of {get_args(Encoder)}")
        require(self.decoder in get_args(Decoder), "decoder", self.decoder, f"one of {get_args(Decoder)}")
        limit = min(self.d_k, self.d_v)
        require(
            1 <= self.rank <= limit, "rank", self.rank, f"between 1 and min(d_k, d_v) = min({self.d_k}, {self.d_v})"
        )
        require(
            self.normalize_activations in ("none", "expected_average_only_in"),
            "normalize_activations",
            self.normalize_activations,
            "'none' or 'expected_average_only_in': anything but a scalar would have to be folded into atoms that could"
            " not keep their rank",
        )
        require(
            self.reshape_activations == "none",
            "reshape_activations",
            self.reshape_activations,
            "'none': the hooks of one head are flattened already",
        )
        super().__post_init__()
        self.metadata["requires"] = REQUIRES

    @property
    def is_factored(self) -> bool:
        """Whether both sides are factors, so that low-rank inputs need not be built as matrices."""
        return self.encoder != "dense" and self.decoder == "rank"


def _matrix_shape(d_in: int, d_k: int, d_v: int) -> tuple[int, int]:
    """(K, V), where one may be left 0 to be derived from d_in."""
    if d_k < 0 or d_v < 0 or d_k == d_v == 0:
        raise ValueError(
            f"d_k={d_k} and d_v={d_v}: give the key and value width of the hooked head, d_in={d_in} being d_k * d_v "
            "(cfg.d_k, cfg.d_v of the hooked model)."
        )
    k, v = d_k or d_in // d_v, d_v or d_in // d_k
    if k * v != d_in:
        raise ValueError(f"d_k * d_v = {k} * {v} = {k * v}, but d_in={d_in}: a flattened matrix has d_k * d_v entries.")
    return k, v


class MatrixWeights(SAE[Any]):
    """The parameters of both sides, the linear maps, and the folds. It is the last base of every architecture.

    Parameters: `b_dec` [K*V]; for a rank decoder `v` [F,R,K] and `w` [F,R,V], else `decoder_matrix` [F,K*V]; for a
    bilinear encoder `v_enc`, `w_enc`, for a dense one `encoder_matrix` [K*V,F]. A tied encoder reads the decoder, times
    the buffer `encoder_scale` [F], which stays 1 in training and lets norms be folded afterwards.
    """

    cfg: MatrixSAEConfig
    b_dec: nn.Parameter
    v: nn.Parameter
    w: nn.Parameter
    decoder_matrix: nn.Parameter
    v_enc: nn.Parameter
    w_enc: nn.Parameter
    encoder_matrix: nn.Parameter
    encoder_scale: Tensor
    b_enc: nn.Parameter
    """[F]; the gated architecture has none."""

    _step: dict[str, Tensor] | None = None
    """Dense matrices and norms computed in this training step; None outside of a step."""
    _zeros_block_gradient = False
    """Whether the activation function passes no gradient back where it returned 0."""

    # ---------------------------------------------------------------------------------------- parameters

    def initialize_weights(self) -> None:
        """Random atoms of norm `decoder_init_norm` (None: of the norm that SAELens' initialisation gives), with the
        encoder equal to the decoder. Only draws and scales, so that it works on the meta device."""
        cfg, like = self.cfg, {"dtype": self.dtype, "device": self.device}
        norm = getattr(cfg, "decoder_init_norm", None) or math.sqrt(2.0)
        F, R, K, V = cfg.d_sae, cfg.rank, cfg.d_k, cfg.d_v
        self.b_dec = nn.Parameter(torch.zeros(cfg.d_in, **like))
        v, w = torch.randn(F, R, K, **like), torch.randn(F, R, V, **like)
        scale = (norm / sparse.atom_norm(v, w)).sqrt()[:, None, None]
        v, w = v * scale, w * scale
        dense = sparse.khatri_rao(v, w) if cfg.decoder == "flat" or cfg.encoder == "dense" else None
        if cfg.decoder == "flat":
            assert dense is not None
            self.decoder_matrix = nn.Parameter(dense)
        else:
            self.v, self.w = nn.Parameter(v), nn.Parameter(w)
        if cfg.encoder == "bilinear":
            self.v_enc, self.w_enc = nn.Parameter(v.clone()), nn.Parameter(w.clone())
        elif cfg.encoder == "dense":
            assert dense is not None
            self.encoder_matrix = nn.Parameter(dense.T.contiguous())
        else:
            self.register_buffer("encoder_scale", torch.ones(F, **like))
        self._keep_start(v, w)

    @property
    def n_factors(self) -> int:
        """How many atoms are free of each other: all, unless they are made of fewer shared factors."""
        return int(self.cfg.d_sae)

    def _keep_start(self, keys: Tensor, values: Tensor) -> None:
        """Is given the initial atoms [F,R,K], [F,R,V]; a class in training keeps them."""

    def _dense_decoder(self) -> Tensor:
        if self.cfg.decoder == "flat":
            return self.decoder_matrix
        return self._once("W_dec", lambda: sparse.khatri_rao(self.v, self.w))

    def _dense_encoder(self) -> Tensor:
        if self.cfg.encoder == "dense":
            return self.encoder_matrix
        if self.cfg.encoder == "tied":
            return self._once("W_enc", lambda: self.W_dec.T * self.encoder_scale)
        return self._once("W_enc", lambda: sparse.khatri_rao(self.v_enc, self.w_enc).T)

    # Any, because SAELens declares these two as parameters.
    W_dec: Any = property(_dense_decoder)
    """[F,K*V], computed from the factors: what is written to its `.data` is lost. Costs F*R*K*V, and F*K*V numbers of
    memory, once per training step."""
    W_enc: Any = property(_dense_encoder)
    """[K*V,F], computed like `W_dec`."""

    def _once(self, name: str, compute: Callable[[], Tensor]) -> Tensor:
        if self._step is None or not torch.is_grad_enabled():
            return compute()
        if name not in self._step:
            self._step[name] = compute()
        return self._step[name]

    def output_bias(self) -> Tensor:
        """What `decode` adds to the atoms [K*V]."""
        return self.b_dec

    def settle_b_dec(self) -> None:
        """Make b_dec the output bias, which outside of training it is."""

    # ---------------------------------------------------------------------------------------- maps

    def encode_linear(self, x: Tensor) -> Tensor:
        """<X, encoder atom f>: [...,K*V] -> [...,F], before biases and activation. One GEMM, no dictionary held."""
        if self.cfg.encoder == "dense":
            return x @ self.encoder_matrix
        if self.cfg.encoder == "bilinear":
            return sparse.encode(x, self.v_enc, self.w_enc)
        if self.cfg.decoder == "flat":
            return (x @ self.decoder_matrix.T) * self.encoder_scale
        return sparse.encode(x, self.v, self.w) * self.encoder_scale

    def decode_linear(self, acts: Tensor, atoms: slice = slice(None)) -> Tensor:
        """sum_f acts_f A_f, without bias: [...,F] -> [...,K*V]; `atoms` restricts to a range that `acts` covers."""
        if self.cfg.decoder == "flat":
            return self.coefficients(acts, atoms) @ self.decoder_matrix[atoms]
        code = self.coefficients(acts, atoms)
        return sparse.decode(code, self.v[atoms], self.w[atoms], full_gradient=self._full_gradient)

    def coefficients(self, acts: Tensor, atoms: slice | Tensor = slice(None)) -> Tensor:
        """What the atoms of the range are multiplied by [...,F'], from activations [...,F']."""
        scale = self.coefficient_scale()
        return acts if scale is None else acts * scale[atoms]

    def coefficient_scale(self) -> Tensor | None:
        """Coefficient of each atom at an activation of 1 [F]; None: 1."""
        return None

    @property
    def _full_gradient(self) -> bool:
        """Whether decoding must pass a gradient to activations of 0."""
        return self._step is None or not self._zeros_block_gradient

    def encode_linear_write(self, keys: Tensor, values: Tensor) -> Tensor:
        """`encode_linear` of the rank-1 matrices keys values^T: [...,K], [...,V] -> [...,F].

        Costs R*(K+V) per row and atom with factors instead of K*V, and never builds the matrices.
        """
        rows = LowRank.rank_one(keys.reshape(-1, self.cfg.d_k), values.reshape(-1, self.cfg.d_v))
        return self.encode_linear_rows(rows).view(*keys.shape[:-1], -1)

    def encode_linear_rows(self, rows: LowRank) -> Tensor:
        """`encode_linear` of N low-rank matrices: [N,F].

        Costs R*R'*(K+V) per row and atom for rows of R' terms; an encoder without factors needs the matrices built.
        """
        factors = self._encoder_factors
        if factors is None:
            return self.encode_linear(rows.dense().flatten(1))
        out = sparse.encode_rows(rows.keys, rows.values, *factors)
        return out * self.encoder_scale if self.cfg.encoder == "tied" else out

    def encode_linear_bias(self) -> Tensor:
        """`encode_linear` of b_dec [F], differentiable. Costs F*R*K*V, once and not for each row."""
        factors = self._encoder_factors
        if factors is None:
            return self.encode_linear(self.b_dec)
        out = sparse.matrix_products(self.b_dec.view(self.cfg.d_k, self.cfg.d_v), *factors)
        return out * self.encoder_scale if self.cfg.encoder == "tied" else out

    @property
    def _encoder_factors(self) -> tuple[Tensor, Tensor] | None:
        """[F,R,K] and [F,R,V], without the scale of a tied encoder; None where the encoder is a plain matrix."""
        if self.cfg.encoder == "bilinear":
            return self.v_enc, self.w_enc
        return (self.v, self.w) if self.cfg.encoder == "tied" and self.cfg.decoder == "rank" else None

    def write_cosines(self, keys: Tensor, values: Tensor) -> Tensor:
        """Signed cosines of writes sum_r k_r u_r^T and decoder atoms: [N,R',K], [N,R',V] -> [N,F], differentiable.

        0 where the write is zero. Costs N F R R' (K + V); a flat decoder builds the writes.
        """
        if self.cfg.decoder == "flat":
            inner = (keys.mT @ values).flatten(1) @ self.decoder_matrix.T
        else:
            inner = sparse.encode_rows(keys, values, self.v, self.w)
        size = (keys @ keys.mT * (values @ values.mT)).sum((1, 2)).clamp_min(0).sqrt()[:, None] * self.decoder_norm()
        return torch.where(size > 0, inner / size.clamp_min(torch.finfo(size.dtype).tiny), 0)

    def decoder_norm(self) -> Tensor:
        """Frobenius norm of every atom [F], differentiable, from the factors alone."""
        if self.cfg.decoder == "flat":
            return self.decoder_matrix.norm(dim=-1)
        return self._once("norm", lambda: sparse.atom_norm(self.v, self.w))

    def encoder_norm(self) -> Tensor:
        """Norm of every encoder atom [F]."""
        if self.cfg.encoder == "dense":
            return self.encoder_matrix.norm(dim=0)
        if self.cfg.encoder == "bilinear":
            return sparse.atom_norm(self.v_enc, self.w_enc)
        return self.decoder_norm() * self.encoder_scale

    @torch.no_grad()
    def get_W_dec_norm(self) -> Tensor:
        return self.decoder_norm().clamp(min=1e-8)

    @torch.no_grad()
    def log_histograms(self) -> dict[str, NDArray[Any]]:
        """What SAELens' trainer logs beside its metrics."""
        return {"weights/W_dec_norms": self.decoder_norm().float().cpu().numpy()}

    # ---------------------------------------------------------------------------------------- atoms

    @torch.no_grad()
    def atoms(self, indices: Index = slice(None), rank: int | None = None) -> LowRank:
        """Decoder atoms as low-rank matrices: N = n atoms.

        Without `rank` they are exact: the factors themselves, and for a flat decoder all min(K, V) singular terms. With
        `rank` each is the closest matrix of that rank, with its singular values shared by both sides (the paper's
        baseline "flat SAE + top-1 SVD"). Costs one K x V SVD an atom, and nothing for atoms of the rank asked for.
        """
        cfg = self.cfg
        if cfg.decoder == "flat":
            dense = self.decoder_matrix[indices].view(-1, cfg.d_k, cfg.d_v)
            return LowRank.svd(dense, rank, balanced=rank is not None)
        atoms = LowRank(self.v[indices].clone(), self.w[indices].clone())
        return atoms if rank in (None, cfg.rank) else LowRank.svd(atoms.dense(), rank, balanced=True)

    @torch.no_grad()
    def replace_atoms(self, indices: Tensor, atoms: LowRank, alive: Tensor) -> None:
        """Put unit-norm `atoms` at `indices` [n], in the decoder and in the encoder.

        They get the mean norm of the atoms where `alive` [F] on either side, and encoder biases of 0.
        """
        decoder = _mean_over(self.decoder_norm(), alive)
        encoder = _mean_over(self.encoder_norm(), alive)
        dtype = self.b_dec.dtype
        if self.cfg.decoder == "flat":
            self.decoder_matrix.data[indices] = (atoms.dense().flatten(1) * decoder).to(dtype)
        else:
            self.v.data[indices] = (atoms.keys * decoder.sqrt()).to(dtype)
            self.w.data[indices] = (atoms.values * decoder.sqrt()).to(dtype)
        if self.cfg.encoder == "bilinear":
            self.v_enc.data[indices] = (atoms.keys * encoder.sqrt()).to(dtype)
            self.w_enc.data[indices] = (atoms.values * encoder.sqrt()).to(dtype)
        elif self.cfg.encoder == "dense":
            self.encoder_matrix.data[:, indices] = (atoms.dense().flatten(1) * encoder).to(dtype).T
        for name in ("b_enc", "b_gate", "b_mag", "r_mag"):
            if isinstance(getattr(self, name, None), nn.Parameter):
                getattr(self, name).data[indices] = 0

    @torch.no_grad()
    def balance_factors(self) -> None:
        """Give both factors of every term the same norm. The atoms do not change, and Adam's steps, which have one size
        for all parameters, then turn both sides equally."""
        for left, right in (("v", "w"), ("v_enc", "w_enc")):
            if left in self._parameters:
                v, w = getattr(self, left), getattr(self, right)
                ratio = (w.norm(dim=-1, keepdim=True) / v.norm(dim=-1, keepdim=True)).sqrt()
                ratio = torch.where(ratio.isfinite() & (ratio > 0), ratio, 1.0)
                v.data.mul_(ratio)
                w.data.div_(ratio)

    # ---------------------------------------------------------------------------------------- folds

    def _scaled(self, decoder: Tensor, encoder: Tensor) -> dict[str, Tensor]:
        """State-dict entries in which every atom is multiplied by `decoder` and its encoder by `encoder`, both
        positive, [F] or []."""
        out: dict[str, Tensor] = {}
        if self.cfg.decoder == "flat":
            out["decoder_matrix"] = self.decoder_matrix * decoder[..., None]
        else:
            out["v"], out["w"] = (p * decoder.sqrt()[..., None, None] for p in (self.v, self.w))
        if self.cfg.encoder == "bilinear":
            out["v_enc"], out["w_enc"] = (p * encoder.sqrt()[..., None, None] for p in (self.v_enc, self.w_enc))
        elif self.cfg.encoder == "dense":
            out["encoder_matrix"] = self.encoder_matrix * encoder
        else:  # a tied encoder reads the decoder, and so has its factor already
            out["encoder_scale"] = self.encoder_scale * encoder / decoder
        return out

    @torch.no_grad()
    def _scale_in_place(self, decoder: Tensor, encoder: Tensor) -> None:
        for name, value in self._scaled(decoder, encoder).items():
            getattr(self, name).data.copy_(value)

    @torch.no_grad()
    def fold_activation_norm_scaling_factor(self, scaling_factor: float) -> None:
        self.settle_b_dec()
        factor = self.b_dec.new_tensor(scaling_factor)  # on its way into a model self.device may still be "meta"
        self._scale_in_place(1 / factor, factor)
        self.b_dec.data.div_(factor)
        self.cfg.normalize_activations = "none"

    @torch.no_grad()
    def fold_and_get_W_dec_norm(self) -> Tensor:
        norms = self.get_W_dec_norm()
        self._scale_in_place(1 / norms, norms)
        if isinstance(getattr(self, "b_enc", None), nn.Parameter):
            self.b_enc.data.mul_(norms)
        return norms

    def fold_activation_whitening(self, mean: Tensor, whitening_matrix: Tensor, unwhitening_matrix: Tensor) -> None:
        """Refused: whitening mixes keys and values, so that an atom would lose its rank."""
        raise NotImplementedError(
            "Whitening mixes keys and values, so that an atom of rank R does not keep its rank. Use "
            "normalize_activations='expected_average_only_in'."
        )


class Activations(NamedTuple):
    """What an encoder returns."""

    acts: Tensor
    """[...,F]"""
    hidden_pre: Tensor
    """[...,F] before the activation function, as SAELens' losses expect it."""


class MatrixSAE(MatrixWeights):
    """An autoencoder of matrices: encode and decode over the factors. It is the first base of every architecture, which
    only says in `_activate` what happens to the pre-activations; losses, thresholds and hooks stay SAELens'.
    """

    def _activate(self, linear: Tensor) -> Activations:
        """Biases, hooks and activation function on <X, encoder atom> [...,F]."""
        raise NotImplementedError

    def encode(self, x: Tensor) -> Tensor:
        """Feature activations [...,F] of flattened matrices [...,K*V]. Costs one GEMM.

        Raises:
            ValueError: NaN or infinite input.
        """
        return self._encode(x).acts

    def _encode(self, x: Tensor | LowRank) -> Activations:
        return self._activate(self.linear(x))

    def linear(self, x: Tensor | LowRank) -> Tensor:
        """<X - b_dec, encoder atom> [...,F] of flattened matrices [...,K*V], or [N,F] of N low-rank matrices, which are
        not built. (Without b_dec, if the config says so. `hook_sae_input` fires for flattened matrices only.)

        Raises:
            ValueError: NaN or infinite input.
        """
        if isinstance(x, LowRank):
            linear = self.encode_linear_rows(x.to(self.dtype))
            if self.cfg.apply_b_dec_to_input:
                linear = linear - self.encode_linear_bias()
            check_finite(linear, x.keys.flatten(1), x.values.flatten(1))
        else:
            linear = self.encode_linear(self.process_sae_in(x))
            check_finite(linear, x)
        return linear

    def encode_writes(self, keys: Tensor, values: Tensor) -> Tensor:
        """Feature activations [...,F] of rank-1 matrices keys values^T, [...,K] and [...,V].

        Equals `encode` of the flattened outer products, which are not built: R*(K+V) instead of K*V operations per atom
        and row. `hook_sae_input` does not fire.
        """
        rows = LowRank.rank_one(keys.reshape(-1, self.cfg.d_k), values.reshape(-1, self.cfg.d_v))
        return self._activate(self.linear(rows).view(*keys.shape[:-1], -1)).acts

    def decode(self, feature_acts: Tensor) -> Tensor:
        """Reconstructions [...,K*V] of activations [...,F]. Costs 2*R*K*V per active atom."""
        recons = self.hook_sae_recons(self.decode_linear(feature_acts) + self.output_bias())
        return self.reshape_fn_out(self.run_time_activation_norm_fn_out(recons), self.d_head)

    def save_model(self, path: str | Path) -> tuple[Path, Path]:
        """Save weights and config as SAELens does, with their checksums, which `load_sae` compares."""
        return with_checksums(super().save_model, path)

    @torch.no_grad()
    def to_saelens(self) -> SAE[Any]:
        """The same function as an autoencoder of SAELens' own class (TopK, JumpReLU, Standard or Gated), which loads
        without this package.

        `W_enc` [K*V,F] and `W_dec` [F,K*V] are built: 2 F K V numbers, in the place of the factors. Activations and
        reconstructions are equal to rounding.

        Raises:
            ValueError: SAELens has no class of this form.
        """
        names = [name for name, (cls, _) in SAE_CLASS_REGISTRY.items() if cls in type(self).__mro__[1:]]
        if not names:
            raise ValueError(
                f"{self.cfg.architecture()} has no form in SAELens: it activates the pairs of the most active key "
                "atoms and the most active value atoms, which is no function of one pre-activation per atom"
            )
        metadata = {name: value for name, value in self.cfg.metadata.to_dict().items() if name != "requires"}
        changes = {"architecture": names[0], "device": "meta", "metadata": metadata}
        sae = SAE.from_dict(self.cfg.to_dict() | changes)
        weights = {name: getattr(self, name).clone(memory_format=torch.contiguous_format) for name in sae.state_dict()}
        sae.load_state_dict(weights, assign=True)
        sae.cfg.device = self.cfg.device
        return sae.to(self.device)

    def fold_activation_whitening(self, mean: Tensor, whitening_matrix: Tensor, unwhitening_matrix: Tensor) -> None:
        """Refused before an architecture has changed anything."""
        MatrixWeights.fold_activation_whitening(self, mean, whitening_matrix, unwhitening_matrix)


def with_checksums(save: Callable[[str | Path], tuple[Path, Path]], path: str | Path) -> tuple[Path, Path]:
    """`save` the two files of an autoencoder in the folder `path`, and `SHA256SUMS` beside them; returns the two.

    SAELens writes the fields of cfg.json in an order that differs from process to process; here they are sorted.

    Raises:
        OSError: the folder cannot be written, or the disk is full; names the folder.
    """
    with named_errors(Path(path)):
        files = save(path)
        files[1].write_text(json.dumps(json.loads(files[1].read_text()), sort_keys=True))
        write_checksums(files[0].parent, [file.name for file in files])
    return files


def _mean_over(values: Tensor, mask: Tensor) -> Tensor:
    """Mean where `mask`, or everywhere if it is empty."""
    return values[mask].mean() if bool(mask.any()) else values.mean()
