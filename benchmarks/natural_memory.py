"""What readers tell of memories of language models: what was read, what is forgotten after a cut, phrases in words."""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "tools"))

import frame
import torch
from frame import Line
from tables import table
from torch import Tensor
from torch.nn.functional import cosine_similarity

from hookpoints import HookedRecurrent, Memory, MemoryReader, embedded
from hookpoints.memory.templates import area_under_curve, running_tokens

TITLE = "Memories of language models, read"
QUICK = {"texts": 40, "cut": 4, "read_back": 1, "models": ("embedded",)}
MODELS = ("embedded", "embedded-rwkv7", "embedded-mamba2")
T = 96
"""Tokens of a text."""
STARTS = (4, 40)
"""Where a phrase stands in it."""
LENGTHS = (4, 12)
"""Tokens of a phrase."""


def drawn_texts(tokens: Tensor, texts: int) -> Tensor:
    """[texts,T+60], evenly over running text [n]."""
    step = (len(tokens) - T - 60) // texts
    return torch.stack([tokens[n * step :][: T + 60] for n in range(texts)])


def own_scores(reader: MemoryReader, memory: Memory, phrases: Tensor) -> Tensor:
    """[B], of each row with its own phrase of [B,L]."""
    return reader.scores(memory, phrases.tolist()).diagonal()


def plain_cosines(reader: MemoryReader, memory: Memory, phrases: Tensor) -> Tensor:
    """[B]: the mean cosine over heads of a row's states and the states after its phrase, as they are."""
    lead = torch.tensor(reader.fitted.lead).expand(len(phrases), -1)
    alone = reader.model.memory(torch.cat([lead, phrases], 1))
    heads = [
        cosine_similarity(memory.state(layer).flatten(2), alone.state(layer).flatten(2), dim=2)
        for layer in memory.forms
    ]
    return torch.cat(heads, 1).mean(1)


def asked(reader: MemoryReader, memory: Memory, phrases: Tensor) -> Tensor:
    """[B]: the log probability of a phrase after the memory, minus that without a memory."""
    model = reader.model
    lead = torch.tensor(reader.fitted.lead).expand(len(phrases), -1)
    tokens = torch.cat([lead, phrases], 1)
    with torch.no_grad():
        both = [logits.log_softmax(-1)[:, :-1] for logits in (model.logits_after(memory, tokens), model(tokens))]
    after, before = (x.gather(2, tokens[:, 1:, None])[..., 0].sum(1) for x in both)
    return after - before


WAYS = {"reader": own_scores, "plain cosine": plain_cosines, "asked": asked}


def accuracies(reader: MemoryReader, texts: Tensor) -> dict[str, Any]:
    """AUC of phrases that were read against phrases that follow the text, by length and start."""
    memory = reader.model.memory(texts[:, :T])
    found: dict[str, Any] = {}
    for length in LENGTHS:
        unread = texts[:, T + 6 :][:, :length]
        for start in STARTS:
            read = texts[:, start:][:, :length]
            own: dict[str, float] = {}
            for name, way in WAYS.items():
                own[name] = area_under_curve(way(reader, memory, read), way(reader, memory, unread))
            of_others = (own_scores(reader, memory, phrases.roll(1, 0)) for phrases in (read, unread))
            own["another text"] = area_under_curve(*of_others)
            found[f"{length} tokens, {T - start - length} later"] = own
    return found


def first_of(reader: MemoryReader, texts: Tensor, corpus: Tensor, candidates: int = 3000) -> dict[str, float]:
    """How often the phrase that was read scores above so many phrases of other texts."""
    memory = reader.model.memory(texts[:, :T])
    starts = torch.linspace(0, len(corpus) - 12, candidates).long()
    others = reader.scores(memory, corpus[starts[:, None] + torch.arange(12)].tolist())
    found: dict[str, float] = {}
    for start in STARTS:
        own = own_scores(reader, memory, texts[:, start:][:, :12])
        found[f"first, {T - start - 12} later"] = float((others.amax(1) < own).float().mean())
    return found


