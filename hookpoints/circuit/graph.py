"""An attribution graph as a value: nodes, edges, and how far to believe them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, Protocol, cast

import numpy as np
import pandas as pd

from hookpoints.circuit.draw import svg
from hookpoints.circuit.tables import EDGE_COLUMNS, NODE_COLUMNS, Node, by_size
from hookpoints.errors import InputError, PredictionWarning
from hookpoints.files import atomic_text, read_sealed_json, sealed_json, versions

SCHEMA = 2
"""Version of the format of `Graph.save`."""
_LEAST = 0.03
"""Share of the largest edge from which on an edge makes a graph grow."""
MAX_BYTES = 200_000_000
"""Largest file that `Graph.load` reads."""


class Check(NamedTuple):
    """How far predictions carry, and whether parts add up."""

    n: int
    """Writes that were deleted (or replaced) one by one."""
    r: float
    """Pearson's correlation of their predicted and measured effects."""
    slope: float
    """Of measured by predicted, by least squares: 1 where predictions are right."""
    edges_r: float
    """The correlation over edges into keys, values and queries; NaN for fewer than three."""
    covered: float
    """Share of the predicted |effect| of all writes that was measured."""
    completeness: float
    """Largest difference between a logit difference, or a port, and the sum of its parts, in units of the metric."""

    def __str__(self) -> str:
        nodes = f"{self.n} writes measured: r {self.r:.3f}, slope {self.slope:.2f}; edges r {self.edges_r:.2f}"
        return f"{nodes}; {self.covered:.0%} of |effect| measured; parts add up to {self.completeness:.0e}"


class Sufficiency(NamedTuple):
    """What is left of a metric without all writes but some."""

    n: int
    kept: float
    """Share of what all writes together do to the metric: 1 as the model, 0 as without any write. Near 0 in the
    denominator (writes that do nothing together) it is NaN."""
    same_answer: bool
    """Whether the most likely next token is the target still."""
    metric: float
    """With these writes alone."""


class Tracer(Protocol):
    """What answers questions about the model that a graph is of."""

    def why(self, layer: int, head: int, read: int, source: int) -> pd.DataFrame: ...

    def sufficient(self, keep: Sequence[Node]) -> tuple[float, float, bool]:
        """The metric with these writes alone, and without any; whether the answer is the target."""
        ...


