"""The six architectures, one file each, and their place in SAELens' registry."""

from typing import Any

from sae_lens.registry import (
    SAE_CLASS_REGISTRY,
    SAE_TRAINING_CLASS_REGISTRY,
    register_sae_class,
    register_sae_training_class,
)

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

INFERENCE: dict[str, tuple[type[Any], type[Any]]] = {
    "writesae_topk": (WriteTopKSAE, WriteTopKSAEConfig),
    "writesae_jumprelu": (WriteJumpReLUSAE, WriteJumpReLUSAEConfig),
    "writesae_standard": (WriteStandardSAE, WriteStandardSAEConfig),
    "writesae_gated": (WriteGatedSAE, WriteGatedSAEConfig),
}
"""Architecture -> (class, config) for inference."""

TRAINING: dict[str, tuple[type[Any], type[Any]]] = {
    "writesae_topk": (WriteTopKTrainingSAE, WriteTopKTrainingSAEConfig),
    "writesae_batchtopk": (WriteBatchTopKTrainingSAE, WriteBatchTopKTrainingSAEConfig),
    "writesae_matryoshka": (WriteMatryoshkaTrainingSAE, WriteMatryoshkaTrainingSAEConfig),
    "writesae_jumprelu": (WriteJumpReLUTrainingSAE, WriteJumpReLUTrainingSAEConfig),
    "writesae_standard": (WriteStandardTrainingSAE, WriteStandardTrainingSAEConfig),
    "writesae_gated": (WriteGatedTrainingSAE, WriteGatedTrainingSAEConfig),
}
"""Architecture -> (class, config) for training. BatchTopK and Matryoshka are exported as `writesae_jumprelu`."""

VARIANTS: dict[str, dict[str, Any]] = {
    "WriteSAE": {"encoder": "bilinear", "decoder": "rank", "rank": 1},
    "TiedSAE": {"encoder": "tied", "decoder": "rank", "rank": 1},
    "MatrixSAE": {"encoder": "dense", "decoder": "rank", "rank": 1},
    "BilinearFlatSAE": {"encoder": "bilinear", "decoder": "flat", "rank": 1},
    "FlatSAE": {"encoder": "dense", "decoder": "flat", "rank": 1},
    "WriteSAE-rank2": {"encoder": "bilinear", "decoder": "rank", "rank": 2},
    "WriteSAE-rank4": {"encoder": "bilinear", "decoder": "rank", "rank": 4},
}
"""The paper's variants as config fields, for any architecture. (Its BilinearSAE, "untied", is the WriteSAE.)"""


def register() -> None:
    """Put the architectures in SAELens' registry; done on import, harmless when repeated.

    Raises:
        ValueError: the name is taken by another class.
    """
    # Inference first: a training config looks its inference config up.
    _register(INFERENCE, SAE_CLASS_REGISTRY, register_sae_class)
    _register(TRAINING, SAE_TRAINING_CLASS_REGISTRY, register_sae_training_class)


def _register(classes: dict[str, tuple[type[Any], type[Any]]], registry: Any, add: Any) -> None:
    for name, pair in classes.items():
        if registry.get(name) != pair:
            add(name, *pair)
