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
from types import TracebackType
from typing import Literal, Self

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformer_lens.hook_points import HookPoint

from hookpoints import EditError, HookedRecurrent
from sae_lens_writesae.atom.low_rank import LowRank
from sae_lens_writesae.sae.matrix import require
from sae_lens_writesae.sae.target import (
    Dictionary,
    HeadHook,
    atoms_of,
    check_hook,
    check_plain_activations,
    head_target,
)

Target = int | str
Hook = tuple[str, Callable[[Tensor, HookPoint], Tensor | None]]


def token_id(model: HookedRecurrent, target: Target) -> int:
    """The id of a token given as id or as a string that is exactly one token.

    Raises:
        ValueError: the string is several tokens (the message names them), or the id is out of range.
    """
    if isinstance(target, str):
        return int(model.to_single_token(target))
    if not 0 <= target < model.W_U.shape[1]:
        raise ValueError(f"token: expected an id below {model.W_U.shape[1]}, got {target}")
    return int(target)


def value_direction(model: HookedRecurrent, layer: int, head: int, token: int) -> Tensor:
    """w_T = W_O^h W_U[T] / |.| [V]: what a read must contain to raise the logit of `token` along the direct path.

    Source: WriteSAE (arXiv 2605.12770), the sign and install tests. It leaves out later layers, and the gains of head
    norm, gate and final norm.
    """
    return normalize((model.layer_W_O(layer)[head] @ model.W_U[:, token]).detach(), dim=0)


