"""What all matrix-atom autoencoders share: their config, their factors, and the matrices that SAELens works with.

Inputs are flattened K x V matrices, key-first (`d_in = d_k * d_v`). Atom f is `A_f = sum_r v_f,r w_f,r^T`. With a
factored encoder, the pre-activation of atom f is `sum_r v_enc^T X w_enc` (WriteSAE, arXiv 2605.12770, eq. 1, written
key-first). The factors are the parameters; `W_enc` and `W_dec` are computed from them.

An architecture is `class WriteXSAE(XSAE, MatrixSAE)`: SAELens' class X encodes, decodes and scores with `W_enc` and
`W_dec`, whose gradients flow to the factors. SAELens writes to its weights through `W_enc.data` and `W_dec.data`,
which does nothing to a computed matrix: `MatrixSAE` overrides every method that does so (the start and the folds), and
a test reads the installed SAELens to see that none was missed.

Example, K = 64, V = 32, F = 256, R = 1: `v` [256,1,64] and `w` [256,1,32] are 24,576 numbers; `W_dec` [256,2048] has
524,288. It is built once in a training step, and at each call elsewhere.
"""

# No postponed annotations here: SAELens' command line evaluates those of config fields in another module.
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NoReturn, get_args

import torch
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME
from sae_lens.registry import SAE_CLASS_REGISTRY
from sae_lens.saes.sae import SAE, SAEConfig, TrainingSAE
from torch import Tensor, nn

from hookpoints.files import atomic_files
from sae_lens_writesae.atom.low_rank import AtomIndex, LowRank
from sae_lens_writesae.choices import Decoder, Encoder
from sae_lens_writesae.errors import check_fields

REQUIRES = "import sae_lens_writesae (package sae-lens-writesae), which registers the architecture in SAELens"
"""What the metadata of every saved autoencoder says. SAELens has no entry points: without the import it raises a bare
KeyError with the architecture's name."""

CHECKPOINT_ENTRY = "mean_batches"
"""A buffer that only autoencoders in training have: weights with it are those of a checkpoint."""


@dataclass(kw_only=True)
class MatrixSAEConfig(SAEConfig):
    """Fields that the training and the inference config of every architecture share.

    Raises:
        ValueError: the shapes do not fit, an option is unknown, or matrix atoms cannot have it.
    """

    _name: ClassVar[str]
    """The architecture's name in SAELens' registry, set where the class is registered."""

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

    @classmethod
    def architecture(cls) -> str:
        return cls._name

    def __post_init__(self) -> None:
        check_fields(self, {"d_k": (max(self.d_k, self.d_v) > 0, "the width of the hooked head, or that of d_v")})
        self.d_k = self.d_k or self.d_in // self.d_v
        self.d_v = self.d_v or self.d_in // self.d_k
        k = getattr(self, "k", 1)  # BatchTopK's is a mean, and may be a fraction
        limit = min(self.d_k, self.d_v)
        foldable = self.normalize_activations in ("none", "expected_average_only_in")
        check_fields(self, {"d_in": (self.d_in == self.d_k * self.d_v, f"d_k * d_v = {self.d_k} * {self.d_v}")})
        check_fields(self, words(self, encoder=Encoder, decoder=Decoder))
        rules = {
            "d_sae": (self.d_sae >= 1, "a number of atoms"),
            "k": (0 < k <= self.d_sae, f"a number above 0, at most d_sae = {self.d_sae}"),
            "rank": (1 <= self.rank <= limit, f"1 to min(d_k, d_v) = {limit}"),
            "normalize_activations": (foldable, "'none' or 'expected_average_only_in', a scalar that can be folded in"),
            "reshape_activations": (self.reshape_activations == "none", "'none': hooks of one head are flattened"),
        }
        check_fields(self, rules)
        super().__post_init__()
        self.metadata["requires"] = REQUIRES


def words(config: SAEConfig, **types: object) -> dict[str, tuple[bool, object]]:
    """Rules of `check_fields`: a field is one of the words of its type, a `Literal`."""
    known = {name: get_args(type_) for name, type_ in types.items()}
    return {name: (getattr(config, name) in each, f"one of {', '.join(each)}") for name, each in known.items()}


