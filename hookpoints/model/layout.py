"""Where things are in a Hugging Face model: blocks, mixers, norms, projections. Found by looking, not by model type.

A mixer is recurrent when its ``forward`` calls the first op of some rule; the ops are looked up in the module that
defines the mixer's class. So new model types that reuse a known op work without an entry here.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Literal, NamedTuple

from torch import nn

from hookpoints.errors import UnsupportedModelError
from hookpoints.rules.base import Rule
from hookpoints.rules.known import GROUP, REFUSED, RULES
from hookpoints.rules.refused import REFUSED_LAYERS

Part = Literal["mixer", "attn"]
"""Of a block: its recurrence or its attention."""

_MIXER_NAMES = ("linear_attn", "self_attn", "attn", "mixer", "mamba", "attention")
_MLP_NAMES = ("mlp", "feed_forward", "block_sparse_moe", "shared_mlp", "ffn")
_MIXER_NORM_NAMES = ("input_layernorm", "attn_norm", "norm")
_MLP_NORM_NAMES = ("post_attention_layernorm", "pre_ff_layernorm", "mlp_norm", "ffn_norm")
_FINAL_NORM_NAMES = ("norm", "norm_f", "final_layernorm", "ln_f")
_OUT_PROJ_NAMES = ("out_proj", "o_proj")
_QKV = ("q_proj", "k_proj", "v_proj")
_QK_NORMS = ("q_norm", "k_norm")
_FUNCTIONS = {"ALL_ATTENTION_FUNCTIONS", "get_interface", "eager_attention_forward"}
"""Names that attention calls which can be computed by several functions."""
_STREAMS = ("hc_count", "hc_mult")
"""What configurations call the number of streams side by side (hyper-connections) that blocks mix and add to."""


@dataclass(frozen=True, eq=False)
class Added:
    """A module whose output the block adds to the residual stream, times ``scale``."""

    module: nn.Module
    scale: float = 1.0


class HeadsAt(NamedTuple):
    """Where a hook of attention finds its value."""

    hook: str
    module: nn.Module
    entering: bool
    """Whether the value is what the module is given, else what it returns: [B,T,...]."""
    split: tuple[int, int]
    """Number of its heads and size of each, of which one may be -1."""
    scale: float = 1.0
    """The hook sees the value times this (Falcon-H1 multiplies keys)."""


@dataclass(frozen=True, eq=False)
class BlockLayout:
    """The modules of one block that carry hooks. Where the model's blocks are no chain along one residual stream, or
    their parts are of unknown names, these are the mixers alone."""

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
    attn_values: tuple[HeadsAt, ...] = ()
    """Where hooks of attention find their values; none in a block without attention."""
    attn_namespace: ModuleType | None = None
    """The Python module in which attention looks up the function that computes it; None where it calls none."""
    mlps: int = 0
    """Number of MLPs in the block."""

    @property
    def attn_heads(self) -> HeadsAt | None:
        """Where heads of attention, ``split[0]`` of them, are handed to their output projection, if it is known."""
        return next((value for value in self.attn_values if value.hook == "hook_z"), None)

    def norm(self, *, mlp: bool = False) -> nn.Module | None:
        """The norm that the block puts before its mixer (or its MLP), where it has one there."""
        if hasattr(self.block, "post_feedforward_layernorm") and not hasattr(self.block, "input_layernorm"):
            return None  # OLMo's attention blocks have theirs behind
        return next(iter(_named_children(self.block, _MLP_NORM_NAMES if mlp else _MIXER_NORM_NAMES)), None)


@dataclass(frozen=True, eq=False)
class ModelLayout:
    """The modules of a causal language model that carry hooks."""

    embed: nn.Module
    blocks: tuple[BlockLayout, ...]
    final_norm: nn.Module | None
    unembed: nn.Module
    is_chain: bool = True
    """Whether the blocks are a chain along one residual stream [B,T,D]: only then do they have hooks, and can
    a run begin or end between them."""
    backbone: nn.Module | None = None
    """The part that holds the blocks, where it can be run by itself."""

    @property
    def rereads_embeddings(self) -> bool:
        """Whether blocks are handed the token embeddings again (Zamba2) or what the first block makes of them (RWKV-7),
        so that no run can do without the tokens."""
        return any({"original_hidden_states", "v_first"} & _own_parameters(block.block) for block in self.blocks)

    @property
    def first_block_feeds_all(self) -> bool:
        """Whether later blocks are handed what the first one makes (fla's RWKV-7: its values), so that no run can begin
        above it."""
        return self._of_fla and "v_first" in _own_parameters(self.blocks[0].block)

    @property
    def embedding_norm(self) -> nn.Module | None:
        """The norm that the first block puts on the embeddings before it adds to them (fla's RWKV models)."""
        norms = _named_children(self.blocks[0].block, ("pre_norm",)) if self._of_fla else []
        return norms[0] if norms else None

    @property
    def _of_fla(self) -> bool:
        return type(self.blocks[0].block).__module__.startswith("fla.")


def calls_of(mixer: nn.Module) -> frozenset[str]:
    """Names that the mixer's ``forward`` (or ``torch_forward``) refers to, looking through decorators."""
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
        UnsupportedModelError: no layer has a recurrence of the canonical form; names the model type and the reason.
    """
    backbone = _backbone_of(model)
    modules = _blocks_of(backbone)
    if _model_type(model) in REFUSED or not any(_recurrent_mixer(block)[0] for block in modules):
        raise UnsupportedModelError(_refusal_reason(model))
    blocks = tuple(map(_block_layout, modules))
    streams = [getattr(getattr(backbone, "config", None), name, None) or 1 for name in _STREAMS]
    # What a block adds to the stream is known with its mixer or MLP; of TransformerLens' blocks it is what is asked.
    parts_are_known = all(block.mixer is not None or block.mlps > 0 or _is_of_bridge(block.block) for block in blocks)
    is_chain = isinstance(modules, nn.ModuleList) and max(streams) == 1 and parts_are_known
    if not is_chain:
        blocks = tuple(replace(block, mixer_out=None, attn_out=None, mlp_out=None, mlps=0) for block in blocks)
    return ModelLayout(
        embed=model.get_input_embeddings(),  # type: ignore[operator]
        blocks=blocks,
        final_norm=next(iter(_named_children(backbone, _FINAL_NORM_NAMES)), None),
        unembed=model.get_output_embeddings(),  # type: ignore[operator]
        is_chain=is_chain,
        backbone=backbone,
    )


def out_projection(mixer: nn.Module) -> nn.Module:
    """The linear map from what the heads hand on to the residual stream."""
    if children := _named_children(mixer, _OUT_PROJ_NAMES):
        return children[0]
    names = ", ".join(name for name, _ in mixer.named_children())
    raise UnsupportedModelError(
        f"{type(mixer).__name__}: expected an output projection named {' or '.join(_OUT_PROJ_NAMES)}, got {names}"
    )


def _backbone_of(model: nn.Module) -> nn.Module:
    """What holds the blocks; of a multimodal model, in its language model."""
    base = getattr(model, getattr(model, "base_model_prefix", ""), model)
    return next(iter(_named_children(base, ("language_model",))), base)


def _blocks_of(backbone: nn.Module) -> nn.ModuleList | list[nn.Module]:
    """The blocks; where no list of them is found, the recurrent mixers, which then count as blocks."""
    lists = [
        child for child in _named_children(backbone, ("layers", "h", "blocks")) if isinstance(child, nn.ModuleList)
    ]
    if lists:
        return lists[0]
    return [module for module in backbone.modules() if rule_of(module)]


def _recurrent_mixer(block: nn.Module) -> tuple[nn.Module | None, Rule | None, ModuleType | None]:
    """The recurrent mixer somewhere in a block, known by the op that its forward calls; its rule, and where its ops
    are."""
    # The outermost module that calls an op: modules() begins with the block itself.
    for module in block.modules():
        rule_and_ops = rule_of(module)
        if rule_and_ops is not None:
            return (module, *rule_and_ops)
    return None, None, None


def _is_of_bridge(module: nn.Module) -> bool:
    """Whether the module is one that TransformerLens' bridge put there instead of the model's own."""
    from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent  # takes seconds

    return isinstance(module, GeneralizedComponent)


def _block_layout(block: nn.Module) -> BlockLayout:
    # Families differ in what a block holds: a recurrence or attention (Qwen3.5), both side by side (Falcon-H1), a
    # recurrence somewhere below (Zamba2), or an MLP alone that is called a mixer (Nemotron-H). A recurrence is known by
    # the op that its forward calls, attention by taking an attention mask; names only say where to look.
    recurrent, rule, namespace = _recurrent_mixer(block)
    mixer_out = _scaled_output(block, recurrent, "residual_multiplier", "ssm_out_multiplier")
    if _is_of_bridge(block):  # TransformerLens' parts do not tell attention from an MLP
        return BlockLayout(block, recurrent, rule, namespace, mixer_out, None, None)
    named = _named_children(block, _MIXER_NAMES)
    attention = next((child for child in named if child is not recurrent and _mixes_tokens(child)), None)
    # Nemotron-H calls an MLP a mixer, too.
    mlps = _named_children(block, _MLP_NAMES) + [child for child in named if not _mixes_tokens(child)]
    attn_out = _scaled_output(block, attention, "residual_multiplier", "attn_out_multiplier") or mixer_out
    mlp_out = _scaled_output(block, mlps[0] if len(mlps) == 1 else None, "residual_multiplier")
    # A block without a norm before its mixer but with one after each part (OLMo's attention blocks) adds the norms'
    # outputs to the residual stream, not the parts' own.
    if hasattr(block, "post_feedforward_layernorm") and not hasattr(block, "input_layernorm"):
        attn_out = Added(block.post_attention_layernorm)  # type: ignore[arg-type]
        mlp_out = Added(block.post_feedforward_layernorm)  # type: ignore[arg-type]
        mixer_out = attn_out if recurrent is not None else None
    mixer = recurrent or attention
    outs = (mixer_out, attn_out, mlp_out)
    return BlockLayout(block, mixer, rule, namespace, *outs, *_attention_hooks(block, attention), len(mlps))


def _own_parameters(module: nn.Module) -> frozenset[str]:
    return frozenset(inspect.signature(_as_written(type(module).forward)).parameters)


def _mixes_tokens(module: nn.Module) -> bool:
    """What looks at other tokens must be told which of them are padding."""
    return "attention_mask" in _own_parameters(module)


def _scaled_output(block: nn.Module, module: nn.Module | None, *multipliers: str) -> Added | None:
    """``module`` with the block's own multipliers on its output (Granite's and Falcon-H1's)."""
    scale = math.prod(float(getattr(block, name, 1.0)) for name in multipliers)  # type: ignore[arg-type]
    return None if module is None else Added(module, scale)


def _attention_hooks(block: nn.Module, attention: nn.Module | None) -> tuple[tuple[HeadsAt, ...], ModuleType | None]:
    """Where values of attention are met, and its function; of an unknown form those that mean what the table says."""
    config = getattr(attention, "config", None)
    n = getattr(attention, "num_heads", 0) or getattr(config, "num_attention_heads", 0)
    projections = _named_children(attention, _OUT_PROJ_NAMES) if attention and n else []
    values = [HeadsAt("hook_z", projection, True, (n, -1)) for projection in projections[:1]]
    # Wherever it is in the block: Zamba2's is part of a block inside of the block.
    module = next((each for each in block.modules() if calls_of(each) >= _FUNCTIONS), None)
    parts = dict(module.named_children()) if module else {}
    size = getattr(module, "head_dim", None)
    if isinstance(size, int) and set(_QKV) <= parts.keys() <= {*_QKV, *_QK_NORMS, *_OUT_PROJ_NAMES}:
        normed = parts.keys() >= set(_QK_NORMS)
        split = (-1, size)
        q, k = [parts[name] for name in (_QK_NORMS if normed else _QKV)[:2]]
        values += [
            HeadsAt("hook_q", q, normed, split),
            HeadsAt("hook_k", k, normed, split, float(getattr(module, "key_multiplier", 1.0))),
            HeadsAt("hook_v", parts["v_proj"], False, split),
        ]
    return tuple(values), sys.modules[type(module).__module__] if module else None


def _named_children(module: nn.Module, names: tuple[str, ...]) -> list[nn.Module]:
    """The submodules that go by one of ``names``."""
    return [child for name in names if isinstance(child := getattr(module, name, None), nn.Module)]


def _model_type(model: nn.Module) -> str:
    name = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    return str(name).replace("-", "_")


def _refusal_reason(model: nn.Module) -> str:
    model_type = _model_type(model)
    known = ", ".join(dict.fromkeys(rule.name for rule in RULES))
    layers = (REFUSED_LAYERS.get(type(module).__name__) for module in model.modules())
    reason = REFUSED.get(model_type) or next(filter(None, layers), None)
    reason = reason or (
        "none of its layers calls a recurrent op that is known here (a distribution with an entry point of the group "
        f"{GROUP!r} adds a rule)"
    )
    if model_type in ("mamba", "mamba2") and type(model).__module__.startswith("fla."):
        reason = f"this is a class of fla's; load the checkpoint with transformers' {type(model).__name__}"
    return f"{model_type!r} cannot be hooked: {reason}. Update rules known here: {known}"
