"""Matrix-atom sparse autoencoders for SAELens, and what to do with their atoms.

Importing this package registers six architectures in SAELens, after which its runners, metrics and patching utilities
take them like its own. This is the public surface; modules hold the details.
"""

from sae_lens_writesae.sae import (
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
from sae_lens_writesae.sae.base import AtomFactors, MatrixAtoms, MatrixAtomsConfig
from sae_lens_writesae.sae.hooked import HookedSAERecurrent
from sae_lens_writesae.sae.load import CheckpointError, load_sae
from sae_lens_writesae.sae.runner import (
    WriteSAETrainingRunner,
    register_model_class,
    text_dataset,
    train,
    training_config,
)
from sae_lens_writesae.sae.target import head_target
from sae_lens_writesae.sae.training import PAPER_RUNNER, MatrixTrainingConfig, calibrate_threshold, preset_b_dec
from sae_lens_writesae.steering import AtomScaling, Steering, scale_atoms, steer
from sae_lens_writesae.substitution import run_substitution
from sae_lens_writesae.substitution_config import SubstitutionConfig
from sae_lens_writesae.substitution_result import SubstitutionResult

register()
register_model_class()

__all__ = [
    "INFERENCE",
    "PAPER_RUNNER",
    "TRAINING",
    "VARIANTS",
    "AtomFactors",
    "AtomScaling",
    "CheckpointError",
    "HookedSAERecurrent",
    "MatrixAtoms",
    "MatrixAtomsConfig",
    "MatrixTrainingConfig",
    "Steering",
    "SubstitutionConfig",
    "SubstitutionResult",
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
    "WriteSAETrainingRunner",
    "WriteStandardSAE",
    "WriteStandardSAEConfig",
    "WriteStandardTrainingSAE",
    "WriteStandardTrainingSAEConfig",
    "WriteTopKSAE",
    "WriteTopKSAEConfig",
    "WriteTopKTrainingSAE",
    "WriteTopKTrainingSAEConfig",
    "calibrate_threshold",
    "head_target",
    "load_sae",
    "preset_b_dec",
    "register",
    "register_model_class",
    "run_substitution",
    "scale_atoms",
    "steer",
    "text_dataset",
    "train",
    "training_config",
]
