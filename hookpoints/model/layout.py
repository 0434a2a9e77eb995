"""Where things are in a Hugging Face model: blocks, mixers, norms, projections. Found by looking, not by model type.

A mixer is recurrent when its ``forward`` calls the first op of some rule; the ops are looked up in the module that
defines the mixer's class. So new model types that reuse a known op work without an entry here.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

from torch import nn
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

from hookpoints.errors import UnsupportedModelError
from hookpoints.rules import REFUSED, REFUSED_LAYERS, RULES, Rule

Part = Literal["mixer", "attn"]
"""Of a block: its recurrence or its attention."""

_MIXER_NAMES = ("linear_attn", "self_attn", "attn", "mixer", "mamba", "attention")
_MLP_NAMES = ("mlp", "feed_forward", "block_sparse_moe", "shared_mlp", "ffn")
_MIXER_NORM_NAMES = ("input_layernorm", "attn_norm", "norm")
_MLP_NORM_NAMES = ("post_attention_layernorm", "pre_ff_layernorm", "mlp_norm", "ffn_norm")
_FINAL_NORM_NAMES = ("norm", "norm_f", "final_layernorm", "ln_f")
_OUT_PROJ_NAMES = ("out_proj", "o_proj")


@dataclass(frozen=True, eq=False)
class Added:
    """A module whose output the block adds to the residual stream, times ``scale``."""

    module: nn.Module
    scale: float = 1.0


@dataclass(frozen=True, eq=False)
class Heads:
    """The output projection of attention, whose input is that many heads side by side."""

    projection: nn.Module
    n: int


@dataclass(frozen=True, eq=False)
class BlockLayout:
    """The modules of one block that carry hooks."""

    block: nn.Module
    mixer: nn.Module | None
    """The recurrent mixer, or the attention of a block without one; None where the block is only an MLP."""
    rule: Rule | None
    """The update rule of a recurrent mixer; None for attention."""
    namespace: ModuleType | None
    """The Python module in which the mixer looks up its ops."""
    mixer_out: Added | None
    """What a recurrent mixer adds (after a norm where the block has post-norms)."""
    attn_out: Added | None
    """What attention adds; in a block without attention, what the recurrent mixer adds."""
    mlp_out: Added | None
    """What the MLP adds; None where the block has none, or adds several."""
    attn_heads: Heads | None = None
    """Attention's heads; None in a block without attention."""
    mlps: int = 0
    """Number of MLPs in the block."""

    @property
    def side_by_side(self) -> bool:
        """Whether the block adds what a recurrence and what attention make of the same input."""
        return self.mixer_out is not None and self.attn_out is not self.mixer_out

    def norm(self, *, mlp: bool = False) -> nn.Module | None:
        """The norm that the block puts before its mixer (or its MLP), where it has one of its own there."""
        if hasattr(self.block, "post_feedforward_layernorm") and not hasattr(self.block, "input_layernorm"):
            return None  # OLMo's attention blocks have theirs behind
        return next(iter(_children(self.block, _MLP_NORM_NAMES if mlp else _MIXER_NORM_NAMES)), None)


@dataclass(frozen=True, eq=False)
class ModelLayout:
    """The modules of a causal language model that carry hooks."""

    embed: nn.Module
    blocks: tuple[BlockLayout, ...]
    final_norm: nn.Module
    unembed: nn.Module
    backbone: nn.Module | None = None
    """The part that holds the blocks, where it can be run by itself."""

    @property
    def rereads_embeddings(self) -> bool:
        """Whether blocks are handed the token embeddings again (Zamba2) or what the first block makes of them (RWKV-7),
        so that no run can do without the tokens."""
        handed = {"original_hidden_states", "v_first"}
        return any(handed & _parameters(block.block) for block in self.blocks)

    @property
    def first_block_feeds_all(self) -> bool:
        """Whether later blocks are handed what the first one makes (fla's RWKV-7: its values), so that no run can begin
        above it."""
        return self._of_fla and "v_first" in _parameters(self.blocks[0].block)

    @property
    def embedding_norm(self) -> nn.Module | None:
        """The norm that the first block puts on the embeddings before it adds to them (fla's RWKV models)."""
        norms = _children(self.blocks[0].block, ("pre_norm",)) if self._of_fla else []
        return norms[0] if norms else None

    @property
    def _of_fla(self) -> bool:
        return type(self.blocks[0].block).__module__.startswith("fla.")


