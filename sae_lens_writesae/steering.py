"""Steering: add to what one head writes, toward a token or along an atom of a dictionary.

    >>> from hookpoints import HookedRecurrent
    >>> from sae_lens_writesae import steer
    >>> model = HookedRecurrent.from_pretrained("embedded")
    >>> with steer(model, 2, 0, toward=" war", strength=3):
    ...     text = model.generate("The people of", max_new_tokens=5, do_sample=False)

A steering is a value: making one runs nothing. It acts inside its `with` block, on every pass (prompt and generated
tokens), and the model is the same as before after the block, also after an exception. Blocks nest, and add up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Literal, Self, cast

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformer_lens.hook_points import HookPoint

from hookpoints import HookedRecurrent
from sae_lens_writesae.atom.low_rank import LowRank
from sae_lens_writesae.sae.target import (
    Dictionary,
    HeadHook,
    check_hook,
    check_plain_activations,
    decoder_atoms,
    head_target,
)

TargetToken = int | str
NamedHook = tuple[str, Callable[[Tensor, HookPoint], Tensor | None]]


def token_id(model: HookedRecurrent, target: TargetToken) -> int:
    """The id of a token given as id or as a string that is exactly one token.

    Raises:
        ValueError: the string is several tokens (the message names them), or the id is out of range.
    """
    if isinstance(target, str):
        return model.to_single_token(target)
    if not 0 <= target < model.W_U.shape[1]:
        raise ValueError(f"token: expected an id below {model.W_U.shape[1]}, got {target}")
    return target


@torch.no_grad()
def value_direction(model: HookedRecurrent, layer: int, head: int, token: int) -> Tensor:
    """w_T = W_O^h W_U[T] / |.| [V]: what a read must contain to raise the logit of `token` along the direct path.

    Source: WriteSAE (arXiv 2605.12770), the sign and install tests. It leaves out later layers, and the gains of head
    norm, gate and final norm.
    """
    W_O = model.layer_W_O(layer)[head]
    logit = model.W_U[:, token].to(W_O.device)  # layers and unembedding may lie on two devices
    return normalize((W_O @ logit).detach(), dim=0)


@dataclass(frozen=True, eq=False)
class Steering:
    """A `with` block in which hooks act on a model. It may be entered again, also while it is open."""

    model: HookedRecurrent
    hooks: Sequence[NamedHook]
    """For `model.hooks` or `run_with_hooks`. None where nothing would change."""
    _open: list[AbstractContextManager[object]] = field(default_factory=list, init=False, repr=False)

    def __enter__(self) -> Self:
        scope = self.model.hooks(fwd_hooks=list(self.hooks))
        scope.__enter__()
        self._open.append(scope)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return self._open.pop().__exit__(kind, error, trace)


def steer(
    model: HookedRecurrent,
    layer: int | None = None,
    head: int | None = None,
    *,
    toward: TargetToken | Sequence[TargetToken] | Tensor | None = None,
    sae: Dictionary | None = None,
    atom: int | None = None,
    strength: float = 1.0,
    at: Literal["every", "fires"] = "every",
) -> Steering:
    """Steer one head's writes toward tokens, or along an atom.

    At each of these tokens the head also writes strength * |W_t| * D_t. D_t has Frobenius norm 1: it is
    k_t w^T / |k_t| for a value side w (the token's own key), or the atom.

    Args:
        layer, head: the head. They may be left out where an SAE is given, which names its own.
        toward: a token (id, or a string that is one token), several, whose `value_direction`s are averaged, or a value
            side [V] itself.
        sae, atom: a dictionary of this head and one of its atoms. Without `toward` the atom is what is written (a
            negative strength takes it away); with `toward` it only says where (at="fires").
        strength: norm of what is added, in norms of the native write at the same token; negative steers away.
        at: "every" token, or "fires": the tokens at which the atom fires, decided from the live write. What is written
            at chosen positions is a `hookpoints.WriteEdit`.

    What to expect: a write is read through later tokens' queries, whose product with the key may have either sign, so
    that a positive strength can lower the target (the sign test measures how often). Where the head's reads are
    normalized (Gated DeltaNet, KDA), its output has a bounded norm and strengths above about 3 add little. Try several
    heads, the last layers first.

    Cost: on a device, generated tokens wait for it and copy no more than without steering.

    Raises:
        ValueError: no direction or an ambiguous one, a string of several tokens, a zero atom, an SAE of another head,
            or at="fires" with an SAE of states, whose firing the write alone does not decide.
        UnsupportedModelError, UnknownHookError: a layer or head that the model lacks.
    """
    # A dictionary names its head.
    if sae is not None:
        place = _checked_hook(model, sae)
        if (layer, head) not in ((None, None), (place.layer, place.head)):
            raise ValueError(f"layer, head: expected left out, since the SAE reads {place.name}; got {layer}, {head}")
        if at == "fires" and place.target != "write":
            raise ValueError("at: expected 'every', since the SAE reads states; got 'fires'")
        if at != "fires" and toward is not None:
            raise ValueError(f"at: expected 'fires' with toward= and an SAE, whose atom says where; got {at!r}")
        layer = place.layer
        head = place.head
    if layer is None or head is None or (toward is None and atom is None) or (sae is None) != (atom is None):
        raise ValueError(
            "steer: expected a head (layer=, head= or an SAE, which names its own) and a direction (toward=, or sae= "
            f"with atom=), got layer {layer}, head {head}, toward={toward!r}, atom={atom}"
        )
    if at != "every" and (at != "fires" or sae is None):
        raise ValueError(f"at: expected 'every', or with sae= and atom= 'fires'; got at={at!r}")
    target = head_target(model, layer, head)
    fires = partial(_firing_tokens, cast(Dictionary, sae), cast(int, atom)) if at == "fires" else None
    # Toward a token only the value side is given, and each token's own key; an atom is written whole.
    if toward is not None:
        hooks = _value_hooks(layer, head, _value_side(model, layer, head, toward), strength, fires)
    else:
        chosen = decoder_atoms(cast(Dictionary, sae), [cast(int, atom)], target.d_k, target.d_v)
        unit = chosen.with_norm(torch.ones_like(chosen.norm())).dense()[0]
        name = f"blocks.{layer}.mixer.heads.{head}.hook_write"
        hooks = [_atom_hook(name, unit.to(model.hook_device(name)), strength, fires)]
    return Steering(model, hooks if strength else [])


def _firing_tokens(sae: Dictionary, atom: int, writes: Tensor) -> Tensor:
    """[B,T] 1 where the atom fires on writes [B,T,K,V], else 0."""
    return (_atom_activations(sae, writes.flatten(-2))[..., atom] > 0).to(writes)


def _atom_hook(name: str, unit: Tensor, strength: float, fires: Callable[[Tensor], Tensor] | None) -> NamedHook:
    """Add a matrix [K,V] of norm 1 to the writes."""

    def steer_write(writes: Tensor, hook: HookPoint) -> Tensor:
        # Relative to the token's own write: where a head writes little, little is added.
        size = strength * torch.linalg.matrix_norm(writes)
        if fires is not None:
            size = size * fires(writes)
        return writes + size[..., None, None] * unit.to(writes)

    return name, steer_write


def _value_hooks(
    layer: int, head: int, direction: Tensor, strength: float, fires: Callable[[Tensor], Tensor] | None
) -> list[NamedHook]:
    """Add a value side [V] of norm 1 to the values, along each token's own key."""
    keys = list[Tensor]()

    def see_key(key: Tensor, hook: HookPoint) -> None:
        keys[:] = [key[:, :, head]]  # of this pass: it fires before the value's hook

    def steer_value(values: Tensor, hook: HookPoint) -> Tensor:
        if values.ndim == 5:
            raise ValueError(
                f"tokens of layer {layer} write {values.shape[3]} terms each; steering toward a token needs one"
            )
        # k_t w^T / |k_t| times |W_t| = |k_t| |u_t| is k_t (|u_t| w)^T: the key stays, and the value moves.
        value = values[:, :, head]
        size = strength * value.norm(dim=-1, keepdim=True)
        if fires is not None:
            size = size * fires(keys[0][..., None] * value[..., None, :])[..., None]
        steered = values.clone()
        steered[:, :, head] += size * direction.to(value)
        return steered

    mixer = f"blocks.{layer}.mixer"
    hooks: list[NamedHook] = [(f"{mixer}.hook_write_value", steer_value)]
    return [(f"{mixer}.hook_write_key", see_key), *hooks] if fires is not None else hooks


def _value_side(
    model: HookedRecurrent, layer: int, head: int, toward: TargetToken | Sequence[TargetToken] | Tensor
) -> Tensor:
    """[V] of norm 1: the mean `value_direction` of tokens, or what was given."""
    if isinstance(toward, Tensor):
        return normalize(toward, dim=0)
    tokens = [toward] if isinstance(toward, (int, str)) else toward
    directions = [value_direction(model, layer, head, token_id(model, token)) for token in tokens]
    return normalize(torch.stack(directions).sum(0), dim=0)


def scale_atoms(
    model: HookedRecurrent, sae: Dictionary, atoms: Sequence[int], factor: float, *, like: LowRank | None = None
) -> Steering:
    """Amplify (factor > 1), suppress (0) or turn (< 0) atoms wherever they fire, as a `with` block.

    Each firing's write gets (factor - 1) a_i A_i: the atom's own component is multiplied by `factor`. An SAE of writes
    encodes the live write of every token, in the prompt too. An SAE of states encodes the live state of the last token
    of each pass (in generation: the last of the prompt and every generated one), where a change of the state is the
    same as a change of the write.

    Args:
        like: other matrices instead of the atoms, N = len(atoms), at activation 1: a control.

    Raises:
        ValueError: an SAE of another model, or one that normalizes its input.
        IndexError: an atom out of range.
    """
    place = _checked_hook(model, sae)
    chosen = list(atoms)
    shape = model.cfg.layer(place.layer)
    directions = (decoder_atoms(sae, chosen, shape.K, shape.V) if like is None else like).dense().flatten(1)

    def scale(matrices: Tensor, hook: HookPoint) -> Tensor | None:
        # A change of the last state of a pass is read there and carried on, as a change of the write would be.
        tokens = slice(-1, None) if place.target == "state" else slice(None)
        activations = _atom_activations(sae, matrices[:, tokens])[..., chosen].clamp_min(0)
        change = (factor - 1) * activations.to(matrices) @ directions.to(matrices)
        if not change.any():
            return None
        scaled = matrices.clone()
        scaled[:, tokens] += change
        return scaled

    return Steering(model, [(place.name, scale)] if chosen and factor != 1 else [])


@torch.no_grad()
def _atom_activations(sae: Dictionary, matrices: Tensor) -> Tensor:
    """Activations [...,F] of flattened matrices [...,K*V], on the device of the matrices."""
    return sae.encode(matrices.to(next(sae.parameters()))).to(matrices.device)


def _checked_hook(model: HookedRecurrent, sae: Dictionary) -> HeadHook:
    """The hook of an SAE that fits the model and whose activations are in units of the write."""
    hook = HeadHook.of(sae)
    check_hook(model, hook.name, sae.cfg, "sae=")
    check_plain_activations(sae)
    return hook
