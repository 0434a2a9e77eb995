"""What deleting a write does, predicted for every write at once."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, cast

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from hookpoints.circuit.norms import Constants, FrozenNorms, HeadNorm, ScalesApart
from hookpoints.errors import InputError, PredictionWarning
from hookpoints.recurrence.canonical import terms
from hookpoints.recurrence.recurrence import Recurrence

if TYPE_CHECKING:
    from transformer_lens.hook_points import HookPoint

    from hookpoints.model.recurrent import HookedRecurrent

Token = str | int
"""A token as text or id."""
LogitMetric = Callable[[Tensor], Tensor]
"""A number made of logits [B,T,vocab], differentiably."""
Through = Literal["norm"] | None
"""What a write is deleted exactly through, besides its recurrence."""
_ROOM = 2**22
"""Weights [T,S] of heads at once."""
_CONSTANT = ("hook_q", "hook_k", "hook_beta", "hook_log_decay", "hook_erase_a", "hook_erase_b")
"""What of a recurrence does not follow its writes while they are followed alone."""


def write_attribution(
    model: HookedRecurrent,
    input: str | Tensor,
    metric: LogitMetric,
    *,
    through: Through = "norm",
    corrupt: str | Tensor | None = None,
    frozen: bool = False,
) -> pd.DataFrame:
    """What deleting each write would take off a metric, predicted for all writes of all layers.

    A write is deleted exactly through its recurrence, with later erases reacting, and through the norm of its head;
    what follows is to first order. With W_s = k_s u_s^T the head reads o_t - A[t,s] u_s at each later token t, hands
    on z_t' instead of z_t, and the write gets sum_t <dmetric/dz_t, z_t - z_t'>. The norm's scale follows from its mean
    square, of which the slope and the curvature along u_s are known (Nanda, "Attribution patching", 2023, is the first
    order of this).

    Args:
        input: one sequence, text or tokens [1,T].
        metric: from logits [1,T,vocab] to a number.
        through: "norm", or None for first order from the reads on, <W, dmetric/dW>.
        corrupt: another text of as many tokens. Each write is then replaced by that of the corrupt text instead of
            deleted (activation patching of writes). Predictions of this kind are the best.
        frozen: hold norms, keys, gates and patterns of the layers above fixed; for saturated answers, as of small
            models that are always right, whose gradients are nearly 0.

    Returns: one row for each write: ``layer``, ``head``, ``position``, ``attribution`` (in units of the metric).

    Raises:
        InputError: there are several sequences, or the corrupt text has another length.
        RuntimeError: of torch, where the metric is not one number that depends on the logits.

    Warns (`PredictionWarning`) where a layer hands on its reads in a way that is no norm, gate and projection of torch:
    its writes are predicted to first order.

    Cost: about five passes: one with gradients, whose memory grows with T times layers, one without, and the patterns
    of all heads, T / V times their recurrence.
    """
    tokens = one_sequence(model, input)
    donors = None if corrupt is None else record(model, same_length(model, corrupt, tokens))
    gradients = read_gradients(model, tokens, metric, frozen)
    ways = {} if through is None else spans(model, tokens).ways
    tables = []
    for layer, r in gradients.recurrences.items():
        swap = Swap(r, None if donors is None else donors[layer])
        tables.append(_table(layer, predict(swap, ways.get(layer), gradients, layer)))
    return pd.concat(tables, ignore_index=True)


@torch.no_grad()
def predict(swap: Swap, way: WayOut | None, gradients: Gradients, layer: int) -> Tensor:
    """[T,H], what each write of a layer takes off the metric: through the norm on its way, or to first order."""
    effect = None if way is None else way.effects(swap, gradients.handed_on[layer])
    return swap.first_order(gradients.reads[layer]) if effect is None else effect


def _table(layer: int, effect: Tensor) -> pd.DataFrame:
    """A row for each entry of ``effect`` [T,H]."""
    values = effect.cpu().numpy()
    position, head = np.indices(values.shape).reshape(2, -1)
    return pd.DataFrame({"layer": layer, "head": head, "position": position, "attribution": values.ravel()})


class Gradients(NamedTuple):
    """Of a metric on one text, by layer."""

    reads: dict[int, Tensor]
    """[1,T,H,V], with respect to what heads read."""
    handed_on: dict[int, Tensor]
    """[1,T,H,V], with respect to what heads hand on (``hook_z``)."""
    other: dict[str, Tensor]
    """With respect to further hooks, by name."""
    values: dict[str, Tensor]
    """What these hooks saw."""
    recurrences: dict[int, Recurrence]
    logits: Tensor
    """[1,T,vocab]."""


@torch.enable_grad()
def read_gradients(
    model: HookedRecurrent, tokens: Tensor, metric: LogitMetric, frozen: bool, further: tuple[str, ...] = ()
) -> Gradients:
    """One pass and its backward pass. ``further`` are names of hooks whose gradients are wanted as well."""
    kept: dict[str, Tensor] = {}
    layers = model.cfg.recurrent_layers
    names = {f"blocks.{layer}.mixer.{hook}": None for layer in layers for hook in ("hook_read", "hook_z")}

    def begin(x: Tensor, hook: HookPoint) -> Tensor:
        x = x.detach().requires_grad_()
        if str(hook.name) in further:
            kept[str(hook.name)] = x
        return x

    def keep(x: Tensor, hook: HookPoint) -> None:
        kept[str(hook.name)] = x

    def constant(x: Tensor, hook: HookPoint) -> Tensor:
        return x.detach()

    hooks: list[tuple[str, Callable[..., Tensor | None]]] = [("hook_embed", begin)]
    hooks += [(name, keep) for name in (*names, *further) if name != "hook_embed"]
    with ExitStack() as scopes:
        record = scopes.enter_context(model.recording())
        if frozen:
            scopes.enter_context(Constants())
            hooks += [(name, constant) for name in _constants(model)]
        scopes.enter_context(model.hooks(hooks))
        logits = cast(Tensor, model(tokens))
    # A metric need not depend on all of them.
    values = list(kept.values())
    gradients = torch.autograd.grad(metric(logits).reshape(()), values, allow_unused=True)
    filled = {
        name: torch.zeros_like(value) if gradient is None else gradient
        for (name, value), gradient in zip(kept.items(), gradients)
    }
    return Gradients(
        reads={layer: filled[f"blocks.{layer}.mixer.hook_read"] for layer in layers},
        handed_on={layer: filled[f"blocks.{layer}.mixer.hook_z"] for layer in layers},
        other={name: filled[name] for name in further},
        values={name: value.detach() for name, value in kept.items()},
        recurrences={layer: record[layer].recurrence for layer in layers},
        logits=logits.detach(),
    )


def _constants(model: HookedRecurrent) -> Iterator[str]:
    """Names of the hooks at which a frozen pass cuts gradients."""
    for layer in model.cfg.recurrent_layers:
        for name in _CONSTANT:
            if (full := f"blocks.{layer}.mixer.{name}") in model.hook_dict:
                yield full


# ------------------------------------------------------------------------------------------------ writes that change


@dataclass(frozen=True)
class Swap:
    """The writes of one layer, and what replaces each: nothing, or the write of another text."""

    recurrence: Recurrence
    donor: Recurrence | None

    def sides(self) -> list[tuple[int, Tensor, Tensor]]:
        """Sign, keys [1,T,H,K] and values [1,T,H,V] of the terms that are taken off."""
        r = self.recurrence
        sides = [(1, k, u) for k, u in zip(terms(r.k), terms(r.u))]
        if self.donor is not None:
            sides += [(-1, k, u) for k, u in zip(terms(self.donor.k), terms(self.donor.u))]
        return sides

    def first_order(self, read_gradients: Tensor) -> Tensor:
        """[T,H], <W - W', dmetric/dW>, from the gradients of the reads [1,T,H,V]."""
        total = torch.zeros(self.recurrence.T, self.recurrence.H, dtype=self.recurrence.dtype)
        total = total.to(self.recurrence.device)
        for donated, r in ((1, self.recurrence), (-1, self.donor)):
            if r is not None:
                moved = self.recurrence.with_write(r.k, r.u)
                effect = (r.u * moved.value_gradients(read_gradients)).sum(-1)[0]
                total = total + donated * (effect.sum(-1) if effect.ndim == 3 else effect)
        return total

    def changes(self, heads: slice) -> list[tuple[Tensor, Tensor]]:
        """Weights [H',T,S] and values [H',S,V] whose products, summed, are what each source s takes off each read t."""
        r = self.recurrence.select(heads=heads)
        changes = []
        for sign, k, u in self.sides():
            moved = r.with_write(k[:, :, heads], u[:, :, heads])
            changes.append((sign * moved.attention()[0], u[0, :, heads].transpose(0, 1).to(r.dtype)))
        return changes


