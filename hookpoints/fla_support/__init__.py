"""Models of flash-linear-attention (fla), on a CPU as well: importing it, and torch in the place of its kernels."""

from .auto_classes import restore_auto_classes
from .checkpoints import load_checkpoint
from .importing import MODEL_TYPES, import_fla
from .scope import ModelScope, is_fla, substituting

__all__ = [
    "MODEL_TYPES",
    "ModelScope",
    "import_fla",
    "is_fla",
    "load_checkpoint",
    "restore_auto_classes",
    "substituting",
]
