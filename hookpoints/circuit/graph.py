"""An attribution graph as a value: nodes, edges, and how far to believe them."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np
import pandas as pd

from hookpoints.circuit.draw import svg
from hookpoints.circuit.tables import EDGE_COLUMNS, NODE_COLUMNS, RunAnswer, by_size, random_orders
from hookpoints.errors import InputError, PredictionWarning
from hookpoints.files import atomic_text, read_sealed_json, sealed_json, versions
from hookpoints.refused import Explaining

if TYPE_CHECKING:
    from hookpoints.circuit.tracing import Tracing
    from hookpoints.hooks.guard import Hook, Name

_DECISIVE = 8
"""Writes without which another answer makes a graph decisive."""
DRAWS = 30
"""Random sets of writes that a set is compared with."""
_ANSWER = ["metric", "answer", "same_answer"]
"""Columns of an `RunAnswer`."""
SCHEMA = 3
"""Version of the format of `Graph.save`."""
_LEAST = 0.03
"""Share of the largest edge from which on an edge makes a graph grow."""


class Check(NamedTuple):
    """What is exact in a graph, and how far predictions carry."""

    n: int
    """Writes that were deleted (or replaced) one by one."""
    writes: int
    """All writes."""
    largest: float
    """The largest |effect| that was measured."""
    drawn: int
    """Writes among these that no prediction chose, drawn at random; 0 where none is left."""
    largest_drawn: float
    """The largest |effect| of those that were drawn; 0 where none is left. It is no bound of the others: with 20 drawn,
    up to 14% of the others exceed it (at a confidence of 95%), and the largest of all nearly always does."""
    r: float
    """Pearson's correlation of predicted and measured effects of writes."""
    decisive: bool | None = None
    """Whether these writes decide the answer that was asked about: the model says what is explained; without the eight
    writes of the largest |effect| it says another token, and where `against` was named prefers that; without each of 30
    random eights of the others it says the same. Untrained models do not. None: the graph was loaded."""

    def __str__(self) -> str:
        decides = "; without the largest 8 it says another token" if self.decisive else ""
        audit = f", the largest of {self.drawn} drawn at random {self.largest_drawn:.2g}" if self.drawn else ""
        exact = f"{self.n} of {self.writes} writes measured, the largest {self.largest:.2g}{audit}{decides}"
        return f"exact: {exact}\npredicted: r {self.r:.3f}"