def calls_of(mixer: nn.Module) -> frozenset[str]:
    """Names that the mixer's ``forward`` refers to, looking through decorators and one level of own methods."""
    names: set[str] = set()
    for method in ("forward", "torch_forward"):
        function = getattr(type(mixer), method, None)
        if function is not None:
            code = getattr(_as_written(function), "__code__", None)
            names.update(code.co_names if code else ())
    return frozenset(names)


def _as_written(function: Callable[..., object]) -> Callable[..., object]:
    """A function under its decorators. In 5.15 transformers has one that does not tell what it wraps, which is then the
    one function that its wrapper, open to any arguments, closes over."""
    while True:
        function = inspect.unwrap(function)
        closed_over = inspect.getclosurevars(function).nonlocals.values() if inspect.isfunction(function) else ()
        inside = [value for value in closed_over if inspect.isfunction(value)]
        if len(inside) != 1 or not function.__code__.co_flags & inspect.CO_VARARGS:
            return function
        function = inside[0]


def rule_of(mixer: nn.Module) -> tuple[Rule, ModuleType] | None:
    """The rule of a recurrent mixer and the module holding its ops, or None."""
    namespace = sys.modules[type(mixer).__module__]
    called = calls_of(mixer)
    for rule in RULES:
        if rule.ops[0] in called and hasattr(namespace, rule.ops[0]):
            return rule.for_mixer(mixer), namespace
    return None


def find_layout(model: nn.Module) -> ModelLayout:
    """Find the blocks of a Hugging Face causal language model.

    Raises:
        UnsupportedModelError: no block has a recurrence of the canonical form, or the parts of a block
            cannot be found; names the model type and the reason.
    """
    if _model_type(model) in REFUSED:
        raise UnsupportedModelError(_refusal(model))
    backbone = _backbone(model)
    blocks = tuple(_block_layout(block) for block in _blocks(model, backbone))
    if not any(block.rule for block in blocks):
        raise UnsupportedModelError(_refusal(model))
    return ModelLayout(
        embed=model.get_input_embeddings(),  # type: ignore[operator]
        blocks=blocks,
        final_norm=_first(backbone, _FINAL_NORM_NAMES, "final norm"),
        unembed=model.get_output_embeddings(),  # type: ignore[operator]
        backbone=backbone,
    )


def out_projection(mixer: nn.Module) -> nn.Module:
    """The linear map from what the heads hand on to the residual stream."""
    return _first(mixer, _OUT_PROJ_NAMES, "output projection")


def _backbone(model: nn.Module) -> nn.Module:
    prefix = getattr(model, "base_model_prefix", "")
    return getattr(model, prefix, model) if prefix else model


def _blocks(model: nn.Module, backbone: nn.Module) -> nn.ModuleList:
    lists = [child for child in _children(backbone, ("layers", "h", "blocks")) if isinstance(child, nn.ModuleList)]
    if lists:
        return lists[0]
    raise UnsupportedModelError(
        f"{type(model).__name__} has no list of blocks named layers, h or blocks; load the causal language model "
        "itself (for a multimodal checkpoint, its text model)"
    )


