"""What each condition of the substitution test writes at a firing. Pure functions of factors; no model, no
SAE.

A write, an atom or a control is a sum of R rank-1 matrices, kept as factors: no K x V matrix is built, since
<v k^T, x y^T> = (v.x)(k.y). Alphabet: N firings, R rank, K key side, V value side; key-first everywhere.
Protocol: WriteSAE (arXiv 2605.12770), section 4 and appendix; the controls are this project's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

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


@dataclass(frozen=True, eq=False)
class Factors:
    """N matrices, each a sum over r of keys[n,r] values[n,r]^T."""

    keys: Tensor
    """[N,R,K]"""
    values: Tensor
    """[N,R,V]"""

    def __post_init__(self) -> None:
        if self.keys.ndim != 3 or self.values.ndim != 3 or self.keys.shape[:2] != self.values.shape[:2]:
            found = f"{list(self.keys.shape)} and {list(self.values.shape)}"
            raise ValueError(f"factors are keys [N,R,K] and values [N,R,V], found {found}")

    def __len__(self) -> int:
        return len(self.keys)

    def rows(self, index: slice | Tensor | list[int]) -> "Factors":
        """Some of the N matrices, by slice, mask or indices."""
        return Factors(self.keys[index], self.values[index])

    def expand(self, n: int) -> "Factors":
        """A single matrix (N = 1) as n equal ones, without copying."""
        return Factors(self.keys.expand(n, -1, -1), self.values.expand(n, -1, -1))

    def dense(self) -> Tensor:
        """The matrices [N,K,V], for tests and figures."""
        return self.keys.mT @ self.values


class Condition(NamedTuple):
    """One condition at one scale, for N firings at once."""

    name: str
    scale: str  # one of SCALES, or "none" for native and delete
    written: Factors | None  # None: nothing is written


def rank_one(keys: Tensor, values: Tensor) -> Factors:
    """Factors of N rank-1 matrices from keys [N,K] and values [N,V]."""
    return Factors(keys[:, None], values[:, None])


def inner(a: Factors, b: Factors) -> Tensor:
    """Frobenius inner products <a_n, b_n>: [N]. Cost N R R' (K + V)."""
    return ((a.keys @ b.keys.mT) * (a.values @ b.values.mT)).sum((1, 2))


def norm(a: Factors) -> Tensor:
    """Frobenius norms: [N]. Exact for any rank; the terms need not be orthogonal."""
    return inner(a, a).clamp_min(0).sqrt()


def scaled(a: Factors, by: Tensor) -> Factors:
    """`by` [N] times each matrix; the scale goes to the values."""
    return Factors(a.keys, a.values * by[:, None, None])


def with_norm(a: Factors, target: Tensor) -> Factors:
    """Each matrix rescaled by a positive number to Frobenius norm `target` [N].

    A zero matrix raises ValueError.
    """
    size = norm(a)
    if bool((size == 0).any()):
        raise ValueError(f"matrix {int((size == 0).nonzero()[0])} is zero and has no direction to rescale")
    return scaled(a, target / size)


def cosine(a: Factors, b: Factors) -> Tensor:
    """Signed cosine of matrices, <a,b> / |a||b|: [N].

    For rank 1 it is cos(keys) cos(values). 0 where a matrix is zero.
    """
    size = norm(a) * norm(b)
    return torch.where(size > 0, inner(a, b) / size.clamp_min(torch.finfo(size.dtype).tiny), 0)


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
        made += [Condition(name, scale, with_norm(made_of, size)) for name, made_of in controls.items()]
    return made


def state_direction(states: Tensor) -> Factors:
    """Top singular direction of states [N,K,V], unit norm: x y^T with <S, x y^T> > 0. Cost: an SVD per state."""
    left, _, right = torch.linalg.svd(states, full_matrices=False)
    return rank_one(left[:, :, 0], right[:, 0])


def mean_write(keys: Tensor, values: Tensor, energy: float = 1.0) -> Factors:
    """Mean over tokens of k_t u_t^T, keys [T,K] and values [T,V], as the fewest terms that hold `energy` of its squared
    norm (1: all). N is 1; the rank is at most min(K, V)."""
    if not 0 < energy <= 1:
        raise ValueError(f"energy is a share in (0, 1], found {energy}")
    left, sigma, right = torch.linalg.svd(keys.T @ values / len(keys), full_matrices=False)
    held = (sigma**2).cumsum(0) / (sigma**2).sum()
    rank = min(int((held < energy).sum()) + 1, len(sigma))
    return Factors((left[:, :rank] * sigma[:rank]).T[None], right[None, :rank])


def random_directions(like: Factors, generator: torch.Generator) -> Factors:
    """Gaussian factors of the shape of `like`, drawn on the CPU so that a seed means the same everywhere."""
    keys = torch.randn(like.keys.shape, generator=generator).to(like.keys)
    values = torch.randn(like.values.shape, generator=generator).to(like.values)
    return Factors(keys, values)
