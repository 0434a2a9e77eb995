"""Run other tools on recurrent models, each in its current version, and print the rows of docs/tools.md that they give.

    python scripts/tools_compared.py FOLDER

Every tool gets an environment of its own in FOLDER; those that are there are used again. It borrows what is installed
here, and pip puts the tool in front, with the release of transformers that it asks for. The models are those that ship
with the package, on a CPU. An answer is compared with that of hookpoints, whose own distance from loops over tokens is
on docs/families.md. Five minutes, most of them pip's.
"""
# pyright: reportMissingImports=false

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).resolve().parents[1]
LAYER, HEAD, TOKEN, PROMPT, NEW = 4, 2, 3, 12, 8
DELTA = "torch_chunk_gated_delta_rule"
"""The write that is edited; tokens of the prompt in generation, of 40; tokens generated."""
ENOUGH = 1e-3
"""An answer is right if its largest error is below this share of the largest value, or of what the edit changes."""
MODELS = {"mamba2": "Mamba-2", "gdn": "Gated DeltaNet"}
TASKS = {
    "write": "read every token's write",
    "delete": "delete one token's write",
    "state": "read the state after each token",
    "pattern": "exact attention of the heads",
    "generate": "edit all writes of a head in `generate`",
}
TOOLS = {
    # From 5.15 on, transformers' Gated DeltaNet lacks an attribute that version 3 calls.
    "TransformerLens 3": ("lens", "transformer-lens==3.9.*", "transformers==5.14.*"),
    "TransformerLens 4": ("lens", "transformer-lens==4.3.*", "transformers==5.17.*"),
    "nnsight": ("sight", "nnsight==0.8.*"),
}
Probes = dict[str, Callable[[], Tensor]]
"""What a tool does for each task."""


def delete(x: Tensor, hook: object = None) -> Tensor:
    """Without one write, or what it is made with: [B,T,H,...], in place."""
    x[:, TOKEN, HEAD] = 0
    return x


def silence(x: Tensor, hook: object = None) -> Tensor:
    """Without all writes of a head."""
    x[:, :, HEAD] = 0
    return x


def ours(model: Any, tokens: Tensor, family: str) -> Probes:
    """hookpoints: the same calls in every family."""
    from hookpoints import HookedRecurrent

    hooked, write = HookedRecurrent.from_hf(model), f"blocks.{LAYER}.mixer.hook_write"
    r = hooked.recurrence(tokens, LAYER)

    def generate() -> Tensor:
        with hooked.hooks([(write, silence)]):
            return hooked.generate(tokens[:, :PROMPT], max_new_tokens=NEW, do_sample=False)[:, PROMPT:]

    return {
        "write": r.write,
        "delete": lambda: hooked.run_with_hooks(tokens, fwd_hooks=[(write, delete)]),
        "state": partial(r.states, method="reference"),
        "pattern": partial(r.attention, method="reference"),
        "generate": generate,
    }


def lens(model: Any, tokens: Tensor, family: str) -> Probes:
    """TransformerLens: Mamba-2 has a hook on the write if `eager_scan` is set, Gated DeltaNet on its factors."""
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    bridge: Any = build_bridge_from_module(model, type(model).__name__, hf_config=model.config)
    at = f"blocks.{LAYER}.mixer." if family == "mamba2" else f"blocks.{LAYER}.linear_attn."
    edited = at + ("hook_ssm_write" if family == "mamba2" else "hook_v")
    for block in bridge.blocks if family == "mamba2" else ():
        block.mixer.eager_scan = True

    def whole() -> Any:
        return bridge.run_with_cache(tokens, use_cache=False)[1]

    def cached(*names: str) -> list[Tensor]:
        return [whole()[at + name] for name in names]

    def with_(change: Callable[..., Tensor], ids: Tensor = tokens) -> Tensor:
        return bridge.run_with_hooks(ids, fwd_hooks=[(edited, change)], use_cache=False)

    def generate() -> Tensor:  # hooks inside these layers do not act while `generate` decodes
        ids = tokens[:, :PROMPT]
        for _ in range(NEW):
            ids = torch.cat([ids, with_(silence, ids)[:, -1:].argmax(-1)], dim=1)
        return ids[:, PROMPT:]

    if family == "mamba2":
        writes: Probes = {
            "write": lambda: cached("hook_ssm_write")[0].mT,
            "state": lambda: cached("hook_ssm_state")[0].mT,
            "pattern": lambda: whole().compute_ssm_effective_attention(layer=LAYER),
        }
    else:
        writes = {
            "write": lambda: outer(*cached("hook_k", "hook_v", "hook_beta")),
            "state": lambda: whole().compute_ssm_state(layer=LAYER),
            "pattern": lambda: one_hot_reads(*cached("hook_q", "hook_k", "hook_log_decay", "hook_beta")),
        }
    return {**writes, "delete": partial(with_, delete), "generate": generate}


