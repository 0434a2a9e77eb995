"""Steering: add to what one head writes, while a scope is open, toward a token or along an atom of a dictionary.

    >>> from hookpoints import HookedRecurrent
    >>> from sae_lens_writesae import steer
    >>> model = HookedRecurrent.from_pretrained("embedded")
    >>> with steer(model, 2, 0, toward=" war", strength=3):
    ...     text = model.generate("The people of", max_new_tokens=5, do_sample=False)

A steering is a value: making it runs nothing, it acts only inside its `with` block (in every pass, prompt and generated
tokens), and after the block, also after an exception in it, the model is what it was. Scopes nest, and add up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor

from hookpoints import EditError, WriteEdit
from sae_lens_writesae.conditions import Factors, norm, scaled
from sae_lens_writesae.firings import HeadHook, atom_factors, check_plain_activations

Target = int | str
Where = Literal["every", "fires"] | Sequence[int]
Hook = tuple[str, Callable[[Tensor, Any], Tensor | None]]


def token_id(model: Any, target: Target) -> int:
    """The id of a token given as id or as a string that is exactly one token.

    Raises:
        ValueError: the string is several tokens (the message says which), or the id is out of range.
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


def value_direction(model: Any, layer: int, head: int, token: int) -> Tensor:
    """w_T = W_O^h W_U[T] / |.| [V]: what a read must contain to raise the logit of `token` along the direct path.

    Source: WriteSAE (arXiv 2605.12770), the sign and install tests. The gains of head norm, gate and final norm are not
    in it; nor are later layers. Raises ValueError where it is zero.
    """
    direction = (model.W_O(layer, head) @ model.W_U[:, token]).detach()
    size = direction.norm()
    if size == 0:
        raise ValueError(f"head {head} of layer {layer} has no direct path to token {token}: W_O^h W_U[T] is zero")
    return direction / size


class LiveWrite(NamedTuple):
    """What a head is about to write, rank 1."""

    keys: Tensor  # [B,T,K]
    values: Tensor  # [B,T,V]


