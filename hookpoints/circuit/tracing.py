"""One text, followed back from a metric: nodes predicted and measured, and the edges into their ports."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, groupby
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from hookpoints.circuit.measure import Measure, Wanted
from hookpoints.circuit.nodes import (
    Gradients,
    ThroughNorm,
    Writes,
    keeps_last,
    logits_of,
    predict_writes,
    read_gradients,
    record,
)
from hookpoints.circuit.norms import constants
from hookpoints.circuit.ports import (
    Blocks,
    Maps,
    NodeSources,
    Port,
    change_for,
    port_of_mlp,
    ports_of,
    ports_of_head,
    reach_of,
)
from hookpoints.circuit.stream import Decomposition, Part, Text, moved, reading, stretches_of
from hookpoints.circuit.tables import (
    EDGE_COLUMNS,
    Change,
    FeatureType,
    Node,
    RunAnswer,
    by_size,
    edge_table,
    largest,
    node_of,
    nodes_of_block,
)
from hookpoints.edits.session import EditSession
from hookpoints.errors import InputError
from hookpoints.scopes import own_gradients

if TYPE_CHECKING:
    from hookpoints.model.recurrent import HookedRecurrent

_LISTED = 16
"""Sources of a port that are listed."""
_DIRECT = 96
"""Measured nodes whose direct edges are looked at."""
_MEASURED = 4
"""Of those, how many are measured."""
_AUDITED = 20
"""Writes that are drawn at random, of those that predictions leave out."""
_PORTS = 2**14
"""Tokens of gradients at once, one of each text for a port."""
_STREAMS = 8
"""Last tokens of a window whose whole stream is a source, too."""


@dataclass(eq=False)
class Tracing:
    """One text, its linear maps, its gradients and its runs."""

    model: HookedRecurrent
    wanted: Wanted
    sources: NodeSources
    gradients: Gradients
    """By what heads read and hand on."""
    writes: Writes
    nodes: pd.DataFrame
    """All of them, with predictions."""
    runs: Measure
    frozen: bool
    audit: Mapping[str, float] = field(default_factory=dict)
    """Of writes that were drawn from those that no prediction chose: how many, and their largest |effect|."""
    completeness: dict[str, float] = field(default_factory=dict)
    """Sum of the parts less the whole, by port."""

    @classmethod
    def of(
        cls, model: HookedRecurrent, tokens: Tensor, wanted: Wanted, corrupt: Tensor | None, frozen: bool
    ) -> Tracing:
        """Read the texts, and follow the metric back."""
        further = tuple(name for name in model.hook_dict if _kind_of_hook(model, name) is not None)
        gradients = read_gradients(model, tokens, wanted.metric, frozen, further, wanted.last)
        donors = {} if corrupt is None else record(model, corrupt)
        writes = predict_writes(model, tokens, gradients, donors)
        stretches = {stretch.added: stretch for stretch in stretches_of(model, writes.unknown)}
        with reading(model, stretches.values()) as values:
            session = EditSession(model, tokens, logits_to_keep=int(wanted.last and keeps_last(model)))
        place = session.tokens.device  # where the model lies on several, all that is computed here is there
        gradients, writes = tree_map_only(Tensor, lambda x: x.to(place), (gradients, writes))
        recurrences = {layer: moved(session.recurrence(layer), place) for layer in model.cfg.recurrent_layers}
        clean = Text(session.tokens, recurrences, values, stretches)
        other = None
        if corrupt is not None:
            with reading(model) as others:
                logits_of(model, corrupt, last=True)
            other = Text(corrupt.to(place), {layer: moved(r, place) for layer, r in donors.items()}, others, {})
        sources = NodeSources(Blocks(Decomposition(model, clean), reach_of(model, tokens)), other)
        predicted = pd.concat(_predicted_tables(sources, writes, gradients), ignore_index=True)
        return cls(model, wanted, sources, gradients, writes, predicted, Measure(session, wanted), frozen)

    @property
    def text(self) -> Text:
        return self.sources.text

    # ------------------------------------------------------------------------------------ nodes

    def measure_nodes(self, measure: int | None) -> None:
        """Fill the column ``measured`` of the largest nodes of each kind: ``measure`` writes, a fifth of the others;
        None: of all. Then of some of the other writes, drawn at random, of which `audit` is noted."""
        chosen: list[int] = []
        drawn = np.empty(0, int)
        for kind, rows in self.nodes.groupby("feature_type"):
            most = len(rows) if measure is None else measure if kind == "write" else max(1, measure // 5)
            order = by_size(rows.predicted)
            chosen.extend(order[:most])
            if kind == "write":
                drawn = np.random.default_rng(0).permutation(order[most:])[:_AUDITED]
        rows = [*chosen, *drawn]
        changes = self._changes_without([node_of(row) for row in self.nodes.loc[rows].itertuples()])
        self.nodes.loc[rows, "measured"] = self.runs.effects(changes)
        self.audit = {"n": len(drawn), "largest": max(self.nodes.measured[drawn].abs(), default=0.0)}

    def _changes_without(self, nodes: Sequence[Node]) -> list[Change]:
        """Runs each without a node, or with that of the corrupt text instead."""
        replacing: dict[Node, dict[str, Tensor]] = {}
        changes = []
        for node in nodes:
            alike = node._replace(position=-1)
            if alike not in replacing:
                replacing[alike] = self._replacing_values(alike)
            at = (node.position,) if node.head < 0 else (node.position, node.head)
            values = {name: value[at] for name, value in replacing[alike].items()}
            changes.append(Change(node.layer, node.position, values, node.head))
        return changes

    def _replacing_values(self, node: Node) -> dict[str, Tensor]:
        """[T,...] by the names of hooks, what replaces a node at its token and head."""
        block = f"blocks.{node.layer}"
        attention = "hook_attn_out" if node.head < 0 else "attn.hook_z"
        names: dict[FeatureType, list[str]] = {
            "embedding": ["hook_embed", "blocks.0.hook_resid_pre"],
            "mlp": [f"{block}.hook_mlp_out"],
            "attn": [f"{block}.{attention}"],
        }
        if node.feature_type == "write":
            return self.sources.other_writes(node.layer)
        return {name: self.sources.other(name) for name in names[node.feature_type]}

    # ------------------------------------------------------------------------------------ edges

    def direct(self) -> pd.DataFrame:
        """Edges into the logit: what each measured node gives on its direct path with the final norm's scale as it is,
        and what taking that off the last stream does."""
        n_layers = self.model.cfg.n_layers
        stream = self.text.at(f"blocks.{n_layers - 1}.hook_resid_post")[None]
        first = stream.shape[1] - 1 if self.wanted.last else 0
        read = stream[:, first:].clone().requires_grad_()
        with torch.enable_grad(), constants(["norms"]):
            value = self.wanted.metric(self._logits_of_stream(read)).reshape(())
        direction = torch.zeros_like(stream)
        (direction[:, first:],) = torch.autograd.grad(value, read)
        parts, left = self._on_host(*self._parts_below(["logit"], direction, n_layers, stream[0]))
        by_kind = {(part.feature_type, part.layer): part.given[0] for part in parts}
        sources = {}
        for node in map(node_of, largest(self.nodes, _DIRECT).itertuples()):
            given = by_kind.get((node.feature_type, node.layer))
            if given is not None and given[node.position, max(node.head, 0)]:
                sources[node] = float(given[node.position, max(node.head, 0)])
        unlisted = sum(float(part.given.sum()) for part in parts) - sum(sources.values())
        ends = {Node("bias"): float(value.detach()) + float(left), Node("rest"): unlisted}
        known = [source for source in sources if self.sources.knows(source)]
        measured: dict[Node, float] = {}
        if self.wanted.last and known:
            with torch.no_grad():
                given = self.sources.given(known, [range(first, first + 1)] * len(known))
                metrics = self.wanted.metric(self._logits_of_stream(stream[:, first:] - given))
            measured = dict(zip(known, (self.runs.plain - metrics).tolist()))
        return edge_table({**sources, **ends}, "logit", "direct", -1, measured)

    def _logits_of_stream(self, stream: Tensor) -> Tensor:
        final = self.model.attachment.layout.final_norm
        return self.model.unembed(stream if final is None else self.model.ln_final(stream))

    def _parts_below(
        self, labels: Sequence[str], directions: Tensor, layer: int, entered: Tensor
    ) -> tuple[list[Part], Tensor]:
        """What each node below a block gives to <stream, direction> (with a corrupt text, how much more than there),
        and [N], biases less the whole. Notes how far the parts of the first directions, ``labels``, miss their sum.

        Args:
            directions: [N,T,D].
            entered: [T,D], the stream.
        """
        decomposition = self.sources.blocks.decomposition
        parts, rest = decomposition.parts(directions, layer, self.text)
        left = rest - torch.einsum("ntd,td->n", directions, entered)
        missed = left + sum(part.given.sum((1, 2)) for part in parts)
        self.completeness |= dict(zip(labels, missed.tolist()))
        if self.sources.corrupt is not None:
            others, _ = decomposition.parts(directions, layer, self.sources.corrupt)
            pairs = zip(parts, others, strict=True)
            parts = [part._replace(given=part.given - other.given) for part, other in pairs]
        return parts, left

    def _on_host(self, parts: Sequence[Part], left: Tensor) -> tuple[list[Part], Tensor]:
        """The same on the host, for one wait."""
        flat = torch.cat([left[:, None], *(part.given.flatten(1) for part in parts)], 1).cpu()
        left, *given = flat.split([1, *(part.given[0].numel() for part in parts)], 1)
        moved = [part._replace(given=x.view(part.given.shape)) for part, x in zip(parts, given)]
        return moved, left[:, 0]

    def edges_into(self, nodes: Sequence[Node], read: int | None = None) -> pd.DataFrame:
        """Edges into the ports of writes, softmax heads and MLPs: the largest sources, of which some are measured, and
        what the stream holds at each token that the block looks at."""
        changes: list[Change] = []
        tables: list[pd.DataFrame] = []
        step = max(1, _PORTS // self.text.tokens.shape[1])
        for _, alike in groupby(sorted(nodes, key=lambda node: node[:2]), key=lambda node: node[:2]):
            ports = list(chain.from_iterable(self._ports_of(node, read) for node in alike))
            for first in range(0, len(ports), step):
                tables += self._tables_into(ports[first : first + step], changes)
        if not tables:
            return pd.DataFrame(columns=list(EDGE_COLUMNS))
        table = pd.concat(tables, ignore_index=True)
        tried = table.measured.notna()
        table.loc[tried, "measured"] = self.runs.effects(changes)[table.measured[tried].astype(int)]
        return table

    def _ports_of(self, node: Node, read: int | None) -> list[Port]:
        if node.feature_type == "write":
            return ports_of(node, self.text.recurrences[node.layer], self.gradients.reads[node.layer], read)
        if node.feature_type == "mlp":
            return [port_of_mlp(node, self.gradients.other[f"blocks.{node.layer}.hook_mlp_out"])]
        return ports_of_head(node, self.gradients.other[f"blocks.{node.layer}.attn.hook_z"])

    def through(self, node: Node) -> ThroughNorm | None:
        """The norm that follows the reads of a write, from its token on."""
        through = self.writes.through.get(node.layer) if node.feature_type == "write" else None
        return through and through.select(slice(node.head, node.head + 1), slice(node.position, None))

    @torch.no_grad()
    def _tables_into(self, ports: Sequence[Port], changes: list[Change]) -> Iterator[pd.DataFrame]:
        """Edges into ports of one kind in one block. Gradients choose sources; the block is run again without each, and
        what a port is then is followed through the norm of its head: a prediction that is to first order in what
        follows the head alone. Changes that measure some join ``changes``, and their numbers are in the column
        ``measured``."""
        found, ends = self._likely_sources(ports)
        known = [[source for source in candidates if self.sources.knows(source)] for candidates in found]
        takens = [sides[0] - sides[1:] for sides in self.sources.sides_without(ports, known)]
        effects = [port.effects(taken, self.through(port.node)) for port, taken in zip(ports, takens)]
        exact = iter(torch.cat(effects).tolist())
        for port, candidates, own, taken, last in zip(ports, found, known, takens, ends):
            sources = candidates | dict(zip(own, exact))
            streams = [row for row, source in enumerate(own) if source.feature_type == "stream"]
            others = sorted({*range(len(own))} - {*streams}, key=lambda row: -abs(sources[own[row]]))
            tried = [*others[:_MEASURED], *streams]
            numbers = {own[row]: number for number, row in enumerate(tried, start=len(changes))}
            changes += change_for(port, self.text, [taken[row] for row in tried])
            read = port.at if port.name == "query" else -1
            yield edge_table(sources | last, port.node.node_id, port.name, read, numbers)

    def _likely_sources(self, ports: Sequence[Port]) -> tuple[list[dict[Node, float]], list[dict[Node, float]]]:
        """Of each port, the sources and the tokens' streams that give most by the gradient through the block; and what
        biases add to those that are linear with norms, gates and activations held fixed, and the rest, which is what
        all other sources give by the gradient."""
        node = ports[0].node
        name = f"blocks.{node.layer}.hook_resid_pre"
        streams, embeddings = (self.text.at(hook) for hook in (name, "hook_embed"))
        linear = [port for port in ports if port.is_linear]
        runs = [self.sources.blocks.maps(linear, live=False)] if linear else []
        maps = Maps(*map(torch.cat, zip(*runs, self.sources.blocks.maps(ports, live=True))))
        labels = [f"{port.node.node_id} {port.name}" for port in linear]
        parts, left = self._parts_below(labels, maps.stream, ports[0].entered, streams)
        given = torch.einsum("ntd,td->nt", maps.embedded, embeddings - self.sources.other("hook_embed"))
        parts[0] = parts[0]._replace(given=parts[0].given + given[..., None])
        held = torch.einsum("ntd,td->nt", maps.stream, streams - self.sources.other(name))
        read_again = torch.einsum("ntd,td->n", maps.embedded, embeddings)
        parts, left = self._on_host(
            [*parts, Part("stream", node.layer, held[..., None])], left + maps.wholes - read_again
        )
        biases = {id(port): {Node("bias"): rest} for port, rest in zip(linear, left.tolist())}
        found = []
        ends = []
        for row, port in enumerate(ports, start=len(linear)):
            *own, stream = (part._replace(given=part.given[row]) for part in parts if part[:2] != port.node[:2])
            sources = _largest_sources(own, _LISTED)
            found.append(sources | _largest_sources([stream], _STREAMS))
            unlisted = sum(float(part.given.sum()) for part in own) - sum(sources.values())
            ends.append(biases.get(id(port), {}) | {Node("rest"): unlisted})
        return found, ends

    # ------------------------------------------------------------------------------------ questions of a graph

    def why(self, layer: int, head: int, read: int, source: int) -> pd.DataFrame:
        """`Graph.why`."""
        n_heads = self.model.cfg.layer(layer).H
        length = self.text.tokens.shape[1]
        if not (0 <= head < n_heads and 0 <= source <= read < length):
            raise InputError(
                f"head, read and source: expected a head below {n_heads} and tokens 0 <= source <= read < {length}, "
                f"got {head}, {read} and {source}"
            )
        with own_gradients(self.model.cfg.device.type):
            table = self.edges_into([Node("write", layer, head, source)], read)
        return table.loc[by_size(table.measured.fillna(table.predicted))].sort_values("port", kind="stable")

    def answers(self, sets: Sequence[Collection[Node]]) -> list[RunAnswer]:
        """`Tracer.answers`."""
        nodes = list({*chain.from_iterable(sets)})
        with own_gradients(self.model.cfg.device.type), torch.no_grad():
            changes = dict(zip(nodes, self._changes_without(nodes)))
            metrics, said = self.runs.outcomes([[changes[node] for node in some] for some in sets])
        plain = int(self.runs.session.logits[0, -1].argmax())
        texts = self._token_texts(said.tolist())
        return list(map(RunAnswer, metrics.tolist(), texts, (said == plain).tolist()))

    def metadata(self) -> dict[str, object]:
        """`Graph.metadata`."""
        text = self.text
        corrupt = self.sources.corrupt
        targets = self._token_texts(self.wanted.targets)
        against = self._token_texts(self.wanted.against)
        title = " ".join(targets) + ("" if not against else f" − {' '.join(against)}")
        return {
            "model": self.model.cfg.model_name,
            "tokens": self._token_texts(text.tokens[0].tolist()),
            "targets": targets,
            "against": against,
            "title": title or "metric",
            "metric": self.runs.plain,
            "answer": self._token_texts([int(self.runs.session.logits[0, -1].argmax())])[0],
            "corrupt": None if corrupt is None else self._token_texts(corrupt.tokens[0].tolist()),
            "frozen": self.frozen,
            "completeness": self.completeness,
            "audit": self.audit,
            "runs": self.runs.runs,
        }

    def _token_texts(self, ids: Sequence[int]) -> list[str]:
        return [str(token) if self.model.tokenizer is None else str(self.model.to_string(token)) for token in ids]


def _predicted_tables(sources: NodeSources, writes: Writes, gradients: Gradients) -> list[pd.DataFrame]:
    """Tables of nodes, by block and kind."""
    tables = [nodes_of_block("write", layer, effects) for layer, effects in writes.effects.items()]
    for name, gradient in gradients.other.items():
        kind = _kind_of_hook(sources.blocks.model, name)
        layer = -1 if kind == "embedding" else int(name.split(".")[1])
        effect = ((sources.text.at(name) - sources.other(name)) * gradient[0]).sum(-1)
        if kind is not None:
            tables.append(nodes_of_block(kind, layer, effect))
    return tables


def _kind_of_hook(model: HookedRecurrent, name: str) -> FeatureType | None:
    """What nodes a hook has the values of, writes aside; None: of none."""
    if not name.startswith("blocks."):
        return "embedding" if name == "hook_embed" else None
    layer = int(name.split(".")[1])
    if name.endswith("hook_attn_out"):  # where it is no recurrence's, and not told apart by heads
        return None if layer in model.cfg.layers or layer in model.cfg.attention else "attn"
    if name.endswith("hook_mlp_out"):
        return "mlp"
    return "attn" if name.endswith("attn.hook_z") else None


def _largest_sources(parts: Sequence[Part], n: int) -> dict[Node, float]:
    """The n nodes of parts [T,H] that give most, largest first, and the largest skips, which are not measured."""
    sources: dict[Node, float] = {}
    for part in parts:
        given = part.given.flatten()
        top = given.abs().topk(min(n, len(given))).indices
        for index, value in zip(top.tolist(), given[top].tolist()):
            position, head = divmod(index, part.given.shape[1])
            if value:
                sources[Node(part.feature_type, part.layer, head if part.has_heads else -1, position)] = value
    ordered = sorted(sources, key=lambda source: -abs(sources[source]))
    skips = [source for source in ordered if source.feature_type == "skip"]
    others = [source for source in ordered if source.feature_type != "skip"]
    return {source: sources[source] for source in [*others[:n], *skips[:_MEASURED]]}
