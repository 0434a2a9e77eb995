"""Questions that are asked at firings of atoms: what they share of settings, draws, and exchanged writes.

`OfFirings` draws firings of alive atoms, `OfHalves` chooses on one half of the sequences and tests on the other, and
`Exchanging` exchanges the write at each firing for an atom or a control.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, cast

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from sae_lens_writesae.atom.low_rank import LowRank
from writesae.experiment.conditions import (
    CONTROLS,
    REFERENCES,
    Condition,
    Control,
    Scale,
    common_factors,
    conditions,
    control_directions,
    edits_of,
)
from writesae.experiment.evaluation import Evaluation, Result
from writesae.experiment.firings import (
    Bounds,
    FiringDraw,
    Firings,
    Integers,
    draw_atoms,
    draw_firings,
    folds,
    halves,
    sample_firings,
)
from writesae.experiment.head import WriteKind, head_profile, head_writes
from writesae.experiment.head_baselines import BASELINES
from writesae.experiment.lab import Lab, Site, Trial
from writesae.experiment.readout import KL_METRICS, changed_words, kl_metrics

RELEVANT = 0.1
"""Distance of a win rate from 1/2 from which on it matters, and margin by which a control may be worse."""

Choice = Literal["dominant", "own"]
CHOICES: dict[str, str] = {
    "dominant": "the dominant atom of the position (the paper's test)",
    "own": "the atom whose firing was drawn, however small its activation",
}


@dataclass(frozen=True, kw_only=True)
class OfAtoms(Evaluation):
    """A question about atoms of one dictionary, drawn or picked by hand, at some of their firings."""

    n_atoms: int | None = None
    """Atoms drawn uniformly from all that can be tested. None: all of them."""
    atoms: tuple[int, ...] | None = None
    """A hand-picked list instead of a draw. Conclusions then hold for these atoms only."""
    first_position: int = 1
    """Firings before this token are left out: at token 0 the state holds nothing but the write itself."""

    fewest_atoms: ClassVar[int] = 1
    """Atoms that a hand-picked list needs."""
    least: ClassVar[dict[str, int]] = {"first_position": 0}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.atoms is not None and len(self.atoms) < self.fewest_atoms:
            raise ValueError(f"atoms names at least {self.fewest_atoms}, or is left out; found {list(self.atoms)}")


@dataclass(frozen=True, kw_only=True)
class OfFirings(OfAtoms):
    """A question at firings of alive atoms, dealt over sequences."""

    firings_per_atom: int = 10
    """At most this many firings of an atom, dealt over sequences."""
    alive_tokens: int = 65_536
    """An atom is alive if it fires on the first so many evaluation tokens (all, where there are fewer)."""
    min_firings: int = 1
    """Firings on those tokens that make an atom alive."""

    def drawn(
        self,
        lab: Lab,
        rng: np.random.Generator,
        horizon: int,
        written: Literal["own", "dominant"] = "own",
        silent: bool = False,
    ) -> FiringDraw:
        """The firings that are tested, as `draw_firings` takes them."""
        names = ("n_atoms", "atoms", "first_position", "firings_per_atom", "alive_tokens", "min_firings")
        settings = {name: getattr(self, name) for name in names}
        draw = draw_firings(lab.firings(), rng, horizon=horizon, written=written, silent=silent, **settings)
        lab.facts |= {"n_alive": len(draw.alive), "alive_tokens": draw.alive_tokens, "n_testable": draw.n_testable}
        return draw


@dataclass(frozen=True, kw_only=True)
class OfHalves(OfAtoms):
    """A question that chooses something for each atom on one half of the sequences, and tests it on the other."""

    select_firings: int = 8
    """At most this many firings of an atom for the choice, dealt over sequences."""
    test_firings: int = 8
    """At most this many firings of an atom for the test, in the other half of the sequences."""
    min_firings: int = 4
    """Firings in each half that an atom needs; those of the test half must lie in at least two sequences."""
    horizon: int = 8
    """What follows a firing is looked at over t..t+horizon."""

    least: ClassVar[dict[str, int]] = {"first_position": 0, "horizon": 0, "test_firings": 2, "min_firings": 2}

    @property
    def shortest(self) -> int:
        return self.first_position + self.horizon + 1

    def drawn(
        self, lab: Lab, rng: np.random.Generator
    ) -> tuple[Integers, Bounds, Iterator[tuple[Firings, pd.DataFrame]]]:
        """The tested atoms, first and last position, and of each half all firings, and those that are looked at. A half
        is drawn when it is asked for."""
        firings, split = lab.firings(), halves(len(lab.tokens), self.seed)
        bounds: Bounds = {"first": self.first_position, "last": firings.n_positions - 1 - self.horizon}
        how = {"min_firings": self.min_firings, "n_atoms": self.n_atoms, "atoms": self.atoms}
        atoms = draw_atoms(firings, split, bounds, rng, **how)
        sides = zip(map(firings.of_sequences, split), (self.select_firings, self.test_firings))
        samples = ((side, sample_firings(side, atoms, most, **bounds, rng=rng)) for side, most in sides)
        return atoms, bounds, samples


class Exchange(NamedTuple):
    """What is written at the firings of one sequence."""

    site: Site
    native: LowRank
    """N = firings."""
    atom: LowRank
    """As the decoder has it, at activation 1."""
    activation: Tensor
    """[N]"""
    controls: dict[str, LowRank]
    """Directions, and baselines at their own size, before they are scaled."""
    conditions: Sequence[Condition] = ()
    """All conditions, scaled."""

    @property
    def positions(self) -> list[int]:
        """Token t of each firing."""
        return self.site.rows["position"].tolist()


@dataclass(frozen=True, kw_only=True)
class Exchanging(OfFirings):
    """A question that exchanges writes at firings."""

    atom_choice: tuple[Choice, ...] = ("dominant", "own")
    """Atom that is written, in tests side by side; the first one is the headline."""
    positions: Literal["firing", "silent"] = "firing"
    """Where: at the firings, or (a null) at random positions of the same sequences where the atom is silent, with the
    activation of the firing."""
    write: WriteKind = "additive"
    """The native write: k_t u_t^T, keeping the erase (the paper's), or k_t u~_t^T, which takes the erase along."""
    scales: tuple[Scale, ...] = ("coefficient", "matched", "common")
    """How what is written is scaled; the first one is the headline's. Directions have the norm of the atom; baselines
    are scaled in the same way as the atom is, from a size of their own."""
    controls: tuple[Control, ...] = (*CONTROLS, *REFERENCES)
    """Controls and references to run. Directions are not run at the scale "common"."""
    n_codes: int | None = None
    """Native writes that `drawn` draws, and codes of `quantised`. None: as many as the dictionary has atoms."""
    pca_components: int = 4
    """Principal components of `pca`."""
    horizon: int = 16
    """KL is averaged over t..t+horizon, both included. Firings closer to the end are left out."""
    last_position_firings: int | None = 100
    """Firings, drawn from those tested, that are run on to the last token of the sequence and measured there too, at
    many times the cost. None: all firings; 0: none."""
    mean_write_sequences: int = 16
    """Sequences from which the head's mean write and half-life are estimated."""
    mean_write_energy: float = 0.99
    """The mean write is kept as the fewest rank-1 terms that hold this share of its squared norm."""

    min_sequences: ClassVar[int] = 1
    least: ClassVar[dict[str, int]] = {"first_position": 0, "last_position_firings": 0}

    def __post_init__(self) -> None:
        if isinstance(self.atom_choice, str):
            object.__setattr__(self, "atom_choice", (self.atom_choice,))
        super().__post_init__()
        for name in ("scales", "atom_choice"):
            if not getattr(self, name):
                raise ValueError(f"{name} must name at least one of {', '.join(self.choices()[name])}")
        if not 0 < self.mean_write_energy <= 1:
            raise ValueError(f"mean_write_energy is a share in (0, 1], found {self.mean_write_energy}")

    @property
    def shortest(self) -> int:
        return self.first_position + self.horizon + 1

    def scales_of(self, choice: str) -> tuple[Scale, ...]:
        """Scales at which a choice of atom is run: the headline at all, what stands beside it at the first one."""
        return self.scales if choice == self.atom_choice[0] else self.scales[:1]

    def draw(self, lab: Lab, choice: Choice) -> FiringDraw:
        """The firings that are tested, the same for the same settings, whatever else is run. The column `to_end` says
        which of them are followed to the end of their sequence."""
        rng = np.random.default_rng(self.seed)
        draw = self.drawn(lab, rng, self.horizon, choice, self.positions == "silent")
        n = len(draw.table)
        n_last = n if self.last_position_firings is None else self.last_position_firings
        return draw._replace(table=draw.table.assign(to_end=rng.permutation(n) < n_last))

    def exchanges(self, lab: Lab, draw: FiringDraw, scales: Sequence[Scale] | None = None) -> Iterator[Exchange]:
        """The conditions of each sequence that has firings, one sequence at a time, at all scales by default. Cost: one
        plain forward each, two where a scale is "common"."""
        scales = self.scales if scales is None else scales
        sequences = range(min(self.mean_write_sequences, len(lab.tokens)))
        profile = head_profile(map(lab.recurrence, sequences), self.write, self.mean_write_energy)
        lab.facts |= {
            "half_life": profile.half_life,
            "half_life_limit": profile.half_life_limit,
            "mean_write_rank": profile.mean_write.rank,
        }
        factors: dict[int, dict[str, float]] = {}
        if "common" in scales:
            factors = self._common(lab, self._unscaled(lab, draw, profile.mean_write))
        for each in self._unscaled(lab, draw, profile.mean_write):
            of_sequence = factors.get(each.site.sequence)
            listed = conditions(each.native, each.atom, each.activation, each.controls, scales, of_sequence)
            yield each._replace(conditions=listed)

    def _unscaled(self, lab: Lab, draw: FiringDraw, mean: LowRank) -> Iterator[Exchange]:
        for site in lab.sites(draw.table, self.kind):
            if self.write != "additive":
                site = site._replace(writes=head_writes(site.recurrence, 0, self.write))
            native = site.writes.rows(site.rows["position"].tolist())
            atom = lab.atoms(site.rows["written_atom"].to_numpy()).to(native.values)
            activation = torch.tensor(site.rows["activation"].to_numpy()).to(native.values)
            fitted = None
            if set(self.controls) & set(BASELINES):
                fitted = lab.baselines(site.sequence, self.write, n_codes=self.n_codes, components=self.pca_components)
                lab.facts |= {"baseline_tokens": len(fitted.writes), "n_codes": len(fitted.drawn)}
            controls = control_directions(
                lab, site, site.rows, atom, self.controls, alive=draw.alive, mean=mean, native=native, baselines=fitted
            )
            yield Exchange(site, native, atom, activation, controls)

    def _common(self, lab: Lab, exchanges: Iterator[Exchange]) -> dict[int, dict[str, float]]:
        """The factors of the scale "common" by sequence, of the atom and of each baseline."""
        rows = []
        for each in exchanges:
            own = {"atom": each.atom * each.activation} | {n: m for n, m in each.controls.items() if n in BASELINES}
            for name, matrix in own.items():
                inner, square = float(matrix.inner(each.native).sum()), float(matrix.inner(matrix).sum())
                rows.append((each.site.sequence, name, inner, square))
        products = pd.DataFrame(rows, columns=["sequence", "condition", "inner", "square"])
        fold = folds(products["sequence"].to_numpy(), self.seed)
        needed = "the scale 'common' is fitted on other sequences than it is used on, and all firings are in one"
        lab.require(len(fold) > 1, f"{needed}; give more text, or leave it out of scales")
        factors = common_factors(products, fold)
        return {sequence: factors[half] for sequence, half in fold.items()}

    def measured(self, lab: Lab, exchange: Exchange) -> pd.DataFrame:
        """Divergences under every condition at the firings of one sequence."""
        site, native = exchange.site, exchange.native
        described = site.rows.assign(
            cosine=exchange.atom.cosine(native).cpu().numpy(), write_norm=native.norm().cpu().numpy()
        )
        rows = cast(list[dict[str, object]], described.to_dict("records"))
        trials: list[Trial] = []
        for condition in exchange.conditions:
            edits = edits_of(lab, condition, native, exchange.positions, self.write)
            written = condition.written
            sizes = [0.0] * len(rows) if written is None else written.norm().cpu().tolist()
            for row, position, edit, size in zip(rows, exchange.positions, edits, sizes):
                named = row | {"condition": condition.name, "scale": condition.scale, "norm": size}
                trials.append(Trial(named, position, edit))
        parts = []
        for to_end, window in ((False, self.horizon + 1), (True, None)):
            of_kind = [trial for trial in trials if trial.row["to_end"] == to_end]
            if of_kind:
                parts.append(lab.read(site, of_kind, kl_metrics(self.horizon, to_end), window))
        return pd.concat(parts, ignore_index=True)

    def example(self, lab: Lab, firings: pd.DataFrame) -> pd.DataFrame:
        """The firing of the headline whose deletion moves the model most, in words."""
        deleted = firings[(firings["choice"] == self.atom_choice[0]) & (firings["condition"] == "delete")]
        row = deleted.loc[[deleted["kl_window"].idxmax()]]
        draw, scale = (
            self.draw(lab, self.atom_choice[0]),
            self.scales[0] if self.scales[0] != "common" else "coefficient",
        )
        of_row = (draw.table["sequence"] == row["sequence"].item()) & (draw.table["firing"] == row["firing"].item())
        (exchange,) = self.exchanges(lab, draw._replace(table=draw.table[of_row]), (scale,))
        named = {each.name: each for each in exchange.conditions}
        trials = [
            Trial({"condition": name}, exchange.positions[0], edit)
            for name in ("delete", "atom", "token_mean")
            if name in named
            for edit in edits_of(lab, named[name], exchange.native, exchange.positions, self.write)
        ]
        words = changed_words(lab, exchange.site, trials, self.horizon + 1)
        lab.count_edited_runs(-len(trials) - 1)  # a reader counts conditions, not this
        return words.assign(firing=row["firing"].item())


def wide_firings(result: Result, metric: str = "kl_window", choice: str | None = None) -> pd.DataFrame:
    """One row per firing where `metric` was measured: its description, and one column per condition and scale
    ("atom/matched", "delete")."""
    if metric not in KL_METRICS:
        raise ValueError(f"metric must be one of {', '.join(KL_METRICS)}, found {metric!r}")
    table = result.tables["firings"]
    table = table[table["choice"] == (choice or table["choice"].iloc[0])]
    names = (table["condition"] + "/" + table["scale"]).str.removesuffix("/none")
    units = ["firing", "sequence", "position", "atom", "written_atom", "activation", "cosine", "write_norm"]
    values = table.assign(name=names).pivot(index="firing", columns="name", values=metric)
    described = table[units].groupby("firing").first()
    return described.join(values, how="inner").dropna(subset=["delete"]).reset_index()


def headline_share(result: Result) -> float:
    """The recovered share of the headline's atom; -inf where no deletion has an effect."""
    wide = wide_firings(result)
    total, scale = float(wide["delete"].sum()), cast(Exchanging, result.evaluation).scales[0]
    return 1 - float(wide[f"atom/{scale}"].sum()) / total if total > 0 else -np.inf
