"""What each condition of a substitution writes at a firing, and what its controls are made of.

Protocol: WriteSAE (arXiv 2605.12770), section 4 and appendix. `shuffled` is the paper's "random"; the other controls
are this project's. A write, an atom or a control is a `LowRank`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from sae_lens_writesae.atom.low_rank import LowRank
from writesae.experiment.lab import Site
from writesae_study.experiment.bench import Bench
from writesae_study.experiment.terms import tokens_and_before
from writesae_study.head.baselines import BASELINES, Baseline, HeadBaselines
from writesae_study.head.writes import state_direction, torch_generator

Scale = Literal["coefficient", "matched", "least_squares"]
"""How the atom is scaled. The paper names the first two, and contradicts itself about which; the third is ours."""

Direction = Literal["random", "shuffled", "elsewhere", "state", "mean"]
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
"""Directions other than the atom's, written at the norm of the atom condition. The order fixes their random streams."""

Rival = Literal[Direction, Baseline]
CONTROLS: tuple[Rival, ...] = get_args(Rival)
"""All that an atom has to beat: the directions, and what has its own size and needs no training."""

Reference = Literal["state_after"]
REFERENCES: tuple[Reference, ...] = get_args(Reference)
"""Upper references: they contain the native write, so that they are shown and never compared with an atom."""

Control = Literal[Rival, Reference]


class Condition(NamedTuple):
    """One condition at one scale, for N firings at once."""

    name: str
    scale: str
    """A `Scale`, or "none" for native and delete."""
    written: LowRank | None
    """What is written at each firing; None: nothing."""


def scaled(matrix: LowRank, native: LowRank, scale: str) -> LowRank:
    """Matrices with their own size at a `Scale`: as they are, at the norm of the native write W, or as
    the projection <W,A> A / |A|^2 of W on them. A matrix that is zero stays zero.

    At "matched", c A is closer to W than 0 only if their cosine exceeds 1/2; at "least_squares" it always is.
    """
    if scale == "coefficient":
        return matrix
    square = matrix.inner(matrix).clamp_min(0)
    if scale == "matched":
        product = native.norm() * square.sqrt()
    else:
        product = matrix.inner(native)
    smallest = torch.finfo(square.dtype).tiny
    return matrix * torch.where(square > 0, product / square.clamp_min(smallest), 0)


def conditions(
    native: LowRank, atom: LowRank, controls: Mapping[str, LowRank], scales: Sequence[str]
) -> list[Condition]:
    """All conditions of N firings: native, delete, then per scale the atom and every control.

    Args:
        atom: a_i A_i, at the activation of the firing.
        controls: by name: directions of any norm but 0, and baselines at their own size. A direction gets the norm of
            the atom condition, and keeps its sign even where the least-squares coefficient of the atom is negative.
    """
    listed = [Condition("native", "none", native), Condition("delete", "none", None)]
    for scale in scales:
        # Directions have no size of their own: at every scale they get that of the atom.
        written = scaled(atom, native, scale)
        listed.append(Condition("atom", scale, written))
        for name, control in controls.items():
            at_scale = scaled(control, native, scale) if name in BASELINES else control.with_norm(written.norm())
            listed.append(Condition(name, scale, at_scale))
    return listed


def controls_at(
    lab: Bench,
    site: Site,
    atom: LowRank,
    names: Sequence[str],
    *,
    alive: NDArray[np.int64],
    mean: LowRank,
    baselines: HeadBaselines | None = None,
) -> dict[str, LowRank]:
    """The controls `names` at the firings of one sequence: directions, and baselines at their own size.

    Args:
        site: its rows have the columns position and written_atom.
        atom: what is written there; its rank is that of the random directions.
        alive: atoms that `shuffled` draws from.
        mean: the head's mean write.
        baselines: fitted on other text; for those of `names` that are baselines.

    Each control of each sequence draws from a separate random stream, so that batching, order and the presence of
    other controls change nothing.

    Raises:
        NothingToMeasureError: there is no other atom, or no other write, to draw.
    """
    positions: list[int] = site.rows["position"].tolist()
    tokens = tokens_and_before(lab.tokens[site.sequence])[positions]
    made: dict[str, LowRank] = {}
    rngs = {name: lab.rng(site.sequence, n) for n, name in enumerate(DIRECTIONS)}
    for name in names:
        match name:
            case "random":
                made[name] = atom.random_like(torch_generator(rngs["random"]))
            case "shuffled":
                active = lab.firings().of_sequences(np.array([site.sequence]))
                taken = []
                for t, written in zip(positions, site.rows["written_atom"]):
                    # Where nothing fires, atom 0 is written with an activation of 0; it is no control either.
                    taken.append(np.append(active.atom[active.position == t], written))
                needed = "'shuffled' needs an alive atom that does not fire there"
                drawn_atoms = lab.atoms(_other_draws(lab, rngs["shuffled"], alive, taken, needed))
                made[name] = drawn_atoms.on_host().to(atom.values)
            case "elsewhere":
                written = np.flatnonzero(site.writes.norm().cpu().numpy())
                own_positions = [np.array([t]) for t in positions]
                needed = "'elsewhere' needs a write at another position"
                places = _other_draws(lab, rngs["elsewhere"], written, own_positions, needed)
                made[name] = site.writes.rows(torch.tensor(places))
            case "state":
                made[name] = state_direction(site.state_before(positions))
            case "state_after":
                made[name] = state_direction(site.state_after(positions))
            case "mean":
                made[name] = mean.expand(len(positions))
            case _:
                assert baselines is not None, f"{name} needs what it is fitted on"
                made[name] = baselines.written(name, site.at(positions), tokens)
    return made


def _other_draws(
    lab: Bench, rng: np.random.Generator, among: NDArray[np.int64], taken: Sequence[NDArray[np.int64]], needed: str
) -> NDArray[np.int64]:
    """For each entry of `taken`, a uniform draw of `among` that is not in the entry."""
    rest = [np.setdiff1d(among, row) for row in taken]
    lab.require(all(len(choices) for choices in rest), f"the control {needed}, and there is none; leave it out")
    return np.array([rng.choice(choices) for choices in rest])
