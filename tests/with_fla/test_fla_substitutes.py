"""Torch in the place of fla's kernels, against fla's own references and loops written out."""

from __future__ import annotations

import inspect
import itertools
import math

import fla_models  # noqa: F401  (skips where fla is not installed)
import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from hookpoints.fla import import_fla, substitutes, substituting
from hookpoints.fla.substitutes import SUBSTITUTES

BOUNDS = torch.tensor([0, 1, 4, 9, 20])
"""Sequences of 1, 3, 5 and 11 tokens: shorter than, as long as and longer than a convolution."""
NEEDS_TRITON = "triton is not installed|active driver|Triton|triton"
"""What a kernel says on a CPU, without triton and with it."""


def normal(seed: int, *shape: int, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("name", ["layer_norm", "rms_norm", "group_norm"])
def test_norms(name, with_residual):
    import_fla()
    from fla.modules.norm import layernorm

    x, weight, bias = normal(0, 2, 3, 12), normal(1, 12), normal(2, 12)
    residual = normal(3, 2, 3, 12) if with_residual else None
    options = {"num_groups": 3} if name == "group_norm" else {}
    expected = getattr(layernorm, f"{name}_ref")(
        x=x, weight=weight, bias=bias, residual=residual, eps=1e-3, prenorm=True, **options
    )
    substitute = SUBSTITUTES["fla.modules.norm.layernorm"][name]
    found = substitute(x, weight, bias, residual, eps=1e-3, prenorm=True, **options)
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs, rtol=0, atol=1e-12)
    assert_close(substitute(x, weight, bias, residual, eps=1e-3, **options), found[0])
    linear = normal(4, 5, 12)
    kinds = {"is_rms_norm": name == "rms_norm", **options}
    assert_close(
        substitutes.layer_norm_linear(x, weight, bias, linear, None, residual, eps=1e-3, **kinds), found[0] @ linear.T
    )


@pytest.mark.parametrize("activation", ["swish", "sigmoid"])
def test_gated_norms(activation):
    x, gate, weight, bias = normal(0, 2, 3, 8), normal(1, 2, 3, 8), normal(2, 8), normal(3, 8)
    opened = gate.sigmoid() * (gate if activation == "swish" else 1)
    expected = F.layer_norm(x, (8,), weight, bias, 1e-6) * opened
    assert_close(substitutes.layer_norm_gated(x, gate, weight, bias, activation), expected, rtol=0, atol=1e-12)
    expected = F.rms_norm(x, (8,), weight, 1e-6) * opened
    assert_close(substitutes.rms_norm_gated(x, gate, weight, None, activation), expected, rtol=0, atol=1e-12)


def test_residual_streams_keep_their_dtype():
    """A float32 residual stream under bfloat16 layers, as kernels round."""
    x, residual = normal(0, 4, 8, dtype=torch.bfloat16), normal(1, 4, 8, dtype=torch.float32)
    y, total = substitutes.rms_norm(x, None, None, residual, prenorm=True)
    assert y.dtype == torch.bfloat16 and total.dtype == torch.float32
    assert torch.equal(total, x.float() + residual)
    assert substitutes.rms_norm(x, None, None, prenorm=True, residual_in_fp32=True)[1].dtype == torch.float32


def test_l2norm():
    x = normal(0, 2, 3, 8)
    assert_close(substitutes.l2norm(x), x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt(), rtol=0, atol=1e-14)


def test_activations():
    x, y = normal(0, 4, 6), normal(1, 4, 6)
    silu = x / (1 + torch.exp(-x))
    for found, expected in (
        (substitutes.sigmoid(x), 1 / (1 + torch.exp(-x))),
        (substitutes.logsigmoid(x, 2.0), -torch.log1p(torch.exp(-x)) / 2),
        (substitutes.swish(x), silu),
        (substitutes.elu_p1(x), torch.where(x > 0, x + 1, x.exp())),
        (substitutes.squared_relu(x), x.clamp_min(0) ** 2),
        (substitutes.gelu(x), 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * x * (1 + 0.044715 * x * x)))),
        (substitutes.bias_gelu(x, y), substitutes.gelu(x + y)),
        (substitutes.swiglu(x, y), silu * y),
        (substitutes.sigmoidglu(x, y), x.sigmoid() * y),
        (substitutes.swiglu_linear(x, y, normal(2, 3, 6), None), (silu * y) @ normal(2, 3, 6).T),
    ):
        assert_close(found, expected, rtol=0, atol=1e-12)
    negative = -x.abs()
    assert_close(substitutes.powglu(negative, y), negative * negative.sigmoid() * y)
    assert_close(substitutes.powglu(torch.full_like(x, 4.0), y), 4.0 * F.sigmoid(torch.tensor(4.0)).double() * y)
    assert substitutes.swish(x.bfloat16()).dtype == torch.bfloat16


