"""The seam between upstream layers and their ops."""

from __future__ import annotations

import copy
import functools
import inspect
import pickle
import types

import pytest
import torch
import transformers.models.qwen3_5.modeling_qwen3_5 as upstream
from tiny_models import make_hf

from hookpoints import HookedRecurrent, HookpointsError, WriteEdit
from hookpoints.layer import intercept
from hookpoints.layer.intercept import in_torch, running, wrap_ops
from hookpoints.model.attachment import _BlockRun
from hookpoints.model.inputs import cache_argument, cache_of
from hookpoints.rules.mamba2 import MAMBA2
from hookpoints.rules.tables import GATED_DELTA


def _fast_only(torch_op):
    """What transformers binds when fla is installed: a Triton kernel over the torch original."""

    @functools.wraps(torch_op)
    def fast(*args, **kwargs):
        raise RuntimeError("0 active drivers ([]). There should only be one.")

    return fast


def test_one_kernel_is_enough_for_a_layer_to_need_handlers():
    namespace = types.ModuleType("layers")
    namespace.__dict__.update(zip(GATED_DELTA.ops, (doubled, _fast_only(doubled))))
    assert not in_torch(namespace, GATED_DELTA)


def test_cpu_works_where_fast_kernels_are_installed(monkeypatch, tokens):
    """With fla and triton importable, upstream takes their kernels on a CPU too and crashes; hooked models do not."""
    expected = make_hf()(tokens).logits
    originals = {name: inspect.unwrap(getattr(upstream, name)) for name in (*GATED_DELTA.ops, *GATED_DELTA.companions)}
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


class Handler:
    """Of one call in a layer: what it is given, and what it changes."""

    open, module = True, torch.nn.Identity()

    def __init__(self, **changes):
        self.changes, self.seen = changes, {}

    def handle(self, op, arguments):
        self.seen = arguments
        return op(**{**arguments, **self.changes})


def test_a_kernel_of_several_steps_is_declined_inside_a_hooked_layer_alone():
    namespace, name = types.ModuleType("namespace"), MAMBA2.fused[0]

    def declines():
        return "declined"

    @functools.wraps(declines)
    def kernel():
        return "ran"

    setattr(namespace, name, kernel)
    undo = wrap_ops(namespace, MAMBA2)
    assert getattr(namespace, name)() == "ran"
    assert running(Handler(), getattr(namespace, name), (), {}) == "declined"
    undo()
    assert getattr(namespace, name) is kernel


def traces(hf: torch.nn.Module) -> int:
    """What hooking leaves on a model: PyTorch hooks, forwards set on instances, and uses of wrapped ops."""
    return sum(map(len, intercept._USES.values())) + sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + ("forward" in m.__dict__) for m in hf.modules()
    )


def doubled(write, hook):
    return 2 * write


WRITE = "blocks.1.mixer.hook_write"


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 2, 0)])
@torch.no_grad()
def test_several_hooked_models_detach_in_any_order(tokens, order):
    hf = make_hf()
    count, plain = traces(hf), hf(tokens).logits
    models = [HookedRecurrent.from_hf(hf, self_check=False) for _ in range(3)]
    with models[0].hooks([(WRITE, doubled)]):
        expected = hf(tokens).logits
    for n, gone in enumerate(order):
        for model in (models[i] for i in order[n:]):
            with model.hooks([(WRITE, doubled)]):
                assert torch.equal(hf(tokens).logits, expected)
        models[gone].attachment.detach()
        models[gone].attachment.detach()  # a second time changes nothing
        assert torch.equal(hf(tokens).logits, plain)
    assert traces(hf) == count


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda hf: pickle.loads(pickle.dumps(hf))])
@torch.no_grad()
def test_a_copy_of_the_model_carries_no_hooks(tokens, copied):
    hf = make_hf()
    plain = hf(tokens).logits
    model = HookedRecurrent.from_hf(hf)
    with model.hooks([(WRITE, doubled)]):
        twin = copied(hf)
        edited = hf(tokens).logits
        assert torch.equal(twin(tokens).logits, plain) and not torch.equal(edited, plain)
    again = HookedRecurrent.from_hf(twin)
    with again.hooks([(WRITE, doubled)]):
        assert torch.equal(again(tokens), edited) and torch.equal(hf(tokens).logits, plain)
    twin.model.layers[0].mlp.down_proj.weight.zero_()  # a forward of the original would not see it
    assert not torch.equal(twin(tokens).logits, plain) and torch.equal(hf(tokens).logits, plain)


def test_a_block_that_is_left_out_hands_on_what_it_was_given():
    """The stream, and beside it what it would have returned of that: the values of the first layer, say."""
    stream, values = torch.zeros(1), torch.ones(1)
    block = _BlockRun(owner=None, layer=0, hooks=None)  # no hook fires in a block that does not run
    left = block._handed_on(lambda x, v_first: (x + 1, v_first), (stream,), {"v_first": values}, stream)
    assert left[0] is stream and left[1] is values


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_hooked_model_is_not_copied(model, copied):
    with pytest.raises(HookpointsError, match="hf_model"):
        copied(model)


@torch.no_grad()
def test_hooks_of_a_later_attachment_stand_outside(tokens):
    """It changes what goes into an earlier one first, and what comes out of it last, in mixers as in blocks."""
    hf = make_hf()
    earlier, later = (HookedRecurrent.from_hf(hf, self_check=False) for _ in range(2))
    raised, doubling = (lambda x, hook: x + 1), (lambda x, hook: 2 * x)
    for hook, inner, outer in (
        ("mixer.hook_read", raised, doubling),
        ("hook_resid_post", raised, doubling),
        ("mixer.hook_beta", doubling, raised),
        ("hook_resid_pre", doubling, raised),
    ):
        name = f"blocks.1.{hook}"
        with earlier.hooks([(name, inner), (name, outer)]):
            expected = hf(tokens).logits
        with earlier.hooks([(name, raised)]), later.hooks([(name, doubling)]):
            assert torch.equal(hf(tokens).logits, expected)


@torch.no_grad()
def test_where_a_pass_begins_is_unknown_after_a_cache_from_outside():
    """A cache of recurrent layers alone holds no length; the tokens in it are not taken for none."""
    hf, tokens = make_hf("mamba2"), torch.arange(1, 7).unsqueeze(0)
    cache = cache_of(hf(tokens, use_cache=True))
    model, seen = HookedRecurrent.from_hf(hf), []
    with model.hooks([("blocks.0.hook_resid_pre", lambda x, hook: seen.append(model.first_token()))]):
        hf(tokens[:, :1], **{cache_argument(hf): cache})
        hf(tokens)
    assert seen == [None, 0]


@pytest.mark.parametrize("model_type", ["qwen3_5", "mamba2", "rwkv7"])
@torch.no_grad()
def test_an_edit_leaves_the_dtype_that_the_layer_computes_in(model_type, tokens):
    model = HookedRecurrent.from_hf(make_hf(model_type).bfloat16())
    read, dtypes = "blocks.0.mixer.hook_read", []
    for edits in ([], [WriteEdit(0, 0, 3, mode="delete")]):
        with model.edits(edits):
            logits, cache = model.run_with_cache(tokens, names_filter=read)
        dtypes.append((logits.dtype, cache[read].dtype))
    assert dtypes[0] == dtypes[1]
