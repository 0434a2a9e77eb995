"""Operations on memories against runs that really did, or did not, see the span.

Every operation is judged by the next tokens: KL(run that is the truth || what follows the memory), and the share of the
KL of doing nothing that it recovers, 1 - sum KL(operation) / sum KL(nothing), with the interval of a total
(`writesae.verdict.statistics`). How familiar the span is when it is read again says what a cut forgets. What is
recovered has its own page, docs/memory_surgery.md; how long it takes is on docs/benchmarks.md.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import transformers
from frame import Line, Way, main, timed
from scipy.stats import binomtest
from torch import Tensor

from hookpoints import HookedRecurrent, Memory, embedded, zoo
from hookpoints.memory import memory as module
from writesae.verdict.statistics import Estimate, total

sys.path.append(str(Path(__file__).parents[1] / "scripts"))
from tables import table

TITLE = "Operations on memories"
QUICK = {"sequences": 2, "rounds": 2}
MODELS = {
    "embedded": "Gated DeltaNet hybrid",
    "embedded-mamba2": "Mamba-2, all recurrent",
    "embedded-rwkv7": "RWKV-7, all recurrent",
}
BINS = {"1-4": slice(0, 4), "5-8": slice(4, 8), "9-16": slice(8, 16), "17-32": slice(16, 32)}
BEFORE, SPAN, AFTER = 32, 16, 32
LATER = (8, 32, 96)
FAMILIAR = 4
"""Times as many sequences say how familiar a span is: a loss is noisier than a KL."""
INTRODUCTION = f"""\
What does a memory forget when a span is cut out, and how near is it to one that never read the span? Each operation of
[Memory](memory.md) is compared with a run that really did, or did not, read the span, on held-out text. The span has
{SPAN} tokens, and {BEFORE} tokens come before it. `benchmarks/memory_surgery.py` makes this page.

## Is the span still familiar?

The span is read again ({{familiar}} sequences). A memory that read it predicts its tokens better than one that never
did: by so many nats per token is it *familiar*. Of this a cut memory has lost the share below; 1 is a memory that never
read the span, 0 is one that did. *without* reads no token after the span again (`reread=0`). The control is a memory
from which another span was cut. Of Mamba-2, 8 tokens later, reading the span has made it no easier to predict."""
STAKE = """\
## What is at stake for the next tokens

The same cut, judged by the tokens that come next in the text ({sequences} sequences). The further away the span is,
the less they depend on it: the KL in nats per token of doing nothing, and the share of tokens whose most probable next
token differs. The tables below give shares of these nats."""
SHARES = """\
## Shares of the KL of doing nothing