@dataclass(frozen=True, eq=False)
class Graph(Explaining):
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
    """model, tokens (texts), targets and against (texts), metric (its value), corrupt (texts or None), frozen."""
    tracer: Tracing | None = None
    """None of a graph that was loaded: it has no model."""

    # ------------------------------------------------------------------------------------ how far to believe it

    def check(self) -> Check:
        """What was measured, what random writes that no prediction chose did, and how far predictions agree.

        Warns (`PredictionWarning`) where r is below 0.9 and writes are left unmeasured: then measure more.

        Raises:
            InputError: fewer than three writes were measured.

        Cost: 32 passes; none of a loaded graph.
        """
        writes = self.nodes[self.nodes.feature_type == "write"]
        tried = writes[writes.measured.notna()]
        if len(tried) < 3:
            raise InputError(
                f"graph: expected at least 3 measured writes to compare, got {len(tried)}; attribute with measure=50"
            )
        # Writes drawn at random say what the ranking may have missed; the correlation, how well it ranks.
        audit = cast(Mapping[str, float], self.metadata["audit"])
        r = float(tried.predicted.corr(tried.measured))
        if not r >= 0.9 and len(tried) < len(writes):
            warnings.warn(
                f"predicted and measured effects of {len(tried)} writes have a correlation of {r:.2f}, and "
                f"{len(writes) - len(tried)} are not measured: measure more. A corrupt text (corrupt=) predicts best; "
                "frozen=True is for saturated answers",
                PredictionWarning,
                stacklevel=2,
            )
        return Check(
            n=len(tried),
            writes=len(writes),
            largest=tried.measured.abs().max(),
            drawn=int(audit["n"]),
            largest_drawn=audit["largest"],
            r=r,
            decisive=None if self.tracer is None else self._is_decisive(),
        )

    def _is_decisive(self) -> bool:
        order, *orders = self._ordered_writes(DRAWS)
        best = order[:_DECISIVE]
        random_sets = [writes.drop(best.index)[:_DECISIVE] for writes in orders]
        without, *random = self.own_tracer().answers([best, *random_sets])
        is_said = self.metadata["answer"] in cast(Sequence[str], self.metadata["targets"])
        # Another token alone may be a near tie of two that nobody asked about.
        is_lost = not without.same and (without.metric < 0 or not self.metadata["against"])
        return is_said and is_lost and all(answer.same for answer in random)

    def without(self, nodes: Collection[str]) -> RunAnswer:
        """The answer of a run without some nodes, all at once: with a corrupt text they are those of that text.

        Args:
            nodes: ids of writes, softmax heads, MLPs and embeddings.
        """
        return self.own_tracer().answers([self._taken_out(nodes, kept=False)])[0]

    def keep(self, nodes: Collection[str]) -> RunAnswer:
        """The answer of a run with some nodes, and without all others of the kinds that are among them: writes alone
        leave all heads, MLPs and embeddings as they are. ``nodes`` as of `without`."""
        return self.own_tracer().answers([self._taken_out(nodes, kept=True)])[0]

    def hooks(self, nodes: Collection[str], kept: bool = False) -> list[tuple[Name, Hook]]:
        """What does the same as `without`, or with ``kept`` as `keep`, in any pass over this text: in `run_with_hooks`,
        and within `hooks` also in `generate`, whose later tokens start from the memory without these nodes.

        Raises:
            InputError: as of `without`.
        """
        return self.own_tracer().hooks_without(self._taken_out(nodes, kept))

    def sufficient(self, sizes: int | Sequence[int] = (1, 2, 4, 8, 16, 32), draws: int = DRAWS) -> pd.DataFrame:
        """What few writes do alone: all but the n with the largest |effect| are ablated in one run. So it is done for
        random sets of as many writes.

        Args:
            sizes: numbers of writes; those that the text does not have are left out.
            draws: random sets of each size.

        Returns: a row for each size: ``n``, ``kept`` (share of what all writes together do to the metric: 1 as the
        model, 0 as without any write; NaN where all together do nothing), ``random`` and ``random_high`` (the median
        and the largest share of the ``draws`` random sets; more sets would reach more), ``metric``, ``answer`` (the
        most likely next token) and ``same_answer`` (whether the model says that, too).

        Raises:
            InputError: there is no such size.

        Warns (`PredictionWarning`) where a share is outside 0 to 1.5 without a corrupt text.

        Cost: one pass and ``draws`` for each size, and one; several sets run in a pass.
        """
        orders = self._ordered_writes(draws)
        requested = [sizes] if isinstance(sizes, int) else list(sizes)
        possible = [n for n in requested if 1 <= n <= len(orders[0])]
        if not possible:
            raise InputError(f"sizes: expected some of 1 to {len(orders[0])} writes, got {requested}")
        shares, answers = self.shares_without([writes[n:] for n in possible for writes in orders])
        kept, *random = np.reshape(shares, (-1, len(orders))).T
        curve = {"n": possible, "kept": kept, "random": np.median(random, 0), "random_high": np.max(random, 0)}
        table = pd.DataFrame(curve).join(pd.DataFrame(answers[:: len(orders)]).set_axis(_ANSWER, axis=1))
        low, high = kept.min(), kept.max()
        if self.metadata["corrupt"] is None and (low < 0 or high > 1.5):
            warnings.warn(
                f"sufficient: expected shares of 0 to 1.5, got {low:.1f} to {high:.1f}: a model without most writes "
                "reads what it never saw. Give attribute a corrupt text (corrupt=), whose writes replace these",
                PredictionWarning,
                stacklevel=2,
            )
        return table

    def shares_without(self, sets: Sequence[pd.DataFrame]) -> tuple[list[float], list[RunAnswer]]:
        """Of runs each without the writes of one table: the share of what all writes do to the metric that is left, and
        the answers. NaN where all together do nothing."""
        writes = self.nodes[self.nodes.feature_type == "write"]
        none, *answers = self.own_tracer().answers([writes, *sets])
        effect = cast(float, self.metadata["metric"]) - none.metric
        known = effect if abs(effect) > 1e-9 else np.nan
        return [(answer.metric - none.metric) / known for answer in answers], answers

    def _ordered_writes(self, draws: int) -> list[pd.DataFrame]:
        """All writes, first by |effect|, then in random orders."""
        table = self.own_tracer().nodes
        writes = table[table.feature_type == "write"]
        order = by_size(writes.measured.fillna(writes.predicted))
        return [writes.loc[order], *random_orders(writes, draws)]

    def _taken_out(self, ids: Collection[str], kept: bool) -> pd.DataFrame:
        """The tracer's nodes that have one of ``ids``; or those of the same kinds that have none."""
        table = self.own_tracer().nodes
        unknown = sorted({*ids} - {*table.node_id})
        if unknown or not len(ids):
            raise InputError(
                "nodes: expected ids of writes, softmax heads, MLPs or embeddings, as in graph.nodes.node_id, "
                f"got {', '.join(unknown) or 'none'}"
            )
        named = table.node_id.isin(ids)
        return table[~named & table.feature_type.isin(table[named].feature_type) if kept else named]

    def why(self, node: str, read: int | None = None) -> pd.DataFrame:
        """What made a node: the sources of the key, value and gate of a write and of the query that reads it, of the
        keys, values, query and gate of a softmax head, or of the input of an MLP, with what each does to the metric.

        Args:
            node: its id, such as "L4H0@5", "L0A1@13" or "MLP2@13".
            read: of a write, the token that reads it; None: that through which it matters most.

        Returns: rows of `edges`, largest first in each port.

        Raises:
            InputError: there is no such write, softmax head or MLP; or ``read`` is no token from the write on.
        """
        return self.own_tracer().why(node, read)

    def own_tracer(self) -> Tracing:
        """What answers questions about the model.

        Raises:
            InputError: the graph was loaded.
        """
        if self.tracer is None:
            raise InputError("graph: expected one that attribute made, got a loaded one, which has no model; call it")
        return self.tracer

    # ------------------------------------------------------------------------------------ parts and files

    def prune(self, nodes: int = 12) -> Graph:
        """The graph that grows backward from the logit: ``nodes`` times the source of the largest measured edge into
        what it has joins it, as long as that is 3% of the largest. So each node has a path to the logit. The parts of a
        write or a state come with it; edges are those among nodes, and from streams."""
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
            ValueError: the file is no graph, damaged, edited or of another version; names it.
        """
        file = Path(path)
        content = read_sealed_json(file)
        if content.get("schema") != SCHEMA or not isinstance(content.get("metadata"), dict):
            raise ValueError(
                f"{file}: expected a graph of schema {SCHEMA}, got schema {content.get('schema')!r}; attribute again"
            )
        nodes = _checked_table(file, content.get("nodes"), NODE_COLUMNS)
        edges = _checked_table(file, content.get("edges"), EDGE_COLUMNS)
        return cls(nodes, edges, cast("dict[str, object]", content["metadata"]))

    def draw(self, nodes: int = 12, width: int = 720) -> str:
        """One SVG without network: tokens below, blocks upward. Blue helps, red hurts; a line is
        as thick as the measured effect, dotted into a key, dashed into a query or gate, otherwise solid. It follows the
        viewer's light or dark theme.

        Args:
            nodes: how many, as of `prune`; parts of writes and states come on top.
            width: of the picture, in pixels. It shrinks with its page, and so do its letters, which have 11 pixels.
        """
        pruned = self.prune(nodes)
        return svg(pruned.nodes, pruned.edges, self.metadata, width)

    def _repr_svg_(self) -> str:
        return self.draw()


def _json_rows(table: pd.DataFrame) -> list[dict[str, object]]:
    """Rows for JSON: NaN is null."""
    known = table.astype(object).where(table.notna(), None)
    return cast("list[dict[str, object]]", known.to_dict("records"))


def _checked_table(file: Path, rows: object, columns: Mapping[str, str]) -> pd.DataFrame:
    """A table of a file of strangers, with the columns that it must have."""
    try:
        return pd.DataFrame.from_records(cast("list[dict[str, object]]", rows))[list(columns)].astype(dict(columns))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: expected rows of numbers and texts in {', '.join(columns)}: {error!r}") from error
