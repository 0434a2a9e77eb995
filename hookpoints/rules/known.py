"""The rules that hookpoints can hook: its own, and those of plug-ins. It imports the plug-ins, which
import ``hookpoints.rules`` and not this module."""

from __future__ import annotations

from importlib.metadata import entry_points

from hookpoints.rules.base import Rule
from hookpoints.rules.delta_product import GATED_DELTA_PRODUCT
from hookpoints.rules.mamba1 import MAMBA1
from hookpoints.rules.mamba2 import MAMBA2
from hookpoints.rules.refused import NOT_HOOKED
from hookpoints.rules.rwkv7 import FLA_RWKV7, RWKV7
from hookpoints.rules.tables import (
    FLA_DELTA,
    FLA_GATED_DELTA,
    FLA_GLA,
    FLA_KIMI_DELTA,
    FLA_RWKV6,
    GATED_DELTA,
    KIMI_DELTA,
)

GROUP = "hookpoints.rules"
"""Entry points of this group are rules of other distributions, each under a model type whose layers call its op."""
OWN_RULES: tuple[Rule, ...] = (
    GATED_DELTA,
    KIMI_DELTA,
    MAMBA2,
    MAMBA1,
    RWKV7,
    FLA_RWKV7,
    FLA_DELTA,
    FLA_GATED_DELTA,
    FLA_GLA,
    FLA_KIMI_DELTA,
    GATED_DELTA_PRODUCT,
    FLA_RWKV6,
)
"""The rules that come with hookpoints."""


def installed_rules() -> dict[str, Rule]:
    """Rules of other distributions, by the names of their entry points. Costs one look at all that is installed."""
    return {point.name: point.load() for point in entry_points(group=GROUP)}


_INSTALLED = installed_rules()
RULES: tuple[Rule, ...] = (*OWN_RULES, *_INSTALLED.values())
"""The rules that hookpoints can hook: its own, and those of plug-ins."""
REFUSED = {model_type: reason for model_type, reason in NOT_HOOKED.items() if model_type not in _INSTALLED}
"""Model types that are not hooked, with the reason."""
