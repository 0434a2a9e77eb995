"""Run other tools on recurrent models, each in its current version, and print the rows of docs/tools.md that they give.

    python scripts/tools_compared.py FOLDER

Every tool gets an environment of its own in FOLDER; those that are there are used again. It borrows what is installed
here, and pip puts the tool in front, with the release of transformers that it asks for. The models are those that ship
with the package, on a CPU. An answer is compared with that of hookpoints, whose own distance from loops over tokens is
on docs/families.md; a fact that is written, with that of a loop over tokens that is here. A run that never read a
span judges the memory from which it was cut. Five minutes, most of them pip's.
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
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.functional import kl_div, pad
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.qwen3_5 import modeling_qwen3_5

ROOT = Path(__file__).resolve().parents[1]
LAYER, HEAD, TOKEN, PROMPT, NEW = 4, 2, 3, 12, 8
DELTA, DECODE = "torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"
"""The write that is edited; tokens of the prompt in generation, of 40; tokens generated."""
FACT, AT = ("Ada Paris Ben Rome Cleo Oslo Dan Lima Ben", "Ada Paris Ben Tokyo Cleo Oslo Dan Lima Ben"), (0, 5, 1)
"""In the model `recall` the write of layer 1 at this text, token and head holds the city."""
START, STOP, READ = 32, 48, 192
"""The span that is cut from a memory of so many tokens; 32 tokens are read after it was cut, in eight texts."""
ENOUGH = 1e-3
"""An answer is right if its largest error is below this share of the largest value, or of what the edit changes."""
MODELS = {"mamba2": ("embedded", "Mamba-2"), "gdn": ("embedded", "Gated DeltaNet"), "recall": ("zoo", "`recall`")}
TASKS = {
    "write": "read every token's write",
    "delete": "delete one token's write",
    "state": "read the state after each token",
    "pattern": "exact attention of the heads",
    "own": "the same, by the tool's own function",
    "generate": "edit all writes of a head in `generate`",
    "fact": "write a fact, the write of another run",
    "inputs": "the same, by the keys, values and betas",
    "cut": "cut a span out of a memory, read on",
    "patterns": "softmax and recurrent pattern in one run",
}
TOOLS = {
    # From 5.15 on, transformers' Gated DeltaNet lacks an attribute that version 3 calls.
    "TransformerLens 3": ("lens", "transformer-lens==3.9.*", "transformers==5.14.*"),
    "TransformerLens 4": ("lens", "transformer-lens==4.3.*", "transformers==5.17.*"),
    "nnsight": ("sight", "nnsight==0.8.*"),
}
Factors = Iterable[Tensor]
"""What the op of Gated DeltaNet is given: q, k, v, g (logarithm of the decay), beta, each [B,T,H,...]."""
Probes = dict[str, Callable[[], Tensor]]
"""What a tool does for each task."""


def put(x: Tensor, hook: object = None, at: Any = (slice(None), TOKEN, HEAD), value: Any = 0) -> Tensor:
    """With other writes there, none if not said, or what they are made with: [B,T,H,...], in place."""
    x[at] = value
    return x


silence = partial(put, at=(slice(None), slice(None), HEAD))


def ours(model: Any, tokens: Tensor, texts: Tensor) -> Probes:
    """hookpoints: the same calls in every family."""
    from hookpoints import HookedRecurrent

    hooked, write = HookedRecurrent.from_hf(model), f"blocks.{LAYER}.mixer.hook_write"

    def generate() -> Tensor:
        with hooked.hooks([(write, silence)]):
            return hooked.generate(tokens[:, :PROMPT], max_new_tokens=NEW, do_sample=False)[:, PROMPT:]

    def fact(name: str = "blocks.1.mixer.hook_write") -> Tensor:
        donor = hooked.run_with_cache(texts[1:], names_filter=name)[1][name]
        return hooked.run_with_hooks(texts[:1], fwd_hooks=[(name, partial(put, at=AT, value=donor[AT]))])

    def patterns() -> Tensor:
        cache: Any = hooked.run_with_cache(tokens, names_filter=lambda name: name.endswith("hook_pattern"))[1]
        return torch.stack([cache["pattern", 0], cache["pattern", LAYER]])

    return {
        "write": lambda: hooked.recurrence(tokens, LAYER).write(),
        "delete": lambda: hooked.run_with_hooks(tokens, fwd_hooks=[(write, put)]),
        "state": lambda: hooked.recurrence(tokens, LAYER).states(method="reference"),
        "pattern": lambda: hooked.recurrence(tokens, LAYER).attention(method="reference"),
        "own": lambda: hooked.recurrence(tokens, LAYER).attention(),
        "generate": generate,
        "fact": fact,
        "cut": lambda: hooked.logits_after(hooked.memory(texts[:, :READ]).without((START, STOP)), texts[:, READ:]),
        "patterns": patterns,
    }


def lens(model: Any, tokens: Tensor, texts: Tensor) -> Probes:
    """TransformerLens: Mamba-2 has a hook on the write if `eager_scan` is set, Gated DeltaNet on its factors."""
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    bridge: Any = build_bridge_from_module(model, type(model).__name__, hf_config=model.config)
    mamba, deltas = model.config.model_type == "mamba2", "blocks.1.linear_attn.hook_"
    edited = f"blocks.{LAYER}.mixer.hook_ssm_write" if mamba else f"blocks.{LAYER}.linear_attn.hook_v"

    def whole(ids: Tensor = tokens) -> Any:
        return bridge.run_with_cache(ids, use_cache=False)[1]

    def factors(cache: Any, layer: int = LAYER) -> list[Tensor]:
        return [cache[f"blocks.{layer}.linear_attn.hook_{name}"] for name in ("q", "k", "v", "log_decay", "beta")]

    def with_(name: Any, change: Callable[..., Tensor], ids: Tensor = tokens) -> Tensor:
        return bridge.run_with_hooks(ids, fwd_hooks=[(name, change)], use_cache=False)

    def generate() -> Tensor:  # hooks inside these layers do not act while `generate` decodes
        ids = tokens[:, :PROMPT]
        for _ in range(NEW):
            ids = torch.cat([ids, with_(edited, silence, ids)[:, -1:].argmax(-1)], dim=1)
        return ids[:, PROMPT:]

    def fact() -> Tensor:
        later = later_reads(*(factors(whole(text[None]), 1) for text in texts))
        return with_(deltas + "recurrence_out", lambda reads, hook: reads + later, texts[:1])

    def patterns() -> Tensor:
        cache = whole()
        return torch.stack([cache["pattern", 0], one_hot_reads(*factors(cache))])

    for block in bridge.blocks if mamba else ():
        block.mixer.eager_scan = True
    of_family: Probes = {
        "write": lambda: whole()[edited].mT,
        "state": lambda: whole()[f"blocks.{LAYER}.mixer.hook_ssm_state"].mT,
        "pattern": lambda: whole().compute_ssm_effective_attention(layer=LAYER),
    }
    if not mamba:
        of_family = {
            "write": lambda: outer(*factors(whole())),
            "state": lambda: whole().compute_ssm_state(layer=LAYER),
            "pattern": lambda: one_hot_reads(*factors(whole())),
            "own": lambda: whole().compute_ssm_effective_attention(layer=LAYER),
            "fact": fact,
            # These hooks change what is erased, too.
            "inputs": lambda: with_(
                lambda name: name in {deltas + "k", deltas + "v", deltas + "beta"},
                lambda x, hook, donor=whole(texts[1:]): put(x, at=AT, value=donor[hook.name][AT]),  # noqa: B008
                texts[:1],
            ),
            "cut": lambda: without(model, texts, partial(factors, whole(texts[:, :READ]))),
            "patterns": patterns,
        }
    return {**of_family, "delete": lambda: with_(edited, put), "generate": generate}


def sight(model: Any, tokens: Tensor, texts: Tensor) -> Probes:
    """nnsight: `source` reaches the arguments of each op and the assignments inside it, in decoding too."""
    import nnsight

    mamba, tokenizer = model.config.model_type == "mamba2", AutoTokenizer.from_pretrained(model.name_or_path)
    traced: Any = nnsight.TransformersModel(model, task="text-generation", tokenizer=tokenizer)

    def op(name: str, layer: int = LAYER) -> Any:
        path = f"backbone.layers.{layer}.mixer" if mamba else f"model.layers.{layer}.linear_attn"
        call = getattr(traced.get(path).source, f"{name}_0")
        return call.source.implementation_0.source if mamba else call

    def value() -> Tensor:  # what the op writes with
        return op("mamba2_chunk_scan").hidden_states_1.output if mamba else op(DELTA).inputs[0][2]

    def decoded() -> Tensor:
        return op("mamba2_selective_state_update").dBx_0.output[:, None] if mamba else op(DECODE).inputs[0][2]

    def factors(layer: int = LAYER) -> list[Tensor]:
        qkv, rest = op(DELTA, layer).inputs
        return [*qkv, rest["g"], rest["beta"]]

    def run(ids: Tensor, *places: Callable[[], Any], change: Callable[[Any], Any] = lambda x: x) -> tuple[Any, Tensor]:
        with traced.trace(ids, use_cache=False):
            found = nnsight.save([change(place()) for place in places])
            logits = traced.output.logits.save()
        return found, logits

    def generate() -> Tensor:
        with traced.generate(tokens[:, :PROMPT], max_new_tokens=NEW, do_sample=False) as tracer:
            silence(value())
            for _ in tracer.iter[: NEW - 1]:
                silence(decoded())
            ids = tracer.result.save()
        return ids[:, PROMPT:]

    def fact() -> Tensor:
        later = later_reads(*(run(text[None], lambda: factors(1))[0][0] for text in texts))
        return run(texts[:1], lambda: op(DELTA, 1).output[0], change=lambda reads: reads.add_(later))[1]

    def patterns() -> Tensor:
        model.set_attn_implementation("eager")
        softmax, found = run(tokens, lambda: traced.get("model.layers.0.self_attn").output[1], factors)[0]
        return torch.stack([softmax, one_hot_reads(*found)])

    states = [partial(factors, layer) for layer in range(1, 5)]
    of_family: Probes = {
        "write": lambda: outer(*run(tokens, factors)[0][0]),
        "pattern": lambda: one_hot_reads(*run(tokens, factors)[0][0]),
        "fact": fact,
        "cut": lambda: without(model, texts, dict(enumerate(run(texts[:, :READ], *states)[0], start=1)).__getitem__),
        "patterns": patterns,
    }
    if mamba:
        places = (lambda: op("mamba2_chunk_scan").B_0.output, value)
        of_family = {"write": lambda: torch.einsum("bthk,bthv->bthkv", *run(tokens, *places)[0])}
    return {"delete": lambda: run(tokens, value, change=put)[1], "generate": generate, **of_family}


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


def later_reads(own: Factors, donor: Factors) -> Tensor:
    """What tokens read of the difference of two writes: the op goes on from it, at its own token without an erase."""
    q, k, v, g, beta = (x[:, AT[1] :].clone() for x in own)
    change, state = outer(*donor) - outer(*own), v.new_zeros(*v.shape[::2], *k.shape[3:], *v.shape[3:])
    state[AT[::2]] = change[AT]
    g[:, 0] = beta[:, 0] = 0
    return pad(rule(q, k, 0 * v, g, beta, initial_state=state)[0], (0, 0, 0, 0, AT[1], 0))


def without(model: Any, texts: Tensor, factors: Callable[[int], Factors]) -> Tensor:
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


def loop(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, swap: bool) -> tuple[Tensor, None]:
    """Gated DeltaNet token by token, which knows no tool; if ``swap``, row 0 has a write of row 1."""
    q, k = (unit(x, v.shape[2])[..., None] for x in (q, k))
    writes, state, reads = k * (beta[..., None] * v)[..., None, :], torch.zeros(()), []
    if swap:
        writes[AT] = writes[1, *AT[1:]]
    for t in range(q.shape[1]):
        state = g[:, t, :, None, None].exp() * state
        state = state - beta[:, t, :, None, None] * k[:, t] * (k[:, t] * state).sum(-2, keepdim=True) + writes[:, t]
        reads.append((q[:, t] * state).sum(-2) / q.shape[3] ** 0.5)
    return torch.stack(reads, dim=1), None


def fact_by_loop(model: Any, texts: Tensor) -> Tensor:
    """Logits of the first text, where layer 1 has a write of the second."""
    swap = iter((False, True))  # by layer
    with patch.object(modeling_qwen3_5, DELTA, lambda q, k, v, g, beta, **_: loop(q, k, v, g, beta, next(swap))):
        return model(texts, use_cache=False).logits[:1]


def answer(probe: Callable[[], Tensor], right: Tensor, plain: Tensor | float) -> str:
    """How far a tool's answer is from the right one, relative to the largest value or to what the edit changes."""
    try:
        error = float((probe() - right).abs().max() / (right - plain).abs().max())
    except Exception as exception:  # whatever a tool raises is its answer
        return f"no ({type(exception).__name__}: {exception})"
    return f"no (off by {error:.2g})" if error > ENOUGH else f"yes {error:.0e}"


