"""What readers tell of memories of language models: what was read, beside simple rivals, and what is left after a cut.

All ways are given the same memories and phrases. Readers and their rivals with labels are fitted to the same text.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "tools"))

import frame
import torch
from frame import Line
from tables import table
from torch import Tensor
from torch.nn import functional as F

from hookpoints import HookedRecurrent, Memory, MemoryReader, embedded
from hookpoints.memory.passes import LayerStates
from hookpoints.memory.templates import LayerFit, Whitening, running_tokens, states_at
from writesae.dictionary.estimates import mean_estimate, percentile_interval, resample_counts

TITLE = "Memories of language models, read"
QUICK = {"texts": 20, "fits": 1, "corpus": 400, "models": ("embedded",)}
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
CUT = (T - AGES[0] - 12, T - AGES[0])
"""The phrase of 12 tokens that was read 44 tokens ago."""
CONTEXT = 160
"""Tokens of text of a fit, before the longest phrase."""
STRETCHES = 150
"""Of such text, that a fit has."""
ENDS = [*range(31, CONTEXT, 16)]
"""Where rivals with labels look at states of the text of the fit."""
PROJECTED = 128
"""Numbers to which they project the whitened state of a head, at random."""
NEAREST = 10
"""States of the text of the fit that are taken to be like a memory."""
RIDGE = 1.0
"""Of the probe, whose features have length one: the best of 0.01, 0.1, 1 and 10."""
DECOYS = 39
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
    """[2,B,vocab]: how far a memory has read each token, by rivals who know which tokens the text
    of the fit had read: the mean over the nearest of its states, and a ridge probe. Rare tokens count more."""
    drawn = torch.Generator().manual_seed(0)
    model, fitted = reader.model, reader.fitted
    sizes = [fit.of_states.mean.flatten(1).shape for fit in fitted.layers.values()]
    maps = [torch.randn(*size, PROJECTED, generator=drawn) for size in sizes]

    def features(some: LayerStates) -> Tensor:
        return torch.cat([torch.einsum("nhx,hxp->nhp", *x).flatten(1) for x in zip(fitted.of_states(some), maps)], 1)

    rows: list[Tensor] = []
    labels: list[Tensor] = []
    for batch in stretches[:, :CONTEXT].split(BATCH // 2):
        at = states_at(model, batch, ENDS)
        rows.append(features({layer: x.flatten(0, 1) for layer, x in at.items()}))
        labels.append((F.one_hot(batch, model.cfg.d_vocab).cumsum(1)[:, ENDS] > 0).flatten(0, 1))
    x, y = torch.cat(rows), torch.cat(labels).float()
    wanted = (y - y.mean(0)) / (y.std(0) + 0.05)
    states = {layer: memory.state(layer) for layer in fitted.layers}
    own, memories = (F.normalize(some - x.mean(0), dim=1) for some in (x, features(states)))
    alike = memories @ own.mT
    probe = alike @ torch.linalg.solve(own @ own.mT + RIDGE * torch.eye(len(own)), wanted)
    return torch.stack([wanted[alike.topk(NEAREST).indices].mean(1), probe])


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
) -> dict[str, Interval]:
    """AUC of phrases that were read against phrases that follow the text, by length, age and way; and what cuts
    leave."""
    memory = readers[0].model.memory(texts[:, EDGE : EDGE + T])
    drawn = torch.Generator().manual_seed(0)
    states = {layer: memory.state(layer) for layer in memory.forms}
    shuffled = {layer: x[:, :, torch.randperm(x.shape[2], generator=drawn)] for layer, x in states.items()}
    before, _, after = memory.tokens.tensor_split(CUT, 1)
    cuts = {
        "read": memory,
        "cut": memory.without(CUT),
        "never read": readers[0].model.memory(torch.cat([before, after], 1)),
        "cut elsewhere": memory.without((CUT[0] - 20, CUT[1] - 20)),
    }
    tables = torch.stack([labelled(*each, memory) for each in zip(readers, stretches)], 1)
    found: dict[str, Interval] = {"AUC": {}, "certificate": {}}
    for length in LENGTHS:
        phrases = phrases_of(texts, length)
        counts = F.one_hot(phrases, readers[0].model.cfg.d_vocab).sum(2).float()
        nearest, probed = torch.einsum("wfbv,pbv->wfpb", tables, counts)
        own, others = own_scores(readers, memory, phrases)
        ways = {
            "reader": own,
            "plain cosine": own_scores([plain(readers[0])], memory, phrases)[0],
            "nearest texts": nearest,
            "probe with labels": probed,
            "asked": torch.stack([asked(readers[0], memory, some) for some in phrases])[None],
            "another text": others,
            "neighboring phrase": own[:, [3, 3, 2]],
            "shuffled channels": own_scores(readers, memory.with_states(shuffled), phrases)[0],
            "untrained model": own_scores([fresh], fresh.model.memory(memory.tokens), phrases)[0],
        }
        for n, age in enumerate(AGES):
            aucs = {name: auc(x[:, n], x[:, 2]) for name, x in ways.items()}
            found["AUC"][f"{length} tokens, {age} later"] = aucs
        if length == 12:
            for name, each in cuts.items():
                found["certificate"][name] = auc(own_scores(readers, each, phrases[:1])[0, :, 0], own[:, 2])
    return found


def among(reader: MemoryReader, tokens: Tensor, texts: int, corpus: int) -> Interval:
    """Phrases of 12 tokens: how often the one that was read scores above all of so many phrases of the text, and how
    often an unread one has a p of 0.05 or less, with the nearest phrases around its text as decoys."""
    drawn, begins = drawn_texts(tokens, texts)
    memory = reader.model.memory(drawn[:, EDGE : EDGE + T])
    own = own_scores([reader], memory, phrases_of(drawn, 12))[0]
    starts = torch.linspace(0, len(tokens) - 12, corpus).long()
    others = reader.scores(memory, tokens.unfold(0, 12, 1)[starts].tolist())
    ahead = starts - begins[:, None]
    apart = (ahead < -12) | (ahead > T + FAR + 12)  # from all tokens of the text and of the unread phrase
    distances = (ahead - T // 2).abs().float().where(apart, torch.inf)
    decoys = others.gather(1, distances.topk(DECOYS, largest=False).indices)
    first = others.where(apart, -torch.inf).amax(1) < own[0]
    small = ((decoys >= own[0, 2, :, None]).sum(1) + 1) / (1 + DECOYS) <= 0.05
    found = {"AUC": auc(own[:, 0], own[:, 2])}
    for name, x in zip(OF_KINDS[1:], (small, first[0], first[1])):
        found[name] = mean_estimate(x.numpy(), range(texts))._asdict()
    return found


OF_KINDS = ("AUC", "p of 0.05 or less", *(f"first, {age} later" for age in AGES))


def kinds_of_text() -> dict[str, str]:
    """Text that no fit has seen: of its own kind, and of two others."""
    kinds = {"speeches": embedded.text("test")}
    for kind, files in (("documentation", "docs/*.md"), ("code", "hookpoints/memory/*.py")):
        paths = sorted(Path(__file__).parents[1].glob(files))
        kinds[kind] = "".join(path.read_text("utf-8") for path in paths)[:150_000]
    return kinds


def of_model(name: str, texts: int, fits: int, corpus: int) -> dict[str, Any]:
    """One model. Each fit has text of its own."""
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
        **accuracies(readers, stretches, fit(fresh, 0), drawn_texts(kinds["speeches"], texts)[0]),
        "kinds": {kind: among(readers[0], tokens, texts, corpus) for kind, tokens in kinds.items()},
    }


def measure(texts: int = 100, fits: int = 3, corpus: int = 3000, models: tuple[str, ...] = MODELS) -> dict[str, Any]:
    """Every model."""
    return {name: of_model(name, texts, fits, corpus) for name in models}


GOALS = {"4": 0.9, "12": 0.98, "40": 0.98}


def lines(found: dict[str, Any]) -> list[Line]:
    """What has a goal."""
    rows: list[Line] = []
    for name, own in found.items():
        for what, ways in own["AUC"].items():
            rows.append(Line(f"{name}: AUC, {what}", ways["reader"]["mean"], "", GOALS[what.split()[0]], least=True))
        for kind, each in own["kinds"].items():
            rows.append(Line(f"{name}: unread {kind}, p of 0.05 or less", each[OF_KINDS[1]]["mean"], "", 0.05))
        first = own["kinds"]["speeches"]["first, 44 later"]["mean"]
        rows.append(Line(f"{name}: the phrase that was read scores above 3,000", first, "", 0.75, least=True))
        cut, never = (own["certificate"][what]["mean"] for what in ("cut", "never read"))
        rows.append(Line(f"{name}: AUC of a cut phrase, from one never read", abs(cut - never), "", 0.03))
    return rows


RIVALS = ("reader", "plain cosine", "nearest texts", "probe with labels", "asked")
CUTS = ("read", "cut", "never read", "cut elsewhere")
NULLS = ("another text", "neighboring phrase", "shuffled channels", "untrained model")


def cells(intervals: Mapping[str, Interval], names: Sequence[str]) -> list[str]:
    """The mean of each name, and its interval."""
    found: list[str] = []
    for own in (intervals[name] for name in names):
        low, high = (f"{own[end]:.2f}" for end in ("low", "high"))
        found.append(f"{own['mean']:.3f} ({low}–{high})")
    return found


def text(found: dict[str, Any]) -> str:
    """What rivals and nulls tell, what cuts leave, and other kinds of text."""
    phrases: dict[str, Any] = {}
    kinds: dict[str, Any] = {}
    for name, own in found.items():
        phrases |= {f"{name}: {what}": ways for what, ways in own["AUC"].items()}
        kinds |= {f"{name}: {kind}": each for kind, each in own["kinds"].items()}
    cuts = {name: own["certificate"] for name, own in found.items()}
    parts: list[str] = []
    for head, names, rows in (
        ("AUC of phrases of (95% over texts)", RIVALS, phrases),
        ("the same, of nulls", NULLS, phrases),
        ("AUC of 12 tokens, 44 later", CUTS, cuts),
        ("12 tokens of", OF_KINDS, kinds),
    ):
        parts.append(table((head, *names), [[what, *cells(each, names)] for what, each in rows.items()]))
    return "\n\n".join(parts)


if __name__ == "__main__":
    frame.main(sys.modules[__name__])