def convolved(x, weight, bias, state):
    """[T,D] by the definition; inputs before the sequence come from ``state`` [D,W]."""
    width, out = weight.shape[1], []
    inputs = torch.cat([state.T, x])
    for t in range(len(x)):
        window = inputs[t + 1 : t + 1 + width]  # the last W inputs up to t
        out.append(F.silu((window * weight.T).sum(0) + bias))
    return torch.stack(out), inputs[-width:].T


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("with_state", [True, False])
def test_convolution(with_state, packed):
    weight, bias = normal(1, 6, 4), normal(2, 6)
    x = normal(0, 1, 20, 6) if packed else normal(0, 3, 20, 6)
    count = len(BOUNDS) - 1 if packed else 3
    state = normal(3, count, 6, 4) if with_state else None
    residual = normal(4, *x.shape)
    options = {"cu_seqlens": BOUNDS if packed else None, "activation": "silu", "backend": "triton"}
    y, final = substitutes.causal_conv1d(
        x, weight, bias, residual, initial_state=state, output_final_state=True, **options
    )
    rows = [x[0, a:b] for a, b in itertools.pairwise(BOUNDS)] if packed else list(x)
    states = torch.zeros(count, 6, 4, dtype=torch.float64) if state is None else state
    expected = [convolved(row, weight, bias, before) for row, before in zip(rows, states, strict=True)]
    joined = torch.cat([out for out, _ in expected])[None] if packed else torch.stack([out for out, _ in expected])
    assert_close(y, joined + residual, rtol=0, atol=1e-12)
    assert_close(final, torch.stack([after for _, after in expected]), rtol=0, atol=0)
    assert substitutes.causal_conv1d(x, weight, initial_state=state, cu_seqlens=options["cu_seqlens"])[1] is None


@pytest.mark.parametrize("shape", [(3, 6), (1, 3, 6), (3, 1, 6)])
def test_convolution_steps(shape):
    """One token moves the cache on in place, as fla's kernel does."""
    weight, bias, cache, x = normal(1, 6, 4), normal(2, 6), normal(3, 3, 6, 4), normal(0, *shape)
    before = cache.clone()
    y, same = substitutes.causal_conv1d_update(x, cache, None, weight, bias, "swish")
    whole, after = substitutes.causal_conv1d(x.reshape(3, 1, 6), weight, bias, None, before, True, "swish")
    assert same is cache and torch.equal(cache, after) and y.shape == shape
    assert_close(y.reshape(3, 1, 6), whole)


@pytest.mark.parametrize("interleaved", [True, False])
def test_rotary(interleaved):
    import_fla()
    from fla.modules.rotary.ops import rotary_embedding_ref

    angles = torch.outer(torch.arange(30.0), 10.0 ** -torch.arange(3.0)).double()
    cos, sin, x = angles.cos(), angles.sin(), normal(0, 2, 5, 3, 8)  # 6 of 8 channels turn

    def expected(x, start):
        at = slice(start, start + x.shape[1])
        return rotary_embedding_ref(x, cos[at], sin[at], interleaved)

    def rotate(x, **options):
        return substitutes.rotary_embedding(x, cos, sin, interleaved, **options)

    assert_close(rotate(x, seqlen_offsets=4), expected(x, 4))
    per_row = rotate(x, seqlen_offsets=torch.tensor([0, 7]))
    assert_close(per_row, torch.cat([expected(x[:1], 0), expected(x[1:], 7)]))
    padded = rotate(x, seqlen_offsets=torch.tensor([-2, 0]))  # two tokens of padding before the first row
    assert torch.equal(padded[0, :2], x[0, :2])
    assert_close(padded[:1, 2:], expected(x[:1, 2:], 0))
    packed, starts = normal(1, 1, 20, 3, 8), torch.tensor([0, 3, 1, 2])
    found = rotate(packed, seqlen_offsets=starts, cu_seqlens=BOUNDS)
    for start, a, b in zip(starts.tolist(), BOUNDS, BOUNDS[1:], strict=False):
        assert_close(found[:, a:b], expected(packed[:, a:b], start))
    assert rotate(copy := x.clone(), inplace=True) is copy and torch.equal(copy, rotate(x))


