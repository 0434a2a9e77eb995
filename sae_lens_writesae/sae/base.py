"""What all matrix-atom autoencoders share: config fields, and factors in the place of W_enc and W_dec.

Inputs are flattened K x V matrices, key-first (`d_in = d_k * d_v`). Atom f is `A_f = sum_r v_f,r w_f,r^T`; with a
factored encoder the pre-activation is `sum_r v_enc^T X w_enc` (WriteSAE, arXiv 2605.12770, eq. 1, written key-first).
The factors are the only parameters of a factored side, `W_enc` and `W_dec` are views computed on demand.

SAELens writes to its weights through `W_enc.data` and `W_dec.data`, which does nothing to a view. Every method
that does so is replaced, and a test goes through the installed SAELens to see that none was missed.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from sae_lens.saes.sae import SAE, SAEConfig
from torch import Tensor, nn

from sae_lens_writesae.atom import sparse
from sae_lens_writesae.sae.checks import require

Encoder = Literal["bilinear", "tied", "dense"]
Decoder = Literal["rank", "flat"]


@dataclass(kw_only=True)
class MatrixAtomsConfig(SAEConfig):
    """Fields that the training and the inference config of every architecture share.

    Raises:
        ValueError: the shapes do not fit, or an option is unknown or cannot be kept by matrix atoms.
    """

    d_k: int = 0
    """K, the key side (rows) of the matrices. 0: `d_in // d_v`. At least one of the two must be given."""
    d_v: int = 0
    """V, the value side (columns). 0: `d_in // d_k`."""
    rank: int = 1
    """R of every atom and of a bilinear encoder; 1, 2 and 4 are the paper's. Unused by `dense` and `flat`."""
    encoder: Encoder = "bilinear"
    """`bilinear`: factors of its own; `tied`: the decoder's atoms; `dense`: a plain [d_in, d_sae] matrix."""
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


class AtomFactors(NamedTuple):
    """Atoms as sums of outer products, A_f = sum_r v_f,r w_f,r^T. A sign may move between v and w."""

    v: Tensor
    """[F,R,K]"""
    w: Tensor
    """[F,R,V]"""