@dataclass(frozen=True)
class WayOut:
    """From what the heads of a layer read to what they hand on: linear but for the scale of one norm."""

    reads: Tensor
    """[1,T,H,V], a leaf."""
    handed_on: Tensor
    """[1,T,H,V]."""
    norm: HeadNorm | None
    added: Tensor
    """[1,T,D], what the block adds; or what is handed on, where no more was asked for."""
    n_norms: int = 1

    def effects(self, swap: Swap, gradient: Tensor) -> Tensor | None:
        """[T,H], sum_t <gradient_t, z_t - z_t'> for each write, where z' is without it. ``gradient`` [1,T,H,V], of what
        is handed on. None where each value channel has its own decay and the way has a norm."""
        gradient = gradient.to(self.handed_on)
        norm = self.norm
        if norm is None or swap.recurrence.rates is not None:
            (at_reads,) = torch.autograd.grad(self.handed_on, self.reads, gradient, retain_graph=True)
            return swap.first_order(at_reads) if norm is None else None
        wanted = (self.reads, norm.level)
        along, total = torch.autograd.grad(self.handed_on, wanted, gradient, retain_graph=True)
        slope, curve = _slope_and_curve(norm, self.reads)
        r = swap.recurrence
        step = max(1, _ROOM // r.T**2)
        effects = []
        for first in range(0, r.H, step):
            heads = slice(first, first + step)
            part = _Part(
                along=_by_head(along, heads),
                total=_per_head(norm.sign * total, r)[heads],
                slope=_by_head(slope, heads),
                curve=_by_head(curve, heads),
                square=_per_head(norm.square, r)[heads],
                centered=norm.centered,
            )
            effects.append(part.effects(swap.changes(heads)))
        return torch.cat(effects).T


def _by_head(x: Tensor, heads: slice) -> Tensor:
    """[1,T,H,V] as [H',T,V]."""
    return x.detach()[0, :, heads].transpose(0, 1)


def _per_head(x: Tensor, r: Recurrence) -> Tensor:
    """What a norm over one or several heads has for each token, as [H,T,1]."""
    groups = x.detach().reshape(r.T, -1)
    return groups.repeat_interleave(r.H // groups.shape[1], 1).T[:, :, None]


@torch.enable_grad()
def _slope_and_curve(norm: HeadNorm, reads: Tensor) -> tuple[Tensor, Tensor]:
    """First and second derivatives [1,T,H,V] of the norm's mean square by each entry of the reads. The square of a
    centered norm is not a sum over entries; along centered directions its second derivative is 2 / V."""
    (slope,) = torch.autograd.grad(norm.square.sum(), reads, create_graph=True)
    if norm.centered:
        return slope, torch.full_like(reads, 2 / reads.shape[-1])
    (curve,) = torch.autograd.grad(slope.sum(), reads, retain_graph=True)
    return slope, curve


class _Part(NamedTuple):
    """What some heads hand on, times a gradient, and the norm's mean square: both by each entry of the reads."""

    along: Tensor
    """[H,T,V], the product's slope at a fixed scale of the norm."""
    total: Tensor
    """[H,T,1], the product's slope by the scale."""
    slope: Tensor
    """[H,T,V], of the mean square."""
    curve: Tensor
    """[H,T,V], of the mean square."""
    square: Tensor
    """[H,T,1]."""
    centered: bool
    """Whether the norm takes the mean off."""

    def effects(self, changes: list[tuple[Tensor, Tensor]]) -> Tensor:
        """[H,S], the effect of each source, by the mean square that is left without it; `Swap.changes`."""
        linear = torch.zeros_like(changes[0][0])
        left = self.square.to(linear) + linear
        for weights, values in changes:
            linear = linear + weights * (self.along.to(values) @ values.mT)
            left = left - weights * (self.slope.to(values) @ self._direction(values).mT)
        for weights, values in changes:
            for other_weights, other_values in changes:
                product = self._direction(values) * self._direction(other_values)
                left = left + weights * other_weights * (self.curve.to(product) @ product.mT) / 2
        ratio = (self.square / left.clamp_min(1e-12)).sqrt()
        return (self.total - (self.total - linear) * ratio).tril().sum(1)

    def _direction(self, values: Tensor) -> Tensor:
        return values - values.mean(-1, keepdim=True) if self.centered else values


class Spans(NamedTuple):
    """Stretches of blocks as linear maps, on one text."""

    ways: dict[int, WayOut]
    """From what recurrent heads read to what the block adds, by layer; without layers of unknown form."""
    attention: dict[int, tuple[Tensor, Tensor]]
    """From what softmax heads hand on [1,T,H,V], a leaf, to what the block adds [1,T,D]."""


def spans(model: HookedRecurrent, tokens: Tensor, added: bool = False) -> Spans:
    """The stretches of every block. Warns of layers whose heads hand on their reads in no known way.

    Args:
        added: follow heads to what their block adds, and softmax heads as well.

    Cost: one pass; graphs reach no further than these stretches.
    """
    scales = ScalesApart()
    kept: dict[str, Tensor] = {}
    norms: dict[str, list[HeadNorm]] = {}
    layers = model.cfg.recurrent_layers

    def begin(x: Tensor, hook: HookPoint) -> Tensor:
        name = str(hook.name)
        torch.set_grad_enabled(True)
        if name.endswith("hook_read"):
            norms[name] = scales.begin()
        kept[name] = x = x.detach().requires_grad_()
        return x

    def middle(x: Tensor, hook: HookPoint) -> None:
        scales.end()
        kept[str(hook.name)] = x

    def finish(x: Tensor, hook: HookPoint) -> Tensor:
        scales.end()
        torch.set_grad_enabled(False)
        kept[str(hook.name)] = x
        return x.detach()

    hooks: list[tuple[str, Callable[..., Tensor | None]]] = []
    for layer in layers:
        hooks += [(f"blocks.{layer}.mixer.hook_read", begin)]
        hooks += [(f"blocks.{layer}.mixer.hook_z", middle if added else finish)]
        hooks += [(f"blocks.{layer}.hook_mixer_out", finish)] if added else []
    softmax = sorted(model.cfg.attention) if added else []
    for layer in softmax:
        hooks += [(f"blocks.{layer}.attn.hook_z", begin), (f"blocks.{layer}.hook_attn_out", finish)]
    with torch.no_grad(), FrozenNorms(), scales, model.hooks(hooks):
        model(tokens)
    ways: dict[int, WayOut] = {}
    for layer in layers:
        reads = f"blocks.{layer}.mixer.hook_read"
        handed_on = kept[f"blocks.{layer}.mixer.hook_z"]
        between = norms[reads]
        end = kept[f"blocks.{layer}.hook_mixer_out"] if added else handed_on
        ways[layer] = WayOut(kept[reads], handed_on, between[0] if between else None, end, len(between))
    _check(model, ways)
    attention = {
        layer: (kept[f"blocks.{layer}.attn.hook_z"], kept[f"blocks.{layer}.hook_attn_out"]) for layer in softmax
    }
    return Spans(ways, attention)


def _check(model: HookedRecurrent, ways: dict[int, WayOut]) -> None:
    """Warn of ways that are no linear map but for one norm, and take them out."""
    unknown: dict[int, str] = {}
    for layer, way in list(ways.items()):
        cause = f"{way.n_norms} norms" if way.n_norms > 1 else _bend(way)
        if cause:
            unknown[layer] = cause
            del ways[layer]
    if unknown:
        said = "; ".join(f"layer {layer}: {cause}" for layer, cause in unknown.items())
        warnings.warn(
            f"writes of {len(unknown)} layer(s) of {model.cfg.model_name} are predicted to first order, since what "
            f"their heads read is not handed on by one norm, gates and projections of torch ({said}). With fla "
            "installed on a GPU, run on the CPU",
            PredictionWarning,
            stacklevel=4,
        )


@torch.enable_grad()
def _bend(way: WayOut) -> str:
    """Why what is handed on is not linear in the reads; an empty string where it is."""
    try:
        (gradient,) = torch.autograd.grad(way.handed_on.sum(), way.reads, create_graph=True, allow_unused=True)
        if gradient is None or not gradient.requires_grad:
            return ""
        (change,) = torch.autograd.grad(gradient.sum(), way.reads, allow_unused=True, retain_graph=True)
    except RuntimeError:  # a kernel whose backward pass has none
        return "a kernel without second derivatives"
    return "" if change is None or not change.any() else "a function that bends"


# ------------------------------------------------------------------------------------------------ texts


def record(model: HookedRecurrent, tokens: Tensor) -> dict[int, Recurrence]:
    """The factors of every recurrent layer on one text."""
    with torch.no_grad(), model.recording() as recorded:
        model(tokens)
    return {layer: row.recurrence for layer, row in recorded.items()}


def one_sequence(model: HookedRecurrent, input: str | Tensor) -> Tensor:
    """Tokens [1,T] of a text.

    Raises:
        InputError: there are several sequences, or dropout is on.
    """
    tokens = model.to_tokens(input) if isinstance(input, str) else input
    if tokens.ndim != 2 or tokens.shape[0] != 1:
        raise InputError(
            f"text: expected one sequence, a string or tokens [1,T], got {list(tokens.shape)}; call once for each"
        )
    if model.hf_model.training:
        raise InputError(
            f"{model.cfg.model_name}: expected evaluation mode, got training mode, in which dropout makes each pass "
            "another one; call model.eval()"
        )
    return tokens


def same_length(model: HookedRecurrent, corrupt: str | Tensor, tokens: Tensor) -> Tensor:
    """Tokens of a corrupt text, which must be as many as ``tokens`` [1,T].

    Raises:
        InputError: they are not; says what both texts are.
    """
    other = one_sequence(model, corrupt)
    if other.shape != tokens.shape:
        texts = ""
        if model.tokenizer is not None:
            texts = f": {model.to_str_tokens(other)} against {model.to_str_tokens(tokens)}"
        raise InputError(
            f"corrupt: expected {tokens.shape[1]} tokens, as many as the text has, got {other.shape[1]}{texts}. "
            "Replace words by words of as many tokens; model.to_str_tokens shows them"
        )
    return other
