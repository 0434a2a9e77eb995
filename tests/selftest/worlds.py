"""Worlds: the embedded model with one head whose writes are known, by hooks that stay on a model of its own.

A write of a Gated DeltaNet head is beta_t k_t v_t^T. Hooks on `hook_k` and `hook_v` put prototypes in the place of both
sides, so that every write is one of a few matrices, or chaotic functions of the native sides, so that no write is like
another. Which prototype is written depends on the native key in its context: on a fine phase of it, which the token
alone does not tell, or on the nearest of some centres, which mostly follows the token.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformer_lens.hook_points import HookPoint

from hookpoints import HookedRecurrent, embedded
from sae_lens_writesae.atom.low_rank import LowRank
from sae_lens_writesae.steering import value_direction
from writesae.experiment.tokens import sample_sequences, special_tokens

N_ATOMS = 32
"""Matrices of which every write of a planted world is one, up to its strength beta_t."""
N_SEQUENCES, N_TOKENS = 44, 56
"""Held-out text of every world."""

_PHASES = 40.0
"""Turns of the phase for a change of 1 along one direction of the key: several within the keys of one token."""
_CHAOS = 20.0
"""Radians of the chaotic functions for a change of 1 along one direction: many turns, and rounding stays below 1e-5."""

Choose = Callable[[Tensor], Tensor]
"""Number of the prototype [B,T], from the native key [B,T,K]."""
Change = Callable[[Tensor], Tensor]
"""What one head has at a hook [B,T,...], from what it natively has there."""


@dataclass(frozen=True, eq=False)
class World:
    """A model with one head whose writes are known, and a text."""

    model: HookedRecurrent
    layer: int
    head: int
    k: int
    v: int
    tokens: Tensor
    """[N,T]"""
    atoms: LowRank | None = None
    """The matrices that the head writes, at unit norm; None where its writes have no structure."""
    read: LowRank | None = None
    """What of each atom reaches the rest of the model, where that is not all of it."""

    @property
    def hook(self) -> str:
        """The hook that dictionaries of this world read."""
        return f"blocks.{self.layer}.mixer.heads.{self.head}.hook_write_vec"


# ---------------------------------------------------------------------------------------------- parts of worlds


def generator(seed: int) -> torch.Generator:
    """Random numbers of one purpose."""
    return torch.Generator().manual_seed(seed)


def unit(n: int, size: int, seed: int) -> Tensor:
    """[n,size] random directions."""
    return normalize(torch.randn(n, size, generator=generator(seed)), dim=1)


def orthonormal(n: int, size: int, seed: int) -> Tensor:
    """[n,size] directions at right angles, n <= size."""
    return torch.linalg.qr(torch.randn(size, size, generator=generator(seed)))[0][:n]


def without(rows: Tensor, direction: Tensor) -> Tensor:
    """Rows [...,n] without their component along a direction [n] of norm 1."""
    return rows - (rows @ direction)[..., None] * direction


def bare(layer: int, head: int) -> World:
    """The embedded model, a head of it, and text; nothing is planted."""
    model = HookedRecurrent.from_pretrained("embedded")
    shape, text = model.cfg.layer(layer), sample_sequences(model, embedded.text("test"), N_TOKENS, N_SEQUENCES)
    return World(model, layer, head, shape.K, shape.V, text)


def hold(world: World, name: str, change: Change) -> None:
    """Let `change` act on the head at a mixer's hook [B,T,H,...] for good."""

    def act(value: Tensor, hook: HookPoint) -> Tensor:
        changed = value.clone()
        changed[:, :, world.head] = change(value[:, :, world.head])
        return changed

    world.model.add_hook(f"blocks.{world.layer}.mixer.{name}", act, is_permanent=True)


def hold_block(world: World, name: str, change: Change) -> None:
    """Let `change` act on a hook of the head's block [B,T,D] for good."""
    act: Callable[..., Tensor] = lambda value, hook: change(value)  # noqa: E731
    world.model.add_hook(f"blocks.{world.layer}.{name}", act, is_permanent=True)


