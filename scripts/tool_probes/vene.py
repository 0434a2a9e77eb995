"""pyvene: interventions on outputs of modules."""
# pyright: reportMissingImports=false

from __future__ import annotations

from typing import Any

import pyvene
from tool_probes.truth import HEAD, LAYER, TOKEN
from torch import Tensor


class Modules:
    """No module returns the write or takes it; the probes take the projection that is nearest to the op."""

    component = ""
    values = slice(0)
    """Channels of the value of HEAD in what the projection returns."""

    def __init__(self, model: Any):
        self.model = model

    def delete(self, tokens: Tensor) -> Tensor:
        """nearest: the values in a projection's output"""

        def edit(base: Tensor, source: object) -> Tensor:
            base = base.clone()
            base[:, TOKEN, self.values] = 0
            return base

        intervenable = pyvene.IntervenableModel({"component": self.component, "intervention": edit}, model=self.model)
        return intervenable({"input_ids": tokens})[1].logits


class Mamba2(Modules):
    component = f"backbone.layers[{LAYER}].mixer.in_proj.output"
    values = slice(64 + 16 * HEAD, 64 + 16 * HEAD + 16)


class GatedDelta(Modules):
    component = f"model.layers[{LAYER}].linear_attn.in_proj_qkv.output"
    values = slice(32 + 6 * HEAD, 32 + 6 * HEAD + 6)


class RWKV7(Modules):
    component = f"model.layers[{LAYER}].attn.v_proj.output"
    values = slice(16 * HEAD, 16 * HEAD + 16)


class Mamba(Modules):
    component = f"backbone.layers[{LAYER}].mixer.in_proj.output"
    values = slice(0, 64)


PROBES = {"mamba": Mamba, "mamba2": Mamba2, "qwen3_5": GatedDelta, "rwkv7": RWKV7}
