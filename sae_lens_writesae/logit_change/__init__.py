"""Logit change: what an atom added to a write does to later logits, by formula and by edit.

`run_logit_change` is the evaluation; `predictors` has the formulas, `scores` how they are scored.
"""

from sae_lens_writesae.logit_change.config import LogitChangeConfig
from sae_lens_writesae.logit_change.result import LogitChange
from sae_lens_writesae.logit_change.run import run_logit_change

__all__ = ["LogitChange", "LogitChangeConfig", "run_logit_change"]
