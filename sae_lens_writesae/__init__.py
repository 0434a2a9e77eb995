"""Matrix-atom sparse autoencoders for SAELens, and what to do with their atoms.

Importing this package registers six architectures in SAELens, after which its runners, metrics and patching utilities
take them like its own. This is the public surface; modules hold the details.
"""

from sae_lens_writesae.architectures import (
    INFERENCE,
    TRAINING,
    VARIANTS,
    WriteBatchTopKTrainingSAE,
    WriteBatchTopKTrainingSAEConfig,
    WriteGatedSAE,
    WriteGatedSAEConfig,
    WriteGatedTrainingSAE,
    WriteGatedTrainingSAEConfig,
    WriteJumpReLUSAE,
    WriteJumpReLUSAEConfig,
    WriteJumpReLUTrainingSAE,
    WriteJumpReLUTrainingSAEConfig,
    WriteMatryoshkaTrainingSAE,
    WriteMatryoshkaTrainingSAEConfig,
    WriteStandardSAE,
    WriteStandardSAEConfig,
    WriteStandardTrainingSAE,
    WriteStandardTrainingSAEConfig,
    WriteTopKSAE,
    WriteTopKSAEConfig,
    WriteTopKTrainingSAE,
    WriteTopKTrainingSAEConfig,
    register,
)
from sae_lens_writesae.atoms import AtomFactors, MatrixAtoms, MatrixAtomsConfig
from sae_lens_writesae.loading import CheckpointError, load_sae
from sae_lens_writesae.training import PAPER_RUNNER, MatrixTrainingConfig, calibrate_threshold, preset_b_dec

register()

__all__ = [
    "INFERENCE",
    "PAPER_RUNNER",
    "TRAINING",
    "VARIANTS",
    "AtomFactors",
    "CheckpointError",
    "MatrixAtoms",
    "MatrixAtomsConfig",
    "MatrixTrainingConfig",
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
    "WriteStandardSAE",
    "WriteStandardSAEConfig",
    "WriteStandardTrainingSAE",
    "WriteStandardTrainingSAEConfig",
    "WriteTopKSAE",
    "WriteTopKSAEConfig",
    "WriteTopKTrainingSAE",
    "WriteTopKTrainingSAEConfig",
    "calibrate_threshold",
    "load_sae",
    "preset_b_dec",
    "register",
]
