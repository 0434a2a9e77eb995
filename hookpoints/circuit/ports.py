"""What made a write: its key, its value, and the query that reads it, as functions of a few tokens of a block's input.

A factor of a recurrent layer at a token depends on as many tokens of the stream as its convolution (or token shift)
sees. So a block is run again on these tokens alone, with parts of the stream taken off, and exactly.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from hookpoints.circuit.node import Change, FeatureType, Node, PortName
from hookpoints.circuit.norms import Affine
from hookpoints.circuit.stream import Decomposition, Text, reads_of
from hookpoints.layer.context import scope
from hookpoints.memory.caches import reach
from hookpoints.model.inputs import cache_of, continuing
from hookpoints.recurrence.recurrence import Recurrence

if TYPE_CHECKING:
    from transformer_lens.hook_points import HookPoint

    from hookpoints.hooks.guard import HookSpecs
    from hookpoints.model.recurrent import HookedRecurrent


class Port(NamedTuple):
    """One side of a write, as a number: the product of that factor with ``direction``, which is what the factor gives
    to the metric to first order."""

    node: Node
    name: PortName
    at: int
    """Token whose factor it is."""
    direction: Tensor
    """Like the factor: [K], [V], or [R,K], [R,V]."""

    def factors(self, r: Recurrence) -> Tensor:
        """[N,...], the factor at the last token of ``r``."""
        factor = {"value": r.u, "key": r.k, "query": r.q}[cast(Literal["value", "key", "query"], self.name)]
        return factor[:, -1, self.node.head]

    def worth(self, factors: Tensor) -> Tensor:
        """[N], what factors [N,...] give to the metric."""
        return (factors * self.direction).flatten(1).sum(1)


class Maps(NamedTuple):
    """The gradient of a port by what enters its block."""

    stream: Tensor
    """[T,D], by the stream."""
    embedded: Tensor
    """[T,D], by the token embeddings; 0 but for blocks that read them again (RWKV-7's first values)."""
    whole: float
    """The port."""


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

    def window(self, layer: int, at: int) -> range:
        """Tokens of the block's input on which its factors at ``at`` depend."""
        mixes = self.model.attachment.layout.blocks[layer].attn_namespace is not None
        if self.reach is None or mixes:
            return range(at + 1)
        return range(max(0, at - self.reach), at + 1)

    def entering(self, layer: int, window: range) -> Tensor:
        """[W,D], the stream that enters a block."""
        return self.text.at(f"blocks.{layer}.hook_resid_pre")[window.start : window.stop]

    def run(
        self,
        layer: int,
        entering: Tensor,
        window: range,
        fwd_hooks: HookSpecs = (),
        gradients: bool = False,
        embedded: Tensor | None = None,
    ) -> Recurrence:
        """Factors of the block given ``entering`` [N,W,D] at the tokens of ``window``, and ``embedded`` [N,W,D] as
        token embeddings where it reads these again."""
        if embedded is None:
            embedded = self.text.at("hook_embed")[window.start : window.stop][None].expand(len(entering), -1, -1)
        tokens = self.text.tokens[:, window.start : window.stop].expand(len(entering), -1)
        attachment = self.model.attachment
        recording = self.model.recording([layer], gradients=gradients)
        embedding = _embedding(attachment.layout.embed, embedded)
        kernel = scope(attachment, backend="recurrence")
        hooks = self.model.hooks(fwd_hooks)
        with torch.set_grad_enabled(gradients), kernel, recording as seen, embedding, hooks:
            self.model(entering, start_at_layer=layer, stop_at_layer=layer + 1, tokens=tokens)
        return seen[layer].recurrence

    def maps(self, ports: Sequence[Port], live: bool) -> list[Maps]:
        """Gradients of ports at one token, ``live`` or with norms, gates and activations held fixed: the port is then
        linear but for biases, and parts of the stream add up. Cost: one block on a few tokens, and back for each."""
        node, _, at, _ = ports[0]
        window = self.window(node.layer, at)
        stretch = slice(window.start, window.stop)
        names = (f"blocks.{node.layer}.hook_resid_pre", "hook_embed")
        leaves = [self.text.at(name)[stretch][None].clone().requires_grad_() for name in names]
        with torch.enable_grad(), nullcontext() if live else Affine():
            factors = self.run(node.layer, leaves[0], window, gradients=True, embedded=leaves[1])
            wholes = [port.worth(port.factors(factors)).sum() for port in ports]
        found = []
        for whole in wholes:
            maps = [torch.zeros_like(self.text.at(name)) for name in names]
            gradients = torch.autograd.grad(whole, leaves, allow_unused=True, retain_graph=True)
            for target, gradient in zip(maps, gradients):
                if gradient is not None:
                    target[stretch] = gradient[0]
            found.append(Maps(maps[0], maps[1], float(whole.detach())))
        return found

    # ------------------------------------------------------------------------------------ exact changes

    def factors_without(self, layer: int, at: int, sources: Sequence[Node]) -> Recurrence:
        """Factors of the block at ``at``, the last token of the result, row by row without one source: the others are
        as they are. With a corrupt text a source is replaced by that of the corrupt text instead."""
        window = self.window(layer, at)
        entering = self.entering(layer, window)[None] - self.given(sources, window)
        embedded = self.text.at("hook_embed")[window.start : window.stop][None].repeat(len(sources), 1, 1)
        for row, source in enumerate(sources):
            if source.feature_type == "embedding" and source.position in window:
                embedded[row, source.position - window.start] = self.other("hook_embed")[source.position]
        return self.run(layer, entering, window, embedded=embedded)

    def other(self, name: str) -> Tensor:
        """[T,...], what replaces the values of a hook: those of the corrupt text, or 0."""
        return torch.zeros_like(self.text.at(name)) if self.corrupt is None else self.corrupt.at(name)

    @torch.no_grad()
    def given(self, sources: Sequence[Node], window: range) -> Tensor:
        """[N,W,D], what each source gives to the stream at the tokens of ``window``; less what it gives in the corrupt
        text, if there is one. NaN where it is not known."""
        width = self.text.at("blocks.0.hook_resid_pre").shape[-1]
        given = self.text.logits.new_zeros(len(sources), len(window), width)
        by_layer: dict[int, list[int]] = {}
        for row, source in enumerate(sources):
            if source.feature_type == "write":
                by_layer.setdefault(source.layer, []).append(row)
            elif source.feature_type in ("embedding", "mlp", "attn", "stream"):
                if source.position in window:
                    given[row, source.position - window.start] = self._added(source)
            else:
                given[row] = torch.nan
        for layer, rows in by_layer.items():
            given[rows] = self._written(layer, [sources[row] for row in rows], window)
        return given

    def _added(self, source: Node) -> Tensor:
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

    def _written(self, layer: int, sources: Sequence[Node], window: range) -> Tensor:
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
        outs: list[Tensor] = []

        def put(x: Tensor, hook: HookPoint) -> Tensor:
            return without.to(x)

        def keep(x: Tensor, hook: HookPoint) -> None:
            outs.append(x)

        hooks = [(f"blocks.{layer}.mixer.hook_read", put), (f"blocks.{layer}.hook_mixer_out", keep)]
        entering = self.entering(layer, longer)[None].expand(len(sources), -1, -1)
        self.run(layer, entering, longer, hooks)
        plain = self.text.at(f"blocks.{layer}.hook_mixer_out")[stretch]
        return (plain[None] - outs[0])[:, window.start - first :]


@contextmanager
def _embedding(module: nn.Module, embedded: Tensor) -> Iterator[None]:
    """In this scope the embedding of tokens gives ``embedded``."""
    handle = module.register_forward_hook(lambda module, args, output: embedded)
    try:
        yield
    finally:
        handle.remove()


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
    """The ports of a write: value, key, and the query of the token that reads it.

    Args:
        r: the layer's factors.
        at_reads: [1,T,H,V], gradients of the metric by what heads read.
        read: the reading token; None: that through which the write matters most, to first order.
    """
    position = node.position
    own = r.select(heads=node.head)
    gradient = at_reads[:, :, node.head : node.head + 1]
    of_write = own.adjoint(gradient).states(positions=[r.T - 1 - position])[0, 0, 0]  # [K,V]
    key = own.k[0, position, 0].to(of_write)
    value = own.u[0, position, 0].to(of_write)
    ports = [Port(node, "value", position, key @ of_write), Port(node, "key", position, value @ of_write.T)]
    if r.rates is not None or r.read_before_write:
        return ports
    carried = carried_key(r, node)  # [R,T-s,K]
    queries = own.q[0, position:, 0].to(carried)
    weights = own.scale * (carried * queries).sum(-1)  # [R,T-s]
    gains = torch.atleast_2d(value) @ gradient[0, position:, 0].to(value).T  # [R,T-s]
    after = int((weights * gains).sum(0).abs().argmax()) if read is None else read - position
    direction = own.scale * (carried[:, after] * gains[:, after, None]).sum(0)
    return [*ports, Port(node, "query", position + after, direction)]


def carried_key(r: Recurrence, node: Node) -> Tensor:
    """[R,T-s,K], the key of a write as the transitions since have left it."""
    keys = torch.atleast_2d(r.k[0, node.position, node.head].to(r.dtype))
    return r.propagate(keys, node.position, node.head)[0]


def change_for(port: Port, clean: Text, rows: Tensor) -> list[Change]:
    """For each of the factors ``rows`` [N,...], what gives it to the port and leaves the other ports alone."""
    node = port.node
    mixer = f"blocks.{node.layer}.mixer"
    name = {"value": f"{mixer}.hook_write_value", "key": f"{mixer}.hook_write_key"}.get(port.name)
    if name is None:  # another query reads the write with another weight
        name = f"{mixer}.hook_read"
        r = clean.recurrences[node.layer]
        carried = carried_key(r, node)[:, port.at - node.position]
        weights = r.scale * (rows - r.q[0, port.at, node.head]).to(carried) @ carried.T  # [N,R]
        read = clean.at(name)[port.at, node.head]
        rows = read + weights @ torch.atleast_2d(r.u[0, node.position, node.head]).to(carried)
    return [Change(node.layer, port.at, {name: row}, node.head) for row in rows]
