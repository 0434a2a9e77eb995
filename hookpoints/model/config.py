"""What a hooked model says of itself: ``model.cfg``."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import nn
from transformers import PreTrainedConfig

from hookpoints.errors import UnsupportedModelError
from hookpoints.model.norm import eps_of

if TYPE_CHECKING:
    from hookpoints.model.layout import ModelLayout


_NORMS: dict[Literal["RMS", "LN"], str] = {"RMS": "RMSNorm", "LN": "LayerNorm"}
"""What names of their classes have in them."""
_ACTIVATIONS = ("mlp_hidden_act", "hidden_act", "hidden_activation", "activation_function")


@dataclass(frozen=True)
class RecurrentLayer:
    """Shape of one recurrent layer's memory."""

    rule: str
    """Name of the update rule, for example "Gated DeltaNet"."""
    H: int
    """Heads (value heads where keys are shared)."""
    K: int
    """Key side of the state."""
    V: int
    """Value side of the state."""
    R: int = 1
    """Rank of what a token writes: the steps that it takes. Factors have an axis for them where R > 1."""


@dataclass(frozen=True)
class HookedRecurrentConfig:
    """Names follow TransformerLens where it has them."""

    model_name: str
    model_type: str
    """``model_type`` of the Hugging Face configuration."""
    n_layers: int
    d_model: int
    d_vocab: int
    n_ctx: int
    """Longest context that the configuration names; recurrent layers set no limit."""
    n_heads: int
    """Largest number of heads of any recurrent layer; ``layers`` has each layer's own."""
    layers: dict[int, RecurrentLayer]
    """The recurrent layers by block index."""
    device: torch.device
    dtype: torch.dtype
    backend: str
    """Who computes the native pass of recurrent layers."""
    attention: dict[int, int] = field(default_factory=dict)
    """Number of attention heads by block index, for blocks that have ``attn.hook_z``."""
    n_key_value_heads: int | None = None
    d_head: int = 0
    """Largest V of any recurrent layer: the width of a head's read and of ``hook_z``."""
    d_mlp: int | None = None
    act_fn: str | None = None
    """Of the MLPs; None where there are none."""
    attn_only: bool = False
    """Whether no block has an MLP."""
    normalization_type: Literal["RMS", "LN"] | None = None
    """The final norm; its weight is not folded into the unembedding. None: a norm that is neither."""
    eps: float | None = None
    """What the final norm adds to the mean square."""
    default_prepend_bos: bool | None = None
    """None: as the tokenizer does by itself."""

    def to_dict(self) -> dict[str, object]:
        """The fields by name."""
        return asdict(self)

    @property
    def recurrent_layers(self) -> list[int]:
        """Block indices of the recurrent layers."""
        return sorted(self.layers)

    def attention_heads(self, index: int) -> int | None:
        """Number of attention heads of block ``index`` (of ``blocks.{index}.attn.hook_z``), or None where it has no
        such hook. A block may have attention and a recurrence side by side."""
        self._check_index(index)
        return self.attention.get(index)

    def layer(self, index: int) -> RecurrentLayer:
        """The recurrent layer at block ``index``; raises UnsupportedModelError where that block has no recurrence."""
        self._check_index(index)
        if index not in self.layers:
            raise UnsupportedModelError(
                f"layer {index} of {self.model_name} has no recurrence and so no writes; "
                f"recurrent layers are {self.recurrent_layers}"
            )
        return self.layers[index]

    def _check_index(self, index: int) -> None:
        if isinstance(index, bool) or index not in range(self.n_layers):
            raise UnsupportedModelError(
                f"layer {index} is out of range: {self.model_name} has blocks 0 to {self.n_layers - 1}, recurrent are "
                f"{self.recurrent_layers}"
            )


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes: the device of its weights, or the one to which accelerate brings them for the call."""
    device = next(module.parameters()).device
    if device.type != "meta":
        return device
    hooks = [getattr(part, "_hf_hook", None) for part in module.modules()]
    places = [getattr(hook, "execution_device", None) for hook in hooks]
    return torch.device(next((place for place in places if place is not None), device))


def describe(model: nn.Module, layout: ModelLayout, name: str | None, backend: str) -> HookedRecurrentConfig:
    """Read the configuration off a model and its layout. ``name``: None for that of its checkpoint or class."""
    full_config = cast(PreTrainedConfig, model.config)
    hf = full_config.get_text_config()
    layers = dict[int, RecurrentLayer]()
    for layer, block in enumerate(layout.blocks):
        if block.rule is not None and block.mixer is not None:
            layers[layer] = RecurrentLayer(block.rule.name, *block.rule.head_shape(block.mixer), R=block.rule.rank)
    has_mlp = any(block.mlps for block in layout.blocks)
    norm = getattr(layout.final_norm, "original_component", layout.final_norm)  # a bridge stands before it
    weight = layout.embed.weight
    assert isinstance(weight, torch.Tensor)
    return HookedRecurrentConfig(
        model_name=name or getattr(full_config, "_name_or_path", "") or type(model).__name__,
        model_type=str(hf.model_type),
        n_layers=len(layout.blocks),
        d_model=weight.shape[1],
        d_vocab=weight.shape[0],
        n_ctx=int(getattr(hf, "max_position_embeddings", None) or 2**31 - 1),
        n_heads=max(layer.H for layer in layers.values()),
        layers=layers,
        attention={n: heads.split[0] for n, block in enumerate(layout.blocks) if (heads := block.attn_heads)},
        d_head=max(layer.V for layer in layers.values()),
        d_mlp=getattr(hf, "intermediate_size", None) if has_mlp else None,
        act_fn=next((getattr(hf, name) for name in _ACTIVATIONS if hasattr(hf, name)), None) if has_mlp else None,
        attn_only=layout.is_chain and not has_mlp,
        normalization_type=next((kind for kind in ("RMS", "LN") if _NORMS[kind] in type(norm).__name__), None),
        eps=None if norm is None else eps_of(norm),
        device=device_of(layout.embed),
        dtype=weight.dtype,
        backend=backend,
    )
