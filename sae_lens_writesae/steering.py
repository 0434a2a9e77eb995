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
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal, Self

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformer_lens.hook_points import HookPoint

from hookpoints import EditError, HookedRecurrent, WriteEdit
from sae_lens_writesae.atom.low_rank import LowRank
from sae_lens_writesae.sae.target import Dictionary, HeadHook, atoms_of, check_fits, check_plain_activations

Target = int | str
Where = Literal["every", "fires"] | tuple[int, ...]
Hook = tuple[str, Callable[[Tensor, HookPoint], Tensor | None]]


def token_id(model: HookedRecurrent, target: Target) -> int:
    """The id of a token given as id or as a string that is exactly one token.

    Raises:
        ValueError: the string is several tokens (the message names them), or the id is out of range.
    """
    if isinstance(target, str):
        try:
            return int(model.to_single_token(target))
        except ValueError as error:
            hint = "; take one of them, or a list of targets" if "tokens, not one" in str(error) else ""
            raise ValueError(f"{error}{hint}") from error
    vocabulary = model.W_U.shape[1]
    if not 0 <= int(target) < vocabulary:
        raise ValueError(f"token {target} is out of range: the model has tokens 0 to {vocabulary - 1}")
    return int(target)


def value_direction(model: HookedRecurrent, layer: int, head: int, token: int) -> Tensor:
    """w_T = W_O^h W_U[T] / |.| [V]: what a read must contain to raise the logit of `token` along the direct path.

    Source: WriteSAE (arXiv 2605.12770), the sign and install tests. It leaves out later layers, and the gains of head
    norm, gate and final norm.

    Raises:
        ValueError: the direction is zero.
    """
    direction = (model.layer_W_O(layer)[head] @ model.W_U[:, token]).detach()
    size = direction.norm()
    if size == 0:
        raise ValueError(f"head {head} of layer {layer} has no direct path to token {token}: W_O^h W_U[T] is zero")
    return direction / size


