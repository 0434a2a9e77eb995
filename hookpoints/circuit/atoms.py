"""Atoms as nodes: a write or a state taken apart by a dictionary, with what the dictionary misses."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import pandas as pd
import torch
from torch import Tensor

from hookpoints.circuit.tables import Change, Node, by_size, edge_table, node_of, node_table
from hookpoints.errors import InputError

if TYPE_CHECKING:
    from hookpoints.circuit.tracing import Tracing
    from hookpoints.model.recurrent import HookedRecurrent
    from hookpoints.recurrence.recurrence import Recurrence


class HeadSAE(Protocol):
    """SAELens' interface of a dictionary of the writes or the states of one head."""

    @property
    def b_dec(self) -> Tensor: ...

    @property
    def cfg(self) -> Any:
        """Has `metadata` with `hook_name`."""
        ...

    def encode(self, x: Tensor) -> Tensor: ...

    def decode(self, feature_acts: Tensor) -> Tensor: ...


def parents_of(model: HookedRecurrent, saes: Sequence[HeadSAE]) -> list[Node]:
    """What dictionaries take apart: the writes or the states of a head, of no token yet."""
    parents: list[Node] = []
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
        model.check_dictionary(metadata)
        parents.append(Node("state" if match[3] == "state" else "write", int(match[1]), int(match[2])))
    heads = [f"L{parent.layer}H{parent.head}" for parent in parents]
    if len(heads) > len({*heads}):
        raise InputError(f"saes: expected one dictionary of each head, got those of {', '.join(heads)}")
    return parents


def taken_apart(tracing: Tracing, parent: Node, explained: Sequence[Node], writes: pd.DataFrame) -> list[Node]:
    """Which writes or which state of a head a dictionary takes apart: the writes that are explained, or else the
    one of the largest prediction; the state that is read where the head matters most, to first order."""
    place = (parent.layer, parent.head)
    if parent.feature_type == "state":
        name = f"blocks.{parent.layer}.mixer.hook_read"
        read = tracing.text.at(name) - tracing.other(name)
        effects = (read * tracing.gradients[name][0])[:, parent.head].sum(-1)
        before = tracing.text.recurrences[parent.layer].read_before_write
        return [parent._replace(position=max(0, int(effects.abs().argmax()) - before))]
    explained_writes = [node for node in explained if node.feature_type == "write" and (node.layer, node.head) == place]
    of_head = writes[(writes.layer == parent.layer) & (writes["head"] == parent.head)]
    first = of_head.loc[by_size(of_head.predicted)[:1]]
    return explained_writes or [node_of(row) for row in first.itertuples()]


@torch.no_grad()
def atoms_of(tracing: Tracing, sae: HeadSAE, parent: Node) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Nodes of what a dictionary makes of a write or a state: atoms, an error and its bias, and the state itself;
    and edges from the parts into the parent, and from the state to the logit.

    What is taken off the state after a token and what is taken off that token's write change all that follows
    alike, so that one gradient and one edit serve both."""
    reads = tracing.gradients[f"blocks.{parent.layer}.mixer.hook_read"][:, :, parent.head : parent.head + 1]
    texts = [text for text in (tracing.text, tracing.corrupt) if text is not None]
    r, *others = (text.recurrences[parent.layer].select(heads=parent.head) for text in texts)
    gradient = r.adjoint(reads).states(positions=[r.T - 1 - parent.position])[0, 0, 0]
    parts = _parts_of(sae, parent, [r, *others])
    taken = {part: matrix for part, matrix in parts.items() if bool(matrix.any())}
    predicted = {part: float((matrix * gradient).sum()) for part, matrix in taken.items()}
    name = f"blocks.{parent.layer}.mixer.heads.{parent.head}.hook_write"
    write = r.write(positions=parent.position)[0, 0, 0]
    measured = tracing.runs.effects([Change(parent.layer, parent.position, {name: write - x}) for x in taken.values()])
    rows = [
        (part.node_id, *(("logit", "state") if part == parent else (parent.node_id, "part")), -1, predicted[part])
        for part in predicted
    ]
    return node_table(list(predicted), list(predicted.values()), measured), edge_table(rows, measured.tolist())


def _parts_of(sae: HeadSAE, parent: Node, texts: Sequence[Recurrence]) -> dict[Node, Tensor]:
    """[K,V] each, what a write or a state has in a text, more than in the second, if there is one: its atoms, what the
    dictionary adds to all, the error; and a state itself, since a write has its node."""
    is_state = parent.feature_type == "state"
    matrices = [(r.states if is_state else r.write)(positions=parent.position)[0, 0, 0] for r in texts]
    first, *second = sae.encode(torch.stack(matrices).flatten(1).to(sae.b_dec))
    activations = first - sum(second)
    active = activations.nonzero().flatten()
    alone = activations.new_zeros(len(active) + 1, len(activations))
    alone[range(len(active)), active] = activations[active]
    *decoded, bias = sae.decode(alone).to(matrices[0]).view(-1, *matrices[0].shape)
    names = [parent._replace(feature_type="atom", feature=feature) for feature in active.tolist()]
    parts = {name: atom - bias for name, atom in zip(names, decoded)}
    if not second:
        parts[parent._replace(feature_type="bias")] = bias
    matrix = matrices[0] - sum(matrices[1:])
    error = matrix - sum(parts.values())
    return parts | {parent._replace(feature_type="error"): error} | ({parent: matrix} if is_state else {})
