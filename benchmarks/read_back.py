"""Phrases of memories of language models, read back in words: how many are in the text, and in another text."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "tools"))

import frame
import torch
from frame import Line
from natural_memory import MODELS
from tables import table

from hookpoints import HookedRecurrent, MemoryReader, embedded
from hookpoints.memory.phrases import runs
from hookpoints.memory.templates import running_tokens

TITLE = "Memories of language models, read back in words"
QUICK = {"texts": 2, "models": ("embedded",)}
T = 96
"""Tokens of a text."""
SHORT = 12
"""Tokens of a short text, which is read back whole."""


def shared(phrases: Iterable[Sequence[int]], text: Sequence[int]) -> list[bool]:
    """Which phrases have three tokens in a row that a text has."""
    return [bool(runs(phrase, 3) & runs(text, 3)) for phrase in phrases]


def of_model(name: str, texts: int) -> dict[str, Any]:
    """What is read back from each text. The other text is the next one."""
    model = HookedRecurrent.from_pretrained(name, device="cpu")
    reader = MemoryReader.fit(model, embedded.text("train"))
    tokens = running_tokens(model, embedded.text("test"))
    drawn = tokens.unfold(0, T, (len(tokens) - T - 60) // texts)[:texts].tolist()
    figures: dict[str, list[Any]] = {name: [] for name in SHARES}
    shown: dict[str, str] = {}
    seconds = -time.process_time()
    for n, own in enumerate(drawn):
        other = drawn[(n + 1) % texts]
        read = reader.read_back(model.memory(torch.tensor([own])))
        phrases = [phrase.tokens for phrase in read]
        hits = shared(phrases, own)
        marked = [f"**{phrase.text.strip()}**" if hit else phrase.text for phrase, hit in zip(read, hits)]
        shown[str(model.to_string(own))] = ", ".join(marked[:5])
        figures["first 3 phrases"] += hits[:3]
        figures["first 10 phrases"] += hits
        figures["another text's phrases"] += shared(phrases, other)
        figures["its own phrases, in another text"] += shared([own[n : n + 6] for n in range(T - 5)], other)
    seconds += time.process_time()
    for own in drawn:
        short = torch.tensor([[*reader.fitted.lead, *own[:SHORT]]])
        (whole,) = reader.read_back(model.memory(short), 1, length=SHORT)
        figures["tokens of a short text"] += [token in whole.tokens for token in {*own[:SHORT]}]
    means = {what: statistics.mean(each) for what, each in figures.items()}
    return means | {"CPU seconds": seconds / texts, "texts": shown}


def measure(texts: int = 6, models: tuple[str, ...] = MODELS) -> dict[str, Any]:
    """Every model."""
    return {name: of_model(name, texts) for name in models}


SHARES = {
    "first 3 phrases": (),
    "first 10 phrases": (0.6, True),
    "another text's phrases": (0.02,),
    "its own phrases, in another text": (),
    "tokens of a short text": (0.75, True),
}
"""What is measured, and its goal."""


def lines(figures: dict[str, Any]) -> list[Line]:
    """Shares of phrases and tokens, and seconds."""
    rows: list[Line] = []
    for name, own in figures.items():
        rows += [Line(what, own[what], "", *goal, column=name) for what, goal in SHARES.items()]
        rows.append(Line("CPU of ten phrases", own["CPU seconds"], " s", 20, column=name))
    return rows


def text(figures: dict[str, Any]) -> str:
    """What was read back from two texts of the first model."""
    shown = list(next(iter(figures.values()))["texts"].items())[:2]
    return table(("text", "its first five phrases; bold: three tokens in a row are in the text"), shown)


if __name__ == "__main__":
    frame.main(sys.modules[__name__])