class MatrixAtoms(SAE[Any]):
    """Holds the parameters of both sides; comes last among the bases, so that SAELens' `super()` calls land here.

    Parameters: `b_dec` [K*V]; for a rank decoder `v` [F,R,K] and `w` [F,R,V], else `decoder_matrix` [F,K*V]; for a
    bilinear encoder `v_enc`, `w_enc`, for a dense one `encoder_matrix` [K*V,F]. A tied encoder reads the decoder, times
    the buffer `encoder_scale` [F], which stays 1 in training and lets norms be folded afterwards.
    """

    cfg: Any
    b_dec: nn.Parameter
    v: nn.Parameter
    w: nn.Parameter
    decoder_matrix: nn.Parameter
    v_enc: nn.Parameter
    w_enc: nn.Parameter
    encoder_matrix: nn.Parameter
    encoder_scale: Tensor

    _step: dict[str, Tensor] | None = None
    """Views and norms computed in this training step; None outside of one."""
    _zeros_block_gradient = False
    """Whether the activation function passes no gradient where it returned 0."""

    # ---------------------------------------------------------------------------------------- parameters

    def initialize_weights(self) -> None:
        """Random atoms of norm `decoder_init_norm` (if it is None, of the norm that SAELens' init gives), encoder =
        decoder. Draws only: works on the meta device."""
        cfg, like = self.cfg, {"dtype": self.dtype, "device": self.device}
        norm = getattr(cfg, "decoder_init_norm", None) or math.sqrt(2.0)
        F, R, K, V = cfg.d_sae, cfg.rank, cfg.d_k, cfg.d_v
        self.b_dec = nn.Parameter(torch.zeros(cfg.d_in, **like))
        v, w = torch.randn(F, R, K, **like), torch.randn(F, R, V, **like)
        scale = (norm / atom_norm(v, w)).sqrt()[:, None, None]
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

    def _decoder_view(self) -> Tensor:
        return self.decoder_matrix if self.cfg.decoder == "flat" else self._once("W_dec", self._dense_decoder)

    def _encoder_view(self) -> Tensor:
        return self.encoder_matrix if self.cfg.encoder == "dense" else self._once("W_enc", self._dense_encoder)

    W_dec: Any = property(_decoder_view)
    """[F,K*V]. A view: writing to its `.data` is lost. Costs F*R*K*V and as much memory, once per training step."""
    W_enc: Any = property(_encoder_view)
    """[K*V,F]. A view like `W_dec`."""

    def _dense_decoder(self) -> Tensor:
        return sparse.khatri_rao(self.v, self.w)

    def _dense_encoder(self) -> Tensor:
        if self.cfg.encoder == "tied":
            return self.W_dec.T * self.encoder_scale
        return sparse.khatri_rao(self.v_enc, self.w_enc).T

    def _once(self, name: str, compute: Any) -> Tensor:
        if self._step is None or not torch.is_grad_enabled():
            return compute()
        if name not in self._step:
            self._step[name] = compute()
        return self._step[name]

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
            return acts @ self.decoder_matrix[atoms]
        full = self._step is None or not self._zeros_block_gradient
        return sparse.decode(acts, self.v[atoms], self.w[atoms], full_gradient=full)

    def encode_linear_write(self, keys: Tensor, values: Tensor) -> Tensor:
        """`encode_linear` of the rank-1 matrices keys values^T: [...,K], [...,V] -> [...,F].

        Costs R*(K+V) per row and atom with factors instead of K*V, and never builds the matrices.
        """
        cfg = self.cfg
        if cfg.encoder == "dense" or (cfg.encoder == "tied" and cfg.decoder == "flat"):
            return self.encode_linear((keys[..., :, None] * values[..., None, :]).flatten(-2))
        v, w = (self.v_enc, self.w_enc) if cfg.encoder == "bilinear" else (self.v, self.w)
        shape = (*keys.shape[:-1], *v.shape[:2])
        out = ((keys @ v.flatten(0, 1).T) * (values @ w.flatten(0, 1).T)).view(shape).sum(-1)
        return out if cfg.encoder == "bilinear" else out * self.encoder_scale

    def decoder_norm(self) -> Tensor:
        """Frobenius norm of every atom [F], differentiable, from the factors alone."""
        if self.cfg.decoder == "flat":
            return self.decoder_matrix.norm(dim=-1)
        return self._once("norm", lambda: atom_norm(self.v, self.w))

    def encoder_norm(self) -> Tensor:
        """Norm of every encoder atom [F]."""
        if self.cfg.encoder == "dense":
            return self.encoder_matrix.norm(dim=0)
        if self.cfg.encoder == "bilinear":
            return atom_norm(self.v_enc, self.w_enc)
        return self.decoder_norm() * self.encoder_scale

    @torch.no_grad()
    def get_W_dec_norm(self) -> Tensor:
        return self.decoder_norm().clamp(min=1e-8)

    @torch.no_grad()
    def log_histograms(self) -> dict[str, Any]:
        """What SAELens' trainer logs beside the metrics."""
        return {"weights/W_dec_norms": self.decoder_norm().float().cpu().numpy()}

    # ---------------------------------------------------------------------------------------- atoms

    @torch.no_grad()
    def atoms(self, indices: Tensor | list[int] | slice = slice(None)) -> Tensor:
        """Decoder atoms as matrices [n,K,V]."""
        flat = (
            self.decoder_matrix[indices]
            if self.cfg.decoder == "flat"
            else sparse.khatri_rao(self.v[indices], self.w[indices])
        )
        return flat.view(-1, self.cfg.d_k, self.cfg.d_v)

    @torch.no_grad()
    def atom_factors(self, indices: Tensor | list[int] | slice = slice(None), rank: int | None = None) -> AtomFactors:
        """Factors of decoder atoms, [n,R,K] and [n,R,V].

        With `rank`, or for a flat decoder (default: cfg.rank), the best approximation of that rank: the truncated SVD,
        with each singular value shared evenly. This is the paper's "flat SAE + top-1 SVD" baseline.
        """
        if self.cfg.decoder == "rank" and rank in (None, self.cfg.rank):
            return AtomFactors(self.v[indices].clone(), self.w[indices].clone())
        return truncated_svd(self.atoms(indices), rank or self.cfg.rank)

    @torch.no_grad()
    def replace_atoms(self, indices: Tensor, atoms: AtomFactors, alive: Tensor) -> None:
        """Put unit-norm `atoms` at `indices` [n], scaled to the mean norms of the `alive` [F] ones in decoder and
        encoder; their encoder biases start again at 0."""
        decoder = _mean_over(self.decoder_norm(), alive)
        encoder = _mean_over(self.encoder_norm(), alive)
        if self.cfg.decoder == "flat":
            self.decoder_matrix.data[indices] = self._cast(sparse.khatri_rao(*atoms) * decoder)
        else:
            self.v.data[indices], self.w.data[indices] = (self._cast(f * decoder.sqrt()) for f in atoms)
        if self.cfg.encoder == "bilinear":
            self.v_enc.data[indices], self.w_enc.data[indices] = (self._cast(f * encoder.sqrt()) for f in atoms)
        elif self.cfg.encoder == "dense":
            self.encoder_matrix.data[:, indices] = self._cast(sparse.khatri_rao(*atoms) * encoder).T
        for name in ("b_enc", "b_gate", "b_mag", "r_mag"):
            if isinstance(getattr(self, name, None), nn.Parameter):
                getattr(self, name).data[indices] = 0

    def _cast(self, t: Tensor) -> Tensor:
        return t.to(self.b_dec.dtype)

    @torch.no_grad()
    def balance_factors(self) -> None:
        """Give the two factors of every component the same norm. Atoms stay what they are; Adam's steps, which have one
        size for all parameters, then turn both sides equally."""
        for left, right in (("v", "w"), ("v_enc", "w_enc")):
            if left in self._parameters:
                v, w = getattr(self, left), getattr(self, right)
                ratio = (w.norm(dim=-1, keepdim=True) / v.norm(dim=-1, keepdim=True)).sqrt()
                ratio = torch.where(ratio.isfinite() & (ratio > 0), ratio, 1.0)
                v.data.mul_(ratio)
                w.data.div_(ratio)

    # ---------------------------------------------------------------------------------------- folds

    def _scaled(self, decoder: Tensor, encoder: Tensor) -> dict[str, Tensor]:
        """State-dict entries with every atom times `decoder` [F] or [] and its encoder times `encoder`, both > 0."""
        out: dict[str, Tensor] = {}
        if self.cfg.decoder == "flat":
            out["decoder_matrix"] = self.decoder_matrix * decoder[..., None]
        else:
            out["v"], out["w"] = (p * decoder.sqrt()[..., None, None] for p in (self.v, self.w))
        if self.cfg.encoder == "bilinear":
            out["v_enc"], out["w_enc"] = (p * encoder.sqrt()[..., None, None] for p in (self.v_enc, self.w_enc))
        elif self.cfg.encoder == "dense":
            out["encoder_matrix"] = self.encoder_matrix * encoder
        else:  # the decoder's own factor is already in what the encoder reads
            out["encoder_scale"] = self.encoder_scale * encoder / decoder
        return out

    @torch.no_grad()
    def _scale_in_place(self, decoder: Tensor, encoder: Tensor) -> None:
        own = dict(self.named_parameters()) | dict(self.named_buffers())
        for name, value in self._scaled(decoder, encoder).items():
            own[name].data.copy_(value)

    @torch.no_grad()
    def fold_activation_norm_scaling_factor(self, scaling_factor: float) -> None:
        factor = torch.tensor(scaling_factor, dtype=self.dtype, device=self.device)
        self._scale_in_place(1 / factor, factor)
        self.b_dec.data.div_(factor)
        self.cfg.normalize_activations = "none"

    @torch.no_grad()
    def fold_and_get_W_dec_norm(self) -> Tensor:
        norms = self.get_W_dec_norm()
        self._scale_in_place(1 / norms, norms)
        if isinstance(getattr(self, "b_enc", None), nn.Parameter):
            self.b_enc.data.mul_(norms)  # pyright: ignore
        return norms

    def fold_activation_whitening(self, mean: Tensor, whitening_matrix: Tensor, unwhitening_matrix: Tensor) -> None:
        """Refused: a whitened atom has no rank to speak of."""
        raise NotImplementedError(
            "Whitening mixes keys and values, and an atom of rank R does not stay one under it. Use "
            "normalize_activations='expected_average_only_in'."
        )


def atom_norm(v: Tensor, w: Tensor) -> Tensor:
    """Frobenius norm of sum_r v_f,r w_f,r^T: [F,R,K], [F,R,V] -> [F]. R = 1: |v||w|; else from the Gram matrices."""
    if v.shape[1] == 1:
        return (v.norm(dim=-1) * w.norm(dim=-1)).squeeze(1)
    square = ((v @ v.mT) * (w @ w.mT)).sum((-2, -1))
    return square.clamp(min=torch.finfo(square.dtype).tiny).sqrt()


def _mean_over(values: Tensor, mask: Tensor) -> Tensor:
    """Mean where `mask`, or everywhere if it is empty."""
    return values[mask].mean() if bool(mask.any()) else values.mean()


def truncated_svd(matrices: Tensor, rank: int) -> AtomFactors:
    """The closest matrices of rank R to [n,K,V], as factors with the singular values shared evenly."""
    exact = torch.promote_types(matrices.dtype, torch.float32)
    u, s, vh = torch.linalg.svd(matrices.to(exact), full_matrices=False)
    root = s[:, :rank].sqrt()[..., None]
    return AtomFactors((u[..., :rank].mT * root).to(matrices.dtype), (vh[:, :rank] * root).to(matrices.dtype))