def _block_layout(block: nn.Module) -> BlockLayout:
    # Families differ in what a block holds: a recurrence or attention (Qwen3.5), both side by side (Falcon-H1), a
    # recurrence somewhere below (Zamba2), or an MLP alone that is called a mixer (Nemotron-H). A recurrence is known by
    # the op that its forward calls, attention by taking an attention mask; names only say where to look.
    recurrent, (rule, namespace) = next(
        ((module, found) for module in block.modules() if (found := rule_of(module))), (None, (None, None))
    )
    if isinstance(block, GeneralizedComponent):  # TransformerLens' parts do not tell attention from an MLP
        added = _added(block, recurrent, "residual_multiplier", "ssm_out_multiplier")
        return BlockLayout(block, recurrent, rule, namespace, added, None, None)
    named = _children(block, _MIXER_NAMES)
    attention = next((child for child in named if child is not recurrent and _mixes_tokens(child)), None)
    # Nemotron-H calls an MLP a mixer, too.
    mlps = _children(block, _MLP_NAMES) + [child for child in named if not _mixes_tokens(child)]
    if recurrent is None and attention is None and not mlps:
        _first(block, _MIXER_NAMES, "token mixer")  # raises
    mixer_out = _added(block, recurrent, "residual_multiplier", "ssm_out_multiplier")
    attn_out = _added(block, attention, "residual_multiplier", "attn_out_multiplier") or mixer_out
    mlp_out = _added(block, mlps[0] if len(mlps) == 1 else None, "residual_multiplier")
    # A block without a norm before its mixer but with one after each part (OLMo's attention blocks) adds the norms'
    # outputs to the residual stream, not the parts' own.
    if hasattr(block, "post_feedforward_layernorm") and not hasattr(block, "input_layernorm"):
        attn_out, mlp_out = Added(block.post_attention_layernorm), Added(block.post_feedforward_layernorm)  # type: ignore[arg-type]
        mixer_out = attn_out if recurrent is not None else None
    heads = None if attention is None else _heads(attention)
    return BlockLayout(block, recurrent or attention, rule, namespace, mixer_out, attn_out, mlp_out, heads, len(mlps))


def _parameters(module: nn.Module) -> frozenset[str]:
    return frozenset(inspect.signature(_as_written(type(module).forward)).parameters)


def _mixes_tokens(module: nn.Module) -> bool:
    """What looks at other tokens must be told which of them are padding."""
    return "attention_mask" in _parameters(module)


def _added(block: nn.Module, module: nn.Module | None, *multipliers: str) -> Added | None:
    """``module`` with the block's own multipliers on its output (Granite's and Falcon-H1's)."""
    if module is None:
        return None
    return Added(module, math.prod(float(getattr(block, name, 1.0)) for name in multipliers))  # type: ignore[arg-type]


def _heads(attention: nn.Module) -> Heads | None:
    """None for attention of an unknown form, which then has no hook."""
    config = getattr(attention, "config", None)
    n = getattr(attention, "num_heads", None) or getattr(config, "num_attention_heads", None)
    projections = _children(attention, _OUT_PROJ_NAMES)
    return Heads(projections[0], n) if n and projections else None


def _children(module: nn.Module, names: tuple[str, ...]) -> list[nn.Module]:
    """The submodules that go by one of ``names``."""
    return [child for name in names if isinstance(child := getattr(module, name, None), nn.Module)]


def _first(module: nn.Module, names: tuple[str, ...], what: str) -> nn.Module:
    if children := _children(module, names):
        return children[0]
    raise UnsupportedModelError(
        f"no {what} found in {type(module).__name__}: looked for {', '.join(names)}, "
        f"found {', '.join(name for name, _ in module.named_children())}"
    )


def _model_type(model: nn.Module) -> str:
    name = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    return str(name).replace("-", "_")


def _refusal(model: nn.Module) -> str:
    model_type = _model_type(model)
    known = ", ".join(dict.fromkeys(rule.name for rule in RULES))
    layers = (REFUSED_LAYERS.get(type(module).__name__) for module in model.modules())
    reason = REFUSED.get(model_type) or next(filter(None, layers), None)
    reason = reason or "none of its layers calls a recurrent op that is known here"
    if model_type == "mamba2" and type(model).__module__.startswith("fla."):
        reason = "this is fla's class of Mamba-2; load the checkpoint with transformers' Mamba2ForCausalLM"
    return f"{model_type!r} cannot be hooked: {reason}. Update rules known here: {known}"