def seen(world: World, name: str) -> list[Tensor]:
    """Filled in each pass: what the head has at a hook, before what holds it from now on."""
    latest: list[Tensor] = []

    def see(native: Tensor) -> Tensor:
        latest[:] = [native]
        return native

    hold(world, name, see)
    return latest


def by_phase(size: int, n: int) -> Choose:
    """Prototypes in equal shares, by a fine phase of the native key."""
    direction = unit(1, size, 1)[0]
    return lambda key: ((_PHASES * (key @ direction)) % 1.0 * n).long().clamp_max(n - 1)


def by_token(world: World, tokens: Tensor) -> Choose:
    """The nearest of the mean native keys of n tokens."""
    hook = f"blocks.{world.layer}.mixer.hook_k"
    _, cache = world.model.run_with_cache(world.tokens, names_filter=[hook], stop_at_layer=world.layer + 1)
    keys, ids = cache[hook][:, :, world.head].flatten(0, 1), world.tokens.flatten()
    centres = torch.stack([keys[ids == token].mean(0) for token in tokens])
    return lambda key: torch.cdist(key.flatten(0, -2), centres).argmin(1).view(key.shape[:-1])


def frequent_tokens(world: World, n: int) -> Tensor:
    """[n] the most frequent tokens of the text, without special ones."""
    counts = torch.bincount(world.tokens.flatten(), minlength=world.model.cfg.d_vocab)
    counts[list(special_tokens(world.model))] = 0
    return counts.topk(n).indices


def plant(world: World, choose: Choose, keys: Tensor, values: Tensor) -> World:
    """Let the head write prototypes, keys [n,K] and values [n,V]."""
    native = seen(world, "hook_k")  # fires before the hook of the value
    hold(world, "hook_k", lambda key: keys[choose(key)])
    hold(world, "hook_v", lambda value: values[choose(native[0])])
    atoms = LowRank.rank_one(keys, values)
    return replace(world, atoms=atoms.with_norm(torch.ones(len(keys))))


def plain_path(world: World, *, norm: bool) -> None:
    """Take away what stands between a read of a head in the last layer and the logits: the head's norm and gate, the
    block's MLP and, with `norm`, the final norm. The other heads of the layer are plain, too."""
    cast(nn.Module, block_of(world).linear_attn).norm = Plain()
    hold_block(world, "hook_mlp_out", torch.zeros_like)
    if norm:
        residual: list[Tensor] = []
        hold_block(world, "hook_resid_post", lambda value: residual.append(value) or value)
        act: Callable[..., Tensor] = lambda value, hook: residual.pop()  # noqa: E731
        world.model.add_hook("ln_final.hook_normalized", act, is_permanent=True)


def block_of(world: World) -> nn.Module:
    """The block of the head, as Hugging Face has it."""
    return cast(nn.Module, world.model.hf_model.model.layers[world.layer])


def head_output(world: World) -> Tensor:
    """[D,V] the head's part of the output projection, which may be changed in place."""
    projection = cast(nn.Module, cast(nn.Module, block_of(world).linear_attn).out_proj)
    return cast(Tensor, projection.weight)[:, world.head * world.v : (world.head + 1) * world.v]


class Plain(nn.Module):
    """In the place of a head's norm and gate: what is read goes on as it is."""

    def forward(self, read: Tensor, gate: Tensor) -> Tensor:
        """`read` [n,V], whatever the gate."""
        return read


# ---------------------------------------------------------------------------------------------- the worlds


def planted() -> World:
    """Every write is one of 32 matrices, chosen by context."""
    world = bare(2, 2)
    return plant(world, by_phase(world.k, N_ATOMS), unit(N_ATOMS, world.k, 2), unit(N_ATOMS, world.v, 3))


