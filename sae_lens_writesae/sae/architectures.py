"""SAELens' architectures on matrix atoms, and their place in its registry.

A class takes SAELens' class of the same architecture between two bases of this package, and adds nothing to it:
`MatrixTrainingSAE` (upkeep, what is saved) comes first and `MatrixSAE` (weights from factors) last. For gated
autoencoders the paper tried a hard gate and a soft one, sigmoid(z / tau), which is never zero, so that L0 and firings
are not defined; here the gate is SAELens' step (Rajamanoharan et al. 2024, arXiv 2404.16014).
"""

# pyright: reportIncompatibleVariableOverride=false
# (Both bases declare `cfg`, and the config that a class is given has the fields of both.)
# No postponed annotations here: SAELens' command line evaluates those of config fields in another module.
from dataclasses import dataclass
from typing import Any, cast

import torch
from sae_lens.registry import (
    SAE_TRAINING_CLASS_REGISTRY,
    register_sae_class,
    register_sae_training_class,
)
from sae_lens.saes import (
    batchtopk_sae,
    gated_sae,
    jumprelu_sae,
    matching_pursuit_sae,
    matryoshka_batchtopk_sae,
    standard_sae,
    topk_sae,
)
from sae_lens.saes.sae import SAE, SAEConfig, TrainingSAE
from torch import Tensor
from torch.nn.functional import one_hot

from hookpoints.errors import nearest
from sae_lens_writesae.choices import Encoder
from sae_lens_writesae.sae.matrix import MatrixSAE, MatrixSAEConfig
from sae_lens_writesae.sae.training import MatrixTrainingSAE, MatrixTrainingSAEConfig


@dataclass
class WriteTopKSAEConfig(MatrixSAEConfig, topk_sae.TopKSAEConfig):
    """Config of TopK."""


@dataclass
class WriteJumpReLUSAEConfig(MatrixSAEConfig, jumprelu_sae.JumpReLUSAEConfig):
    """Config of JumpReLU."""


@dataclass
class WriteStandardSAEConfig(MatrixSAEConfig, standard_sae.StandardSAEConfig):
    """Config of Standard."""


@dataclass
class WriteGatedSAEConfig(MatrixSAEConfig, gated_sae.GatedSAEConfig):
    """Config of Gated."""


@dataclass
class WriteTopKTrainingSAEConfig(MatrixTrainingSAEConfig, topk_sae.TopKTrainingSAEConfig):
    """Config of TopK in training."""

    k: int = 32
    """Active atoms per matrix (the paper's 32)."""
    aux_loss_coefficient: float = 1e-2
    """Weight of the auxiliary loss: 1e-2 in the paper, 1 in its code and in SAELens, 1/32 in Gao et al."""


@dataclass
class WriteBatchTopKTrainingSAEConfig(WriteTopKTrainingSAEConfig, batchtopk_sae.BatchTopKTrainingSAEConfig):
    """Exported as `writesae_jumprelu`, because at inference there is no batch to rank in."""

    k: float = 32  # pyright: ignore[reportIncompatibleVariableOverride]
    """Active atoms per matrix, on average over the batch."""
    topk_threshold_lr: float = 0.3
    """Weight of a new batch in the running mean of the threshold that is exported. SAELens' 0.01 starts from zero,
    which is far too low after a short run; a slower mean lags behind the weights. `calibrate_threshold` sets the
    threshold for given data."""

    def get_inference_config_class(self) -> type[SAEConfig]:
        return WriteJumpReLUSAEConfig


@dataclass
class WriteMatryoshkaTrainingSAEConfig(
    WriteBatchTopKTrainingSAEConfig, matryoshka_batchtopk_sae.MatryoshkaBatchTopKTrainingSAEConfig
):
    """`matryoshka_widths` is required (Bussmann et al. 2025, arXiv 2503.17547)."""


@dataclass
class WriteJumpReLUTrainingSAEConfig(MatrixTrainingSAEConfig, jumprelu_sae.JumpReLUTrainingSAEConfig):
    """Config of JumpReLU in training."""


