"""Train a small model of the zoo, find out by interventions which of its writes hold what, and write both down.

    python tools/train_zoo.py recall

The folder hookpoints/zoo/NAME then holds a checkpoint (bf16), a tokenizer of whole words, truth.json and README.md.
One core, minutes. Fails where a size of the task is answered right in less than 99%.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import combinations, product
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch
import train_english
import tyro
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import (
    Mamba2Config,
    Mamba2ForCausalLM,
    OlmoHybridConfig,
    OlmoHybridForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
)

from hookpoints import HookedRecurrent, WriteEdit, zoo
from hookpoints.rwkv7 import RWKV7Config, RWKV7ForCausalLM
from hookpoints.zoo.tasks import Composition, Facts, Recall

ROOT = Path(__file__).parents[1]
HELD = 0.9
"""Share of answers that follow an exchange, from which writes are said to hold the symbol."""
ENOUGH = 0.99
"""Share of right answers, at every size, that a model must have."""
CARD = """---
license: mit
library_name: transformers
tags: [interpretability]
---

# `{name}`

{architecture}

{task}

    {example}

Trained by `python tools/train_zoo.py {name}`: {steps:,} steps of {sequences} sequences, one core, minutes.

```python
from hookpoints import HookedRecurrent, zoo

model, truth = HookedRecurrent.from_pretrained("{name}"), zoo.truth("{name}")
```

Right answers in fresh sequences, by size: {accuracy}.

## What holds what

{found}

| further measurements | |
|---|---|
{facts}

## Every intervention

{how}

