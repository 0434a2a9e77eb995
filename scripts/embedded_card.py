"""What is measured on a finished checkpoint, and the model card that says it."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from embedded_data import BLOCK_CHARACTERS, HOLD_OUT_EVERY
from embedded_family import Family
from embedded_memory import HeadMemory, head_memories, share_of_long_memory
from embedded_training import Recipe
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerFast

EVALUATION_WINDOW = 512  # tokens; every one is predicted from those before it in its window
SLICE_WINDOWS = 24
MEMORY_WINDOWS = 8
MEMORY_HORIZON = 256  # tokens
LONG_MEMORY = 16  # tokens
POSITION_BANDS = ((1, 8), (8, 32), (32, 128), (128, EVALUATION_WINDOW))

TEMPLATE = Path(__file__).with_name("embedded_card_template.md")


@dataclass(frozen=True)
class Metrics:
    """Figures of one checkpoint; written to metrics.json, source of the card."""

    family: str
    parameters: int
    tokens_seen: int
    stream_tokens: int
    test_tokens: int
    perplexity: float
    perplexity_of_slice: float  # of the first SLICE_WINDOWS windows, for a quick check
    bits_per_byte: float
    characters_per_token: float
    perplexity_by_position: dict[str, float]
    long_memory_share: float
    heads: list[dict[str, float]]
    recipe: dict[str, float | int | str]
    transformers_version: str


class Losses(NamedTuple):
    """Negative log-likelihoods in nats, [windows, EVALUATION_WINDOW - 1]; column i predicts token i + 1."""

    nats: Tensor


def window_tokens(tokenizer: PreTrainedTokenizerFast, text: str) -> Tensor:
    """Whole windows of the text, [windows, EVALUATION_WINDOW]; no BOS, the rest at the end is dropped."""
    ids = torch.tensor(tokenizer(text)["input_ids"])
    whole = len(ids) // EVALUATION_WINDOW * EVALUATION_WINDOW
    return ids[:whole].view(-1, EVALUATION_WINDOW)


@torch.no_grad()
def losses(model: PreTrainedModel, windows: Tensor, batch: int = 8) -> Losses:
    """Loss of every token but the first of every window, in the model's own precision."""
    parts = []
    for tokens in windows.split(batch):
        logits = model(tokens, use_cache=False).logits[:, :-1].float()
        parts.append(cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none"))
    return Losses(torch.cat(parts))


def measure(folder: Path, family: Family, recipe: Recipe, test_text: str, stream_tokens: int, steps: int) -> Metrics:
    """Load a checkpoint as a user would, and measure it on held-out text that no SAE is trained on either."""
    model = family.model_class.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    windows = window_tokens(tokenizer, test_text)
    nats = losses(model, windows).nats
    bytes_per_token = len(test_text.encode()) / len(tokenizer(test_text)["input_ids"])
    memory = head_memories(family.transitions(model, windows[:MEMORY_WINDOWS]), MEMORY_HORIZON)
    layers = [i for i, kind in enumerate(model.config.layer_types) if kind == "linear_attention"]
    return Metrics(
        family=recipe.family,
        parameters=sum(p.numel() for p in model.parameters()),
        tokens_seen=steps * recipe.batch * recipe.length,
        stream_tokens=stream_tokens,
        test_tokens=windows.numel(),
        perplexity=math.exp(nats.mean()),
        perplexity_of_slice=math.exp(nats[:SLICE_WINDOWS].mean()),
        bits_per_byte=float(nats.mean()) / math.log(2) / bytes_per_token,
        characters_per_token=len(test_text) / len(tokenizer(test_text)["input_ids"]),
        perplexity_by_position={f"{a}-{b - 1}": math.exp(nats[:, a - 1 : b - 1].mean()) for a, b in POSITION_BANDS},
        long_memory_share=share_of_long_memory(memory, LONG_MEMORY),
        heads=[_head(row, layers) for row in memory],
        recipe=asdict(recipe),
        transformers_version=transformers.__version__,
    )


def _head(row: HeadMemory, layers: list[int]) -> dict[str, float]:
    """A row of the card, with the layer's number in the whole model, attention layers counted."""
    return {**row._asdict(), "layer": layers[row.layer]}


def write_card(folder: Path, metrics: Metrics, family: Family, name: str) -> None:
    """Write metrics.json and README.md into the checkpoint folder."""
    (folder / "metrics.json").write_text(json.dumps(asdict(metrics), indent=1) + "\n", encoding="utf-8")
    long_heads = [head for head in metrics.heads if head["half_life"] >= LONG_MEMORY]
    facts = {**metrics.recipe, **asdict(metrics)}
    card = TEMPLATE.read_text(encoding="utf-8").format(
        **facts,
        name=name,
        tag=family.title.lower().replace(" ", "-"),
        title=family.title,
        model_class=family.model_class.__name__,
        imports=_imports(family.model_class),
        window=EVALUATION_WINDOW,
        bands=", ".join(f"{value:.1f} (tokens {band})" for band, value in metrics.perplexity_by_position.items()),
        write_name=family.write_name,
        recurrence=family.recurrence_formula,
        architecture=family.architecture,
        horizon=MEMORY_HORIZON,
        memory_windows=MEMORY_WINDOWS,
        long_memory=LONG_MEMORY,
        long_heads=len(long_heads),
        long_names=", ".join(f"{head['layer']}.{head['head']}" for head in long_heads) or "none",
        head_count=len(metrics.heads),
        rows="\n".join(_row(head) for head in metrics.heads),
        hold_out=HOLD_OUT_EVERY,
        block=BLOCK_CHARACTERS,
        vocabulary=len(transformers.AutoTokenizer.from_pretrained(folder)),
        epochs=metrics.tokens_seen / metrics.stream_tokens,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def _imports(model_class: type) -> str:
    """Lines that import the model's class and its tokenizer's."""
    library = ".".join(model_class.__module__.split(".")[:2])
    if library.startswith("transformers."):
        return f"from transformers import AutoTokenizer, {model_class.__name__}"
    return f"from {library} import {model_class.__name__}\nfrom transformers import AutoTokenizer"


def _row(head: dict[str, float]) -> str:
    life = f"{head['half_life']:.0f}" if head["half_life"] < MEMORY_HORIZON else f"{MEMORY_HORIZON} or more"
    return f"| {head['layer']} | {head['head']} | {head['decay']:.4f} | {head['write']:.3f} | {life} |"