@dataclass
class WriteStandardTrainingSAEConfig(MatrixTrainingSAEConfig, standard_sae.StandardTrainingSAEConfig):
    """Config of Standard in training."""


@dataclass
class WriteGatedTrainingSAEConfig(MatrixTrainingSAEConfig, gated_sae.GatedTrainingSAEConfig):
    """Config of Gated in training."""


@dataclass
class WriteMatchingPursuitSAEConfig(MatrixSAEConfig, matching_pursuit_sae.MatchingPursuitSAEConfig):
    """`k` iterations for every matrix; SAELens' three fields that would stop some earlier are not used. One that was
    trained in a metric has an untied encoder."""

    k: int = 4
    """Atoms that are taken one after the other."""


@dataclass
class WriteMatchingPursuitTrainingSAEConfig(
    WriteMatchingPursuitSAEConfig, MatrixTrainingSAEConfig, matching_pursuit_sae.MatchingPursuitTrainingSAEConfig
):
    encoder: Encoder = "tied"
    unit_norm_every: int = 0
    """Norms of atoms have no effect."""
    b_dec_rows: int = 0
    """Codes would follow a change of b_dec."""


class _Pursuit(MatrixSAE):
    """Matching pursuit (Mallat and Zhang 1993): k times the atom that explains most of what is left, |<E_f, X>|^2 /
    <E_f, A_f>, with the coefficient <E_f, X> / <E_f, A_f>, as far as it is positive. The encoder E is tied to the atoms
    A, and then this is SAELens' encoder on atoms of any norm; `Metric.fold` gives E = (metric) A, so that the choice
    and the coefficients are those of the metric."""

    W_enc = MatrixSAE.W_enc  # pyright: ignore  (SAELens' class has one too)

    def encode(self, x: Tensor) -> Tensor:
        """Activations [...,F] of [...,K*V]. Costs k F K V."""
        residual = self.process_sae_in(x)
        encoder = self.W_enc
        atoms = self.W_dec
        acts = torch.zeros(())
        # <E_f, A_f>: the squared norm of a tied atom, in the metric where there is one.
        size = (encoder.T * atoms).sum(1).abs().clamp_min(torch.finfo(atoms.dtype).tiny)
        for _ in range(cast(WriteMatchingPursuitSAEConfig, self.cfg).k):
            coefficients = (residual @ encoder).relu() / size
            # What an atom explains, coefficient^2 * size, is largest where its root is.
            best = (coefficients * size.sqrt()).argmax(-1)
            taken = coefficients * one_hot(best, len(size))
            acts = acts + taken
            residual = residual - taken @ atoms
        return acts

    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        acts = self.encode(x)
        return acts, torch.zeros_like(acts)

    def to_saelens(self) -> SAE[Any]:
        """Refused: SAELens' class needs atoms of norm 1, and has no metric."""
        raise NotImplementedError("writesae_matching_pursuit has atoms of any norm; load it with this package")


class WriteTopKSAE(topk_sae.TopKSAE, MatrixSAE):
    """The k most active atoms of each matrix (Gao et al. 2024, arXiv 2406.04093)."""


class WriteJumpReLUSAE(jumprelu_sae.JumpReLUSAE, MatrixSAE):
    """A threshold per atom (Rajamanoharan et al. 2024, arXiv 2407.14435)."""


class WriteStandardSAE(standard_sae.StandardSAE, MatrixSAE):
    """ReLU."""


class WriteGatedSAE(gated_sae.GatedSAE, MatrixSAE):
    """A gate and a magnitude."""


class WriteTopKTrainingSAE(MatrixTrainingSAE, topk_sae.TopKTrainingSAE):
    """TopK in training. Exported with unit-norm atoms."""


class WriteBatchTopKTrainingSAE(MatrixTrainingSAE, batchtopk_sae.BatchTopKTrainingSAE):
    """k active atoms per matrix on average over a batch (Bussmann et al. 2024, arXiv 2412.06410)."""


class WriteMatryoshkaTrainingSAE(MatrixTrainingSAE, matryoshka_batchtopk_sae.MatryoshkaBatchTopKTrainingSAE):
    """Nested BatchTopK."""


