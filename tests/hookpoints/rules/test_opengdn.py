"""Gated DeltaNet against ``opengdn``, an implementation of the paper that shares no code with transformers or fla."""

from __future__ import annotations

import pytest
import torch
from conftest import KeepFloat64, continuing, make_hf, modelling
from opengdn import gated_delta
from torch.nn import functional as F
from torch.testing import assert_close

from hookpoints import HookedRecurrent
from hookpoints.model.inputs import cache_of
from hookpoints.recurrence import Recurrence
from hookpoints.rules.base import l2_normalise

EXACT = {"rtol": 0, "atol": 1e-12}
B, T, H, K, V = 2, 75, 3, 8, 5


def ask(q, k, v, log_decay, beta, state=None):
    """Reads [B,T,H,V] and the last state [B,H,K,V]. opengdn takes no scale, decays that are not logarithms, and keeps
    its state value-first."""
    state = None if state is None else state.mT
    outputs, last = gated_delta(q * q.shape[-1] ** -0.5, k, v, log_decay.exp(), beta, state)
    return outputs, last.mT


def answer(query, key, value, g, beta, initial_state=None, **options):
    """The same, called as transformers' layers call their op."""
    heads = value.shape[2]
    q, k = (l2_normalise(x).repeat_interleave(heads // x.shape[2], 2) for x in (query, key))
    outputs, last = ask(q, k, value, g, beta, initial_state)
    return outputs, last if options["output_final_state"] else None


def factors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return {
        "q": normal(B, T, H, K),
        "k": F.normalize(normal(B, T, H, K), dim=-1),
        "v": normal(B, T, H, V),
        "log_decay": -0.1 * F.softplus(normal(B, T, H)),
        "beta": 2 * normal(B, T, H).sigmoid(),  # negative eigenvalues, too
        "state": normal(B, H, K, V),
    }


def recurrence(q, k, v, log_decay, beta, state) -> Recurrence:
    decayed = log_decay.exp()[..., None] * k
    return Recurrence(q, k, beta[..., None] * v, log_decay, b=decayed, beta=beta, scale=K**-0.5, initial_state=state)


@pytest.mark.parametrize("method", ["chunked", "reference"])
def test_the_recurrence(method):
    """From a state, K != V, a length that no chunk divides."""
    outputs, last = ask(**factors())
    found = recurrence(**factors()).scan(method=method)
    assert_close(found.outputs, outputs, **EXACT)
    assert_close(found.final_state, last, **EXACT)


@torch.no_grad()
def test_a_model(monkeypatch, tokens):
    """Qwen3.5 in float64 with opengdn in the place of its op: prefill, one step from the cache, and the states."""

    def run(model) -> tuple[torch.Tensor, ...]:
        out = model(tokens[:, :-1], use_cache=True)
        step = model(tokens[:, -1:], **continuing(model, out), use_cache=True)
        return out.logits, step.logits, *(cache_of(step).layers[layer].recurrent_states[0] for layer in range(3))

    calls = []
    with KeepFloat64():
        with monkeypatch.context() as patch:
            for name in ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"):
                patch.setattr(modelling("qwen3_5"), name, lambda *args, **kw: calls.append(1) or answer(*args, **kw))
            expected = run(make_hf("qwen3_5").double())
        hooked = HookedRecurrent.from_hf(make_hf("qwen3_5").double(), backend="recurrence")
        found = run(hooked.hf_model)
    assert hooked.cfg.recurrent_layers == [0, 1, 2] and len(calls) == 6
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs, rtol=0, atol=1e-10)
