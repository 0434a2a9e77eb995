"""What deleting a write does, predicted for every write at once."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from inspect import signature
from typing import TYPE_CHECKING, Literal, NamedTuple

import pandas as pd
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hookpoints.circuit.norms import FROZEN, HeadNorm, Held, MeanSquare, constants, rounding
from hookpoints.circuit.tables import Node, nodes_of_block
from hookpoints.errors import InputError, PredictionWarning
from hookpoints.layer.context import scope
from hookpoints.layer.intercept import wrap_forward
from hookpoints.recurrence.canonical import terms
from hookpoints.recurrence.recurrence import Recurrence
from hookpoints.scopes import own_gradients, scoped

if TYPE_CHECKING:
    from transformer_lens.hook_points import HookPoint

    from hookpoints.hooks.guard import Hook
    from hookpoints.model.recurrent import HookedRecurrent

Token = str | int
"""A token as text or id."""
LogitMetric = Callable[[Tensor], Tensor]
"""A number made of logits [B,T,vocab], differentiably."""
Through = Literal["norm"] | None
"""What a write is deleted exactly through, besides its recurrence."""
_ROOM = 2**22
"""Weights [H,T,S] at once."""
_LONG = 512
"""Tokens from which on a backward pass costs one pass more and keeps the activations of one block alone."""
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
        InputError: there are several sequences, the corrupt text has another length or equals the text, the metric is
            not one finite number, or the model was loaded in inference mode.
        RuntimeError: of torch, where the metric does not depend on the logits.

    Warns (`PredictionWarning`) where a layer hands on its reads in a way that is no norm, gate and projection of torch:
    its writes are predicted to first order.

    Cost: about five passes: one with gradients, whose memory grows with T times layers, one without, and the patterns
    of all heads, T / V times their recurrence. It leaves inference mode and autocast for its own passes; weights that
    are trained keep their ``requires_grad``, and other threads may run the model meanwhile.
    """
    check_is_text(input)
    with own_gradients(model.cfg.device.type):
        tokens = one_sequence(model, input)
        donors = {} if corrupt is None else record(model, same_length(model, corrupt, tokens))
        gradients = read_gradients(model, tokens, metric, frozen)
        with reading(model, HEADS) as read:
            recurrences = record(model, tokens)
        ways = {} if through is None else read.ways
        effects, bounds, *_ = predict_writes(model, recurrences, ways, gradients, donors)
    tables = [nodes_of_block(Node("write", layer, 0), effect, bounds[layer]) for layer, effect in effects.items()]
    found = pd.concat(tables, ignore_index=True).rename(columns={"predicted": "attribution"})
    return found[["layer", "head", "position", "attribution"]]


Gradients = Mapping[str, Tensor]
"""Of a metric on one text, [1,T,...] by the name of the hook."""


@torch.enable_grad()
def read_gradients(
    model: HookedRecurrent,
    tokens: Tensor,
    metric: LogitMetric,
    frozen: bool,
    further: tuple[str, ...] = (),
    last: bool = False,
) -> Gradients:
    """One pass and its backward pass, in which blocks of a long text run again: gradients by what heads read and hand
    on.

    Args:
        further: names of hooks whose gradients are wanted as well.
        last: the metric depends on the logits after the last token alone, and is given no others.

    Raises:
        InputError: the metric is not one finite number.
    """
    kept: dict[str, Tensor] = {}
    layers = model.cfg.recurrent_layers
    names = [f"blocks.{layer}.mixer.{hook}" for layer in layers for hook in ("hook_read", "hook_z")]

    def begin(x: Tensor, hook: HookPoint) -> Tensor:
        x = x.detach().requires_grad_()
        if str(hook.name) in further:
            kept[str(hook.name)] = x
        return x

    def keep(x: Tensor, hook: HookPoint) -> None:
        kept.setdefault(str(hook.name), x)  # a block that runs again fires again

    def constant(x: Tensor, hook: HookPoint) -> Tensor:
        return x.detach()

    hooks: list[tuple[str, Callable[..., Tensor | None]]] = [("hook_embed", begin)]
    hooks += [(name, keep) for name in (*names, *further) if name != "hook_embed"]
    hooks += [(name, constant) for name in _gradient_cuts(model)] if frozen else []
    held = FROZEN if frozen else ()
    again = _blocks_run_again(model, held) if tokens.shape[1] > _LONG else nullcontext()
    with constants(held), again, model.hooks(hooks):
        value = metric(logits_of(model, tokens, last))
        if value.numel() != 1 or not bool(torch.isfinite(value).all()):
            raise InputError(f"metric: expected one finite number, got {value.detach()!r:.80}")
        values = list(kept.values())
        gradients = torch.autograd.grad(value.reshape(()), values, allow_unused=True)  # it need not depend on all
    return {
        name: torch.zeros_like(value) if gradient is None else gradient
        for (name, value), gradient in zip(kept.items(), gradients)
    }


