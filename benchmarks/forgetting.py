"""A span that was cut from a memory: can somebody with a list of spans still name it, and what does an exact cut cost?

The attack is that of `forgot`: each candidate is read at the place of the cut, cut approximately, and compared.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "tools"))

import frame
import torch
from frame import Line
from natural_memory import MODELS
from tables import table
from torch import Tensor

from hookpoints import HookedRecurrent, Memory, embedded, forgot
from hookpoints.memory.templates import running_tokens

TITLE = "A span that was cut"
QUICK = {"texts": 2, "decoys": 3, "lengths": (128,), "rounds": 1, "models": ("embedded",)}
T = 96
"""Tokens of a text."""
SPAN = (40, 52)
APPROXIMATE = "approximate cut"
EXACT = "exact cut"


def loaded(cut: Memory) -> Memory:
    """From the file that it is saved to."""
    with tempfile.TemporaryDirectory() as folder:
        cut.save(Path(folder) / "memory")
        return Memory.load(Path(folder) / "memory", cut.model)


def changed(cut: Memory, change: Callable[[Tensor], Tensor]) -> Memory:
    """With other states."""
    return cut.with_states({layer: change(cut.state(layer)) for layer in cut.forms})


def with_noise(state: Tensor) -> Tensor:
    """With noise of a hundredth of its size."""
    noise = torch.randn(state.shape, generator=torch.Generator().manual_seed(0))
    return state + 0.01 * noise * state.norm() / noise.norm()


CUTS: dict[str, Callable[[Memory], Memory]] = {
    APPROXIMATE: lambda memory: memory.without(SPAN, approximate=True),
    EXACT: lambda memory: memory.without(SPAN),
    "approximate, in bfloat16": lambda memory: changed(
        memory.without(SPAN, approximate=True), lambda state: state.bfloat16().float()
    ),
    "approximate, 1% noise": lambda memory: changed(memory.without(SPAN, approximate=True), with_noise),
    "approximate, from a file": lambda memory: loaded(memory.without(SPAN, approximate=True)),
}
"""What an attacker has of a memory."""


def attacked(model: HookedRecurrent, texts: int, decoys: int) -> dict[str, dict[str, float]]:
    """Of each cut, how often the span that was cut is the nearest of all candidates, and how often `forgot` calls it
    gone. The others are spans of other texts."""
    tokens = running_tokens(model, embedded.text("test"))
    drawn = tokens.unfold(0, T, (len(tokens) - T) // (texts + decoys))[: texts + decoys]
    spans = drawn[:, slice(*SPAN)].tolist()
    found: dict[str, dict[str, float]] = {name: {"named": 0, "gone": 0} for name in CUTS}
    for n, text in enumerate(drawn[:texts]):
        memory = model.memory(text[None])
        candidates = spans[n + 1 :][:decoys]
        for name, cut in CUTS.items():
            certificate = forgot(memory, cut(memory), SPAN, candidates=candidates)
            nearest = certificate.candidates[0].text
            found[name]["named"] += (nearest == model.to_string(spans[n])) / texts
            found[name]["gone"] += certificate.gone / texts
    return found


def costs(model: HookedRecurrent, lengths: tuple[int, ...], rounds: int) -> dict[str, dict[str, float]]:
    """Cuts of 16 tokens a quarter into a text, as multiples of a plain pass over all of it, which keeps a cache."""
    tokens = running_tokens(model, embedded.text("test"))
    found: dict[str, dict[str, float]] = {}
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
        found[f"{length:,} tokens"] = {name: each["ratio"] for name, each in timed.items()}
    return found


@torch.no_grad()
def measure(
    texts: int = 20,
    decoys: int = 32,
    lengths: tuple[int, ...] = (128, 512, 2048),
    rounds: int = 5,
    models: tuple[str, ...] = MODELS,
) -> dict[str, Any]:
    """Every model."""
    found: dict[str, Any] = {}
    for name in models:
        model = HookedRecurrent.from_pretrained(name, device="cpu")
        found[name] = {
            "candidates": decoys + 1,
            "attack": attacked(model, texts, decoys),
            "costs": costs(model, lengths, rounds),
        }
    return found


def lines(found: dict[str, Any]) -> list[Line]:
    """What has a goal."""
    rows: list[Line] = []
    for name, own in found.items():
        exact = own["attack"][EXACT]
        rows.append(Line(f"{name}: named after an exact cut", exact["named"], "", 0.15))
        rows.append(Line(f"{name}: an exact cut is gone", exact["gone"], "", 1, least=True))
        rows.append(Line(f"{name}: an approximate cut is gone", own["attack"][APPROXIMATE]["gone"], "", 0))
        for length, each in own["costs"].items():
            rows.append(Line(f"{name}: {length}, an exact cut over a memory", each[EXACT] / each["memory"], "", 1.5))
    return rows


def text(found: dict[str, Any]) -> str:
    """The attack, and costs."""
    named: list[list[str]] = []
    ratios: list[list[str]] = []
    for name, own in found.items():
        for cut, each in own["attack"].items():
            named.append([f"{name}: {cut}", f"{each['named']:.2f}", f"{each['gone']:.2f}"])
        for length, each in own["costs"].items():
            ratios.append([f"{name}: {length}", *(f"{ratio:.2f}" for ratio in each.values())])
    first = next(iter(found.values()))
    count = first["candidates"]
    head = (f"the span among {count} candidates (chance {1 / count:.2f})", "nearest", "called gone")
    costs_head = ("time over a plain pass", *next(iter(first["costs"].values())))
    return f"{table(head, named)}\n\n{table(costs_head, ratios)}"


if __name__ == "__main__":
    frame.main(sys.modules[__name__])
