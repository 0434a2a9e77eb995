"""Weights in TransformerLens' names and orientation, and what stands at both ends of the residual stream."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor, nn

from hookpoints.errors import UnsupportedModelError
from hookpoints.model.config import device_of
from hookpoints.model.hooked import HookedModel
from hookpoints.model.layout import Added, Part, out_projection
from hookpoints.refused import Explaining

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PARTS: tuple[Part, Part] = ("mixer", "attn")


class _StreamEnd(Explaining, partial[Tensor]):
    """A function that TransformerLens has as a module, with weights that the model has here."""


class UnequalHeadsError(UnsupportedModelError, AttributeError):
    """Heads of several shapes have no one tensor. An AttributeError, so that ``hasattr(model, "W_O")`` is False."""


class HeadOutputs(NamedTuple):
    """How the heads of one mixer reach the residual stream."""

    n: int
    """Heads."""
    projection: nn.Module
    """Takes what they hand on (``hook_z``), side by side."""
    added: Added
    """What the block adds."""

    @property
    def norm(self) -> nn.Module | None:
        """The norm between projection and residual stream, in blocks that have one there (OLMo's attention)."""
        return None if self.projection in self.added.module.modules() else self.added.module

    @property
    def scale(self) -> float:
        """The block's own multiplier; that of a block with a norm behind the projection comes after the norm."""
        return self.added.scale if self.norm is None else 1.0


class Weights(HookedModel):
    """A hooked model with names for its weights."""

    @property
    def W_E(self) -> Tensor:
        """[d_vocab, d_model] token embeddings."""
        return cast(Tensor, self.attachment.layout.embed.weight)

    @property
    def W_U(self) -> Tensor:
        """[d_model, d_vocab] unembedding, with the model's own multiplier of the logits (Granite's, Falcon-H1's)."""
        weight = cast(Tensor, self.attachment.layout.unembed.weight).T
        return weight if self._logit_scale == 1.0 else weight * self._logit_scale

    @property
    def b_U(self) -> Tensor:
        """[d_vocab] bias of the unembedding, zero where there is none."""
        bias = getattr(self.attachment.layout.unembed, "bias", None)
        if bias is None:
            return self.W_U.new_zeros(self.cfg.d_vocab)
        return bias * self._logit_scale

    @property
    def _logit_scale(self) -> float:
        return logit_scale(self.hf_model)

    @property
    def embed(self) -> Callable[[Tensor], Tensor]:
        """Of tokens [B,T] the embeddings [B,T,D]: what ``hook_embed`` sees."""
        return _StreamEnd(self.attachment.layout.embed)

    @property
    def unembed(self) -> Callable[[Tensor], Tensor]:
        """The logits [...,d_vocab] of what the final norm gives: ``model.unembed(model.ln_final(residual))``."""
        return _StreamEnd(lambda residual: residual @ self.W_U + self.b_U)

    @property
    def b_O(self) -> Tensor:
        """[n_layers, d_model], what the output projections add besides their heads; zero where they have no bias."""
        rows = self.W_E.new_zeros(self.cfg.n_layers, self.cfg.d_model)
        for layer in {*self.cfg.layers, *self.cfg.attention}:
            heads = self.head_outputs(layer)
            if getattr(heads.projection, "bias", None) is not None:
                rows[layer] = cast(Tensor, heads.projection.bias) * heads.scale
        return rows

    @property
    def n_params_total(self) -> int:
        """Number of parameters, embeddings included."""
        return sum(parameter.numel() for parameter in self.hf_model.parameters())

    def all_head_labels(self) -> list[str]:
        """Names of the heads in the order of ``cache.stack_head_results``: "L0H0", "L0H1" ...; where a block has both,
        attention heads follow as "L0A0" ..."""
        places: list[tuple[int, Part]] = [(layer, part) for layer in range(self.cfg.n_layers) for part in _PARTS]
        return [label for place in places for label in self.head_labels(*place)]

    def head_labels(self, layer: int, part: Part) -> list[str]:
        """Names of one mixer's heads; none where the block has no such heads."""
        recurrent = layer in self.cfg.layers
        if part == "attn":
            n = self.cfg.attention_heads(layer) or 0
        else:
            n = self.cfg.layers[layer].H if recurrent else 0
        letter = "A" if part == "attn" and recurrent else "H"
        return [f"L{layer}{letter}{head}" for head in range(n)]

    @property
    def W_O(self) -> Tensor:
        """[n_layers, n_heads, d_head, d_model]: ``layer_W_O`` of every layer, copied into one tensor.

        Raises:
            UnequalHeadsError: heads differ in number or size between layers, as in a model of recurrence and
                attention, or a layer has none.
        """
        weights = [self.layer_W_O(layer) for layer in sorted({*self.cfg.layers, *self.cfg.attention})]
        shapes = {tuple(weight.shape) for weight in weights}
        if len(shapes) != 1 or len(weights) != self.cfg.n_layers:
            raise UnequalHeadsError(
                f"{len(weights)} of the {self.cfg.n_layers} layers of {self.cfg.model_name} have heads, with weights "
                f"[heads, d_head, d_model] of the shapes {sorted(shapes)}, which no one tensor holds: take "
                "model.layer_W_O(layer), those of one layer"
            )
        return torch.stack(weights)

    def hook_device(self, name: str) -> torch.device:
        """Where a hook fires: on the device of its block. A model may be spread over several."""
        layer = re.match(r"blocks\.(\d+)\.", name)
        if layer is None:
            return self.cfg.device
        return device_of(self.attachment.layout.blocks[int(layer[1])].block)

    def layer_W_O(self, layer: int, part: Part | None = None) -> Tensor:
        """[H, V, d_model]: how each head of a layer reaches the residual stream, the block's own multiplier included.

        ``hook_z`` times this, summed over heads, plus the bias of the projection is what the layer adds
        (``hook_mixer_out`` or ``hook_attn_out``). In a block with a norm after its attention (OLMo) it is what enters
        that norm.

        Args:
            part: "mixer" or "attn", for blocks with both side by side; None: the recurrence, where there is one.

        Raises:
            UnsupportedModelError: no block, or no heads of that part in it; or their projection is not an ``nn.Linear``
                (an adapter that was not merged, for instance).
        """
        heads = self.head_outputs(layer, part)
        if not isinstance(heads.projection, nn.Linear):
            raise UnsupportedModelError(
                f"the output projection of layer {layer} is {type(heads.projection).__name__} and not nn.Linear, so it "
                "has no weight to name; merge adapters first (model.merge_and_unload() in PEFT)"
            )
        weight = heads.projection.weight.T.unflatten(0, (heads.n, -1))
        return weight if heads.scale == 1.0 else weight * heads.scale

    def head_outputs(self, layer: int, part: Part | None = None) -> HeadOutputs:
        """How the heads of ``layer`` reach the residual stream; arguments and errors as for ``layer_W_O``."""
        if not self.attachment.layout.is_chain:
            raise UnsupportedModelError(f"heads of {self.cfg.model_name} add to no one residual stream that is known")
        attention = self.cfg.attention_heads(layer)
        block = self.attachment.layout.blocks[layer]
        if part != "attn" and layer in self.cfg.layers and block.mixer is not None and block.mixer_out is not None:
            return HeadOutputs(self.cfg.layers[layer].H, out_projection(block.mixer), block.mixer_out)
        if part != "mixer" and attention and block.attn_heads is not None and block.attn_out is not None:
            return HeadOutputs(attention, block.attn_heads.module, block.attn_out)
        what = {"mixer": "recurrent heads", "attn": "attention heads", None: "heads"}[part]
        raise UnsupportedModelError(
            f"layer {layer} of {self.cfg.model_name} has no {what}; recurrent layers are {self.cfg.recurrent_layers}, "
            f"layers with attention are {sorted(self.cfg.attention)}"
        )


def logit_scale(model: PreTrainedModel) -> float:
    """What a model multiplies its logits by (Granite, Falcon-H1)."""
    config = model.config
    return float(getattr(config, "lm_head_multiplier", 1.0)) / float(getattr(config, "logits_scaling", 1.0))
