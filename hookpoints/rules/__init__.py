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

_MAMBA1 = (
    "Mamba-1 keeps one vector per channel (thousands of heads a layer, each with a K x 1 state), so its writes are not "
    "matrices; Mamba-2 models are supported"
)

_STREAMS = "its residual stream is several streams side by side (hyper-connections), which block hooks do not know"

REFUSED: dict[str, str] = {
    "mamba": _MAMBA1,
    "falcon_mamba": _MAMBA1,
    "jamba": _MAMBA1,
    "zamba": _MAMBA1,
    "minimax": "its lightning attention is written out inside the layer's forward, so there is no op to intercept, and "
    "its states are in a cache of its own kind",
    "recurrent_gemma": "its RG-LRU keeps a vector, not a matrix: there is no rank-1 write",
    "rwkv": "RWKV-4 keeps vectors and divides its reads by a second, normalising state",
    "glm5_next_text": _STREAMS,
    "qwen4_exp_text": _STREAMS,
    "mamba3": "Mamba-3 adds two terms per token, the second with the token before (its trapezoidal rule), and only "
    "mamba_ssm's GPU kernels compute it; Mamba-2 models are supported",
    "abc": "ABC keeps two coupled states, not one",
    "gsa": "gated slot attention keeps two coupled states, not one",
    "raven": "its slots are gated slot attention's, which keeps two coupled states, not one",
    "lightnet": "LightNet normalises its keys over all tokens so far, which takes a second state",
    "log_linear_mamba2": "log-linear attention keeps a state for each level of a hierarchy, not one",
    "mom": "MoM routes each token to some of several memories, so its op sees other sequences than the model does",
    "hgrn": "HGRN keeps a vector, not a matrix: there is no rank-1 write",
    "titans": "Titans' memory is an MLP updated by gradient steps",
    "mesa_net": "MesaNet solves a linear system over its keys at each read",
    "xlstm": "xLSTM divides its reads by a second, normalising state",
}
"""Model types whose recurrence is not of this form, with the reason."""

__all__ = [
    "REFUSED",
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
