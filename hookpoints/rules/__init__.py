"""One file per update rule. A rule knows an op's arguments and the canonical recurrence, and nothing of hooks.

To add a family, write one file here with a class that follows ``base.Rule`` and add it to ``RULES``.
"""

from .base import Factors, OpResult, Rule
from .comba import FlaComba
from .delta_product import FlaGatedDeltaProduct
from .fla_delta import FlaDelta
from .fla_gated_delta import FlaGatedDelta
from .fla_gla import FlaGatedLinear
from .fla_kda import FlaKimiDelta
from .fla_simple_gla import FlaRetention, FlaSimpleGatedLinear
from .gated_delta import GatedDelta
from .kda import KimiDelta
from .mamba2 import Mamba2
from .refused import REFUSED, REFUSED_LAYERS
from .rwkv6 import FlaRWKV6
from .rwkv7 import RWKV7, FlaRWKV7

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
