"""Circuits: how far predicted effects agree with measured ones, what graphs find in models whose circuit is known, and
what they cost, in forward passes."""

from __future__ import annotations

import statistics
import sys
import time
import warnings
from collections.abc import Iterator
from typing import Any

import frame
import numpy as np
import pandas as pd
import torch
from frame import Line

from hookpoints import Graph, HookedRecurrent, WriteEdit, attribute, embedded, write_attribution, zoo

TITLE = "Circuits"
QUICK = {"prompts": 2, "sequences": 1}
LONG = {"embedded": 0.4, "embedded-rwkv7": 0.4, "embedded-mamba2": 0.1}
"""Share of prompts of 41 to 100 tokens. In Mamba-2 one of 100 tokens has 6,400 writes, which take 80 seconds."""
LARGEST_WRITE = "the largest write measured"
LARGEST_DRAWN = "the largest node drawn"
FIVE_DRAWN = "five largest nodes drawn"
GOALS = {LARGEST_WRITE: 1.0, LARGEST_DRAWN: 0.9, FIVE_DRAWN: 0.75}
"""The least rates; 0.95 of the others."""
EDGES = ("key edges", "value edges", "query edges")
PAIRS = (
    ("The Secretary of the {} will report. The report of the Secretary of the", " Treasury", " Navy"),
    ("The President of the {} will report. The report of the President of the", " Senate", " House"),
    ("The people of {} and the government of", " Mexico", " Spain"),
)
"""A text, the word in it, and that of the corrupt text; the word is what the model is to say."""
SIZES = {"composition": {"pairs": 5}, "induction": {"words": 10}, "facts": {"pairs": 4}}


def fit(rows: pd.DataFrame) -> dict[str, float]:
    """Correlation and slope of measured effects by predicted ones."""
    slope, _ = np.polyfit(rows.predicted, rows.measured, 1)
    return {"n": len(rows), "r": rows.predicted.corr(rows.measured), "slope": slope}


def drawn(ids: torch.Tensor, prompts: int, long: int) -> list[torch.Tensor]:
    """Stretches of held-out text: ``long`` of 41 to 100 tokens, and the others of 16 to 40."""
    draw = np.random.default_rng(5)
    lengths = [*draw.integers(16, 41, prompts - long), *draw.integers(41, 101, long)]
    starts = draw.integers(ids.shape[1] - 100, size=prompts)
    return [ids[:, start : start + length] for start, length in zip(starts, lengths)]


def of_prompt(graph: Graph, every: pd.DataFrame) -> Iterator[tuple[str, float, float]]:
    """Of one prompt: a rate, and that of a random choice of as many nodes; of all nodes, ``every``, the effects."""
    tried = graph.nodes.set_index("node_id").measured.notna()
    order = every.sort_values("measured", ascending=False, key=abs).node_id
    is_drawn = order.isin(graph.prune().nodes.node_id)
    yield LARGEST_DRAWN, is_drawn.iloc[0], is_drawn.mean()
    yield FIVE_DRAWN, is_drawn[:5].mean(), is_drawn.mean()
    for kind, rows in every.groupby("feature_type"):
        own = tried[rows.sort_values("measured", ascending=False, key=abs).node_id]
        if kind == "write":
            yield LARGEST_WRITE, own.iloc[0], own.mean()
        yield f"five largest measured: {kind}", own[:5].mean(), own.mean()


def of_language_model(name: str, prompts: int) -> dict[str, Any]:
    """What is drawn and measured by default, agreement, and costs of one language model."""
    model = HookedRecurrent.from_pretrained(name, device="cpu")
    ids = model.to_tokens(embedded.text("test"), prepend_bos=False, truncate=False)
    deleted, replaced, rates = [], [], []
    for tokens in drawn(ids, prompts, int(prompts * LONG[name])):
        graph = attribute(tokens, model, measure=50)  # as by default of longer texts
        every = attribute(tokens, model, measure=10**6, targets=0).nodes
        rates += of_prompt(graph, every)
        deleted.append((every, graph.edges))
    for text, word, other in PAIRS:
        filled, corrupt = (text.format(term.strip()) for term in (word, other))
        graph = attribute(filled, model, [word], against=other, corrupt=corrupt)
        replaced.append((graph.nodes, graph.edges))
    by_rate = pd.DataFrame(rates, columns=["what", "rate", "random"]).groupby("what", sort=False)
    figures: dict[str, Any] = {"prompts": by_rate.mean().to_dict("index")}
    for way, tables in (("deleted", deleted), ("replaced", replaced)):
        nodes, edges = map(pd.concat, zip(*tables))
        edges = edges[~edges.source.str.startswith("stream")]
        heads = np.where(edges.target.str.contains("A"), " of softmax heads,", "")
        both = pd.concat([nodes, edges]).assign(kind=[*nodes.feature_type, *(edges.port + heads + " edges")])
        by_kind = both.dropna(subset=["predicted", "measured"]).groupby("kind", sort=False)
        figures[way] = {kind: fit(rows) for kind, rows in by_kind if len(rows) > 2}
    return figures | costs(model, ids[:, 700:828])


