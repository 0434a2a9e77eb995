"""fla imported without side effects: no triton left behind, transformers' Auto classes and own models as before."""

from __future__ import annotations

import importlib.util
import inspect
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch
import transformers
from conftest import MAKERS, make_hf
from fla_models import make_fla
from torch.testing import assert_close

from hookpoints import HookedRecurrent, UnsupportedModelError
from hookpoints.fla import MODEL_TYPES, import_fla, importing
from hookpoints.fla.triton_standin import has_triton, standing_in

without_triton = pytest.mark.skipif(has_triton(), reason="triton is installed here")


def test_it_comes_whole_and_leaves_nothing_behind():
    before = transformers.AutoConfig.for_model("mamba2")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        fla = import_fla()
    assert fla is import_fla() and fla.models.GLAForCausalLM and fla.layers.GatedLinearAttention
    assert type(transformers.AutoConfig.for_model("mamba2")) is type(before) is transformers.Mamba2Config
    if importlib.util.find_spec("triton") is None:
        from torch.utils._triton import has_triton as torch_sees_triton

        assert not torch_sees_triton()
        assert not any(name.split(".")[0] == "triton" for name in sys.modules)
        with pytest.raises(ImportError):
            import triton  # noqa: F401


def test_auto_classes_of_transformers_own_types_are_its_own():
    """And fla's types are found."""
    import_fla()
    for model_type, own in (("mamba", {}), ("mamba2", {"num_heads": 4, "head_dim": 8})):
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 8, **own}
        config = transformers.AutoConfig.for_model(model_type, **sizes)
        assert type(config).__module__.startswith("transformers.")
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
        assert type(model).__module__.startswith("transformers.")
    for model_type in MODEL_TYPES - {"simple_gla"}:  # a layer without a model
        assert type(transformers.AutoConfig.for_model(model_type)).__module__.startswith(("fla.", "hookpoints."))


@torch.no_grad()
def test_transformers_own_models_run_as_before(tokens):
    """Qwen3.5 in the process of fla: unhooked, hooked, and against a process that never heard of fla."""
    import_fla()
    make_fla("gla")
    code = """
        import sys
        sys.path.insert(0, "tests")
        import torch
        from conftest import VOCAB, make_hf
        tokens = torch.randint(1, VOCAB, (2, 70), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            print(make_hf("qwen3_5")(tokens).logits.double().sum().item().hex())
        assert "fla.layers.gla" not in sys.modules  # transformers itself looks whether there is an fla
    """
    if not has_triton():
        alone = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True
        )
        plain = make_hf("qwen3_5")(tokens).logits
        assert plain.double().sum().item().hex() == alone.stdout.strip()
    hooked = HookedRecurrent.from_hf(make_hf("qwen3_5"))
    logits, _ = hooked.run_with_cache(tokens, names_filter=lambda name: True)
    assert torch.equal(logits, hooked(tokens)) and logits.isfinite().all()
    assert has_triton() or torch.equal(logits, plain)


@pytest.mark.parametrize("model_type", sorted(MAKERS))
@torch.no_grad()
def test_transformers_own_models_run_hooked(model_type, tokens):
    """With triton and without a GPU transformers binds kernels of fla that cannot run: unhooked, its own models of the
    delta rules stop at "0 active drivers". Hooked, each op's torch form computes the pass."""
    import_fla()
    hooked = HookedRecurrent.from_hf(make_hf(model_type), backend="recurrence")
    expected = hooked(tokens)
    hooked.attachment.detach()
    hooked = HookedRecurrent.from_hf(hooked.hf_model)
    assert_close(hooked(tokens), expected, rtol=0, atol=5e-5)
    out = hooked.generate(tokens, max_new_tokens=2, do_sample=False)
    assert torch.equal(out[:, 70], expected[:, -1].argmax(-1))


@without_triton
def test_transformers_binds_no_op_that_cannot_run():
    """Its modelling files look for fla's ops when they are imported."""
    import_fla()
    for name in ("qwen3_next", "kimi_linear"):
        sys.modules.pop(f"transformers.models.{name}.modeling_{name}", None)
        module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
        ops = [f for n, f in vars(module).items() if "chunk_gated_delta" in n or n.startswith("chunk_k")]
        assert ops
        for op in ops:
            bound = inspect.getclosurevars(op).nonlocals
            assert bound["implementation"] is bound["torch_function"]


@torch.no_grad()
def test_models_run_while_they_are_hooked(tokens):
    """Afterwards they are as fla made them: a kernel says why it cannot run, and what to do."""
    model = make_fla("gla", hidden_act="swish", fuse_norm=False)  # layers that hold functions of fla
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    hooked = HookedRecurrent.from_hf(model)
    assert hooked.hf_model(tokens).logits.isfinite().all()
    hooked.attachment.detach()
    for name, module in model.named_modules():
        assert all(module.__dict__[key] is value for key, value in before[name].items() if callable(value))
    reason = "HookedRecurrent.from_hf" if not has_triton() else "driver"
    with pytest.raises(Exception, match=reason):
        model(tokens)


def test_without_fla_the_extra_is_named(monkeypatch, tmp_path):
    model = make_fla("gla")
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(importing.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedModelError, match=r"flash-linear-attention, which is not installed.*\[fla\]"):
        HookedRecurrent.from_pretrained(str(tmp_path))


def test_models_without_a_residual_stream_are_refused():
    with pytest.raises(UnsupportedModelError, match="attnres_block_size"):
        HookedRecurrent.from_hf(make_fla("gla", attnres_block_size=2))


@without_triton
def test_the_stand_in_is_gone_after_an_error():
    with pytest.raises(KeyError), standing_in():
        import triton
        import triton.language as tl

        @triton.autotune(configs=[triton.Config({}, num_warps=4)], key=["D"])
        @triton.jit(do_not_specialize=["T"])
        def kernel(x, D: tl.constexpr): ...

        with pytest.raises(RuntimeError, match="the Triton kernel kernel was launched"):
            kernel[(1,)](None, 3)
        assert triton.cdiv(7, 3) == 3 and [triton.next_power_of_2(n) for n in (1, 3, 8)] == [1, 4, 8]
        raise KeyError
    assert "triton" not in sys.modules and not has_triton()
