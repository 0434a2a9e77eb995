"""mamba-lens: Mamba-1 with TransformerLens' hooks."""
# pyright: reportMissingImports=false

from __future__ import annotations

from typing import Any

import torch
from mamba_lens import HookedMamba
from mamba_lens.HookedMamba import MambaCfg, convert_original_state_dict_to_hooked_state_dict
from tool_probes.truth import LAYER, TOKEN
from torch import Tensor


class Mamba:
    """A forward of its own, token by token, with a hook on the state after each."""

    layer = f"blocks.{LAYER}."

    def __init__(self, model: Any):
        c = model.config
        cfg = MambaCfg(c.hidden_size, c.num_hidden_layers, c.vocab_size, d_state=c.state_size, device="cpu")
        self.model = HookedMamba(cfg, tokenizer=None)
        weights = {name.replace("embeddings", "embedding"): value for name, value in model.state_dict().items()}
        self.model.load_state_dict(convert_original_state_dict_to_hooked_state_dict(cfg, weights))

    def write_with_work(self, tokens: Tensor) -> Tensor:
        """`hook_B_bar` times `hook_ssm_input`"""
        cache = self.model.run_with_cache(tokens)[1]
        return (cache[self.layer + "hook_B_bar"] * cache[self.layer + "hook_ssm_input"][..., None])[..., None]

    def state(self, tokens: Tensor) -> Tensor:
        cache = self.model.run_with_cache(tokens)[1]
        return torch.stack([cache[f"{self.layer}hook_h.{t}"] for t in range(tokens.shape[1])], 1)[..., None]

    def delete(self, tokens: Tensor) -> Tensor:
        def edit(write: Tensor, hook: object) -> Tensor:
            write[:, TOKEN] = 0
            return write

        return self.model.run_with_hooks(tokens, fwd_hooks=[(self.layer + "hook_B_bar", edit)])


PROBES = {"mamba": Mamba}
