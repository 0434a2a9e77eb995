"""Run other tools on Gated DeltaNet, each in its current version, and print how far their answers are off.

    python tools/tools_compared.py FOLDER

Every tool gets its own environment in FOLDER; those that are there are used again. It borrows what is installed
here, and pip puts the tool in front, with the release of transformers that it asks for. The models are those that ship
with the package, on a CPU. An answer is compared with that of hookpoints, which the tests hold to loops over tokens.
Five minutes, most of them pip's.
"""
# pyright: reportMissingImports=false

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.qwen3_5 import modeling_qwen3_5

ROOT = Path(__file__).resolve().parents[1]
LAYER, DELTA = 4, "torch_chunk_gated_delta_rule"
FACT, AT = ("Ada Paris Ben Rome Cleo Oslo Dan Lima Ben", "Ada Paris Ben Tokyo Cleo Oslo Dan Lima Ben"), (0, 5, 1)
"""In the model `recall` the write of layer 1 at this text, token and head holds the city."""
START, STOP, READ = 32, 48, 192
"""The span that is cut from a memory of so many tokens; 32 tokens are read after it was cut, in eight texts."""
ENOUGH = 1e-3
"""An answer is right if its largest error is below this share of the largest value, or of what the edit changes."""
MODELS = {"gdn": "embedded", "recall": "zoo"}
TOOLS = {
    # From 5.15 on, transformers' Gated DeltaNet lacks an attribute that version 3 calls.
    "TransformerLens 3": ("lens", "transformer-lens==3.9.*", "transformers==5.14.*"),
    "TransformerLens 4": ("lens", "transformer-lens==4.3.*", "transformers==5.17.*"),
    "nnsight": ("sight", "nnsight==0.8.*"),
}
Probes = dict[str, Callable[[], Tensor]]
"""What a tool does for each task."""


def ours(model: Any, tokens: Tensor, texts: Tensor) -> Probes:
    """hookpoints: the same calls in every family."""
    from hookpoints import HookedRecurrent

    hooked, name = HookedRecurrent.from_hf(model), "blocks.1.mixer.hook_write"

    def fact() -> Tensor:
        donor = hooked.run_with_cache(texts[1:], names_filter=name)[1][name][AT]
        put = [(name, lambda write, hook: write.index_put(tuple(map(torch.tensor, AT)), donor))]
        return hooked.run_with_hooks(texts[:1], fwd_hooks=put)

    def patterns() -> Tensor:
        cache: Any = hooked.run_with_cache(tokens, names_filter=lambda name: name.endswith("hook_pattern"))[1]
        return torch.stack([cache["pattern", 0], cache["pattern", LAYER]])

    def cut() -> Any:
        """As the other tools cut: no token after the span is read again."""
        memory = hooked.memory(texts[:, :READ])
        return memory._composed_memory(START, texts[:, :0], memory.kept.span(STOP, READ), START - STOP)

    return {"fact": fact, "cut": lambda: hooked.logits_after(cut(), texts[:, READ:]), "patterns": patterns}


def probes(
    model: Any,
    tokens: Tensor,
    texts: Tensor,
    factors: Callable[[Tensor, int], list[Tensor]],
    added: Callable[[Tensor, Tensor], Tensor],
    softmax: Callable[[Tensor], Tensor],
) -> Probes:
    """The tasks by what another tool gives: arguments of the op of a layer, logits with reads added to those of layer
    1, and the weights of the attention in layer 0."""
    return {
        "fact": lambda: added(texts[:1], later_reads(*(factors(text[None], 1) for text in texts))),
        "cut": lambda: without(model, texts, partial(factors, texts[:, :READ])),
        "patterns": lambda: torch.stack([softmax(tokens), one_hot_reads(*factors(tokens, LAYER))]),
    }


