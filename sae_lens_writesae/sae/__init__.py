"""The seven architectures and their place in SAELens' registry."""

from typing import Any

from sae_lens.registry import (
    SAE_CLASS_REGISTRY,
    SAE_TRAINING_CLASS_REGISTRY,
    register_sae_class,
    register_sae_training_class,
)
from sae_lens.saes.sae import SAE, SAEConfig, TrainingSAE, TrainingSAEConfig

from sae_lens_writesae.choices import VARIANTS
from sae_lens_writesae.sae.base import MatrixSAE, MatrixSAEConfig
from sae_lens_writesae.sae.batchtopk import WriteBatchTopKTrainingSAE, WriteBatchTopKTrainingSAEConfig
from sae_lens_writesae.sae.gated import (
    WriteGatedSAE,
    WriteGatedSAEConfig,
    WriteGatedTrainingSAE,
    WriteGatedTrainingSAEConfig,
)
from sae_lens_writesae.sae.jumprelu import (
    WriteJumpReLUSAE,
    WriteJumpReLUSAEConfig,
    WriteJumpReLUTrainingSAE,
    WriteJumpReLUTrainingSAEConfig,
)
from sae_lens_writesae.sae.matryoshka import WriteMatryoshkaTrainingSAE, WriteMatryoshkaTrainingSAEConfig
from sae_lens_writesae.sae.product import (
    WriteProductSAE,
    WriteProductSAEConfig,
    WriteProductTrainingSAE,
    WriteProductTrainingSAEConfig,
)
from sae_lens_writesae.sae.standard import (
    WriteStandardSAE,
    WriteStandardSAEConfig,
    WriteStandardTrainingSAE,
    WriteStandardTrainingSAEConfig,
)
from sae_lens_writesae.sae.topk import (
    WriteTopKSAE,
    WriteTopKSAEConfig,
    WriteTopKTrainingSAE,
    WriteTopKTrainingSAEConfig,
)
from sae_lens_writesae.sae.training import MatrixTrainingSAE, MatrixTrainingSAEConfig

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


def register() -> None:
    """Put the architectures in SAELens' registry. This package does so on import; repeating it is harmless.

    Raises:
        ValueError: another class has one of the names.
    """
    # Inference first: a training config looks its inference config up.
    for name, pair in INFERENCE.items():
        if SAE_CLASS_REGISTRY.get(name) != pair:
            register_sae_class(name, *pair)
    for name, pair in TRAINING.items():
        if SAE_TRAINING_CLASS_REGISTRY.get(name) != pair:
            register_sae_training_class(name, *pair)


register()

__all__ = [
    "INFERENCE",
    "TRAINING",
    "VARIANTS",
    "MatrixSAE",
    "MatrixSAEConfig",
    "MatrixTrainingSAE",
    "MatrixTrainingSAEConfig",
    "WriteBatchTopKTrainingSAE",
    "WriteBatchTopKTrainingSAEConfig",
    "WriteGatedSAE",
    "WriteGatedSAEConfig",
    "WriteGatedTrainingSAE",
    "WriteGatedTrainingSAEConfig",
    "WriteJumpReLUSAE",
    "WriteJumpReLUSAEConfig",
    "WriteJumpReLUTrainingSAE",
    "WriteJumpReLUTrainingSAEConfig",
    "WriteMatryoshkaTrainingSAE",
    "WriteMatryoshkaTrainingSAEConfig",
    "WriteProductSAE",
    "WriteProductSAEConfig",
    "WriteProductTrainingSAE",
    "WriteProductTrainingSAEConfig",
    "WriteStandardSAE",
    "WriteStandardSAEConfig",
    "WriteStandardTrainingSAE",
    "WriteStandardTrainingSAEConfig",
    "WriteTopKSAE",
    "WriteTopKSAEConfig",
    "WriteTopKTrainingSAE",
    "WriteTopKTrainingSAEConfig",
    "register",
]