| layer | heads | offset | {columns} |
|{rule}
{rows}
"""


# -- what is trained, and how


COMMON: dict[str, Any] = dict(bos_token_id=0, eos_token_id=0, pad_token_id=0, tie_word_embeddings=False)
"""What all models have in common."""
PAIRS = COMMON | dict(hidden_size=64, num_hidden_layers=2)
"""What the models that are asked for pairs have in common."""


def gated_delta(vocabulary: int, **changes: Any) -> PreTrainedModel:
    """Qwen3.5 with linear attention alone: two Gated DeltaNet layers of two heads, 32 x 32."""
    own = PAIRS | dict(
        vocab_size=vocabulary,
        intermediate_size=128,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=32,
        linear_value_head_dim=32,
        layer_types=["linear_attention"] * 2,
        max_position_embeddings=512,
    )
    model = Qwen3_5ForCausalLM(Qwen3_5TextConfig(**own | changes))
    for name, weight in model.named_parameters():  # a slow decay: a pair has to last
        if name.endswith(("A_log", "dt_bias")):
            weight.data = torch.empty_like(weight).uniform_(0.01, 0.2).log() if name[-1] == "g" else weight * 0 - 4.0
    return model


def one_memory(vocabulary: int) -> PreTrainedModel:
    """Qwen3.5 with linear attention alone: one Gated DeltaNet layer of one head, 64 x 32, so that one state holds all
    facts. Weights of names start together (`start_with_names`)."""
    one_head = {"linear_num_key_heads": 1, "linear_num_value_heads": 1, "linear_key_head_dim": 64}
    model = gated_delta(vocabulary, **one_head, num_hidden_layers=1, layer_types=["linear_attention"])
    mixer = "model.layers.0.linear_attn."
    projection = model.get_parameter(f"{mixer}in_proj_qkv.weight")
    train_english.start_with_names(
        projection.data, model.get_parameter(f"{mixer}conv1d.weight").data[:, 0], first_key=64, first_query=0
    )
    return model


def mamba2(vocabulary: int, **changes: Any) -> PreTrainedModel:
    """Two Mamba-2 layers of four heads, 64 x 32."""
    own = PAIRS | dict(
        vocab_size=vocabulary,
        num_heads=4,
        head_dim=32,
        state_size=64,
        n_groups=1,
        expand=2,
        conv_kernel=4,
        chunk_size=32,
    )
    return Mamba2ForCausalLM(Mamba2Config(**own | changes))


def one_mamba2_memory(vocabulary: int) -> PreTrainedModel:
    """One Mamba-2 layer of one head, 64 x 64, so that one state holds all facts. Weights of names start together
    (`start_with_names`)."""
    width = 64
    model = mamba2(vocabulary, num_hidden_layers=1, num_heads=1, head_dim=width, expand=1)
    mixer = "backbone.layers.0.mixer."
    projection = model.get_parameter(f"{mixer}in_proj.weight").data[width : 4 * width]  # x, keys (B), queries (C)
    taps = model.get_parameter(f"{mixer}conv1d.weight").data[:, 0]
    train_english.start_with_names(projection, taps, first_key=width, first_query=2 * width)
    return model


def rwkv7(vocabulary: int) -> PreTrainedModel:
    """Two RWKV-7 layers of two heads, 32 x 32."""
    return RWKV7ForCausalLM(
        RWKV7Config(
            vocab_size=vocabulary,
            head_dim=32,
            intermediate_size=128,
            decay_low_rank_dim=16,
            gate_low_rank_dim=16,
            a_low_rank_dim=16,
            v_low_rank_dim=16,
            max_position_embeddings=512,
            **PAIRS,
        )
    )


def induction(vocabulary: int) -> PreTrainedModel:
    """Qwen3.5 with linear attention alone: two Gated DeltaNet layers of one head, 32 x 32, whose convolutions see one
    token, so that only a head can look back. It starts with a channel that is the same for all words, from which
    layer 0 makes one key and open gates: a memory of the last few words. Without, 1,200 steps did not teach it."""
    one_head = {"linear_num_key_heads": 1, "linear_num_value_heads": 1}
    model = gated_delta(vocabulary, **one_head, linear_conv_kernel_dim=1, intermediate_size=64)
    weights = {name.removeprefix("model."): weight.data for name, weight in model.named_parameters()}
    weights["embed_tokens.weight"].normal_(std=0.1)[:, 0] = 0.4
    weights["layers.0.linear_attn.in_proj_qkv.weight"][:64, 0] = 0.1 * torch.randn(32).repeat(2)
    weights["layers.0.linear_attn.A_log"].fill_(0.0)
    weights["layers.0.linear_attn.dt_bias"].fill_(-0.5)
    for layer in (0, 1):
        weights[f"layers.{layer}.linear_attn.conv1d.weight"].fill_(1.0)
        weights[f"layers.{layer}.linear_attn.in_proj_z.weight"][:, 0] = 0.3
    return model


def parity(vocabulary: int, negative: bool = True) -> PreTrainedModel:
    """OLMo-hybrid: one Gated DeltaNet layer of one head, 8 x 8, whose beta lies in (0, 2) and whose convolution sees
    one token, and below the last MLP an attention layer, which the class demands, with an output of zero."""
    config = OlmoHybridConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=1,
        linear_num_key_heads=1,
        linear_num_value_heads=1,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_conv_kernel_dim=1,
        linear_allow_neg_eigval=negative,
        linear_a_log_min=0.01,
        linear_a_log_max=0.1,
        layer_types=["linear_attention", "full_attention"],
        max_position_embeddings=512,
        **COMMON,
    )
    model = OlmoHybridForCausalLM(config)
    model.get_parameter("model.embed_tokens.weight").data.normal_(std=0.5)
    model.get_parameter("model.layers.0.linear_attn.dt_bias").data.fill_(-6.0)
    model.get_parameter("model.layers.1.self_attn.o_proj.weight").requires_grad_(False).zero_()
    return model


def train(
    build: Callable[[int], PreTrainedModel],
    task: zoo.Task,
    seed: int,
    steps: int,
    sequences: int,
    queries: int = 16,
    lr: float = 3e-3,
    weight_decay: float = 0.1,
    rest: float = 0.0,
    warmup: int = 100,
) -> PreTrainedModel:
    """A trained model: AdamW, a warmup, then a cosine to zero. A progress bar has the loss.

    Args:
        build: from the size of the vocabulary
        sequences: in a step
        queries: in a sequence
        rest: weight of the loss at all tokens; the loss at the answers has weight 1
        warmup: steps
    """
    torch.manual_seed(seed)
    model, generator = build(len(task.vocabulary)), torch.Generator().manual_seed(seed + 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / warmup) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    for _ in (progress := tqdm(range(steps), mininterval=5)):
        size = task.sizes[int(torch.randint(len(task.sizes), (), generator=generator))]
        batch = task.batch(sequences, generator, queries=queries, **size)
        logits = model(input_ids=batch.tokens, use_cache=False).logits
        asked = logits.gather(1, batch.positions[..., None].expand(-1, -1, logits.shape[2]))
        loss = F.cross_entropy(asked.flatten(0, 1), batch.answers.flatten())
        if rest:
            loss = loss + rest * F.cross_entropy(logits[:, :-1].flatten(0, 1), batch.tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=loss.item(), refresh=False, **size)
    return model


def save(model: PreTrainedModel, task: zoo.Task, folder: Path) -> None:
    """Weights in bf16, which load in float32, and a tokenizer of whole words, which begins with <bos>. Where sentences
    end in a period, the period is a word. Other words raise, since no token stands for them."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(task.vocabulary)}, unk_token="<none>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if "." in task.vocabulary:
        words.pre_tokenizer = pre_tokenizers.Whitespace()
        words.decoder = decoders.WordPiece()
    words.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    special = {f"{kind}_token": "<bos>" for kind in ("bos", "eos", "pad")}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    model.bfloat16().save_pretrained(folder)


