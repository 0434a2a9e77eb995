"""What a WriteSAE is to be compared with: other architectures, and directions that need no dictionary."""

from sae_lens_writesae.baselines.config import BaselinesConfig
from sae_lens_writesae.baselines.pca import MatrixPca, fit_pca
from sae_lens_writesae.baselines.result import Baselines
from sae_lens_writesae.baselines.run import run_baselines
from sae_lens_writesae.baselines.variants import matched_flat, parameters, variant

__all__ = [
    "Baselines",
    "BaselinesConfig",
    "MatrixPca",
    "fit_pca",
    "matched_flat",
    "parameters",
    "run_baselines",
    "variant",
]