def sight(model: Any, tokens: Tensor, family: str) -> Probes:
    """nnsight: `source` reaches the arguments of each op and the assignments inside it, in decoding too."""
    import nnsight
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
    traced: Any = nnsight.TransformersModel(model, task="text-generation", tokenizer=tokenizer)
    path = f"backbone.layers.{LAYER}.mixer" if family == "mamba2" else f"model.layers.{LAYER}.linear_attn"

    def op(name: str) -> Any:
        call = getattr(traced.get(path).source, f"{name}_0")
        return call.source.implementation_0.source if family == "mamba2" else call

    def value() -> Tensor:  # what the op writes with
        return op("mamba2_chunk_scan").hidden_states_1.output if family == "mamba2" else op(DELTA).inputs[0][2]

    def decoded() -> Tensor:
        update = op("mamba2_selective_state_update") if family == "mamba2" else op("torch_recurrent_gated_delta_rule")
        return update.dBx_0.output[:, None] if family == "mamba2" else update.inputs[0][2]

    def write() -> Tensor:
        with traced.trace(tokens):
            if family == "mamba2":
                found = (op("mamba2_chunk_scan").B_0.output[..., None] * value()[..., None, :]).save()
            else:
                (_, k, v), rest = op(DELTA).inputs
                found = nnsight.save(outer(k, v, rest["beta"]))
        return found

    def deleted() -> Tensor:
        with traced.trace(tokens):
            delete(value())
            logits = traced.output.logits.save()
        return logits

    def generate() -> Tensor:
        with traced.generate(tokens[:, :PROMPT], max_new_tokens=NEW, do_sample=False) as tracer:
            silence(value())
            for _ in tracer.iter[: NEW - 1]:
                silence(decoded())
            ids = tracer.result.save()
        return ids[:, PROMPT:]

    return {"write": write, "delete": deleted, "generate": generate}


def outer(k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
    """The writes of Gated DeltaNet from what its op is given."""
    k = (k / (k.square().sum(-1, keepdim=True) + 1e-6).sqrt()).repeat_interleave(v.shape[2] // k.shape[2], dim=2)
    return k[..., None] * (beta[..., None] * v)[..., None, :]


def one_hot_reads(q: Tensor, k: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """Exact attention of Gated DeltaNet: its op, called again with one-hot values."""
    from transformers.models.qwen3_5 import modeling_qwen3_5

    q, k = (x.repeat_interleave(beta.shape[2] // k.shape[2], dim=2) for x in (q, k))
    values = torch.eye(q.shape[1])[None, :, None] / beta[..., None]
    options = {"g": g, "beta": beta, "use_qk_l2norm_in_kernel": True}
    return getattr(modeling_qwen3_5, DELTA)(q, k, values, **options)[0].transpose(1, 2)


def answer(probe: Callable[[], Tensor], right: Tensor, plain: Tensor | None) -> str:
    """How far a tool's answer is from ours, relative to the largest value or to what the edit changes."""
    try:
        given = probe()
        error = float((given - right).abs().max() / (right if plain is None else right - plain).abs().max())
    except Exception as exception:  # whatever a tool raises is its answer
        return f"no ({type(exception).__name__})"
    return f"no (off by {error:.2g})" if error > ENOUGH else f"yes {error:.0e}"


@torch.no_grad()
def probe(name: str, folder: Path) -> None:
    """The answers of one tool in this interpreter; ours are saved for the others."""
    for family, title in MODELS.items():
        model = AutoModelForCausalLM.from_pretrained(ROOT / "hookpoints" / "embedded" / family).eval()
        tokens, file = torch.arange(40)[None] * 37 % 2000 + 1, folder / f"{family}.pt"
        if name == "ours":
            plain = model(tokens).logits
            torch.save({**{task: run() for task, run in ours(model, tokens, family).items()}, "plain": plain}, file)
            continue
        right, probes = torch.load(file), {"lens": lens, "sight": sight}[name](model, tokens, family)
        for task, run in probes.items():
            found = answer(run, right[task], right["plain"] if task == "delete" else None)
            print(f"    {TASKS[task]}: {title}: {found}", flush=True)


def environment(folder: Path, requirements: tuple[str, ...]) -> Path:
    """The interpreter of an environment that borrows all that is installed here and has ``requirements`` in front."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        packages = next(folder.glob("lib/python*/site-packages"))
        # addsitedir reads the lender's .pth files as well, and so finds packages installed in place.
        lender = f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n"
        (packages / "borrowed.pth").write_text(lender)
        subprocess.run([python, "-m", "pip", "install", "-q", "--no-warn-conflicts", *requirements], check=True)
    return python


def main(folder: Path) -> None:
    """Run every tool in its environment."""
    folder.mkdir(parents=True, exist_ok=True)
    probe("ours", folder)
    settings = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    for tool, (name, *requirements) in TOOLS.items():
        python = environment(folder / tool.replace(" ", "-"), tuple(requirements))
        print(tool, *requirements, flush=True)
        subprocess.run([python, __file__, "--probe", name, folder], check=True, env=settings)


if __name__ == "__main__":
    if sys.argv[1] == "--probe":
        probe(sys.argv[2], Path(sys.argv[3]))
    else:
        main(Path(sys.argv[1]))
