"""The settings of the baselines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sae_lens_writesae.substitution_config import SubstitutionConfig


@dataclass(frozen=True)
class BaselinesConfig:
    """What is tested where. Means and principal components are of one half of the sequences, tests on the other."""

    test_sequences: int = 40
    """Sequences of the test half on which writes are exchanged and reconstruction is measured (all, if fewer)."""
    positions_per_sequence: int = 2
    """Positions of each, drawn uniformly; every dictionary and every control writes at the same ones."""
    scale: Literal["coefficient", "matched"] = "coefficient"
    """Size of what is written. `coefficient`: as the dictionary or the projection gives it; a direction that has none
    (random, mean, state, state_after) is given the projection of the native write on it, its best. `matched`: the norm
    of the native write for all, at which what has a cosine below 1/2 with the write is further from it than nothing."""
    pca_ranks: tuple[int, ...] = (1, 4, 32)
    """Numbers of principal components of the head's writes."""
    pca_writes: int = 1024
    """Writes that the components are of, drawn from the other half."""
    state_ranks: tuple[int, ...] = (1, 2, 4)
    """Ranks at which whole states are cut."""
    replacement_sequences: int = 16
    """Sequences of the test half on which whole matrices are replaced."""
    horizon: int = 16
    """KL is averaged over t..t+horizon."""
    first_position: int = 1
    """Positions before this one are not drawn."""
    alive_tokens: int = 65_536
    """Dead atoms are those that never fire on the first so many tokens (all, where there are fewer)."""
    min_firings: int = 5
    """Firings of an atom without which its selectivity is not measured."""
    seed: int = 0
    """Of the split, the positions and the controls."""
    label: str = ""
    """Name in reports."""

    def __post_init__(self) -> None:
        for name in ("pca_ranks", "state_ranks"):
            ranks = tuple(int(r) for r in getattr(self, name))
            object.__setattr__(self, name, ranks)
            if list(ranks) != sorted(set(ranks)) or not ranks or ranks[0] < 1:
                raise ValueError(f"{name} rise from 1 or more, found {list(ranks)}")
        if self.scale not in ("coefficient", "matched"):
            raise ValueError(f"scale must be coefficient or matched, found {self.scale!r}")
        least = {"test_sequences": 2, "replacement_sequences": 2, "pca_writes": 2}
        least |= dict.fromkeys(("positions_per_sequence", "alive_tokens", "min_firings"), 1)
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(f"{name} must be at least {bound}, found {getattr(self, name)}")
        self.substitution()  # checks the rest

    def substitution(self) -> SubstitutionConfig:
        """What the exchange of a write has in common with the substitution test."""
        return SubstitutionConfig(horizon=self.horizon, first_position=self.first_position, seed=self.seed)
