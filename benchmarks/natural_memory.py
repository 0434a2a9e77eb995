"""What readers tell of memories of language models: what was read, compared with simple rivals and nulls.

All ways are given the same memories and phrases. Readers and their rivals with labels are fitted to the same text.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import frame
import torch
from frame import Line
from torch import Tensor
from torch.nn import functional as F

from hookpoints import HookedRecurrent, Memory, MemoryReader, embedded
from hookpoints.memory.passes import LayerStates
from hookpoints.memory.templates import LayerFit, Whitening, running_tokens, states_at
from writesae.dictionary.estimates import mean_estimate, percentile_interval, resample_counts

TITLE = "Memories of language models, read"
QUICK = {"texts": 20, "fits": 1, "models": ("embedded",)}
MODELS = ("embedded", "embedded-rwkv7", "embedded-mamba2")
T = 128
"""Tokens that a memory has read."""
LENGTHS = (4, 12, 40)
"""Tokens of a phrase."""
AGES = (44, 80)
"""Tokens that were read after it."""
FAR = 6
"""Tokens between a text and the phrases after and before it, which it did not read."""
EDGE = FAR + LENGTHS[-1]
CONTEXT = 160
"""Tokens of text of a fit, before the longest phrase."""
STRETCHES = 150
"""Of such text, that a fit has."""
ENDS = [*range(31, CONTEXT, 16)]
"""Where rivals with labels look at states of the text of the fit."""
PROJECTED = 128
"""Numbers to which they project the whitened state of a head, at random."""
RIDGE = 1.0
"""Of the probe, whose features have length one: the best of 0.01, 0.1, 1 and 10."""
DECOYS = 39
CORPUS = 3000
"""Phrases of the text, of which decoys are the nearest."""
SMALL_P = "p of 0.05 or less"
BATCH = 64

Interval = dict[str, Any]


def drawn_texts(tokens: Tensor, texts: int) -> tuple[Tensor, Tensor]:
    """Texts [B,EDGE+T+EDGE], evenly over running text [n], and where what memories read begins [B]."""
    starts = torch.linspace(0, len(tokens) - T - 2 * EDGE, texts).long()
    return tokens[starts[:, None] + torch.arange(T + 2 * EDGE)], starts + EDGE


def phrases_of(texts: Tensor, length: int) -> Tensor:
    """[4,B,length]: read so many tokens ago, two of them; and not read, after the text and before it."""
    end = EDGE + T
    begins = (*(end - age - length for age in AGES), end + FAR, EDGE - FAR - length)
    return torch.stack([texts[:, begin : begin + length] for begin in begins])


def own_scores(readers: Sequence[MemoryReader], memory: Memory, phrases: Tensor) -> Tensor:
    """[2,F,P,B], of each row's phrases [P,B,L]: in its memory, and in that of the row before."""
    given = phrases.flatten(0, 1).tolist()
    scores = torch.stack([reader.scores(memory, given) for reader in readers]).unflatten(2, phrases.shape[:2])
    return torch.stack([scores, scores.roll(1, 1)]).diagonal(dim1=2, dim2=4)


def alone(reader: MemoryReader, phrases: Tensor) -> Tensor:
    """The lead and each of phrases [N,L]."""
    return torch.cat([torch.tensor(reader.fitted.lead).expand(len(phrases), -1), phrases], 1)


def plain(reader: MemoryReader) -> MemoryReader:
    """What scores by the cosines of states as they are, all heads alike."""
    layers: dict[int, LayerFit] = {}
    for layer, fit in reader.fitted.layers.items():
        nothing = Whitening(torch.zeros(()), *map(torch.eye, fit.of_states.mean.shape[1:]))
        layers[layer] = LayerFit(fit.heads, torch.ones_like(fit.weights), nothing, nothing)
    return MemoryReader(reader.model, reader.fitted._replace(layers=layers))


def asked(reader: MemoryReader, memory: Memory, phrases: Tensor) -> Tensor:
    """[B]: the log probability of phrases [B,L] after a memory, minus that without a memory."""
    model, tokens = reader.model, alone(reader, phrases)
    with torch.no_grad():
        change = model.logits_after(memory, tokens).log_softmax(-1) - model(tokens).log_softmax(-1)
    return change[:, :-1].gather(2, tokens[:, 1:, None]).sum((1, 2))