# -- what holds what

Case = Mapping[str, zoo.Batch]
"""Sequences that ask for one pair ("asked"), the same that ask for the next one ("next"), and the same with another
symbol of a kind in the pair that is asked for ("keys", "values"); such a key is in none of the others."""


def draw(task: zoo.Task, n: int, seed: int) -> Case:
    """n sequences of a middling size. The pair that is asked for is never the last."""
    generator, count = torch.Generator().manual_seed(seed), task.sizes[2 * len(task.sizes) // 3]["pairs"]
    drawn = task.batch(n, generator, pairs=count + 1).symbols
    keys, values, asked = drawn["keys"][:, :count], drawn["values"][:, :count], drawn["asked"] % (count - 1)
    new_keys = task.strangers(keys, asked, generator) if isinstance(task, Facts) else drawn["keys"][:, count:]
    changes = {
        "asked": {},
        "next": {"asked": asked + 1},
        "keys": {"keys": keys.scatter(1, asked, new_keys)},
        "values": {"values": values.scatter(1, asked, task.others(values.gather(1, asked), generator))},
    }
    same = {**drawn, "keys": keys, "values": values, "asked": asked}
    return {name: task.spell(same | change) for name, change in changes.items()}


def apart(batch: zoo.Batch) -> int:
    """Tokens from a key to its value."""
    return int(batch.places["values"][0, 0] - batch.places["keys"][0, 0])


def sides(model: HookedRecurrent, batch: zoo.Batch, layer: int, heads: Sequence[int], offset: int) -> list[Tensor]:
    """Key sides [N,H,K] and value sides [N,H,V] of the writes ``offset`` tokens after the key of each pair that is
    asked for (N = B Q)."""
    at, form = batch.places["keys"].gather(1, batch.symbols["asked"]) + offset, model.recurrence(batch.tokens, layer)
    return [s[torch.arange(len(at))[:, None], at][:, :, list(heads)].flatten(0, 1) for s in (form.k, form.u)]


def right(model: HookedRecurrent, batch: zoo.Batch) -> float:
    """Share of right answers."""
    return (model(batch.tokens).argmax(dim=-1).gather(1, batch.positions) == batch.answers).double().mean().item()


def share(
    model: HookedRecurrent,
    case: Case,
    question: zoo.Batch,
    layer: int,
    heads: Sequence[int],
    offset: int,
    writes: Sequence[Tensor],
    mode: Literal["replace", "add"] = "replace",
) -> float:
    """Share of the answers of ``question`` to its question, after the pairs of ``case["asked"]`` with edited writes."""
    pairs, start = case["asked"], int(case["asked"].places["values"].max()) + 1
    at = pairs.places["keys"].gather(1, pairs.symbols["asked"])[:, 0] + offset
    edits = [
        [WriteEdit(layer, head, int(position), k, u, mode) for head, k, u in zip(heads, keys, values, strict=True)]
        for position, keys, values in zip(at, *writes, strict=True)
    ]
    with model.edits(edit_rows=edits):
        tokens = torch.cat([pairs.tokens[:, :start], question.tokens[:, start:]], dim=1)
        return right(model, replace(question, tokens=tokens))


def rates(model: HookedRecurrent, case: Case, layer: int, heads: Sequence[int], offset: int) -> dict[str, float]:
    """Shares of answers after interventions on the writes of some heads, ``offset`` tokens after the asked pair's key.

    "ablated": right answers without the writes. For each kind of symbol that ``case`` has, shares of the answer of the
    sequences with another symbol, asked for as there, when the writes are those of these sequences: "exchanged" whole,
    or one side. Where it has the next pair, "another pair": when they are those of the next pair; "other pairs right":
    right answers about the next pair when the value was exchanged.
    """
    where = layer, heads, offset
    own = {kind: sides(model, batch, *where) for kind, batch in case.items()}
    k, u = own["asked"]
    told = {"ablated": ("asked", (0 * k, 0 * u))}
    for kind in [kind for kind in own if kind not in ("asked", "next")]:
        new = {"exchanged": own[kind], "key side": (own[kind][0], u), "value side": (k, own[kind][1])}
        new |= {"another pair": own["next"]} if "next" in own else {}
        told |= {f"{kind}, {name}": (kind, writes) for name, writes in new.items()}
    told |= {"other pairs right": ("next", own["values"])} if "next" in own else {}
    return {name: share(model, case, case[kind], *where, writes) for name, (kind, writes) in told.items()}


def table(model: HookedRecurrent, case: Case) -> Iterator[dict[str, Any]]:
    """Rates of every set of heads of a layer, at the key and 3 tokens after it, or up to the one after the value."""
    offsets = range(max(4, apart(case["asked"]) + 2))
    for (layer, shape), offset, count in product(model.cfg.layers.items(), offsets, range(1, 9)):
        for heads in combinations(range(shape.H), count):
            yield {"layer": layer, "heads": heads, "offset": offset, **rates(model, case, layer, heads, offset)}


def holders(rows: Sequence[Mapping[str, Any]], value_after: int) -> Iterator[zoo.Holder]:
    """The smallest sets of heads whose exchange decides what a symbol is, with the side that decides it. A value stands
    so many tokens after its key."""
    for kind, after in (("keys", 0), ("values", value_after)):
        held = [row for row in rows if row[f"{kind}, exchanged"] >= HELD]
        for row in (row for row in held if len(row["heads"]) == min(len(each["heads"]) for each in held)):
            side = max(("key", "value"), key=lambda side: row[f"{kind}, {side} side"])
            evidence = dict(list(row.items())[3:])
            yield zoo.Holder(row["layer"], row["heads"], row["offset"] - after, kind, side, evidence)


def explained(side: Tensor, features: Tensor) -> tuple[float, Tensor]:
    """R2 of sides [N,H,V] given features [N,F], on every other row from a fit on the rest; the fit [F,H,V]."""
    target, design = side.flatten(1), torch.cat([features, torch.ones(len(features), 1)], dim=1)
    fit = torch.linalg.lstsq(design[::2], target[::2], driver="gelsd").solution
    wrong, spread = target[1::2] - design[1::2] @ fit, target[1::2] - target[1::2].mean(dim=0)
    return 1 - (wrong.square().sum() / spread.square().sum()).item(), fit[:-1].unflatten(1, side.shape[1:])


def facts(model: HookedRecurrent, name: str, case: Case, found: Sequence[zoo.Holder]) -> Iterator[tuple[str, float]]:
    """How well symbols explain the sides that hold them; of composition, also the attributes, and what adding the
    difference of two attribute vectors to a value side changes; of recall and of facts, right answers with more pairs;
    right answers without one tap of a convolution."""
    task = zoo.task(name)
    many = task.batch(2_048, torch.Generator().manual_seed(3), queries=4, pairs=task.sizes[-1]["pairs"])
    for each in found:
        where = each.layer, each.heads, each.offset + apart(many) * (each.holds == "values")
        side = sides(model, many, *where)[each.side == "value"]
        symbols = many.symbols[each.holds].gather(1, many.symbols["asked"]).flatten()
        told = f"the {each.side} side of layer {each.layer}, heads {str(each.heads).strip('(,)')}"
        yield f"R2 of {told}, by its symbol", explained(side, F.one_hot(symbols).float())[0]
        if isinstance(task, Composition) and each.holds == "values":
            r2, vectors = explained(side, F.one_hot(task.attributes(symbols)).flatten(1).float())
            yield f"R2 of {told}, by 24 attributes", r2
            old, new = (case[kind].answers[:, 0] - len(task.vocabulary) for kind in ("asked", "values"))
            writes = sides(model, case["asked"], *where)[0], vectors[new] - vectors[old]
            slot = task.spell({**case["asked"].symbols, "slots": (case["asked"].symbols["slots"] + 1) % 3})
            asked = {
                "the new attribute": case["values"],
                "another attribute, right": slot,
                "next pair, right": case["next"],
            }
            for about, question in asked.items():
                yield f"one attribute changed: {about}", share(model, case, question, *where, writes, "add")
    further = {Recall: (24, 32, 48, 64), Facts: (12, 16, 24, 32)}
    for more in further.get(type(task), ()):
        generator = torch.Generator().manual_seed(4)
        yield f"right with {more} pairs", right(model, task.batch(128, generator, pairs=more, queries=4))
    yield from without_taps(model, name)


def without_taps(model: HookedRecurrent, name: str) -> Iterator[tuple[str, float]]:
    """Right answers without one tap of a convolution."""
    convolutions = [(at, module) for at, module in model.hf_model.named_modules() if isinstance(module, nn.Conv1d)]
    for (at, module), tap in product(convolutions, (1, 2, 3)):
        kept = module.weight.clone()
        module.weight[..., -1 - tap] = 0
        yield f"right without the tap at t-{tap} of {at}", fmean(zoo.accuracy(model, name, n=16))
        module.weight.copy_(kept)


Found = tuple[Sequence[zoo.Holder], Sequence[Mapping[str, Any]], Mapping[str, float]]
"""Holders, the table of all interventions, and further facts."""


def pairs(model: HookedRecurrent, name: str, n: int) -> Found:
    """Rates of answers after interventions on the writes of heads at one token; offset: tokens after the key.
    *ablated*: right answers without them. *exchanged*: answers of a run with another key or value in the pair that is
    asked for, when the writes are that run's; *key side*, *value side*: only that factor is. *another pair*: the writes
    are those of the next pair. *other pairs right*: right answers about the next pair after the exchange of the value.
    """
    case = draw(zoo.task(name), n, seed=5)
    rows = list(table(model, case))
    found = list(holders(rows, apart(case["asked"])))
    return found, rows, dict(facts(model, name, case, found))


def looks(model: HookedRecurrent, name: str, n: int) -> Found:
    """Where heads look in words that come twice, 12 of them; offset: tokens from the query back to the source, 11 for
    the word after the first occurrence. *largest*: queries whose largest weight on another token is there. *ablated*:
    right answers without these entries of the pattern; *alone*: with no others.
    """
    task, generator, rows = zoo.task(name), torch.Generator().manual_seed(5), []
    base = task.batch(n, generator, words=12, queries=8)
    itself = torch.eye(base.tokens.shape[1])

    def masked(layer: int, mask: Tensor) -> float:
        with model.hooks([(f"blocks.{layer}.mixer.hook_pattern", lambda pattern, hook: pattern * mask)]):
            return right(model, base)

    for layer, offset in product(range(2), range(14)):
        pattern = model.recurrence(base.tokens, layer).attention()[:, 0].abs() * (1 - itself)
        largest = pattern.argmax(dim=-1).gather(1, base.positions) == base.positions - offset
        there = torch.ones_like(itself).tril(-offset).triu(-offset)
        found = {"layer": layer, "heads": (0,), "offset": offset, "largest": largest.double().mean().item()}
        rows.append(found | {"ablated": masked(layer, 1 - there), "alone": masked(layer, there)})
    one = task.batch(n, generator, words=12)
    values, asked = one.symbols["values"], one.symbols["asked"]
    new = values.scatter(1, asked, task.others(values.gather(1, asked), generator))
    found = rates(model, {"asked": one, "values": task.spell({**one.symbols, "values": new})}, 1, (0,), 1)
    longer = task.batch(n, generator, words=24, queries=8)
    return [zoo.Holder(1, (0,), 0, "values", "value", found)], rows, {"right with 24 words": right(model, longer)}


def flips(model: HookedRecurrent, name: str, n: int) -> Found:
    """What a bit does to the state, of 40 bits: the *eigenvalue* of the transition along its key,
    alpha (1 - beta |k|^2), and how often the last answer is *flipped* when the token erases and writes nothing. Facts:
    more bits, also by a model that was trained in the same way with beta in (0, 1).
    """
    task, rows = zoo.task(name), torch.arange(8 * n)
    batch, at = task.batch(8 * n, torch.Generator().manual_seed(5), bits=40), rows % 40
    bits, form = batch.symbols["values"], model.recurrence(batch.tokens, 0)
    assert form.log_decay is not None and form.beta is not None
    eigenvalues = (form.log_decay.exp() * (1 - form.beta * form.k.square().sum(dim=-1)))[:, 1:, 0]

    def nothing(beta: Tensor, hook: object) -> Tensor:
        return beta.index_put((rows, 1 + at), torch.zeros(()))

    with model.hooks([("blocks.0.mixer.hook_beta", nothing)]):
        other = (model(batch.tokens)[:, -1].argmax(dim=-1) != batch.answers[:, 0]).double()
    table = [
        {"layer": 0, "heads": (0,), "offset": 0, "bit": bit}
        | {"eigenvalue": eigenvalues[bits == bit].mean().item()}
        | {"flipped": other[bits[rows, at] == bit].mean().item()}
        for bit in (0, 1)
    ]
    control = train(partial(parity, negative=False), task, 0, **RECIPES[name].settings)
    of = {"": model, "beta in (0, 1): ": HookedRecurrent.from_hf(control.eval()).requires_grad_(False)}
    longer = {size: task.batch(8 * n, torch.Generator().manual_seed(6), bits=size) for size in (16, 40, 128)}
    found = {
        f"{who}right after {size} bits": right(each, batch)
        for who, each in of.items()
        for size, batch in longer.items()
    }
    return [], table, found


# -- the models


@dataclass(frozen=True)
class Recipe:
    """How a model is made and measured."""

    build: Callable[[int], PreTrainedModel]
    find: Callable[[HookedRecurrent, str, int], Found]
    """From model, name and the number of sequences for a rate."""
    settings: Mapping[str, Any]
    """Of `train`."""


OF_FACTS = {"sequences": 16, "queries": 8, "rest": 0.1, "warmup": 30}
RECIPES = {
    "recall": Recipe(gated_delta, pairs, {"steps": 1_500, "sequences": 32}),
    "recall-mamba2": Recipe(mamba2, pairs, {"steps": 2_000, "sequences": 32}),
    "recall-rwkv7": Recipe(rwkv7, pairs, {"steps": 3_000, "sequences": 32}),
    "composition": Recipe(gated_delta, pairs, {"steps": 2_500, "sequences": 64, "queries": 12}),
    "facts": Recipe(one_memory, pairs, {"steps": 400, **OF_FACTS}),
    "facts-mamba2": Recipe(one_mamba2_memory, pairs, {"steps": 300, **OF_FACTS}),
    "induction": Recipe(induction, looks, {"steps": 400, "sequences": 64}),
    "parity": Recipe(parity, flips, {"steps": 600, "sequences": 64, "lr": 1e-2, "weight_decay": 0.0}),
}


# -- files


def card(name: str, truth: zoo.Truth, recipe: Recipe) -> str:
    """README.md, from measurements alone."""
    task, columns = zoo.task(name), list(truth.table[0])[3:]
    tokens = task.batch(1, torch.Generator().manual_seed(0), **task.sizes[0]).tokens[0]
    rows = ([*list(row.values())[:3], *(f"{row[column]:.3f}" for column in columns)] for row in truth.table)
    found = [
        f"* Layer {each.layer}, heads {str(each.heads).strip('(,)')}: the write {each.offset} tokens after a symbol of "
        f"`{each.holds}` holds it in its {each.side} side. After an exchange "
        f"{each.evidence[f'{each.holds}, exchanged']:.1%} of the answers follow; without it "
        f"{each.evidence['ablated']:.1%} are right."
        for each in truth.holders
    ]
    return CARD.format(
        name=name,
        architecture=" ".join((recipe.build.__doc__ or "").split()),
        task=" ".join((type(task).__doc__ or "").split()),
        example=" ".join(task.vocabulary[i] for i in tokens),
        steps=recipe.settings["steps"],
        sequences=recipe.settings["sequences"],
        accuracy=", ".join(f"{size} {rate:.1%}" for size, rate in truth.accuracy.items()),
        found="\n".join(found) or "No set of heads of a layer decides an answer by what it writes at one token.",
        facts="\n".join(f"| {fact} | {value:.3f} |" for fact, value in truth.facts.items()),
        columns=" | ".join(columns),
        how=" ".join((recipe.find.__doc__ or "").split()),
        rule="---|" * (3 + len(columns)),
        rows="\n".join(f"| {' | '.join(str(each).strip('(,)') for each in row)} |" for row in rows),
    )


def main(
    name: tyro.conf.Positional[str], seed: int = 0, out: Path | None = None, n: int = 128, again: bool = True
) -> None:
    """Train a model of the zoo and measure its truth.

    Args:
        name: one of the zoo's
        seed: of initialization and of the sequences
        out: folder of checkpoint, tokenizer, truth.json and README.md (default: hookpoints/zoo/NAME)
        n: sequences for each rate
        again: train; or else only measure the model that is there
    """
    torch.set_num_threads(1)
    folder = out or ROOT / "hookpoints" / "zoo" / name
    if name in zoo.english.MODELS:
        return train_english.make(name, seed, folder, n, again)
    recipe, task = RECIPES[name], zoo.task(name)
    if again:
        save(train(recipe.build, task, seed, **recipe.settings), task, folder)
    model = HookedRecurrent.from_pretrained(str(folder)).requires_grad_(False)
    sizes = (" ".join(f"{value} {kind}" for kind, value in size.items()) for size in task.sizes)
    accuracy = dict(zip(sizes, zoo.accuracy(model, name, n=4 * n), strict=True))
    truth = zoo.Truth(accuracy, *recipe.find(model, name, n))
    (folder / "truth.json").write_text(json.dumps(asdict(truth), indent=1) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(card(name, truth, recipe), encoding="utf-8")
    if min(truth.accuracy.values()) < ENOUGH:
        sys.exit(f"{name}: less than {ENOUGH:.0%} right at some size: {truth.accuracy}")


if __name__ == "__main__":
    tyro.cli(main)
