"""The self-check at load: a few tokens that prove the hooks see what the model does, or the model is refused."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers import Cache

from hookpoints.errors import SelfCheckError
from hookpoints.model.inputs import cache_argument, cache_of, position_inputs
from hookpoints.scopes import scoped

if TYPE_CHECKING:
    from hookpoints.layer.context import Recorded
    from hookpoints.model.hooked import HookedModel
    from hookpoints.rules.base import OpResult

_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 2e-2}
"""Relative RMS allowed between the native op and the canonical recurrence. Loose on purpose: what it must catch are
wrong formulas, layouts and factors, which are off by order 1; rounding is the business of the test suite. Upstream's
torch ops compute in float32 whatever the model's dtype."""
_PREFILL, _DECODE = 5, 2


class _Pass(NamedTuple):
    """What one pass of the model left."""

    layers: dict[int, Recorded]
    cache: Cache


def self_check(model: HookedModel) -> None:
    """Run 7 tokens at once, then 5 and two more one by one from the cache: four passes over a handful of tokens.

    Raises:
        SelfCheckError: a recurrent layer whose op was not intercepted, an op that the canonical recurrence does not
            reproduce, or a decoding step that does not begin with the state that the one before left. Names the
            layer, the op and the versions.

    Warns where upstream's own decoding reads something else than its prefill, although hooks see both as they are.
    """
    count = _PREFILL + _DECODE
    tokens = torch.arange(1, count + 1, device=model.cfg.device).remainder(model.cfg.d_vocab).unsqueeze(0)
    with torch.no_grad():
        whole = _pass(model, tokens, 0, "prefill").layers
        steps = [_pass(model, tokens[:, :_PREFILL], 0, "prefill")]
        for t in range(_PREFILL, count):
            steps.append(_pass(model, tokens[:, t : t + 1], t, "decode", steps[-1].cache))
    for layer in model.cfg.recurrent_layers:
        recorded = [step.layers[layer] for step in steps]
        for before, after in itertools.pairwise(recorded):
            _check_chain(model, layer, before.native, after.recurrence.initial_state)
        decoded = torch.cat([step.native.outputs for step in recorded[1:]], 1)
        error = relative_error(whole[layer].native.outputs[:, _PREFILL:], decoded)
        if not error <= _allowed(model, recorded[0].native):
            what = f"reads {error:.1e} (relative RMS) apart in decoding and in prefill, upstream's own difference"
            warnings.warn(f"{model.cfg.model_name}: layer {layer} {what}; hooks see both as they are", stacklevel=3)


def check_prefill(model: HookedModel, tokens: Tensor) -> None:
    """The part of ``self_check`` that needs no cache: one pass over ``tokens`` [1,T]."""
    with torch.no_grad():
        _pass(model, tokens, 0, "prefill")


@scoped
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Without dropout for the length of the scope; every module goes back to the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _pass(model: HookedModel, tokens: Tensor, start: int, mode: str, cache: Cache | None = None) -> _Pass:
    """One pass; every layer's op must be met, and its canonical recurrence must give its outputs and state."""
    inputs = {} if cache is None else {cache_argument(model.hf_model): cache}
    # Models whose first block is recurrent need to be told where they are.
    where = torch.arange(start, start + tokens.shape[1], device=tokens.device).unsqueeze(0)
    inputs |= position_inputs(model.hf_model, where)
    with model.recording() as record:
        out = model.hf_model(input_ids=tokens, use_cache=True, **inputs)
    for layer in model.cfg.recurrent_layers:
        if layer not in record:
            rule = model.attachment.mixers[layer].rule
            raise SelfCheckError(_message(model, layer, f"in {mode} none of its ops ({', '.join(rule.ops)}) was met"))
        recurrence, native = record[layer]
        outputs, state = recurrence.scan()
        what = f"the native op and its canonical form ({mode} {{}})"
        _compare(model, layer, native, native.outputs, outputs, what.format("outputs"))
        if native.final_state is not None:
            _compare(model, layer, native, native.final_state, state, what.format("state"))
    return _Pass(record, cache_of(out))


def _check_chain(model: HookedModel, layer: int, before: OpResult, actual: Tensor | None) -> None:
    if before.final_state is None or actual is None:
        raise SelfCheckError(_message(model, layer, "its state does not go from one step of decoding to the next"))
    what = "the states that one step of decoding leaves and the next begins with"
    _compare(model, layer, before, before.final_state, actual, what)


def _compare(model: HookedModel, layer: int, native: OpResult, expected: Tensor, actual: Tensor, what: str) -> None:
    error = relative_error(expected, actual)
    if not error <= _allowed(model, native):
        raise SelfCheckError(_message(model, layer, f"{what} differ by {error:.1e} (relative RMS)"))


def relative_error(expected: Tensor, actual: Tensor) -> float:
    """Root-mean-square difference over the root-mean-square size."""
    expected, actual = expected.double(), actual.double()
    size = expected.pow(2).mean().sqrt().clamp_min(1e-12)
    return float((expected - actual).pow(2).mean().sqrt() / size)


def _allowed(model: HookedModel, native: OpResult) -> float:
    """Under autocast, ops of a float32 model are given half precision, which shows in what they return."""
    found = (x.dtype for x in native if x is not None)
    return max(tolerance(dtype) for dtype in (model.cfg.dtype, *found))


def tolerance(dtype: torch.dtype) -> float:
    """Relative RMS difference that this check allows a model of ``dtype``."""
    return _TOLERANCE.get(dtype, 5e-2)


def _message(model: HookedModel, layer: int, what: str) -> str:
    rule = model.attachment.mixers[layer].rule.name
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
    return (
        f"{model.cfg.model_name}: layer {layer} ({rule}) cannot be hooked: {what}. Versions: {versions}. "
        "Please report this; self_check=False loads the model all the same, at your own risk"
    )
