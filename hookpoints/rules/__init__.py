"""One file per update rule. A rule knows an op's arguments and the canonical recurrence, and nothing of hooks.

To add a family, write one file here with a class that follows ``base.Rule`` and add it to ``RULES``.
"""

from hookpoints.rules.base import Factors, OpResult, Rule
from hookpoints.rules.comba import FlaComba
from hookpoints.rules.delta_product import FlaGatedDeltaProduct
from hookpoints.rules.fla_delta import FlaDelta
from hookpoints.rules.fla_gated_delta import FlaGatedDelta
from hookpoints.rules.fla_gla import FlaGatedLinear
from hookpoints.rules.fla_kda import FlaKimiDelta
from hookpoints.rules.fla_simple_gla import FlaRetention, FlaSimpleGatedLinear
from hookpoints.rules.gated_delta import GatedDelta
from hookpoints.rules.kda import KimiDelta
from hookpoints.rules.mamba2 import Mamba2
from hookpoints.rules.refused import REFUSED, REFUSED_LAYERS
from hookpoints.rules.rwkv6 import FlaRWKV6
from hookpoints.rules.rwkv7 import RWKV7, FlaRWKV7

RULES: tuple[Rule, ...] = (
    GatedDelta(),
    KimiDelta(),
    Mamba2(),
    RWKV7(),
    FlaRWKV7(),
    FlaDelta(),
    FlaGatedDelta(),
    FlaGatedLinear(),
    FlaKimiDelta(),
    FlaRetention(),
    FlaSimpleGatedLinear(),
    FlaGatedDeltaProduct(),
    FlaRWKV6(),
    FlaComba(),
)
"""The rules that hookpoints can hook."""

__all__ = [
    "REFUSED",
    "REFUSED_LAYERS",
    "RULES",
    "RWKV7",
    "Factors",
    "FlaComba",
    "FlaDelta",
    "FlaGatedDelta",
    "FlaGatedDeltaProduct",
    "FlaGatedLinear",
    "FlaKimiDelta",
    "FlaRWKV6",
    "FlaRWKV7",
    "FlaRetention",
    "FlaSimpleGatedLinear",
    "GatedDelta",
    "KimiDelta",
    "Mamba2",
    "OpResult",
    "Rule",
]
