"""RWKV-7 (Peng et al. 2025, arXiv 2503.14456, eq. 17): this package's own model and fla's layers.

    S_t = (diag(alpha_t) + b_t a_t^T) S_{t-1} + k_t v_t^T,    o_t = S_t^T r_t

with one decay per key channel and its own erase: it reads back with a = -kappa, the normalized erase key, and
takes off along b = kappa * rate. What is written has the key k, which is another vector, scaled by the in-context rate
already; so there is no beta, and editing k leaves the erase alone.

Two forms of call: with a and b (``rwkv7_recurrence``, ``chunk_rwkv7``, ``fused_recurrent_rwkv7``), or with kappa as
``kk`` and the rate as ``a`` (``fused_mul_recurrent_rwkv7``). States are key-first in all of them. What a layer adds to
the read, the bonus (r . r_k k) v, and its gate are outside the op.
"""

from __future__ import annotations

from dataclasses import replace

from hookpoints.recurrence.canonical import CanonicalForm
from hookpoints.rules.base import Arguments, Names, OpFactors, Rule


class _RWKV7(Rule):
    def form(self, factors: OpFactors, arguments: Arguments) -> CanonicalForm:
        # ``a`` and ``b`` of the canonical form, [B,T,H,K] each, which fla calls the other way round.
        kappa = arguments.get("kk")
        along, back = (arguments["b"], arguments["a"]) if kappa is None else (kappa * arguments["a"], -kappa)
        return super().form(factors, arguments).replace(a=along.to(factors.k.dtype), b=back.to(factors.k.dtype))


RWKV7 = _RWKV7(
    "RWKV-7",
    ("rwkv7_recurrence",),
    Names("r", "k", "v", log_decay="w"),
    sizes=("head_dim", "head_v_dim"),
    own_erase=True,
)
"""The rule of ``hookpoints.rwkv7.rwkv7_recurrence``."""
FLA_RWKV7 = replace(
    RWKV7,
    ops=("chunk_rwkv7", "fused_mul_recurrent_rwkv7", "fused_recurrent_rwkv7"),
    kernel_only=True,
    rounded=RWKV7.names.fields(),
)
"""That of fla's ops."""
