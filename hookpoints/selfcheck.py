"""The self-check at load: a few tokens that prove the hooks see what the model does, or the model is refused."""

from __future__ import annotations

import itertools
import warnings
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import transformers
from torch import Tensor

from . import run
from .errors import SelfCheckError
from .session import cache_argument, position_inputs

if TYPE_CHECKING:
    from .model import HookedRecurrent

_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 2e-2}
"""Relative RMS allowed between the native op and the canonical recurrence. Loose on purpose: what it must catch are
wrong formulas, layouts and factors, which are off by order 1; rounding is the business of the test suite. Upstream's
torch ops compute in float32 whatever the model's dtype."""
_PREFILL, _DECODE = 5, 2


class _Pass(NamedTuple):
    """What one pass of the model left."""

    layers: dict[int, run.Recorded]
    cache: Any


def self_check(model: HookedRecurrent) -> None:
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
            _check_chain(model, layer, before.native.final_state, after.recurrence.initial_state)
        decoded = torch.cat([step.native.outputs for step in recorded[1:]], 1)
        error = _error(whole[layer].native.outputs[:, _PREFILL:], decoded)
        if not error <= _tolerance(model):
            what = f"reads {error:.1e} (relative RMS) apart in decoding and in prefill, upstream's own difference"
            warnings.warn(f"{model.cfg.model_name}: layer {layer} {what}; hooks see both as they are", stacklevel=3)


def _pass(model: HookedRecurrent, tokens: Tensor, start: int, mode: str, cache: Any = None) -> _Pass:
    """One pass; every layer's op must be met, and its canonical recurrence must give its outputs and state."""
    record: dict[int, run.Recorded] = {}
    inputs = {} if cache is None else {cache_argument(model.hf_model): cache}
    # Models whose first block is recurrent need to be told where they are.
    where = torch.arange(start, start + tokens.shape[1], device=tokens.device).unsqueeze(0)
    inputs |= position_inputs(model.hf_model, where)
    with run.scope(model.attachment, record=record):
        out = model.hf_model(input_ids=tokens, use_cache=True, **inputs)
    for layer in model.cfg.recurrent_layers:
        if layer not in record:
            rule = model.attachment.mixers[layer].rule
            raise SelfCheckError(_message(model, layer, f"in {mode} none of its ops ({', '.join(rule.ops)}) was met"))
        recurrence, native = record[layer]
        outputs, state = recurrence.scan()
        _compare(model, layer, native.outputs, outputs, f"the native op and its canonical form ({mode} outputs)")
        if native.final_state is not None:
            _compare(model, layer, native.final_state, state, f"the native op and its canonical form ({mode} state)")
    return _Pass(record, out[cache_argument(model.hf_model)])


def _check_chain(model: HookedRecurrent, layer: int, left: Tensor | None, found: Tensor | None) -> None:
    if left is None or found is None:
        raise SelfCheckError(_message(model, layer, "its state does not go from one step of decoding to the next"))
    _compare(model, layer, left, found, "the states that one step of decoding leaves and the next begins with")


def _compare(model: HookedRecurrent, layer: int, expected: Tensor, found: Tensor, what: str) -> None:
    error = _error(expected, found)
    if not error <= _tolerance(model):
        raise SelfCheckError(_message(model, layer, f"{what} differ by {error:.1e} (relative RMS)"))


def _error(expected: Tensor, found: Tensor) -> float:
    expected, found = expected.double(), found.double()
    size = expected.pow(2).mean().sqrt().clamp_min(1e-12)
    return float((expected - found).pow(2).mean().sqrt() / size)


def _tolerance(model: HookedRecurrent) -> float:
    return _TOLERANCE.get(model.cfg.dtype, 5e-2)


def _message(model: HookedRecurrent, layer: int, what: str) -> str:
    rule = model.attachment.mixers[layer].rule.name
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
    return (
        f"{model.cfg.model_name}: layer {layer} ({rule}) cannot be hooked: {what}. Versions: {versions}. "
        "Please report this; self_check=False loads the model all the same, at your own risk"
    )
