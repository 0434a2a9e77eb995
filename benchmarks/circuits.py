"""Circuits: how far predicted effects agree with measured ones, what graphs find in models whose circuit is known, and
what they cost, in forward passes."""

from __future__ import annotations

import statistics
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "tools"))

import frame
import numpy as np
import pandas as pd
import torch
from frame import Line
from tables import table

from hookpoints import Graph, HookedRecurrent, WriteEdit, attribute, embedded, write_attribution, zoo

TITLE = "Circuits"
QUICK = {"passages": 1, "sequences": 1, "length": 16}
MODELS = ("embedded", "embedded-rwkv7", "embedded-mamba2")
PAIRS = (
    ("The Secretary of the {} will report. The report of the Secretary of the", " Treasury", " Navy"),
    ("The President of the {} will report. The report of the President of the", " Senate", " House"),
    ("The people of {} and the government of", " Mexico", " Spain"),
)
"""A text, the word in it, and that of the corrupt text; the word is what the model is to say."""
SIZES = {"composition": {"pairs": 5}, "induction": {"words": 10}, "facts": {"pairs": 4}}


def fit(rows: pd.DataFrame) -> dict[str, float]:
    """Correlation and slope of measured effects by predicted ones."""
    rows = rows[rows.measured.notna() & rows.predicted.notna()]
    slope = np.polyfit(rows.predicted, rows.measured, 1)[0] if len(rows) > 2 else np.nan
    return {"n": len(rows), "r": float(rows.predicted.corr(rows.measured)), "slope": float(slope)}


def ten_in_twenty(graph: Graph) -> float:
    """Share of the ten writes with the largest measured effect that are among the first twenty predicted."""
    writes = graph.nodes[graph.nodes.feature_type == "write"]
    first = writes.predicted.abs().nlargest(20).index
    return float(writes.measured.abs().nlargest(10).index.isin(first).mean())


