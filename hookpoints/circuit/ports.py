"""What made a write: its key, its value, and the query that reads it, as functions of a few tokens of a block's input.

A factor of a recurrent layer at a token depends on as many tokens of the stream as its convolution (or token shift)
sees. So a block is run again on these tokens alone, with parts of the stream taken off, and exactly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, cast

import torch
from torch import Tensor

from hookpoints.circuit.nodes import ThroughNorm, WayOut, ways_out
from hookpoints.circuit.norms import AFFINE, constants
from hookpoints.circuit.stream import Decomposition, Text, reads_of
from hookpoints.circuit.tables import Change, FeatureType, Node, PortName
from hookpoints.layer.context import StopForward, scope
from hookpoints.memory.caches import reach
from hookpoints.model.inputs import cache_of, continuing
from hookpoints.recurrence.recurrence import Recurrence

if TYPE_CHECKING:
    from transformer_lens.hook_points import HookPoint

    from hookpoints.hooks.guard import Hook, HookSpecs, Name
    from hookpoints.layer.context import Recorded
    from hookpoints.model.recurrent import HookedRecurrent


class Port(NamedTuple):
    """One side of a node, and what it does to the metric.

    Sides of a write are its value, its key, the query that reads it, and its gate: what decay and erase leave of the
    state before it. Those of a softmax head are what it hands on where its values, its keys, its query or its gate
    alone are others; the pattern is computed again. An MLP has one, what it adds where its input is another.
    """

    node: Node
    name: PortName
    at: int
    """Token whose factor it is."""
    gradient: Tensor
    """Of the metric by what `given` is."""
    other: Tensor | None = None
    """What a side meets: the key [R,K] of a value, the value [R,V] of a key, the state [K,V] before a gate, and for a
    query the write [K,V] as the transitions since have left it, times the scale of reads."""
    readers: Tensor | None = None
    """[T',K], what tokens from ``at`` on read of the state after it, or [1,1] of what a query reads."""

    @property
    def entered(self) -> int:
        """The block of which what enters is all that the side depends on: for an MLP, heads of its block count, too."""
        return self.node.layer + (self.name == "input")

    @property
    def is_linear(self) -> bool:
        """Whether it is linear in the stream with norms, gates, activations and patterns held fixed."""
        return self.name == "value" or (self.node.feature_type == "write" and self.name != "gate")

    def of(self, r: Recurrence) -> Tensor:
        """[N,R,K] or [N,R,V], this side of a write at the last token of ``r`` [N,...]; [N,K,V] of a gate."""
        if self.name == "gate" and self.other is not None:
            states = self.other.expand(r.B, 1, -1, -1)
            last = r.select(heads=self.node.head, tokens=slice(r.T - 1, r.T), initial_state=states)
            return last.replace(u=torch.zeros_like(last.u)).final_state()[:, 0]
        factor = {"value": r.u, "key": r.k, "query": r.q}[cast(Literal["value", "key", "query"], self.name)]
        return factor[:, -1, self.node.head].reshape(r.B, -1, factor.shape[-1])

    def given(self, sides: Tensor) -> Tensor:
        """[N,K,V], what sides give to the state after their token, [N,1,V], what a query reads, [N,V], what a softmax
        head hands on, or [N,D], what an MLP adds."""
        sides = sides.to(self.gradient)
        if self.other is None or self.name == "gate":
            return sides
        if self.name == "value":
            return self.other.mT @ sides
        return (sides.mT if self.name == "key" else sides) @ self.other

    def worth(self, sides: Tensor) -> Tensor:
        """[N], what sides give to the metric, to first order."""
        return (self.given(sides) * self.gradient).flatten(1).sum(1)

    def effects(self, taken: Tensor, through: ThroughNorm | None) -> Tensor:
        """[N], what the metric loses with sides ``taken`` off: exactly ``through`` the norm of the head, which is that
        from the token of the write on."""
        if through is None or self.readers is None:
            return self.worth(taken)
        reads = self.readers @ self.given(taken)
        first = self.at - self.node.position
        return through.select(slice(None), slice(first, first + reads.shape[1])).of_reads(reads)


class Maps(NamedTuple):
    """The gradient of a port by what enters its block."""

    stream: Tensor
    """[T,D], by the stream."""
    embedded: Tensor
    """[T,D], by the token embeddings; 0 but for blocks that read them again (RWKV-7's first values)."""
    whole: float
    """The port."""


class Inputs(NamedTuple):
    """What enters a block at some tokens."""

    layer: int
    window: range
    stream: Tensor
    """[N,W,D]."""
    embedded: Tensor
    """[N,W,D], the token embeddings, for blocks that read these again."""
    missing: Tensor | float = 0.0
    """[N,W,D], what is taken off what the block's own heads add, before an MLP reads it."""

    def repeated(self, n: int) -> Inputs:
        """One row, ``n`` times."""
        sizes = (n, -1, -1)
        return self._replace(stream=self.stream.expand(sizes), embedded=self.embedded.expand(sizes))


class BlockRun(NamedTuple):
    """A run of a part of one block."""

    value: Tensor
    """[N,W,...], what the hook saw at which it ended."""
    seen: Mapping[int, Recorded]
    """Of its recurrence, where that came before."""


_TOKENS = 2**12
"""Tokens of a block at once."""


@dataclass(frozen=True)
class Blocks:
    """Runs single blocks of a model on a few tokens of one text."""

    decomposition: Decomposition
    corrupt: Text | None
    reach: int | None
    """How many tokens before a token its factors depend on; None: all."""

    @property
    def model(self) -> HookedRecurrent:
        return self.decomposition.model

    @property
    def text(self) -> Text:
        return self.decomposition.clean

    def window(self, layer: int, at: int, mlp: bool = False) -> range:
        """Tokens of the block's input on which its factors at ``at`` depend, or what its ``mlp`` adds there."""
        mixes = self.model.attachment.layout.blocks[layer].attn_namespace is not None
        if self.reach is None or (mixes and not mlp):
            return range(at + 1)
        return range(max(0, at - self.reach), at + 1)

    def inputs(self, layer: int, window: range) -> Inputs:
        """What enters a block in the text, as one row."""
        names = (f"blocks.{layer}.hook_resid_pre", "hook_embed")
        stream, embedded = (self.text.at(name)[None, window.start : window.stop] for name in names)
        return Inputs(layer, window, stream, embedded)

    def run(self, until: str, inputs: Inputs, fwd_hooks: HookSpecs = (), gradients: bool = False) -> BlockRun:
        """Run a block as far as the hook ``until``."""
        layer = inputs.layer
        tokens = self.text.tokens[:, inputs.window.start : inputs.window.stop].expand(len(inputs.stream), -1)
        attachment = self.model.attachment
        recurrent = [layer] if layer in self.model.cfg.layers else []
        recording = self.model.recording(recurrent, gradients=gradients)
        changed = scope(attachment, backend="recurrence", embedded=inputs.embedded)

        def stop(x: Tensor, hook: HookPoint) -> None:
            raise StopForward(x)

        hooks = self.model.hooks([*fwd_hooks, (until, stop)])
        with torch.set_grad_enabled(gradients), changed, recording as seen, hooks:
            value = self.model(inputs.stream, start_at_layer=layer, stop_at_layer=layer + 1, tokens=tokens)
        return BlockRun(value, seen)

    def sides(self, ports: Sequence[Port], inputs: Inputs, gradients: bool = False) -> list[Tensor]:
        """[N,...] of each port of one node at the last token of ``inputs``."""
        node = ports[0].node
        block = f"blocks.{node.layer}"
        if node.feature_type == "write":
            seen = self.run(f"{block}.mixer.hook_read", inputs, gradients=gradients).seen
            return [port.of(seen[node.layer].recurrence) for port in ports]
        if node.feature_type == "mlp":
            heads = self._fixed_heads(inputs)
            return [self.run(f"{block}.hook_mlp_out", inputs, heads, gradients).value[:, -1]]
        z = f"{block}.attn.hook_z"
        names = {"query": f"{block}.attn.hook_q", "key": f"{block}.attn.hook_k", "value": f"{block}.attn.hook_v"}
        kept: dict[str, Tensor] = {}

        def keep(x: Tensor, hook: HookPoint) -> None:
            kept[str(hook.name)] = x

        def put(x: Tensor, hook: HookPoint) -> Tensor:
            return taken[str(hook.name)].to(x).expand_as(x)

        keeping = [(name, keep) for name in names.values()]
        plain = self.inputs(node.layer, inputs.window)
        self.run(z, plain, keeping)
        clean = dict(kept)
        self.run(z, inputs, keeping, gradients)
        changed = dict(kept)
        sides = []
        for port in ports:
            taken = clean if port.name == "gate" else {names[port.name]: changed[names[port.name]]}
            others = inputs if port.name == "gate" else plain.repeated(len(inputs.stream))
            ran = self.run(z, others, [(name, put) for name in taken], gradients)
            sides.append(ran.value[:, -1, node.head].clone())  # a view would hold the whole text's
        return sides

    def _fixed_heads(self, inputs: Inputs) -> list[tuple[Name, Hook]]:
        """Hooks that leave what the heads of a block add as it is in the text, but for what is missing."""
        names = self.decomposition.heads_out(inputs.layer)
        tokens = slice(inputs.window.start, inputs.window.stop)

        def put(x: Tensor, hook: HookPoint) -> Tensor:
            added = self.text.at(str(hook.name))[tokens].to(x)
            return (added - inputs.missing if hook.name == names[0] else added).expand_as(x)

        return [(name, put) for name in names]

    def maps(self, ports: Sequence[Port], live: bool) -> list[Maps]:
        """Gradients of ports at one token, ``live`` or with norms, gates and activations held fixed: the port is then
        linear but for biases, and parts of the stream add up. Cost: one block on a few tokens, and back for each."""
        layer = ports[0].node.layer
        plain = self.inputs(layer, self.window(layer, ports[0].at, ports[0].entered > layer))
        leaves = [x.clone().requires_grad_() for x in (plain.stream, plain.embedded)]
        with torch.enable_grad(), constants(() if live else AFFINE):
            sides = self.sides(ports, Inputs(layer, plain.window, *leaves), gradients=True)
            wholes = [port.worth(side).sum() for port, side in zip(ports, sides)]
        found = []
        for whole in wholes:
            maps = [torch.zeros_like(self.text.at("hook_embed")) for _ in leaves]
            gradients: Sequence[Tensor | None] = ()
            if whole.requires_grad:  # a key that gates alone make is a constant where they are held fixed
                gradients = torch.autograd.grad(whole, leaves, allow_unused=True, retain_graph=True)
            for target, gradient in zip(maps, gradients):
                if gradient is not None:
                    target[plain.window.start : plain.window.stop] = gradient[0]
            found.append(Maps(maps[0], maps[1], float(whole.detach())))
        return found

    def through(self, node: Node, gradient: Tensor) -> ThroughNorm | None:
        """`WayOut.through` of the head of a write from its token on, with the ``gradient`` [1,T,H,V] by what the heads
        of its layer hand on. Cost: its block on these tokens."""
        tokens = range(self.window(node.layer, node.position).start, gradient.shape[1])
        mixer = f"blocks.{node.layer}.mixer"
        reads = self.text.at(f"{mixer}.hook_read")[None, tokens.start :]
        ways: list[WayOut] = []

        def put(x: Tensor, hook: HookPoint) -> Tensor:
            return reads.to(x)

        found = ways_out(self.model, [node.layer], lambda _, way: ways.append(way))
        with self.model.hooks([(f"{mixer}.hook_read", put)]), found:
            self.run(f"{mixer}.hook_z", self.inputs(node.layer, tokens))
        through = ways[0].through(gradient[:, tokens.start :])
        heads = slice(node.head, node.head + 1)
        return through and through.select(heads, slice(node.position - tokens.start, None))

    # ------------------------------------------------------------------------------------ exact changes

    @torch.no_grad()
    def sides_without(self, ports: Sequence[Port], sources: Sequence[Node]) -> list[Tensor]:
        """[1+N,...] of each port of one node at one token: as it is, and without each source, the others as they are.
        With a corrupt text a source is replaced by that of the corrupt text instead."""
        layer = ports[0].node.layer
        window = self.window(layer, ports[0].at, ports[0].entered > layer)
        step = max(1, _TOKENS // len(window))
        rows = []
        for first in range(0, len(sources) + 1, step):
            some = [None, *sources][first : first + step]
            plain = self.inputs(layer, window).repeated(len(some))
            embedded = plain.embedded.clone()
            for row, source in enumerate(some):
                if source is not None and source.feature_type == "embedding" and source.position in window:
                    embedded[row, source.position - window.start] = self.other("hook_embed")[source.position]
            given = self.given(some, window)
            own = torch.tensor([is_head_of(source, layer) for source in some], device=given.device)[:, None, None]
            missing = torch.where(own, given, 0)
            inputs = Inputs(layer, window, plain.stream - given + missing, embedded, missing)
            rows.append(self.sides(ports, inputs))
        return [torch.cat(sides) for sides in zip(*rows)]

    def other(self, name: str) -> Tensor:
        """[T,...], what replaces the values of a hook: those of the corrupt text, or 0."""
        return torch.zeros_like(self.text.at(name)) if self.corrupt is None else self.corrupt.at(name)

    def other_writes(self, layer: int) -> dict[str, Tensor]:
        """[T,H,...] by the names of hooks, what replaces the writes of a layer: the values and keys of those of the
        corrupt text, or values of 0."""
        mixer = f"blocks.{layer}.mixer"
        if self.corrupt is None:
            return {f"{mixer}.hook_write_value": torch.zeros_like(self.text.recurrences[layer].u[0])}
        r = self.corrupt.recurrences[layer]
        return {f"{mixer}.hook_write_value": r.u[0], f"{mixer}.hook_write_key": r.k[0]}

    @torch.no_grad()
    def given(self, sources: Sequence[Node | None], window: range) -> Tensor:
        """[N,W,D], what each source gives to the stream at the tokens of ``window``; less what it gives in the corrupt
        text, if there is one. NaN where it is not known, 0 of None."""
        stream = self.text.at("blocks.0.hook_resid_pre")
        given = stream.new_zeros(len(sources), len(window), stream.shape[-1])
        writes: dict[int, list[tuple[int, Node]]] = {}
        for row, source in enumerate(sources):
            if source is None:
                continue
            if source.feature_type == "write":
                writes.setdefault(source.layer, []).append((row, source))
            elif source.feature_type in ("embedding", "mlp", "attn", "stream"):
                if source.position in window:
                    given[row, source.position - window.start] = self._stream_change(source)
            else:
                given[row] = torch.nan
        for layer, of_layer in writes.items():
            rows, written = zip(*of_layer)
            given[list(rows)] = self._write_outputs(layer, written, window)
        return given

    def _stream_change(self, source: Node) -> Tensor:
        """[D], what a node adds to the stream at its token, more than in the corrupt text."""
        block = f"blocks.{source.layer}"
        if source.feature_type == "mlp":
            outs = [self.decomposition.mlp_out(source.layer, text) for text in (self.text, self.corrupt) if text]
            return (outs[0] - outs[1] if len(outs) > 1 else outs[0])[source.position]
        names: dict[FeatureType, str] = {
            "embedding": "blocks.0.hook_resid_pre",
            "stream": f"{block}.hook_resid_pre",
            "attn": f"{block}.hook_attn_out" if source.head < 0 else f"{block}.attn.hook_z",
        }
        name = names[source.feature_type]
        value = (self.text.at(name) - self.other(name))[source.position]
        if source.head < 0:
            return value
        if self.model.head_outputs(source.layer, "attn").norm is not None:  # of all heads together
            return torch.full_like(self.text.at("blocks.0.hook_resid_pre")[0], torch.nan)
        return value[source.head] @ self.model.layer_W_O(source.layer, "attn")[source.head]

    def _write_outputs(self, layer: int, sources: Sequence[Node], window: range) -> Tensor:
        """[N,W,D], what each write gives through its head's norm: the block's output less that without the write."""
        first = self.window(layer, window.start).start
        longer = range(first, window.stop)
        stretch = slice(longer.start, longer.stop)
        reads = self.text.at(f"blocks.{layer}.mixer.hook_read")[stretch]
        without = reads[None].repeat(len(sources), 1, 1, 1)
        rows = list(range(len(sources)))
        heads = [source.head for source in sources]
        positions = [source.position for source in sources]
        r = self.text.recurrences[layer]
        for sign, text in ((1, self.text), (-1, self.corrupt)):
            if text is not None:
                taken = reads_of(r, text.recurrences[layer], heads, positions)[stretch]
                without[rows, :, heads] -= sign * taken.movedim(1, 0).to(without)

        def put(x: Tensor, hook: HookPoint) -> Tensor:
            return without.to(x)

        added = f"blocks.{layer}.hook_mixer_out"
        inputs = self.inputs(layer, longer).repeated(len(sources))
        ran = self.run(added, inputs, [(f"blocks.{layer}.mixer.hook_read", put)])
        return (self.text.at(added)[None, stretch] - ran.value)[:, window.start - first :]


def is_head_of(source: Node | None, layer: int) -> bool:
    """Whether a source is of the heads of a block, and not below it."""
    return source is not None and source.layer == layer and source.feature_type in ("write", "attn")


@torch.no_grad()
def reach_of(model: HookedRecurrent, tokens: Tensor) -> int | None:
    """How many tokens before a token its factors depend on, from what a cache keeps after one token; None where it
    does not tell."""
    one = tokens[:, :1].to(model.hf_model.device)
    inputs = model.attachment.new_cache() | continuing(model.hf_model, None, 0, one)
    return reach(cache_of(model.hf_model(input_ids=one, **inputs))) or None


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
    of_write = own.adjoint(gradient).states(positions=[r.T - 1 - position])[0, 0, 0]  # [K,V]
    key = torch.atleast_2d(own.k[0, position, 0]).to(of_write)
    value = torch.atleast_2d(own.u[0, position, 0]).to(of_write)
    readers = None if r.rates is not None else _reads_of_state(own, position)
    ports = [
        Port(node, "value", position, of_write, key, readers),
        Port(node, "key", position, of_write, value, readers),
    ]
    if position > 0:
        before = own.states(positions=position - 1)[0, 0, 0]
        ports.append(Port(node, "gate", position, of_write, before, readers))
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
    single[0, position:, 0] = torch.eye(length)
    return own.adjoint(single).states(positions=[length - 1])[0, 0, 0].T


def ports_of_head(node: Node, at_z: Tensor) -> list[Port]:
    """The ports of a softmax head at a token.

    Args:
        at_z: [1,T,H,V], gradients of the metric by what heads hand on.
    """
    names: tuple[PortName, ...] = ("value", "key", "query", "gate")
    return [Port(node, name, node.position, at_z[0, node.position, node.head]) for name in names]


def port_of_mlp(node: Node, at_out: Tensor) -> Port:
    """The port of an MLP at a token.

    Args:
        at_out: [1,T,D], gradients of the metric by what the MLP adds.
    """
    return Port(node, "input", node.position, at_out[0, node.position])


def change_for(port: Port, clean: Text, taken: Tensor) -> list[Change]:
    """For each of ``taken`` [N,...], what takes it off the side of a port and leaves the other ports alone."""
    node = port.node
    given = port.given(taken)
    mixer = f"blocks.{node.layer}.mixer"
    if node.feature_type == "write" and port.name != "query":
        name = f"{mixer}.heads.{node.head}.hook_write"
        write = clean.recurrences[node.layer].write(heads=node.head, positions=node.position)[0, 0, 0]
        return [Change(node.layer, port.at, {name: write - row}) for row in given]
    names: dict[FeatureType, str] = {"write": f"{mixer}.hook_read", "attn": f"blocks.{node.layer}.attn.hook_z"}
    name = names.get(node.feature_type, f"blocks.{node.layer}.hook_mlp_out")
    at_token = clean.at(name)[port.at]
    value = at_token if node.head < 0 else at_token[node.head]
    return [Change(node.layer, port.at, {name: value - row}, node.head) for row in given.reshape(-1, len(value))]
