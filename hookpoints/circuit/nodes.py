"""What deleting a write does, predicted for every write at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from inspect import signature
from typing import TYPE_CHECKING

import pandas as pd
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hookpoints.circuit.norms import constants
from hookpoints.circuit.tables import Node, Predicted, predicted_nodes
from hookpoints.errors import InputError
from hookpoints.layer.context import scope
from hookpoints.layer.intercept import wrap_forward
from hookpoints.recurrence.canonical import terms
from hookpoints.recurrence.recurrence import Recurrence
from hookpoints.scopes import own_gradients, scoped

if TYPE_CHECKING:
    from transformer_lens.hook_points import HookPoint

    from hookpoints.model.recurrent import HookedRecurrent

Token = str | int
"""A token as text or id."""
LogitMetric = Callable[[Tensor], Tensor]
"""A number made of logits [B,T,vocab], differentiably."""
_LONG = 512
"""Tokens from which on a backward pass costs one pass more and keeps the activations of one block alone."""
_CONSTANT = ("hook_q", "hook_k", "hook_beta", "hook_log_decay", "hook_erase_a", "hook_erase_b")
"""What of a recurrence does not follow its writes while they are followed alone."""


def write_attribution(
    model: HookedRecurrent,
    input: str | Tensor,
    metric: LogitMetric,
    *,
    corrupt: str | Tensor | None = None,
    frozen: bool = False,
) -> pd.DataFrame:
    """What deleting each write would take off a metric, predicted for all writes of all layers.

    A write is deleted exactly through its recurrence, with later erases reacting; what follows the read is to first
    order (Nanda, "Attribution patching", 2023): with W_s = k_s u_s^T a write gets <W_s, dmetric/dW_s>.

    Args:
        input: one sequence, text or tokens [1,T].
        metric: from logits [1,T,vocab] to a number.
        corrupt: another text of as many tokens. Each write is then replaced by that of the corrupt text instead of
            deleted (activation patching of writes). Predictions of this kind are the best.
        frozen: hold norms, keys, gates and patterns of the layers above fixed; for saturated answers, as of small
            models that are always right, whose gradients are nearly 0.

    Returns: one row for each write: ``layer``, ``head``, ``position``, ``attribution`` (in units of the metric).

    Raises:
        InputError: there are several sequences, the corrupt text has another length or equals the text, the metric is
            not one finite number, or the model was loaded in inference mode.
        RuntimeError: of torch, where the metric does not depend on the logits.

    Cost: about four passes: one with gradients, whose memory grows with T times layers, and one without. It leaves
    inference mode and autocast for its own passes; weights that are trained keep their ``requires_grad``, and other
    threads may run the model meanwhile.
    """
    check_is_text(input)
    with own_gradients(model.cfg.device.type):
        tokens = one_sequence(model, input)
        donors = {} if corrupt is None else record(model, same_length(model, corrupt, tokens))
        gradients = read_gradients(model, tokens, metric, frozen)
        writes = predicted_nodes(predict_writes(record(model, tokens), gradients, donors))
    table = writes.rename(columns={"predicted": "attribution"})
    return table[["layer", "head", "position", "attribution"]]


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
    """One pass and its backward pass, in which blocks of a long text run again: gradients by what heads read.

    Args:
        further: names of hooks whose gradients are wanted as well.
        last: the metric depends on the logits after the last token alone, and is given no others.

    Raises:
        InputError: the metric is not one finite number.
    """
    kept: dict[str, Tensor] = {}
    layers = model.cfg.recurrent_layers
    names = [f"blocks.{layer}.mixer.hook_read" for layer in layers]

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
    again = _blocks_run_again(model, frozen) if tokens.shape[1] > _LONG else nullcontext()
    with constants(frozen), again, model.hooks(hooks):
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
def _blocks_run_again(model: HookedRecurrent, frozen: bool) -> Iterator[None]:
    """In this scope a block keeps for a backward pass what enters it alone, and runs again there: in this thread, which
    has the scopes that are open. Only function modes are off during a backward pass."""

    def modes() -> tuple[AbstractContextManager[object], AbstractContextManager[object]]:
        return nullcontext(), constants(frozen)

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


@torch.no_grad()
def predict_writes(
    recurrences: Mapping[int, Recurrence], gradients: Gradients, donors: Mapping[int, Recurrence]
) -> list[Predicted]:
    """What each write W_s takes off the metric, to first order <W_s - W'_s, dmetric/dW_s>; and a bound of its size, of
    values and gradients that point the same way.

    Args:
        donors: factors of a corrupt text by layer, whose writes W' replace those of this one; none: W' = 0.
    """
    predicted = []
    for layer, r in recurrences.items():
        at_reads = gradients[f"blocks.{layer}.mixer.hook_read"]
        # Keys and values of the terms that are taken off; those of another text are put in.
        sides = [*zip(terms(r.k), terms(r.u))]
        if layer in donors:
            sides += [(k, -u) for k, u in zip(terms(donors[layer].k), terms(donors[layer].u))]
        effects = []
        bounds = []
        for k, u in sides:
            at_values = r.with_write(k, u).value_gradients(at_reads)
            effects.append((u * at_values).sum(-1)[0])
            bounds.append((u.norm(dim=-1) * at_values.norm(dim=-1))[0])
        sums = (torch.stack(each).sum(0) for each in (effects, bounds))
        predicted.append(Predicted(Node("write", layer, 0), *sums))
    return predicted


# ------------------------------------------------------------------------------------------------ what hooks see


STREAM = ("hook_resid_pre", "mixer.hook_read", "attn.hook_z", "hook_attn_out", "hook_mlp_out")
"""What nodes are, and the stream that enters a block."""


@scoped
def reading(model: HookedRecurrent) -> Iterator[dict[str, Tensor]]:
    """In this scope a pass leaves the embeddings and what blocks are made of, [1,T,...] by the name of the hook."""
    values: dict[str, Tensor] = {}

    def keep(x: Tensor, hook: HookPoint) -> None:
        values[str(hook.name)] = x

    names = [name for name in model.hook_dict if name.startswith("blocks.") and name.split(".", 2)[-1] in STREAM]
    with torch.no_grad(), model.hooks([(name, keep) for name in ("hook_embed", *names)]):
        yield values


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
