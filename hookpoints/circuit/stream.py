"""What the residual stream is the sum of, and what each part gives to a direction: parts add up."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from hookpoints.circuit.tables import Node
from hookpoints.recurrence.canonical import over_time, tensors
from hookpoints.recurrence.recurrence import Recurrence

if TYPE_CHECKING:
    from hookpoints.model.recurrent import HookedRecurrent


class Text(NamedTuple):
    """One text through the model."""

    tokens: Tensor
    """[1,T]."""
    recurrences: Mapping[int, Recurrence]
    values: Mapping[str, Tensor]
    """What hooks saw, [1,T,...], by name; with graphs from heads on."""
    followed: Collection[str] = ()
    """Hooks that see what heads add, where that is a linear map of what they read or hand on, with norms fixed."""

    def at(self, name: str) -> Tensor:
        """[T,...]."""
        return self.values[name].detach()[0].to(self.tokens.device)


Parts = dict[Node, Tensor]
"""[N,T,H], what the nodes of a kind in a block give to N directions; H is 1 where there are no heads. A kind is a node
of no token, whose head is 0 where there are heads."""


def head_kinds(model: HookedRecurrent, layer: int) -> list[Node]:
    """Kinds of a block's heads: recurrent ones, softmax ones, or both; softmax ones may be one node."""
    kinds = [Node("write", layer, 0)] if layer in model.cfg.layers else []
    if layer in model.cfg.attention or not kinds:
        kinds.append(Node("attn", layer, 0 if layer in model.cfg.attention else -1))
    return kinds


@dataclass(frozen=True)
class Decomposition:
    """Takes the residual stream of a text apart, by linear maps that hold norms, gates and patterns fixed."""

    model: HookedRecurrent
    clean: Text
    """The text whose norms, gates and patterns are held fixed."""

    def parts(self, directions: Tensor, tokens: Tensor, below: Sequence[Node], text: Text) -> tuple[Parts, Tensor]:
        """What all nodes below others give to <x, direction>, x [T,D] the stream that enters the block of each.

        Args:
            directions: [N,T,D].
            tokens: [U], where these are not 0.
            below: N nodes, those of lower blocks first, MLPs last in theirs: below an MLP are the heads of its block.
            text: whose values are given; the clean one, or a corrupt one through the clean one's maps.

        Returns: the parts, and [N], what output projections add as biases.
        """
        ends = [(node.layer, node.feature_type == "mlp") for node in below]
        parts = {Node("embedding"): _given_along(directions, text.at("blocks.0.hook_resid_pre"))}
        bias = directions.new_zeros(len(directions))
        for block in range(sum(ends[-1])):
            first = bisect_right(ends, (block, False))
            for name in self.heads_out(block):
                given, rest = self._of_heads(directions[first:], tokens, block, name, text)
                parts |= {kind: _below_others(x, first) for kind, x in given.items()}
                bias[first:] += rest
            first = bisect_right(ends, (block, True))
            added = _given_along(directions[first:], self.mlp_out(block, text))
            parts[Node("mlp", block)] = _below_others(added, first)
        return parts, bias

    def mlp_out(self, block: int, text: Text) -> Tensor:
        """[T,D], what the MLP adds; in a block with several, what it adds besides its heads."""
        name = f"blocks.{block}.hook_mlp_out"
        if name in text.values:
            return text.at(name)
        added = text.at(f"blocks.{block}.hook_resid_post") - text.at(f"blocks.{block}.hook_resid_pre")
        return added - sum(text.at(hook) for hook in self.heads_out(block))

    def heads_out(self, block: int) -> list[str]:
        """Names of the hooks that see what the heads of a block add: recurrent ones, softmax ones, or both."""
        kinds = head_kinds(self.model, block)
        outs = ("hook_mixer_out" if kind.feature_type == "write" else "hook_attn_out" for kind in kinds)
        return [name for out in outs if (name := f"blocks.{block}.{out}") in self.clean.values]

    def _of_heads(
        self, directions: Tensor, tokens: Tensor, block: int, name: str, text: Text
    ) -> tuple[Parts, Tensor | float]:
        """Heads of a block, which the hook ``name`` sees: writes and skips, or softmax heads; and the bias of their
        projection."""
        added = text.at(name)
        kind = Node("attn" if name.endswith("attn_out") else "skip", block)
        if name not in self.clean.followed:
            return {kind: _given_along(directions, added)}, 0.0
        is_softmax = kind.feature_type == "attn"
        ends = ("attn.hook_z", "attn.hook_z") if is_softmax else ("mixer.hook_z", "mixer.hook_read")
        z, start = (f"blocks.{block}.{end}" for end in ends)
        at_z, at_start = back(self.clean.values[name], (self.clean.values[z], self.clean.values[start]), directions)
        heads = (at_z * text.at(z)).sum(-1)
        rest = torch.einsum("ntd,td->n", directions, added) - heads.sum((1, 2))
        own = kind._replace(head=0)
        if is_softmax:
            return {own: heads}, rest
        writes = of_writes(self.clean.recurrences[block], text.recurrences[block], at_start, tokens)
        skips = heads - (at_start * text.at(start)).sum(-1)
        return {own._replace(feature_type="write"): writes, own: skips}, rest


