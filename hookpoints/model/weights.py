"""Weights in TransformerLens' names and orientation, and what stands at both ends of the residual stream."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from hookpoints.errors import UnsupportedModelError
from hookpoints.model.layout import Added, out_projection

if TYPE_CHECKING:
    from hookpoints.model.attachment import Attachment
    from hookpoints.model.config import HookedRecurrentConfig

Part = Literal["mixer", "attn"]
"""Of a block: its recurrence or its attention."""


class HeadOutputs(NamedTuple):
    """How the heads of one mixer reach the residual stream."""

    part: Part
    n: int
    """Heads."""
    projection: nn.Module
    """Takes what they hand on (``hook_z``), side by side."""
    added: Added
    """What the block adds."""

    @property
    def norm(self) -> nn.Module | None:
        """The norm between projection and residual stream, in blocks that have one there (OLMo's attention)."""
        inside = any(module is self.projection for module in self.added.module.modules())
        return None if inside else self.added.module

    @property
    def scale(self) -> float:
        """The block's own multiplier; that of a block with a norm behind the projection comes after the norm."""
        return self.added.scale if self.norm is None else 1.0


class Weights:
    """Methods of a hooked model over ``attachment`` and ``cfg``."""

    attachment: Attachment

    if TYPE_CHECKING:

        @property
        def cfg(self) -> HookedRecurrentConfig: ...
        @cfg.setter
        def cfg(self, value: HookedRecurrentConfig) -> None: ...

    @property
    def W_E(self) -> Tensor:
        """[d_vocab, d_model] token embeddings."""
        return cast(Tensor, self.attachment.layout.embed.weight)

    @property
    def W_U(self) -> Tensor:
        """[d_model, d_vocab] unembedding."""
        return cast(Tensor, self.attachment.layout.unembed.weight).T

    @property
    def W_O(self) -> Tensor:
        """[n_layers, n_heads, d_head, d_model]: ``layer_W_O`` of every layer, copied into one tensor.

        Raises:
            UnsupportedModelError: heads differ in number or size between layers, as in a model of recurrence and
                attention, or a layer has none.
        """
        weights = [self.layer_W_O(layer) for layer in range(self.cfg.n_layers)]
        shapes = {tuple(weight.shape) for weight in weights}
        if len(shapes) > 1:
            raise UnsupportedModelError(
                f"the heads of {self.cfg.model_name} have weights [heads, d_head, d_model] of the shapes "
                f"{sorted(shapes)}, which no one tensor holds: take model.layer_W_O(layer), those of one layer"
            )
        return torch.stack(weights)

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
        attention, block = self.cfg.attention_heads(layer), self.attachment.layout.blocks[layer]
        if part != "attn" and layer in self.cfg.layers and block.mixer is not None and block.mixer_out is not None:
            return HeadOutputs("mixer", self.cfg.layers[layer].H, out_projection(block.mixer), block.mixer_out)
        if part != "mixer" and block.attn_heads is not None and attention and block.attn_out is not None:
            return HeadOutputs("attn", attention, block.attn_heads.projection, block.attn_out)
        what = {"mixer": "recurrent heads", "attn": "attention heads", None: "heads"}[part]
        raise UnsupportedModelError(
            f"layer {layer} of {self.cfg.model_name} has no {what}; recurrent layers are {self.cfg.recurrent_layers}, "
            f"layers with attention are {sorted(self.cfg.attention)}"
        )
