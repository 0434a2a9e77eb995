"""Direct paths: what a node gives to the nodes above it, and to the logits, while all others are as they were.

One pass answers for all targets. A source is ablated, and all that blocks add besides is put back, so that the stream
above lacks what the source adds and nothing else. What a target would then be is read off, and the logits are those of
the source's path past all nodes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor

from hookpoints.circuit.measure import Measure
from hookpoints.circuit.ports import Port
from hookpoints.circuit.stream import head_kinds, moved
from hookpoints.circuit.tables import Change, Node
from hookpoints.layer.context import Recorded, scope
from hookpoints.layer.intercept import running, wrap_forward
from hookpoints.scopes import scoped

if TYPE_CHECKING:
    from torch import nn
    from transformer_lens.hook_points import HookPoint

    from hookpoints.hooks.guard import Hook, Name
    from hookpoints.layer.intercept import Function
    from hookpoints.model.recurrent import HookedRecurrent

_OUTS = {"write": "hook_mixer_out", "attn": "hook_attn_out", "mlp": "hook_mlp_out"}
"""The hooks that see what a block adds, by the kind of node that adds it."""
_FACTORS = ("query", "key", "value")


class Paths(NamedTuple):
    """What N sources give by their direct paths."""

    ran: list[Node]
    """In the order in which they ran."""
    metrics: Tensor
    """[N], the metric where each has no path past all nodes."""
    sources: list[list[Node]]
    """Of each port those below it, M of them."""
    taken: list[Tensor]
    """Of each port [M,...], what each of these takes off its side."""


class _Seen(NamedTuple):
    """What a pass of 1+N rows leaves, of which the first is the text as it is."""

    hooks: list[tuple[Name, Hook]]
    """Those that put back and note what follows."""
    values: dict[str, Tensor]
    """[1+N,T',...], what softmax heads hand on and MLPs add, by the name of the hook."""
    recorded: dict[int, Recorded]
    """Of recurrent layers."""
    arguments: dict[int, dict[str, Tensor]]
    """What attention of layers would have been given."""


@torch.no_grad()
def direct_paths(model: HookedRecurrent, runs: Measure, changes: Mapping[Node, Change], ports: Sequence[Port]) -> Paths:
    """What sources give to ports above them and to the logits.

    Args:
        changes: what takes each source out.

    Cost: a pass from the token of each source on, and three more where a port is one of a softmax head.
    """
    sources = [*changes]
    order: list[int] = []
    metrics: list[Tensor] = []
    below: list[list[Node]] = [[] for _ in ports]
    taken: list[list[Tensor]] = [[] for _ in ports]
    attending = sorted({port.node.layer for port in ports if port.node.feature_type == "attn"})
    passes: list[_Seen] = []

    @scoped
    def watched(batch: Sequence[int]) -> Iterator[list[tuple[Name, Hook]]]:
        own = [sources[row] for row in batch]
        with _put_back(model, own, max(0, min(source.layer for source in own)), attending) as seen:
            passes.append(seen)
            yield seen.hooks

    for batch, run in runs.runs_of([[change] for change in changes.values()], watched):
        order += batch
        metrics.append(runs.lead.of(run.logits[1:]))
        seen = passes.pop()
        # Of softmax heads the first pass has their gates; their other ports have passes in which one factor is another.
        by_port = {"gate": seen}
        reached = {port.node.layer for port in ports if any(_is_below(sources[row], port) for row in batch)}
        attention_factors = {
            layer: factors for layer, factors in seen.arguments.items() if factors and layer in reached
        }
        for factor in _FACTORS if attention_factors else ():
            replaced = {layer: {factor: factors[factor]} for layer, factors in attention_factors.items()}
            with _put_back(model, [], min(attention_factors), attention_factors, replaced) as by_port[factor]:
                runs.session.run_hooked(1 + len(batch), min(attention_factors), run.start, by_port[factor].hooks)
        recurrences = moved({layer: row.recurrence for layer, row in seen.recorded.items()}, runs.session.tokens.device)
        for port, own, parts in zip(ports, below, taken):
            rows = [row for row, number in enumerate(batch) if _is_below(sources[number], port)]
            if not rows:
                continue
            last = port.at - run.start
            if port.node.feature_type == "write":
                side = port.of(recurrences[port.node.layer].select(tokens=slice(last + 1)))
            else:
                values = by_port.get(port.name, seen).values[port.node.hook][:, last]
                side = (values if port.node.head < 0 else values[:, port.node.head]).to(port.gradient)
            own += [sources[batch[row]] for row in rows]
            parts.append(side[:1] - torch.stack([side[1 + row] for row in rows]))
    nothing = [port.gradient.new_zeros(0, *port.gradient.shape) for port in ports]
    sides = [torch.cat([none, *parts]) for none, parts in zip(nothing, taken)]
    return Paths([sources[row] for row in order], torch.cat([runs.session.logits.new_zeros(0), *metrics]), below, sides)


def _is_below(source: Node, port: Port) -> bool:
    """Whether a source may give to a port: it is in a lower block, or a head in the block of an MLP, at a token that
    the port may see; the stream of a token enters one block."""
    target = port.node
    if source.feature_type == "stream":
        return source.layer == target.layer and source.position <= port.at
    ends = [(node.layer, node.feature_type == "mlp") for node in (source, target)]
    return ends[0] < ends[1] and source.position <= port.at


@scoped
def _put_back(
    model: HookedRecurrent,
    sources: Sequence[Node],
    lowest: int,
    attending: Collection[int],
    replaced: Mapping[int, Mapping[str, Tensor]] | None = None,
) -> Iterator[_Seen]:
    """In this scope a pass of 1+N rows puts back in each what blocks from ``lowest`` on add, as the first row has it,
    but for what the row's source adds; and what attention of ``attending`` layers is given, but for factors that are
    ``replaced``."""
    seen = _Seen([], {}, {}, {layer: {} for layer in attending})
    # What the stream that enters a block lacks of the first row's: what sources below would have added.
    lacking: list[Tensor] = [torch.zeros(())]
    outs_of_sources = [f"blocks.{source.layer}.{_OUTS.get(source.feature_type, '')}" for source in sources]
    own_outs = sorted({*outs_of_sources})
    # Which rows keep what a hook sees, for all hooks in one copy to the device.
    is_own = [[False, *(out == name for out in outs_of_sources)] for name in own_outs]
    own = dict(zip(own_outs, torch.tensor(is_own, device=model.cfg.device)))

    def enter(x: Tensor, hook: HookPoint) -> None:
        lacking[0] = x - x[:1]

    def add(x: Tensor, hook: HookPoint) -> Tensor:
        seen.values[str(hook.name)] = x
        is_kept = own.get(str(hook.name))
        if is_kept is None:
            return x[:1].expand_as(x)
        change = (x - x[:1]) * is_kept.to(x)[:, None, None]
        lacking[0] = lacking[0].to(x) + change
        return x[:1] + change

    def keep(x: Tensor, hook: HookPoint) -> None:
        seen.values[str(hook.name)] = x

    def leave(x: Tensor, hook: HookPoint) -> Tensor:
        return x[:1] + lacking[0].to(x)

    for layer in range(lowest, model.cfg.n_layers):
        outs = [_OUTS[kind.feature_type] for kind in (*head_kinds(model, layer), Node("mlp", layer))]
        ends = {"hook_resid_pre": enter, "attn.hook_z": keep, "hook_resid_post": leave} | dict.fromkeys(outs, add)
        names = {f"blocks.{layer}.{end}": hook for end, hook in ends.items()}
        seen.hooks.extend((name, hook) for name, hook in names.items() if name in model.hook_dict)
    factors = replaced or {}
    with ExitStack() as opened, model.recording() as recorded:
        for layer, own_factors in seen.arguments.items():
            opened.enter_context(_attention_put_back(model, layer, own_factors, factors.get(layer, {})))
        yield seen._replace(recorded=recorded)


class _Attending:
    """Meets the function that computes the attention of a block."""

    projection = None

    def __init__(self, module: nn.Module, factors: dict[str, Tensor], replaced: Mapping[str, Tensor]):
        self.module = module
        self.open = True
        self.factors = factors
        self.replaced = replaced

    def handle(self, op: Function, arguments: Mapping[str, object]) -> object:
        """As of `OpHandler`."""
        self.factors |= {factor: cast(Tensor, arguments[factor]) for factor in _FACTORS}
        plain = {factor: x[:1].expand_as(x) for factor, x in self.factors.items()}
        return op(**{**arguments, **plain, **self.replaced})


@scoped
def _attention_put_back(
    model: HookedRecurrent, layer: int, factors: dict[str, Tensor], replaced: Mapping[str, Tensor]
) -> Iterator[None]:
    """In this scope attention of one block is given what the first row has, and ``replaced``; what it would have been
    given is noted in ``factors``."""
    block = model.attachment.layout.blocks[layer].block

    def around(forward: Function, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        return running(_Attending(block, factors, replaced), forward, args, kwargs)

    with scope(model.attachment) as opened:
        unwrap = wrap_forward(block, around, opened.active)
        try:
            yield
        finally:
            unwrap()