def costs(model: HookedRecurrent, tokens: torch.Tensor) -> dict[str, float]:
    """Of a text, in forward passes: nodes, one measurement, and seconds of a graph of 15 tokens."""

    def metric(logits: torch.Tensor) -> torch.Tensor:
        return logits[0, -1, 5] - logits[0, -1].mean()

    def clock(work: Any) -> float:
        best = []
        for _ in range(5):
            start = time.process_time()
            work()
            best.append(time.process_time() - start)
        return min(best)

    with torch.no_grad():
        forward = clock(lambda: model(tokens))
    graph = attribute(tokens, model, [5])
    session = model.edit_session(tokens)
    writes = graph.nodes[(graph.nodes.feature_type == "write") & graph.nodes.measured.notna()]
    edits = [WriteEdit(*place, mode="delete") for place in writes[["layer", "head", "position"]].to_numpy().tolist()]
    return {
        "nodes, forwards": clock(lambda: write_attribution(model, tokens, metric)) / forward,
        "a measured write, forwards": clock(lambda: session.run(edits)) / forward / len(edits),
        "graph of 15 tokens, seconds": clock(lambda: attribute(tokens[:, :15], model, [5])),
    }


def of_zoo(name: str, sequences: int) -> dict[str, float]:
    """What graphs of one model find of its truth table: mean rates."""
    model = HookedRecurrent.from_pretrained(name, device="cpu")
    batch = zoo.task(name).batch(sequences, torch.Generator().manual_seed(11), **SIZES.get(name, {"pairs": 8}))
    rates: dict[str, list[float]] = {}
    for row in range(sequences):
        for what, rate in of_question(model, name, batch, row):
            rates.setdefault(what, []).append(float(rate))
    return {what: statistics.mean(values) for what, values in rates.items()}


def of_question(model: HookedRecurrent, name: str, batch: Any, row: int) -> Iterator[tuple[str, float]]:
    """Rates of one question."""
    holder = next(holder for holder in zoo.truth(name).holders if holder.holds == "values")
    asked = int(batch.symbols["asked"][row, 0])
    value = int(batch.places["values"][row, asked])
    tokens = batch.tokens[row : row + 1, : int(batch.positions[row, 0]) + 1]
    graph = attribute(tokens, model, [int(batch.answers[row, 0])], frozen=True, measure=24, targets=4)
    truth = [f"L{holder.layer}H{head}@{value + holder.offset}" for head in holder.heads]
    writes = graph.nodes[graph.nodes.feature_type == "write"]
    first = writes.loc[writes.predicted.abs().nlargest(len(truth)).index].node_id
    yield "holder", float(first.isin(truth).mean())


def measure(prompts: int = 100, sequences: int = 6, models: tuple[str, ...] = tuple(LONG)) -> dict[str, Any]:
    """Language models, then the zoo."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        known = [name for name in zoo.names() if zoo.truth(name).holders]
        return {
            "prompts": prompts,
            "models": {name: of_language_model(name, prompts) for name in models},
            "zoo": {name: of_zoo(name, sequences) for name in known},
        }


AGREEMENT = {"deleted": {"write": 0.95}, "replaced": {"write": 0.99, **dict.fromkeys(EDGES, 0.95)}}
"""The least r of predicted and measured effects, of nodes that are deleted or replaced by those of another text."""
COSTS = {"nodes, forwards": 6.0, "a measured write, forwards": 0.2, "graph of 15 tokens, seconds": 3.0}


def lines(figures: dict[str, Any]) -> list[Line]:
    """Which nodes are drawn and measured, how well effects are predicted, and costs; and the zoo."""
    page_lines: list[Line] = []
    for name, row in figures["models"].items():
        for what, rates in row["prompts"].items():
            page_lines.append(Line(what, rates["rate"], "", GOALS.get(what, 0.95), least=True, column=name))
        for way, goals in AGREEMENT.items():
            page_lines += [
                Line(f"r of {way}: {kind}", row[way][kind]["r"], "", goal, least=True, column=name)
                for kind, goal in goals.items()
            ]
        page_lines += [Line(what, row[what], goal=goal, column=name) for what, goal in COSTS.items()]
    holders = statistics.mean(row["holder"] for row in figures["zoo"].values())
    return [*page_lines, Line("writes of the truth table that come first", holders, "", 0.9, True, "zoo")]


if __name__ == "__main__":
    frame.main(sys.modules[__name__])
