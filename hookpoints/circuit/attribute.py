"""From a text to a graph: predict all nodes, measure the largest, and take apart what made these."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, groupby
from math import isnan
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from hookpoints.circuit.graph import EDGE_COLUMNS, NODE_COLUMNS, Graph, largest
from hookpoints.circuit.measure import Measure
from hookpoints.circuit.node import Change, FeatureType, Node, PortName
from hookpoints.circuit.nodes import (
    Gradients,
    LogitMetric,
    ThroughNorm,
    Token,
    Writes,
    fixed_weights,
    logits_of,
    one_sequence,
    predict_writes,
    read_gradients,
    record,
    same_length,
)
from hookpoints.circuit.norms import FrozenNorms
from hookpoints.circuit.ports import Blocks, Port, change_for, ports_of, ports_of_head, reach_of
from hookpoints.circuit.stream import Decomposition, Part, Text, read_text, stretches_of
from hookpoints.errors import InputError, PredictionWarning, UnsupportedModelError
from hookpoints.memory.facts import PairDictionary, pair_name

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
_STREAMS = 8
"""Last tokens of a window whose whole stream is a source, too."""


class HeadSAE(Protocol):
    """SAELens' interface of a dictionary of the writes or the states of one head."""

    @property
    def b_dec(self) -> Tensor: ...

    @property
    def cfg(self) -> Any:
        """Has `metadata` with `hook_name`, and with `labels` where words name pairs."""
        ...

    def encode(self, x: Tensor) -> Tensor: ...

    def decode(self, feature_acts: Tensor) -> Tensor: ...


