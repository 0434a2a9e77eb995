"""One text, followed back from a metric: nodes predicted and measured, and the edges into their ports."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, product
from typing import TYPE_CHECKING, cast

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
    reading,
)
from hookpoints.circuit.norms import constants
from hookpoints.circuit.ports import (
    Blocks,
    NodeSources,
    Port,
    change_for,
    has_ports,
    ports_of,
    ports_of_output,
    reach_of,
)
from hookpoints.circuit.stream import Decomposition, Text, head_kinds, moved
from hookpoints.circuit.tables import (
    EDGE_COLUMNS,
    Change,
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
    from transformer_lens.hook_points import HookPoint

    from hookpoints.hooks.guard import Hook, Name
    from hookpoints.model.recurrent import HookedRecurrent
    from hookpoints.recurrence.recurrence import Recurrence

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
    corrupt_logits: Tensor | None
    """[vocab], after the last token of the corrupt text."""
    audit: Mapping[str, float] = field(default_factory=dict)
    """Of writes that were drawn from those that no prediction chose: how many, and their largest |effect|."""
    columns: list[Node] = field(default_factory=list)
    """All that the stream is the sum of, in the order in which it is added, and token by token."""
    completeness: dict[str, float] = field(default_factory=dict)
    """Sum of the parts less the whole, by port."""

    @classmethod
    def of(
        cls, model: HookedRecurrent, tokens: Tensor, wanted: Wanted, corrupt: Tensor | None, frozen: bool
    ) -> Tracing:
        """Read the texts, and follow the metric back."""
        kinds = [Node("embedding")]
        for layer in range(model.cfg.n_layers):
            kinds += [*head_kinds(model, layer), Node("mlp", layer)]
        others = [kind for kind in kinds if kind.feature_type != "write" and kind.hook in model.hook_dict]
        further = tuple(kind.hook for kind in others)
        gradients = read_gradients(model, tokens, wanted.metric, frozen, further, wanted.last)
        with reading(model) as read:
            session = EditSession(model, tokens, logits_to_keep=int(wanted.last and keeps_last(model)))
        recurrences = {layer: session.recurrence(layer) for layer in model.cfg.recurrent_layers}
        place = session.tokens.device  # where the model lies on several, all that is computed here is there
        donors: dict[int, Recurrence] = {}
        other: Text | None = None
        corrupt_logits: Tensor | None = None
        if corrupt is not None:
            with reading(model, follow=False) as seen, model.recording() as recorded:
                corrupt_logits = logits_of(model, corrupt, last=True)[0, -1]
            donors = {layer: row.recurrence for layer, row in recorded.items()}
            other = Text(corrupt.to(place), moved(donors, place), seen.values)
        writes = predict_writes(model, recurrences, read.ways, gradients, donors)
        gradients, writes = tree_map_only(Tensor, lambda x: x.to(place), (gradients, writes))
        followed = {f"blocks.{layer}.hook_mixer_out" for layer in recurrences if layer not in writes.unknown}
        followed |= {f"blocks.{layer}.hook_attn_out" for layer in model.cfg.attention}
        clean = Text(session.tokens, moved(recurrences, place), read.values, followed)
        sources = NodeSources(Blocks(Decomposition(model, clean), reach_of(model, tokens)), other)
        tables = [
            nodes_of_block(Node("write", layer, 0), effects, writes.bounds[layer])
            for layer, effects in writes.effects.items()
        ]
        for kind in others:
            change = clean.at(kind.hook) - sources.other(kind.hook)
            gradient = gradients[kind.hook][0]
            bound = change.norm(dim=-1) * gradient.norm(dim=-1)
            tables.append(nodes_of_block(kind, (change * gradient).sum(-1), bound))
        nodes = pd.concat(tables, ignore_index=True)
        runs = Measure(session, wanted)
        return cls(model, wanted, sources, gradients, writes, nodes, runs, frozen, corrupt_logits)

    @property
    def text(self) -> Text:
        return self.sources.text

    # ------------------------------------------------------------------------------------ nodes

    def measure_nodes(self, measure: int | None) -> None:
        """Fill the column ``measured`` of the largest nodes of each kind: ``measure`` writes, two fifths of the others;
        None: of all. Then of some of the other writes, drawn at random, of which `audit` is noted."""
        chosen: list[int] = []
        drawn = np.empty(0, int)
        for kind, rows in self.nodes.groupby("feature_type"):
            most = len(rows) if measure is None else measure if kind == "write" else max(1, 2 * measure // 5)
            ranks = [by_size(rows.predicted)]
            if self.sources.corrupt is None:
                # The slope of a norm along its whole input is nearly 0, and an answer may bend: a bound of what is
                # predicted, whichever way it points, finds others.
                ranks = [ranks[0][: (most + 1) // 2], by_size(rows.bound)]
            order = [*dict.fromkeys(chain.from_iterable(ranks))]
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
                replacing[alike] = self.sources.replacing(alike)
            at = (node.position,) if node.head < 0 else (node.position, node.head)
            values = {name: value[at] for name, value in replacing[alike].items()}
            changes.append(Change(node.layer, node.position, values, node.head))
        return changes

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
        last = range(first, stream.shape[1])
        given, left = _on_host(*self._parts_below([Node("logit", n_layers)], ["logit"], direction, last, stream))
        by_node = dict(zip(self.columns, given[0].tolist()))
        best = map(node_of, largest(self.nodes, _DIRECT).itertuples())
        sources = {node: by_node[node] for node in best if by_node.get(node)}
        unlisted = float(given.sum()) - sum(sources.values())
        ends = {Node("bias"): float(value.detach()) + float(left), Node("rest"): unlisted}
        known = [source for source in sources if self.sources.knows(source)]
        measured: dict[Node, float] = {}
        if self.wanted.last and known:
            with torch.no_grad():
                taken = self.sources.given(known, [range(first, first + 1)] * len(known), self.sources.reads(known))
                metrics = self.wanted.metric(self._logits_of_stream(stream[:, first:] - torch.stack(taken)))
            measured = dict(zip(known, (self.runs.plain - metrics).tolist()))
        return edge_table({**sources, **ends}, "logit", "direct", -1, measured)

    def _logits_of_stream(self, stream: Tensor) -> Tensor:
        final = self.model.attachment.layout.final_norm
        return self.model.unembed(stream if final is None else self.model.ln_final(stream))

    def _parts_below(
        self, below: Sequence[Node], labels: Sequence[str], directions: Tensor, at: Collection[int], entered: Tensor
    ) -> tuple[Tensor, Tensor]:
        """[N,M], what each node below others gives to <stream, direction> (with a corrupt text, how much more than
        there), in the order of `columns`; and [N,1], biases less the whole. Notes how far parts miss their sum.

        Args:
            below: N nodes, as of `Decomposition.parts`.
            labels: of what is noted; "": it is not.
            directions: [N,T,D].
            at: tokens where these are not 0.
            entered: [N,T,D], the stream that enters the block of each.
        """
        decomposition = self.sources.blocks.decomposition
        tokens = torch.tensor(sorted(at), device=directions.device)
        parts, rest = decomposition.parts(directions, tokens, below, self.text)
        given = torch.cat([x.flatten(1) for x in parts.values()], 1)
        left = rest - torch.einsum("ntd,ntd->n", directions, entered)
        missing = zip(labels, (left + given.sum(1)).tolist())
        self.completeness |= {label: miss for label, miss in missing if label}
        if given.shape[1] > len(self.columns):
            columns: list[Node] = []
            for kind, x in parts.items():
                _, length, heads = x.shape
                places = product(range(length), range(heads))
                columns += [Node(kind.feature_type, kind.layer, kind.head + head, at) for at, head in places]
            self.columns = columns
        if self.sources.corrupt is not None:
            others, _ = decomposition.parts(directions, tokens, below, self.sources.corrupt)
            given = given - torch.cat([x.flatten(1) for x in others.values()], 1)
        return given, left[:, None]

    def edges_into(self, nodes: Sequence[Node], read: int | None = None) -> pd.DataFrame:
        """Edges into the ports of writes, softmax heads and MLPs: the largest sources, of which some are measured, and
        what the stream holds at each token that the block looks at."""
        changes: list[Change] = []
        tables: list[pd.DataFrame] = []
        upward = sorted(nodes, key=lambda node: (node.layer, node.feature_type == "mlp", node.feature_type))
        ports = list(chain.from_iterable(self._ports_of(node, read) for node in upward))
        step = max(1, _PORTS // self.text.tokens.shape[1])
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
            return ports_of(node, self.text.recurrences[node.layer], self.gradients[node.hook], read)
        return ports_of_output(node, self.gradients[node.hook])

    def through(self, node: Node) -> ThroughNorm | None:
        """The norm that follows the reads of a write, from its token on."""
        through = self.writes.through.get(node.layer) if node.feature_type == "write" else None
        return through and through.select(slice(node.head, node.head + 1), slice(node.position, None))

    @torch.no_grad()
    def _tables_into(self, ports: Sequence[Port], changes: list[Change]) -> Iterator[pd.DataFrame]:
        """Edges into ports. Gradients choose sources; the block is run again without each, and what a port is then is
        followed through the norm of its head: a prediction that is to first order in what follows the head alone.
        Changes that measure some join ``changes``, and their numbers are in the column ``measured``."""
        found, rests = zip(*self._likely_sources(ports))
        known = [[source for source in candidates if self.sources.knows(source)] for candidates in found]
        takens = [sides[0] - sides[1:] for sides in self.sources.sides_without(ports, known)]
        effects = [port.effects(taken, self.through(port.node)) for port, taken in zip(ports, takens)]
        exact = iter(torch.cat(effects).tolist())
        for port, candidates, own, taken, rest in zip(ports, found, known, takens, rests):
            sources = candidates | dict(zip(own, exact))
            streams = [row for row, source in enumerate(own) if source.feature_type == "stream"]
            others = sorted({*range(len(own))} - {*streams}, key=lambda row: -abs(sources[own[row]]))
            tried = [*others[:_MEASURED], *streams]
            numbers = {own[row]: number for number, row in enumerate(tried, start=len(changes))}
            changes += change_for(port, self.text, [taken[row] for row in tried])
            read = port.at if port.name == "query" else -1
            yield edge_table(sources | {Node("rest"): rest}, port.node.node_id, port.name, read, numbers)

    def _likely_sources(self, ports: Sequence[Port]) -> Iterator[tuple[dict[Node, float], float]]:
        """Of each port, the sources and the tokens' streams that give most by the gradient through the block, and what
        all other sources give."""
        nodes = [port.node for port in ports]
        streams = [Node("stream", node.layer).hook for node in nodes]
        labels = ["" if port.name == "input" else f"{port.node.node_id} {port.name}" for port in ports]
        at = {*chain.from_iterable(self.sources.blocks.windows_of_ports(ports))}
        directions, again = self.sources.blocks.gradients(ports).unbind(2)
        entered = torch.stack([self.text.at(name) for name in streams])
        given, _ = self._parts_below(nodes, labels, directions, at, entered)
        embedded = self.text.at("hook_embed") - self.sources.other("hook_embed")
        given[:, : again.shape[1]] += torch.einsum("ntd,td->nt", again, embedded)
        others = torch.stack([self.sources.other(name) for name in streams])
        given, held = _on_host(given, torch.einsum("ntd,ntd->nt", directions, entered - others))
        is_skip = torch.tensor([column.feature_type == "skip" for column in self.columns[: given.shape[1]]])
        for node, own, stream in zip(nodes, given, held):
            sources = _largest_sources(own * ~is_skip, self.columns, _LISTED)
            sources |= _largest_sources(own * is_skip, self.columns, _MEASURED)
            rest = float(own.sum()) - sum(sources.values())
            at_tokens = [Node("stream", node.layer, -1, token) for token in range(len(stream))]
            yield sources | _largest_sources(stream, at_tokens, _STREAMS), rest

    # ------------------------------------------------------------------------------------ questions of a graph

    def why(self, node_id: str, read: int | None) -> pd.DataFrame:
        """`Graph.why`."""
        named = self.nodes[self.nodes.node_id == node_id]
        nodes = [node for node in map(node_of, named.itertuples()) if has_ports(node)]
        if not nodes:
            raise InputError(
                f"node: expected the id of a write, a softmax head or an MLP, as in graph.nodes, got {node_id!r}"
            )
        reading = range(nodes[0].position, self.text.tokens.shape[1] if nodes[0].feature_type == "write" else 0)
        if read is not None and read not in reading:
            raise InputError(
                f"read: expected a token from the write's own to the last, and none for other nodes, got {read}"
            )
        with own_gradients(self.model.cfg.device.type):
            table = self.edges_into(nodes, read)
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

    def last_logits(self, sets: Sequence[Collection[Node]]) -> Tensor:
        """`Tracer.last_logits`."""
        with own_gradients(self.model.cfg.device.type), torch.no_grad():
            rows = self.runs.last_logits([self._changes_without([*some]) for some in sets])
        texts = [self.runs.session.logits[0, -1], cast(Tensor, self.corrupt_logits).to(rows)]
        return torch.cat([torch.stack(texts), rows])

    def hooks_without(self, nodes: Sequence[Node]) -> list[tuple[Name, Hook]]:
        """`Graph.hooks`."""
        placed: dict[str, list[Change]] = {}
        with own_gradients(self.model.cfg.device.type), torch.no_grad():
            for change in self._changes_without(nodes):
                for name in change.values:
                    placed.setdefault(name, []).append(change)

        def put(x: Tensor, hook: HookPoint) -> Tensor:
            x = x.clone()
            for change in placed[str(hook.name)]:
                at = change.position - (self.model.first_token() or 0)
                if 0 <= at < x.shape[1]:  # a pass that generates has later tokens alone
                    here = x[:, at] if change.head < 0 else x[:, at, change.head]
                    here.copy_(change.values[str(hook.name)])
            return x

        return [(name, put) for name in placed]

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


def _on_host(*parts: Tensor) -> Sequence[Tensor]:
    """The same [N,...] on the host, for one wait."""
    return torch.cat(parts, 1).cpu().split([part.shape[1] for part in parts], 1)


def _largest_sources(given: Tensor, nodes: Sequence[Node], n: int) -> dict[Node, float]:
    """Of the n nodes that give most, which is in ``given`` [M], those that give something; the largest first."""
    best = given.abs().topk(min(n, len(given))).indices
    return {nodes[index]: value for index, value in zip(best.tolist(), given[best].tolist()) if value}