def _below_others(given: Tensor, first: int) -> Tensor:
    """[N,T,H], the same, and 0 to the ``first`` directions, those of blocks that are not above."""
    return F.pad(given, (0, 0, 0, 0, first, 0))


def _given_along(directions: Tensor, added: Tensor) -> Tensor:
    """[N,T,1], what ``added`` [T,D] gives at each token."""
    return torch.einsum("ntd,td->nt", directions, added)[..., None]


def back(end: Tensor, starts: tuple[Tensor, ...], directions: Tensor) -> list[Tensor]:
    """Gradients [N,T,...] of <end, direction> by each of ``starts`` [1,T,...], for directions [N,T,D]."""
    given = directions[:, None].to(end)
    found = torch.autograd.grad(end, starts, given, retain_graph=True, is_grads_batched=True)
    return [gradient.squeeze(1).to(directions.device) for gradient in found]


def moved(recurrences: Mapping[int, Recurrence], place: torch.device) -> dict[int, Recurrence]:
    """The same factors on another device."""
    return {layer: replace(r, **{name: x.to(place) for name, x in tensors(r)}) for layer, r in recurrences.items()}


@torch.no_grad()
def of_writes(clean: Recurrence, text: Recurrence, at_reads: Tensor, tokens: Tensor) -> Tensor:
    """[N,S,H], what each write of ``text`` gives to <reads, at_reads>, carried by the transitions of ``clean``.

    Args:
        at_reads: [N,T,H,V].
        tokens: [U], where these are not 0.

    Cost: a scan of one value channel for each of the tokens; where each value channel has its own decay, a scan of all
    for each row.
    """
    carried = clean.with_write(text.k, text.u)
    if clean.rates is not None:
        return torch.cat([(carried.value_gradients(row[None])[0] * text.u[0]).sum(-1)[None] for row in at_reads])
    reads = at_reads.new_zeros(1, clean.T, clean.H, len(tokens))
    reads[:, tokens, :, torch.arange(len(tokens), device=tokens.device)] = 1
    weights = carried.value_gradients(reads)[0]
    values = text.u[0].to(weights)
    if values.ndim == 3:
        values = values[:, :, None]
        weights = weights[:, :, None]
    return torch.einsum("shru,nuhv,shrv->nsh", weights, at_reads[:, tokens].to(weights), values)


@torch.no_grad()
def reads_of(r: Recurrence, writes: Recurrence, heads: Tensor, positions: Tensor) -> Tensor:
    """[T,N,V], what a head of ``r`` reads of one write of ``writes``, for ``heads`` and ``positions`` [N] of writes.

    Cost: a scan of one value channel for each term of a write; where each value channel has its own decay, of all.
    """
    fields = {name: x.index_select(2, heads) for name, x in over_time(r)}
    k, u = (x.index_select(2, heads) for x in (writes.k, writes.u))
    rows = torch.arange(len(heads), device=heads.device)
    values = u[0, positions, rows]
    channels = torch.eye(r.R, dtype=u.dtype, device=u.device)  # a term is read as its value, times a weight
    if r.rates is not None:
        fields["rates"] = r.rates.index_select(0, heads)
        channels = values
    alone = u.new_zeros(*u.shape[:-1], channels.shape[-1])
    alone[:, positions, rows] = channels
    reads = replace(r, **fields, initial_state=None).with_write(k, alone).outputs()[0]
    if r.rates is not None:
        return reads
    return torch.einsum("tnr,nrv->tnv", reads, values.reshape(len(heads), r.R, -1).to(reads))