class WriteJumpReLUTrainingSAE(MatrixTrainingSAE, jumprelu_sae.JumpReLUTrainingSAE):
    """JumpReLU in training."""


class WriteStandardTrainingSAE(MatrixTrainingSAE, standard_sae.StandardTrainingSAE):
    """ReLU with an L1 penalty."""


class WriteGatedTrainingSAE(MatrixTrainingSAE, gated_sae.GatedTrainingSAE):
    """Gated in training."""


class WriteMatchingPursuitSAE(_Pursuit, matching_pursuit_sae.MatchingPursuitSAE):  # pyright: ignore  (W_enc)
    """Atoms chosen one after the other, each from what the ones before it leave."""


class WriteMatchingPursuitTrainingSAE(_Pursuit, MatrixTrainingSAE, matching_pursuit_sae.MatchingPursuitTrainingSAE):
    """Matching pursuit in training, through the choices of its atoms."""


INFERENCE: dict[str, tuple[type[SAE[Any]], type[MatrixSAEConfig]]] = {
    "writesae_topk": (WriteTopKSAE, WriteTopKSAEConfig),
    "writesae_jumprelu": (WriteJumpReLUSAE, WriteJumpReLUSAEConfig),
    "writesae_standard": (WriteStandardSAE, WriteStandardSAEConfig),
    "writesae_gated": (WriteGatedSAE, WriteGatedSAEConfig),
    "writesae_matching_pursuit": (WriteMatchingPursuitSAE, WriteMatchingPursuitSAEConfig),
}
"""Architecture -> (class, config) for inference."""

TRAINING: dict[str, tuple[type[TrainingSAE[Any]], type[MatrixTrainingSAEConfig]]] = {
    "writesae_topk": (WriteTopKTrainingSAE, WriteTopKTrainingSAEConfig),
    "writesae_batchtopk": (WriteBatchTopKTrainingSAE, WriteBatchTopKTrainingSAEConfig),
    "writesae_matryoshka": (WriteMatryoshkaTrainingSAE, WriteMatryoshkaTrainingSAEConfig),
    "writesae_jumprelu": (WriteJumpReLUTrainingSAE, WriteJumpReLUTrainingSAEConfig),
    "writesae_standard": (WriteStandardTrainingSAE, WriteStandardTrainingSAEConfig),
    "writesae_gated": (WriteGatedTrainingSAE, WriteGatedTrainingSAEConfig),
    "writesae_matching_pursuit": (WriteMatchingPursuitTrainingSAE, WriteMatchingPursuitTrainingSAEConfig),
}
"""Architecture -> (class, config) for training. BatchTopK and Matryoshka are exported as `writesae_jumprelu`."""


EXPORTED = {"writesae_batchtopk": "writesae_jumprelu", "writesae_matryoshka": "writesae_jumprelu"}
"""Architecture in training -> the one for inference, where the two differ. SAELens finds the class of a checkpoint by
the first."""


# Inference first: a training config looks its inference config up.
for _register, _classes in ((register_sae_class, INFERENCE), (register_sae_training_class, TRAINING)):
    for _name, (_class, _config) in _classes.items():
        _config._name = _name
        _register(_name, _class, _config)  # pyright: ignore[reportArgumentType]  (each table has its own types)
for _name, _exported in EXPORTED.items():
    register_sae_class(_name, *INFERENCE[_exported])


def training_config_class(architecture: str) -> type[MatrixTrainingSAEConfig]:
    """The training config of an architecture of matrix atoms.

    Raises:
        ValueError: it is not registered, or is one of SAELens' own; names the nearest.
    """
    known = {
        name: config
        for name, (_, config) in SAE_TRAINING_CLASS_REGISTRY.items()
        if issubclass(config, MatrixTrainingSAEConfig)
    }
    if architecture not in known:
        in_full = f"writesae_{architecture.removeprefix('writesae_')}"  # of SAELens' own, the one on matrix atoms
        raise ValueError(
            f"architecture: expected one of {', '.join(known)}, got {architecture!r}{nearest(in_full, known)}"
        )
    return known[architecture]