def test_token_shift():
    x, cache = normal(0, 2, 5, 3), normal(1, 2, 3)
    expected = torch.cat([cache[:, None], x[:, :-1]], 1) - x
    out, last = substitutes.token_shift(x, cache=cache, output_cache=True)
    assert_close(out, expected)
    assert torch.equal(last, x[:, -1])
    assert_close(substitutes.token_shift(x)[:, 0], -x[:, 0])
    packed, before = normal(2, 1, 20, 3), normal(3, 4, 3)
    out, last = substitutes.token_shift(packed, BOUNDS, before, output_cache=True)
    for row, (a, b) in enumerate(itertools.pairwise(BOUNDS)):
        alone = substitutes.token_shift(packed[:, a:b], cache=before[row : row + 1])
        assert_close(out[:, a:b], alone)
        assert torch.equal(last[row], packed[0, b - 1])


@pytest.mark.parametrize("window", [(-1, -1), (3, 0)])
def test_attention(window):
    """Grouped heads; queries at the end of a longer stretch of keys; packed sequences."""
    q, k, v = normal(0, 2, 5, 4, 8), normal(1, 2, 9, 2, 8), normal(2, 2, 9, 2, 8)
    expected = torch.zeros_like(q)
    for row in range(2):
        for head in range(4):
            for t in range(5):
                last = t + 4  # the key at the query's own place
                seen = slice(0 if window[0] < 0 else max(0, last - window[0]), last + 1)
                weights = (k[row, seen, head // 2] @ q[row, t, head] / math.sqrt(8)).softmax(0)
                expected[row, t, head] = weights @ v[row, seen, head // 2]
    found = substitutes.flash_attn_func(q, k, v, causal=True, window_size=window)
    assert_close(found, expected, rtol=0, atol=1e-12)
    packed = substitutes.flash_attn_varlen_func(
        q.flatten(0, 1),
        k.flatten(0, 1),
        v.flatten(0, 1),
        cu_seqlens_q=torch.tensor([0, 5, 10]),
        cu_seqlens_k=torch.tensor([0, 9, 18]),
        max_seqlen_q=5,
        max_seqlen_k=9,
        causal=True,
        window_size=window,
    )
    assert_close(packed, expected.flatten(0, 1), rtol=0, atol=1e-12)


def test_substitutes_act_inside_the_scope_only():
    """And on CPU tensors only; layers that were built before hold wrappers, too."""
    import_fla()
    from fla.modules import RMSNorm, ShortConvolution
    from fla.modules.activations import ACT2FN, swish

    norm, conv, x = RMSNorm(8), ShortConvolution(8, 4), normal(0, 2, 5, 8, dtype=torch.float32)
    outside = pytest.raises(RuntimeError, match=NEEDS_TRITON)
    with outside:
        norm(x)
    with torch.no_grad(), substituting():
        assert_close(norm(x), F.rms_norm(x, (8,), norm.weight, norm.eps))
        assert conv(x, output_final_state=True)[1].shape == (2, 8, 4)
        assert_close(ACT2FN["silu"](x), F.silu(x))
        with outside:
            swish(x.to("meta"))
    with outside:
        swish(x)


def test_substitutes_take_what_fla_takes():
    """Same argument names in the same order, so that calls by position and by name both arrive."""
    import_fla()
    for module, functions in SUBSTITUTES.items():
        for name, substitute in functions.items():
            wrapper = getattr(__import__(module, fromlist=[name]), name)
            original = wrapper.__wrapped__ if hasattr(wrapper, "__wrapped__") else None
            try:
                known = list(inspect.signature(original).parameters)
            except (TypeError, ValueError):  # the apply of an autograd function
                continue
            if name.startswith("flash_attn") or known == ["args", "kwargs"]:
                continue
            ours = inspect.signature(substitute).parameters
            open_ended = any(p.kind is p.VAR_KEYWORD for p in ours.values())
            named = [p for p in ours if ours[p].kind is not ours[p].VAR_KEYWORD]
            known = [p for p in known if p != "kwargs"]
            shared = min(len(named), len(known))
            assert named[:shared] == known[:shared], (module, name)
            assert open_ended or len(named) >= len(known), (module, name)