def certificates(reader: MemoryReader, texts: Tensor) -> dict[str, float]:
    """AUC against phrases that follow the text: of 12 tokens that were read, cut, never read, and of others cut."""
    scores: dict[str, list[float]] = {"read": [], "cut": [], "never read": [], "cut elsewhere": [], "unread": []}
    for text in texts:
        memory = reader.model.memory(text[None, :T])
        phrase = [text[40:52].tolist()]
        found = reader.forgot(memory, (40, 52))
        for name, reading in zip(("read", "cut", "never read"), found, strict=True):
            scores[name].append(reading.score)
        scores["cut elsewhere"].append(float(reader.scores(memory.without((20, 32)), phrase)))
        scores["unread"].append(float(reader.scores(memory, [text[T + 6 :][:12].tolist()])))
    unread = torch.tensor(scores.pop("unread"))
    return {name: area_under_curve(torch.tensor(each), unread) for name, each in scores.items()}


def read_back(reader: MemoryReader, texts: Tensor) -> dict[str, Any]:
    """Phrases read back from memories: how many share three tokens in a row with their text, and with another."""
    ranks: list[int] = []
    hits: list[bool] = []
    nulls: list[bool] = []
    shown: list[dict[str, Any]] = []
    began = time.process_time()
    for n, text in enumerate(texts):
        other = texts[(n + 1) % len(texts), :T]
        phrases = reader.read_back(reader.model.memory(text[None, :T]))
        in_text = [bool(runs(phrase.tokens) & runs(text[:T].tolist())) for phrase in phrases]
        nulls += [bool(runs(phrase.tokens) & runs(other.tolist())) for phrase in phrases]
        hits += in_text
        ranks += range(len(phrases))
        read = [phrase.text for phrase in phrases]
        shown.append({"text": reader.model.to_string(text[:T]), "read": read, "hits": in_text})
    found: dict[str, Any] = {"CPU seconds": (time.process_time() - began) / len(texts), "texts": shown}
    for most in (3, 10):
        found[f"first {most}"] = statistics.mean(hit for rank, hit in zip(ranks, hits, strict=True) if rank < most)
    found["another text"] = statistics.mean(nulls)
    return found


def shuffled(reader: MemoryReader, texts: Tensor) -> float:
    """How many phrases share three tokens in a row with their text, where the key channels of states are shuffled."""
    hits: list[bool] = []
    drawn = torch.Generator().manual_seed(0)
    for text in texts:
        memory = reader.model.memory(text[None, :T])
        states = {layer: memory.state(layer) for layer in memory.forms}
        mixed = {layer: x[:, :, torch.randperm(x.shape[2], generator=drawn)] for layer, x in states.items()}
        own = runs(text[:T].tolist())
        hits += [bool(runs(phrase.tokens) & own) for phrase in reader.read_back(memory.with_states(mixed))]
    return statistics.mean(hits)


def whole_texts(reader: MemoryReader, texts: Tensor, length: int = 12) -> dict[str, float]:
    """The share of a short text's tokens that are in the phrase that is read back from it, and of another text's."""
    found: dict[str, float] = {"own": 0.0, "another text's": 0.0}
    lead = torch.tensor(reader.fitted.lead)
    for n, text in enumerate(texts):
        memory = reader.model.memory(torch.cat([lead, text[:length]])[None])
        (phrase,) = reader.read_back(memory, 1, length=length)
        for name, other in (("own", text), ("another text's", texts[(n + 1) % len(texts)])):
            tokens = {*other[:length].tolist()}
            found[name] += len(tokens & {*phrase.tokens}) / len(tokens) / len(texts)
    return found


def runs(tokens: Any) -> set[tuple[int, ...]]:
    """Every three tokens in a row."""
    return set(zip(tokens, tokens[1:], tokens[2:]))


