"""One text, followed back from a metric: nodes predicted and measured, and the edges into their ports."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from hookpoints.circuit.measure import LogitLead, Measure
from hookpoints.circuit.nodes import Gradients, keeps_last, logits_of, predict_writes, read_gradients, reading
from hookpoints.circuit.paths import Paths, direct_paths
from hookpoints.circuit.ports import Port, change_for, has_ports, ports_of, ports_of_output
from hookpoints.circuit.stream import Text, head_kinds, moved
from hookpoints.circuit.tables import (
    Change,
    Node,
    Predicted,
    RunAnswer,
    by_size,
    edge_table,
    largest,
    node_of,
    predicted_nodes,
)
from hookpoints.edits.session import EditSession
from hookpoints.errors import InputError
from hookpoints.scopes import own_gradients

if TYPE_CHECKING:
    from transformer_lens.hook_points import HookPoint

    from hookpoints.edits.session import EditedRun
    from hookpoints.hooks.guard import Hook, Name
    from hookpoints.model.recurrent import HookedRecurrent
    from hookpoints.recurrence.recurrence import Recurrence

_SOURCES = 64
"""Nodes of the largest measured effects, which are tried as sources."""
_MEASURED = 4
"""Sources of a port that are measured."""
_AUDITED = 20
"""Writes that are drawn at random, of those that predictions leave out."""
_NEAR = 4
"""Tokens up to a port's own whose whole stream is tried as its source."""
_STREAMS = 8
"""Tokens in all for which that is tried."""


