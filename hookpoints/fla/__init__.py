"""Models of flash-linear-attention (fla), on a CPU as well: importing it, and torch in the place of its kernels."""

from hookpoints.fla.checkpoints import load_checkpoint
from hookpoints.fla.importing import MODEL_TYPES, import_fla, restore_auto_classes
from hookpoints.fla.scope import ModelScope, is_fla, substituting

__all__ = [
    "MODEL_TYPES",
    "ModelScope",
    "import_fla",
    "is_fla",
    "load_checkpoint",
    "restore_auto_classes",
    "substituting",
]