Numbers are totals, 1 - sum KL(operation) / sum KL(nothing) over all tokens after the memory, with their
[95% intervals](verdicts.md#intervals). 1 is exact, 0 is the same as doing nothing, below 0 is worse. States of all
layers change together. *nothing* has the KL in nats per token. *States alone* replaces the matrix states and does not
change convolution, token-shift and attention caches; *writes alone* also does not change the decay and the erase of the
span."""
LATER_NOTE = (
    "*Tokens read* is a share of reading the {m} tokens again, which is exact. *without* reads none (`reread=0`)."
)
RECALL = {"recall": "Gated DeltaNet", "recall-mamba2": "Mamba-2", "recall-rwkv7": "RWKV-7"}
PAIRS = 10
FACTS = f"""\
A model of the [zoo](zoo.md) reads {PAIRS} pairs of a name and a city. One of the pairs 2 to {PAIRS - 2} is cut from the
memory, and the model is asked for a name. Numbers are shares of right answers, with 95% intervals (Wilson); chance is
0.02. *The pair before* is the one before the cut pair.

With `reread=0` Gated DeltaNet and Mamba-2 forget the wrong pair: their convolution lets the token after a pair write
that pair, so that the span holds the pair before it. The default reads the tokens again that see the span."""
TIMES = "How long each takes: [Benchmarks](benchmarks.md#operations-on-memories)."
Share = dict[str, float]
Table = dict[str, dict[str, Share]]


def sequences(model: HookedRecurrent, length: int, n: int, skip: int = 0) -> Tensor:
    """[n,length] tokens of held-out text, evenly spaced."""
    tokens = model.to_tokens(embedded.text("test"))[0, 1 + skip :]
    step = (len(tokens) - length) // n
    return torch.stack([tokens[i * step : i * step + length] for i in range(n)])


class Judge:
    """What follows a memory, against what follows the true one."""

    def __init__(self, model: HookedRecurrent, truth: Memory, after: Tensor):
        self.model, self.after = model, after
        self.truth = model.logits_after(truth, after).log_softmax(-1)

    def log_p(self, memory: Memory) -> Tensor:
        """[n,AFTER,vocab] of next tokens."""
        return self.model.logits_after(memory, self.after).log_softmax(-1)

    def kl(self, memory: Memory) -> Tensor:
        """[n,AFTER] nats."""
        return (self.truth.exp() * (self.truth - self.log_p(memory))).sum(-1).double()

    def shares(self, operations: dict[str, Callable[[], Memory]], nothing: Memory) -> dict[str, dict[str, Share]]:
        """Recovered share of each operation by tokens after the memory, and over all of them."""
        base = self.kl(nothing)
        differs = (self.log_p(nothing).argmax(-1) != self.truth.argmax(-1)).double()
        found: Table = {
            "nothing": {
                name: {"kl": float(base[:, at].mean()), "top": float(differs[:, at].mean())} for name, at in bins()
            }
        }
        for label, operation in operations.items():
            kl, row = self.kl(operation()), {}
            for name, at in bins():
                ours, theirs = kl[:, at].sum(1).numpy(), base[:, at].sum(1).numpy()
                row[name] = as_share(total(theirs - ours, theirs, range(len(ours))))
            found[label] = row
        return found


def as_share(each: Estimate) -> Share:
    return {"share": each.mean, "low": each.low, "high": each.high}


def bins() -> list[tuple[str, slice]]:
    return [*BINS.items(), ("all", slice(0, AFTER))]


def states_of(memory: Memory) -> dict[int, Tensor]:
    return {layer: memory.state(layer) for layer in memory.forms}


def writes_deleted(memory: Memory, start: int, stop: int) -> Memory:
    """The span's writes deleted; it still decays and erases, and other caches stay."""
    states = {}
    for layer in memory.forms:
        r = memory.recurrence(layer)
        values = r.u.clone()
        values[:, start:stop] = 0
        states[layer] = r.replace(u=values).final_state()
    return memory.with_states(states)


def noise(memory: Memory, towards: Memory) -> Memory:
    """A random change of the states, head by head as large as the one to ``towards``."""
    generator = torch.Generator().manual_seed(0)
    delta = {}
    for layer, change in (towards - memory).items():
        random = torch.randn(change.shape, generator=generator)
        delta[layer] = random * change.norm(dim=(-1, -2), keepdim=True) / random.norm(dim=(-1, -2), keepdim=True)
    return memory + delta


def last_again(memory: Memory, count: int) -> Memory:
    """The last ``count`` tokens read again."""
    return memory.model.memory(memory.tokens[:, -count:], memory=memory.rewind(memory.T - count))


def unmoved(operation: Callable[[], Memory]) -> Memory:
    """The operation with attention keys left at their old positions."""
    with mock.patch.object(module, "turned", lambda model, backbone, keys, by: keys):
        return operation()


def cut_at_once(model: HookedRecurrent, n: int) -> Table:
    """The span is the last thing that was read."""
    tokens = sequences(model, BEFORE + SPAN + AFTER, n)
    start, stop = BEFORE, BEFORE + SPAN
    memory = model.memory(tokens[:, :stop])
    truth = model.memory(tokens[:, :start])
    cut = memory.without((start, stop), reread=0)
    operations = {
        "without": lambda: cut,
        "states alone": lambda: memory.with_states(states_of(cut)),
        "writes alone": lambda: writes_deleted(memory, start, stop),
        "control: another span": lambda: memory.without((start // 2 - SPAN // 2, start // 2 + SPAN // 2), reread=0),
        "control: noise of equal norm": lambda: noise(memory, cut),
    }
    return Judge(model, truth, tokens[:, stop:]).shares(operations, memory)


def cut_later(model: HookedRecurrent, n: int, m: int, rounds: int) -> dict[str, Table | dict[str, Share]]:
    """``m`` tokens were read after the span."""
    tokens = sequences(model, BEFORE + SPAN + m + AFTER, n)
    start, stop, end = BEFORE, BEFORE + SPAN, BEFORE + SPAN + m
    read = tokens[:, :end]
    memory, quarter = model.memory(read), m // 4
    truth = model.memory(torch.cat([read[:, :start], read[:, stop:]], 1))
    cut = memory.without((start, stop), reread=0)
    timed_ways: dict[str, Callable[[Memory], Memory]] = {
        "without": lambda given: given.without((start, stop), reread=0),
        "reread 4": lambda given: given.without((start, stop), reread=4),
        "reread m/4": lambda given: given.without((start, stop), reread=quarter),
        "reread m/8, and the last m/8": lambda given: last_again(
            given.without((start, stop), reread=quarter // 2), quarter - quarter // 2
        ),
        "reread m (exact)": lambda given: given.without((start, stop), reread=m),
    }
    operations: dict[str, Callable[[], Memory]] = {
        **{name: lambda made=made: made(memory) for name, made in timed_ways.items()},
        "states alone": lambda: memory.with_states(states_of(cut)),
        "reread 4, keys not moved": lambda: unmoved(lambda: memory.without((start, stop), reread=4)),
        "writes alone": lambda: writes_deleted(memory, start, stop),
        "control: another span": lambda: memory.without((start // 2 - SPAN // 2, start // 2 + SPAN // 2), reread=0),
        "control: noise of equal norm": lambda: noise(memory, cut),
    }
    if not any(name.startswith("attention/") for name in memory.kept):
        del operations["reread 4, keys not moved"]
    shares = Judge(model, truth, tokens[:, end:]).shares(operations, memory)
    one = model.memory(read[:1])
    exact_first = {name: lambda made=timed_ways[name]: made(one) for name in reversed(timed_ways)}
    ratios = {name: row["ratio"] for name, row in timed(exact_first, rounds).items()}
    counts = {"without": 0, "reread 4": 4, "reread m/4": quarter, "reread m/8, and the last m/8": quarter}
    cost = {name: {"tokens": counts.get(name, m) / m, "time": ratio} for name, ratio in ratios.items()}
    return {"shares": shares, "cost": cost}


def familiar(model: HookedRecurrent, n: int, m: int) -> dict[str, Share]:
    """The span is read again, m tokens after it: nats per token by which it is familiar, and shares lost by cuts."""
    tokens = sequences(model, BEFORE + SPAN + m, n)
    start, stop = BEFORE, BEFORE + SPAN
    span, memory = tokens[:, start:stop], model.memory(tokens)
    elsewhere = start // 2 - SPAN // 2, start // 2 + SPAN // 2
    memories = {
        "never read": model.memory(torch.cat([tokens[:, :start], tokens[:, stop:]], 1)),
        "without": memory.without((start, stop), reread=0),
        "reread 4": memory.without((start, stop), reread=4),
        "control: another span": memory.without(elsewhere, reread=0),
    }

    def loss(given: Memory) -> np.ndarray:
        """[n] nats per token of the span but its first."""
        log_p = model.logits_after(given, span[:, :-1]).log_softmax(-1)
        return -log_p.gather(-1, span[:, 1:, None])[..., 0].double().mean(1).numpy()

    kept = loss(memory)
    lost = {name: loss(each) - kept for name, each in memories.items()}
    whole = lost.pop("never read")
    familiar = {"nats": float(whole.mean())}
    if not whole.sum() > 0:  # reading the span made it no easier to predict: there is nothing to lose
        return {"familiar": familiar}
    return {"familiar": familiar, **{name: as_share(total(each, whole, range(n))) for name, each in lost.items()}}


def pasted(model: HookedRecurrent, n: int) -> Table:
    """A span that another memory read after other tokens, pasted."""
    tokens = sequences(model, BEFORE + SPAN + AFTER, n)
    start, stop = BEFORE, BEFORE + SPAN
    memory, truth = model.memory(tokens[:, :start]), model.memory(tokens[:, :stop])
    prefix = tokens[:, :start].roll(1, 0)
    other = model.memory(torch.cat([prefix, tokens[:, start:stop]], 1))
    wrong = model.memory(torch.cat([prefix, tokens[:, start:stop].roll(1, 0)], 1))
    operations = {
        "paste": lambda: memory.paste(other, (start, stop)),
        "paste from the same beginning": lambda: memory.paste(truth, (start, stop)),
        "states alone": lambda: memory.with_states(states_of(memory.paste(other, (start, stop)))),
        "control: another span": lambda: memory.paste(wrong, (start, stop)),
        "control: noise of equal norm": lambda: noise(memory, truth),
    }
    return Judge(model, truth, tokens[:, stop:]).shares(operations, memory)


def compressed(model: HookedRecurrent, n: int) -> dict[str, dict[str, float]]:
    """KL per token of truncated and of mixed states; "empty" are zeros."""
    tokens = sequences(model, 128 + AFTER, n)
    memory, other = model.memory(tokens[:, :128]), model.memory(tokens[:, :128].roll(1, 0))
    judge, there = Judge(model, memory, tokens[:, 128:]), Judge(model, other, tokens[:, 128:])
    empty = memory.with_states({layer: torch.zeros_like(state) for layer, state in states_of(memory).items()})
    ranks = {f"rank {r}": memory.truncate(r) for r in (1, 2, 4, 8, 16, 32)}
    mixed = {f"t {t}": memory.lerp(other, t) for t in (0.25, 0.5, 0.75, 1.0)}
    found = {name: {"kl": float(judge.kl(each).mean())} for name, each in {"empty": empty, **ranks}.items()}
    for name, each in mixed.items():
        found[name] = {"kl": float(judge.kl(each).mean()), "kl to the other": float(there.kl(each).mean())}
    return found


def cut_facts(name: str, n: int) -> dict[str, dict[str, tuple[int, int]]]:
    """How often facts are recalled, right answers and questions, by way of cutting one of them and by which is asked.

    ``n`` sequences for each place of the pair that is cut."""
    model, task = HookedRecurrent.from_pretrained(name, device="cpu"), zoo.task(name)
    generator = torch.Generator().manual_seed(0)
    rereads: dict[str, dict[str, int]] = {f"`reread={count}`": {"reread": count} for count in (0, 1, 3)}
    found: dict[str, dict[str, list[Tensor]]] = {}
    for cut in range(1, PAIRS - 2):
        batch = task.batch(n, generator, pairs=PAIRS)
        memory = model.memory(batch.tokens[:, : 1 + 2 * PAIRS])
        start, stop = 1 + 2 * cut, 3 + 2 * cut
        never = torch.cat([memory.tokens[:, :start], memory.tokens[:, stop:]], 1)
        memories = {"not cut": memory}
        memories |= {label: memory.without((start, stop), **how) for label, how in rereads.items()}
        memories |= {"the default": memory.without((start, stop)), "never read": model.memory(never)}
        questions = {"the cut pair": cut, "the pair before": cut - 1, "another": (cut + 2) % PAIRS}
        for label, each in memories.items():
            for question, pair in questions.items():
                asked = task.spell({**batch.symbols, "asked": torch.full_like(batch.symbols["asked"], pair)})
                answers = model.logits_after(each, asked.tokens[:, -2:-1])[:, -1].argmax(-1)
                found.setdefault(label, {}).setdefault(question, []).append(answers == asked.answers[:, 0])
    counts = {label: {q: torch.cat(right) for q, right in row.items()} for label, row in found.items()}
    return {label: {q: (int(x.sum()), len(x)) for q, x in row.items()} for label, row in counts.items()}


def facts_table(found: dict[str, dict[str, dict[str, list[int]]]]) -> str:
    """Recall of facts by family and way of cutting."""
    lines = []
    for name, ways in found.items():
        for label, row in ways.items():
            shares = []
            for right, asked in row.values():
                interval = binomtest(right, asked).proportion_ci(method="wilson")
                shares.append(f"{right / asked:.2f} [{interval.low:.2f}, {interval.high:.2f}]")
            lines.append([RECALL[name], label, *shares, str(next(iter(row.values()))[1])])
    return table(["family", "cut", "the cut pair", "the pair before", "another", "n"], lines)


def speed(model: HookedRecurrent, rounds: int) -> dict[str, float]:
    """Seconds of operations on 512 tokens, as ratios to a pass with a cache in the same round."""
    tokens = torch.arange(512).mul(7919).remainder(model.cfg.d_vocab - 1).add(1)[None]
    memory, layer = model.memory(tokens), model.cfg.recurrent_layers[-1]
    r, start, stop = memory.recurrence(layer), 48, 64

    def forward() -> None:
        with torch.no_grad():
            model.hf_model(input_ids=tokens, use_cache=True)

    def states() -> None:
        before = r.select(tokens=slice(0, start)).states(positions=-1)[:, 0]
        r.select(tokens=slice(stop, 512), initial_state=before).states(positions=-1)

    ways: dict[str, Way] = {
        "forward": forward,
        "memory": lambda: model.memory(tokens),
        "states of one layer without 16 of 512 tokens": states,
        "holdings of one layer": lambda: memory.holdings(layer),
        "terms of one layer": lambda: memory.terms(layer),
        "rewind to token 48": lambda: memory.rewind(start),
        "without tokens 48 to 63": lambda: memory.without((start, stop), reread=0),
        "without tokens 48 to 63, reread 4": lambda: memory.without((start, stop), reread=4),
        "without tokens 48 to 63, reread 112 (a quarter)": lambda: memory.without((start, stop), reread=112),
        "without tokens 48 to 63, reread all 448 (exact)": lambda: memory.without((start, stop), reread=448),
    }
    return {name: row["ratio"] for name, row in timed(ways, rounds).items() if name != "forward"}


def larger() -> HookedRecurrent:
    """A random Qwen3.5-shaped model, large enough that arithmetic and not Python takes the time."""
    shape = {"vocab_size": 4096, "hidden_size": 768, "intermediate_size": 2304, "num_hidden_layers": 8, "head_dim": 96}
    shape |= {"num_attention_heads": 8, "num_key_value_heads": 2, "linear_num_key_heads": 8}
    shape |= {"linear_num_value_heads": 8, "linear_key_head_dim": 96, "linear_value_head_dim": 96}
    torch.manual_seed(0)
    return HookedRecurrent.from_hf(transformers.Qwen3_5ForCausalLM(transformers.Qwen3_5TextConfig(**shape)).eval())


def cell(share: Share) -> str:
    if "kl" in share:
        return f"KL {share['kl']:.4f}"
    if max(abs(share[name]) for name in ("share", "low", "high")) >= 10:
        return f"{share['share']:.0f} [{share['low']:.0f}, {share['high']:.0f}]"
    return f"{share['share']:.2f} [{share['low']:.2f}, {share['high']:.2f}]"


def rows(shares: Table, cost: dict[str, Share] | None = None) -> str:
    lines = [[label, *(cell(row[name]) for name, _ in bins())] for label, row in shares.items()]
    if cost is not None:
        lines = [[*line, f"{cost[line[0]]['tokens']:.2f}" if line[0] in cost else ""] for line in lines]
    return table(["", *(name for name, _ in bins()), *["tokens read"] * (cost is not None)], lines)


def familiarity(models: dict[str, Any]) -> str:
    """By model and number of tokens after the span: nats, and the shares that are lost."""
    rows = [(MODELS[name], m, row) for name, result in models.items() for m, row in result["familiar"].items()]
    columns = [name for name in max((row for _, _, row in rows), key=len) if name != "familiar"]
    lines = [
        [model, m, f"{row['familiar']['nats']:.3f}", *(cell(row[name]) if name in row else "" for name in columns)]
        for model, m, row in rows
    ]
    return table(["model", "tokens after the span", "nats per token", *columns], lines)


def stakes(models: dict[str, Any]) -> str:
    """By model and number of tokens after the span: KL of doing nothing, and tokens whose first choice differs."""
    lines = []
    for name, result in models.items():
        tables = {"0": result["at once"], **{m: later["shares"] for m, later in result["later"].items()}}
        for m, shares in tables.items():
            row = shares["nothing"]["all"]
            lines.append([MODELS[name], m, f"{row['kl']:.4f}", f"{row['top']:.1%}"])
    return table(["model", "tokens after the span", "KL in nats per token", "other first choice"], lines)


def page(found: dict[str, Any]) -> str:
    """The page of what operations recover."""
    parts = ["# What operations on a memory recover", INTRODUCTION.format(**found), familiarity(found["models"])]
    parts += [STAKE.format(**found), stakes(found["models"]), SHARES]
    for name, result in found["models"].items():
        parts += [f"### {name}: {MODELS[name]}", "#### Cut at once: the span was read last"]
        parts += [rows(result["at once"])]
        for m, later in result["later"].items():
            parts += [f"#### Cut later: {m} tokens were read after the span", LATER_NOTE.format(m=m)]
            parts += [rows(later["shares"], later["cost"])]
        parts += ["#### Paste: a span that another memory read after other tokens", rows(result["paste"])]
        mixed = (
            (label, f"{each['kl']:.4f}", f"{each['kl to the other']:.4f}" if "kl to the other" in each else "")
            for label, each in result["compressed"].items()
        )
        parts += ["#### Truncated and mixed states, 128 tokens"]
        parts += [table(("", "KL in nats per token", "KL to the other"), mixed)]
    parts += ["## A fact that is cut", FACTS, facts_table(found["facts"])]
    return "".join(f"{part.strip()}\n\n" for part in [*parts, TIMES])


def lines(found: dict[str, Any]) -> list[Line]:
    """What a memory costs in the largest model, where arithmetic takes the time."""
    model, row = list(found["speed"].items())[-1]
    exact = row["without tokens 48 to 63, reread all 448 (exact)"]
    said = [Line(f"{model}: `model.memory` / a pass over 512 tokens with a cache", row["memory"], goal=1.1)]
    for name, ratio in list(row.items())[-4:-1]:
        said.append(Line(f"{model}: {name} / reading the 448 tokens after them again", ratio / exact))
    return said


def text(found: dict[str, Any]) -> str:
    """Times of every model."""
    costs = {f"{name}, m = {m}": x["cost"] for name, each in found["models"].items() for m, x in each["later"].items()}
    parts = (
        ("time / a pass over 512 tokens with a cache", found["speed"]),
        (
            "time / reading the m tokens after the span again",
            {n: {w: x["time"] for w, x in c.items()} for n, c in costs.items()},
        ),
    )
    tables = (
        table(
            (head, *columns),
            ([way, *(f"{column[way]:.2f}" for column in columns.values())] for way in next(iter(columns.values()))),
        )
        for head, columns in parts
    )
    return "\n".join([*tables, "[What these operations recover](memory_surgery.md)."])


def measure(sequences: int = 32, rounds: int = 9) -> dict[str, Any]:
    """Shares, costs and times of every model."""
    found: dict[str, Any] = {"sequences": sequences, "familiar": FAMILIAR * sequences, "models": {}, "speed": {}}
    for name in MODELS:
        model = HookedRecurrent.from_pretrained(name, device="cpu")
        clock = time.perf_counter()
        found["models"][name] = {
            "at once": cut_at_once(model, sequences),
            "later": {str(m): cut_later(model, sequences, m, rounds) for m in LATER},
            "familiar": {str(m): familiar(model, FAMILIAR * sequences, m) for m in LATER},
            "paste": pasted(model, sequences),
            "compressed": compressed(model, sequences),
        }
        found["speed"][name] = speed(model, rounds)
        print(f"{name}: {time.perf_counter() - clock:.0f} s", flush=True)
    found["speed"]["random, 8 layers, 768 wide"] = speed(larger(), rounds)
    found["facts"] = {name: cut_facts(name, sequences) for name in RECALL}
    return found


if __name__ == "__main__":
    main(sys.modules[__name__])
