"""Operations on memories compared with runs that really did, or did not, see the span.

Every operation is judged by the next tokens: KL(run that is the reference || what follows the memory), and the share of
the KL of doing nothing that it recovers, 1 - sum KL(operation) / sum KL(nothing), with the interval of a total
(`verdict.statistics`). How familiar the span is when it is read again says what a cut forgets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias, cast
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hookpoints import HookedRecurrent, Memory, embedded, zoo
from writesae.verdict.statistics import total

QUICK = {"sequences": 2}
MODELS = ("embedded", "embedded-mamba2", "embedded-rwkv7")
BEFORE, SPAN, AFTER = 32, 16, 32
"""Tokens before the span, of the span, and after the memory."""
START, STOP = BEFORE, BEFORE + SPAN
"""Where the span is."""
ELSEWHERE = (BEFORE - SPAN) // 2, (BEFORE + SPAN) // 2
"""Another span of as many tokens: a control."""
LATER = (8, 32, 96)
"""Tokens that were read after the span."""
BINS = {
    "1-4": slice(0, 4),
    "5-8": slice(4, 8),
    "9-16": slice(8, 16),
    "17-32": slice(16, 32),
    "all": slice(0, AFTER),
}
"""Tokens after the memory."""
FAMILIAR = 4
"""Times as many sequences say how familiar a span is: a loss is noisier than a KL."""
RECALL = ("recall", "recall-mamba2", "recall-rwkv7")
"""Models of the zoo that recall facts."""
PAIRS = 10
"""Facts that they read."""

Share: TypeAlias = dict[str, float]
Shares: TypeAlias = dict[str, dict[str, Share]]
"""Of each operation, by tokens after the memory."""
Operation: TypeAlias = Callable[[Memory], Memory]


def sequences(model: HookedRecurrent, length: int, n: int) -> Tensor:
    """[n,length] tokens of held-out text, evenly spaced."""
    tokens = model.to_tokens(embedded.text("test"))[0, 1:]
    step = (len(tokens) - length) // n
    return torch.stack([tokens[i * step : i * step + length] for i in range(n)])


class Judge:
    """What follows a memory, compared with what follows the memory of a run that is the reference."""

    def __init__(self, model: HookedRecurrent, reference: Memory, after: Tensor):
        self.model, self.after = model, after
        self.reference = self.log_p(reference)

    def log_p(self, memory: Memory) -> Tensor:
        """[n,AFTER,vocab] of next tokens."""
        return self.model.logits_after(memory, self.after).log_softmax(-1)

    def kl(self, memory: Memory) -> Tensor:
        """[n,AFTER] nats."""
        change = self.reference - self.log_p(memory)
        return (self.reference.exp() * change).sum(-1).double()

    def shares(self, operations: Mapping[str, Operation], memory: Memory) -> Shares:
        """Recovered share of each operation on a memory, by tokens after it; and of doing nothing the KL, and the share
        of tokens whose most probable next token differs."""
        base = self.kl(memory)
        differs = (self.log_p(memory).argmax(-1) != self.reference.argmax(-1)).double()
        of_nothing = {}
        for name, bin_ in BINS.items():
            of_nothing[name] = {"kl": float(base[:, bin_].mean()), "top": float(differs[:, bin_].mean())}
        shares: Shares = {"nothing": of_nothing}
        for label, operation in operations.items():
            kl = self.kl(operation(memory))
            shares[label] = {}
            for name, bin_ in BINS.items():
                whole = base[:, bin_].sum(1)
                shares[label][name] = share_of((whole - kl[:, bin_].sum(1)).numpy(), whole.numpy())
        return shares


def share_of(part: NDArray[np.float64], whole: NDArray[np.float64]) -> Share:
    """The ratio of two sums over sequences [n], with its interval."""
    estimate = total(part, whole, range(len(whole)))
    return {"share": estimate.mean, "low": estimate.low, "high": estimate.high}


def without(reread: int, span: tuple[int, int] = (START, STOP)) -> Operation:
    """A cut after which so many tokens are read again."""
    return lambda memory: memory.without(span, reread=reread)


def states_alone(operation: Operation) -> Operation:
    """The matrix states that an operation gives; convolution, token-shift and attention caches stay."""

    def operate(memory: Memory) -> Memory:
        changed = operation(memory)
        return memory.with_states({layer: changed.state(layer) for layer in changed.forms})

    return operate


def writes_deleted(memory: Memory) -> Memory:
    """The span's writes deleted; it still decays and erases, and other caches stay."""
    states = {}
    for layer in memory.forms:
        recurrence = memory.recurrence(layer)
        values = recurrence.u.clone()
        values[:, START:STOP] = 0
        states[layer] = recurrence.replace(u=values).final_state()
    return memory.with_states(states)