@dataclass(frozen=True, eq=False)
class Scoped:
    """A `with` block in which hooks act on a model. It may be entered again, also while it is open."""

    model: HookedRecurrent
    layer: int
    head: int
    _open: list[ExitStack] = field(default_factory=list, init=False, repr=False)

    def hooks(self) -> list[Hook]:
        """The forward hooks, for `model.hooks` or `run_with_hooks`. None where nothing would change."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            if hooks := self.hooks():
                stack.enter_context(self.model.hooks(fwd_hooks=hooks))
            self._open.append(stack.pop_all())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return self._open.pop().__exit__(kind, error, trace)


@dataclass(frozen=True, eq=False)
class Steering(Scoped):
    """What `steer` returns. At each token that `at` names, the head also writes strength * |W_t| * D_t.

    D_t has Frobenius norm 1: k_t w^T / |k_t| for a token target (the token's own key, a given value side), or the atom.
    """

    strength: float
    """In norms of the native write; negative: away."""
    at: Where
    """Every token, the tokens where the atom fires (decided from the live write), or positions."""
    value: Tensor | None = None
    """w [V] at unit norm, or None where an atom is written."""
    atom_direction: LowRank | None = None
    """The atom at unit norm (N = 1), or None where a value side is written."""
    sae: Dictionary | None = None
    atom: int | None = None

    def hooks(self) -> list[Hook]:
        """For token targets hooks on the two sides of the write, for atoms one hook on the write."""
        if self.strength == 0 or self.at == ():
            return []
        mixer = f"blocks.{self.layer}.mixer"
        if self.atom_direction is not None:
            return [(f"{mixer}.heads.{self.head}.hook_write", self._steer_matrix)]
        keys: list[Tensor] = []  # of this pass, because the key's hook fires before the value's

        def see_key(value: Tensor, hook: HookPoint) -> None:
            keys[:] = [value]

        def steer_value(value: Tensor, hook: HookPoint) -> Tensor | None:
            return self._steer_value(value, keys[0])

        return [(f"{mixer}.hook_write_key", see_key), (f"{mixer}.hook_write_value", steer_value)]

    def edits(self, tokens: str | Tensor) -> list[WriteEdit]:
        """The same as edits of one sequence, text or [1,T], for `run_with_edits` or to see what is written.

        Costs one forward up to the layer.
        """
        with torch.no_grad():
            recurrence = self.model.recurrence(tokens, self.layer)
        _check_one_term(recurrence.k)
        keys, values = recurrence.k[:1, :, self.head], recurrence.u[:1, :, self.head]
        where = self._where(values, lambda: self._activation(keys, values), lambda: 0)[0]
        sizes = self.strength * keys[0].norm(dim=-1) * values[0].norm(dim=-1)
        edits: list[WriteEdit] = []
        for t in where.nonzero()[:, 0].tolist() if self.strength else []:
            if self.atom_direction is not None:
                atom = self.atom_direction * sizes[t, None].to(self.atom_direction.values)
                edits.append(WriteEdit(self.layer, self.head, t, atom.keys[0], atom.values[0]))
            elif self.value is not None:
                value = sizes[t] * self.value.to(sizes)
                edits.append(WriteEdit(self.layer, self.head, t, normalize(keys[0, t], dim=-1), value))
        return edits

    def _steer_value(self, all_values: Tensor, all_keys: Tensor) -> Tensor | None:
        """From u [B,T,H,V] and k [B,T,H,K] of all heads: u_t + strength |u_t| w at the steered tokens of the head."""
        _check_one_term(all_values)
        values = all_values[:, :, self.head]
        where = self._where(values, lambda: self._activation(all_keys[:, :, self.head], values), self.model.first_token)
        if self.value is None or not where.any():
            return None
        steered = all_values.clone()
        sizes = self.strength * values.norm(dim=-1, keepdim=True)
        steered[:, :, self.head] += sizes * self.value.to(values) * where.unsqueeze(-1)
        return steered

    def _steer_matrix(self, writes: Tensor, hook: HookPoint) -> Tensor | None:
        """From the head's writes [B,T,K,V]: the write plus the atom at the steered tokens."""
        where = self._where(
            writes, lambda: _encode(self.sae, writes.flatten(-2))[..., self.atom], self.model.first_token
        )
        if self.atom_direction is None or not where.any():
            return None
        size = self.strength * torch.linalg.matrix_norm(writes) * where
        return writes + size[..., None, None] * self.atom_direction.dense()[0].to(writes)

    def _where(self, like: Tensor, activation: Callable[[], Tensor], first_token: Callable[[], int | None]) -> Tensor:
        """[B,T] which tokens to steer, of a pass over `like` [B,T,...]; the two functions are called only if needed."""
        shape = like.shape[:2]
        if self.at == "every":
            return torch.ones(shape, dtype=torch.bool, device=like.device)
        if self.at == "fires":
            return (activation() > 0).to(like.device)
        first = first_token()
        if first is None:
            raise EditError(
                f"layer {self.layer} cannot tell at which position it continues this cache, so positions cannot be "
                "steered: fill the cache with this model, or steer every token"
            )
        where = torch.zeros(shape, dtype=torch.bool, device=like.device)
        where[:, [t - first for t in self.at if 0 <= t - first < shape[1]]] = True
        return where

    @torch.no_grad()
    def _activation(self, keys: Tensor, values: Tensor) -> Tensor:
        """Activation [B,T] of the atom on rank-1 writes [B,T,K] and [B,T,V]."""
        return _encode(self.sae, (keys.unsqueeze(-1) * values.unsqueeze(-2)).flatten(-2))[..., self.atom]


def steer(
    model: HookedRecurrent,
    layer: int | None = None,
    head: int | None = None,
    *,
    toward: Target | Sequence[Target] | None = None,
    sae: Dictionary | None = None,
    atom: int | None = None,
    strength: float = 1.0,
    at: Literal["every", "fires"] | Sequence[int] = "every",
) -> Steering:
    """Steer one head's writes toward tokens, or along an atom.

    Args:
        layer, head: the head. They may be left out where an SAE is given, which names its own.
        toward: a token (id, or a string that is one token) or several, whose directions are averaged. Written along
            each token's own key, with `value_direction` as the value side.
        sae, atom: a dictionary of this head and one of its atoms. Without `toward` the atom is what is written (a
            negative strength takes it away); with `toward` it only says where (at="fires").
        strength: norm of what is added, in norms of the native write at the same token; negative steers away.
        at: "every" token; "fires": the tokens at which the atom fires, decided from the live write; or positions >= 0,
            counted from the first token of the sequence, padding included.

    What to expect: a write is read through later tokens' queries, whose product with the key may have either sign, so
    that a positive strength can lower the target (the sign test, `run_sign`, measures how often). Where the head's
    reads are normalised (Gated DeltaNet, KDA), its output has a bounded norm and strengths above about 3 add little.
    Try several heads, the last layers first.

    Raises:
        ValueError: no direction or an ambiguous one, a string of several tokens, an atom or head out of range, an SAE
            of another head, or at="fires" with an SAE of states, whose firing the write alone does not decide.
    """
    layer, head = _head(model, layer, head, sae)
    if toward is None and atom is None:
        raise ValueError("steer needs a direction: toward=<token or string>, or sae=... and atom=...")
    if (sae is None) != (atom is None):
        raise ValueError("an atom needs its dictionary and a dictionary an atom: give both sae= and atom=")
    where = _where(at)
    if where == "fires":
        _check_live(sae)
    elif sae is not None and toward is not None:
        raise ValueError("with both toward= and an atom, the atom says where: use at='fires', or leave one of them out")
    direction = None if sae is None or atom is None else _unit_atom(model, sae, atom, layer)
    if toward is None:
        return Steering(model, layer, head, float(strength), where, None, direction, sae, atom)
    value = _value_toward(model, layer, head, toward)
    return Steering(model, layer, head, float(strength), where, value, None, sae, atom)


@dataclass(frozen=True, eq=False)
class AtomScaling(Scoped):
    """What `scale_atoms` returns: the live write gets sum_i (factor - 1) a_i D_i over the chosen atoms."""

    sae: Dictionary
    atoms: tuple[int, ...]
    factor: float
    directions: LowRank
    """D: one matrix for each atom, at activation 1. The atoms themselves, or controls of their norm."""

    def hooks(self) -> list[Hook]:
        """One hook on the write, or for SAEs of states on the state."""
        if self.factor == 1 or not self.atoms:
            return []
        hook = HeadHook.of(self.sae)
        return [(hook.name, self._scale_last if hook.target == "state" else self._scale)]

    def change(self, matrices: Tensor) -> Tensor:
        """What is added to live matrices [...,K*V]: (factor - 1) sum_i a_i D_i."""
        activations = _encode(self.sae, matrices)[..., list(self.atoms)].clamp_min(0)
        return (self.factor - 1) * activations.to(matrices) @ self.directions.dense().flatten(1).to(matrices)

    def _scale(self, writes: Tensor, hook: HookPoint) -> Tensor | None:
        change = self.change(writes)
        return writes + change if change.any() else None

    def _scale_last(self, states: Tensor, hook: HookPoint) -> Tensor | None:
        # A change of the last state of a pass is read there and carried on, as a change of the write would be.
        change = self.change(states[:, -1])
        if not change.any():
            return None
        states = states.clone()
        states[:, -1] += change
        return states


def scale_atoms(
    model: HookedRecurrent, sae: Dictionary, atoms: Sequence[int], factor: float, *, like: LowRank | None = None
) -> AtomScaling:
    """Amplify (factor > 1), suppress (0) or turn (< 0) atoms wherever they fire, as a `with` block.

    Each firing's write gets (factor - 1) a_i A_i: the atom's own component is multiplied by `factor`. An SAE of writes
    encodes the live write of every token, in the prompt too. An SAE of states encodes the live state of the last token
    of each pass (in generation: the last of the prompt and every generated one), where a change of the state is the
    same as a change of the write.

    Args:
        like: other matrices in the place of the atoms, N = len(atoms), at activation 1: a control.

    Raises:
        ValueError: an atom out of range, or an SAE of another model.
    """
    layer, head = _head(model, None, None, sae)
    check_plain_activations(sae)
    numbers = tuple(int(i) for i in atoms)
    for i in numbers:
        _check_atom(sae, i)
    shape = model.cfg.layer(layer)
    directions = atoms_of(sae, list(numbers), shape.K, shape.V) if like is None else like
    if len(directions) != len(numbers):
        raise ValueError(f"like= needs one matrix for each of the {len(numbers)} atoms, found {len(directions)}")
    return AtomScaling(model, layer, head, sae, numbers, float(factor), directions)


@torch.no_grad()
def _encode(sae: Dictionary | None, matrices: Tensor) -> Tensor:
    """Activations [...,F] of flattened matrices [...,K*V], on the device of the matrices."""
    assert sae is not None
    return sae.encode(matrices.to(next(sae.parameters()))).to(matrices.device)


def _head(model: HookedRecurrent, layer: int | None, head: int | None, sae: Dictionary | None) -> tuple[int, int]:
    """The head that is meant, by its numbers or by the SAE's own hook."""
    if sae is not None:
        hook = HeadHook.of(sae)
        for name, asked, actual in (("layer", layer, hook.layer), ("head", head, hook.head)):
            if asked is not None and asked != actual:
                raise ValueError(f"the SAE reads {hook.name}, but {name} {asked} was asked for; leave {name} out")
        check_fits(model, sae, "sae=")
        return hook.layer, hook.head
    if layer is None or head is None:
        raise ValueError("steer needs a layer and a head (or an SAE, which names its own)")
    shape = model.cfg.layer(layer)
    if not 0 <= head < shape.H:
        raise ValueError(f"head {head} is out of range: layer {layer} has heads 0 to {shape.H - 1}")
    return layer, head


def _where(at: Literal["every", "fires"] | Sequence[int]) -> Where:
    if isinstance(at, str):
        if at not in ("every", "fires"):
            raise ValueError(f"at must be 'every', 'fires' or positions, found {at!r}")
        return at
    positions = tuple(sorted({int(t) for t in at}))
    if positions and positions[0] < 0:
        raise ValueError(f"positions count from the first token and are >= 0, found {positions[0]}")
    return positions


def _check_live(sae: Dictionary | None) -> None:
    if sae is None:
        raise ValueError("at='fires' needs sae= and atom=, whose firing decides where")
    if HeadHook.of(sae).target == "state":
        raise ValueError(
            "at='fires' decides from the live write, but this SAE reads states; give positions (from collect_firings), "
            "or use scale_atoms"
        )
    check_plain_activations(sae)


def _check_atom(sae: Dictionary, atom: int) -> None:
    if not 0 <= atom < sae.cfg.d_sae:
        raise ValueError(f"atom {atom} is out of range: the SAE has atoms 0 to {sae.cfg.d_sae - 1}")


def _unit_atom(model: HookedRecurrent, sae: Dictionary, atom: int, layer: int) -> LowRank:
    _check_atom(sae, atom)
    shape = model.cfg.layer(layer)
    direction = atoms_of(sae, [atom], shape.K, shape.V)
    size = direction.norm()
    if size[0] == 0:
        raise ValueError(f"atom {atom} is zero and gives no direction")
    return direction * (1 / size)


def _value_toward(model: HookedRecurrent, layer: int, head: int, toward: Target | Sequence[Target]) -> Tensor:
    targets = [toward] if isinstance(toward, (int, str)) else list(toward)
    if not targets:
        raise ValueError("toward= is an empty list; name at least one token")
    return normalize(
        torch.stack([value_direction(model, layer, head, token_id(model, t)) for t in targets]).sum(0), dim=0
    )


def _check_one_term(factor: Tensor) -> None:
    if factor.ndim == 5:
        raise ValueError(f"tokens of this layer write {factor.shape[3]} terms each; steering toward a token needs one")