@dataclass(frozen=True, eq=False)
class Graph:
    """Why a model said something: which nodes made a metric, and what made those.

    ``nodes`` has a row for each embedding, write, softmax head and MLP, for each state that a dictionary takes apart,
    and for each part of such a write or state: ``predicted`` is what deleting it would take off the metric by
    gradients, ``measured`` what deleting it took off in its own run (NaN: not measured). With a corrupt text a node is
    replaced by that of the corrupt text instead. ``edges`` has for each measured node what its ports are made of;
    ``port`` is "value", "key", "query" or "gate" of a write or softmax head, "part" of a write or a state that a
    dictionary takes apart, or "direct" of the logit, ``read`` the token whose query it is (-1: none). A source
    "stream@t" is all that the residual stream holds at t, so that its effect is that of all sources there together.
    """

    nodes: pd.DataFrame
    """Columns node_id, feature_type, layer, head, position, feature (the number of an atom), predicted, measured."""
    edges: pd.DataFrame
    """Columns source, target (node ids), port, read, predicted, measured."""
    metadata: Mapping[str, object]
    """model, tokens (texts), targets and against (texts), metric (its value), corrupt (texts or None), frozen,
    completeness (by port), labels (words of atoms, by node id)."""
    tracer: Tracer | None = None
    """None of a graph that was loaded: it has no model."""

    # ------------------------------------------------------------------------------------ how far to believe it

    def check(self) -> Check:
        """Compare predictions with measurements, and parts with their sums.

        Warns (`PredictionWarning`) where r is below 0.9: then believe ``measured`` alone, and measure more.

        Raises:
            InputError: fewer than three writes were measured.
        """
        writes = self.nodes[self.nodes.feature_type == "write"]
        tried = writes[writes.measured.notna()]
        if len(tried) < 3:
            raise InputError(
                f"graph: expected at least 3 measured writes to compare, got {len(tried)}; attribute with measure=50"
            )
        r, slope = _correlation_and_slope(tried)
        inner = self.edges[(self.edges.target != "logit") & (self.edges.port != "part") & self.edges.predicted.notna()]
        size = writes.predicted.abs().sum()
        completeness = cast(Mapping[str, float], self.metadata["completeness"])
        covered = float(tried.predicted.abs().sum() / size) if size else 0.0
        edges_r, _ = _correlation_and_slope(inner[inner.measured.notna()])
        if not r >= 0.9:
            warnings.warn(
                f"predicted and measured effects of {len(tried)} writes have a correlation of {r:.2f}: believe "
                "measured numbers alone. A corrupt text (corrupt=) predicts best; frozen=True is for saturated answers",
                PredictionWarning,
                stacklevel=2,
            )
        return Check(len(tried), r, slope, edges_r, covered, max(map(abs, completeness.values()), default=0.0))

    def sufficient(self, n: int) -> Sufficiency:
        """Keep the n writes that help most, take all other writes out in one run, and look what is left.

        Cost: two passes.
        """
        writes = self.nodes[self.nodes.feature_type == "write"]
        if not 1 <= n <= len(writes):
            raise InputError(f"n: expected 1 to {len(writes)} writes, got {n}")
        best = writes.assign(effect=writes.measured.fillna(-np.inf)).nlargest(n, ["effect", "predicted"])
        keep = [Node("write", *row) for row in best[["layer", "head", "position"]].to_numpy().tolist()]
        alone, without, same = self._own_tracer().sufficient(keep)
        whole = cast(float, self.metadata["metric"])
        effect = whole - without
        kept = (alone - without) / effect if abs(effect) > 1e-9 else float("nan")
        return Sufficiency(n, kept, same, alone)

    def why(self, layer: int, head: int, read: int, source: int) -> pd.DataFrame:
        """Why head ``head`` of ``layer`` reads at token ``read`` what it wrote at token ``source``: the sources of the
        write's key, value and gate, and of the query there, with what each does to the metric.

        Returns: rows of `edges`, largest first in each port.
        """
        return self._own_tracer().why(layer, head, read, source)

    def _own_tracer(self) -> Tracer:
        if self.tracer is None:
            raise InputError("graph: expected one that attribute made, got a loaded one, which has no model; call it")
        return self.tracer

    # ------------------------------------------------------------------------------------ parts and files

    def prune(self, nodes: int = 12) -> Graph:
        """The graph that grows backward from the logit: ``nodes`` times the source of the largest measured edge into
        what it has joins it, as long as that is 3% of the largest. So each node has a path to the logit. The parts of a
        write or a state come with it; edges are those among nodes, and from streams, biases and the rest."""
        is_part = self.edges.port == "part"
        is_node = self.edges.source.isin(self.nodes.node_id)
        size = self.edges.measured.abs()[is_node & ~is_part]
        tried = self.edges.loc[by_size(size[size >= _LEAST * size.max()])]
        joined = ["logit"]
        for _ in range(nodes):
            near = tried[tried.target.isin(joined) & ~tried.source.isin(joined)]
            joined += near.source[:1].tolist()
        into = self.edges.target.isin(joined)
        named = {*joined, *self.edges.source[into & is_part]}
        edges = self.edges[into & (self.edges.source.isin(named) | ~is_node)]
        return replace(self, nodes=self.nodes[self.nodes.node_id.isin(named)], edges=edges)

    def save(self, path: str | Path) -> Path:
        """Write JSON with its SHA-256, whole or not at all."""
        content = {
            "schema": SCHEMA,
            "versions": versions(),
            "metadata": dict(self.metadata),
            "nodes": _json_rows(self.nodes),
            "edges": _json_rows(self.edges),
        }
        return atomic_text(Path(path), sealed_json(content))

    @classmethod
    def load(cls, path: str | Path) -> Graph:
        """Read what `save` wrote. The graph has no model: `why` and `sufficient` need one from `attribute`.

        Raises:
            ValueError: the file is no graph, damaged, edited, of another version or larger than 200 MB; names it.
        """
        file = Path(path)
        if (size := file.stat().st_size) > MAX_BYTES:
            raise ValueError(f"{file}: expected at most {MAX_BYTES:,} bytes, got {size:,}; prune the graph")
        content = read_sealed_json(file)
        if content.get("schema") != SCHEMA or not isinstance(content.get("metadata"), dict):
            raise ValueError(
                f"{file}: expected a graph of schema {SCHEMA}, got schema {content.get('schema')!r}; attribute again"
            )
        nodes = _checked_table(file, content.get("nodes"), NODE_COLUMNS)
        edges = _checked_table(file, content.get("edges"), EDGE_COLUMNS)
        return cls(nodes, edges, cast("dict[str, object]", content["metadata"]))

    def draw(self, nodes: int = 12, width: int = 960) -> str:
        """One SVG without network: tokens below, blocks upward. Blue helps, red hurts; a line is as thick as the
        measured effect, dotted into a key, dashed into a query or gate, solid into a value. It follows the viewer's
        light or dark theme."""
        pruned = self.prune(nodes)
        return svg(pruned.nodes, pruned.edges, self.metadata, width)

    def _repr_svg_(self) -> str:
        return self.draw()


def _correlation_and_slope(table: pd.DataFrame) -> tuple[float, float]:
    """Correlation and slope of measured by predicted effects; NaN where there are fewer than three."""
    predicted = table.predicted
    if len(table) < 3 or predicted.std() == 0:
        return float("nan"), float("nan")
    slope, _ = np.polyfit(predicted, table.measured, 1)
    return float(predicted.corr(table.measured)), float(slope)


def _json_rows(table: pd.DataFrame) -> list[dict[str, object]]:
    """Rows for JSON: NaN is null."""
    known = table.astype(object).where(table.notna(), None)
    return cast("list[dict[str, object]]", known.to_dict("records"))


def _checked_table(file: Path, rows: object, columns: Mapping[str, str]) -> pd.DataFrame:
    """A table of a file of strangers, with the columns that it must have."""
    if not isinstance(rows, list) or any(not isinstance(row, dict) or row.keys() != columns.keys() for row in rows):
        raise ValueError(f"{file}: expected rows with {', '.join(columns)}; the file is damaged or of something else")
    try:
        return pd.DataFrame(rows, columns=list(columns)).astype(dict(columns))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: expected numbers and texts in {', '.join(columns)}: {error}") from error
