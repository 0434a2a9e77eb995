"""What other libraries put around a model is looked through, or refused at once with its reason."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import accelerate
import pytest
import torch
from tiny_models import make_hf
from torch import nn

from hookpoints import HookedRecurrent, UnsupportedModelError, attach

WRITE = "blocks.1.mixer.hook_write"


@pytest.fixture
def one_process(tmp_path) -> Iterator[None]:
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def adapted(model: nn.Module) -> nn.Module:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["in_proj_qkv", "out_proj"], init_lora_weights=False)
    return peft.get_peft_model(model, config)


def offloaded(model: nn.Module) -> nn.Module:
    """Whose weights accelerate brings for each call."""
    return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize("wrap", [nn.parallel.DistributedDataParallel, adapted, offloaded, compiled])
@pytest.mark.usefixtures("one_process")
@torch.no_grad()
def test_hooks_act_when_the_wrapper_runs(wrap: Callable[[nn.Module], nn.Module], tokens: torch.Tensor) -> None:
    """They fire and edit; afterwards it is as it was."""
    wrapper = wrap(make_hf())
    plain, shapes = wrapper(tokens).logits, []
    with attach(wrapper) as hooked:
        assert torch.equal(wrapper(tokens).logits, plain)
        listening = (WRITE, lambda write, hook: shapes.append(write.shape))
        with hooked.hooks([listening, (WRITE, lambda write, hook: 0 * write)]):
            edited = wrapper(tokens).logits
    assert shapes == [(2, 70, 4, 8, 6)] and not torch.allclose(edited, plain)
    assert torch.equal(wrapper(tokens).logits, plain)
    model = HookedRecurrent.from_hf(wrapper)
    assert torch.allclose(model(tokens), plain, rtol=1e-4, atol=1e-5)
    if wrap is adapted:
        with pytest.raises(UnsupportedModelError, match="merge_and_unload"):
            model.layer_W_O(1)


@pytest.fixture
def accelerator() -> Iterator[accelerate.Accelerator]:
    """One of mixed precision, which alone wraps a model; accelerate's state is global."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


@torch.no_grad()
def test_a_model_that_accelerate_prepares_and_unwraps(tokens, accelerator):
    """Hooks act before and after the unwrap, and a copy of what is left has none."""
    model = make_hf()
    plain = model(tokens).logits
    hooked = attach(model)
    for step in (accelerator.prepare, lambda model: accelerator.unwrap_model(model, keep_fp32_wrapper=False)):
        step(model)
        with hooked.hooks([(WRITE, lambda write, hook: 0 * write)]):
            assert not torch.allclose(model(input_ids=tokens).logits, plain, rtol=0, atol=0.1)
    twin = copy.deepcopy(model)
    assert torch.equal(model(tokens).logits, plain) and torch.equal(twin(tokens).logits, plain)
    twin.lm_head.weight.data.zero_()
    assert not twin(tokens).logits.any() and torch.equal(model(tokens).logits, plain)


def prompted(model: nn.Module) -> nn.Module:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))


@pytest.mark.parametrize(
    ("wrap", "reason"),
    [
        (prompted, "virtual tokens"),
        (nn.DataParallel, "DistributedDataParallel"),
        (lambda model: {"model": model}, "torch.nn.Module"),
        (lambda model: torch.compile(nn.Linear(2, 2)), "Linear.* cannot be hooked"),
    ],
)
def test_what_cannot_be_hooked_from_inside_says_why(wrap, reason):
    wrapper = wrap(make_hf())
    for call in (attach, HookedRecurrent.from_hf):
        with pytest.raises(UnsupportedModelError, match=reason):
            call(wrapper)


@torch.no_grad()
def test_nnsight(tokens):
    nnsight = pytest.importorskip("nnsight")
    model = make_hf()
    wrapper, plain = nnsight.NNsight(model), model(tokens).logits
    with attach(wrapper) as hooked, hooked.hooks([(WRITE, lambda write, hook: 0 * write)]), wrapper.trace(tokens):
        edited = wrapper.output.logits.save()
    assert not torch.allclose(edited, plain)