class ComputedMatrix(Tensor):
    """A matrix that is computed from factors. Operations read it like any tensor and give plain ones. Writing to it in
    place raises TypeError, since the factors would stay as they are. Its `.data` is plain, because SAELens' start of
    weights writes there."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore

    def _refused_write(self, *_: object) -> NoReturn:
        raise TypeError(
            "W_dec and W_enc are computed from factors: a write to them would be lost. Write to the parameters "
            "(sae.named_parameters() lists them), or call sae.replace_atoms(indices, atoms, alive)"
        )


for _name in dir(Tensor):
    if _name == "__setitem__" or re.fullmatch(r"[a-z]\w*_|__i(add|sub|mul|truediv|pow)__", _name):
        setattr(ComputedMatrix, _name, ComputedMatrix._refused_write)


class MatrixSAE(SAE[Any]):
    """The parameters of both sides, the matrices made of them, and the folds. It is the last base of an architecture.

    Parameters: `b_dec` [K*V]; for a rank decoder `v` [F,R,K] and `w` [F,R,V], else `decoder_matrix` [F,K*V]; for a
    bilinear encoder `v_enc`, `w_enc`, for a dense one `encoder_matrix` [K*V,F]. A tied encoder reads the decoder, times
    the buffer `encoder_scale` [F], which stays 1 in training and lets norms be folded afterwards.
    """

    cfg: MatrixSAEConfig
    b_enc: nn.Parameter
    """[F]; the gated architecture has none."""

    _built: dict[str, Tensor] | None = None
    """Matrices of this training step; None outside of a step, where a kept matrix could be older than its factors."""

    # ---------------------------------------------------------------------------------------- parameters

    def initialize_weights(self) -> None:
        """Random atoms of norm `decoder_init_norm` (None: of the norm that SAELens' initialization gives), with the
        encoder equal to the decoder. Only draws and scales, so that it works on the meta device."""
        cfg = self.cfg
        like = {"dtype": self.dtype, "device": self.device}
        self.b_dec = nn.Parameter(torch.zeros(cfg.d_in, **like))
        norm = getattr(cfg, "decoder_init_norm", None) or math.sqrt(2.0)
        v = torch.randn(cfg.d_sae, cfg.rank, cfg.d_k, **like)
        w = torch.randn(cfg.d_sae, cfg.rank, cfg.d_v, **like)
        scale = (norm / LowRank(v, w).norm()).sqrt()[:, None, None]
        v = v * scale
        w = w * scale
        if cfg.decoder == "rank":
            self.v = nn.Parameter(v)
            self.w = nn.Parameter(w)
        else:
            self.decoder_matrix = nn.Parameter(khatri_rao(v, w))
        if cfg.encoder == "bilinear":
            self.v_enc = nn.Parameter(v.clone())
            self.w_enc = nn.Parameter(w.clone())
        elif cfg.encoder == "dense":
            self.encoder_matrix = nn.Parameter(khatri_rao(v, w).T.contiguous())
        else:
            self.encoder_scale = nn.Buffer(torch.ones(cfg.d_sae, **like))

    # SAELens declares these two as parameters.
    @property
    def W_dec(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        """[F,K*V], computed from the factors. Writing to it raises, and what is written to its `.data` is lost. Costs
        F*R*K*V, and F*K*V numbers of memory, once in a training step."""
        if self.cfg.decoder == "flat":
            return self.decoder_matrix
        return self._built_once("W_dec", lambda: khatri_rao(self.v, self.w))

    @property
    def W_enc(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        """[K*V,F], computed like `W_dec`."""
        if self.cfg.encoder == "dense":
            return self.encoder_matrix
        if self.cfg.encoder == "tied":
            return self._built_once("W_enc", lambda: self.W_dec.T * self.encoder_scale)
        return self._built_once("W_enc", lambda: khatri_rao(self.v_enc, self.w_enc).T)

    def process_sae_in(self, sae_in: Tensor) -> Tensor:
        """SAELens' own, of flattened matrices [...,K*V]; raises ValueError for others."""
        if sae_in.shape[-1] != self.cfg.d_in:
            raise ValueError(
                f"sae_in: expected [...,K*V] with K*V = {self.cfg.d_in}, got {list(sae_in.shape)}; flatten matrices "
                "with .flatten(-2)"
            )
        return super().process_sae_in(sae_in)

    def _built_once(self, name: str, build: Callable[[], Tensor]) -> Tensor:
        if self._built is None or not torch.is_grad_enabled():
            # A compiled graph is of plain tensors.
            return build() if torch.compiler.is_compiling() else build().as_subclass(ComputedMatrix)
        if name not in self._built:
            self._built[name] = build()  # of a training step, in which SAELens reads it
        return self._built[name]

    def decoder_norm(self) -> Tensor:
        """Frobenius norm of every atom [F], differentiable, from the factors alone."""
        if self.cfg.decoder == "flat":
            return self.decoder_matrix.norm(dim=1)
        return LowRank(self.v, self.w).norm()

    def encoder_norm(self) -> Tensor:
        """Norm of every encoder atom [F]."""
        if self.cfg.encoder == "tied":
            return self.decoder_norm() * self.encoder_scale
        if self.cfg.encoder == "dense":
            return self.encoder_matrix.norm(dim=0)
        return LowRank(self.v_enc, self.w_enc).norm()

    @torch.no_grad()
    def get_W_dec_norm(self) -> Tensor:
        return self.decoder_norm().clamp(min=1e-8)

    # ---------------------------------------------------------------------------------------- atoms

    @torch.no_grad()
    def atoms(self, indices: AtomIndex = slice(None)) -> LowRank:
        """Decoder atoms as low-rank matrices, exactly: N = n atoms of R terms; of a flat decoder all min(K, V) singular
        terms, which cost one K x V SVD an atom."""
        cfg = self.cfg
        if cfg.decoder == "flat":
            return LowRank.svd(self.decoder_matrix[indices].view(-1, cfg.d_k, cfg.d_v))
        return LowRank(self.v[indices].clone(), self.w[indices].clone())

    @torch.no_grad()
    def replace_atoms(self, indices: Tensor, atoms: LowRank, alive: Tensor) -> None:
        """Put unit-norm `atoms` at `indices` [n], in the decoder and in the encoder.

        They get the mean norm of the atoms where `alive` [F] on either side, and encoder biases of 0.
        """
        if not alive.any():
            alive = ~alive
        decoder = self.decoder_norm()[alive].mean().sqrt()  # roots: each of two factors gets one
        encoder = self.encoder_norm()[alive].mean().sqrt()
        new = {
            "v": atoms.keys * decoder,
            "w": atoms.values * decoder,
            "v_enc": atoms.keys * encoder,
            "w_enc": atoms.values * encoder,
        }
        new |= dict.fromkeys(("b_enc", "b_gate", "b_mag", "r_mag"), torch.zeros(()))
        if {"decoder_matrix", "encoder_matrix"} & self._parameters.keys():
            dense = atoms.dense().flatten(1)
            new["decoder_matrix"] = dense * decoder**2
            new["encoder_matrix"] = dense * encoder**2
        for name in new.keys() & self._parameters.keys():
            parameter = self.get_parameter(name).data
            by_atom = parameter.T if name == "encoder_matrix" else parameter
            by_atom[indices] = new[name].to(parameter)

    @torch.no_grad()
    def balance_factors(self) -> None:
        """Give both factors of every term the same norm. The atoms do not change, and Adam's steps, which have one size
        for all parameters, then turn both sides equally."""
        for left, right in (("v", "w"), ("v_enc", "w_enc")):
            if left in self._parameters:
                v = self.get_parameter(left)
                w = self.get_parameter(right)
                ratio = (w.norm(dim=-1, keepdim=True) / v.norm(dim=-1, keepdim=True)).sqrt()
                ratio = torch.where(ratio.isfinite() & (ratio > 0), ratio, 1.0)  # a term of zeros stays
                v.data.mul_(ratio)
                w.data.div_(ratio)

    # ---------------------------------------------------------------------------------------- the bias

    def settle_b_dec(self) -> None:
        """Make b_dec what `decode` adds to the atoms, which outside of training it is."""

    @torch.no_grad()
    def move_b_dec(self, error: Tensor) -> None:
        """Add `error` [K*V] to b_dec. Codes stay as they are: the encoder's biases add what it now subtracts."""
        self.b_dec.data.add_(error)
        if self.cfg.apply_b_dec_to_input:
            shift = error @ self.W_enc
            for name in {"b_enc", "b_gate", "b_mag"} & self._parameters.keys():
                gain = self.get_parameter("r_mag").exp() if name == "b_mag" else 1.0
                self.get_parameter(name).data.add_(shift * gain)

    # ---------------------------------------------------------------------------------------- folds

    def _scaled_weights(self, decoder: Tensor, encoder: Tensor) -> dict[str, Tensor]:
        """State-dict entries in which every atom is multiplied by `decoder` and its encoder by `encoder`, both
        positive, [F] or []."""
        of_factor = decoder.sqrt()[..., None, None]
        of_encoder_factor = encoder.sqrt()[..., None, None]
        scales = {
            "v": of_factor,
            "w": of_factor,
            "decoder_matrix": decoder[..., None],
            "v_enc": of_encoder_factor,
            "w_enc": of_encoder_factor,
            "encoder_matrix": encoder,
            "encoder_scale": encoder / decoder,  # a tied encoder reads the decoder, and so has its factor already
        }
        return {name: x * scales[name] for name, x in self.state_dict().items() if name in scales}

    @torch.no_grad()
    def _scale_in_place(self, decoder: Tensor, encoder: Tensor) -> None:
        for name, value in self._scaled_weights(decoder, encoder).items():
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
        if "b_enc" in self._parameters:
            self.b_enc.data.mul_(norms)
        return norms

    def fold_activation_whitening(self, mean: Tensor, whitening_matrix: Tensor, unwhitening_matrix: Tensor) -> None:
        """Refused: whitening mixes keys and values, so that an atom would lose its rank."""
        raise NotImplementedError(
            "Whitening mixes keys and values, so that an atom of rank R does not keep its rank. Use "
            "normalize_activations='expected_average_only_in'."
        )

    # ---------------------------------------------------------------------------------------- files

    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        """Weights of a checkpoint become those that `save_inference_model` would have saved: b_dec by the running
        means, atoms of norm 1 where SAELens folds norms, one threshold for BatchTopK. SAELens calls this as it loads.
        """
        super().process_state_dict_for_loading(state_dict)
        if CHECKPOINT_ENTRY not in state_dict or hasattr(self, CHECKPOINT_ENTRY):
            return
        metadata = self.cfg.metadata
        fields = self.cfg.to_dict() | (metadata.training_architecture_details or {})
        fields["architecture"] = metadata.training_architecture
        fields["device"] = "meta"  # where nothing is drawn
        in_training = TrainingSAE.from_dict(fields)
        in_training.load_state_dict(state_dict, assign=True)
        weights = in_training.state_dict()
        in_training.process_state_dict_for_saving_inference(weights)
        state_dict.clear()
        state_dict.update(weights)

    def save_model(self, path: str | Path) -> tuple[Path, Path]:
        """Save weights and config as SAELens does, with their checksums, which `load_sae` compares."""
        return with_checksums(super().save_model, path)

    @torch.no_grad()
    def to_saelens(self) -> SAE[Any]:
        """The same function as an autoencoder of SAELens' own class (TopK, JumpReLU, Standard or Gated), which loads
        without this package.

        `W_enc` [K*V,F] and `W_dec` [F,K*V] are built: 2 F K V numbers, instead of the factors. Activations and
        reconstructions are equal to rounding.
        """
        names = [
            name
            for name, (cls, _) in SAE_CLASS_REGISTRY.items()
            if isinstance(self, cls) and not issubclass(cls, MatrixSAE)
        ]
        metadata = {name: value for name, value in self.cfg.metadata.to_dict().items() if name != "requires"}
        changes = {"architecture": names[0], "device": "meta", "metadata": metadata}
        sae = SAE.from_dict(self.cfg.to_dict() | changes)
        contiguous = torch.contiguous_format  # a safetensors file holds no transposed view
        weights = {name: getattr(self, name).clone(memory_format=contiguous) for name in sae.state_dict()}
        sae.load_state_dict(weights, assign=True)
        sae.cfg.device = self.cfg.device
        return sae.to(self.device)


def khatri_rao(v: Tensor, w: Tensor) -> Tensor:
    """[F,R,K], [F,R,V] -> [F,K*V]: sum_r v_fr w_fr^T, flattened key-first."""
    return (v.mT @ w).flatten(1)


def with_checksums(save: Callable[[str | Path], tuple[Path, Path]], path: str | Path) -> tuple[Path, Path]:
    """`save` the two files of an autoencoder in the folder `path`, and `SHA256SUMS`; returns the two.

    SAELens writes the fields of cfg.json in an order that differs from process to process; here they are sorted.

    Raises:
        OSError: the folder cannot be written, the disk is full, or something is there that is not replaced
            (`atomic_files`); names the folder.
    """

    def write(aside: Path) -> None:
        config = save(aside)[1]
        config.write_text(json.dumps(json.loads(config.read_text()), sort_keys=True))

    atomic_files(Path(path), write)
    return Path(path) / SAE_WEIGHTS_FILENAME, Path(path) / SAE_CFG_FILENAME
