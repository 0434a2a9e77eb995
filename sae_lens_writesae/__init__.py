"""Matrix-atom sparse autoencoders for SAELens.

Importing this package registers its architectures in SAELens, after which its runners, metrics and patching utilities
take them like its own. These are the names that most programs need; the classes of the architectures are in
`sae_lens_writesae.sae`. What atoms do is tested by the package `writesae`.
"""

from importlib.metadata import PackageNotFoundError, version

# First: it settles how threads wait, before torch loads.
import hookpoints  # noqa: F401
from sae_lens_writesae.atom.low_rank import LowRank
from sae_lens_writesae.sae import VARIANTS, MatrixSAE, MatrixTrainingSAE
from sae_lens_writesae.sae.collecting import collect
from sae_lens_writesae.sae.factors import Collection
from sae_lens_writesae.sae.hooked import HookedSAERecurrent
from sae_lens_writesae.sae.load import load_sae
from sae_lens_writesae.sae.metric import Metric
from sae_lens_writesae.sae.metric_fit import fit_metrics
from sae_lens_writesae.sae.runner import train, training_config
from sae_lens_writesae.sae.target import head_target
from sae_lens_writesae.sae.texts import text_dataset
from sae_lens_writesae.sae.training import PAPER_RUNNER, calibrate_threshold
from sae_lens_writesae.steering import scale_atoms, steer

try:
    __version__ = version("sae-lens-writesae")
except PackageNotFoundError:  # used from a folder, without an installation
    __version__ = "unknown"

__all__ = [
    "PAPER_RUNNER",
    "VARIANTS",
    "Collection",
    "HookedSAERecurrent",
    "LowRank",
    "MatrixSAE",
    "MatrixTrainingSAE",
    "Metric",
    "calibrate_threshold",
    "collect",
    "fit_metrics",
    "head_target",
    "load_sae",
    "scale_atoms",
    "steer",
    "text_dataset",
    "train",
    "training_config",
]
