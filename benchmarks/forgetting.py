"""A span that was cut from a memory: can somebody with a list of spans still name it, and what does an exact cut cost?

The attack is that of `forgot`: each candidate is read at the place of the cut, cut approximately, and compared.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import frame
import torch
from frame import Line
from natural_memory import MODELS

from hookpoints import HookedRecurrent, Memory, embedded, forgot
from hookpoints.memory.templates import running_tokens

TITLE = "A span that was cut"
QUICK = {"texts": 2, "decoys": 3, "lengths": (128,), "rounds": 1, "models": ("embedded",)}
T = 96
"""Tokens of a text."""
SPAN = (40, 52)
APPROXIMATE = "approximate cut"
EXACT = "exact cut"


def in_bfloat16(cut: Memory) -> Memory:
    """With states as a smaller dtype keeps them."""
    return cut.with_states({layer: cut.state(layer).bfloat16().float() for layer in cut.forms})


def never_read(memory: Memory) -> Memory:
    """Of the text without the span."""
    start, stop = SPAN
    return memory.model.memory(torch.cat([memory.tokens[:, :start], memory.tokens[:, stop:]], 1))


CUTS: dict[str, Callable[[Memory], Memory]] = {
    APPROXIMATE: lambda memory: memory.without(SPAN, approximate=True),
    EXACT: lambda memory: memory.without(SPAN),
    "approximate cut in bfloat16": lambda memory: in_bfloat16(memory.without(SPAN, approximate=True)),
    "never read": lambda memory: never_read(memory),
}
"""What an attacker has of a memory; of one that never read the span, too: a span may be guessed from its context."""


def attacked(model: HookedRecurrent, texts: int, decoys: int) -> dict[str, dict[str, float]]:
    """Of each cut, how often the span that was cut is the nearest of all candidates, and how often `forgot` calls it
    gone. The others are spans of other texts."""
    tokens = running_tokens(model, embedded.text("test"))
    drawn = tokens.unfold(0, T, (len(tokens) - T) // (texts + decoys))[: texts + decoys]
    spans = drawn[:, slice(*SPAN)].tolist()
    figures: dict[str, dict[str, float]] = {name: {"named": 0, "gone": 0} for name in CUTS}
    for n, text in enumerate(drawn[:texts]):
        memory = model.memory(text[None])
        candidates = spans[n + 1 :][:decoys]
        for name, cut in CUTS.items():
            certificate = forgot(memory, cut(memory), SPAN, candidates=candidates)
            nearest = certificate.candidates[0].text
            figures[name]["named"] += (nearest == model.to_string(spans[n])) / texts
            figures[name]["gone"] += certificate.gone / texts
    return figures


def costs(model: HookedRecurrent, lengths: tuple[int, ...], rounds: int) -> dict[str, dict[str, float]]:
    """Cuts of 16 tokens a quarter into a text, as multiples of a plain pass over all of it, which keeps a cache."""
    tokens = running_tokens(model, embedded.text("test"))
    figures: dict[str, dict[str, float]] = {}
    for length in lengths:
        text = tokens[None, :length]
        memory = model.memory(text)
        span = (length // 4, length // 4 + 16)
        ways: dict[str, frame.Way] = {
            "plain pass": lambda text=text: model.hf_model(text, use_cache=True, logits_to_keep=1),
            "memory": lambda text=text: model.memory(text),
            EXACT: lambda memory=memory, span=span: memory.without(span),
            APPROXIMATE: lambda memory=memory, span=span: memory.without(span, approximate=True),
        }
        timed = frame.timed(ways, rounds)
        figures[f"{length:,} tokens"] = {name: each["ratio"] for name, each in timed.items()}
    return figures


@torch.no_grad()
def measure(
    texts: int = 20,
    decoys: int = 32,
    lengths: tuple[int, ...] = (128, 512, 2048),
    rounds: int = 5,
    models: tuple[str, ...] = MODELS,
) -> dict[str, Any]:
    """Every model."""
    figures: dict[str, Any] = {}
    for name in models:
        model = HookedRecurrent.from_pretrained(name, device="cpu")
        figures[name] = {
            "candidates": decoys + 1,
            "attack": attacked(model, texts, decoys),
            "costs": costs(model, lengths, rounds),
        }
    return figures


def lines(figures: dict[str, Any]) -> list[Line]:
    """Of each cut, how often the span is named and how often it is called gone; and what cuts cost."""
    gone_goals: dict[str, dict[str, Any]] = {EXACT: {"goal": 1, "least": True}, APPROXIMATE: {"goal": 0}}
    rows: list[Line] = []
    for name, own in figures.items():
        for cut, each in own["attack"].items():
            what = f"{cut}: the span is the nearest of {own['candidates']}, share of texts"
            rows.append(Line(what, each["named"], column=name))
            what = f"{cut}: `forgot` calls it gone, share of texts"
            rows.append(Line(what, each["gone"], column=name, **gone_goals.get(cut, {})))
        for length, each in own["costs"].items():
            rows += [
                Line(f"{length}, {cut}: time over a plain pass", each[cut], column=name) for cut in (EXACT, APPROXIMATE)
            ]
    return rows


if __name__ == "__main__":
    frame.main(sys.modules[__name__])
