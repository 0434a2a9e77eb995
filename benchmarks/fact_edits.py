"""Facts replaced without a dictionary: what simpler edits of a memory do in models whose facts are known."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "scripts"))

import frame
import torch
from frame import Line
from tables import table
from torch import Tensor
from torch.nn.functional import normalize

from hookpoints import HookedRecurrent, Memory, zoo
from hookpoints.zoo.tasks import Batch

TITLE = "Facts replaced without a dictionary"
QUICK = {"texts": 4, "fitted": 40}
MODELS = ("facts", "recall", "recall-mamba2", "recall-rwkv7")
TOLD = (4, 8)
"""Facts of a text."""
WAYS = ("nothing", "appended", "overwritten", "mean values", "cut", "never read")


class Told:
    """Texts of one number of facts, of which the first is replaced."""

    def __init__(self, name: str, pairs: int, texts: int) -> None:
        self.task: Any = zoo.task(name)
        self.symbols = dict(self.task.batch(texts, torch.Generator().manual_seed(70 + pairs), pairs=pairs).symbols)
        self.new = self.task.others(self.symbols["values"], torch.Generator().manual_seed(0))
        spelled = self.spell(self.symbols)
        self.each = (spelled.tokens.shape[1] - 1) // (pairs + 1)
        """Tokens of a fact."""
        self.end = 1 + pairs * self.each
        self.tokens = spelled.tokens[:, : self.end]
        self.places = spelled.places["values"]

    def spell(self, symbols: dict[str, Tensor], asked: int = 0) -> Batch:
        """Texts that ask for one of their facts."""
        return self.task.spell(symbols | {"asked": torch.full_like(symbols["asked"], asked)})

    def question(self, asked: int) -> tuple[Tensor, Tensor]:
        """Tokens [N,n] that ask for a fact, and the answers [N]."""
        spelled = self.spell(self.symbols, asked)
        return spelled.tokens[:, self.end : int(spelled.positions[0, 0]) + 1], spelled.answers[:, 0]

    def alone(self) -> Batch:
        """Texts of the first fact alone, with its new value."""
        return self.spell(self.symbols | {"keys": self.symbols["keys"][:, :1], "values": self.new[:, :1]})


def mean_values(model: HookedRecurrent, name: str, layer: int, offset: int, fitted: int) -> Tensor:
    """[values,H,V] what is written for each value, on average over texts of four facts."""
    task: Any = zoo.task(name)
    batch = task.batch(fitted, torch.Generator().manual_seed(0), pairs=4)
    written = model.recurrence(batch.tokens, layer).u
    places = (batch.places["values"] + offset)[:, :, None, None].expand(-1, -1, *written.shape[2:])
    values = batch.symbols["values"].flatten()
    sums = written.new_zeros(task.n_values, *written.shape[2:])
    sums.index_add_(0, values, written.gather(1, places).flatten(0, 1))
    return sums / values.bincount(minlength=task.n_values).clamp(min=1)[:, None, None]


@torch.no_grad()
def of_model(name: str, texts: int, fitted: int) -> dict[str, dict[str, dict[str, float]]]:
    """For each number of facts and way, the share of texts with the new answer, the old one, and other facts right."""
    model = HookedRecurrent.from_pretrained(name, device="cpu")
    holders = zoo.truth(name).holders
    holder = next(holder for holder in holders if holder.holds == "values")
    holder = dataclasses.replace(holder, heads=sorted({head for each in holders for head in each.heads}))
    means = mean_values(model, name, holder.layer, holder.offset, fitted)
    found: dict[str, dict[str, dict[str, float]]] = {}
    for pairs in TOLD:
        told = Told(name, pairs, texts)
        memory = model.memory(told.tokens)
        found[f"{pairs} facts"] = {way: rates(model, told, way, memory, holder, means) for way in WAYS}
    return found


def rates(
    model: HookedRecurrent, told: Told, way: str, memory: Memory, holder: zoo.Holder, means: Tensor
) -> dict[str, float]:
    """Answers after one way of replacing, or of removing, the first fact."""
    first = told.new[:, 0]
    alone = told.alone()
    before = memory.tokens[:, :0]  # what is read before a question
    if way == "appended":
        before = alone.tokens[:, 1 : 1 + told.each]
    elif way == "cut":
        memory = memory.without((1, 1 + told.each))
    elif way == "never read":
        memory = model.memory(torch.cat([told.tokens[:, :1], told.tokens[:, 1 + told.each :]], 1))
    elif way != "nothing":
        state = memory.state(holder.layer)
        rows = torch.arange(len(first))
        if way == "overwritten":  # what is along the key of a pass over the new sentence, by what that pass writes
            written = model.recurrence(alone.tokens, holder.layer)
            place = alone.places["values"][:, 0] + holder.offset
            k = normalize(written.k[rows, place], dim=-1)
            value = written.k[rows, place].norm(dim=-1, keepdim=True) * written.u[rows, place]
            value = value - (k[..., None] * state).sum(2)
        else:
            k = memory.recurrence(holder.layer).k[rows, told.places[:, 0] + holder.offset]
            value = means[first] - means[told.symbols["values"][:, 0]]
        change = torch.zeros_like(state)
        change[:, holder.heads] = (k[..., None] * value[..., None, :])[:, holder.heads]
        memory = memory.with_states({holder.layer: state + change})
    said = []
    old = []
    for asked in range(told.symbols["keys"].shape[1]):
        question, answer = told.question(asked)
        said.append(model.logits_after(memory, torch.cat([before, question], 1))[:, -1].argmax(-1))
        old.append(answer)
    others = [(a == b).float().mean() for a, b in zip(said[1:], old[1:])]
    return {
        "new answer": float((said[0] == alone.answers[:, 0]).float().mean()),
        "old answer": float((said[0] == old[0]).float().mean()),
        "other facts right": float(torch.stack(others).mean()),
    }


WORDS = """\
{table}
The first fact of each text is replaced. *Appended*: a sentence with the new value is read after the text.
*Overwritten*: what the state holds along the key of a pass over that sentence is replaced by what the pass writes.
*Mean values*: the mean write of the new value, minus that of the old one, is added along the key of the old write.
*Cut*: the sentence is removed by `memory.without`. *Never read*: the text without the sentence. Other facts stay right
in at least {others:.1%}."""


def measure(texts: int = 100, fitted: int = 2000) -> dict[str, Any]:
    """Every model."""
    return {name: of_model(name, texts, fitted) for name in MODELS}


def lines(found: dict[str, Any]) -> list[Line]:
    """None has a goal."""
    return []


def text(found: dict[str, Any]) -> str:
    """A table of what each way does."""
    rows = []
    for name, by_told in found.items():
        for told, ways in by_told.items():
            new, old = ({way: f"{own[what]:.0%}" for way, own in ways.items()} for what in ("new answer", "old answer"))
            rows.append([f"{name}, {told}", *(new[way] for way in WAYS[1:4]), old["cut"], old["never read"]])
    columns = [f"{way}: new answer" for way in WAYS[1:4]] + [f"{way}: old answer" for way in WAYS[4:]]
    others = min(own["other facts right"] for ways in found.values() for each in ways.values() for own in each.values())
    return WORDS.format(table=table(("texts", *columns), rows), others=others)


if __name__ == "__main__":
    frame.main(sys.modules[__name__])
