"""What nodes are made of: key, value and gate of a write and the query that reads it, and those of softmax heads.

A factor of a recurrent layer at a token depends on as many tokens of the stream as its convolution (or token shift)
sees, and what a softmax head hands on at a token on one row of its pattern. So a block is run again on these alone,
with nodes taken off its stream, and exactly.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from hookpoints.circuit.nodes import ThroughNorm
from hookpoints.circuit.norms import constants
from hookpoints.circuit.stream import Decomposition, Text, moved, reads_of
from hookpoints.circuit.tables import Change, Node, PortName, runs_of
from hookpoints.layer.context import StopForward, scope
from hookpoints.layer.intercept import running, wrap_forward
from hookpoints.memory.caches import reach
from hookpoints.model.inputs import cache_of, continuing
from hookpoints.recurrence.recurrence import Recurrence
from hookpoints.scopes import scoped

if TYPE_CHECKING:
    from transformer_lens.hook_points import HookPoint

    from hookpoints.hooks.guard import Hook, HookSpecs, Name
    from hookpoints.layer.context import Recorded
    from hookpoints.layer.intercept import Function
    from hookpoints.model.recurrent import HookedRecurrent

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
    readers: Tensor | None = None
    """[T',K], what tokens from ``at`` on read of the state after it, or [1,1] of what a query reads."""

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

    def effects(self, taken: Tensor, through: ThroughNorm | None) -> Tensor:
        """[N], what the metric loses with sides ``taken`` off: exactly ``through`` the norm of the head, which is that
        from the token of the write on."""
        if through is None or self.readers is None:
            return self.worth(taken)
        reads = self.readers @ taken
        first = self.at - self.node.position
        return through.select(slice(None), slice(first, first + reads.shape[1])).of_reads(reads)


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
    others: dict[PortName, Tensor] = {"value": key, "key": value}
    if position > 0:
        others["gate"] = own.states(positions=position - 1)[0, 0, 0]
    ports = [Port(node, name, position, of_write, other, readers) for name, other in others.items()]
    if readers is None or r.read_before_write:
        return ports
    gradient = gradient[0, position:, 0].to(of_write)
    if read is None:
        effects = ((readers @ key.T) * (gradient @ value.T)).sum(1)
        read = position + int(effects.abs().argmax())
    carried = own.propagate(key, position, 0)[0, :, read - position]
    found = own.scale * carried.T @ value
    return [*ports, Port(node, "query", read, gradient[read - position], found, torch.ones_like(found[:1, :1]))]


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
    given = torch.stack([*taken])
    if node.feature_type == "write" and port.name != "query":
        name = f"blocks.{node.layer}.mixer.heads.{node.head}.hook_write"
        write = clean.recurrences[node.layer].write(heads=node.head, positions=node.position)[0, 0, 0]
        return [Change(node.layer, port.at, {name: left}) for left in write - given]
    at_token = clean.at(node.hook)[port.at]
    value = at_token if node.head < 0 else at_token[node.head]
    return [Change(node.layer, port.at, {node.hook: left}, node.head) for left in value - given.reshape(-1, len(value))]


# ------------------------------------------------------------------------------------------------ runs of a block


class Inputs(NamedTuple):
    """What enters a block at some tokens."""

    layer: int
    windows: Sequence[range]
    """Tokens of each row, as many in each."""
    entering: Tensor
    """[N,W,2,D], the stream, and the token embeddings, for blocks that read these again."""
    missing: Tensor | float = 0.0
    """[N,W,D], what is taken off what the block's own heads add, before an MLP reads it."""

    def part(self, rows: slice, token: int) -> Inputs:
        """One token of some rows."""
        windows = [range(window[token], window[token] + 1) for window in self.windows[rows]]
        return Inputs(self.layer, windows, self.entering[rows, token : token + 1])


class BlockRun(NamedTuple):
    """A run of a part of one block."""

    value: Tensor
    """[N,W,...], what the hook saw at which it ended."""
    seen: Mapping[int, Recorded]
    """Of its recurrence, where that came before."""


class Attending:
    """Meets the function that computes the attention of a block, which is given ``others``; without any the pass ends
    there."""

    projection = None

    def __init__(self, module: nn.Module, others: Mapping[str, Tensor | None]):
        self.module = module
        self.others = others
        self.open = True
        self.arguments: Mapping[str, object] = {}

    def handle(self, op: Function, arguments: Mapping[str, object]) -> object:
        """As of `OpHandler`."""
        self.arguments = arguments
        query = cast(Tensor, arguments["query"])
        if not self.others:
            raise StopForward(query)
        others = {name: x if x is None else x.expand(len(query), -1, -1, -1) for name, x in self.others.items()}
        return op(**{**arguments, **others})


@scoped
def attending(model: HookedRecurrent, layer: int, others: Mapping[str, Tensor | None]) -> Iterator[Attending]:
    """In this scope attention of one block is met."""
    block = model.attachment.layout.blocks[layer].block
    handler = Attending(block, others)

    def around(forward: Function, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        return running(handler, forward, args, kwargs)

    with scope(model.attachment) as opened:
        unwrap = wrap_forward(block, around, opened.active)
        try:
            yield handler
        finally:
            unwrap()


@dataclass(frozen=True)
class Blocks:
    """Runs single blocks of a model on a few tokens of one text."""

    decomposition: Decomposition
    reach: int | None
    """How many tokens before a token its factors depend on; None: all."""

    @property
    def model(self) -> HookedRecurrent:
        return self.decomposition.model

    @property
    def text(self) -> Text:
        return self.decomposition.clean

    def windows(self, layer: int, spans: Sequence[range], mixes: bool = True) -> list[range]:
        """Tokens of the block's input on which what it makes of each span depends, as many of each. ``mixes``: whether
        through its attention, if it has any."""
        reach = self.reach
        if reach is None or (mixes and self.model.attachment.layout.blocks[layer].attn_namespace is not None):
            reach = self.text.tokens.shape[1]
        width = max(span.stop - max(0, span.start - reach) for span in spans)
        firsts = [max(0, span.stop - width) for span in spans]
        return [range(first, first + width) for first in firsts]

    def windows_of_ports(self, ports: Sequence[Port]) -> list[range]:
        """The same of ports, as many tokens for those of one kind in one block."""
        windows: list[range] = []
        for rows in runs_of(port.node[:2] for port in ports):
            kind, layer, *_ = ports[rows[0]].node
            spans = [range(ports[row].at, ports[row].at + 1) for row in rows]
            windows += self.windows(layer, spans, kind != "mlp")
        return windows

    def values(self, name: str, windows: Sequence[range]) -> Tensor:
        """[N,W,...], what a hook saw in windows."""
        return _in_windows(self.text.at(name), windows)

    def inputs(self, layer: int, windows: Sequence[range]) -> Inputs:
        """What enters a block in the text."""
        names = (f"blocks.{layer}.hook_resid_pre", "hook_embed")
        return Inputs(layer, windows, torch.stack([self.values(name, windows) for name in names], 2))

    def run(self, until: str | None, inputs: Inputs, fwd_hooks: HookSpecs = (), gradients: bool = False) -> BlockRun:
        """Run a block as far as the hook ``until``; None: to where something else ends the run."""
        layer = inputs.layer
        tokens = _in_windows(self.text.tokens[0], inputs.windows)
        attachment = self.model.attachment
        recurrent = [layer] if layer in self.model.cfg.layers else []
        recording = self.model.recording(recurrent, gradients=gradients)
        changed = scope(attachment, backend="recurrence", embedded=inputs.entering[:, :, 1])

        def stop(x: Tensor, hook: HookPoint) -> None:
            raise StopForward(x)

        hooks = self.model.hooks([*fwd_hooks, *([(until, stop)] if until else [])])
        with torch.set_grad_enabled(gradients), changed, recording as seen, hooks:
            stream = inputs.entering[:, :, 0].to(self.text.values[f"blocks.{layer}.hook_resid_pre"].device)
            # Without a cache transformers waits for the device, to see whether positions are those of several texts.
            cached = not gradients and layer not in self.model.cfg.attention
            value = self.model(stream, start_at_layer=layer, stop_at_layer=layer + 1, tokens=tokens, use_cache=cached)
        return BlockRun(value.to(self.text.tokens.device), seen)

    def sides(self, ports: Sequence[Port], inputs: Inputs, gradients: bool = False) -> list[Tensor]:
        """Of each row of ``inputs`` the side of its port; ports are of one kind in one block, equal ones follow each
        other."""
        node = ports[0].node
        block = f"blocks.{node.layer}"
        if node.feature_type == "write":
            ran = self.run(f"{block}.mixer.hook_read", inputs, gradients=gradients)
            (r,) = moved({0: ran.seen[node.layer].recurrence}, ran.value.device).values()

            def side(port: Port, rows: slice, token: int) -> Tensor:
                return port.of(r.select(rows=rows, tokens=slice(token + 1)))

        elif node.feature_type == "mlp":
            added = self.run(f"{block}.hook_mlp_out", inputs, self._fixed_heads(inputs), gradients).value

            def side(port: Port, rows: slice, token: int) -> Tensor:
                return added[rows, token]

        else:
            changed = self._attention_arguments(inputs, gradients)
            plain = self._attention_arguments(self.inputs(node.layer, inputs.windows[:1]))

            def side(port: Port, rows: slice, token: int) -> Tensor:
                seen = dict(plain)
                here = inputs.part(rows, token)
                if port.name in seen:
                    seen[port.name] = changed[port.name][rows]
                    here = self.inputs(node.layer, here.windows)
                with attending(self.model, node.layer, _of_query(seen, token)):
                    return self.run(f"{block}.attn.hook_z", here, (), gradients).value[:, 0, port.node.head]

        sides: list[Tensor] = []
        for rows in runs_of(map(id, ports)):
            port = ports[rows[0]]
            sides += side(port, slice(rows[0], rows[-1] + 1), port.at - inputs.windows[rows[0]].start)
        return sides

    def _attention_arguments(self, inputs: Inputs, gradients: bool = False) -> dict[str, Tensor]:
        """The query, key and value that attention of a block is given, [N,H,W,K], and the mask, if there is one."""
        with attending(self.model, inputs.layer, {}) as met:
            self.run(None, inputs, (), gradients)
        names = ("query", "key", "value", "attention_mask")
        return {name: x for name in names if isinstance(x := met.arguments[name], Tensor)}

    def _fixed_heads(self, inputs: Inputs) -> list[tuple[Name, Hook]]:
        """Hooks that leave what the heads of a block add as it is in the text, but for what is missing."""
        names = self.decomposition.heads_out(inputs.layer)

        def put(x: Tensor, hook: HookPoint) -> Tensor:
            added = self.values(str(hook.name), inputs.windows)
            return (added - inputs.missing if hook.name == names[0] else added).to(x)

        return [(name, put) for name in names]

    def gradients(self, ports: Sequence[Port]) -> Tensor:
        """[N,T,2,D], of ports by what enters their block: by the stream, and by the token embeddings; the latter 0 but
        for blocks that read them again (RWKV-7's first values). Cost: each block on a few tokens, and back."""
        embedded = self.text.at("hook_embed")
        length, width = embedded.shape
        found = embedded.new_zeros(len(ports), length, 2, width)
        for rows in runs_of(port.node[:2] for port in ports):
            alike = [ports[row] for row in rows]
            plain = self.inputs(alike[0].node.layer, self.windows_of_ports(alike))
            leaf = plain.entering.requires_grad_()
            with torch.enable_grad(), constants():
                sides = self.sides(alike, plain, gradients=True)
                total = torch.cat([port.worth(side[None]) for port, side in zip(alike, sides)]).sum()
            if not total.requires_grad:  # a gate that is a constant
                continue
            (gradients,) = torch.autograd.grad(total, leaf)
            for row, window, gradient in zip(rows, plain.windows, gradients):
                found[row, window.start : window.stop] = gradient
        return found


def _in_windows(x: Tensor, windows: Sequence[range]) -> Tensor:
    """[N,W,...] of [T,...]."""
    return torch.stack([x[window.start : window.stop] for window in windows])


def _of_query(arguments: Mapping[str, Tensor], token: int) -> dict[str, Tensor | None]:
    """What attention of one token is given."""
    here = slice(token, token + 1)
    before = slice(token + 1)
    places = {"query": (here,), "key": (before,), "value": (before,), "attention_mask": (here, before)}
    cut = {name: x[:, :, *places[name]] for name, x in arguments.items()}
    return {"attention_mask": None, **cut}


@torch.no_grad()
def reach_of(model: HookedRecurrent, tokens: Tensor) -> int | None:
    """How many tokens before a token its factors depend on, from what a cache keeps after one token; None where it
    does not tell."""
    one = tokens[:, :1].to(model.hf_model.device)
    inputs = model.attachment.new_cache() | continuing(model.hf_model, None, 0, one)
    return reach(cache_of(model.hf_model(input_ids=one, **inputs))) or None


def _placed_values(values: Tensor, tokens: Tensor, width: int) -> Tensor:
    """[N,W,D], each of ``values`` [N,D] at its token, if that is one of W, and 0 elsewhere."""
    is_there = torch.arange(width, device=values.device) == tokens[:, None]
    return values[:, None] * is_there[..., None]


@dataclass(frozen=True)
class NodeSources:
    """Takes nodes off the streams of a text. With a corrupt text a node is replaced by that of it instead."""

    blocks: Blocks
    corrupt: Text | None

    @property
    def text(self) -> Text:
        return self.blocks.text

    def other(self, name: str) -> Tensor:
        """[T,...], what replaces the values of a hook: those of the corrupt text, or 0."""
        return torch.zeros_like(self.text.at(name)) if self.corrupt is None else self.corrupt.at(name)

    def replacing(self, node: Node) -> dict[str, Tensor]:
        """[T,...] by the names of hooks, what replaces a node at its token and head: of a write value and key."""
        if node.feature_type == "write":
            mixer = f"blocks.{node.layer}.mixer"
            if self.corrupt is None:
                return {f"{mixer}.hook_write_value": torch.zeros_like(self.text.recurrences[node.layer].u[0])}
            r = self.corrupt.recurrences[node.layer]
            return {f"{mixer}.hook_write_value": r.u[0], f"{mixer}.hook_write_key": r.k[0]}
        names = ("hook_embed", "blocks.0.hook_resid_pre") if node.feature_type == "embedding" else (node.hook,)
        return {name: self.other(name) for name in names}

    def knows(self, source: Node) -> bool:
        """Whether it is known what a node gives to the stream."""
        if source.feature_type == "attn" and source.head >= 0:  # a norm may take all heads together
            return self.blocks.model.head_outputs(source.layer, "attn").norm is None
        return source.feature_type in ("embedding", "write", "mlp", "attn", "stream")

    @torch.no_grad()
    def sides_without(self, ports: Sequence[Port], sources: Sequence[Sequence[Node]]) -> list[Tensor]:
        """[1+N,...] of each port: as it is, and without each of its sources, the others as they are."""
        asked = [port for port, own in zip(ports, sources) for _ in range(1 + len(own))]
        without = [source for own in sources for source in (_NOTHING, *own)]
        windows = self.blocks.windows_of_ports(asked)
        reads = self.reads(without)
        ends = [*accumulate(map(len, windows))]
        sides: list[Tensor] = []
        for rows in runs_of(end // _TOKENS for end in ends):
            here = slice(rows[0], rows[-1] + 1)
            given = iter(self.given(without[here], windows[here], reads))
            for alike in runs_of(asked[row].node[:2] for row in rows):
                some = slice(rows[alike[0]], rows[alike[-1]] + 1)
                taken = torch.stack([next(given) for _ in alike])
                inputs = self._inputs_without(without[some], asked[some][0].node, windows[some], taken)
                sides += self.blocks.sides(asked[some], inputs)
        found = []
        for own in sources:
            found.append(torch.stack(sides[: 1 + len(own)]))
            del sides[: 1 + len(own)]
        return found

    def _inputs_without(self, sources: Sequence[Node], node: Node, windows: Sequence[range], given: Tensor) -> Inputs:
        """What enters the block of a node in each window without what a source has ``given`` [N,W,D]."""
        plain = self.blocks.inputs(node.layer, windows)
        change = self.text.at("hook_embed") - self.other("hook_embed")
        read_again = [source.position if source.feature_type == "embedding" else -1 for source in sources]
        at, start = torch.tensor([read_again, [window.start for window in windows]], device=change.device)
        taken = torch.stack([given, _placed_values(change[at], at - start, len(windows[0]))], 2)
        own = [source[:2] in (("write", node.layer), ("attn", node.layer)) for source in sources]
        if not any(own):
            return plain._replace(entering=plain.entering - taken)
        is_own = torch.tensor(own, device=given.device)[:, None, None]
        taken[:, :, 0] *= ~is_own
        return plain._replace(entering=plain.entering - taken, missing=given * is_own)

    @torch.no_grad()
    def reads(self, sources: Iterable[Node]) -> dict[Node, Tensor]:
        """[T,V] of each write among sources, what its head reads of it; less what it reads of that of the corrupt text,
        if there is one. Cost: a scan of one value channel for each."""
        writes = sorted({source for source in sources if source.feature_type == "write"})
        found: dict[Node, Tensor] = {}
        for rows in runs_of(write.layer for write in writes):
            own = [writes[row] for row in rows]
            layer = own[0].layer
            places = [(write.head, write.position) for write in own]
            heads, positions = torch.tensor(places, device=self.text.tokens.device).T
            texts = [text.recurrences[layer] for text in (self.text, self.corrupt) if text is not None]
            taken, *others = (reads_of(self.text.recurrences[layer], r, heads, positions) for r in texts)
            found |= dict(zip(own, (taken - sum(others)).unbind(1)))
        return found

    @torch.no_grad()
    def given(self, sources: Sequence[Node], windows: Sequence[range], reads: Mapping[Node, Tensor]) -> list[Tensor]:
        """[W,D] each, what a source gives to the stream at the tokens of its window; less what it gives in the corrupt
        text, if there is one. ``reads`` as `reads` of these sources."""
        order = sorted(range(len(sources)), key=lambda row: (sources[row][:2], len(windows[row])))
        of_rows = [(sources[row].head, sources[row].position, windows[row].start) for row in order]
        table = torch.tensor(of_rows, device=self.text.tokens.device)
        found: dict[int, Tensor] = {}
        for places in runs_of((sources[row][:2], len(windows[row])) for row in order):
            rows = [order[place] for place in places]
            head, position, start = table[places[0] : places[-1] + 1].T
            source = sources[rows[0]]
            if source.feature_type == "write":
                own = [reads[sources[row]] for row in rows]
                given = self._write_outputs(source.layer, head, own, [windows[row] for row in rows])
            else:
                added = self._added_values(source, head, position)
                given = _placed_values(added, position - start, len(windows[rows[0]]))
            found |= dict(zip(rows, given))
        return [found[row] for row in range(len(sources))]

    def _added_values(self, source: Node, head: Tensor, position: Tensor) -> Tensor:
        """[N,D], what nodes of the kind and block of one add to the stream at their tokens, more than in the corrupt
        text."""
        if source.feature_type == "mlp":
            texts = (self.text, self.corrupt)
            added = [self.blocks.decomposition.mlp_out(source.layer, text)[position] for text in texts if text]
            return added[0] - sum(added[1:])
        name = "blocks.0.hook_resid_pre" if source.feature_type == "embedding" else source.hook
        value = self.text.at(name) - self.other(name)
        if source.head < 0:
            return value[position]
        to_stream = self.blocks.model.layer_W_O(source.layer, "attn").to(value)
        return torch.einsum("nv,nvd->nd", value[position, head], to_stream[head])

    def _write_outputs(self, layer: int, heads: Tensor, reads: Sequence[Tensor], windows: Sequence[range]) -> Tensor:
        """[N,W,D], what writes of ``heads`` give through the norm of their head in windows: the block's output less
        that without what is read of the write, ``reads`` [T,V] each."""
        longer = self.blocks.windows(layer, windows)
        read = f"blocks.{layer}.mixer.hook_read"
        without = self.blocks.values(read, longer)
        taken = torch.stack([row[window.start : window.stop] for row, window in zip(reads, longer)])
        without[torch.arange(len(heads), device=heads.device), :, heads] -= taken.to(without)

        def put(x: Tensor, hook: HookPoint) -> Tensor:
            return without.to(x)

        added = f"blocks.{layer}.hook_mixer_out"
        ran = self.blocks.run(added, self.blocks.inputs(layer, longer), [(read, put)])
        change = self.blocks.values(added, longer) - ran.value
        starts = [window.start - other.start for window, other in zip(windows, longer)]
        return torch.stack([row[start : start + len(windows[0])] for row, start in zip(change, starts)])