def of_model(name: str, texts: int, cut: int, phrases: int) -> dict[str, Any]:
    """One model: fitted on text for training, measured on text for tests."""
    model = HookedRecurrent.from_pretrained(name, device="cpu")
    began = time.process_time()
    reader = MemoryReader.fit(model, embedded.text("train"))
    fit = time.process_time() - began
    corpus = running_tokens(model, embedded.text("test"))
    drawn = drawn_texts(corpus, texts)
    few = drawn_texts(corpus, phrases)
    half = len(corpus) // 2
    return {
        "fit, CPU seconds": fit,
        "horizon": {f"to age {row.age}": row.auc for row in reader.horizon},
        "AUC": accuracies(reader, drawn),
        "of 3,000": first_of(reader, drawn_texts(corpus[:half], texts // 2), corpus[half:]),
        "certificate": certificates(reader, drawn_texts(corpus, cut)),
        "read back": read_back(reader, few) | {"shuffled": shuffled(reader, few[:3])},
        "short texts": whole_texts(reader, few),
    }


def measure(texts: int = 60, cut: int = 20, read_back: int = 6, models: tuple[str, ...] = MODELS) -> dict[str, Any]:
    """Every model."""
    return {name: of_model(name, texts, cut, read_back) for name in models}


def lines(found: dict[str, Any]) -> list[Line]:
    """What has a goal."""
    rows: list[Line] = []
    for name, own in found.items():
        for what, ways in own["AUC"].items():
            goal = 0.98 if what.startswith("12") else 0.9
            rows.append(Line(f"{name}: AUC of phrases of {what}", ways["reader"], goal=goal, least=True))
        for what, share in own["of 3,000"].items():
            rows.append(Line(f"{name}: a phrase of 12 tokens among 3,000, {what}", share, goal=0.75, least=True))
        gap = abs(own["certificate"]["cut"] - own["certificate"]["never read"])
        rows.append(Line(f"{name}: AUC of a cut phrase, from one never read", gap, goal=0.03))
        back = own["read back"]
        rows.append(Line(f"{name}: phrases read back, first 10", back["first 10"], goal=0.6, least=True))
        rows.append(Line(f"{name}: phrases read back, another text's", back["another text"], goal=0.02))
        rows.append(Line(f"{name}: phrases read back, shuffled key channels", back["shuffled"], goal=0.02))
        short = own["short texts"]
        rows.append(Line(f"{name}: tokens of texts of 12, read back", short["own"], goal=0.75, least=True))
        rows.append(Line(f"{name}: tokens of texts of 12, another text's", short["another text's"]))
        rows.append(Line(f"{name}: CPU of phrases read back", back["CPU seconds"], " s", goal=20))
    return rows


def text(found: dict[str, Any]) -> str:
    """What rivals tell, and what cuts leave."""
    rows: list[list[str]] = []
    for name, own in found.items():
        for what, ways in own["AUC"].items():
            rows.append([f"{name}: {what}", *(f"{ways[way]:.3f}" for way in (*WAYS, "another text"))])
    cuts = [[name, *(f"{auc:.3f}" for auc in own["certificate"].values())] for name, own in found.items()]
    back = [[name, *(f"{own['read back'][what]:.0%}" for what in BACK)] for name, own in found.items()]
    first = next(iter(found.values()))["read back"]["texts"]
    shown = [[words(each["text"]), ", ".join(map(marked, each["read"][:5], each["hits"]))] for each in first]
    tables = (
        table(("AUC of phrases of", "reader", "plain cosine, heads alike", "asked: log p", "another text's"), rows),
        table(("AUC of 12 tokens, 44 later", "read", "cut", "never read", "others cut"), cuts),
        table(("phrases read back that share three tokens in a row", *BACK), back),
        table(("text", "its first five phrases; bold: three tokens in a row are in the text"), shown),
    )
    return "\n\n".join(tables)


BACK = ("first 3", "first 10", "another text")


def words(text: str) -> str:
    """A text as a cell of a table has it."""
    return " ".join(text.split()).replace("|", "/")


def marked(phrase: str, hit: bool) -> str:
    """A phrase, bold if it is in the text."""
    return f"**{words(phrase)}**" if hit else words(phrase)


if __name__ == "__main__":
    frame.main(sys.modules[__name__])
