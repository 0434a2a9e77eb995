"""What nodes are made of: key, value and gate of a write and the query that reads it, and those of softmax heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, cast

import torch
from torch import Tensor

from hookpoints.circuit.stream import Text
from hookpoints.circuit.tables import Change, Node, PortName
from hookpoints.recurrence.recurrence import Recurrence

if TYPE_CHECKING:
    pass

_TOKENS = 2**13
"""Tokens of a block at once."""
_NOTHING = Node("embedding")
"""That of no token, which gives nothing, so that all is as it is without it."""


class Port(NamedTuple):
    """One side of a node, and what it does to the metric.

    Those of a write are the write where its value or its key alone is another, what a query reads of it, and its gate:
    what decay and erase leave of the state before it. Those of a softmax head [V] are what it hands on where its
    values, its keys, its query or its gate alone are others; the pattern is computed again. An MLP has one [D], what
    it adds where its input is another.
    """

    node: Node
    name: PortName
    at: int
    """Token whose factor it is."""
    gradient: Tensor
    """Of the metric by the side."""
    other: Tensor | None = None
    """What a factor meets: the key [R,K] of a value, the value [R,V] of a key, the state [K,V] before a gate, and for a
    query the write [K,V] as the transitions since have left it, times the scale of reads."""

    def of(self, r: Recurrence) -> Tensor:
        """The side of a write at the last token of ``r`` [N,...]: [N,K,V], what its value, key or gate gives to the
        state after it, or [N,1,V], what its query reads."""
        other = cast(Tensor, self.other)
        if self.name == "gate":
            states = other.expand(r.B, 1, -1, -1)
            last = r.select(heads=self.node.head, tokens=slice(r.T - 1, r.T), initial_state=states)
            side = last.replace(u=torch.zeros_like(last.u)).final_state()[:, 0]
        else:
            factor = {"value": r.u, "key": r.k, "query": r.q}[cast(Literal["value", "key", "query"], self.name)]
            side = factor[:, -1, self.node.head].reshape(r.B, -1, factor.shape[-1]).to(other)
            side = other.mT @ side if self.name == "value" else (side.mT if self.name == "key" else side) @ other
        return side.to(self.gradient)

    def worth(self, sides: Tensor) -> Tensor:
        """[N], what sides give to the metric, to first order."""
        return (sides * self.gradient).flatten(1).sum(1)


# ------------------------------------------------------------------------------------------------ ports of a write


@torch.no_grad()
def ports_of(node: Node, r: Recurrence, at_reads: Tensor, read: int | None = None) -> list[Port]:
    """The ports of a write: value, key, gate, and the query of the token that reads it.

    Args:
        r: the layer's factors.
        at_reads: [1,T,H,V], gradients of the metric by what heads read.
        read: the reading token; None: that through which the write matters most, to first order.
    """
    position = node.position
    own = r.select(heads=node.head)
    gradient = at_reads[:, :, node.head : node.head + 1]
    if r.rates is None:
        readers = _reads_of_state(own, position)
        of_write = readers.T @ gradient[0, position:, 0].to(readers)  # [K,V]
    else:
        readers = None
        of_write = own.adjoint(gradient).states(positions=r.T - 1 - position)[0, 0, 0]
    key, value = (torch.atleast_2d(side[0, position, 0]).to(of_write) for side in (own.k, own.u))
    met_factors: dict[PortName, Tensor] = {"value": key, "key": value}
    if position > 0:
        met_factors["gate"] = own.states(positions=position - 1)[0, 0, 0]
    ports = [Port(node, name, position, of_write, other) for name, other in met_factors.items()]
    if readers is None or r.read_before_write:
        return ports
    gradient = gradient[0, position:, 0].to(of_write)
    if read is None:
        effects = ((readers @ key.T) * (gradient @ value.T)).sum(1)
        read = position + int(effects.abs().argmax())
    carried = own.propagate(key, position, 0)[0, :, read - position]
    held = own.scale * carried.T @ value
    return [*ports, Port(node, "query", read, gradient[read - position][None], held)]


def _reads_of_state(own: Recurrence, position: int) -> Tensor:
    """[T',K], what each token from ``position`` on reads of the state of one head after ``position``."""
    length = own.T - position
    single = own.q.new_zeros(1, own.T, 1, length, dtype=own.dtype)
    single[0, position:, 0] = torch.eye(length, device=single.device)
    return own.adjoint(single).states(positions=length - 1)[0, 0, 0].T


def has_ports(node: Node) -> bool:
    """Whether it is a write, a softmax head or an MLP."""
    return node.feature_type in ("write", "mlp") or (node.feature_type == "attn" and node.head >= 0)


def ports_of_output(node: Node, at_output: Tensor) -> list[Port]:
    """The ports of a softmax head, or the port of an MLP, at a token.

    Args:
        at_output: [1,T,H,V] or [1,T,D], gradients of the metric by what heads hand on, or the MLP adds.
    """
    at_token = at_output[0, node.position]
    if node.feature_type == "mlp":
        return [Port(node, "input", node.position, at_token)]
    names: tuple[PortName, ...] = ("value", "key", "query", "gate")
    return [Port(node, name, node.position, at_token[node.head]) for name in names]


def change_for(port: Port, clean: Text, taken: Sequence[Tensor]) -> list[Change]:
    """For each of ``taken`` [...], what takes it off the side of a port and leaves the other ports alone."""
    if not len(taken):
        return []
    node = port.node
    sides = torch.stack([*taken])
    if node.feature_type == "write" and port.name != "query":
        name = f"blocks.{node.layer}.mixer.heads.{node.head}.hook_write"
        write = clean.recurrences[node.layer].write(heads=node.head, positions=node.position)[0, 0, 0]
        return [Change(node.layer, port.at, {name: left}) for left in write - sides]
    at_token = clean.at(node.hook)[port.at]
    value = at_token if node.head < 0 else at_token[node.head]
    return [Change(node.layer, port.at, {node.hook: left}, node.head) for left in value - sides.reshape(-1, len(value))]
