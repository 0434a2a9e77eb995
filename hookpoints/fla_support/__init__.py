"""Models of flash-linear-attention (fla), on a CPU as well: importing it, and torch in the place of its kernels."""

from .importing import MODEL_TYPES, import_fla
from .scope import ModelScope, is_fla, substituting

__all__ = ["MODEL_TYPES", "ModelScope", "import_fla", "is_fla", "substituting"]
