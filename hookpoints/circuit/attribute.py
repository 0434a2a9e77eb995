"""From a text to a graph: predict all nodes, measure the largest, and take apart what made these."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import pandas as pd
import torch
from torch import Tensor

from hookpoints.circuit.atoms import HeadSAE, atoms_of, parents_of, taken_apart
from hookpoints.circuit.graph import Graph
from hookpoints.circuit.measure import LogitLead
from hookpoints.circuit.nodes import Token, check_is_text, logits_of, one_sequence, same_length
from hookpoints.circuit.tables import EDGE_COLUMNS, NODE_COLUMNS, largest, node_of
from hookpoints.circuit.task import Pair, Task, case_of, task_of
from hookpoints.circuit.tracing import Tracing
from hookpoints.errors import InputError, PredictionWarning, UnsupportedModelError
from hookpoints.model.refused import refusing_circuit_tracer
from hookpoints.scopes import own_gradients

if TYPE_CHECKING:
    from hookpoints.model.recurrent import HookedRecurrent

_CHEAP = 2**15
"""Nodes times tokens up to which all nodes are measured."""


@refusing_circuit_tracer
def attribute(
    text: str | Tensor,
    model: HookedRecurrent,
    attribution_targets: Sequence[Token] | Token | None = None,
    against: Token | Sequence[Token] | None = None,
    measure: int | None = None,
    *,
    corrupt: str | Tensor | None = None,
    saes: Sequence[HeadSAE] = (),
    frozen: bool = False,
    targets: int = 8,
) -> Graph:
    """Why a model says something: the writes that made it, and what made those writes.

    Gradients predict what deleting each write, softmax head, MLP and embedding takes off the metric
    (`write_attribution` says how); the largest are then deleted, each in its own run. The nodes of the largest measured
    effects are the sources of edges: a run without the source, in which all that other nodes add is put back, has what
    each port then is. Its change times the gradient ranks the edges; the largest are measured: the write is replaced by
    what it becomes.

    Args:
        text: one sequence, a string or tokens [1,T].
        attribution_targets: tokens whose mean logit after the last token is explained. None: the most likely one.
        against: the token or tokens whose logit is taken off. None: the mean of all logits.
        measure: how many writes are deleted, one run each, and two fifths as many heads, MLPs and embeddings each;
            and 20 of the other writes, drawn at random. Half of them by predictions, the others by a bound of these.
            None: all nodes while that is cheap, up to about 35 tokens in the models that ship, and 50 of longer texts.
        corrupt: another text of as many tokens; nodes are replaced by those of the corrupt text instead of deleted.
            The best first thing to try, since predictions then hold best.
        saes: dictionaries of writes or of states (SAELens' interface), one of a head. Of writes, those that get edges
            are taken apart into atoms, an error and the dictionary's bias; of states, that of the token through whose
            read the head matters most.
        frozen: as of `write_attribution`, for saturated answers.
        targets: so many of the measured writes get edges, as many MLPs, and a quarter as many softmax heads.

    Raises:
        InputError: several sequences, training mode, a model that was loaded in inference mode, a target that the
            tokenizer splits or that is no token, a corrupt text that equals the text or has another length, or two
            dictionaries of one head.
        UnknownHookError: a dictionary of a head that the model does not have.
        UnsupportedModelError: the blocks add to no one residual stream.

    Warns (`PredictionWarning`) of quantized weights.

    Cost: five passes for the nodes, about 0.2 for each measurement, and 64 for the edges or four times that with edges
    into softmax heads; `graph.check` tells how far to believe predictions.
    It leaves inference mode and autocast for its own passes, and other threads may run the model meanwhile.
    """
    check_is_text(text)
    with own_gradients(model.cfg.device.type):
        tokens = one_sequence(model, text)
        if not model.attachment.layout.is_chain:
            raise UnsupportedModelError(
                f"{model.cfg.model_name}: expected blocks that add to one residual stream, got others (several streams "
                "side by side), whose parts do not add up; write_attribution works on this model"
            )
        # What is explained: by how much some tokens lead others; by default what the model says next.
        donor = None if corrupt is None else same_length(model, corrupt, tokens)
        if attribution_targets is None:
            with torch.no_grad():
                attribution_targets = int(logits_of(model, tokens, last=True)[0, -1].argmax())
        target_ids = _token_ids(model, attribution_targets, "attribution_targets")
        lead = LogitLead(target_ids, () if against is None else _token_ids(model, against, "against"))
        if (measure is not None and measure < 1) or targets < 0:
            raise InputError(f"measure and targets: expected at least 1 and 0, got {measure} and {targets}")
        if getattr(model.hf_model, "is_quantized", False):
            warnings.warn(
                f"{model.cfg.model_name} has quantized weights: gradients are those of rounded weights, and some "
                "backends give none. Load it in bfloat16 to compare",
                PredictionWarning,
                stacklevel=3,
            )
        # The plain pass and its gradients rank all nodes; runs measure the largest.
        parents = parents_of(model, saes)
        tracing = Tracing.of(model, tokens, lead, donor, frozen)
        nodes = tracing.nodes
        tracing.measure_nodes(50 if measure is None and len(nodes) * tokens.shape[1] > _CHEAP else measure)
        # Edges lead into the largest nodes of each kind.
        writes = nodes[nodes.feature_type == "write"]
        heads = nodes[(nodes.feature_type == "attn") & (nodes["head"] >= 0)]
        mlps = nodes[nodes.feature_type == "mlp"]
        explained = pd.concat([largest(writes, targets), largest(heads, targets // 4), largest(mlps, targets)])
        best = [node_of(row) for row in explained.itertuples()]
        edges = [tracing.edges(best)]
        # Writes of heads with a dictionary are taken apart into atoms.
        tables = [nodes]
        for sae, parent in zip(saes, parents):
            for node in taken_apart(tracing, parent, best, writes):
                parts, into = atoms_of(tracing, sae, node)
                tables.append(parts)
                edges.append(into)
        return Graph(
            nodes=pd.concat(tables, ignore_index=True)[list(NODE_COLUMNS)].astype(NODE_COLUMNS),
            edges=pd.concat(edges, ignore_index=True).astype(EDGE_COLUMNS),
            metadata=tracing.metadata(),
            tracer=tracing,
        )


def attribute_task(
    pairs: Sequence[Pair | tuple[str | Tensor, str | Tensor, Token, Token]],
    model: HookedRecurrent,
    roles: Sequence[Sequence[str]] | None = None,
    measure: int | None = None,
) -> Task:
    """The circuit of a task: the writes that matter in all texts of one form, by the role of their token.

    Args:
        pairs: (text, corrupt text of as many tokens, target, against) of each case, as of `attribute`.
        roles: of each pair the name of each token's role, the same names in all; a role may have several tokens. None:
            the position, of texts of one template that all have as many tokens.
        measure: as of `attribute`.

    Raises:
        InputError: no pairs, texts of several lengths without roles, or another number of roles than of tokens; and
            what `attribute` raises.

    Cost: that of a graph without edges for each pair.
    """
    for text, corrupt, *_ in pairs:  # all of them, before the first pass
        same_length(model, corrupt, one_sequence(model, text))
    cases = []
    for row, (text, corrupt, target, against) in enumerate(pairs):
        graph = attribute(text, model, [target], against=against, corrupt=corrupt, measure=measure, targets=0)
        positions = map(str, range(len(cast("Sequence[str]", graph.metadata["tokens"]))))
        answer = *_token_ids(model, target, "target"), *_token_ids(model, against, "against")
        cases.append(case_of(graph, answer, list(positions) if roles is None else roles[row]))
    return task_of(cases)


def _token_ids(model: HookedRecurrent, tokens: Sequence[Token] | Token, name: str) -> tuple[int, ...]:
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
