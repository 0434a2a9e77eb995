"""What the residual stream is the sum of, and what each part gives to a direction: parts add up."""

from __future__ import annotations

from collections.abc import Collection, Container, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from hookpoints.circuit.norms import constants
from hookpoints.circuit.tables import FeatureType
from hookpoints.recurrence.canonical import over_time, tensors
from hookpoints.recurrence.recurrence import Recurrence
from hookpoints.scopes import scoped

if TYPE_CHECKING:
    from transformer_lens.hook_points import HookPoint

    from hookpoints.hooks.guard import Hook
    from hookpoints.model.recurrent import HookedRecurrent


class Stretch(NamedTuple):
    """A part of a block that is a linear map with its norms fixed; names of hooks."""

    start: str
    """What recurrent heads read, or softmax heads hand on."""
    handed_on: str
    added: str
    """What the block adds."""


class Text(NamedTuple):
    """One text through the model."""

    tokens: Tensor
    """[1,T]."""
    recurrences: Mapping[int, Recurrence]
    values: Mapping[str, Tensor]
    """What hooks saw, [1,T,...], by name; with graphs inside stretches."""
    stretches: Mapping[str, Stretch]
    """By the hook at their end."""

    def at(self, name: str) -> Tensor:
        """[T,...]."""
        return self.values[name].detach()[0].to(self.tokens.device)


@scoped
def reading(model: HookedRecurrent, stretches: Collection[Stretch] = ()) -> Iterator[dict[str, Tensor]]:
    """In this scope a pass leaves the values of a `Text`. ``stretches`` are followed by autograd, norms fixed."""
    ends = ("hook_resid_pre", "hook_mixer_out", "hook_attn_out", "hook_mlp_out", "hook_resid_post")
    ends += ("mixer.hook_read", "mixer.hook_z", "attn.hook_z")
    values: dict[str, Tensor] = {}

    def keep(x: Tensor, hook: HookPoint) -> None:
        values[str(hook.name)] = x

    def begin(x: Tensor, hook: HookPoint) -> Tensor:
        torch.set_grad_enabled(True)
        return x.detach().requires_grad_()

    def finish(x: Tensor, hook: HookPoint) -> Tensor:
        torch.set_grad_enabled(False)
        return x.detach()

    hooks: list[tuple[str, Hook]] = [(stretch.start, begin) for stretch in stretches]
    hooks.append(("hook_embed", keep))
    for name in model.hook_dict:
        if name.startswith("blocks.") and name.split(".", 2)[-1] in ends:
            hooks.append((name, keep))
    hooks += [(stretch.added, finish) for stretch in stretches]
    with torch.no_grad(), constants(["norms"]), model.hooks(hooks):
        yield values


def stretches_of(model: HookedRecurrent, unknown: Container[int]) -> list[Stretch]:
    """From what heads read to what their block adds: of recurrent layers but for ``unknown`` ones, and of softmax
    layers."""
    stretches = []
    for layer in model.cfg.recurrent_layers:
        if layer not in unknown:
            block = f"blocks.{layer}"
            stretches.append(Stretch(f"{block}.mixer.hook_read", f"{block}.mixer.hook_z", f"{block}.hook_mixer_out"))
    for layer in sorted(model.cfg.attention):
        z = f"blocks.{layer}.attn.hook_z"
        stretches.append(Stretch(z, z, f"blocks.{layer}.hook_attn_out"))
    return stretches


class Part(NamedTuple):
    """What the nodes of one kind in one block give to N directions."""

    feature_type: FeatureType
    layer: int
    given: Tensor
    """[N,T,H]; H is 1 where there are no heads."""
    has_heads: bool = False


