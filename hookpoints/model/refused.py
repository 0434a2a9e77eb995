"""Arguments that users of TransformerLens and circuit-tracer pass and that mean nothing here, each with what to do."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from difflib import get_close_matches
from functools import wraps
from inspect import Parameter, signature
from typing import ParamSpec, TypeVar, cast

from torch import nn
from transformers.utils.generic import TransformersKwargs

from hookpoints.errors import InputError
from hookpoints.refused import UNPROCESSED

P = ParamSpec("P")
T = TypeVar("T")

_CHECKPOINT = "revision= names a commit or tag of the hub"
_ARGUMENTS: dict[str, tuple[object, str]] = {
    **dict.fromkeys(
        ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases", "refactor_factored_attn_matrices"),
        (False, UNPROCESSED),
    ),
    "hf_model": (None, "HookedRecurrent.from_hf(model, tokenizer) takes a model at hand"),
    "tokenizer": (None, "model.tokenizer = tokenizer sets it"),
    "n_devices": (1, 'device_map="auto" spreads a model over devices'),
    "move_to_device": (True, "device= says where it goes"),
    **dict.fromkeys(("checkpoint_index", "checkpoint_value", "checkpoint_label"), (None, _CHECKPOINT)),
    **dict.fromkeys(
        ("load_in_4bit", "load_in_8bit"), (False, "quantization_config=BitsAndBytesConfig(...) of transformers has it")
    ),
    "first_n_layers": (None, "model(tokens, stop_at_layer=n) runs the first n"),
    "n_ctx": (None, "a recurrence has no longest context"),
    "default_prepend_bos": (None, "model.cfg.default_prepend_bos sets it"),
    "default_padding_side": (None, "model.tokenizer.padding_side sets it"),
}
"""Argument of HookedTransformer.from_pretrained, or of older transformers -> the value that asks for nothing, and what
to do instead."""
_HOOKING = "run_with_hooks takes it, and the scope model.hooks acts on any call"
_EDITING = "generate takes it, and the scope model.edits acts on any call"
_ELSEWHERE = {
    "past_kv_cache": "past_key_values= takes a cache of transformers, and memory= a memory",
    "shortformer_pos_embed": "a recurrence has no positions to embed",
    "fwd_hooks": _HOOKING,
    "bwd_hooks": _HOOKING,
    "edits": f"{_EDITING}; run_with_edits(tokens, rows) makes a run of each",
    "edit_rows": _EDITING,
    "rows": "run_with_edits takes it",
    "names_filter": "run_with_cache takes it",
}
"""Argument of HookedTransformer.forward, or of other calls here -> what to do instead."""
_CIRCUIT_TRACER = {
    "prompt": "text= takes it",
    "max_n_logits": "attribution_targets= names tokens",
    "desired_logit_prob": "attribution_targets= names tokens",
    "max_feature_nodes": "measure= says how many writes are deleted",
}
"""Argument of circuit-tracer's ``attribute`` -> what to do instead."""
_FREQUENCY = "repetition_penalty= or a logits_processor= of transformers makes tokens that were there less likely"


def refusing_circuit_tracer(call: Callable[P, T]) -> Callable[P, T]:
    """``call``, which raises InputError for arguments that circuit-tracer's ``attribute`` takes, and says what to do
    instead."""

    @wraps(call)
    def checked(*args: P.args, **kwargs: P.kwargs) -> T:
        for name in kwargs.keys() & _CIRCUIT_TRACER.keys():
            raise InputError(f"{call.__name__} takes no {name}: {_CIRCUIT_TRACER[name]}")
        return call(*args, **kwargs)

    return checked


def refuse_arguments(arguments: Mapping[str, object]) -> dict[str, object]:
    """``arguments`` without TransformerLens' arguments that ask for nothing, as ``fold_ln=False`` does.

    Raises:
        InputError: one asks for something; says what to do instead.
    """
    for name in arguments.keys() & _ARGUMENTS.keys():
        nothing, instead = _ARGUMENTS[name]
        if arguments[name] is not None and arguments[name] != nothing:
            raise InputError(f"from_pretrained takes no {name}={arguments[name]!r}: {instead}")
    return {name: value for name, value in arguments.items() if name not in _ARGUMENTS}


def check_forward_arguments(arguments: Collection[str], model: nn.Module, *callers: Callable[..., object]) -> None:
    """Raise InputError for a name that neither the forward of ``model`` declares, nor one of ``callers``, nor
    transformers' `TransformersKwargs`. Models of transformers take any name, and ignore what they do not know.

    A model of other code may read names that it does not declare. They are let through, unless they are nearly those of
    a declared argument or of another call here.
    """
    known = {*TransformersKwargs.__annotations__, "return_dict"}
    backbone = cast(nn.Module, getattr(model, "base_model", model))  # gets the arguments that the head passes on
    for each in (model.forward, backbone.forward, *callers):
        known |= {name for name, one in signature(each).parameters.items() if one.kind is not Parameter.VAR_KEYWORD}
    is_declared = type(model).forward.__module__.partition(".")[0] in ("transformers", "hookpoints")
    for name in [name for name in arguments if name not in known]:
        near = get_close_matches(name, known | _ELSEWHERE.keys(), n=1, cutoff=0.6 if is_declared else 0.8)
        if near or is_declared:
            nearest = "".join(f"; nearest: {word}" for word in near if word != name)
            instead = "".join(f" ({_ELSEWHERE[word]})" for word in near if word in _ELSEWHERE)
            raise InputError(f"the model takes no {name}{nearest}{instead}")


def generation_arguments(arguments: Mapping[str, object]) -> dict[str, object]:
    """Arguments of TransformerLens' ``generate`` as transformers names them.

    Raises:
        InputError: a ``freq_penalty`` other than 0, or an argument of another call; says what to do instead.
    """
    for name in arguments.keys() & _ELSEWHERE.keys():
        raise InputError(f"generate takes no {name}: {_ELSEWHERE[name]}")
    renamed = dict(arguments)
    if "use_past_kv_cache" in renamed:
        renamed["use_cache"] = renamed.pop("use_past_kv_cache")
    if penalty := renamed.pop("freq_penalty", 0):
        raise InputError(f"generate takes no freq_penalty={penalty!r}: {_FREQUENCY}")
    return renamed
