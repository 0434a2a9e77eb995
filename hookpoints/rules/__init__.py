"""Update rules: ``tables``, and a file for each that needs more. A rule knows an op's arguments and the canonical
recurrence, and nothing of hooks.

How to add a rule, here one whose layers call ``chunk_new_rule(q, k, v, gk, beta, ...)``:

1. Write the equation in canonical form, S_t = (diag(alpha) + a b^T) S_{t-1} + k u^T, o_t = S_t^T (scale q). If that is
   not possible, add the model type with the reason to ``refused.py`` instead.
2. Write it down in your module, with the equation and its source. Most rules are a table::

       NEW_RULE = FlaRule(  # Rule for ops that have a torch form
           "New rule",
           ("chunk_new_rule", "fused_recurrent_new_rule"),  # every name under which a layer calls it
           Names("q", "k", "v", log_decay="gk", beta="beta"),  # factor -> argument
           erases=True,  # a delta rule: it takes off beta k (alpha k)^T S
       )

   What an op does to its arguments under a flag (``base`` lists them) is read and turned off for you. Where the rule
   differs, override the smallest method that says so: ``read`` and ``feed`` for one factor, ``write_key`` or
   ``erase_key`` for the transition, ``read_result`` and ``write_result`` for what the op adds outside the state.
3. Name it in the ``pyproject.toml`` of your distribution. Where that is installed, it is among ``known.RULES``, and
   models of the type that its entry is named after are no longer refused::

       [project.entry-points."hookpoints.rules"]
       new_model_type = "my_module:NEW_RULE"

4. Compare every factor with a token-by-token version of the op, as ``rare/test_rare.py`` does in ten lines a rule. The
   self-check tests the rule whenever a model of it is loaded.

The folder ``rare`` is such a distribution. A rule that many people need is a table in ``tables`` and a name in
``known.OWN_RULES``; ``tools/families.py`` writes its row of ``docs/families.md``.
"""

from hookpoints.rules.base import Arguments, FlaRule, Names, Op, OpFactors, OpResult, Rule

__all__ = ["Arguments", "FlaRule", "Names", "Op", "OpFactors", "OpResult", "Rule"]