def lens(model: Any, tokens: Tensor, texts: Tensor) -> Probes:
    """TransformerLens: it has hooks on the factors, which also change what is erased, and none on the write."""
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    bridge: Any = build_bridge_from_module(model, type(model).__name__, hf_config=model.config)

    def factors(ids: Tensor, layer: int) -> list[Tensor]:
        cache = bridge.run_with_cache(ids, use_cache=False)[1]
        return [cache[f"blocks.{layer}.linear_attn.hook_{name}"] for name in ("q", "k", "v", "log_decay", "beta")]

    def added(ids: Tensor, later: Tensor) -> Tensor:
        hooks = [("blocks.1.linear_attn.hook_recurrence_out", lambda reads, hook: reads + later)]
        return bridge.run_with_hooks(ids, fwd_hooks=hooks, use_cache=False)

    softmax = lambda ids: bridge.run_with_cache(ids, use_cache=False)[1]["pattern", 0]  # noqa: E731
    return probes(model, tokens, texts, factors, added, softmax)


def sight(model: Any, tokens: Tensor, texts: Tensor) -> Probes:
    """nnsight: `source` reaches the arguments of each op."""
    import nnsight

    tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
    traced: Any = nnsight.TransformersModel(model, task="text-generation", tokenizer=tokenizer)

    def op(layer: int) -> Any:
        return getattr(traced.get(f"model.layers.{layer}.linear_attn").source, f"{DELTA}_0")

    def run(ids: Tensor, place: Callable[[], Any], change: Callable[[Any], Any] = lambda x: x) -> tuple[Any, Tensor]:
        with traced.trace(ids, use_cache=False):
            found = nnsight.save([change(place())])
            logits = traced.output.logits.save()
        return found[0], logits

    def factors(ids: Tensor, layer: int) -> list[Tensor]:
        qkv, rest = run(ids, lambda: op(layer).inputs)[0]
        return [*qkv, rest["g"], rest["beta"]]

    softmax = lambda ids: run(ids, lambda: traced.get("model.layers.0.self_attn").output[1])[0]  # noqa: E731
    added = lambda ids, later: run(ids, lambda: op(1).output[0], lambda reads: reads.add_(later))[1]  # noqa: E731
    return probes(model, tokens, texts, factors, added, softmax)


# The op of Gated DeltaNet is given q, k, v, g (logarithm of the decay), beta, each [B,T,H,...].