def noise() -> World:
    """No write is like another: both sides are chaotic functions of the native ones."""
    world = bare(2, 2)
    for name, size, seed in (("hook_k", world.k, 4), ("hook_v", world.v, 5)):
        mix = _CHAOS * torch.randn(size, size, generator=generator(seed))
        hold(world, name, lambda native, mix=mix: normalize(torch.sin(normalize(native, dim=-1) @ mix), dim=-1))
    return world


def one_write() -> World:
    """Every write is the same matrix, so that the head's mean write is each of them."""
    world = bare(2, 2)
    return plant(world, by_phase(world.k, 1), unit(1, world.k, 2), unit(1, world.v, 3))


def two_kinds() -> World:
    """Half of the atoms carry, beside what reaches the residual stream, 30 to 50 times as much along a value direction
    that does not: the rest of the atom lies at a cosine of about 0.025 with the write, and does all that it does."""
    world = bare(2, 2)
    lost = unit(1, world.v, 6)[0]
    cast(nn.Module, block_of(world).linear_attn).norm = Plain()  # a norm would let the lost part set the scale
    reaching = head_output(world)
    reaching -= (reaching @ lost)[:, None] * lost
    keys, values = unit(N_ATOMS, world.k, 2), normalize(without(unit(N_ATOMS, world.v, 3), lost), dim=1)
    hidden = torch.linspace(30, 50, N_ATOMS)[:, None] * (torch.arange(N_ATOMS) % 2)[:, None]
    world = plant(world, by_phase(world.k, N_ATOMS), keys, values + hidden * lost)
    return replace(world, read=LowRank.rank_one(keys, values / (1 + hidden**2).sqrt()))


def sums() -> World:
    """Every write is the sum of three of eight atoms that share its key; there are eight keys, 64 atoms."""
    world = bare(2, 2)
    keys, values = orthonormal(8, world.k, 2), orthonormal(8, world.v, 3)
    written = values[torch.tensor(list(itertools.combinations(range(8), 3)))].sum(1)
    n = len(written)
    world = plant(world, by_phase(world.k, 8 * n), keys.repeat_interleave(n, 0), written.repeat(8, 1))
    return replace(world, atoms=LowRank.rank_one(keys.repeat_interleave(8, 0), values.repeat(8, 1)))


def blurred() -> World:
    """Every write is one of 32 matrices, with chaotic noise on both sides: the cosine of the two is about 0.6."""
    world = planted()
    query = seen(world, "hook_q")  # the prototype is the same for many tokens; what differs is the native query
    for name, size, seed in (("hook_k", world.k, 4), ("hook_v", world.v, 5)):
        mix = _CHAOS * torch.randn(world.k, size, generator=generator(seed))
        noisy = lambda side, mix=mix: side + 0.8 * normalize(torch.sin(query[0] @ mix), dim=-1)  # noqa: E731
        hold(world, name, lambda side, noisy=noisy: normalize(noisy(side), dim=-1))
    return world


def tokens() -> World:
    """Every write follows its token, is read at once and for some tokens, and raises one token: its own."""
    return _raising(torch.eye(N_ATOMS), 500.0)


def shared_tokens() -> World:
    """As `tokens`, but every write raises all of the tokens alike, and less."""
    return _raising(torch.ones(N_ATOMS, N_ATOMS), 50.0)


def _raising(raised: Tensor, size: float) -> World:
    """Write i raises token j by raised[i,j]."""
    world = bare(4, 1)
    plain_path(world, norm=False)
    axes, asked = orthonormal(N_ATOMS + 1, world.k, 2), frequent_tokens(world, N_ATOMS)
    values = torch.stack([value_direction(world.model, 4, 1, int(token)) for token in asked])
    choose = by_token(world, asked)
    remembered(world, axes[0])
    return plant(world, choose, normalize(axes[0] + axes[1:], dim=1), size * normalize(raised @ values, dim=1))


def remembered(world: World, asked: Tensor) -> None:
    """Let every query be `asked` [K], and writes fade slowly: no decay, a tenth of the strength."""
    hold(world, "hook_q", lambda native: asked.expand_as(native))
    hold(world, "hook_beta", lambda native: torch.full_like(native, 0.1))
    hold(world, "hook_log_decay", torch.zeros_like)