@dataclass(frozen=True, eq=False)
class Steering:
    """A `with` block in which hooks act on a model. It may be entered again, also while it is open."""

    model: HookedRecurrent
    hooks: Sequence[Hook]
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
    toward: Target | Sequence[Target] | Tensor | None = None,
    sae: Dictionary | None = None,
    atom: int | None = None,
    strength: float = 1.0,
    at: Literal["every", "fires"] | Sequence[int] = "every",
) -> Steering:
    """Steer one head's writes toward tokens, or along an atom.

    At each token that `at` names, the head also writes strength * |W_t| * D_t. D_t has Frobenius norm 1: it is
    k_t w^T / |k_t| for a value side w (the token's own key), or the atom.

    Args:
        layer, head: the head. They may be left out where an SAE is given, which names its own.
        toward: a token (id, or a string that is one token), several, whose `value_direction`s are averaged, or a value
            side [V] itself.
        sae, atom: a dictionary of this head and one of its atoms. Without `toward` the atom is what is written (a
            negative strength takes it away); with `toward` it only says where (at="fires").
        strength: norm of what is added, in norms of the native write at the same token; negative steers away.
        at: "every" token; "fires": the tokens at which the atom fires, decided from the live write; or positions >= 0,
            counted from the first token of the sequence, padding included.

    What to expect: a write is read through later tokens' queries, whose product with the key may have either sign, so
    that a positive strength can lower the target (the sign test measures how often). Where the head's reads are
    normalized (Gated DeltaNet, KDA), its output has a bounded norm and strengths above about 3 add little. Try several
    heads, the last layers first.

    Raises:
        ValueError: no direction or an ambiguous one, a string of several tokens, a zero atom, an SAE of another head,
            or at="fires" with an SAE of states, whose firing the write alone does not decide.
        UnsupportedModelError, UnknownHookError: a layer or head that the model lacks.
    """
    if sae is not None:
        hook, asked = _checked(model, sae), (layer, head)
        layer, head = hook.layer, hook.head
        require(asked in ((None, None), (layer, head)), "layer, head", asked, f"left out: the SAE reads {hook.name}")
        require(at != "fires" or hook.target == "write", "at", at, "'every' or positions: the SAE reads states")
        require(at == "fires" or toward is None, "at", at, "'fires' with toward= and an SAE, whose atom says where")
    if layer is None or head is None or (toward is None and atom is None) or (sae is None) != (atom is None):
        raise ValueError(
            "steer: expected a head (layer=, head= or an SAE, which names its own) and a direction (toward=, or sae= "
            f"with atom=), got layer {layer}, head {head}, toward={toward!r}, atom={atom}"
        )
    require(
        at == "every" or (at == "fires" and sae is not None) or (not isinstance(at, str) and min(at, default=0) >= 0),
        "at",
        at,
        "'every', with sae= and atom= 'fires', or positions >= 0",
    )
    place, mixer = head_target(model, layer, head), f"blocks.{layer}.mixer"

    def where(own: Tensor, writes: Callable[[], Tensor]) -> Tensor:
        """[B,T] which tokens to steer, of a pass over `own` [B,T,...]; writes [B,T,K,V] are made only if needed."""
        if at == "every":
            return torch.ones(own.shape[:2], dtype=torch.bool, device=own.device)
        if at == "fires" and sae is not None:
            return _encode(sae, writes().flatten(-2))[..., atom] > 0
        first = model.first_token()
        if first is None:
            raise EditError(
                f"layer {layer} cannot tell at which position it continues this cache, so positions cannot be "
                "steered: fill the cache with this model, or steer every token"
            )
        numbers = torch.arange(first, first + own.shape[1], device=own.device)
        return torch.isin(numbers, torch.tensor(at, device=own.device)).expand(own.shape[:2])

    if toward is None and sae is not None and atom is not None:
        chosen = atoms_of(sae, [atom], place.d_k, place.d_v)
        unit = chosen.with_norm(torch.ones_like(chosen.norm())).dense()[0]

        def steer_write(writes: Tensor, hook: HookPoint) -> Tensor | None:
            size = strength * torch.linalg.matrix_norm(writes) * where(writes, lambda: writes)
            return writes + size[..., None, None] * unit.to(writes) if size.any() else None

        return Steering(model, [(f"{mixer}.heads.{head}.hook_write", steer_write)] if strength else [])
    targets = [toward] if isinstance(toward, (int, str)) else toward
    if not isinstance(targets, Tensor):
        sides = [value_direction(model, layer, head, token_id(model, each)) for each in targets or ()]
        targets = torch.stack(sides).sum(0)
    value, keys = normalize(targets, dim=0), list[Tensor]()

    def see_key(key: Tensor, hook: HookPoint) -> None:
        keys[:] = [key[:, :, head]]  # of this pass: it fires before the value's hook

    def steer_value(values: Tensor, hook: HookPoint) -> Tensor | None:
        if values.ndim == 5:
            raise ValueError(
                f"tokens of layer {layer} write {values.shape[3]} terms each; steering toward a token needs one"
            )
        own = values[:, :, head]
        at_tokens = where(own, lambda: keys[0][..., None] * own[..., None, :])
        if not at_tokens.any():
            return None
        steered = values.clone()
        steered[:, :, head] += strength * own.norm(dim=-1, keepdim=True) * value.to(own) * at_tokens[..., None]
        return steered

    hooks = [(f"{mixer}.hook_write_key", see_key), (f"{mixer}.hook_write_value", steer_value)]
    return Steering(model, hooks if strength else [])


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
    place, chosen = _checked(model, sae), list(atoms)
    shape = model.cfg.layer(place.layer)
    directions = (atoms_of(sae, chosen, shape.K, shape.V) if like is None else like).dense().flatten(1)

    def scale(matrices: Tensor, hook: HookPoint) -> Tensor | None:
        # A change of the last state of a pass is read there and carried on, as a change of the write would be.
        tokens = slice(-1, None) if place.target == "state" else slice(None)
        activations = _encode(sae, matrices[:, tokens])[..., chosen].clamp_min(0)
        change = (factor - 1) * activations.to(matrices) @ directions.to(matrices)
        if not change.any():
            return None
        scaled = matrices.clone()
        scaled[:, tokens] += change
        return scaled

    return Steering(model, [(place.name, scale)] if chosen and factor != 1 else [])


@torch.no_grad()
def _encode(sae: Dictionary, matrices: Tensor) -> Tensor:
    """Activations [...,F] of flattened matrices [...,K*V], on the device of the matrices."""
    return sae.encode(matrices.to(next(sae.parameters()))).to(matrices.device)


def _checked(model: HookedRecurrent, sae: Dictionary) -> HeadHook:
    """The hook of an SAE that fits the model and whose activations are in units of the write."""
    hook = HeadHook.of(sae)
    check_hook(model, hook.name, sae.cfg, "sae=")
    check_plain_activations(sae)
    return hook