@dataclass(eq=False)
class Tracing:
    """One text, its gradients and its runs."""

    model: HookedRecurrent
    text: Text
    corrupt: Text | None
    corrupt_logits: Tensor | None
    """[vocab], after the last token of the corrupt text."""
    gradients: Gradients
    """By what nodes are, and by what heads read."""
    nodes: pd.DataFrame
    """All of them, with predictions."""
    runs: Measure
    frozen: bool
    audit: Mapping[str, float] = field(default_factory=dict)
    """Of writes that were drawn from those that no prediction chose: how many, and their largest |effect|."""

    @classmethod
    def of(
        cls, model: HookedRecurrent, tokens: Tensor, lead: LogitLead, corrupt: Tensor | None, frozen: bool
    ) -> Tracing:
        """Read the texts, and follow the metric back."""
        kinds = [Node("embedding")]
        for layer in range(model.cfg.n_layers):
            kinds += [*head_kinds(model, layer), Node("mlp", layer)]
        output_kinds = [kind for kind in kinds if kind.feature_type != "write" and kind.hook in model.hook_dict]
        further = tuple(kind.hook for kind in output_kinds)
        gradients = read_gradients(model, tokens, lead.of, frozen, further, last=True)
        with reading(model) as values:
            session = EditSession(model, tokens, logits_to_keep=int(keeps_last(model)))
        recurrences = {layer: session.recurrence(layer) for layer in model.cfg.recurrent_layers}
        place = session.tokens.device  # where the model lies on several, all that is computed here is there
        donors: dict[int, Recurrence] = {}
        other: Text | None = None
        corrupt_logits: Tensor | None = None
        if corrupt is not None:
            with reading(model) as seen, model.recording() as recorded:
                corrupt_logits = logits_of(model, corrupt, last=True)[0, -1]
            donors = {layer: row.recurrence for layer, row in recorded.items()}
            other = Text(corrupt.to(place), moved(donors, place), seen)
        predicted = predict_writes(recurrences, gradients, donors)
        gradients = {name: gradient.to(place) for name, gradient in gradients.items()}
        text = Text(session.tokens, moved(recurrences, place), values)
        for kind in output_kinds:
            change = text.at(kind.hook)
            if other is not None:
                change = change - other.at(kind.hook)
            gradient = gradients[kind.hook][0]
            bound = change.norm(dim=-1) * gradient.norm(dim=-1)
            predicted.append(Predicted(kind, (change * gradient).sum(-1), bound))
        nodes = predicted_nodes(predicted)
        runs = Measure(session, lead)
        return cls(model, text, other, corrupt_logits, gradients, nodes, runs, frozen)

    def other(self, name: str) -> Tensor:
        """[T,...], what replaces the values of a hook: those of the corrupt text, or 0."""
        return torch.zeros_like(self.text.at(name)) if self.corrupt is None else self.corrupt.at(name)

    # ------------------------------------------------------------------------------------ nodes

    def measure_nodes(self, measure: int | None) -> None:
        """Fill the column ``measured`` of the largest nodes of each kind: ``measure`` writes, two fifths of the others;
        None: of all. Then of some of the other writes, drawn at random, of which `audit` is noted."""
        chosen: list[int] = []
        drawn = np.empty(0, int)
        for kind, rows in self.nodes.groupby("feature_type"):
            most = len(rows) if measure is None else measure if kind == "write" else max(1, 2 * measure // 5)
            ranks = [by_size(rows.predicted)]
            if self.corrupt is None:
                # The slope of a norm along its whole input is nearly 0, and an answer may bend: a bound of what is
                # predicted, whichever way it points, finds others.
                ranks = [ranks[0][: (most + 1) // 2], by_size(rows.bound)]
            order = [*dict.fromkeys(chain.from_iterable(ranks))]
            chosen += order[:most]
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
        """[T,...] by the names of hooks, what replaces a node at its token and head: of a write value and key."""
        if node.feature_type == "write":
            mixer = f"blocks.{node.layer}.mixer"
            if self.corrupt is None:
                return {f"{mixer}.hook_write_value": torch.zeros_like(self.text.recurrences[node.layer].u[0])}
            r = self.corrupt.recurrences[node.layer]
            return {f"{mixer}.hook_write_value": r.u[0], f"{mixer}.hook_write_key": r.k[0]}
        names = ("hook_embed", "blocks.0.hook_resid_pre") if node.feature_type == "embedding" else (node.hook,)
        return {name: self.other(name) for name in names}

    # ------------------------------------------------------------------------------------ edges

    def edges(self, nodes: Sequence[Node], read: int | None = None) -> pd.DataFrame:
        """Edges into the logit, and into the ports of writes, softmax heads and MLPs: from the largest sources, and
        from what the stream holds at their tokens."""
        ports = list(chain.from_iterable(self._ports_of(node, read) for node in nodes))
        sources = [node_of(row) for row in largest(self.nodes, _SOURCES).itertuples()]
        paths = self._direct_paths(sources, ports)
        ranked = _ranked_sources(ports, paths)
        # The whole stream of a token is a source, too.
        near = [_streams_near(port, own) for port, own in zip(ports, ranked)]
        streams = [*dict.fromkeys(chain.from_iterable(near))]
        of_streams = _ranked_sources(ports, self._direct_paths(streams, ports))
        # A direct edge was measured by the run that left only this path to the logit.
        rows: list[tuple[object, ...]] = [(node.node_id, "logit", "direct", -1, np.nan) for node in paths.ran]
        direct = (self.runs.plain - paths.metrics).tolist()
        # The others by a run each, in which the target's port alone lacks what the source gives to it.
        changes: list[Change] = []
        for port, own, tokens, streams_of_port in zip(ports, ranked, near, of_streams):
            tried = [*own[:_MEASURED], *(each for each in streams_of_port if each.node in tokens)]
            changes += change_for(port, self.text, [each.taken for each in tried])
            at = port.at if port.name == "query" else -1
            rows += [(each.node.node_id, port.node.node_id, port.name, at, each.worth) for each in tried]
        return edge_table(rows, [*direct, *self.runs.effects(changes)])

    def _direct_paths(self, sources: Sequence[Node], ports: Sequence[Port]) -> Paths:
        changes = dict(zip(sources, self._changes_without(sources)))
        return direct_paths(self.model, self.runs, changes, ports)

    def _ports_of(self, node: Node, read: int | None) -> list[Port]:
        if node.feature_type == "write":
            return ports_of(node, self.text.recurrences[node.layer], self.gradients[node.hook], read)
        return ports_of_output(node, self.gradients[node.hook])

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
            table = self.edges(nodes, read)
        table = table[table.port != "direct"]
        return table.loc[by_size(table.measured.fillna(table.predicted))].sort_values("port", kind="stable")

    def answers(self, sets: Sequence[pd.DataFrame]) -> list[RunAnswer]:
        """Of runs each without the nodes of one table."""

        def answer(run: EditedRun) -> Tensor:
            metrics = self.runs.lead.of(run.logits)
            metrics = metrics.to(torch.promote_types(metrics.dtype, torch.float32))  # half precision has no token ids
            return torch.stack([metrics, run.logits[:, -1].argmax(-1).to(metrics)], 1)

        rows = self._outcomes_without(sets, answer).tolist()
        plain = int(self.runs.session.logits[0, -1].argmax())
        texts = self._token_texts([int(token) for _, token in rows])
        return [RunAnswer(metric, text, token == plain) for (metric, token), text in zip(rows, texts)]

    def last_logits(self, sets: Sequence[pd.DataFrame]) -> Tensor:
        """[2+N,vocab], after the last token: of the text, the corrupt text, and of the same runs."""
        rows = self._outcomes_without(sets, lambda run: run.logits[:, -1])
        texts = [self.runs.session.logits[0, -1], cast(Tensor, self.corrupt_logits).to(rows)]
        return torch.cat([torch.stack(texts), rows])

    def _outcomes_without(self, sets: Sequence[pd.DataFrame], outcome: Callable[[EditedRun], Tensor]) -> Tensor:
        """`Measure.outcomes`, of runs each without the nodes of one table."""
        nodes = pd.concat(sets).drop_duplicates("node_id")
        with own_gradients(self.model.cfg.device.type), torch.no_grad():
            changes = dict(zip(nodes.node_id, self._changes_without([*map(node_of, nodes.itertuples())])))
            return self.runs.outcomes([[changes[name] for name in table.node_id] for table in sets], outcome)

    def hooks_without(self, nodes: pd.DataFrame) -> list[tuple[Name, Hook]]:
        """Hooks that do the same as a run without the nodes of a table, in any pass over the text."""
        placed: dict[str, list[Change]] = {}
        with own_gradients(self.model.cfg.device.type), torch.no_grad():
            for change in self._changes_without([*map(node_of, nodes.itertuples())]):
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
        corrupt = self.corrupt
        targets, against = map(self._token_texts, self.runs.lead)
        title = " ".join(targets) + ("" if not against else f" − {' '.join(against)}")
        return {
            "model": self.model.cfg.model_name,
            "tokens": self._token_texts(text.tokens[0].tolist()),
            "targets": targets,
            "against": against,
            "title": title,
            "metric": self.runs.plain,
            "answer": self._token_texts([int(self.runs.session.logits[0, -1].argmax())])[0],
            "corrupt": None if corrupt is None else self._token_texts(corrupt.tokens[0].tolist()),
            "frozen": self.frozen,
            "audit": self.audit,
            "runs": self.runs.runs,
        }

    def _token_texts(self, ids: Sequence[int]) -> list[str]:
        return [str(token) if self.model.tokenizer is None else str(self.model.to_string(token)) for token in ids]


class _Source(NamedTuple):
    """What gives to a port."""

    node: Node
    worth: float
    """What it gives to the metric by the port, to first order."""
    taken: Tensor
    """What it takes off the side."""


def _streams_near(port: Port, sources: Sequence[_Source]) -> list[Node]:
    """The streams that enter the block of a port: at its token and those before, which a convolution or a token shift
    sees, and at the tokens of the largest sources."""
    before = range(port.at, max(-1, port.at - _NEAR), -1)
    tokens = dict.fromkeys([*before, *(each.node.position for each in sources)])
    return [Node("stream", port.node.layer, -1, at) for at in islice(tokens, _STREAMS)]


def _ranked_sources(ports: Sequence[Port], paths: Paths) -> list[list[_Source]]:
    """Of each port the sources that give anything, the largest first."""
    if not ports:
        return []
    # One copy to the host for all ports.
    worths = iter(torch.cat([port.worth(taken) for port, taken in zip(ports, paths.taken)]).tolist())
    ranked = []
    for nodes, taken in zip(paths.sources, paths.taken):
        sources = [_Source(*each) for each in zip(nodes, islice(worths, len(nodes)), taken)]
        ranked.append(sorted((each for each in sources if each.worth), key=lambda each: -abs(each.worth)))
    return ranked
