"""One file per update rule. A rule knows an op's arguments and the canonical recurrence, and nothing of hooks.

How to add a rule, here one that fla would compute by ``chunk_new_rule(q, k, v, gk, beta, ...)``:

1. Write the equation in canonical form, S_t = (diag(alpha) + a b^T) S_{t-1} + k u^T, o_t = S_t^T (scale q). If that is
   not possible, add the model type with the reason to ``refused.py`` instead.
2. Write one file that begins with the equation and its source. Most rules are a table::

       class FlaNewRule(FlaRule):  # Rule for ops that have a torch form
           name = "New rule"
           ops = ("chunk_new_rule", "fused_recurrent_new_rule")  # every name under which a layer calls it
           names = Names("q", "k", "v", log_decay="gk", beta="beta")  # factor -> argument
           erases = True  # a delta rule: it takes off beta k (alpha k)^T S

   What an op does to its arguments under a flag (``base`` lists them) is read and turned off for you. Where the rule
   differs, override the smallest method that says so: ``read`` and ``feed`` for one factor, ``write_key`` or
   ``erase_key`` for the transition, ``read_result`` and ``write_result`` for what the op adds outside the state.
3. Add it to ``RULES`` below, and the op to ``tests/test_rules.py``, where every factor is compared with the op's own.
   ``scripts/families.py`` writes its row of ``docs/families.md``, and the self-check tests it whenever a model of it is
   loaded.
"""

from hookpoints.rules.base import Arguments, FlaRule, Names, Op, OpFactors, OpResult, Rule
from hookpoints.rules.comba import FlaComba
from hookpoints.rules.delta import FlaDelta
from hookpoints.rules.delta_product import FlaGatedDeltaProduct
from hookpoints.rules.gated_delta import FlaGatedDelta, GatedDelta
from hookpoints.rules.gla import FlaGatedLinear, FlaHgrn2
from hookpoints.rules.kda import FlaKimiDelta, KimiDelta
from hookpoints.rules.mamba2 import Mamba2
from hookpoints.rules.refused import REFUSED, REFUSED_LAYERS
from hookpoints.rules.rwkv6 import FlaRWKV6
from hookpoints.rules.rwkv7 import RWKV7, FlaRWKV7
from hookpoints.rules.simple_gla import FlaRetention, FlaSimpleGatedLinear

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
    "Arguments",
    "FlaComba",
    "FlaDelta",
    "FlaGatedDelta",
    "FlaGatedDeltaProduct",
    "FlaGatedLinear",
    "FlaHgrn2",
    "FlaKimiDelta",
    "FlaRWKV6",
    "FlaRWKV7",
    "FlaRetention",
    "FlaRule",
    "FlaSimpleGatedLinear",
    "GatedDelta",
    "KimiDelta",
    "Mamba2",
    "Names",
    "Op",
    "OpFactors",
    "OpResult",
    "Rule",
]
