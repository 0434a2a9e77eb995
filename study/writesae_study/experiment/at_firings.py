"""Questions that are asked at firings of atoms: what they share of settings, draws, and exchanged writes.

`OfFirings` draws firings of alive atoms, and `Exchanging` exchanges the write at each firing for an atom or a control.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from annotated_types import MinLen
from pydantic import NonNegativeInt, PositiveInt

from sae_lens_writesae.atom.low_rank import LowRank
from writesae.experiment.lab import Site, Trial
from writesae.head.writes import head_writes, joined
from writesae_study.experiment.bench import Bench, trials_at
from writesae_study.experiment.conditions import (
    CONTROLS,
    REFERENCES,
    Condition,
    Control,
    Scale,
    conditions,
    controls_at,
)
from writesae_study.experiment.draws import FiringDraw, draw_firings
from writesae_study.experiment.evaluation import Evaluation, Result
from writesae_study.head.baselines import BASELINES
from writesae_study.head.writes import mean_write

MEAN_ENERGY = 0.99
"""The mean write has the fewest rank-1 terms that hold this share of its squared norm."""
RELEVANT_RATE = 0.1
"""Distance of a win rate from 1/2 from which on it matters, and margin by which a control may be worse."""

Choice = Literal["dominant", "own"]
CHOICES: dict[str, str] = {
    "dominant": "the dominant atom of a uniformly drawn position",
    "own": "weighted by atoms: a uniformly drawn atom at one of its firings, however small its activation",
}


@dataclass(frozen=True, kw_only=True)
class OfAtoms(Evaluation):
    """A question about atoms of one dictionary, drawn or picked by hand, at some of their firings."""

    n_atoms: PositiveInt | None = None
    """Atoms drawn uniformly from all that can be tested. None: all of them."""
    atoms: tuple[int, ...] | None = None
    """A hand-picked list instead of a draw. Conclusions then hold for these atoms only."""
    first_position: NonNegativeInt = 1
    """Firings before this token are left out: at token 0 the state holds nothing but the write itself."""


@dataclass(frozen=True, kw_only=True)
class OfAlive(Evaluation):
    """A question about atoms that are alive, which means the same in all of them."""

    min_firings: PositiveInt = 5
    """Firings on the first 65,536 evaluation tokens that make an atom alive; a median over fewer says little."""


@dataclass(frozen=True, kw_only=True)
class OfFirings(OfAlive, OfAtoms):
    """A question at firings of alive atoms, dealt over sequences."""

    firings_per_atom: PositiveInt = 10
    """At most this many firings of an atom, dealt over sequences."""
    min_firings: PositiveInt = 1
    """Firings on the first 65,536 evaluation tokens that make an atom alive."""

    def drawn(self, lab: Bench, horizon: int, written: Choice = "own") -> FiringDraw:
        """The firings that are tested, as `draw_firings` takes them: the same for the same settings."""
        draw = draw_firings(
            lab.firings(),
            np.random.default_rng(self.seed),
            horizon=horizon,
            n_atoms=self.n_atoms,
            firings_per_atom=self.firings_per_atom,
            atoms=self.atoms,
            first_position=self.first_position,
            min_firings=self.min_firings,
            written=written,
        )
        lab.facts["n_alive"] = len(draw.alive)
        return draw


class Exchange(NamedTuple):
    """What is written at the firings of one sequence."""

    site: Site
    native: LowRank
    """N = firings."""
    atom: LowRank
    """At the activation of the firing."""
    conditions: Sequence[Condition]

    def trials(self, lab: Bench) -> list[Trial]:
        """An edited run for each condition and firing, firings in their order within each condition."""
        cosine = self.atom.cosine(self.native).cpu().numpy()
        rows = self.site.rows.assign(cosine=cosine)
        trials = []
        for name, scale, written in self.conditions:
            trials += trials_at(rows.assign(condition=name, scale=scale), lab.replace, written)
        return trials


@dataclass(frozen=True, kw_only=True)
class Exchanging(OfFirings):
    """A question that exchanges writes at firings."""

    atom_choice: Annotated[tuple[Choice, ...], MinLen(1)] = ("dominant", "own")
    """Atom that is written, in tests side by side; the first one is the headline."""
    scales: Annotated[tuple[Scale, ...], MinLen(1)] = ("coefficient", "matched")
    """How what is written is scaled; the first one is the headline's. Directions have the norm of the atom; baselines
    are scaled in the same way as the atom is, from their own size."""
    controls: tuple[Control, ...] = (*CONTROLS, *REFERENCES)
    """Controls and references to run."""
    horizon: PositiveInt = 16
    """KL is averaged over t..t+horizon, both included. Firings closer to the end are left out."""
    mean_write_sequences: PositiveInt = 16
    """Sequences from which the head's mean write is estimated."""

    min_sequences: ClassVar[int] = 1

    def scales_of(self, choice: str) -> tuple[Scale, ...]:
        """Scales at which a choice of atom is run: the headline at all, the other choices at the first one."""
        return self.scales if choice == self.atom_choice[0] else self.scales[:1]

    def exchanges(self, lab: Bench, draw: FiringDraw, scales: Sequence[Scale]) -> Iterator[Exchange]:
        """The conditions of each sequence that has firings, one sequence at a time. Cost: one plain forward each."""
        recurrences = lab.recurrences(self.mean_write_sequences)
        writes = joined([head_writes(recurrence, 0) for recurrence in recurrences])
        mean = mean_write(writes.keys[:, 0], writes.values[:, 0], MEAN_ENERGY)
        for site in map(Site.on_host, lab.sites(draw.table, self.kind)):
            native = site.at(site.rows["position"].tolist())
            decoded = lab.atoms(site.rows["written_atom"].to_numpy()).on_host().to(native.values)
            activation = torch.tensor(site.rows["activation"].to_numpy()).to(native.values)
            atom = decoded * activation
            baselines = None
            if set(self.controls) & set(BASELINES):
                baselines = lab.baselines(site.sequence)
            controls = controls_at(lab, site, atom, self.controls, alive=draw.alive, mean=mean, baselines=baselines)
            yield Exchange(site, native, atom, conditions(native, atom, controls, scales))


def wide_firings(result: Result, choice: str | None = None) -> pd.DataFrame:
    """One row per firing of a choice of atom, by default the first: its description, and the mean KL under each
    condition and scale ("atom/matched", "delete")."""
    table = result.tables["firings"]
    table = table[table["choice"] == (choice or table["choice"].iloc[0])]
    names = (table["condition"] + "/" + table["scale"]).str.removesuffix("/none")
    units = ["firing", "sequence", "position", "atom", "written_atom", "activation", "cosine"]
    values = table.assign(name=names).pivot(index="firing", columns="name", values="kl_window")
    return table[units].groupby("firing").first().join(values).reset_index()