@dataclass(frozen=True)
class Decomposition:
    """Takes the residual stream of a text apart, by linear maps that hold norms, gates and patterns fixed."""

    model: HookedRecurrent
    clean: Text
    """The text whose norms, gates and patterns are held fixed."""

    def parts(self, directions: Tensor, layer: int, text: Text) -> tuple[list[Part], Tensor]:
        """What each node below block ``layer`` gives to <x, direction>, x [T,D] the stream that enters the block.

        Args:
            directions: [N,T,D].
            text: whose values are given; the clean one, or a corrupt one through the clean one's maps.

        Returns: the parts, and [N], what output projections add as biases.
        """
        embedding = torch.einsum("ntd,td->nt", directions, text.at("blocks.0.hook_resid_pre"))
        parts = [Part("embedding", -1, embedding[..., None])]
        bias = directions.new_zeros(len(directions))
        for block in range(layer):
            for name in self.heads_out(block):
                given, rest = self._of_heads(directions, block, name, text)
                parts += given
                bias = bias + rest
            parts.append(self._whole_part("mlp", directions, block, self.mlp_out(block, text)))
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
        outs = {"hook_mixer_out": block in self.model.cfg.layers}
        outs["hook_attn_out"] = block in self.model.cfg.attention or block not in self.model.cfg.layers
        names = [f"blocks.{block}.{hook}" for hook, counts in outs.items() if counts]
        return [name for name in names if name in self.clean.values]

    def _whole_part(self, feature_type: FeatureType, directions: Tensor, block: int, added: Tensor) -> Part:
        return Part(feature_type, block, torch.einsum("ntd,td->nt", directions, added)[..., None])

    def _of_heads(self, directions: Tensor, block: int, name: str, text: Text) -> tuple[list[Part], Tensor | float]:
        """Heads of a block, which the hook ``name`` sees: writes and skips, or softmax heads; and the bias of their
        projection."""
        is_softmax = name.endswith("attn_out")
        if name not in self.clean.stretches:
            return [self._whole_part("attn" if is_softmax else "skip", directions, block, text.at(name))], 0.0
        stretch = self.clean.stretches[name]
        start, handed_on, added = (self.clean.values[hook] for hook in stretch)
        at_z, at_start = back(added, (handed_on, start), directions)
        heads = (at_z * text.at(stretch.handed_on)).sum(-1)
        rest = torch.einsum("ntd,td->n", directions, text.at(name)) - heads.sum((1, 2))
        if is_softmax:
            return [Part("attn", block, heads, True)], rest
        writes = of_writes(self.clean.recurrences[block], text.recurrences[block], at_start)
        skips = heads - (at_start * text.at(stretch.start)).sum(-1)
        return [Part("write", block, writes, True), Part("skip", block, skips, True)], rest


def back(end: Tensor, starts: tuple[Tensor, ...], directions: Tensor) -> list[Tensor]:
    """Gradients [N,T,...] of <end, direction> by each of ``starts`` [1,T,...], for directions [N,T,D]."""
    given = directions[:, None].to(end)
    found = torch.autograd.grad(end, starts, given, retain_graph=True, is_grads_batched=True)
    return [gradient.squeeze(1).to(directions.device) for gradient in found]


def moved(r: Recurrence, place: torch.device) -> Recurrence:
    """The same factors on another device."""
    return replace(r, **{name: x.to(place) for name, x in tensors(r)})


@torch.no_grad()
def of_writes(clean: Recurrence, text: Recurrence, at_reads: Tensor) -> Tensor:
    """[N,S,H], what each write of ``text`` gives to <reads, at_reads>, carried by the transitions of ``clean``.

    Args:
        at_reads: [N,T,H,V].

    Cost: a scan with the value channels of all rows; where each value channel has its own decay, a scan for each row.
    """
    carried = clean.with_write(text.k, text.u)
    if clean.rates is not None:
        return torch.cat([(carried.value_gradients(row[None])[0] * text.u[0]).sum(-1)[None] for row in at_reads])
    side_by_side = at_reads.permute(1, 2, 3, 0).flatten(2)[None]
    weights = carried.value_gradients(side_by_side)[0].unflatten(-1, (clean.V, len(at_reads)))
    return (weights * text.u[0, ..., None]).flatten(2, -2).sum(2).permute(2, 0, 1)


@torch.no_grad()
def reads_of(r: Recurrence, writes: Recurrence, heads: Tensor, positions: Tensor) -> Tensor:
    """[T,N,V], what a head of ``r`` reads of one write of ``writes``, for ``heads`` and ``positions`` [N] of writes."""
    fields = {name: x.index_select(2, heads) for name, x in over_time(r)}
    if r.rates is not None:
        fields["rates"] = r.rates.index_select(0, heads)
    k, u = (x.index_select(2, heads) for x in (writes.k, writes.u))
    rows = torch.arange(len(heads), device=heads.device)
    alone = torch.zeros_like(u)
    alone[:, positions, rows] = u[:, positions, rows]
    return replace(r, **fields, initial_state=None).with_write(k, alone).outputs()[0]