def labelled(reader: MemoryReader, stretches: Tensor, memory: Memory) -> Tensor:
    """[B,vocab]: how far a memory has read each token, by a ridge probe that knows which tokens the text of the fit had
    read. Rare tokens count more."""
    drawn = torch.Generator().manual_seed(0)
    model, fitted = reader.model, reader.fitted
    sizes = [fit.of_states.mean.flatten(1).shape for fit in fitted.layers.values()]
    maps = [torch.randn(*size, PROJECTED, generator=drawn) for size in sizes]

    def features(some: LayerStates) -> Tensor:
        return torch.cat([torch.einsum("nhx,hxp->nhp", *x).flatten(1) for x in zip(fitted.of_states(some), maps)], 1)

    # States at some tokens of the text of the fit, and the tokens that each has read.
    rows: list[Tensor] = []
    labels: list[Tensor] = []
    for batch in stretches[:, :CONTEXT].split(BATCH // 2):
        at = states_at(model, batch, ENDS)
        rows.append(features({layer: x.flatten(0, 1) for layer, x in at.items()}))
        labels.append((F.one_hot(batch, model.cfg.d_vocab).cumsum(1)[:, ENDS] > 0).flatten(0, 1))
    x, y = torch.cat(rows), torch.cat(labels).float()
    targets = (y - y.mean(0)) / (y.std(0) + 0.05)
    # Ridge regression in its dual form: X_m X^T (X X^T + ridge I)^-1 Y, with rows of length one.
    states = {layer: memory.state(layer) for layer in fitted.layers}
    own, memories = (F.normalize(some - x.mean(0), dim=1) for some in (x, features(states)))
    return memories @ own.mT @ torch.linalg.solve(own @ own.mT + RIDGE * torch.eye(len(own)), targets)


def auc(above: Tensor, below: Tensor) -> Interval:
    """The chance that one of ``above`` exceeds one of ``below``, ties counted half, of each fit [F,B]; the mean of the
    fits, with its 95% interval over texts."""
    wins = ((above[:, :, None] - below[:, None]).sign().double() + 1) / 2
    mean = wins.mean(0).numpy()
    draws = resample_counts(len(mean), 0)
    resampled = (draws @ mean * draws).sum(1) / mean.size
    estimate = percentile_interval(mean.mean(), resampled, len(mean), len(mean))
    return estimate._asdict() | {"fits": wins.mean((1, 2)).tolist()}


def accuracies(
    readers: Sequence[MemoryReader], stretches: Sequence[Tensor], fresh: MemoryReader, texts: Tensor
) -> dict[str, Any]:
    """AUC of phrases that were read against phrases that follow the text, by length, age and way."""
    memory = readers[0].model.memory(texts[:, EDGE : EDGE + T])
    drawn = torch.Generator().manual_seed(0)
    states = {layer: memory.state(layer) for layer in memory.forms}
    shuffled = {layer: x[:, :, torch.randperm(x.shape[2], generator=drawn)] for layer, x in states.items()}
    tables = torch.stack([labelled(*each, memory) for each in zip(readers, stretches)])
    figures: dict[str, Any] = {}
    for length in LENGTHS:
        phrases = phrases_of(texts, length)
        counts = F.one_hot(phrases, readers[0].model.cfg.d_vocab).sum(2).float()
        own, others = own_scores(readers, memory, phrases)
        ways = {
            "reader": own,
            "plain cosine": own_scores([plain(readers[0])], memory, phrases)[0],
            "probe with labels": torch.einsum("fbv,pbv->fpb", tables, counts),
            "asked": torch.stack([asked(readers[0], memory, some) for some in phrases])[None],
            "another text": others,
            "shuffled channels": own_scores(readers, memory.with_states(shuffled), phrases)[0],
            "untrained model": own_scores([fresh], fresh.model.memory(memory.tokens), phrases)[0],
        }
        for n, age in enumerate(AGES):
            figures[f"{length} tokens, {age} later"] = {name: auc(x[:, n], x[:, 2]) for name, x in ways.items()}
    return figures


def unread(reader: MemoryReader, tokens: Tensor, texts: int) -> dict[str, Any]:
    """Phrases of 12 tokens: the AUC of the one that was read, and how often an unread one has a p of 0.05 or less, with
    the nearest phrases around its text as decoys."""
    drawn, begins = drawn_texts(tokens, texts)
    memory = reader.model.memory(drawn[:, EDGE : EDGE + T])
    own = own_scores([reader], memory, phrases_of(drawn, 12))[0]
    starts = torch.linspace(0, len(tokens) - 12, CORPUS).long()
    others = reader.scores(memory, tokens.unfold(0, 12, 1)[starts].tolist())
    # Decoys keep apart from all tokens of the text and of the unread phrase.
    ahead = starts - begins[:, None]
    apart = (ahead < -12) | (ahead > T + FAR + 12)
    distances = (ahead - T // 2).abs().float().where(apart, torch.inf)
    decoys = others.gather(1, distances.topk(DECOYS, largest=False).indices)
    small = ((decoys >= own[0, 2, :, None]).sum(1) + 1) / (1 + DECOYS) <= 0.05
    return {"AUC": auc(own[:, 0], own[:, 2]), SMALL_P: mean_estimate(small.numpy(), range(texts))._asdict()}


def kinds_of_text() -> dict[str, str]:
    """Text that no fit has seen: speeches, as the text of the fits, and two other kinds."""
    kinds = {"speeches": embedded.text("test")}
    for kind, files in (("documentation", "docs/*.md"), ("code", "hookpoints/memory/*.py")):
        paths = sorted(Path(__file__).parents[1].glob(files))
        kinds[kind] = "".join(path.read_text("utf-8") for path in paths)[:150_000]
    return kinds


def of_model(name: str, texts: int, fits: int) -> dict[str, Any]:
    """One model. Each fit has other text."""
    model = HookedRecurrent.from_pretrained(name, device="cpu")
    torch.manual_seed(0)
    fresh = HookedRecurrent.from_hf(type(model.hf_model)(model.hf_model.config), model.tokenizer)
    training = running_tokens(model, embedded.text("train"))
    kinds = {kind: running_tokens(model, text) for kind, text in kinds_of_text().items()}
    size = CONTEXT + LENGTHS[-1]
    stretches = training[: STRETCHES * fits * size].view(-1, fits, size).unbind(1)

    def fit(hooked: HookedRecurrent, n: int) -> MemoryReader:
        return MemoryReader.fit(hooked, stretches[n], context=CONTEXT, longest=LENGTHS[-1], seed=n)

    readers = [fit(model, n) for n in range(fits)]
    return {
        "horizon": {f"to age {row.age}": row.auc for row in readers[0].horizon},
        "AUC": accuracies(readers, stretches, fit(fresh, 0), drawn_texts(kinds["speeches"], texts)[0]),
        "kinds": {kind: unread(readers[0], tokens, texts) for kind, tokens in kinds.items()},
    }


def measure(texts: int = 100, fits: int = 3, models: tuple[str, ...] = MODELS) -> dict[str, Any]:
    """Every model."""
    return {name: of_model(name, texts, fits) for name in models}


GOALS = {"4": 0.9, "12": 0.98, "40": 0.98}
RIVALS = ("plain cosine", "probe with labels", "asked", "another text", "shuffled channels", "untrained model")
"""Other ways, and readers of what was not read; the page has them at one length and age."""
SHOWN = "12 tokens, 44 later"


def lines(figures: dict[str, Any]) -> list[Line]:
    """AUC of the reader by length and age, compared with rivals and nulls, and phrases that were not read."""
    rows: list[Line] = []
    for name, own in figures.items():
        for what, ways in own["AUC"].items():
            goal = GOALS[what.split()[0]]
            rows.append(Line(f"AUC, {what}", ways["reader"]["mean"], "", goal, least=True, column=name))
        for way in RIVALS:
            rows.append(Line(f"{SHOWN}, {way}", own["AUC"][SHOWN][way]["mean"], column=name))
        for kind, each in own["kinds"].items():
            rows.append(Line(f"unread {kind}, {SMALL_P}", each[SMALL_P]["mean"], "", 0.05, column=name))
    return rows


if __name__ == "__main__":
    frame.main(sys.modules[__name__])