def of_language_model(name: str, passages: int, length: int) -> dict[str, Any]:
    """Agreement and costs of one language model."""
    model = HookedRecurrent.from_pretrained(name, device="cpu")
    deleted = []
    replaced = []
    for text, word, other in PAIRS:
        filled, corrupt = (text.format(said.strip()) for said in (word, other))
        deleted.append(attribute(filled, model, [word], against=other))
        replaced.append(attribute(filled, model, [word], against=other, corrupt=corrupt))
    ids = model.to_tokens(embedded.text("test")[:60000], prepend_bos=False, truncate=False)[0]
    for start in range(700, 700 + 1500 * passages, 1500):
        deleted.append(attribute(ids[None, start : start + length], model))
    found: dict[str, Any] = {"graphs": len(deleted)}
    for way, graphs in (("deleted", deleted), ("replaced", replaced)):
        nodes = pd.concat([graph.nodes for graph in graphs])
        edges = pd.concat([graph.edges for graph in graphs])
        edges = edges[~edges.source.str.startswith("stream")].copy()
        edges.loc[edges.target.str.contains("A"), "port"] += " of softmax heads,"
        kinds = {kind: fit(rows) for kind, rows in nodes.groupby("feature_type")}
        found[way] = kinds | {f"{port} edges": fit(rows) for port, rows in edges.groupby("port")}
    found["ten in twenty"] = statistics.mean(map(ten_in_twenty, deleted))
    errors: Any = [graph.metadata["completeness"] for graph in deleted]
    found["completeness"] = max(abs(error) for by_port in errors for error in by_port.values())
    return found | costs(model, ids[None, :128])


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
    write = f"L{model.cfg.recurrent_layers[-1]}H0@{tokens.shape[1] - 8}"
    count = int(graph.why(write).measured.notna().sum())
    session = model.edit_session(tokens)
    writes = graph.nodes[(graph.nodes.feature_type == "write") & graph.nodes.measured.notna()]
    edits = [WriteEdit(*place, mode="delete") for place in writes[["layer", "head", "position"]].to_numpy().tolist()]
    return {
        "nodes, forwards": clock(lambda: write_attribution(model, tokens, metric)) / forward,
        "a measured write, forwards": clock(lambda: session.run(edits)) / forward / len(edits),
        "a measured edge, forwards": clock(lambda: graph.why(write)) / forward / count,
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
    places = {port: int(batch.places[f"{port}s"][row, asked]) for port in ("value", "key")}
    tokens = batch.tokens[row : row + 1, : int(batch.positions[row, 0]) + 1]
    graph = attribute(tokens, model, [int(batch.answers[row, 0])], frozen=True, measure=24, targets=4)
    truth = [f"L{holder.layer}H{head}@{places['value'] + holder.offset}" for head in holder.heads]
    writes = graph.nodes[graph.nodes.feature_type == "write"]
    first = writes.loc[writes.predicted.abs().nlargest(len(truth)).index].node_id
    yield "holder", float(first.isin(truth).mean())
    sources = {port: f"stream@{token}" for port, token in places.items()}
    if name == "induction":  # the key of the second layer's write comes from the first layer's
        sources["key"] = f"L0H0@{places['value'] - 1}"
    edges = graph.edges[graph.edges.target.isin(truth) & graph.edges.measured.notna()]
    for port, source in sources.items():
        kind = edges[(edges.port == port) & (edges.source.str.startswith("stream") == source.startswith("stream"))]
        for _, rows in kind.groupby("target"):
            order = rows.sort_values("measured", ascending=False)
            yield f"{port}: its source", order.source.iloc[0] == source
    yield "r", graph.check().r
    yield "8 writes keep the answer", bool(graph.sufficient(8).same_answer[0])


def measure(passages: int = 11, sequences: int = 6, length: int = 32) -> dict[str, Any]:
    """Language models, then the zoo."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        models = {name: of_language_model(name, passages, length) for name in MODELS}
        known = [name for name in zoo.names() if zoo.truth(name).holders]
        return {"models": models, "zoo": {name: of_zoo(name, sequences) for name in known}}


def lines(found: dict[str, Any]) -> list[Line]:
    """The goals."""
    said = []
    for name, row in found["models"].items():
        said += [
            Line(f"{name}: r of deleted writes", row["deleted"]["write"]["r"], goal=0.95, least=True),
            Line(f"{name}: r of replaced writes", row["replaced"]["write"]["r"], goal=0.99, least=True),
            Line(f"{name}: ten largest within the first twenty", row["ten in twenty"], goal=0.98, least=True),
            Line(f"{name}: nodes", row["nodes, forwards"], " forwards", goal=6.0),
            Line(f"{name}: a measured write", row["a measured write, forwards"], " forwards", goal=0.2),
            Line(f"{name}: a measured edge", row["a measured edge, forwards"], " forwards", goal=0.2),
            Line(f"{name}: a graph of 15 tokens", row["graph of 15 tokens, seconds"], " s", goal=3.0),
        ]
        for port in ("key", "value", "query"):
            r = row["replaced"][f"{port} edges"]["r"]
            said.append(Line(f"{name}: r of {port} edges, replaced", r, goal=0.95, least=True))
    for name, row in found["zoo"].items():
        said.append(Line(f"{name}: holders found", row["holder"], goal=0.9, least=True))
    return said


def text(found: dict[str, Any]) -> str:
    """Tables by kind of node and edge, and of the zoo."""
    parts = []
    for way, what in (("deleted", "Deleted"), ("replaced", "Replaced by the corrupt text's")):
        columns = found["models"]
        kinds = list(dict.fromkeys(kind for row in columns.values() for kind in row[way]))
        rows = []
        for kind in kinds:
            cells = [columns[name][way].get(kind) for name in columns]
            said = ["–" if not cell or cell["n"] < 3 else f"{cell['r']:.3f} ({cell['slope']:.2f})" for cell in cells]
            rows.append([kind, *said])
        parts.append(table((f"{what}: r (slope) of", *columns), rows))
    names = list(dict.fromkeys(what for row in found["zoo"].values() for what in row))
    rows = []
    for name, row in found["zoo"].items():
        rows.append([name, *(f"{row[what]:.2f}" if what in row else "–" for what in names)])
    parts.append(table(("zoo", *names), rows))
    return "\n".join([*parts, "[What graphs are, and their limits](circuits.md)."])


if __name__ == "__main__":
    frame.main(sys.modules[__name__])
