"""Write docs/compatibility.md: what hook points do on models that other libraries wrapped, changed or run.

    python scripts/compatibility.py

Every row is run here, on the embedded model and a CPU, in under two minutes. A library that is not installed keeps its
row and says so: ``pip install peft accelerate torchao nnsight``.
"""

from __future__ import annotations

import datetime
import importlib
import logging
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments, pipeline

from hookpoints import HookpointsError, attach
from hookpoints.model import loading

PAGE = Path(__file__).parents[1] / "docs" / "compatibility.md"
WRITE = "blocks.2.mixer.hook_write"
TEXT = "The people of the United States, and the Congress,"


class Subject(NamedTuple):
    """A model that a library has had in its hands."""

    model: object
    """What ``attach`` is given."""
    run: Callable[[], object]
    """Uses it as that library's users do; returns something to compare."""


Make = Callable[[nn.Module, Tensor], Subject]


def called(model: nn.Module, tokens: Tensor) -> Subject:
    return Subject(model, lambda: model(tokens).logits.detach())


def _adapted(model: nn.Module) -> nn.Module:
    peft = importlib.import_module("peft")
    return peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules=["in_proj_qkv", "out_proj"], init_lora_weights=False)
    )


def _prompted(model: nn.Module, tokens: Tensor) -> Subject:
    peft = importlib.import_module("peft")
    return called(
        peft.get_peft_model(model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)), tokens
    )


def _distributed(model: nn.Module, tokens: Tensor) -> Subject:
    if not torch.distributed.is_initialized():
        meeting = Path(tempfile.mkdtemp()) / "meeting"
        torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=0, world_size=1)
    return called(nn.parallel.DistributedDataParallel(model), tokens)


def _int8(model: nn.Module, tokens: Tensor) -> Subject:
    quantization = importlib.import_module("torchao.quantization")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return called(model, tokens)


def _dynamic(model: nn.Module, tokens: Tensor) -> Subject:
    return called(torch.ao.quantization.quantize_dynamic(model, {nn.Linear}), tokens)


def _nnsight(model: nn.Module, tokens: Tensor) -> Subject:
    wrapper = importlib.import_module("nnsight").NNsight(model)

    def traced() -> Tensor:
        with wrapper.trace(tokens):
            logits = wrapper.output.logits.save()
        return logits.detach()

    return Subject(wrapper, traced)


def _trained(model: nn.Module, tokens: Tensor) -> Subject:
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    row = {"input_ids": tokens[0], "labels": tokens[0]}

    def train() -> float:
        model.load_state_dict(start, strict=False)
        with tempfile.TemporaryDirectory() as folder:
            options = {"max_steps": 2, "report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
            trainer = Trainer(model, TrainingArguments(folder, **options), train_dataset=[row] * 4)
            return trainer.train().training_loss

    return Subject(model, train)


def _piped(model: nn.Module, _tokens: Tensor) -> Subject:
    generate = pipeline("text-generation", model=model, tokenizer=loading.load("embedded").tokenizer)
    return Subject(model, lambda: generate(TEXT, max_new_tokens=8, do_sample=False)[0]["generated_text"])


def _unwrapped(model: nn.Module, tokens: Tensor) -> Subject:
    accelerate = importlib.import_module("accelerate")

    def run() -> Tensor:
        accelerate.state.AcceleratorState._reset_state()  # one precision a process, else
        accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
        model.__dict__.pop("_is_accelerate_prepared", None)
        prepared = accelerator.prepare(model)
        inside = prepared(tokens).logits
        return torch.cat([inside, accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)(tokens).logits]).detach()

    return Subject(model, run)


ROWS: tuple[tuple[str, str, Make], ...] = (
    ("LoRA, not merged", "peft", lambda model, tokens: called(_adapted(model), tokens)),
    ("LoRA, merged", "peft", lambda model, tokens: called(_adapted(model).merge_and_unload(), tokens)),  # type: ignore[operator]
    ("prompt tuning", "peft", _prompted),
    ("`torch.compile` (backend eager)", "torch", lambda m, tokens: called(torch.compile(m, backend="eager"), tokens)),
    ("DistributedDataParallel", "torch", _distributed),
    ("dynamic int8 quantisation", "torch", _dynamic),
    ("int8 weights", "torchao", _int8),
    ("`Accelerator.prepare`", "accelerate", lambda m, tokens: called(_prepared(m), tokens)),
    ("`Accelerator.prepare` in bfloat16, then `unwrap_model`", "accelerate", _unwrapped),
    ("`cpu_offload`", "accelerate", lambda m, tokens: called(_offloaded(m), tokens)),
    ("`trace` of NNsight", "nnsight", _nnsight),
    ("`Trainer`, two steps", "transformers", _trained),
    ("`pipeline`", "transformers", _piped),
)
"""What is done, by which library, and how."""


def _prepared(model: nn.Module) -> nn.Module:
    return importlib.import_module("accelerate").Accelerator(cpu=True).prepare(model)


def _offloaded(model: nn.Module) -> nn.Module:
    return importlib.import_module("accelerate").cpu_offload(model, execution_device=torch.device("cpu"))


def outcome(make: Make) -> str:
    """What came of attaching, listening and editing."""
    loaded = loading.load("embedded")
    assert loaded.tokenizer is not None
    torch.manual_seed(0)
    subject = make(loaded.model, loaded.tokenizer(TEXT, return_tensors="pt").input_ids)
    plain, fired = subject.run(), []
    try:
        hooked = attach(subject.model)  # type: ignore[arg-type]
    except HookpointsError as error:
        return f"refused: {error}"
    with hooked:
        if not _same(subject.run(), plain):
            return "**differs** though nobody listens"
        with hooked.hooks([(WRITE, lambda write, hook: fired.append(1))]):
            listened = subject.run()
        with hooked.hooks([(WRITE, lambda write, hook: 0 * write)]):
            edited = subject.run()
    if not _same(subject.run(), plain):
        return "**differs** after `detach`"
    if not fired or _same(edited, plain):
        return "**hooks do not act**"
    return "works: bit-identical unless edited" if _same(listened, plain) else "works; listening changes rounding"


def _same(a: object, b: object) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b


def main() -> None:
    """Run every row and write the page."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    lines = []
    for what, library, make in ROWS:
        begun = time.monotonic()
        try:
            found = version(library)
            result = outcome(make)
        except PackageNotFoundError:
            found, result = "not installed", "not run"
        except Exception as error:  # whatever another library raises is its answer
            result = f"**fails**: {type(error).__name__}: {str(error).splitlines()[0]}"
        lines.append(f"| {what} | {library} {found} | {result} |")
        print(lines[-1], f"{time.monotonic() - begun:.0f} s", flush=True)
    own = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    PAGE.write_text(
        f"""# Compatibility

What hook points do on models that other libraries wrapped, changed or run: `attach` is given what the library's users
hold, and they go on using it. Each row was run by `python scripts/compatibility.py` on {datetime.date.today()}, on a
CPU with {own}: the result must be that of before while nobody listens, a hook on a
write must fire, a write set to zero must change the result, and after `detach` all must be as before.

| what | library | outcome |
|---|---|---|
"""
        + "\n".join(lines)
        + "\n"
    )


if __name__ == "__main__":
    main()