def expected(model: Any, tokens: Tensor, family: str) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """The right answers, logits without the edits, and the texts. Prints what hookpoints is not the judge of."""
    from hookpoints import embedded

    encode = AutoTokenizer.from_pretrained(model.name_or_path)
    if family == "recall":
        texts = torch.tensor([encode(text).input_ids for text in FACT])
        right = {task: fact_by_loop(model, texts) for task in ("fact", "inputs")}
        plain = {task: model(texts[:1], use_cache=False).logits for task in right}
        print("fact:", *(encode.decode(x["fact"][0, -1].argmax()) for x in (plain, right)))
        print("hookpoints:", answer(ours(model, tokens, texts)["fact"], right["fact"], plain["fact"]))
        return right, plain, texts
    texts = torch.tensor(encode(embedded.text("test")).input_ids[: 8 * (READ + 32)]).view(8, -1)
    wanted = [*TASKS][:6] + ["cut", "patterns"] * (family == "gdn")
    right = {task: run() for task, run in ours(model, tokens, texts).items() if task in wanted}
    plain = {"delete": model(tokens).logits, "cut": model(texts).logits[:, READ:]}
    if family == "gdn":
        never = model(torch.cat([texts[:, :START], texts[:, STOP:]], dim=1)).logits[:, -32:].log_softmax(-1)
        for title, x in {"before": plain["cut"], "after": right["cut"]}.items():
            kl = kl_div(x.log_softmax(-1).flatten(0, 1), never.flatten(0, 1), reduction="batchmean", log_target=True)
            print(f"{title} the cut, nats per token from a run that never read the span: {kl:.2e}")
    return right, plain, texts


@torch.no_grad()
def probe(name: str, folder: Path) -> None:
    """The answers of one tool in this interpreter; ours are saved for the others."""
    for family, (place, title) in MODELS.items():
        model = AutoModelForCausalLM.from_pretrained(ROOT / "hookpoints" / place / family, dtype=torch.float32).eval()
        tokens, file = torch.arange(40)[None] * 37 % 2000 + 1, folder / f"{family}.pt"
        if name == "ours":
            torch.save(expected(model, tokens, family), file)
        else:
            right, plain, texts = torch.load(file)
            probes = {"lens": lens, "sight": sight}[name](model, tokens, texts)
            for task in [task for task in probes if task in right]:
                print(
                    f"    {TASKS[task]}: {title}: {answer(probes[task], right[task], plain.get(task, 0))}", flush=True
                )


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
