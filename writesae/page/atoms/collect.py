"""From a dictionary and a text to the data of its pages."""

from __future__ import annotations

import time
from dataclasses import asdict

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from sae_lens import SAE
from torch import Tensor
from torch.nn.functional import normalize

from hookpoints import HookedRecurrent
from writesae.dictionary.quality import qualities
from writesae.flags import AtomSettings
from writesae.page.atoms import data, parts
from writesae.page.atoms.measure import AtomFacts
from writesae.page.atoms.text import short


class AtomPages(AtomSettings):
    """Collects what the pages show of each atom."""

    @torch.inference_mode(False)
    @torch.no_grad()
    def collect(self, model: HookedRecurrent, sae: SAE, tokens: Tensor) -> data.AtomPagesData:
        """Measure what the pages show of each atom, on held-out text.

        Args:
            model: a hooked model with a tokenizer.
            sae: a dictionary of one of its heads.
            tokens: [N,T] evaluation sequences.

        Cost: three forwards up to the layer per sequence, for firings, cosines and memory; per atom
        `half_life_firings` vector recurrences and `effect_firings` pairs of short edited runs; then as `qualities`, if
        `quality` is set.

        Raises: as `AtomFacts`.
        """
        started = time.perf_counter()
        facts = AtomFacts(self, model, sae, tokens)
        pages = [_atom_page(facts, column) for column in range(len(facts.number))]
        info = facts.lab.describe(self.label)
        info["settings"] = asdict(self)
        info["quality"] = qualities(facts.lab)[self.label].to_dict() if self.quality else None
        info["seconds"] = round(time.perf_counter() - started, 2)
        return data.AtomPagesData(info, pages)


def _atom_page(facts: AtomFacts, column: int) -> data.AtomPage:
    rows = facts.rows(column)
    of_matrices, *sides = facts.cosines(column)
    spots = rows["spot"].to_numpy()
    rows["cosine"] = of_matrices[spots]
    activations = rows["activation"].to_numpy(float)
    direct = facts.direct[column]
    change = facts.change(column)[: facts.texts.size]  # W_U may have rows that no token has
    has_writes = not np.isnan(of_matrices[spots]).all()
    key = value = None
    if has_writes:
        key, value = (short(np.nanmedian(side[spots])) for side in sides)
    return data.AtomPage(
        atom=int(facts.number[column]),
        terms=_singular_terms(facts, column),
        n_firings=len(rows),
        rate=len(rows) / facts.ids.size,
        max_activation=float(activations.max()),
        density=parts.bars(activations, low=0.0),
        logits=parts.bars(change),
        fires_on=_fires_near(facts, rows, 0),
        fires_after=_fires_near(facts, rows, 1),
        top=parts.top(facts, rows),
        bands=list(parts.bands(facts, rows)),
        cosine=short(np.nanmedian(of_matrices[spots])) if has_writes else None,
        keys=data.AtomSide(_by_token(facts, sides[0]), key),
        values=data.AtomSide(parts.vocabulary(facts, direct), value),
        effect=_measured_effect(facts, column, direct),
        memory=_atom_memory(facts, column),
    )


def _singular_terms(facts: AtomFacts, column: int) -> list[data.Term]:
    keys = facts.terms.keys[column].double().cpu()
    values = facts.terms.values[column].double().cpu()
    sizes = keys.norm(dim=-1) * values.norm(dim=-1)
    square = float(facts.matrices.rows([column]).norm()) ** 2
    terms = []
    is_term = sizes > 1e-6 * sizes[0]  # an SVD in float32 leaves terms of rounding
    for n in is_term.nonzero()[:, 0].tolist():
        key = normalize(keys[n], dim=-1).numpy().round(4)
        value = normalize(values[n], dim=-1).numpy().round(4)
        size = float(sizes[n])
        share = min(1.0, size**2 / square)  # rounding can take it above 1
        terms.append(data.Term(size, share, key.tolist(), value.tolist()))
    return terms


def _atom_memory(facts: AtomFacts, column: int) -> data.AtomMemory:
    """Median over the firings that were followed."""
    lives = facts.half_lives[column]
    limit = facts.half_life_limit
    half_life = float(np.median(lives)) if lives else None
    return data.AtomMemory(None if half_life == limit else half_life, limit, len(lives))


def _measured_effect(facts: AtomFacts, column: int, direct: NDArray[np.float32]) -> data.Effect | None:
    """None where it was not measured. An atom's sign changes its direct path, not its effect."""
    mean = facts.effects[0][column]
    n = int(facts.effects[1][column])
    if n == 0:
        return None
    correlation = pd.Series(mean).corr(pd.Series(direct))  # NaN where one of them is constant
    return data.Effect(parts.vocabulary(facts, mean), float(np.nan_to_num(correlation)), n)


def _fires_near(facts: AtomFacts, rows: pd.DataFrame, back: int) -> list[data.TokenValue]:
    """The tokens `back` positions before most firings, with their share of the firings."""
    near = rows[rows["position"] >= back]
    ids, counts = np.unique(facts.ids[near["sequence"], near["position"] - back], return_counts=True)
    order = np.argsort(-counts, kind="stable")[: facts.settings.n_tokens]
    return parts.listed(facts, ids[order], counts[order] / len(rows), counts[order])


def _by_token(facts: AtomFacts, cosines: NDArray[np.float64]) -> data.Ends:
    """The mean of [N T] `cosines` over the occurrences of tokens that have three or more; NaN is none."""
    by_token = pd.Series(cosines).groupby(facts.ids.reshape(-1))
    table = by_token.agg(["mean", "count"]).query("count >= 3")
    return parts.ends(facts, table.index.to_numpy(), table["mean"].to_numpy(), table["count"].to_numpy())
