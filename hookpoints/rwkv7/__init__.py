"""RWKV-7 in plain torch, for checkpoints of flash-linear-attention's format (fla-hub/rwkv7-*), on any device.

``hookpoints.HookedRecurrent.from_pretrained`` picks these classes by the configuration's ``model_type``; nothing is
registered with transformers' Auto classes, where flash-linear-attention puts its own.
"""

from hookpoints.rwkv7.configuration import RWKV7Config
from hookpoints.rwkv7.layers import rwkv7_recurrence
from hookpoints.rwkv7.modeling import RWKV7ForCausalLM, RWKV7Model, from_official, from_pth
from hookpoints.rwkv7.states import load_states, save_states

__all__ = [
    "RWKV7Config",
    "RWKV7ForCausalLM",
    "RWKV7Model",
    "from_official",
    "from_pth",
    "load_states",
    "rwkv7_recurrence",
    "save_states",
]
