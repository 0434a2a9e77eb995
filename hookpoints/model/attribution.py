"""What writes do to the output: exactly on the direct path to a logit, and to first order for any metric.

`source_attribution` follows one layer: read -> gate and norm -> out_proj -> residual stream -> final norm -> W_U, with
the scales of the norms held at what they are on this run, as direct logit attribution does. `write_attribution` takes
one backward pass for every write of every layer; `check_attribution` deletes writes and compares.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from hookpoints.edits.edit import WriteEdit
from hookpoints.errors import InputError, UnsupportedModelError

if TYPE_CHECKING:
    from transformer_lens.hook_points import HookPoint

    from hookpoints.model.recurrent import HookedRecurrent

Token = str | int
"""A token as text or id."""
LogitMetric = Callable[[Tensor], Tensor]
"""A number made of logits [B,T,vocab], differentiably."""


@torch.enable_grad()
def source_attribution(
    model: HookedRecurrent,
    input: str | Tensor,
    layer: int,
    answer: Token | Tensor,
    against: Token | Tensor | None = None,
) -> Tensor:
    """What head h at token t gives to a logit for having read the write at s, on the direct path: [B,H,T,S], in logits.

    The weight A[t,s] times the value u_s, through the head's gate and norm, ``W_O``, the final norm and ``W_U``, with
    the scales of both norms as they are on this run. The sum over s is the head's direct logit attribution: ``hook_z``
    through ``W_O``, final norm and ``W_U``; less what does not come from the state (Mamba-2's skip D x, the bonus of
    RWKV, the bias of a head norm). Where tokens write several terms, their sum.

    Args:
        answer: the token whose logit counts, or token ids [B,T], one for each position.
        against: the token whose logit is taken off.

    Raises:
        UnsupportedModelError: ``layer`` has no recurrence, or what lies between its reads and the residual stream is no
            gate, norm or projection of torch (fla's fused norms on a GPU).
        ValueError: each entry of the state has its own decay (Mamba-1), so that no weight belongs to a source.

    Cost: a pass with gradients, and `Recurrence.attention` of the layer.
    """
    model.cfg.layer(layer)
    reads = f"blocks.{layer}.mixer.hook_read"
    last = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
    ends: dict[str, Tensor] = {}

    def begin(x: Tensor, hook: HookPoint) -> Tensor:
        ends[str(hook.name)] = x = x.detach().requires_grad_()
        return x

    def finish(x: Tensor, hook: HookPoint) -> Tensor:
        ends["added"] = x
        return x.detach()

    hooks = [(reads, begin), (f"blocks.{layer}.hook_mixer_out", finish), (last, begin)]
    with _FrozenNorms(), model.recording() as record, model.hooks(hooks):
        logits = cast(Tensor, model(input))
    wanted = _logit(model, logits, answer) - (0 if against is None else _logit(model, logits, against))
    (direction,) = torch.autograd.grad(wanted.sum(), ends[last])
    (gradient,) = torch.autograd.grad(ends["added"], ends[reads], direction.to(ends["added"]), create_graph=True)
    _check_linear(gradient, ends[reads], layer)
    with torch.no_grad():
        r = record[layer].recurrence
        values = r.u if r.k.ndim == 5 else r.u.unsqueeze(3)
        of_values = torch.einsum("bthv,bshrv->bhtsr", gradient.to(r.dtype), values.to(r.dtype))
        return (r.attention().view_as(of_values) * of_values).sum(-1)


@torch.enable_grad()
def write_attribution(model: HookedRecurrent, input: str | Tensor, metric: LogitMetric) -> pd.DataFrame:
    """The first-order effect of every write on a metric: <W, dmetric/dW>, what deleting the write would take off.

    One forward and one backward pass of the model give the gradients of all reads; `Recurrence.value_gradients` carries
    them to the writes, with later erases reacting (closed loop), as a `WriteEdit` that deletes does.

    Args:
        input: one sequence, text or tokens [1,T].
        metric: from logits [1,T,vocab] to a number.

    Returns: one row for each write: ``layer``, ``head``, ``position``, ``attribution`` (in units of the metric).

    Raises:
        InputError: there are several sequences.
        RuntimeError: of torch, where the metric is not one number that depends on the logits.

    `check_attribution` tells how far first order carries. Cost: a pass with gradients, whose memory grows with T times
    layers, and one recurrence backwards in time for each layer.
    """
    layers = model.cfg.recurrent_layers
    reads: dict[str, Tensor] = {}

    def begin(x: Tensor, hook: HookPoint) -> Tensor:
        return x.detach().requires_grad_()

    def keep(x: Tensor, hook: HookPoint) -> None:
        reads[str(hook.name)] = x

    names = [f"blocks.{layer}.mixer.hook_read" for layer in layers]
    with model.recording() as record, model.hooks([("hook_embed", begin), *((name, keep) for name in names)]):
        logits = cast(Tensor, model(_one_sequence(model, input)))
    inputs = [reads[name] for name in names]
    # A metric need not depend on the reads of every layer.
    gradients = torch.autograd.grad(metric(logits).reshape(()), inputs, allow_unused=True)
    tables = []
    with torch.no_grad():
        for layer, name, gradient in zip(layers, names, gradients, strict=True):
            r = record[layer].recurrence
            if gradient is None:
                gradient = torch.zeros_like(reads[name])
            effect = (r.u * r.value_gradients(gradient)).sum(-1)
            if r.k.ndim == 5:
                effect = effect.sum(3)
            table = effect[0].cpu().numpy()  # [T,H]
            position, head = np.indices(table.shape).reshape(2, -1)
            columns = {"layer": layer, "head": head, "position": position, "attribution": table.ravel()}
            tables.append(pd.DataFrame(columns))
    return pd.concat(tables, ignore_index=True)


class AttributionCheck(NamedTuple):
    """First-order attributions against what deleting the writes does."""

    table: pd.DataFrame
    """The rows that were tried, with ``measured``: the plain run's metric less that of the run without the write."""
    correlation: float
    """Pearson's, of ``attribution`` and ``measured``."""
    slope: float
    """Of the line through the points (``attribution``, ``measured``) by least squares: 1 where first order is all."""

    def __str__(self) -> str:
        return (
            f"{len(self.table)} writes deleted one by one: correlation {self.correlation:.3f}, slope {self.slope:.3f}"
        )


@torch.no_grad()
def check_attribution(
    model: HookedRecurrent, input: str | Tensor, metric: LogitMetric, attributions: pd.DataFrame
) -> AttributionCheck:
    """Delete each write of ``attributions`` in its own run, exactly, and compare.

    Args:
        input, metric: those of `write_attribution`.
        attributions: its rows, or some of them: ``table.sample(200)``, ``table.nlargest(50, "attribution")``.

    Raises ValueError for fewer than two rows. Cost: the runs of ``model.run_with_edits``, one for each row.
    """
    if len(attributions) < 2:
        raise ValueError(f"a correlation needs at least two writes, got {len(attributions)}")
    session = model.edit_session(_one_sequence(model, input))
    plain = float(metric(session.logits))
    measured = pd.Series(index=attributions.index, dtype=float)
    # A batch runs from its first position and lowest layer on, so that neighbors share one.
    for _, rows in attributions.sort_values("position").groupby("layer"):
        for start in range(0, len(rows), _BATCH):
            batch = rows.iloc[start : start + _BATCH]
            places = batch[["layer", "head", "position"]].astype(int).itertuples(index=False)
            run = session.run([WriteEdit(*place, mode="delete") for place in places])
            before = session.logits[0, : run.start]  # the metric sees the whole sequence
            for index, after in zip(batch.index, run.logits, strict=True):
                logits = torch.cat([before, after])[None]
                measured[index] = plain - float(metric(logits))
    table = attributions.assign(measured=measured)
    predicted = table["attribution"]
    slope, _ = np.polyfit(predicted, measured, 1)
    return AttributionCheck(table, float(predicted.corr(measured)), float(slope))


_BATCH = 64
"""Edited runs at once."""


class _FrozenNorms(TorchFunctionMode):
    """While this is on, norms are to autograd what they are at a fixed scale: gain * (x - mean) / scale + bias. Values
    do not change."""

    def __torch_function__(
        self, func: Callable[..., Tensor], types: Iterable[type], args: tuple = (), kwargs: Mapping | None = None
    ) -> Tensor:
        value = func(*args, **(kwargs or {}))
        if func in _SCALES:
            return value.detach()
        if func not in (F.layer_norm, F.group_norm) or not value.requires_grad:
            return value
        linear = _at_fixed_scale(1 if func is F.layer_norm else args[1], *args, **(kwargs or {}))
        return value.detach() + (linear - linear.detach())


_SCALES = (torch.rsqrt, torch.sqrt, Tensor.rsqrt, Tensor.sqrt)
"""What a norm that is written out takes of its mean square."""


def _at_fixed_scale(
    groups: int, x: Tensor, _: object, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """LayerNorm over groups of the last axis of x, its standard deviation a constant."""
    parts = x.unflatten(-1, (groups, -1))
    scale = (parts.var(-1, unbiased=False, keepdim=True) + eps).sqrt().detach()
    normed = ((parts - parts.mean(-1, keepdim=True)) / scale).flatten(-2)
    normed = normed if weight is None else normed * weight
    return normed if bias is None else normed + bias


def _check_linear(gradient: Tensor, reads: Tensor, layer: int) -> None:
    """Raise UnsupportedModelError if ``gradient``, of what a layer adds with respect to its reads, depends on them."""
    try:
        (change,) = torch.autograd.grad(gradient.sum(), reads, allow_unused=True) if gradient.requires_grad else (None,)
        linear = change is None or not change.any()
    except RuntimeError:  # a kernel whose backward pass has none
        linear = False
    if not linear:
        raise UnsupportedModelError(
            f"layer {layer} hands its reads on through something that is no gate, norm or projection of torch, so that "
            "no part of its output belongs to a source; on a GPU with fla installed, run on the CPU"
        )


def _logit(model: HookedRecurrent, logits: Tensor, token: Token | Tensor) -> Tensor:
    """[B,T], of one token or of one for each position."""
    ids = torch.as_tensor(model.to_single_token(token) if isinstance(token, str) else token, device=logits.device)
    return logits.gather(-1, ids.expand(logits.shape[:-1]).unsqueeze(-1)).squeeze(-1)


def _one_sequence(model: HookedRecurrent, input: str | Tensor) -> Tensor:
    tokens = model.to_tokens(input) if isinstance(input, str) else input
    if tokens.ndim != 2 or tokens.shape[0] != 1:
        raise InputError(f"attribution is about one sequence, a text or tokens [1,T]; got {list(tokens.shape)}")
    return tokens
