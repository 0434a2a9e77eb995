"""Update rules: ``tables``, and a file for each that needs more. A rule knows an op's arguments and the canonical
recurrence, and nothing of hooks.

How to add a rule, here one that fla would compute by ``chunk_new_rule(q, k, v, gk, beta, ...)``:

1. Write the equation in canonical form, S_t = (diag(alpha) + a b^T) S_{t-1} + k u^T, o_t = S_t^T (scale q). If that is
   not possible, add the model type with the reason to ``refused.py`` instead.
2. Write it down in ``tables``, with the equation and its source. Most rules are a table::

       FLA_NEW_RULE = FlaRule(  # Rule for ops that have a torch form
           "New rule",
           ("chunk_new_rule", "fused_recurrent_new_rule"),  # every name under which a layer calls it
           Names("q", "k", "v", log_decay="gk", beta="beta"),  # factor -> argument
           erases=True,  # a delta rule: it takes off beta k (alpha k)^T S
       )

   What an op does to its arguments under a flag (``base`` lists them) is read and turned off for you. Where the rule
   differs, override the smallest method that says so: ``read`` and ``feed`` for one factor, ``write_key`` or
   ``erase_key`` for the transition, ``read_result`` and ``write_result`` for what the op adds outside the state.
3. Add it to ``RULES`` below, and the op to ``tests/hookpoints/rules/test_rules.py``, which compares every factor.
   ``tools/families.py`` writes its row of ``docs/families.md``, and the self-check tests it whenever a model of it is
   loaded.
"""

from hookpoints.rules.base import Arguments, FlaRule, Names, Op, OpFactors, OpResult, Rule
from hookpoints.rules.delta_product import GATED_DELTA_PRODUCT
from hookpoints.rules.hgrn import HGRN
from hookpoints.rules.mamba1 import MAMBA1
from hookpoints.rules.mamba2 import MAMBA2
from hookpoints.rules.refused import REFUSED, REFUSED_LAYERS
from hookpoints.rules.rwkv7 import FLA_RWKV7, RWKV7
from hookpoints.rules.tables import (
    FLA_COMBA,
    FLA_DELTA,
    FLA_GATED_DELTA,
    FLA_GATED_DELTA_2,
    FLA_GLA,
    FLA_KIMI_DELTA,
    FLA_RETENTION,
    FLA_RWKV6,
    FLA_SIMPLE_GLA,
    GATED_DELTA,
    KIMI_DELTA,
)

RULES: tuple[Rule, ...] = (
    GATED_DELTA,
    KIMI_DELTA,
    MAMBA2,
    MAMBA1,
    RWKV7,
    FLA_RWKV7,
    FLA_DELTA,
    FLA_GATED_DELTA,
    FLA_GATED_DELTA_2,
    FLA_GLA,
    FLA_KIMI_DELTA,
    FLA_RETENTION,
    FLA_SIMPLE_GLA,
    GATED_DELTA_PRODUCT,
    FLA_RWKV6,
    FLA_COMBA,
    HGRN,
)
"""The rules that hookpoints can hook."""

__all__ = ["REFUSED", "REFUSED_LAYERS", "RULES", "Arguments", "FlaRule", "Names", "Op", "OpFactors", "OpResult", "Rule"]
