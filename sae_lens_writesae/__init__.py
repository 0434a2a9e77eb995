"""Matrix-atom sparse autoencoders for SAELens, and what to do with their atoms.

Importing this package registers six architectures in SAELens, after which its runners, metrics and patching utilities
take them like its own. This is the public surface. The classes of the architectures are in `sae_lens_writesae.sae`.
"""

from sae_lens_writesae.atom.low_rank import LowRank
from sae_lens_writesae.sae import INFERENCE, TRAINING, VARIANTS, MatrixSAE, MatrixTrainingSAE, register
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
from sae_lens_writesae.sae.training import PAPER_RUNNER, calibrate_threshold, preset_b_dec
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
    "AtomScaling",
    "CheckpointError",
    "HookedSAERecurrent",
    "LowRank",
    "MatrixSAE",
    "MatrixTrainingSAE",
    "Steering",
    "SubstitutionConfig",
    "SubstitutionResult",
    "WriteSAETrainingRunner",
    "calibrate_threshold",
    "head_target",
    "load_sae",
    "preset_b_dec",
    "run_substitution",
    "scale_atoms",
    "steer",
    "text_dataset",
    "train",
    "training_config",
]
