"""The self-check at load: a few tokens that prove the hooks see what the model does, or the model is refused."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import transformers
from torch import Tensor, nn
from transformers import Cache

from hookpoints.errors import SelfCheckError
from hookpoints.model.inputs import cache_of, continuing
from hookpoints.scopes import scoped

if TYPE_CHECKING:
    from hookpoints.layer.context import Recorded
    from hookpoints.model.hooked import HookedModel
    from hookpoints.rules.base import OpResult

_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 2e-2}
"""Relative RMS allowed between the native op and the canonical recurrence. Loose on purpose: what it must catch are
wrong formulas, layouts and factors, which are off by order 1; rounding is the business of the test suite. Upstream's
torch ops compute in float32 whatever the model's dtype."""
_PREFILL = 5
_DECODE = 2


def self_check(model: HookedModel) -> None:
    """Run 7 tokens at once, then 5 and two more one by one from the cache: five passes over a handful of tokens.

    Raises:
        SelfCheckError: a recurrent layer whose op was not intercepted, an op that the canonical recurrence does not
            reproduce, or a decoding step that does not begin with the state that the one before left. Names the
            layer, the op and the versions.

    Warns where upstream's own decoding reads something else than its prefill, although hooks see both as they are.
    """
    count = _PREFILL + _DECODE
    tokens = torch.arange(1, count + 1, device=model.cfg.device).remainder(model.cfg.d_vocab).unsqueeze(0)
    prefilled = check_prefill(model, tokens)
    with torch.no_grad():
        steps = [_recorded_pass(model, tokens[:, :_PREFILL], 0, "prefill")]
        for t in range(_PREFILL, count):
            steps.append(_recorded_pass(model, tokens[:, t : t + 1], t, "decode", steps[-1][1]))
    for layer in model.cfg.recurrent_layers:
        recorded = [step[layer] for step, _ in steps]
        for before, after in itertools.pairwise(recorded):
            left = before.native.final_state
            begun = after.recurrence.initial_state
            if left is None or begun is None:
                raise SelfCheckError(
                    _failure_message(model, layer, "its state does not go from one step of decoding to the next")
                )
            what = "the states that a step of decoding leaves and begins with"
            _compare_outputs(model, layer, before.native, left, begun, what)
        decoded = torch.cat([step.native.outputs for step in recorded[1:]], 1)
        error = relative_error(prefilled[layer].native.outputs[:, _PREFILL:], decoded)
        if not error <= tolerance(model.cfg.dtype, decoded.dtype):
            warnings.warn(
                f"{model.cfg.model_name}: layer {layer} reads {error:.1e} (relative RMS) apart in decoding and in "
                "prefill, upstream's own difference; hooks see both as they are",
                stacklevel=3,
            )


def check_prefill(model: HookedModel, tokens: Tensor) -> dict[int, Recorded]:
    """One pass over ``tokens`` [1,T], recorded and checked."""
    choose_cache(model)
    with torch.no_grad():
        return _recorded_pass(model, tokens, 0, "prefill")[0]


def choose_cache(model: HookedModel) -> None:
    """Try whether upstream runs the model with its own cache: some classes cannot where all layers are recurrent, since
    they ask the cache for its length. Costs a pass over one token."""
    tokens = torch.zeros(1, 1, dtype=torch.long, device=model.cfg.device)
    with torch.no_grad():
        try:
            model.hf_model(input_ids=tokens, **continuing(model.hf_model, None, 0, tokens))
        except ValueError:
            model.attachment.counts_tokens = True


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


def _recorded_pass(
    model: HookedModel, tokens: Tensor, start: int, mode: str, cache: Cache | None = None
) -> tuple[dict[int, Recorded], Cache]:
    """One pass: what it recorded, and its cache. Every layer's op must be met, and its canonical recurrence must give
    its outputs and state."""
    with model.recording() as record:
        out = model.hf_model(input_ids=tokens, **continuing(model.hf_model, cache, start, tokens))
    for layer in model.cfg.recurrent_layers:
        if layer not in record:
            rule = model.attachment.mixers[layer].rule
            raise SelfCheckError(
                _failure_message(model, layer, f"in {mode} none of its ops ({', '.join(rule.ops)}) was met")
            )
        recurrence = record[layer].recurrence
        native = record[layer].native
        outputs, state = recurrence.scan()
        _compare_outputs(model, layer, native, native.outputs, outputs, f"its op and canonical form ({mode} outputs)")
        if native.final_state is not None:
            _compare_outputs(
                model, layer, native, native.final_state, state, f"its op and canonical form ({mode} state)"
            )
    return record, cache_of(out)


def _compare_outputs(
    model: HookedModel, layer: int, native: OpResult, expected: Tensor, actual: Tensor, what: str
) -> None:
    error = relative_error(expected, actual)
    # Under autocast, ops of a float32 model are given half precision, which shows in what they return.
    allowed = tolerance(model.cfg.dtype, *(x.dtype for x in native if x is not None))
    if not error <= allowed:  # NaN is an error too
        raise SelfCheckError(_failure_message(model, layer, f"{what} differ by {error:.1e} (relative RMS)"))


def relative_error(expected: Tensor, actual: Tensor) -> float:
    """Root-mean-square difference over the root-mean-square size."""
    expected = expected.double()
    actual = actual.double()
    return float((expected - actual).pow(2).mean().sqrt() / expected.pow(2).mean().sqrt().clamp_min(1e-12))


def tolerance(*dtypes: torch.dtype) -> float:
    """Relative RMS difference that this check allows where all of ``dtypes`` occur."""
    return max(_TOLERANCE.get(dtype, 5e-2) for dtype in dtypes)


def _failure_message(model: HookedModel, layer: int, what: str) -> str:
    rule = model.attachment.mixers[layer].rule.name
    return (
        f"{model.cfg.model_name}: layer {layer} ({rule}) cannot be hooked: {what}. "
        f"Versions: transformers {transformers.__version__}, torch {torch.__version__}. "
        "Please report this; self_check=False loads the model all the same, at your own risk"
    )
