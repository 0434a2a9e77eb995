"""Which facts can be read from a state."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from hookpoints import zoo
from writesae.known.sides import kmeans
from writesae.known.world import World


def pursue_pairs(
    states: Tensor, keys: Tensor, labels: Tensor, values: Tensor, pairs: int, *, refit: bool = True
) -> tuple[Tensor, Tensor]:
    """The pairs of a key atom and a value atom, [B,P] each, that states [B,K,V] are sums of: orthogonal matching
    pursuit (Pati et al. 1993) on p_i v_j^T, which takes the pair with the largest product with what is left and fits
    all coefficients again. Of atoms with one label [F] one is taken. Without `refit`, the P largest p_i^T S v_j."""
    keys = normalize(keys, dim=1)
    values = normalize(values, dim=1)
    free = torch.ones(len(states), len(keys), dtype=torch.bool)  # atoms whose label was not taken
    i = j = states.new_zeros(len(states), 0).long()
    left = states
    for _ in range(pairs):
        scores = torch.einsum("ik,bkv,jv->bij", keys, left, values).masked_fill(~free[..., None], -torch.inf)
        best = scores.flatten(1).argmax(1, keepdim=True)
        i = torch.cat([i, best // len(values)], 1)
        j = torch.cat([j, best % len(values)], 1)
        free &= labels[i[:, -1:]] != labels
        if refit:
            left = states - _projection(states, keys[i], values[j])
    return i, j


def _projection(states: Tensor, p: Tensor, v: Tensor) -> Tensor:
    """States [B,K,V] on the span of p_n v_n^T [B,n,K], [B,n,V]."""
    gram = (p @ p.mT) * (v @ v.mT) + 1e-4 * torch.eye(p.shape[1])
    sizes = torch.linalg.solve(gram, torch.einsum("bnk,bkv,bnv->bn", p, states, v))
    return torch.einsum("bn,bnk,bnv->bkv", sizes, p, v)


class Reader:
    """Codes of keys and values, with the symbols that most of their writes have, and a probe that was given labels."""

    def __init__(self, world: World):
        self.world = world
        self.head = world.holder.heads[0]
        self.n_keys = world.task.n_keys
        self.n_values = world.task.n_values
        value = kmeans(world.values[0], self.n_values, 0)
        self.values = value.atoms
        self.value_symbols = _usual(value.code, world.value_symbols)
        self.keys = [kmeans(world.keys[0], size, 0) for size in (self.n_keys, 4 * self.n_keys)]

    def held(self, pairs: int, count: int, seed: int) -> tuple[zoo.Batch, Tensor, Tensor]:
        """Sequences, their last states [B,K,V], and the facts in these [B,P]."""
        batch = self.world.task.batch(count, torch.Generator().manual_seed(seed), pairs=pairs, queries=pairs)
        recurrence = self.world.model.recurrence(batch.tokens[:, : 2 * pairs + 2], self.world.holder.layer)
        facts = self.fact(batch.symbols["keys"], batch.symbols["values"])
        return batch, recurrence.final_state()[:, self.head], facts

    def fact(self, keys: Tensor, values: Tensor) -> Tensor:
        """The number of a fact."""
        return keys * self.n_values + values

    def by_atoms(self, states: Tensor, pairs: int, which: int, refit: bool) -> Tensor:
        """[B,P] facts that `pursue_pairs` reads, with one of the codes of keys."""
        key = self.keys[which]
        symbols = _usual(key.code, self.world.key_symbols)
        i, j = pursue_pairs(states, key.atoms, symbols, self.values, pairs, refit=refit)
        return self.fact(symbols[i], self.value_symbols[j])

    def by_probe(self, states: Tensor, pairs: int) -> Tensor:
        """[B,P] facts that a linear probe reads; it is fitted to eight times as many other states."""
        _, seen, facts = self.held(pairs, 8 * len(states), 99)
        wanted = torch.zeros(len(seen), self.n_keys * self.n_values).scatter(1, facts, 1.0)
        x = seen.flatten(1)
        gram = x.T @ x
        ridge = gram.diagonal().mean() * torch.eye(len(gram))
        probe = torch.linalg.solve(gram + ridge, x.T @ wanted)
        best = (states.flatten(1) @ probe).view(len(states), -1, self.n_values).max(2)  # the best value of each key
        keys = best.values.topk(pairs).indices
        return self.fact(keys, best.indices.gather(1, keys))


def _usual(code: Tensor, symbols: Tensor) -> Tensor:
    """[F] the most frequent symbol [N] of the writes of each atom."""
    return (one_hot(code.argmax(1)).T @ one_hot(symbols)).argmax(1)


@torch.no_grad()
def read_states(world: World, n: int, sizes: Sequence[int] = (4, 8, 12, 16)) -> list[dict[str, float]]:
    """Share of the facts that a state holds which are read from it, by number of pairs: with four times as many key
    codes as symbols and without, by a linear probe that was given labels, and the model's own answers."""
    reader = Reader(world)
    rows = []
    for pairs in sizes:
        batch, states, facts = reader.held(pairs, n, pairs)
        found = {
            "strongest reads": reader.by_atoms(states, pairs, which=0, refit=False),
            "pursuit": reader.by_atoms(states, pairs, which=0, refit=True),
            "pursuit, four times the key codes": reader.by_atoms(states, pairs, which=1, refit=True),
            "linear probe, with labels": reader.by_probe(states, pairs),
        }
        answers = world.model(batch.tokens).argmax(-1).gather(1, batch.positions)
        shares = {name: share_held(read, facts) for name, read in found.items()}
        right = float((answers == batch.answers).float().mean())
        rows.append({"pairs": float(pairs), **shares, "the model's own answers": right})
    return rows


def share_held(found: Tensor, facts: Tensor) -> float:
    """Share of facts [B,P] that are among those found [B,P]."""
    return float((found[:, :, None] == facts[:, None]).any(1).float().mean())
