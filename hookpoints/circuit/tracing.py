"""One text, followed back from a metric: nodes predicted and measured, and the edges into their ports."""

from __future__ import annotations

from collections.abc import Collection, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, groupby
from math import isnan
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from hookpoints.circuit.measure import Measure
from hookpoints.circuit.nodes import (
    Gradients,
    LogitMetric,
    ThroughNorm,
    Writes,
    keeps_last,
    logits_of,
    predict_writes,
    read_gradients,
    record,
)
from hookpoints.circuit.norms import constants
from hookpoints.circuit.ports import Blocks, Port, change_for, port_of_mlp, ports_of, ports_of_head, reach_of
from hookpoints.circuit.stream import Decomposition, Part, Text, reading, stretches_of
from hookpoints.circuit.tables import (
    EDGE_COLUMNS,
    Change,
    FeatureType,
    Node,
    PortName,
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
    from transformer_lens.hook_points import HookPoint

    from hookpoints.hooks.guard import Hook, Name
    from hookpoints.model.recurrent import HookedRecurrent

_LISTED = 16
"""Sources of a port that are listed."""
_DIRECT = 96
"""Measured nodes whose direct edges are looked at."""
_MEASURED = 4
"""Of those, how many are measured."""
_AUDITED = 20
"""Writes that are drawn at random, of those that predictions leave out."""
_TOKENS = 2**11
"""Tokens of whole runs at once."""
_STREAMS = 8
"""Last tokens of a window whose whole stream is a source, too."""


class Wanted(NamedTuple):
    """What is explained."""

    metric: LogitMetric
    targets: tuple[int, ...] = ()
    against: tuple[int, ...] = ()

    @property
    def last(self) -> bool:
        """Whether logits after the last token alone are asked for."""
        return bool(self.targets)


@dataclass(eq=False)
class Tracing:
    """One text, its linear maps, its gradients and its runs."""

    model: HookedRecurrent
    wanted: Wanted
    blocks: Blocks
    gradients: Gradients
    """By what heads read and hand on."""
    unknown: Container[int]
    """Layers whose heads hand on their reads in no known way."""
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
        recurrences = {layer: session.recurrence(layer) for layer in model.cfg.recurrent_layers}
        clean = Text(tokens, recurrences, values, stretches)
        other = None
        if corrupt is not None:
            with reading(model) as others:
                logits_of(model, corrupt, last=True)
            other = Text(corrupt, donors, others, {})
        blocks = Blocks(Decomposition(model, clean), other, reach_of(model, tokens))
        predicted = pd.concat(_predicted_tables(blocks, writes, gradients), ignore_index=True)
        runs = Measure(session, wanted.metric)
        return cls(model, wanted, blocks, gradients, writes.unknown, predicted, runs, frozen)

    # ------------------------------------------------------------------------------------ nodes

    def measure_nodes(self, measure: int | None) -> None:
        """Fill the column ``measured`` of the largest nodes of each kind: ``measure`` writes, a fifth of the others;
        None: of all. Then of some of the other writes, drawn at random, of which `audit` is noted."""
        for kind, rows in self.nodes.groupby("feature_type"):
            most = len(rows) if measure is None else measure if kind == "write" else max(1, measure // 5)
            order = by_size(rows.predicted)
            self._measure_rows(order[:most])
            if kind == "write":
                drawn = np.random.default_rng(0).permutation(order[most:])[:_AUDITED]
                self._measure_rows(drawn)
                self.audit = {"n": len(drawn), "largest": max(self.nodes.measured[drawn].abs(), default=0.0)}

    def _measure_rows(self, rows: pd.Index | np.ndarray) -> None:
        nodes = [node_of(row) for row in self.nodes.loc[rows].itertuples()]
        self.nodes.loc[rows, "measured"] = self.runs.effects([self._change_without(node) for node in nodes])

    def _change_without(self, node: Node) -> Change:
        """A run without a node, or with that of the corrupt text instead."""
        values = {name: value[node.position] for name, value in self._replacing_values(node).items()}
        if node.head >= 0:
            values = {name: value[node.head] for name, value in values.items()}
        return Change(node.layer, node.position, values, node.head)

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
            return self.blocks.other_writes(node.layer)
        return {name: self.blocks.other(name) for name in names[node.feature_type]}

    # ------------------------------------------------------------------------------------ edges

    def direct(self) -> pd.DataFrame:
        """Edges into the logit: what each measured node gives on its direct path with the final norm's scale as it is,
        and what taking that off the last stream does."""
        text = self.blocks.text
        n_layers = self.model.cfg.n_layers
        stream = text.at(f"blocks.{n_layers - 1}.hook_resid_post")[None]
        first = stream.shape[1] - 1 if self.wanted.last else 0
        read = stream[:, first:].clone().requires_grad_()
        with torch.enable_grad(), constants(["norms"]):
            value = self.wanted.metric(self._logits_of_stream(read)).reshape(())
        direction = torch.zeros_like(stream)
        (direction[:, first:],) = torch.autograd.grad(value, read)
        parts, left = self._parts_below(["logit"], direction, n_layers, stream[0])
        by_kind = {(part.feature_type, part.layer): part.given[0] for part in parts}
        sources = {}
        for node in map(node_of, largest(self.nodes, _DIRECT).itertuples()):
            given = by_kind.get((node.feature_type, node.layer))
            if given is not None and given[node.position, max(node.head, 0)]:
                sources[node] = float(given[node.position, max(node.head, 0)])
        bias = float(value.detach() + left[0])
        measured = np.full(len(sources), np.nan)
        if self.wanted.last:
            with torch.no_grad():
                given = self.blocks.given(list(sources), range(first, first + 1))
                left = [self.wanted.metric(self._logits_of_stream(stream[:, first:] - row)) for row in given]
            measured = self.runs.plain - np.array([float(metric) for metric in left])
        unlisted = sum(float(part.given.sum()) for part in parts) - sum(sources.values())
        ends = {Node("bias"): bias, Node("rest"): unlisted}
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
        decomposition = self.blocks.decomposition
        parts, rest = decomposition.parts(directions, layer, self.blocks.text)
        whole = torch.einsum("ntd,td->n", directions, entered)
        total = rest + sum(part.given.sum((1, 2)) for part in parts)
        self.completeness |= dict(zip(labels, (total - whole).tolist()))
        if self.blocks.corrupt is not None:
            others, _ = decomposition.parts(directions, layer, self.blocks.corrupt)
            pairs = zip(parts, others, strict=True)
            parts = [part._replace(given=part.given - other.given) for part, other in pairs]
        return [part._replace(given=part.given.cpu()) for part in parts], (rest - whole).cpu()

    def edges_into(self, nodes: Sequence[Node], read: int | None = None) -> pd.DataFrame:
        """Edges into the ports of writes, softmax heads and MLPs: the largest sources, of which some are measured, and
        what the stream holds at each token that the block looks at."""
        changes: list[Change] = []
        tables = list(chain.from_iterable(self._tables_into(node, read, changes) for node in nodes))
        if not tables:
            return pd.DataFrame(columns=list(EDGE_COLUMNS))
        table = pd.concat(tables, ignore_index=True)
        tried = table.measured.notna()
        table.loc[tried, "measured"] = self.runs.effects(changes)[table.measured[tried].astype(int)]
        return table

    def _tables_into(self, node: Node, read: int | None, changes: list[Change]) -> Iterator[pd.DataFrame]:
        """Edges into one node, by token. Changes that measure some join ``changes``, and their numbers are in the
        column ``measured``."""
        through = None
        block = f"blocks.{node.layer}"
        if node.feature_type == "write":
            r = self.blocks.text.recurrences[node.layer]
            ports = ports_of(node, r, self.gradients.reads[node.layer], read)
            if node.layer not in self.unknown:
                through = self.blocks.through(node, self.gradients.handed_on[node.layer])
        elif node.feature_type == "mlp":
            ports = [port_of_mlp(node, self.gradients.other[f"{block}.hook_mlp_out"])]
        else:
            ports = ports_of_head(node, self.gradients.other[f"{block}.attn.hook_z"])
        for _, group in groupby(ports, key=lambda port: port.at):
            yield self._table_into(list(group), through, changes)

    @torch.no_grad()
    def _table_into(self, ports: Sequence[Port], through: ThroughNorm | None, changes: list[Change]) -> pd.DataFrame:
        """Edges into ports of one node at one token. Gradients choose sources; the block is run again without each, and
        what a port is then is followed ``through`` the norm of its head: a prediction that is to first order in what
        follows the head alone. ``changes`` as of `_tables_into`."""
        node = ports[0].node
        found, ends = self._likely_sources(ports)
        rows = {source: row for row, source in enumerate(dict.fromkeys(chain(*found)), start=1)}
        tables = []
        for port, sides, candidates, last in zip(ports, self.blocks.sides_without(ports, list(rows)), found, ends):
            taken = sides[0] - sides
            effects = port.effects(taken, through).tolist()
            exact = {source: effects[rows[source]] for source in candidates}
            streams = [source for source in candidates if source.feature_type == "stream"]
            known = [source for source in candidates if source not in streams and not isnan(exact[source])]
            tried = [*sorted(known, key=lambda source: -abs(exact[source]))[:_MEASURED], *streams]
            numbers = {source: number for number, source in enumerate(tried, start=len(changes))}
            changes += change_for(port, self.blocks.text, taken[[rows[source] for source in tried]])
            sources = {source: candidates[source] if isnan(x) else x for source, x in exact.items()} | last
            measured = np.array([numbers.get(source, np.nan) for source in sources])
            read = port.at if port.name == "query" else -1
            tables.append(edge_table(sources, node.node_id, port.name, read, measured))
        return pd.concat(tables, ignore_index=True)

    def _likely_sources(self, ports: Sequence[Port]) -> tuple[list[dict[Node, float]], list[dict[Node, float]]]:
        """Of each port, the sources and the tokens' streams that give most by the gradient through the block; and what
        biases add to those that are linear with norms, gates and activations held fixed, and the rest, which is what
        all other sources give by the gradient."""
        text = self.blocks.text
        node = ports[0].node
        linear = [port for port in ports if port.is_linear]
        fixed = self.blocks.maps(linear, live=False) if linear else []
        live = self.blocks.maps(ports, live=True)
        directions = torch.stack([maps.stream for maps in [*fixed, *live]])
        labels = [f"{node.node_id} {port.name}" for port in linear]
        name = f"blocks.{node.layer}.hook_resid_pre"
        parts, left = self._parts_below(labels, directions, ports[0].entered, text.at(name))
        biases: dict[PortName, float] = {}
        for port, maps, rest in zip(linear, fixed, left.tolist()):
            biases[port.name] = maps.whole - float((maps.embedded * text.at("hook_embed")).sum()) + rest
        differs = text.at(name) - self.blocks.other(name)
        embedded = text.at("hook_embed") - self.blocks.other("hook_embed")
        found = []
        ends = []
        for row, (port, maps) in enumerate(zip(ports, live), start=len(fixed)):
            own = [part._replace(given=part.given[row]) for part in parts if part[:2] != node[:2]]
            own[0].given[:, 0] += (maps.embedded * embedded).sum(-1).cpu()
            held = (maps.stream * differs).sum(-1, keepdim=True).cpu()
            streams = _largest_sources([Part("stream", node.layer, held)], _STREAMS)
            sources = _largest_sources(own, _LISTED)
            found.append(sources | streams)
            unlisted = sum(float(part.given.sum()) for part in own) - sum(sources.values())
            bias = {Node("bias"): biases[port.name]} if port.name in biases else {}
            ends.append(bias | {Node("rest"): unlisted})
        return found, ends

    # ------------------------------------------------------------------------------------ questions of a graph

    def why(self, layer: int, head: int, read: int, source: int) -> pd.DataFrame:
        """`Graph.why`."""
        n_heads = self.model.cfg.layer(layer).H
        length = self.blocks.text.tokens.shape[1]
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
        tokens = self.blocks.text.tokens
        plain = int(self.runs.session.logits[0, -1].argmax())
        step = max(1, _TOKENS // tokens.shape[1])
        answers = []
        for first in range(0, len(sets), step):
            some = sets[first : first + step]
            hooks = self._hooks_without(some)
            with own_gradients(self.model.cfg.device.type), torch.no_grad(), self.model.hooks(hooks):
                logits = logits_of(self.model, tokens.expand(len(some), -1), self.wanted.last)
                for row in logits:
                    said = int(row[-1].argmax())
                    metric = float(self.wanted.metric(row[None]))
                    answers.append(RunAnswer(metric, self._token_texts([said])[0], said == plain))
        return answers

    def _hooks_without(self, sets: Sequence[Collection[Node]]) -> list[tuple[Name, Hook]]:
        """Hooks that replace one set of nodes in each row."""
        replaced: dict[tuple[str, int, bool], dict[str, Tensor]] = {}
        places: dict[str, list[tuple[int, ...]]] = {}
        for row, node in ((row, node) for row, nodes in enumerate(sets) for node in nodes):
            kind = (node.feature_type, node.layer, node.head < 0)
            if kind not in replaced:
                replaced[kind] = self._replacing_values(node)
            for name in replaced[kind]:
                places.setdefault(name, []).append((row, node.position, *([node.head] if node.head >= 0 else [])))
        others = {name: other for values in replaced.values() for name, other in values.items()}
        return [(name, partial(_with_others, other=others[name], places=places[name])) for name in others]

    def metadata(self) -> dict[str, object]:
        """`Graph.metadata`."""
        text = self.blocks.text
        corrupt = self.blocks.corrupt
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


def _predicted_tables(blocks: Blocks, writes: Writes, gradients: Gradients) -> list[pd.DataFrame]:
    """Tables of nodes, by block and kind."""
    tables = [nodes_of_block("write", layer, effects) for layer, effects in writes.effects.items()]
    for name, gradient in gradients.other.items():
        kind = _kind_of_hook(blocks.model, name)
        layer = -1 if kind == "embedding" else int(name.split(".")[1])
        effect = ((blocks.text.at(name) - blocks.other(name)) * gradient[0]).sum(-1)
        if kind is not None:
            tables.append(nodes_of_block(kind, layer, effect))
    return tables


def _with_others(x: Tensor, hook: HookPoint, *, other: Tensor, places: Sequence[tuple[int, ...]]) -> Tensor:
    """``x`` [N,T,...] with ``other`` [T,...] at ``places``: rows, tokens, and heads if there are any."""
    left = x.clone()
    row, *at = torch.tensor(places, device=x.device).T
    left[row, *at] = other.to(x)[*at]
    return left


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
