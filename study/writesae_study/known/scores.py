"""What a method finds: how pure its atoms are, which symbols they stand for, and which writes attribution finds."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from hookpoints import write_attribution
from writesae_study.known.sides import HeadCode
from writesae_study.known.world import FactChanges, World

FOUND = 0.8
"""Correlation, or purity, from which on an atom stands for a symbol."""


def purity(atoms: Tensor, parts: Tensor) -> tuple[float, float]:
    """Of atoms that are the strongest one of three rows or more: the mean share of rows [N] with the most frequent
    symbol of the atom; and the share of symbols [N,S] that are this of an atom with a purity above `FOUND`."""
    members = one_hot(atoms).float()  # [N,F]
    rows = members.sum(0)
    counts = members.T @ parts  # [F,S]
    several = rows >= 3
    pure, symbol = (counts[several] / rows[several, None]).max(1)
    n_symbols = int(parts.any(0).sum())
    return float(pure.mean()), len(symbol[pure > FOUND].unique()) / n_symbols


def features(code: HeadCode, world: World) -> tuple[float, Tensor]:
    """For each key and each part of a value, the atom whose contribution follows that part best among the writes of the
    key: the share with a correlation above `FOUND`, and atoms times their mean contributions there [keys,S,V]."""
    parts = world.parts(world.value_symbols)
    found = []
    vectors = []
    for key in range(int(world.key_symbols.max()) + 1):
        own = world.key_symbols == key
        present = parts[own]
        given = code.contribution[own]
        correlation = _centered_columns(present).T @ _centered_columns(given)  # [S,F]
        fit, best = correlation.max(1)
        found.append(fit > FOUND)
        size = (present * given[:, best]).sum(0) / present.sum(0).clamp_min(1)
        vectors.append(size[:, None] * code.values[best])
    return float(torch.stack(found).float().mean()), torch.stack(vectors)


def _centered_columns(x: Tensor) -> Tensor:
    """Columns of mean 0 and norm 1, whose products are correlations."""
    return normalize(x - x.mean(0), dim=0)


def attributed(world: World, n: int = 16) -> dict[str, float]:
    """Share of the held writes (layer, head, token) that are among the H with the largest `write_attribution` to the
    answer's logit: precision and recall at once. "null": of H writes drawn at random."""
    facts = FactChanges.draw(world, n)
    holder = world.holder
    question = facts.questions["changed"]
    n_heads = len(world.holder.heads)
    hits = null = 0.0
    for b in range(n):
        text = question.tokens[b : b + 1, : int(question.positions[b, 0]) + 1]
        answer = int(question.answers[b, 0])

        def lead(logits: Tensor, answer: int = answer) -> Tensor:
            return logits[0, -1, answer] - logits[0, -1].mean()

        table = write_attribution(world.model, text, lead, frozen=True)  # these answers are saturated
        top = table.loc[table.attribution.abs().nlargest(n_heads).index]
        held = (top.layer == holder.layer) & top["head"].isin(holder.heads) & (top.position == int(facts.at[b]))
        hits += held.mean() / n
        null += n_heads / len(table) / n
    return {"writes found": float(hits), "null": null}
