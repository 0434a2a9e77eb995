"""One file per update rule. A rule knows an op's arguments and the canonical recurrence, and nothing of hooks.

To add a family, write one file here with a class that follows ``base.Rule`` and add it to ``RULES``.
"""

from .base import Factors, OpResult, Rule
from .gated_delta import GatedDelta

RULES: tuple[Rule, ...] = (GatedDelta(),)
"""The rules that hookpoints can hook."""

REFUSED: dict[str, str] = {
    "gsa": "gated slot attention keeps two coupled states, not one",
    "hgrn": "HGRN keeps a vector, not a matrix: there is no rank-1 write",
    "titans": "Titans' memory is an MLP updated by gradient steps",
    "mesa_net": "MesaNet solves a linear system over its keys at each read",
    "xlstm": "xLSTM divides its reads by a second, normalising state",
}
"""Model types whose recurrence is not of this form, with the reason."""

__all__ = ["REFUSED", "RULES", "Factors", "GatedDelta", "OpResult", "Rule"]
