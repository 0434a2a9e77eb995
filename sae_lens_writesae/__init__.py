"""Matrix-atom sparse autoencoders for SAELens, and tests of what their atoms do.

Importing this package registers seven architectures in SAELens, after which its runners, metrics and patching utilities
take them like its own. These are the names that most programs need. The classes of the architectures are in
`sae_lens_writesae.sae`, every evaluation in `sae_lens_writesae.evaluations`, by its kind in `EVALUATIONS`.

The command line (the module `writesae`) imports by itself what a command needs, so that help costs nothing.
"""

import sys
from importlib.metadata import PackageNotFoundError, version

if "writesae" not in sys.modules:
    import hookpoints  # noqa: F401  (first: it settles how threads wait, before torch loads)
    from sae_lens_writesae.atom.low_rank import LowRank
    from sae_lens_writesae.evaluations import EVALUATIONS, Evaluation, Result, load_result
    from sae_lens_writesae.evaluations.substitution import Substitution
    from sae_lens_writesae.experiment.head import half_lives
    from sae_lens_writesae.experiment.quality import dictionary_quality, head_effects
    from sae_lens_writesae.experiment.tokens import sample_sequences
    from sae_lens_writesae.page.report import write_report
    from sae_lens_writesae.sae import VARIANTS, MatrixSAE, MatrixTrainingSAE
    from sae_lens_writesae.sae.collect import collect
    from sae_lens_writesae.sae.collection import Collection
    from sae_lens_writesae.sae.hooked import HookedSAERecurrent
    from sae_lens_writesae.sae.load import load_sae
    from sae_lens_writesae.sae.metric import Metric
    from sae_lens_writesae.sae.metric_fit import fit_metrics
    from sae_lens_writesae.sae.runner import (
        WriteSAETrainingRunner,
        text_dataset,
        train,
        training_config,
    )
    from sae_lens_writesae.sae.stack import train_many_on_writes
    from sae_lens_writesae.sae.target import head_target
    from sae_lens_writesae.sae.training import PAPER_RUNNER, calibrate_b_dec, calibrate_threshold, preset_b_dec
    from sae_lens_writesae.sae.writes import train_on_writes
    from sae_lens_writesae.steering import scale_atoms, steer

try:
    __version__ = version("sae-lens-writesae")
except PackageNotFoundError:  # used from a folder, without an installation
    __version__ = "unknown"

__all__ = [
    "EVALUATIONS",
    "PAPER_RUNNER",
    "VARIANTS",
    "Collection",
    "Evaluation",
    "HookedSAERecurrent",
    "LowRank",
    "MatrixSAE",
    "MatrixTrainingSAE",
    "Metric",
    "Result",
    "Substitution",
    "WriteSAETrainingRunner",
    "calibrate_b_dec",
    "calibrate_threshold",
    "collect",
    "dictionary_quality",
    "fit_metrics",
    "half_lives",
    "head_effects",
    "head_target",
    "load_result",
    "load_sae",
    "preset_b_dec",
    "sample_sequences",
    "scale_atoms",
    "steer",
    "text_dataset",
    "train",
    "train_many_on_writes",
    "train_on_writes",
    "training_config",
    "write_report",
]
