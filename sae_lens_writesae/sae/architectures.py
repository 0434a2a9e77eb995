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
from typing import Any

from sae_lens.registry import (
    register_sae_class,
    register_sae_training_class,
)
from sae_lens.saes import batchtopk_sae, gated_sae, jumprelu_sae, matryoshka_batchtopk_sae, standard_sae, topk_sae
from sae_lens.saes.sae import SAE, SAEConfig, TrainingSAE, TrainingSAEConfig

from sae_lens_writesae.sae.matrix import MatrixSAE, MatrixSAEConfig
from sae_lens_writesae.sae.product import (
    WriteProductSAE,
    WriteProductSAEConfig,
    WriteProductTrainingSAE,
    WriteProductTrainingSAEConfig,
)
from sae_lens_writesae.sae.training import MatrixTrainingSAE, MatrixTrainingSAEConfig


@dataclass
class WriteTopKSAEConfig(MatrixSAEConfig, topk_sae.TopKSAEConfig):
    _name = "writesae_topk"


@dataclass
class WriteJumpReLUSAEConfig(MatrixSAEConfig, jumprelu_sae.JumpReLUSAEConfig):
    _name = "writesae_jumprelu"


@dataclass
class WriteStandardSAEConfig(MatrixSAEConfig, standard_sae.StandardSAEConfig):
    _name = "writesae_standard"


@dataclass
class WriteGatedSAEConfig(MatrixSAEConfig, gated_sae.GatedSAEConfig):
    _name = "writesae_gated"


@dataclass
class WriteTopKTrainingSAEConfig(MatrixTrainingSAEConfig, topk_sae.TopKTrainingSAEConfig):
    _name = "writesae_topk"

    k: int = 32
    """Active atoms per matrix (the paper's 32)."""
    aux_loss_coefficient: float = 1e-2
    """Weight of the auxiliary loss: 1e-2 in the paper, 1 in its code and in SAELens, 1/32 in Gao et al."""


@dataclass
class WriteBatchTopKTrainingSAEConfig(WriteTopKTrainingSAEConfig, batchtopk_sae.BatchTopKTrainingSAEConfig):
    """Exported as `writesae_jumprelu`, because at inference there is no batch to rank in."""

    _name = "writesae_batchtopk"

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

    _name = "writesae_matryoshka"


@dataclass
class WriteJumpReLUTrainingSAEConfig(MatrixTrainingSAEConfig, jumprelu_sae.JumpReLUTrainingSAEConfig):
    _name = "writesae_jumprelu"


@dataclass
class WriteStandardTrainingSAEConfig(MatrixTrainingSAEConfig, standard_sae.StandardTrainingSAEConfig):
    _name = "writesae_standard"


@dataclass
class WriteGatedTrainingSAEConfig(MatrixTrainingSAEConfig, gated_sae.GatedTrainingSAEConfig):
    _name = "writesae_gated"


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


INFERENCE: dict[str, tuple[type[SAE[Any]], type[SAEConfig]]] = {
    "writesae_topk": (WriteTopKSAE, WriteTopKSAEConfig),
    "writesae_jumprelu": (WriteJumpReLUSAE, WriteJumpReLUSAEConfig),
    "writesae_standard": (WriteStandardSAE, WriteStandardSAEConfig),
    "writesae_gated": (WriteGatedSAE, WriteGatedSAEConfig),
    "writesae_product": (WriteProductSAE, WriteProductSAEConfig),
}
"""Architecture -> (class, config) for inference."""

TRAINING: dict[str, tuple[type[TrainingSAE[Any]], type[TrainingSAEConfig]]] = {
    "writesae_topk": (WriteTopKTrainingSAE, WriteTopKTrainingSAEConfig),
    "writesae_batchtopk": (WriteBatchTopKTrainingSAE, WriteBatchTopKTrainingSAEConfig),
    "writesae_matryoshka": (WriteMatryoshkaTrainingSAE, WriteMatryoshkaTrainingSAEConfig),
    "writesae_jumprelu": (WriteJumpReLUTrainingSAE, WriteJumpReLUTrainingSAEConfig),
    "writesae_standard": (WriteStandardTrainingSAE, WriteStandardTrainingSAEConfig),
    "writesae_gated": (WriteGatedTrainingSAE, WriteGatedTrainingSAEConfig),
    "writesae_product": (WriteProductTrainingSAE, WriteProductTrainingSAEConfig),
}
"""Architecture -> (class, config) for training. BatchTopK and Matryoshka are exported as `writesae_jumprelu`."""


# Inference first: a training config looks its inference config up.
for _name, _pair in INFERENCE.items():
    register_sae_class(_name, *_pair)
for _name, _training in TRAINING.items():
    register_sae_training_class(_name, *_training)