def noise(toward: Operation) -> Operation:
    """A random change of the states, head by head as large as that of an operation."""

    def operate(memory: Memory) -> Memory:
        generator = torch.Generator().manual_seed(0)
        changes = {}
        for layer, change in (toward(memory) - memory).items():
            random = torch.randn(change.shape, generator=generator)
            size = change.norm(dim=(-1, -2), keepdim=True)
            changes[layer] = random * size / random.norm(dim=(-1, -2), keepdim=True)
        return memory + changes

    return operate


def last_again(operation: Operation, count: int) -> Operation:
    """An operation after which the last `count` tokens are read again."""

    def operate(memory: Memory) -> Memory:
        changed = operation(memory)
        rewound = changed.rewind(changed.T - count)
        return cast(HookedRecurrent, changed.model).memory(changed.tokens[:, -count:], memory=rewound)

    return operate


def ways_to_cut(m: int) -> dict[str, Operation]:
    """Cuts after which none, some or all of the m tokens after the span are read again."""
    eighth = m // 8
    return {
        "without": without(0),
        "reread 4": without(4),
        "reread m/4": without(m // 4),
        "reread m/8, and the last m/8": last_again(without(eighth), m // 4 - eighth),
        "reread m (exact)": without(m),
    }


def tokens_read(m: int) -> dict[str, float]:
    """How many tokens each way to cut reads, as a share of m."""
    quarter = m // 4 / m
    return {
        "without": 0.0,
        "reread 4": 4 / m,
        "reread m/4": quarter,
        "reread m/8, and the last m/8": quarter,
        "reread m (exact)": 1.0,
    }


CONTROL_OPERATIONS: dict[str, Operation] = {
    "writes alone": writes_deleted,
    "control: another span": without(0, ELSEWHERE),
    "control: noise of equal norm": noise(without(0)),
}


def cut_at_once(model: HookedRecurrent, n: int) -> Shares:
    """The span is the last thing that was read."""
    tokens = sequences(model, STOP + AFTER, n)
    operations = {"without": without(0), "states alone": states_alone(without(0)), **CONTROL_OPERATIONS}
    judge = Judge(model, model.memory(tokens[:, :START]), tokens[:, STOP:])
    return judge.shares(operations, model.memory(tokens[:, :STOP]))


def cut_later(model: HookedRecurrent, n: int, m: int) -> Shares:
    """`m` tokens were read after the span."""
    tokens = sequences(model, STOP + m + AFTER, n)
    read = tokens[:, : STOP + m]
    memory = model.memory(read)
    operations = {**ways_to_cut(m), "states alone": states_alone(without(0))}
    if any(name.startswith("attention/") for name in memory.kept):
        operations["reread 4, keys not moved"] = keys_not_moved(without(4))
    never_read = torch.cat([read[:, :START], read[:, STOP:]], 1)
    judge = Judge(model, model.memory(never_read), tokens[:, STOP + m :])
    return judge.shares({**operations, **CONTROL_OPERATIONS}, memory)


def keys_not_moved(operation: Operation) -> Operation:
    """An operation with attention keys left at their old positions."""

    def operate(memory: Memory) -> Memory:
        with mock.patch("hookpoints.memory.memory.turned", lambda model, backbone, keys, by: keys):
            return operation(memory)

    return operate


def familiar(model: HookedRecurrent, n: int, m: int) -> dict[str, Share]:
    """The span is read again, m tokens after it: nats per token by which it is familiar, and shares lost by cuts."""
    tokens = sequences(model, STOP + m, n)
    span = tokens[:, START:STOP]
    memory = model.memory(tokens)

    def loss(given: Memory) -> NDArray[np.float64]:
        """[n] nats per token of the span but its first, which follows other text in every memory."""
        log_p = model.logits_after(given, span[:, :-1]).log_softmax(-1)
        return -log_p.gather(-1, span[:, 1:, None])[..., 0].double().mean(1).numpy()

    read = loss(memory)
    never_read = loss(model.memory(torch.cat([tokens[:, :START], tokens[:, STOP:]], 1)))
    whole = never_read - read
    shares = {"familiar": {"nats": float(whole.mean())}}
    if not whole.sum() > 0:  # reading the span made it no easier to predict: there is nothing to lose
        return shares
    cuts = {"without": without(0), "reread 4": without(4), "control: another span": without(0, ELSEWHERE)}
    return shares | {name: share_of(loss(cut(memory)) - read, whole) for name, cut in cuts.items()}


def pasted(model: HookedRecurrent, n: int) -> Shares:
    """A span that another memory read after other tokens, pasted."""
    tokens = sequences(model, STOP + AFTER, n)
    span = tokens[:, START:STOP]
    reference = model.memory(tokens[:, :STOP])
    # Each row's beginning, and in `wrong` its span, is that of the row before it: text of the same kind.
    other_beginning = tokens[:, :START].roll(1, 0)
    elsewhere = model.memory(torch.cat([other_beginning, span], 1))
    wrong = model.memory(torch.cat([other_beginning, span.roll(1, 0)], 1))

    def paste(source: Memory) -> Operation:
        return lambda memory: memory.paste(source, (START, STOP))

    operations = {
        "paste": paste(elsewhere),
        "paste from the same beginning": paste(reference),
        "states alone": states_alone(paste(elsewhere)),
        "control: another span": paste(wrong),
        "control: noise of equal norm": noise(lambda memory: reference),
    }
    return Judge(model, reference, tokens[:, STOP:]).shares(operations, model.memory(tokens[:, :START]))


def compressed(model: HookedRecurrent, n: int) -> dict[str, dict[str, float]]:
    """KL per token of truncated and of mixed states; "empty" are zeros."""
    tokens = sequences(model, 128 + AFTER, n)
    memory = model.memory(tokens[:, :128])
    of_other_text = model.memory(tokens[:, :128].roll(1, 0))
    judge = Judge(model, memory, tokens[:, 128:])
    judge_of_other = Judge(model, of_other_text, tokens[:, 128:])
    zeros = {layer: torch.zeros_like(memory.state(layer)) for layer in memory.forms}
    memories = {"empty": memory.with_states(zeros)}
    for rank in (1, 2, 4, 8, 16, 32):
        memories[f"rank {rank}"] = memory.truncate(rank)
    divergences = {name: {"kl": float(judge.kl(x).mean())} for name, x in memories.items()}
    for t in (0.25, 0.5, 0.75, 1.0):
        mixed = memory.lerp(of_other_text, t)
        to_other = float(judge_of_other.kl(mixed).mean())
        divergences[f"t {t}"] = {"kl": float(judge.kl(mixed).mean()), "kl to the other": to_other}
    return divergences


def cut_facts(name: str, n: int) -> dict[str, dict[str, tuple[int, int]]]:
    """How often facts are recalled, right answers and questions, by way of cutting one of them and by which is asked.

    `n` sequences for each place of the pair that is cut."""
    model = HookedRecurrent.from_pretrained(name, device="cpu")
    task = zoo.task(name)
    generator = torch.Generator().manual_seed(0)
    right: dict[str, dict[str, int]] = {}
    places = range(1, PAIRS - 2)
    for pair in places:
        batch = task.batch(n, generator, PAIRS)
        # `<bos>`, then pairs of a key and a value.
        memory = model.memory(batch.tokens[:, : 1 + 2 * PAIRS])
        start = 1 + 2 * pair
        stop = 3 + 2 * pair
        never_read = torch.cat([memory.tokens[:, :start], memory.tokens[:, stop:]], 1)
        memories = {"not cut": memory}
        for count in (0, 1, 3):
            memories[f"`reread={count}`"] = memory.without((start, stop), reread=count)
        memories["the default"] = memory.without((start, stop))
        memories["never read"] = model.memory(never_read)
        questions = {"the cut pair": pair, "the pair before": pair - 1, "another": (pair + 2) % PAIRS}
        for question, asked in questions.items():
            symbols = {**batch.symbols, "asked": torch.full_like(batch.symbols["asked"], asked)}
            spelled = task.spell(symbols)
            for label, asked_memory in memories.items():
                logits = model.logits_after(asked_memory, spelled.tokens[:, -2:-1])
                answers = logits[:, -1].argmax(-1)
                counts = right.setdefault(label, dict.fromkeys(questions, 0))
                counts[question] += int((answers == spelled.answers[:, 0]).sum())
    n_questions = n * len(places)
    shares = {}
    for label, counts in right.items():
        shares[label] = {question: (count, n_questions) for question, count in counts.items()}
    return shares


def measure(sequences: int = 32) -> dict[str, object]:
    """What operations recover, in every model; and of the zoo's models how often a fact that is cut is recalled."""
    models: dict[str, dict[str, object]] = {}
    for name in MODELS:
        model = HookedRecurrent.from_pretrained(name, device="cpu")
        models[name] = {
            "at once": cut_at_once(model, sequences),
            "later": {str(m): {"shares": cut_later(model, sequences, m), "read": tokens_read(m)} for m in LATER},
            "familiar": {str(m): familiar(model, FAMILIAR * sequences, m) for m in LATER},
            "paste": pasted(model, sequences),
            "compressed": compressed(model, sequences),
        }
    return {
        "sequences": sequences,
        "familiar": FAMILIAR * sequences,
        "models": models,
        "facts": {name: cut_facts(name, sequences) for name in RECALL},
    }
