"""What each condition of a substitution writes at a firing, and what its controls are made of.

Protocol: WriteSAE (arXiv 2605.12770), section 4 and appendix. `shuffled` is the paper's "random"; the other controls
are this project's. A write, an atom or a control is a `LowRank`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from hookpoints import WriteEdit
from sae_lens_writesae.atom.low_rank import LowRank
from writesae.experiment.head import WriteKind, state_direction
from writesae.experiment.head_baselines import BASELINES, Baseline, HeadBaselines, tokens_and_before
from writesae.experiment.lab import Lab, Site

Scale = Literal["coefficient", "matched", "least_squares", "common"]
SCALES: tuple[Scale, ...] = get_args(Scale)
"""How the atom is scaled. The paper names the first two, and contradicts itself about which; the others are ours."""

Direction = Literal["random", "shuffled", "elsewhere", "state", "mean"]
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
"""Directions other than the atom's, written at the norm of the atom condition. The order fixes their random streams."""

Rival = Literal[Direction, Baseline]
CONTROLS: tuple[Rival, ...] = get_args(Rival)
"""All that an atom has to beat: the directions, and what has a size of its own and needs no training."""

Reference = Literal["state_after"]
REFERENCES: tuple[Reference, ...] = get_args(Reference)
"""Upper references: they contain the native write, so that they are shown and never held against an atom."""

Control = Literal[Rival, Reference]


class Condition(NamedTuple):
    """One condition at one scale, for N firings at once."""

    name: str
    scale: str
    """One of `SCALES`, or "none" for native and delete."""
    written: LowRank | None
    """What is written at each firing; None: nothing."""


def atom_coefficient(scale: str, atom: LowRank, native: LowRank, activation: Tensor, common: float = 1.0) -> Tensor:
    """The c [N] of the atom condition c A: the activation, |W|/|A|, <A,W>/|A|^2, or `common` times the activation.

    At "matched", c A is closer to W than 0 only if their cosine exceeds 1/2; at "least_squares" it always is.
    """
    if scale == "coefficient":
        return activation.to(atom.values.dtype)
    if scale == "matched":
        return native.norm() / atom.norm()
    if scale == "least_squares":
        return atom.inner(native) / atom.inner(atom)
    if scale == "common":
        return common * activation.to(atom.values.dtype)
    raise ValueError(f"scale must be one of {', '.join(SCALES)}, not {scale!r}")


def baseline_factor(scale: str, baseline: LowRank, native: LowRank, common: float = 1.0) -> Tensor | float:
    """What a baseline of its own size is multiplied by, at each scale: 1, |W|/|B|, <B,W>/|B|^2, or `common`. A baseline
    that is zero at a firing stays zero."""
    if scale == "coefficient":
        return 1.0
    if scale == "common":
        return common
    square = baseline.inner(baseline)
    wanted = native.norm() * square.clamp_min(0).sqrt() if scale == "matched" else baseline.inner(native)
    return torch.where(square > 0, wanted / square.clamp_min(torch.finfo(square.dtype).tiny), 0)


def written_at(scale: str, controls: Sequence[str]) -> tuple[str, ...]:
    """Those of `controls` that are written at a scale. A direction has no size of its own that a common factor could
    mend, so that only baselines stand beside the atom at "common"."""
    return tuple(name for name in controls if scale != "common" or name in BASELINES)


def conditions(
    native: LowRank,
    atom: LowRank,
    activation: Tensor,
    controls: Mapping[str, LowRank],
    scales: Sequence[str],
    common: Mapping[str, float] | None = None,
) -> list[Condition]:
    """All conditions of N firings: native, delete, then per scale the atom and every control (`written_at`).

    Args:
        controls: by name: directions of any norm but 0, and baselines at their own size. A direction's sign is its own:
            it is scaled by a positive number even where the least-squares coefficient of the atom is negative.
        common: factor of the atom and of each baseline at the scale "common" (`common_factors`).
    """
    unknown = sorted(set(controls) - {*CONTROLS, *REFERENCES})
    if unknown:
        raise ValueError(f"unknown controls {unknown}; there are {', '.join((*CONTROLS, *REFERENCES))}")
    factors = {} if common is None else common
    all_conditions = [Condition("native", "none", native), Condition("delete", "none", None)]
    for scale in scales:
        written = atom * atom_coefficient(scale, atom, native, activation, factors.get("atom", 1.0))
        size = written.norm()
        all_conditions.append(Condition("atom", scale, written))
        for name in written_at(scale, tuple(controls)):
            control = controls[name]
            if name in BASELINES:
                control = control * baseline_factor(scale, control, native, factors.get(name, 1.0))
            else:
                control = control.with_norm(size)
            all_conditions.append(Condition(name, scale, control))
    return all_conditions