def linear() -> World:
    """The last layer, where a read reaches the logits through W_O and W_U alone: the first-order formula is exact."""
    world = bare(4, 1)
    plain_path(world, norm=True)
    head_output(world).mul_(30.0)
    return plant(world, by_phase(world.k, N_ATOMS), orthonormal(N_ATOMS, world.k, 2), unit(N_ATOMS, world.v, 3))


def same_rows() -> World:
    """As `linear`, but the rows of the unembedding hardly differ, so that a write toward any token moves all."""
    world = linear()
    rows = world.model.hf_model.lm_head.weight.detach()
    world.model.hf_model.lm_head.weight = nn.Parameter(rows.mean(0).expand_as(rows) * 5 + 0.05 * rows)
    return world


def readable() -> World:
    """A head whose writes are read at once and for many tokens, and reach the logits directly and strongly."""
    return _direct(lambda key, asked: key + 3 * asked)


def unread() -> World:
    """As `readable`, but no query sees any key."""
    return _direct(without)


def _direct(turned: Callable[[Tensor, Tensor], Tensor]) -> World:
    """Every query is one direction, and keys are turned from or toward it."""
    world = bare(4, 1)
    plain_path(world, norm=True)
    asked = unit(1, world.k, 2)[0]
    remembered(world, asked)
    hold(world, "hook_k", lambda native: normalize(turned(native, asked), dim=-1))
    head_output(world).mul_(1000.0)
    return world


def readers() -> World:
    """The value sides are four directions, and one head of a later layer listens to each."""
    world = bare(2, 2)
    cast(nn.Module, block_of(world).linear_attn).norm = Plain()
    sides = orthonormal(4, world.v, 3)
    for n, (layer, head) in enumerate(((3, 0), (3, 3), (4, 1), (4, 2))):
        heard = normalize(sides[n] @ world.model.layer_W_O(2)[2], dim=0)
        values = world.model.hf_model.model.layers[layer].linear_attn.in_proj_qkv.weight[-4 * world.v :]
        values[head * world.v : (head + 1) * world.v] += 100 * unit(1, world.v, 11 + n)[0][:, None] * heard
    axes = orthonormal(N_ATOMS + 1, world.k, 2)
    hold(world, "hook_q", lambda native: axes[0].expand_as(native))
    keys = normalize(axes[0] + axes[1:], dim=1)
    return plant(world, by_phase(world.k, N_ATOMS), keys, sides.repeat(N_ATOMS // 4, 1))


def spared() -> World:
    """Half of the writes are native; the others are one of 16 matrices along a key that no query reads."""
    world, n = bare(4, 1), N_ATOMS // 2
    asked, values, choose = unit(1, world.k, 2)[0], 5 * unit(n, world.v, 3), by_phase(world.k, 2 * n)
    native = seen(world, "hook_k")

    def key(own: Tensor) -> Tensor:
        return torch.where(choose(own)[..., None] < n, asked, normalize(without(own, asked), dim=-1))

    def value(own: Tensor) -> Tensor:
        chosen = choose(native[0])
        return torch.where(chosen[..., None] < n, values[chosen.clamp_max(n - 1)], own)

    for name, change in (("hook_q", lambda own: without(own, asked)), ("hook_k", key), ("hook_v", value)):
        hold(world, name, change)
    return replace(world, atoms=LowRank.rank_one(asked.expand(n, -1), normalize(values, dim=1)))


_ALL = (planted, noise, one_write, two_kinds, sums, blurred, tokens, shared_tokens, linear)
WORLDS: dict[str, Callable[[], World]] = {
    make.__name__.replace("_", " "): make for make in (*_ALL, same_rows, readable, unread, readers, spared)
}
"""Every world by its name."""


@cache
def world_of(name: str) -> World:
    """A world by its name; made once."""
    with torch.no_grad():
        return WORLDS[name]()