def keeps_last(model: HookedRecurrent) -> bool:
    """Whether the model can leave all logits but the last out; those of transformers can."""
    return "logits_to_keep" in signature(model.hf_model.forward).parameters


def logits_of(model: HookedRecurrent, tokens: Tensor, last: bool) -> Tensor:
    """[1,T,vocab], or where the ``last`` are enough [1,1,vocab]: those of a long text alone take gigabytes."""
    return model(tokens, logits_to_keep=1) if last and keeps_last(model) else model(tokens)


@scoped
def _blocks_run_again(model: HookedRecurrent, held: Collection[Held]) -> Iterator[None]:
    """In this scope a block keeps for a backward pass what enters it alone, and runs again there: in this thread, which
    has the scopes that are open. Only function modes are off during a backward pass."""

    def modes() -> tuple[AbstractContextManager[object], AbstractContextManager[object]]:
        return nullcontext(), constants(held)

    def around(forward: Callable[..., object], args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        run = partial(forward, *args, **kwargs)
        return checkpoint(run, use_reentrant=False, preserve_rng_state=False, context_fn=modes)

    with scope(model.attachment) as opened, ExitStack() as wrapped, torch.autograd.set_multithreading_enabled(False):
        for layout in model.attachment.layout.blocks:
            wrapped.callback(wrap_forward(layout.block, around, opened.active))
        yield


def _gradient_cuts(model: HookedRecurrent) -> Iterator[str]:
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

    def sides(self) -> list[tuple[Tensor, Tensor]]:
        """Keys [1,T,H,K] and values [1,T,H,V] of the terms that are taken off."""
        r = self.recurrence
        sides = [*zip(terms(r.k), terms(r.u))]
        if self.donor is not None:
            sides += [(k, -u) for k, u in zip(terms(self.donor.k), terms(self.donor.u))]
        return sides

    def first_order(self, read_gradients: Tensor) -> tuple[Tensor, Tensor]:
        """[T,H] each, <W - W', dmetric/dW>, from the gradients of the reads [1,T,H,V]; and a bound of its size, of
        values and gradients that point the same way."""
        effects = []
        bounds = []
        for k, u in self.sides():
            gradients = self.recurrence.with_write(k, u).value_gradients(read_gradients)
            effects.append((u * gradients).sum(-1)[0])
            bounds.append((u.norm(dim=-1) * gradients.norm(dim=-1))[0])
        return torch.stack(effects).sum(0), torch.stack(bounds).sum(0)

    def changes(self, first: int, stop: int) -> list[tuple[Tensor, Tensor]]:
        """Weights [H,T',S] and values [H,S,V] of the writes at tokens from ``first`` to ``stop``. Their products,
        summed, are what each takes off each read from ``first`` on."""
        later = self.recurrence.select(tokens=slice(first, None), initial_state=self.recurrence.starting_state())
        changes = []
        for k, u in self.sides():
            values = u[0, first:stop].transpose(0, 1).to(later.dtype)
            alone = torch.eye(later.T, values.shape[1], dtype=later.dtype, device=u.device)
            alone = alone[None, :, None].expand(-1, -1, later.H, -1)  # a write is read as its weight
            weights = later.with_write(k[:, first:], alone).outputs()[0].transpose(0, 1)
            changes.append((weights, values))
        return changes


@dataclass(frozen=True)
class WayOut:
    """From what the heads of a layer read to what they hand on: linear but for the scale of one norm."""

    reads: Tensor
    """[1,T,H,V], a leaf."""
    handed_on: Tensor
    """[1,T,H,V]."""
    norms: list[HeadNorm]

    @cached_property
    def forms(self) -> list[MeanSquare | None]:
        """Of the mean squares of its norms."""
        return [norm.form(self.reads) for norm in self.norms]

    def through(self, gradient: Tensor) -> ThroughNorm | None:
        """What changes of reads do to <gradient, what is handed on>, exactly. None where that is linear.

        Args:
            gradient: [1,T,H,V].
        """
        form = self.forms[0] if self.forms else None
        if form is None:
            return None
        norm = self.norms[0]
        wanted = (self.reads, norm.level)
        gradient = gradient.to(self.handed_on)
        along, total = torch.autograd.grad(self.handed_on, wanted, gradient, retain_graph=True)
        along, slope, curve = (x[0].transpose(0, 1) for x in (along, form.slope, form.curve))
        total, square = (self._by_head(x) for x in (total, norm.square))
        return ThroughNorm(along, slope, curve, total, square, form.centered)

    def _by_head(self, x: Tensor) -> Tensor:
        """What a norm over one or several heads has for each token, as [H,T,1]."""
        _, length, heads, _ = self.reads.shape
        groups = x.detach().reshape(length, -1)
        return groups.repeat_interleave(heads // groups.shape[1], 1).T[:, :, None]

    def cause(self) -> str:
        """Why this is no linear map but for one norm; an empty string where it is."""
        if len(self.norms) > 1:
            return f"{len(self.norms)} norms"
        try:
            if any(_is_not_linear(self.handed_on, x) for x in (self.reads, *(norm.level for norm in self.norms))):
                return "a function that bends"
            if None in self.forms:
                return "a root of something else than a mean square"
        except RuntimeError:  # a kernel whose backward pass has none
            return "a kernel without second derivatives"
        return ""


@torch.enable_grad()
def _is_not_linear(y: Tensor, x: Tensor) -> bool:
    """Whether ``y`` is not linear in ``x``."""
    (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True, allow_unused=True)
    if slope is None or not slope.requires_grad:
        return False
    probe = torch.arange(x.numel(), device=x.device).cos().view_as(x)  # slopes of a centered norm sum to 0
    (curve,) = torch.autograd.grad((slope * probe).sum(), x, allow_unused=True, retain_graph=True)
    return curve is not None and bool(((curve * x).abs() > rounding(y) * slope.abs().max()).any())


class ThroughNorm(NamedTuple):
    """What some heads hand on, times a gradient, and the norm's mean square: both by each entry of the reads."""

    along: Tensor
    """[H,T,V], the product's slope at a fixed scale of the norm."""
    slope: Tensor
    """[H,T,V], of the mean square."""
    curve: Tensor
    """[H,T,V], of the mean square."""
    total: Tensor
    """[H,T,1], the product's slope by the scale."""
    square: Tensor
    """[H,T,1]."""
    centered: bool
    """Whether the norm takes the mean off."""

    def select(self, heads: slice, tokens: slice = slice(None)) -> ThroughNorm:
        """The same of some heads and tokens."""
        along, slope, curve, total, square = (x[heads, tokens] for x in self[:5])
        return ThroughNorm(along, slope, curve, total, square, self.centered)

    def of_writes(self, swap: Swap) -> Tensor:
        """[T,H], sum_t <gradient_t, z_t - z_t'> for each write, where z' is what is handed on without it."""
        r = swap.recurrence
        step = max(1, _ROOM // (r.H * r.T))
        effects = []
        for first in range(0, r.T, step):
            later = self.select(slice(None), slice(first, None))
            effects.append(later._of_changes(swap.changes(first, first + step)))
        return torch.cat(effects, 1).T

    def _of_changes(self, changes: list[tuple[Tensor, Tensor]]) -> Tensor:
        """[H,S], the effect of each source, by the mean square that is left without it; `Swap.changes`."""
        linear = torch.zeros_like(changes[0][0])
        left = self.square.to(linear) + linear
        for weights, values in changes:
            linear = linear + weights * (self.along.to(values) @ values.mT)
            left = left - weights * (self.slope.to(values) @ values.mT)
            for other_weights, other_values in changes:
                product = self._centered_values(values) * self._centered_values(other_values)
                left = left + weights * other_weights * (self.curve.to(product) @ product.mT) / 2
        return self._taken_off(linear, left).tril().sum(1)

    def of_reads(self, taken: Tensor) -> Tensor:
        """[N], the same of one head where ``taken`` [N,T,V] are taken off its reads."""
        of_squares = self._centered_values(taken).square() / 2
        linear, by_slope, by_curve = (
            torch.einsum("ntv,htv->htn", values, weights.to(taken))
            for values, weights in ((taken, self.along), (taken, self.slope), (of_squares, self.curve))
        )
        left = self.square - by_slope + by_curve
        return self._taken_off(linear, left).sum((0, 1))

    def _taken_off(self, linear: Tensor, left: Tensor) -> Tensor:
        """[H,T,N], what changes take off the product: ``linear`` at a fixed scale; ``left`` is the mean square then."""
        ratio = (self.square / left.clamp_min(1e-12)).sqrt()
        return self.total - (self.total - linear) * ratio

    def _centered_values(self, values: Tensor) -> Tensor:
        return values - values.mean(-1, keepdim=True) if self.centered else values


class Writes(NamedTuple):
    """What writes take off a metric, predicted."""

    effects: dict[int, Tensor]
    """[T,H] by layer."""
    bounds: dict[int, Tensor]
    """[T,H] by layer, of their size to first order."""
    unknown: dict[int, str]
    """Layers whose heads hand on their reads in no known way, with the reason."""
    through: dict[int, ThroughNorm]
    """By layer, where a norm follows the reads."""


@torch.no_grad()
def predict_writes(
    model: HookedRecurrent,
    recurrences: Mapping[int, Recurrence],
    ways: Mapping[int, WayOut],
    gradients: Gradients,
    donors: Mapping[int, Recurrence],
) -> Writes:
    """What each write takes off the metric: through the norm of its head, or to first order.

    Args:
        ways: from what heads read to what they hand on; a layer without one is predicted to first order.
        donors: factors of a corrupt text by layer, whose writes replace those of this one; none: writes are deleted.

    Warns of layers whose heads hand on their reads in no known way.
    """
    writes = Writes({}, {}, {}, {})
    for layer, r in recurrences.items():
        swap = Swap(r, donors.get(layer))
        mixer = f"blocks.{layer}.mixer"
        writes.effects[layer], writes.bounds[layer] = swap.first_order(gradients[f"{mixer}.hook_read"])
        way = ways.get(layer)
        cause = "" if way is None else way.cause()
        if cause:
            writes.unknown[layer] = cause
        elif way is not None and r.rates is None and (through := way.through(gradients[f"{mixer}.hook_z"])) is not None:
            writes.through[layer] = through
            writes.effects[layer] = through.of_writes(swap)
    if writes.unknown:
        said = "; ".join(f"layer {layer}: {cause}" for layer, cause in writes.unknown.items())
        warnings.warn(
            f"writes of {len(writes.unknown)} layer(s) of {model.cfg.model_name} are predicted to first order, since "
            f"what their heads read is not handed on by one norm, gates and projections of torch ({said}). With fla "
            "installed on a GPU, run on the CPU",
            PredictionWarning,
            stacklevel=4,
        )
    return writes


# ------------------------------------------------------------------------------------------------ what hooks see


class PassValues(NamedTuple):
    """What a pass leaves."""

    values: dict[str, Tensor]
    """What hooks saw, [1,T,...], by name; with graphs from what heads read or hand on to what their block adds."""
    ways: dict[int, WayOut]
    """By layer."""


HEADS = ("mixer.hook_read", "mixer.hook_z")
"""What heads read and hand on."""
STREAM = ("hook_resid_pre", *HEADS, "hook_mixer_out", "attn.hook_z", "hook_attn_out", "hook_mlp_out", "hook_resid_post")
"""All that the residual stream is made of."""


@scoped
def reading(model: HookedRecurrent, ends: Collection[str] = STREAM, follow: bool = True) -> Iterator[PassValues]:
    """In this scope a pass leaves the embeddings and what the hooks of blocks saw whose names end so.

    Args:
        follow: by autograd, norms fixed, what heads read and hand on, as far as the last hook of ``ends``.
    """
    read = PassValues({}, {})
    last = {*ends} & {"hook_mixer_out", "hook_attn_out"} or {"mixer.hook_z"}

    def keep(x: Tensor, hook: HookPoint) -> None:
        read.values[str(hook.name)] = x

    def lead(x: Tensor, hook: HookPoint) -> Tensor:
        _, layer, end = str(hook.name).split(".", 2)
        if end in ("mixer.hook_read", "attn.hook_z"):
            torch.set_grad_enabled(True)
            mode.apart = [] if end == "mixer.hook_read" else None
            x = x.detach().requires_grad_()
        keep(x, hook)
        if end == "mixer.hook_z":
            read.ways[int(layer)] = WayOut(read.values[f"blocks.{layer}.mixer.hook_read"], x, mode.apart or [])
            mode.apart = None
        if end in last:
            torch.set_grad_enabled(False)
            x = x.detach()
        return x

    hooks: list[tuple[str, Hook]] = [("hook_embed", keep)]
    for name in model.hook_dict:
        if name.startswith("blocks.") and (end := name.split(".", 2)[-1]) in ends:
            is_led = follow and end in (*HEADS, "attn.hook_z", *last)
            hooks.append((name, lead if is_led else keep))
    with torch.no_grad(), constants(["norms"]) as mode, model.hooks(hooks):
        yield read


# ------------------------------------------------------------------------------------------------ texts


def record(model: HookedRecurrent, tokens: Tensor) -> dict[int, Recurrence]:
    """The factors of every recurrent layer on one text."""
    with torch.no_grad(), model.recording() as recorded:
        logits_of(model, tokens, last=True)
    return {layer: row.recurrence for layer, row in recorded.items()}


def check_is_text(input: object) -> None:
    """Raise InputError where text and model are exchanged."""
    if not isinstance(input, str | Tensor):
        raise InputError(
            f"text: expected a string or tokens [1,T], got {type(input).__name__}; the order is attribute(text, model) "
            "and write_attribution(model, text, metric)"
        )


def one_sequence(model: HookedRecurrent, input: str | Tensor) -> Tensor:
    """Tokens [1,T] of a text.

    Raises:
        InputError: there are several sequences, dropout is on, or the weights are of inference mode.
    """
    tokens = model.to_tokens(input) if isinstance(input, str) else input.clone()  # of inference mode, perhaps
    if tokens.ndim != 2 or tokens.shape[0] != 1:
        raise InputError(
            f"text: expected one sequence, a string or tokens [1,T], got {list(tokens.shape)}; call once for each"
        )
    if model.hf_model.training:
        raise InputError(
            f"{model.cfg.model_name}: expected evaluation mode, got training mode, in which dropout makes each pass "
            "another one; call model.eval()"
        )
    if any(weight.is_inference() for weight in (*model.hf_model.parameters(), *model.hf_model.buffers())):
        raise InputError(
            f"{model.cfg.model_name}: expected weights that gradients can pass, got those of a model that was made in "
            "torch.inference_mode(); load it outside"
        )
    return tokens


def same_length(model: HookedRecurrent, corrupt: str | Tensor, tokens: Tensor) -> Tensor:
    """Tokens of a corrupt text, which must be as many as ``tokens`` [1,T], and other ones.

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
    if other.equal(tokens.to(other.device)):
        raise InputError("corrupt: expected another text, got the same tokens; replace the word that is asked for")
    return other