def unit(x: Tensor, heads: int) -> Tensor:
    """Keys or queries as the op of Gated DeltaNet uses them, for each head of the values."""
    return (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()).repeat_interleave(heads // x.shape[2], dim=2)


def outer(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """The writes of Gated DeltaNet [B,T,H,K,V] from what its op is given."""
    return unit(k, v.shape[2])[..., None] * (beta[..., None] * v)[..., None, :]


def rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, **options: Any) -> Any:
    """The op of Gated DeltaNet, called again."""
    q, k = (unit(x, v.shape[2]) for x in (q, k))
    return getattr(modeling_qwen3_5, DELTA)(q, k, v, g=g, beta=beta, **options)


def one_hot_reads(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """Exact attention [B,H,T,S] of Gated DeltaNet: what its op reads of one-hot values."""
    values = torch.eye(q.shape[1])[None, :, None] / beta[..., None]
    return rule(q, k, values, g, beta)[0].transpose(1, 2)


def later_reads(own: Iterable[Tensor], donor: Iterable[Tensor]) -> Tensor:
    """What tokens read of the difference of two writes: the op resumes from it, at its own token without an erase."""
    q, k, v, g, beta = (x[:, AT[1] :].clone() for x in own)
    change, state = outer(*donor) - outer(*own), v.new_zeros(*v.shape[::2], *k.shape[3:], *v.shape[3:])
    state[AT[::2]] = change[AT]
    g[:, 0] = beta[:, 0] = 0
    return pad(rule(q, k, 0 * v, g, beta, initial_state=state)[0], (0, 0, 0, 0, AT[1], 0))


def without(model: Any, texts: Tensor, factors: Callable[[int], Iterable[Tensor]]) -> Tensor:
    """Logits after a cut: states from the factors of all other tokens, attention keys turned back, read on from."""
    kept = [t for t in range(READ) if not START <= t < STOP]
    cache = model(texts[:, :READ], use_cache=True).past_key_values
    for layer, held in enumerate(cache.layers):
        if model.config.layer_types[layer] == "linear_attention":
            held.update_recurrent_state(rule(*(x[:, kept] for x in factors(layer)), output_final_state=True)[1])
        else:
            angles = torch.full((3, 1, 1), START - STOP)
            turn = modeling_qwen3_5.Qwen3_5TextRotaryEmbedding(model.config)(held.keys, angles)
            turned = modeling_qwen3_5.apply_rotary_pos_emb(held.keys, held.keys, *turn)[0]
            held.keys = torch.cat([held.keys[:, :, :START], turned[:, :, STOP:]], dim=2)
            held.values = held.values[:, :, kept]
    return model(texts[:, READ:], past_key_values=cache).logits


def answer(probe: Callable[[], Tensor], right: Tensor, plain: Tensor | float) -> str:
    """How far a tool's answer is from the right one, relative to the largest value or to what the edit changes."""
    try:
        error = float((probe() - right).abs().max() / (right - plain).abs().max())
    except Exception as exception:  # whatever a tool raises is its answer
        return f"no ({type(exception).__name__}: {exception})"
    return f"no (off by {error:.2g})" if error > ENOUGH else f"yes {error:.0e}"


def expected(model: Any, tokens: Tensor, family: str) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """The right answers, logits without the edits, and the texts."""
    from hookpoints import embedded

    encode = AutoTokenizer.from_pretrained(model.name_or_path)
    if family == "recall":
        texts = torch.tensor([encode(text).input_ids for text in FACT])
        right, plain = ours(model, tokens, texts)["fact"](), model(texts[:1], use_cache=False).logits
        return {"fact": right}, {"fact": plain}, texts
    texts = torch.tensor(encode(embedded.text("test")).input_ids[: 8 * (READ + 32)]).view(8, -1)
    tasks, plain = ours(model, tokens, texts), model(texts).logits[:, READ:]
    right = {task: tasks[task]() for task in ("cut", "patterns")}
    return right, {"cut": plain}, texts


@torch.no_grad()
def probe(name: str, folder: Path) -> None:
    """The answers of one tool in this interpreter; ours are saved for the others."""
    for family, place in MODELS.items():
        model = AutoModelForCausalLM.from_pretrained(
            ROOT / "hookpoints" / place / family,
            dtype=torch.float32,
            attn_implementation="eager",  # which returns its weights
        ).eval()
        tokens, file = torch.arange(40)[None] * 37 % 2000 + 1, folder / f"{family}.pt"
        if name == "ours":
            torch.save(expected(model, tokens, family), file)
        else:
            right, plain, texts = torch.load(file)
            tasks = {"lens": lens, "sight": sight}[name](model, tokens, texts)
            said = (f"    {task}: {answer(tasks[task], x, plain.get(task, 0))}" for task, x in right.items())
            print(*said, sep="\n", flush=True)


def main(folder: Path) -> None:
    """Run every tool in an environment that borrows all that is installed here and has the tool in front."""
    folder.mkdir(parents=True, exist_ok=True)
    probe("ours", folder)
    # addsitedir reads the lender's .pth files as well, and so finds packages installed in place.
    lender = f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n"
    settings = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    for tool, (name, *requirements) in TOOLS.items():
        python = folder / tool.replace(" ", "-") / "bin" / "python"
        if not python.exists():
            venv.create(python.parents[1], with_pip=True)
            next(python.parents[1].glob("lib/python*/site-packages")).joinpath("borrowed.pth").write_text(lender)
            subprocess.run([python, "-m", "pip", "install", "-q", "--no-warn-conflicts", *requirements], check=True)
        print(tool, *requirements, flush=True)
        subprocess.run([python, __file__, "--probe", name, folder], check=True, env=settings)


if __name__ == "__main__":
    probe(sys.argv[2], Path(sys.argv[3])) if sys.argv[1] == "--probe" else main(Path(sys.argv[1]))