@dataclass(frozen=True, eq=False)
class Scoped:
    """A `with` block in which hooks act on a model. Values: entering twice, nested or in turn, is fine."""

    model: Any
    layer: int
    head: int
    _open: list[ExitStack] = field(default_factory=list, init=False, repr=False)

    def hooks(self) -> list[Hook]:
        """The forward hooks that do it, for `model.hooks` or `run_with_hooks`. Empty: nothing would change."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            made = self.hooks()
            if made:
                stack.enter_context(self.model.hooks(fwd_hooks=made))
            self._open.append(stack.pop_all())
        return self

    def __exit__(self, *error: Any) -> bool | None:
        return self._open.pop().__exit__(*error)

    def _name(self, hook: str, *, own_head: bool = True) -> str:
        return f"blocks.{self.layer}.mixer.{f'heads.{self.head}.' if own_head else ''}{hook}"


@dataclass(frozen=True, eq=False)
class Steering(Scoped):
    """What `steer` returns. At each token that `at` names, the head also writes strength * |W_t| * D_t.

    D_t has Frobenius norm 1: k_t w^T / |k_t| for a token target (the token's own key, a given value side), or the atom.
    """

    strength: float
    """In norms of the native write. Negative: away."""
    at: Literal["every", "fires"] | tuple[int, ...]
    """Every token, tokens where the atom fires (decided from the live write), or positions."""
    value: Tensor | None = None
    """[V] unit value side, or None where an atom is written."""
    atom_direction: Factors | None = None
    """N = 1, unit norm, or None where a value side is written."""
    sae: Any = None
    atom: int | None = None

    def hooks(self) -> list[Hook]:
        """One hook on the value side of the write (token targets) or on the write (atoms)."""
        if self.strength == 0 or self.at == ():
            return []
        if self.value is None:
            return [(self._name("hook_write"), self._steer_matrix)]
        if self.at != "fires":
            return [(self._name("hook_write_value", own_head=False), self._steer_value)]
        keys: list[Tensor] = []  # of this pass; the key's hook fires before the value's

        def see_key(value: Tensor, hook: Any) -> None:
            keys[:] = [value[:, :, self.head]]

        def steer_value(value: Tensor, hook: Any) -> Tensor | None:
            return self._steer_value(value, hook, keys[0])

        names = [self._name(f"hook_write_{side}", own_head=False) for side in ("key", "value")]
        return [(names[0], see_key), (names[1], steer_value)]

    def edits(self, tokens: str | Tensor) -> list[WriteEdit]:
        """The same as edits of one sequence: text or [1,T]. For `run_with_edits`, or to look at what is written.

        Cost: one forward up to the layer.
        """
        with torch.no_grad():
            found = self.model.recurrence(tokens, self.layer)
        _check_rank(found.k)
        live = LiveWrite(found.k[:1, :, self.head], found.u[:1, :, self.head])
        where = self._mask(live.values, 0, live)[0]
        sizes = self.strength * live.keys[0].norm(dim=-1) * live.values[0].norm(dim=-1)
        made = []
        for t in where.nonzero()[:, 0].tolist() if self.strength else []:
            if self.value is not None:
                keys, values = torch.nn.functional.normalize(live.keys[0, t], dim=-1), sizes[t] * self.value.to(sizes)
            else:
                assert self.atom_direction is not None
                one = scaled(self.atom_direction, sizes[t, None].to(self.atom_direction.values))
                keys, values = one.keys[0], one.values[0]
            made.append(WriteEdit(self.layer, self.head, t, keys, values))
        return made

    def _steer_value(self, value: Tensor, hook: Any, keys: Tensor | None = None) -> Tensor | None:
        """`value` [B,T,H,V]: u_t + strength |u_t| w at the chosen tokens of the head."""
        _check_rank(value)
        own = value[:, :, self.head]
        where = self._mask(own, self._first_token(), None if keys is None else LiveWrite(keys, own))
        if not where.any():
            return None
        assert self.value is not None
        added = self.strength * own.norm(dim=-1, keepdim=True) * self.value.to(own) * where.unsqueeze(-1)
        steered = value.clone()
        steered[:, :, self.head] += added
        return steered

    def _steer_matrix(self, value: Tensor, hook: Any) -> Tensor | None:
        """`value` [B,T,K,V]: the write plus the atom at the chosen tokens."""
        if self.at == "fires":
            where = _fires(self.sae, value.flatten(-2))[..., self.atom] > 0
        else:
            where = self._mask(value, self._first_token())
        if not where.any():
            return None
        assert self.atom_direction is not None
        size = self.strength * torch.linalg.matrix_norm(value) * where
        return value + size[..., None, None] * self.atom_direction.dense()[0].to(value)

    def _mask(self, like: Tensor, first: int | None, live: LiveWrite | None = None) -> Tensor:
        """[B,T] tokens to steer, of a pass over `like` [B,T,...] whose first token is `first`."""
        shape, device = like.shape[:2], like.device
        if self.at == "every":
            return torch.ones(shape, dtype=torch.bool, device=device)
        if self.at == "fires":
            assert live is not None
            return (encode_live(self.sae, live)[..., self.atom] > 0).to(device)
        if first is None:
            raise EditError(
                f"layer {self.layer} cannot tell at which position it continues this cache, so positions cannot be "
                "steered: fill the cache with this model, or steer every token"
            )
        where = torch.zeros(shape, dtype=torch.bool, device=device)
        where[:, [t - first for t in self.at if 0 <= t - first < shape[1]]] = True
        return where

    def _first_token(self) -> int | None:
        return 0 if isinstance(self.at, str) else self.model.attachment.mixers[self.layer]._first_token


def steer(
    model: Any,
    layer: int | None = None,
    head: int | None = None,
    *,
    toward: Target | Sequence[Target] | None = None,
    sae: Any = None,
    atom: int | None = None,
    strength: float = 1.0,
    at: Where = "every",
) -> Steering:
    """Steer one head's writes toward tokens, or along an atom.

    Args:
        model: a `HookedRecurrent`.
        layer, head: the head. May be left out where an SAE is given: it names its own.
        toward: a token (id, or a string that is one token) or several, whose directions are averaged. Written along
            each token's own key, with `value_direction` as the value side.
        sae, atom: a dictionary of this head and an atom of it. Without `toward` the atom is what is written (a negative
            strength takes it away); with `toward` it only says where (at="fires").
        strength: norm of what is added, in norms of the native write at the same token; negative steers away.
        at: "every" token; "fires": tokens at which the atom fires, decided from the live write; or positions >= 0, from
            the first token of the sequence, padding included.

    What to expect: a write is read through later tokens' queries, whose product with the key may have either sign, so a
    positive strength can lower the target (the sign test, `run_sign`, measures how often). Where the head's reads are
    normalised (Gated DeltaNet, KDA), its output has a bounded norm and strengths above about 3 add little. Try several
    heads, the last layers first.

    Raises:
        ValueError: no direction or an ambiguous one, a string of several tokens, an atom or head out of range, an SAE
            of another head, or at="fires" with an SAE of states, whose firing is not decided by the write alone.
    """
    layer, head = _place(model, layer, head, sae)
    if toward is None and atom is None:
        raise ValueError("steer needs a direction: toward=<token or string>, or sae=... and atom=...")
    if (sae is None) != (atom is None):
        raise ValueError("an atom needs its dictionary and a dictionary an atom: give both sae= and atom=")
    if isinstance(at, str) and at not in ("every", "fires"):
        raise ValueError(f"at must be 'every', 'fires' or positions, found {at!r}")
    if at == "fires":
        _check_live(sae)
    elif sae is not None and toward is not None:
        raise ValueError("with both toward= and an atom, the atom says where: use at='fires', or leave one of them out")
    if not isinstance(at, str):
        at = tuple(sorted({int(t) for t in at}))
        if at and at[0] < 0:
            raise ValueError(f"positions count from the first token and are >= 0, found {at[0]}")
    direction = _unit_atom(model, sae, atom, layer) if sae is not None else None
    value = None if toward is None else _toward(model, layer, head, toward)
    where: Any = at
    return Steering(
        model, layer, head, float(strength), where, value, None if value is not None else direction, sae, atom
    )


@dataclass(frozen=True, eq=False)
class AtomScaling(Scoped):
    """What `scale_atoms` returns: the live write gets sum_i (factor - 1) a_i D_i over the chosen atoms."""

    sae: Any
    atoms: tuple[int, ...]
    factor: float
    directions: Factors
    """One for each atom, at activation 1: the atoms themselves, or controls of their norm."""

    def hooks(self) -> list[Hook]:
        """One hook on the write, or for SAEs of states on the state."""
        if self.factor == 1 or not self.atoms:
            return []
        if HeadHook.of(self.sae).target == "state":
            return [(self._name("hook_state_vec"), self._scale_last)]
        return [(self._name("hook_write_vec"), self._scale)]

    def change(self, matrices: Tensor) -> Tensor:
        """What is added to live matrices [...,K*V]: (factor - 1) sum_i a_i D_i."""
        activations = _fires(self.sae, matrices)[..., list(self.atoms)].clamp_min(0)
        return (self.factor - 1) * activations.to(matrices) @ self.directions.dense().flatten(1).to(matrices)

    def _scale(self, value: Tensor, hook: Any) -> Tensor | None:
        change = self.change(value)
        return value + change if change.any() else None

    def _scale_last(self, value: Tensor, hook: Any) -> Tensor | None:
        # A change of the last state of a pass is read there and goes on, as a change of the write would.
        change = self.change(value[:, -1])
        if not change.any():
            return None
        scaled_ = value.clone()
        scaled_[:, -1] += change
        return scaled_


def scale_atoms(
    model: Any, sae: Any, atoms: Sequence[int], factor: float, *, like: Factors | None = None
) -> AtomScaling:
    """Amplify (factor > 1), suppress (0) or turn (< 0) atoms wherever they fire, as a `with` block.

    Each firing's write gets (factor - 1) a_i A_i: the atom's own component is multiplied by `factor`. For an SAE of
    writes the live write of every token is encoded, in the prompt too. For an SAE of states, the live state of the last
    token of each pass (in generation: the last of the prompt and every generated one), where a change of the state is
    the same as a change of the write.

    Args:
        like: other matrices for the atoms, N = len(atoms), at activation 1: a control.

    Raises:
        ValueError: an atom out of range, or an SAE of another model.
    """
    layer, head = _place(model, None, None, sae)
    check_plain_activations(sae)
    chosen = tuple(int(i) for i in atoms)
    for i in chosen:
        _check_atom(sae, i)
    shape = model.cfg.layer(layer)
    own = atom_factors(sae, list(chosen), shape.K, shape.V) if like is None else like
    if len(own) != len(chosen):
        raise ValueError(f"like= needs one matrix for each of the {len(chosen)} atoms, found {len(own)}")
    return AtomScaling(model, layer, head, sae, chosen, float(factor), own)


def encode_live(sae: Any, live: LiveWrite) -> Tensor:
    """Activations [B,T,F] of rank-1 writes; by their factors where the SAE can."""
    place = next(sae.parameters())
    if hasattr(sae, "encode_writes"):
        with torch.no_grad():
            return sae.encode_writes(live.keys.to(place), live.values.to(place))
    return _fires(sae, (live.keys.unsqueeze(-1) * live.values.unsqueeze(-2)).flatten(-2))


@torch.no_grad()
def _fires(sae: Any, matrices: Tensor) -> Tensor:
    return sae.encode(matrices.to(next(sae.parameters()))).to(matrices.device)


def _place(model: Any, layer: int | None, head: int | None, sae: Any) -> tuple[int, int]:
    """The head that is meant, by name or by the SAE's own hook."""
    if sae is not None:
        from sae_lens_writesae.evaluate import check_fits

        hook = HeadHook.of(sae)
        for name, given, own in (("layer", layer, hook.layer), ("head", head, hook.head)):
            if given is not None and given != own:
                raise ValueError(f"the SAE reads {hook.name}, but {name} {given} was asked for; leave {name} out")
        check_fits(model, sae, "sae=")
        return hook.layer, hook.head
    if layer is None or head is None:
        raise ValueError("steer needs a layer and a head (or an SAE, which names its own)")
    shape = model.cfg.layer(layer)
    if not 0 <= head < shape.H:
        raise ValueError(f"head {head} is out of range: layer {layer} has heads 0 to {shape.H - 1}")
    return layer, head


def _check_live(sae: Any) -> None:
    if sae is None:
        raise ValueError("at='fires' needs sae= and atom=, whose firing decides where")
    if HeadHook.of(sae).target == "state":
        raise ValueError(
            "at='fires' decides from the live write, but this SAE reads states; give positions (from collect_firings), "
            "or use scale_atoms"
        )
    check_plain_activations(sae)


def _check_atom(sae: Any, atom: int) -> None:
    if not 0 <= atom < sae.cfg.d_sae:
        raise ValueError(f"atom {atom} is out of range: the SAE has atoms 0 to {sae.cfg.d_sae - 1}")


def _unit_atom(model: Any, sae: Any, atom: int | None, layer: int) -> Factors:
    assert atom is not None
    _check_atom(sae, atom)
    shape = model.cfg.layer(layer)
    found = atom_factors(sae, [atom], shape.K, shape.V)
    size = norm(found)
    if size[0] == 0:
        raise ValueError(f"atom {atom} is zero and gives no direction")
    return scaled(found, 1 / size)


def _toward(model: Any, layer: int, head: int, toward: Target | Sequence[Target]) -> Tensor:
    targets = [toward] if isinstance(toward, (int, str)) else list(toward)
    if not targets:
        raise ValueError("toward= is an empty list; name at least one token")
    total = torch.stack([value_direction(model, layer, head, token_id(model, t)) for t in targets]).sum(0)
    return torch.nn.functional.normalize(total, dim=0)


def _check_rank(factor: Tensor) -> None:
    if factor.ndim == 5:
        raise ValueError(f"tokens of this layer write {factor.shape[3]} terms each; steering toward a token needs one")
