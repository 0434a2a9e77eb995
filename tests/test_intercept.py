"""The seam between upstream layers and their ops."""

from __future__ import annotations

import functools
import inspect
import types

import pytest
import torch
import transformers.models.qwen3_5.modeling_qwen3_5 as upstream
from conftest import make_hf

from hookpoints import HookedRecurrent
from hookpoints.layer.intercept import running, wrap_ops
from hookpoints.rules import GatedDelta


def test_ops_are_wrapped_once_and_keep_their_identity():
    HookedRecurrent.from_hf(make_hf())
    before = {name: getattr(upstream, name) for name in (*GatedDelta.ops, *GatedDelta.companions)}
    HookedRecurrent.from_hf(make_hf())
    for name, op in before.items():
        assert getattr(upstream, name) is op
        assert op.__name__ == name and inspect.unwrap(op).__module__ == upstream.__name__


def _fast_only(torch_op):
    """What transformers binds when fla is installed: a Triton kernel over the torch original."""

    @functools.wraps(torch_op)
    def fast(*args, **kwargs):
        raise RuntimeError("0 active drivers ([]). There should only be one.")

    return fast


def test_cpu_works_where_fast_kernels_are_installed(monkeypatch, tokens):
    """With fla and triton importable, upstream takes their kernels on a CPU too and crashes; hooked models do not."""
    expected = make_hf()(tokens).logits
    originals = {name: inspect.unwrap(getattr(upstream, name)) for name in (*GatedDelta.ops, *GatedDelta.companions)}
    for name, op in originals.items():
        monkeypatch.setattr(upstream, name, _fast_only(op))
    plain = make_hf()
    with pytest.raises(RuntimeError, match="active drivers"):
        plain(tokens)
    model = HookedRecurrent.from_hf(plain)  # the self-check decodes, so both ops and both convolutions are met
    with torch.no_grad():
        assert torch.equal(model(tokens), expected)
        out = model.generate(tokens, max_new_tokens=3, do_sample=False)
    assert out.shape == (2, 73)


def test_a_plain_model_beside_a_hooked_one_is_not_touched(tokens):
    """Ops are shared by all models of a type; only hooked mixers are met."""
    hooked, plain = HookedRecurrent.from_hf(make_hf()), make_hf()
    with torch.no_grad(), hooked.hooks([("blocks.0.mixer.hook_write", lambda x, hook: torch.zeros_like(x))]):
        edited = hooked(tokens)
        untouched = plain(tokens).logits
    assert torch.equal(untouched, make_hf()(tokens).logits) and not torch.equal(edited, untouched)


def test_edits_of_one_model_do_not_reach_another(tokens):
    from hookpoints import WriteEdit

    one, other = HookedRecurrent.from_hf(make_hf()), HookedRecurrent.from_hf(make_hf())
    with torch.no_grad():
        plain = other(tokens)
        with one.edits(WriteEdit(0, 0, None, mode="delete")):
            assert torch.equal(other(tokens), plain)
            assert not torch.equal(one(tokens), plain)


def test_detaching_takes_everything_off(tokens):
    hf = make_hf()
    count = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in hf.modules())
    model = HookedRecurrent.from_hf(hf)
    model.attachment.detach()
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in hf.modules()) == count


def test_the_scope_closes_when_a_layer_raises(tokens):
    model = HookedRecurrent.from_hf(make_hf())
    mixer = model.attachment.layout.blocks[1].mixer
    handle = mixer.norm.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyError("inside")))
    with pytest.raises(KeyError):
        model(tokens)
    handle.remove()
    from hookpoints.layer import intercept

    assert intercept._RUNNING.get() is None
    with torch.no_grad():
        assert torch.equal(model(tokens), make_hf()(tokens).logits)


@pytest.mark.parametrize("open_ended", [False, True])
def test_unknown_keywords_go_to_ops_that_take_any(open_ended):
    """Upstream hands every kernel the same keywords; an op that does not name one gets it only if it takes any."""

    def closed(q, chunk_size=64):
        return q, chunk_size, {}

    def taking_any(q, chunk_size=64, **kwargs):
        return q, chunk_size, kwargs

    seen = {}

    class Handler:
        module = torch.nn.Identity()

        def handle(self, op, arguments):
            seen.update(arguments)
            return op(**arguments)

    namespace = types.ModuleType("namespace")
    namespace.torch_chunk_gated_delta_rule = taking_any if open_ended else closed
    wrap_ops(namespace, GatedDelta())
    with running(Handler()):
        q, chunk_size, extra = namespace.torch_chunk_gated_delta_rule(torch.ones(1), cu_seqlens=None, use_cache=False)
    assert chunk_size == 64 and q.item() == 1
    assert extra == ({"cu_seqlens": None, "use_cache": False} if open_ended else {})
    assert set(seen) == {"q", "chunk_size", *extra}