def common_factors(products: pd.DataFrame, fold: Mapping[int, int]) -> dict[int, dict[str, float]]:
    """One factor for each condition by half of the sequences, fitted by least squares on the other half:
    c = sum <W,A> / sum <A,A>, where A is what the condition writes at the scale "coefficient".

    Args:
        products: columns sequence, condition, inner (sum of <W,A> over the firings of the sequence) and square (of
            <A,A>).
        fold: half (0 or 1) of each sequence.
    """
    factors: dict[int, dict[str, float]] = {0: {}, 1: {}}
    of_half = products["sequence"].map(dict(fold))
    for half in factors:
        for name, rows in products[of_half == 1 - half].groupby("condition"):
            square = float(rows["square"].sum())
            factors[half][str(name)] = float(rows["inner"].sum()) / square if square > 0 else 0.0
    return factors


def control_directions(
    lab: Lab,
    site: Site,
    firings: pd.DataFrame,
    atom: LowRank,
    names: Sequence[str],
    *,
    alive: NDArray[np.int64],
    mean: LowRank,
    native: LowRank | None = None,
    baselines: HeadBaselines | None = None,
) -> dict[str, LowRank]:
    """The controls `names` at the firings of one sequence: directions, and baselines at their own size.

    Args:
        firings: columns position and written_atom.
        atom: what is written there; its rank is that of the random directions.
        alive: atoms that `shuffled` draws from.
        mean: the head's mean write.
        native: what the head writes there, and
        baselines: fitted on other text; for those of `names` that are baselines.

    Each control of each sequence draws from a random stream of its own, so that batching, order and the presence of
    other controls change nothing.

    Raises:
        NothingToMeasureError: there is no other atom, or no other write, to draw.
    """
    position = firings["position"].to_numpy()

    def rng(control: str) -> np.random.Generator:
        return lab.rng(site.sequence, DIRECTIONS.index(control))

    def random() -> LowRank:
        return atom.random_like(torch.Generator().manual_seed(int(rng("random").integers(2**62))))

    def shuffled() -> LowRank:
        active = lab.firings().of_sequences(np.array([site.sequence]))
        taken = [
            np.append(active.atom[active.position == t], written)
            for t, written in zip(position, firings["written_atom"])
        ]
        needed = "'shuffled' needs an alive atom that does not fire there"
        return lab.atoms(_others(lab, rng("shuffled"), alive, taken, needed)).to(atom.values)

    def elsewhere() -> LowRank:
        written = np.flatnonzero(site.writes.norm().cpu().numpy())
        taken = list(position[:, None])
        needed = "'elsewhere' needs a write at another position"
        return site.writes.rows(torch.tensor(_others(lab, rng("elsewhere"), written, taken, needed)))

    makers: dict[str, Callable[[], LowRank]] = {
        "random": random,
        "shuffled": shuffled,
        "elsewhere": elsewhere,
        "state": lambda: state_direction(site.state_before(position.tolist())),
        "mean": lambda: mean.expand(len(firings)),
        "state_after": lambda: state_direction(site.state_after(position.tolist())),
    }
    before, made = tokens_and_before(lab.tokens[site.sequence])[position], {}
    for name in names:
        if name in BASELINES:
            assert native is not None and baselines is not None, f"{name} needs what it is fitted on"
            made[name] = baselines.written(name, native, before)
        else:
            made[name] = makers[name]()
    return made


def edits_of(
    lab: Lab, condition: Condition, native: LowRank, positions: Sequence[int], write: WriteKind
) -> list[WriteEdit]:
    """The edit of every firing under one condition.

    An additive write is replaced (or deleted), and its erase stays. A corrected write k u~^T contains its erase, so the
    edit adds the difference (condition - native) to the state instead.
    """
    written = condition.written
    if write == "additive":
        return [lab.replace(t, written, n) for n, t in enumerate(positions)]
    gone = native * -1.0
    difference = gone if written is None else LowRank.cat([written, gone])
    return [lab.add(t, difference, n) for n, t in enumerate(positions)]


def _others(
    lab: Lab, rng: np.random.Generator, among: NDArray[np.int64], taken: Sequence[NDArray[np.int64]], needed: str
) -> NDArray[np.int64]:
    """For each entry of `taken`, a uniform draw of `among` that is not in the entry."""
    rest = [np.setdiff1d(among, row) for row in taken]
    lab.require(all(len(choices) for choices in rest), f"the control {needed}, and there is none; leave it out")
    return np.array([rng.choice(choices) for choices in rest])
