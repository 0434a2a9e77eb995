"""The self-check at load: a few tokens that prove the hooks see what the model does, or the model is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import transformers
from torch import Tensor

from . import run
from .errors import SelfCheckError

if TYPE_CHECKING:
    from .model import HookedRecurrent

_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 2e-2}
"""Relative RMS allowed between the native op and the canonical recurrence. Loose on purpose: what it must catch are
wrong formulas, layouts and factors, which are off by order 1; rounding is the business of the test suite. Upstream's
torch ops compute in float32 whatever the model's dtype."""
_PREFILL, _DECODE = 5, 2


def self_check(model: HookedRecurrent) -> None:
    """Run 5 tokens, then 2 one by one from the cache; cost: three forward passes over a handful of tokens.

    Raises:
        SelfCheckError: a recurrent layer whose op was not intercepted, an op that the canonical recurrence does not
            reproduce, or decoding that disagrees with prefill. Names the layer, the op and the versions.
    """
    count = _PREFILL + _DECODE
    tokens = torch.arange(1, count + 1, device=model.cfg.device).remainder(model.cfg.d_vocab).unsqueeze(0)
    with torch.no_grad():
        whole = _pass(model, tokens, "prefill")
        steps = _decode(model, tokens)
    for layer in model.cfg.recurrent_layers:
        expected = whole[layer].outputs[:, _PREFILL:]
        _compare(model, layer, expected, torch.cat([step[layer].outputs for step in steps], 1), "prefill and decode")


def _decode(model: HookedRecurrent, tokens: Tensor) -> list[dict[int, run.OpResult]]:
    out = model.hf_model(input_ids=tokens[:, :_PREFILL], use_cache=True)
    name = next(name for name in ("cache", "past_key_values", "cache_params") if out.get(name) is not None)
    steps = []
    for t in range(_PREFILL, tokens.shape[1]):
        # Models whose first block is recurrent need to be told where they are.
        where = torch.tensor([[t]], device=tokens.device)
        steps.append(_pass(model, tokens[:, t : t + 1], "decode", **{name: out[name]}, position_ids=where))
    return steps


def _pass(model: HookedRecurrent, tokens: Tensor, mode: str, **inputs: object) -> dict[int, run.OpResult]:
    """One pass; every layer's op must be met, and its canonical recurrence must give its outputs and state."""
    record: dict[int, run.Recorded] = {}
    with run.scope(model.attachment, record=record):
        model.hf_model(input_ids=tokens, use_cache=True, **inputs)
    for layer in model.cfg.recurrent_layers:
        if layer not in record:
            rule = model.attachment.mixers[layer].rule
            raise SelfCheckError(_message(model, layer, f"in {mode} none of its ops ({', '.join(rule.ops)}) was met"))
        recurrence, native = record[layer]
        outputs, state = recurrence.scan()
        _compare(model, layer, native.outputs, outputs, f"the native op and its canonical form ({mode} outputs)")
        if native.final_state is not None:
            _compare(model, layer, native.final_state, state, f"the native op and its canonical form ({mode} state)")
    return {layer: recorded.native for layer, recorded in record.items()}


def _compare(model: HookedRecurrent, layer: int, expected: Tensor, found: Tensor, what: str) -> None:
    expected, found = expected.double(), found.double()
    size = expected.pow(2).mean().sqrt().clamp_min(1e-12)
    error = float((expected - found).pow(2).mean().sqrt() / size)
    if not error <= _TOLERANCE.get(model.cfg.dtype, 5e-2):
        raise SelfCheckError(_message(model, layer, f"{what} differ by {error:.1e} (relative RMS)"))


def _message(model: HookedRecurrent, layer: int, what: str) -> str:
    rule = model.attachment.mixers[layer].rule.name
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
    return (
        f"{model.cfg.model_name}: layer {layer} ({rule}) cannot be hooked: {what}. Versions: {versions}. "
        "Please report this; self_check=False loads the model all the same, at your own risk"
    )
