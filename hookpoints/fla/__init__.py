"""Models of flash-linear-attention (fla): importing it, older checkpoints, and what its models need."""

from hookpoints.fla.importing import MODEL_TYPES, import_fla, restore_auto_classes
from hookpoints.fla.scope import is_fla, wrap_model

__all__ = ["MODEL_TYPES", "import_fla", "is_fla", "restore_auto_classes", "wrap_model"]