def attribute(
    text: str | Tensor,
    model: HookedRecurrent,
    attribution_targets: Sequence[Token] | Token | None = None,
    against: Token | Sequence[Token] | None = None,
    measure: int = 50,
    *,
    metric: LogitMetric | None = None,
    corrupt: str | Tensor | None = None,
    saes: Sequence[HeadSAE] = (),
    frozen: bool = False,
    targets: int = 8,
) -> Graph:
    """Why a model says something: the writes that made it, and what made those writes.

    Gradients predict what deleting each write, softmax head, MLP and embedding takes off the metric
    (`write_attribution` says how); the largest are then deleted, each in its own run. Of the writes that matter most,
    gradients through one block choose sources of the key, the value and the query. The block is run again without each,
    exactly, which predicts its edge; of the largest, the write is replaced by what it becomes, which measures it.

    Args:
        text: one sequence, a string or tokens [1,T].
        attribution_targets: tokens whose mean logit after the last token is explained. None: the most likely one.
        against: the token or tokens whose logit is taken off. None: the mean of all logits.
        measure: how many writes are deleted, one run each, and a fifth as many heads, MLPs and embeddings each.
        metric: a function of logits [1,T,vocab] instead of targets.
        corrupt: another text of as many tokens; nodes are replaced by those of the corrupt text instead of deleted.
            The best first thing to try, since predictions then hold best.
        saes: dictionaries of writes or of states (SAELens' interface), one of a head. Of writes, those that get edges
            are taken apart into atoms, an error and the dictionary's bias; of states, that of the token through whose
            read the head matters most.
        frozen: as of `write_attribution`, for saturated answers.
        targets: so many of the measured writes get edges, and a quarter as many softmax heads.

    Raises:
        InputError: several sequences, training mode, a target that the tokenizer splits or that is no token, a corrupt
            text of another length, targets and a metric together, or two dictionaries of one head.
        UnknownHookError: a dictionary of a head that the model does not have.
        UnsupportedModelError: the blocks add to no one residual stream, or are on several devices.

    Warns (`PredictionWarning`) of layers with a norm of unknown form, and of quantized weights.

    Cost: five passes for the nodes, about 0.2 for each measurement; `graph.check` tells how far to believe predictions.
    """
    tokens = one_sequence(model, text)
    if not model.attachment.layout.is_chain:
        raise UnsupportedModelError(
            f"{model.cfg.model_name}: expected blocks that add to one residual stream, got others (several streams "
            "side by side), whose parts do not add up; write_attribution works on this model"
        )
    devices = {str(parameter.device) for parameter in model.hf_model.parameters()}
    if len(devices) > 1:
        raise UnsupportedModelError(
            f"attribute: expected a model on one device, got one on {', '.join(sorted(devices))}; load it on one, or "
            "take write_attribution, which works on several"
        )
    wanted = _metric(model, tokens, attribution_targets, against, metric)
    if measure < 1 or targets < 0:
        raise InputError(f"measure and targets: expected at least 1 and 0, got {measure} and {targets}")
    if getattr(model.hf_model, "is_quantized", False):
        warnings.warn(
            f"{model.cfg.model_name} has quantized weights: gradients are those of rounded weights, and some backends "
            "give none. Load it in bfloat16 to compare",
            PredictionWarning,
            stacklevel=2,
        )
    donor = None if corrupt is None else same_length(model, corrupt, tokens)
    wholes = _wholes(model, saes)
    tracing = Tracing.of(model, tokens, wanted, donor, frozen)
    nodes = tracing.nodes(measure)
    writes = nodes[nodes.feature_type == "write"]
    heads = nodes[(nodes.feature_type == "attn") & (nodes["head"] >= 0)]
    explained = pd.concat([largest(writes, targets), largest(heads, targets // 4)])
    best = [_node(row) for row in explained.itertuples()]
    edges = [tracing.direct(nodes), *map(tracing.edges_into, best)]
    tables = [nodes]
    labels: dict[str, str] = {}
    for sae, whole in zip(saes, wholes):
        for node in tracing.taken_apart(whole, best, writes):
            parts, into = tracing.atoms_of(sae, node)
            tables.append(parts)
            edges.append(into)
            labels |= _labels(sae, parts[parts.feature_type == "atom"])
    return Graph(
        nodes=pd.concat(tables, ignore_index=True).astype(NODE_COLUMNS),
        edges=pd.concat(edges, ignore_index=True).astype(EDGE_COLUMNS),
        metadata=tracing.metadata() | {"labels": labels},
        tracer=tracing,
    )


class Wanted(NamedTuple):
    """What is explained."""

    metric: LogitMetric
    targets: tuple[int, ...] = ()
    against: tuple[int, ...] = ()

    @property
    def last(self) -> bool:
        """Whether logits after the last token alone are asked for."""
        return bool(self.targets)


def _metric(
    model: HookedRecurrent,
    tokens: Tensor,
    targets: Sequence[Token] | Token | None,
    against: Sequence[Token] | Token | None,
    metric: LogitMetric | None,
) -> Wanted:
    if metric is not None:
        if targets is not None or against is not None:
            raise InputError("metric: expected a metric or attribution_targets, got both; give one of them")
        return Wanted(metric)
    if targets is None:
        with torch.no_grad():
            targets = int(logits_of(model, tokens, last=True)[0, -1].argmax())
    ids = _ids(model, targets, "attribution_targets")
    others = () if against is None else _ids(model, against, "against")

    def lead(logits: Tensor) -> Tensor:
        last = logits[0, -1]
        return last[list(ids)].mean() - (last[list(others)] if others else last).mean()

    return Wanted(lead, ids, others)


def _ids(model: HookedRecurrent, tokens: Sequence[Token] | Token, name: str) -> tuple[int, ...]:
    ids = []
    for token in [tokens] if isinstance(tokens, str | int) else tokens:
        try:
            index = model.to_single_token(token) if isinstance(token, str) else token
        except ValueError as error:
            raise InputError(f"{name}: expected single tokens, got {error}; name one of these") from error
        if not 0 <= index < model.cfg.d_vocab:
            raise InputError(f"{name}: expected token ids 0 to {model.cfg.d_vocab - 1}, got {token}")
        ids.append(index)
    if not ids:
        raise InputError(f"{name}: expected at least one token, got none")
    return tuple(ids)


@dataclass(eq=False)
class Tracing:
    """One text, its linear maps, its gradients and its runs."""

    model: HookedRecurrent
    wanted: Wanted
    blocks: Blocks
    gradients: Gradients
    writes: Writes
    runs: Measure
    frozen: bool
    completeness: dict[str, float] = field(default_factory=dict)
    """Sum of the parts less the whole, by port."""

    @classmethod
    def of(
        cls, model: HookedRecurrent, tokens: Tensor, wanted: Wanted, corrupt: Tensor | None, frozen: bool
    ) -> Tracing:
        """Read the texts, and follow the metric back."""
        further = tuple(name for name in model.hook_dict if _kind(model, name) is not None)
        gradients = read_gradients(model, tokens, wanted.metric, frozen, further, wanted.last)
        donors = {} if corrupt is None else record(model, corrupt)
        writes = predict_writes(model, tokens, gradients, donors)
        runs = Measure(model, tokens, wanted.metric, wanted.last)
        recurrences = {layer: runs.session.recurrence(layer) for layer in model.cfg.recurrent_layers}
        clean = read_text(model, tokens, recurrences, stretches_of(model, writes.unknown))
        other = None if corrupt is None else read_text(model, corrupt, donors)
        blocks = Blocks(Decomposition(model, clean), other, reach_of(model, tokens))
        return cls(model, wanted, blocks, gradients, writes, runs, frozen)

    # ------------------------------------------------------------------------------------ nodes

    def nodes(self, measure: int) -> pd.DataFrame:
        """Every node with its prediction, and the largest of each kind measured."""
        nodes = pd.concat(list(self._predicted()), ignore_index=True)
        for kind, rows in nodes.groupby("feature_type"):
            tried = rows.loc[_order(rows.predicted)[: measure if kind == "write" else max(1, measure // 5)]]
            changes = [self._without(_node(row)) for row in tried.itertuples()]
            nodes.loc[tried.index, "measured"] = self.runs.effects(changes)
        return nodes

    def _predicted(self) -> Iterator[pd.DataFrame]:
        """Tables of nodes, by block and kind."""
        text = self.blocks.text
        for layer, effects in self.writes.effects.items():
            yield _node_table("write", layer, effects)
        for name, gradient in self.gradients.other.items():
            kind = _kind(self.model, name)
            layer = -1 if kind == "embedding" else int(name.split(".")[1])
            effect = ((text.at(name) - self.blocks.other(name)) * gradient[0]).sum(-1)
            if kind is not None:
                yield _node_table(kind, layer, effect)

    def _without(self, node: Node) -> Change:
        """A run without a node, or with that of the corrupt text instead."""
        block = f"blocks.{node.layer}"
        attention = "hook_attn_out" if node.head < 0 else "attn.hook_z"
        names: dict[FeatureType, list[str]] = {
            "embedding": ["hook_embed", "blocks.0.hook_resid_pre"],
            "mlp": [f"{block}.hook_mlp_out"],
            "attn": [f"{block}.{attention}"],
        }
        wanted = {name: self.blocks.other(name) for name in names.get(node.feature_type, [])}
        wanted = self.blocks.other_writes(node.layer) if node.feature_type == "write" else wanted
        values = {name: value[node.position] for name, value in wanted.items()}
        if node.head >= 0:
            values = {name: value[node.head] for name, value in values.items()}
        return Change(node.layer, node.position, values, node.head)

    # ------------------------------------------------------------------------------------ edges

    def direct(self, nodes: pd.DataFrame) -> pd.DataFrame:
        """Edges into the logit: what each measured node gives on its direct path with the final norm's scale as it is,
        and what taking that off the last stream does."""
        text = self.blocks.text
        n_layers = self.model.cfg.n_layers
        stream = text.values[f"blocks.{n_layers - 1}.hook_resid_post"]
        first = stream.shape[1] - 1 if self.wanted.last else 0
        read = stream[:, first:].clone().requires_grad_()
        with torch.enable_grad(), fixed_weights(self.model), FrozenNorms():
            value = self.wanted.metric(self._logits(read)).reshape(())
        direction = torch.zeros_like(stream)
        (direction[:, first:],) = torch.autograd.grad(value, read)
        parts, left = self._parts(["logit"], direction, n_layers, stream[0])
        by_kind = {(part.feature_type, part.layer): part.given[0] for part in parts}
        sources = {}
        for node in map(_node, largest(nodes, _DIRECT).itertuples()):
            given = by_kind.get((node.feature_type, node.layer))
            if given is not None and given[node.position, max(node.head, 0)]:
                sources[node] = float(given[node.position, max(node.head, 0)])
        bias = float(value.detach() + left[0])
        measured = np.full(len(sources), np.nan)
        if self.wanted.last:
            with torch.no_grad():
                given = self.blocks.given(list(sources), range(first, first + 1))
                left = [self.wanted.metric(self._logits(stream[:, first:] - row)) for row in given]
            measured = self.runs.plain - np.array([float(metric) for metric in left])
        return _edges({**sources, Node("bias"): bias}, "logit", "direct", -1, measured)

    def _logits(self, stream: Tensor) -> Tensor:
        final = self.model.attachment.layout.final_norm
        return self.model.unembed(stream if final is None else self.model.ln_final(stream))

    def _parts(
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

    def edges_into(self, node: Node, read: int | None = None) -> pd.DataFrame:
        """Edges into the ports of a write: the largest sources, of which some are measured, and what the stream holds
        at each token that the block looks at."""
        through = None
        if node.feature_type == "write":
            r = self.blocks.text.recurrences[node.layer]
            ports = ports_of(node, r, self.gradients.reads[node.layer], read)
            if node.layer not in self.writes.unknown:
                through = self.blocks.through(node, self.gradients.handed_on[node.layer])
        else:
            ports = ports_of_head(node, self.gradients.other[f"blocks.{node.layer}.attn.hook_z"])
        tables = [self._into(list(group), through) for _, group in groupby(ports, key=lambda port: port.at)]
        return pd.concat(tables, ignore_index=True)

    @torch.no_grad()
    def _into(self, ports: Sequence[Port], through: ThroughNorm | None) -> pd.DataFrame:
        """Edges into ports of one node at one token. Gradients choose sources; the block is run again without each, and
        what a port is then is followed ``through`` the norm of its head: a prediction that is to first order in what
        follows the head alone."""
        node = ports[0].node
        found, biases = self._candidates(ports)
        rows = {source: row for row, source in enumerate(dict.fromkeys(chain(*found)), start=1)}
        listed: list[dict[Node, float]] = []
        tried: list[list[Node]] = []
        changes = []
        for port, sides, candidates in zip(ports, self.blocks.sides_without(ports, list(rows)), found):
            taken = sides[0] - sides
            effects = port.effects(taken, through).tolist()
            exact = {source: effects[rows[source]] for source in candidates}
            streams = [source for source in candidates if source.feature_type == "stream"]
            known = [source for source in candidates if source not in streams and not isnan(exact[source])]
            tried.append([*sorted(known, key=lambda source: -abs(exact[source]))[:_MEASURED], *streams])
            listed.append({source: candidates[source] if isnan(x) else x for source, x in exact.items()})
            changes += change_for(port, self.blocks.text, taken[[rows[source] for source in tried[-1]]])
        effects = iter(self.runs.effects(changes))
        tables = []
        for port, sources, measured in zip(ports, listed, tried):
            by_source = dict(zip(measured, effects))
            column = np.array([by_source.get(source, np.nan) for source in sources])
            read = port.at if port.name == "query" else -1
            bias = {Node("bias"): biases[port.name]} if port.name in biases else {}
            tables.append(_edges({**sources, **bias}, node.node_id, port.name, read, column))
        return pd.concat(tables, ignore_index=True)

    def _candidates(self, ports: Sequence[Port]) -> tuple[list[dict[Node, float]], dict[PortName, float]]:
        """Of each port, the sources and the tokens' streams that give most by the gradient through the block, and what
        biases add to those that are linear with norms, gates and activations held fixed."""
        text = self.blocks.text
        node = ports[0].node
        linear = [port for port in ports if port.is_linear]
        fixed = self.blocks.maps(linear, live=False) if linear else []
        live = self.blocks.maps(ports, live=True)
        directions = torch.stack([maps.stream for maps in [*fixed, *live]])
        labels = [f"{node.node_id} {port.name}" for port in linear]
        name = f"blocks.{node.layer}.hook_resid_pre"
        parts, left = self._parts(labels, directions, node.layer, text.at(name))
        biases: dict[PortName, float] = {}
        for port, maps, rest in zip(linear, fixed, left.tolist()):
            biases[port.name] = maps.whole - float((maps.embedded * text.at("hook_embed")).sum()) + rest
        differs = text.at(name) - self.blocks.other(name)
        embedded = text.at("hook_embed") - self.blocks.other("hook_embed")
        found = []
        for row, maps in enumerate(live, start=len(fixed)):
            own = [part._replace(given=part.given[row]) for part in parts]
            own[0].given[:, 0] += (maps.embedded * embedded).sum(-1).cpu()
            held = (maps.stream * differs).sum(-1, keepdim=True).cpu()
            streams = _largest_sources([Part("stream", node.layer, held)], _STREAMS)
            found.append(_largest_sources(own, _LISTED) | streams)
        return found, biases

    # ------------------------------------------------------------------------------------ atoms

    def taken_apart(self, whole: Node, explained: Sequence[Node], writes: pd.DataFrame) -> list[Node]:
        """Which writes or which state of a head a dictionary takes apart: the writes that are explained, or else the
        one of the largest prediction; the state that is read where the head matters most, to first order."""
        place = (whole.layer, whole.head)
        if whole.feature_type == "state":
            name = f"blocks.{whole.layer}.mixer.hook_read"
            read = self.blocks.text.at(name) - self.blocks.other(name)
            effects = (read * self.gradients.reads[whole.layer][0])[:, whole.head].sum(-1)
            before = self.blocks.text.recurrences[whole.layer].read_before_write
            return [whole._replace(position=max(0, int(effects.abs().argmax()) - before))]
        found = [node for node in explained if node.feature_type == "write" and (node.layer, node.head) == place]
        of_head = writes[(writes.layer == whole.layer) & (writes["head"] == whole.head)]
        first = of_head.loc[_order(of_head.predicted)[:1]]
        return found or [_node(row) for row in first.itertuples()]

    @torch.no_grad()
    def atoms_of(self, sae: HeadSAE, whole: Node) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Nodes of what a dictionary makes of a write or a state: atoms, an error and its bias, and the state itself;
        and edges from the parts into the whole.

        What is taken off the state after a token and what is taken off that token's write change all that follows
        alike, so that one gradient and one edit serve both."""
        r = self.blocks.text.recurrences[whole.layer].select(heads=whole.head)
        reads = self.gradients.reads[whole.layer][:, :, whole.head : whole.head + 1]
        gradient = r.adjoint(reads).states(positions=[r.T - 1 - whole.position])[0, 0, 0]
        write = r.write(positions=whole.position)[0, 0, 0]
        texts = (self.blocks.text, self.blocks.corrupt)
        clean, other = ({} if text is None else _parts_of(sae, whole, text) for text in texts)
        zero = torch.zeros_like(write)
        differing = {part: clean.get(part, zero) - other.get(part, zero) for part in clean | other}
        if whole.feature_type == "write":  # which has its node
            del differing[whole]
        taken = {part: matrix for part, matrix in differing.items() if bool(matrix.any())}
        predicted = {part: float((matrix * gradient).sum()) for part, matrix in taken.items()}
        name = f"blocks.{whole.layer}.mixer.heads.{whole.head}.hook_write"
        changes = [Change(whole.layer, whole.position, {name: write - matrix}) for matrix in taken.values()]
        measured = self.runs.effects(changes)
        edges = _edges(predicted, whole.node_id, "part", -1, measured)
        return _rows(list(predicted), list(predicted.values()), measured), edges[edges.source != whole.node_id]

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
        table = self.edges_into(Node("write", layer, head, source), read)
        return table.loc[_order(table.measured.fillna(table.predicted))].sort_values("port", kind="stable")

    @torch.no_grad()
    def sufficient(self, keep: Sequence[Node]) -> tuple[float, float, bool]:
        """`Tracer.sufficient`."""
        text = self.blocks.text
        logits = []
        for nodes in (keep, ()):
            with self.model.hooks(self._only(nodes)):
                logits.append(logits_of(self.model, text.tokens, self.wanted.last))
        alone, without = (float(self.wanted.metric(x)) for x in logits)
        targets = self.wanted.targets or (int(self.runs.session.logits[0, -1].argmax()),)
        return alone, without, int(logits[0][0, -1].argmax()) in targets

    def _only(self, keep: Sequence[Node]) -> list[tuple[Name, Hook]]:
        """Hooks that leave these writes alone; the others are those of the corrupt text, or none."""
        hooks: list[tuple[Name, Hook]] = []
        for layer in self.model.cfg.recurrent_layers:
            kept = [(node.position, node.head) for node in keep if node.layer == layer]
            for name, other in self.blocks.other_writes(layer).items():
                hooks.append((name, partial(_kept, kept=kept, other=other)))
        return hooks

    def metadata(self) -> dict[str, object]:
        """`Graph.metadata`."""
        text = self.blocks.text
        corrupt = self.blocks.corrupt
        targets = self._names(self.wanted.targets)
        against = self._names(self.wanted.against)
        title = " ".join(targets) + ("" if not against else f" − {' '.join(against)}")
        return {
            "model": self.model.cfg.model_name,
            "n_layers": self.model.cfg.n_layers,
            "tokens": self._names(text.tokens[0].tolist()),
            "targets": targets,
            "against": against,
            "title": title or "metric",
            "probability": float(self.runs.session.logits[0, -1].float().softmax(-1)[list(self.wanted.targets)].sum()),
            "metric": self.runs.plain,
            "corrupt": None if corrupt is None else self._names(corrupt.tokens[0].tolist()),
            "frozen": self.frozen,
            "completeness": self.completeness,
            "runs": self.runs.runs,
        }

    def _names(self, ids: Sequence[int]) -> list[str]:
        return [str(token) if self.model.tokenizer is None else str(self.model.to_string(token)) for token in ids]


def _kept(x: Tensor, hook: HookPoint, *, kept: Sequence[tuple[int, int]], other: Tensor) -> Tensor:
    """``x`` [1,T,H,...] at ``kept`` tokens and heads, ``other`` [T,H,...] elsewhere."""
    left = other[None].to(x).clone()
    for position, head in kept:
        left[:, position, head] = x[:, position, head]
    return left


def _kind(model: HookedRecurrent, name: str) -> FeatureType | None:
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


def _order(effects: pd.Series) -> pd.Index:
    """Rows by the size of their effect, largest first."""
    return effects.abs().sort_values(ascending=False, kind="stable").index


def _node_table(kind: FeatureType, layer: int, effect: Tensor) -> pd.DataFrame:
    """Nodes of one kind in one block, with predictions [T,H] or [T]."""
    values = effect.detach().double().cpu().reshape(len(effect), -1)
    nodes = []
    for position, head in np.ndindex(*values.shape):
        nodes.append(Node(kind, layer, head if effect.ndim == 2 else -1, position))
    return _rows(nodes, values.flatten().tolist(), np.nan)


def _rows(nodes: Sequence[Node], predicted: Sequence[float], measured: np.ndarray | float) -> pd.DataFrame:
    table = pd.DataFrame(nodes, columns=list(Node._fields))
    ids = [node.node_id for node in nodes]
    return table.assign(node_id=ids, predicted=predicted, measured=measured)[list(NODE_COLUMNS)]


def _node(row: object) -> Node:
    """The node of a row of a table."""
    return Node(*(getattr(row, name) for name in Node._fields))


def _edges(sources: Mapping[Node, float], target: str, port: PortName, read: int, measured: np.ndarray) -> pd.DataFrame:
    """A row for each source; the last ones may have no measurement."""
    table = {
        "source": [source.node_id for source in sources],
        "target": target,
        "port": port,
        "read": read,
        "predicted": list(sources.values()),
        "measured": np.pad(measured, (0, len(sources) - len(measured)), constant_values=np.nan),
    }
    return pd.DataFrame(table)


def _wholes(model: HookedRecurrent, saes: Sequence[HeadSAE]) -> list[Node]:
    """What dictionaries take apart: the writes or the states of a head, of no token yet."""
    wholes: list[Node] = []
    for sae in saes:
        metadata = getattr(getattr(sae, "cfg", None), "metadata", None)
        name = str(getattr(metadata, "hook_name", None))
        match = re.fullmatch(r"blocks\.(\d+)\.mixer\.heads\.(\d+)\.hook_(write|state)_vec", name)
        if match is None:
            raise InputError(
                "saes: expected dictionaries of one head's writes or states (blocks.L.mixer.heads.H.hook_write_vec or "
                f"hook_state_vec), got {name!r}"
            )
        model.check_hook_name(name)
        wholes.append(Node("state" if match[3] == "state" else "write", int(match[1]), int(match[2])))
    heads = [f"L{whole.layer}H{whole.head}" for whole in wholes]
    if len(heads) > len({*heads}):
        raise InputError(f"saes: expected one dictionary of each head, got those of {', '.join(heads)}")
    return wholes


def _parts_of(sae: HeadSAE, whole: Node, text: Text) -> dict[Node, Tensor]:
    """A write or a state [K,V], its active atoms, the error, and what the dictionary adds to all."""
    r = text.recurrences[whole.layer].select(heads=whole.head)
    matrices = r.states if whole.feature_type == "state" else r.write
    matrix = matrices(positions=whole.position)[0, 0, 0]
    activations = sae.encode(matrix.flatten()[None].to(sae.b_dec))[0]
    active = activations.nonzero().flatten().tolist()
    alone = activations.new_zeros(len(active) + 1, len(activations))
    for row, feature in enumerate(active):
        alone[row, feature] = activations[feature]
    *decoded, bias = sae.decode(alone).to(matrix).view(-1, *matrix.shape)
    names = [whole._replace(feature_type="atom", feature=feature) for feature in active]
    parts = {name: atom - bias for name, atom in zip(names, decoded)}
    parts[whole._replace(feature_type="bias")] = bias
    rest = matrix - sum(parts.values())
    return parts | {whole._replace(feature_type="error"): rest, whole: matrix}


def _labels(sae: HeadSAE, atoms: pd.DataFrame) -> dict[str, str]:
    """Names of atoms by node, of a dictionary of pairs with words."""
    if getattr(sae.cfg.metadata, "labels", None) is None:
        return {}
    names = [pair_name(cast(PairDictionary, sae), feature) for feature in atoms.feature.tolist()]
    return dict(zip(atoms.node_id.tolist(), names))
