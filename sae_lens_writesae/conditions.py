"""What each condition of the substitution test writes at a firing. Pure functions of factors; no model, no
SAE.

A write, an atom or a control is a sum of R rank-1 matrices, kept as factors: no K x V matrix is built, since
<v k^T, x y^T> = (v.x)(k.y). Alphabet: N firings, R rank, K key side, V value side; key-first everywhere.
Protocol: WriteSAE (arXiv 2605.12770), section 4 and appendix; the controls are this project's.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from sae_lens_writesae.atom.low_rank import LowRank
from sae_lens_writesae.atom.low_rank import mean_write as mean_write
from sae_lens_writesae.atom.low_rank import state_direction as state_direction

# The old names of what is now `LowRank`, for the modules that are still to be ported.
Factors = LowRank
rank_one = LowRank.rank_one
inner = LowRank.inner
norm = LowRank.norm
scaled = LowRank.__mul__
with_norm = LowRank.with_norm
cosine = LowRank.cosine


def random_directions(like: LowRank, generator: torch.Generator) -> LowRank:
    return like.random_like(generator)


Scale = Literal["coefficient", "matched", "least_squares"]
SCALES: tuple[Scale, ...] = get_args(Scale)

#: Conditions that are one and the same at every scale.
UNSCALED: tuple[str, ...] = ("native", "delete")

#: Controls: directions other than the atom's, written at the norm of the atom condition.
CONTROLS: tuple[str, ...] = ("random", "shuffled", "elsewhere", "state", "mean")

#: Shown beside the controls, and never a control by which a verdict is confounded: where a head forgets, the state
#: after the write is the write itself.
REFERENCES: tuple[str, ...] = ("state_after",)

#: Names of conditions as a reader meets them in sentences, figures and tables.
NAMES: Mapping[str, str] = {
    "native": "native (no-op)",
    "delete": "delete",
    "atom": "atom",
    "random": "random direction",
    "shuffled": "shuffled atom",
    "elsewhere": "write from elsewhere",
    "state": "state direction before the write",
    "state_after": "state direction after the write (upper reference)",
    "mean": "mean write",
}

#: What every condition writes.
DEFINITIONS: Mapping[str, str] = {
    "native": "the native write again, through the edit path: a no-op that measures the floor",
    "delete": "nothing",
    "atom": "the atom, at the scale named",
    "random": "a Gaussian direction of the atom's rank, norm of the atom condition (this project's control)",
    "shuffled": 'another alive atom that does not fire there, norm of the atom condition (the paper\'s "random")',
    "elsewhere": "the native write of another position, norm of the atom condition",
    "state": "the top singular direction of S_t - W_t, the state before the write, norm of the atom condition",
    "state_after": "the top singular direction of the state after the write, which contains the write; no control",
    "mean": "the head's mean native write, norm of the atom condition",
}

#: How the atom condition is scaled.
SCALE_DEFINITIONS: Mapping[str, str] = {
    "coefficient": "the SAE's own activation (the paper's abstract)",
    "matched": "norm of the native write (the paper's appendix)",
    "least_squares": "projection of the native write on the atom, possibly negative (this project's)",
    "none": "no scale",
}


class Condition(NamedTuple):
    """One condition at one scale, for N firings at once."""

    name: str
    scale: str  # one of SCALES, or "none" for native and delete
    written: Factors | None  # None: nothing is written


def atom_coefficient(scale: Scale, atom: Factors, native: Factors, activation: Tensor) -> Tensor:
    """The c [N] of the atom condition c A: the activation, |W|/|A|, or <A,W>/|A|^2.

    At "matched" c A is closer to W than 0 only if their cosine exceeds 0.5; at "least_squares" always, by
    |A-part of W|^2.
    """
    if scale == "coefficient":
        return activation.to(atom.values.dtype)
    if scale == "matched":
        return norm(native) / norm(atom)
    if scale == "least_squares":
        return inner(atom, native) / inner(atom, atom)
    raise ValueError(f"scale must be one of {', '.join(SCALES)}, not {scale!r}")


def conditions(
    native: Factors,
    atom: Factors,
    activation: Tensor,
    controls: Mapping[str, Factors],
    scales: Sequence[Scale] = SCALES,
) -> list[Condition]:
    """All conditions of N firings: native, delete, then per scale the atom and every control at its norm.

    `controls` maps names of CONTROLS and REFERENCES to directions (any norm but 0). A control's sign is its own: it is
    scaled by a positive number even where the least-squares coefficient of the atom is negative.
    """
    known = (*CONTROLS, *REFERENCES)
    unknown = sorted(set(controls) - set(known))
    if unknown:
        raise ValueError(f"unknown controls {unknown}; there are {', '.join(known)}")
    made = [Condition("native", "none", native), Condition("delete", "none", None)]
    for scale in scales:
        written = scaled(atom, atom_coefficient(scale, atom, native, activation))
        size = norm(written)
        made.append(Condition("atom", scale, written))
        made += [Condition(name, scale, with_norm(direction, size)) for name, direction in controls.items()]
    return made
