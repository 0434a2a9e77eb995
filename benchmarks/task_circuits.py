"""Circuits of tasks: a word that is repeated, and where someone lives. Half of the texts choose the writes. The others
show what these keep: the median, least and largest share, beside those of random circuits. And whether there is a task:
what the model says in the texts that choose the writes, asked for their own answers and for those of other texts."""

from __future__ import annotations

import itertools
import math
import sys
from typing import Any

import frame
import numpy as np
import torch

from hookpoints import HookedRecurrent, attribute_task
from hookpoints.circuit.task import Pair
from hookpoints.zoo import english

TITLE = "Circuits of tasks"
QUICK = {"pairs": 2, "models": ("embedded",)}
FORM = "The Secretary of the {} will report. The report of the Secretary of the"
WORDS = "Treasury Navy War State Senate House Army Constitution Union Government President Nation Congress"
SPEECH = "The past year was one of peace and of prosperity."
SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Of all writes that a circuit has, rounded up. MIB takes these shares of edges."""


def repeated() -> list[Pair]:
    """A word that is said once and asked for; the corrupt text says another."""
    pairs = itertools.pairwise(WORDS.split())
    return [Pair(FORM.format(a), FORM.format(b), f" {a}", f" {b}") for a, b in pairs]


def told() -> list[Pair]:
    """Where does someone live? The corrupt text tells another city. A fact of someone else follows, and speech."""
    writer = english.writer()
    cities = english.RELATIONS["home"].values

    def ids(number: int, city: str) -> torch.Tensor:
        name = english.NAMES[number]
        facts = f"{name} lives in {city}.", f"{english.NAMES[number + 18]} resides in {cities[number]}."
        sentences = (*facts, SPEECH, f"Where does {name} live?")
        return torch.tensor([[writer.bos, *itertools.chain(*map(writer.ids, sentences))]])

    pairs = enumerate(zip(cities[1:19], cities[9:]))  # half of the names
    return [Pair(ids(number, a), ids(number, b), f" {a}", f" {b}") for number, (a, b) in pairs]


def of_task(name: str, pairs: int) -> dict[str, Any]:
    """What the largest writes keep of unseen texts; and the areas below the curve (MIB's CPR; more is better) and
    between it and 1 (CMD; less is better), of the circuit and of the median random one."""
    model = HookedRecurrent.from_pretrained(name, device="cpu")
    cases = (told if name.startswith("facts") else repeated)()[:pairs]
    half = len(cases) // 2
    chosen = attribute_task(cases[:half], model)
    n = len(chosen.effects)
    sizes = [math.ceil(share * n) for share in SHARES]
    curve = chosen.faithful(attribute_task(cases[half:], model), sorted({*sizes, 2, 8})).set_index("n")
    figures: dict[str, Any] = {f"{row} answers": each.to_dict() for row, each in chosen.check().iterrows()}
    figures |= {f"{size} writes of {n}": curve.loc[size].to_dict() for size in (2, 8)}
    for way in ("kept", "random"):
        heights = curve.loc[sizes, way].to_numpy()
        figures[f"CPR, {way}"] = np.trapezoid(heights, SHARES)
        figures[f"CMD, {way}"] = np.trapezoid(abs(1 - heights), SHARES)
    return figures


def measure(
    pairs: int = 14, models: tuple[str, ...] = ("embedded", "embedded-rwkv7", "embedded-mamba2", "facts-english")
) -> dict[str, Any]:
    """Each model's task."""
    return {name: of_task(name, pairs) for name in models}


def lines(figures: dict[str, Any]) -> list[frame.Line]:
    """Whether there is a task, and what few writes keep beside as many random ones."""
    page_lines: list[frame.Line] = []
    for name, own in figures.items():
        numbers = {
            "own answers: effect": own["own answers"]["effect"],
            "answers of other texts: effect": own["shuffled answers"]["effect"],
        }
        for label, row in own.items():
            size, is_size, _ = label.partition(" writes of ")
            if is_size:
                numbers |= {f"{size} writes: kept": row["kept"], f"{size} random writes: kept": row["random"]}
        numbers |= {"CPR of the circuit": own["CPR, kept"], "CPR of random ones": own["CPR, random"]}
        page_lines += [frame.Line(what, value, column=name) for what, value in numbers.items()]
    return page_lines


if __name__ == "__main__":
    frame.main(sys.modules[__name__])
