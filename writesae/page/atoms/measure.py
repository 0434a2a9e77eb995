"""What is measured of the atoms that get a page; each fact is measured when a page or an export first needs it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import cast

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike, NDArray
from sae_lens import SAE
from torch import Tensor
from torch.nn.functional import normalize

from hookpoints import HookedRecurrent, Recurrence
from sae_lens_writesae.atom.low_rank import LowRank
from writesae.experiment.firings import Integers, picked, sample_firings
from writesae.experiment.lab import EditedRows, Lab, Trial
from writesae.flags import AtomSettings
from writesae.page.atoms.text import TokenTexts

TERMS = 4
"""Most singular terms of an atom that are shown."""
STEP = 0.05
"""Step of the central difference, in norms of the native write; its error falls with the square of the step."""


class AtomFacts:
    """The atoms of a dictionary that get a page, and what is measured of them on held-out text.

    Args:
        settings: which atoms, from how many firings.
        model: a hooked model with a tokenizer.
        sae: a dictionary of one of its heads.
        tokens: [N,T] evaluation sequences.

    Cost: one forward up to the layer per sequence.

    Raises:
        ValueError: the SAE does not fit the model, the model has no tokenizer, or a hand-picked atom does not fire
            often enough.
        NothingToMeasureError: no atom that is not zero fires often enough.
    """

    @torch.no_grad()
    def __init__(self, settings: AtomSettings, model: HookedRecurrent, sae: SAE, tokens: Tensor) -> None:
        self.settings = settings
        self.texts = TokenTexts(model)
        self.lab = lab = Lab(model, {settings.label: sae}, tokens, seed=settings.seed, progress=True)
        self.ids = tokens.cpu().numpy()
        self.firings = lab.firings()
        alive = self.firings.alive(tokens.numel(), 1)
        often = self.firings.alive(tokens.numel(), settings.min_firings)
        lab.skipped[f"that fire fewer than {settings.min_firings} times"] = len(alive) - len(often)
        has_size = (lab.atoms(often).norm() > 0).cpu().numpy()  # an atom that is zero has no sides to show
        lab.skipped["whose matrix is zero"] = len(often) - int(has_size.sum())
        often = often[has_size]
        lab.facts = {"n_alive": len(alive), "n_frequent": len(often)}
        needed = f"each must fire {settings.min_firings} times on this text"
        rng = np.random.default_rng(settings.seed)
        atoms = picked(often, settings.atoms, settings.n_atoms or None, rng, needed, self.firings)
        self.number: Integers = np.unique(atoms)
        """The n atoms, ascending."""
        self.matrices = lab.atoms(self.number)

    @cached_property
    def terms(self) -> LowRank:
        """The largest singular terms, at most `TERMS` of them. For rank 1 the only term is the atom; otherwise they
        cost an SVD each. v w^T and (-v)(-w)^T are one atom: here v agrees with the keys at its firings."""
        terms = self.matrices if self.matrices.rank == 1 else LowRank.svd(self.matrices.dense(), TERMS)
        keys = normalize(self.writes.keys, dim=-1).mean(1)  # [N T,K]
        signs = torch.ones_like(terms.keys[:, :1, :1])
        for column in range(len(self.number)):
            at_firings = keys[self.rows(column)["spot"].tolist()] @ terms.keys[column, 0]
            if at_firings.quantile(0.5) < 0:
                signs[column] = -1
        return LowRank(terms.keys * signs, terms.values * signs)

    @cached_property
    def sides(self) -> tuple[Tensor, Tensor]:
        """[n,K] and [n,V] unit key and value side of the leading term."""
        return normalize(self.terms.keys[:, 0], dim=-1), normalize(self.terms.values[:, 0], dim=-1)

    @cached_property
    def direct(self) -> NDArray[np.float32]:
        """w^T W_O^h W_U [n,vocab] for unit w, minus the mean over the vocabulary, to which probabilities are blind.

        The value side of the paper's formula (WriteSAE, arXiv 2605.12770): the gain and gate of the head's norm, later
        blocks and the final norm are not in it.
        """
        hook = self.lab.hook
        unembed = self.lab.model.W_U
        out = self.lab.model.layer_W_O(hook.layer)[hook.head].to(unembed)
        path = self.sides[1].to(unembed) @ out @ unembed
        return (path - path.mean(-1, keepdim=True)).float().cpu().numpy()

    @cached_property
    def writes(self) -> LowRank:
        """The N T native writes of the text. Cost: one forward up to the layer per sequence; memory N T (K + V)."""
        return self.lab.native_writes(range(len(self.ids))).to(self.matrices.keys)

    @property
    def half_life_limit(self) -> int:
        """Longest half-life that is looked for, in tokens: so many come after each write that is followed."""
        return min(self.settings.half_life_limit, self.ids.shape[1] // 2)

    @cached_property
    def half_lives(self) -> list[list[int]]:
        """Per atom, for each write that is followed, tokens after which less than half of its norm is left; the limit
        where that comes later.

        Cost: one forward up to the layer per sequence, and one vector recurrence for each of these firings.
        """
        limit = self.half_life_limit
        lives = [list[int]() for _ in self.number]
        followed = self._sampled_firings(self.settings.half_life_firings, limit, stream=2)
        for s, firings in self.lab.bar(followed, "memory"):
            recurrence = self.lab.recurrence(s)
            for column, t, _ in firings:
                norms = norms_after(recurrence.select(tokens=slice(0, t + limit + 1)), self.matrices.rows([column]), t)
                # A norm that rises again later does not count.
                not_yet_half = (norms >= norms[0] / 2).long().cumprod(0)
                lives[column].append(min(int(not_yet_half.sum()), limit))
        return lives

    def _sampled_firings(self, per_atom: int, room: int, stream: int) -> list[tuple[int, list[tuple[int, int, float]]]]:
        """By sequence: column, position and activation of up to `per_atom` firings of each atom, with `room` tokens
        after them."""
        last = self.ids.shape[1] - 1 - room
        rng = self.lab.rng(stream)
        table = sample_firings(self.firings, self.number, per_atom, first=0, last=last, rng=rng)
        table["column"] = np.searchsorted(self.number, table["atom"])
        by_sequence = []
        for sequence, rows in table.groupby("sequence"):
            firings = rows[["column", "position", "activation"]].itertuples(index=False, name=None)
            by_sequence.append((cast(int, sequence), list(firings)))
        return by_sequence

    def cosines(self, column: int) -> NDArray[np.float64]:
        """[3,N T] signed cosines of one atom with every native write: of the matrices, of the key sides and of the
        value sides (mean over the terms of a write); NaN where the native write is zero."""
        writes = self.writes
        key, value = (side[column] for side in self.sides)
        of_matrices = writes.cosines(self.matrices.rows([column]))[:, 0]
        of_keys = (normalize(writes.keys, dim=-1) @ key).mean(-1)
        of_values = (normalize(writes.values, dim=-1) @ value).mean(-1)
        cosines = torch.stack([of_matrices, of_keys, of_values])
        return cosines.where(writes.norm() > 0, torch.nan).double().cpu().numpy()

    def rows(self, column: int) -> pd.DataFrame:
        """The firings of one atom: sequence, position, atom, activation, and spot, the place in the N T tokens."""
        table = self.firings.frame(self.firings.atom == self.number[column])
        return table.assign(spot=table["sequence"] * self.ids.shape[1] + table["position"])

    def change(self, column: int) -> NDArray[np.float32]:
        """[vocab] change of the logits by effect, or along the direct path where no effect was measured."""
        mean, n = self.effects
        return mean[column] if n[column] else self.direct[column]

    @cached_property
    def effects(self) -> tuple[NDArray[np.float32], Integers]:
        """d / d eps at eps = 0 of the logits where eps |W_t| A / |A| is added to the write, by central differences of
        `STEP`: [n,vocab] mean over firings and positions, minus the mean over the vocabulary; [n] firings behind each.

        Cost: two edited rows of horizon + 1 tokens per firing. Firings at a zero write are left out.
        """
        lab = self.lab
        settings = self.settings
        total = np.zeros((len(self.number), lab.model.W_U.shape[1]), dtype=np.float32)
        counts = np.zeros(len(self.number), dtype=np.int64)
        unit = self.matrices.with_norm(torch.ones_like(self.matrices.norm()))

        def add_up(rows: EditedRows) -> Mapping[str, ArrayLike]:
            # In place: the window is a copy, as large as all logits of the batch.
            moved = rows.window.sub_(rows.native_window).float().mean(1).cpu().numpy()  # [n,vocab]
            for trial, change in zip(rows.trials, moved):
                total[cast(int, trial.row["column"])] += cast(float, trial.row["sign"]) * change
            return {}

        drawn = self._sampled_firings(settings.effect_firings, settings.effect_horizon, 1)
        for sequence, firings in lab.bar(drawn, "effects"):
            site = lab.site(sequence)
            trials = list[Trial]()
            size = site.writes.norm()
            for column, t, _ in firings:
                if not size[t] > 0:
                    continue
                added = unit.rows([column]).to(size) * (STEP * size[[t]])
                # f'(0) = (f(STEP) - f(-STEP)) / 2 STEP
                for sign in (1.0, -1.0):
                    trials.append(Trial({"column": column, "sign": sign}, t, lab.add(t, added * sign)))
                counts[column] += 1
            if trials:
                lab.read(site, trials, add_up, settings.effect_horizon + 1)
        total /= 2 * STEP * np.maximum(counts, 1)[:, None]
        # Probabilities are blind to what all logits have in common.
        return total - total.mean(1, keepdims=True), counts


def norms_after(recurrence: Recurrence, atom: LowRank, start: int) -> Tensor:
    """[S] the norm of what is left of an atom (N = 1) that is written at token `start`, there and at the tokens after
    it, under decay and erase (closed loop).

    Args:
        recurrence: of the head alone, on the sequence.

    Cost: a vector recurrence for each term.
    """
    carried = recurrence.propagate(atom.keys[0].to(recurrence.dtype), start, 0)[0]
    keys = carried.movedim(0, 1)  # [S,R,K]
    return LowRank(keys, atom.values.to(keys).expand(len(keys), -1, -1)).norm()
