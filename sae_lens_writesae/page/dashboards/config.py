"""What is shown of each atom, and from how many firings."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class DashboardConfig:
    """Sizes of the dashboards; every field goes into the data.

    Raises:
        ValueError: a field is out of range; the message names it and what was found.
    """

    atoms: tuple[int, ...] | None = None
    """A hand-picked list instead of a draw."""
    n_atoms: int | None = 100
    """Atoms drawn uniformly from those with `min_firings` (and, where a substitution test is given, from those that it
    looked at). None: all of them."""
    min_firings: int = 4
    """An atom with fewer firings on the tokens has no dashboard."""
    top: int = 12
    """Contexts with the largest activations. A firing that another context already shows is passed over."""
    bands: int = 4
    """Equal shares of the firings, by activation, from which further contexts are drawn."""
    per_band: int = 3
    """Contexts drawn from each band."""
    before: int = 24
    """Tokens shown before a firing."""
    after: int = 10
    """Tokens shown after it."""
    n_tokens: int = 10
    """Tokens listed at each end of the key side and of the value side."""
    min_token_count: int = 3
    """Tokens that occur less often in the evaluation text are left out of the key side."""
    position_bins: int = 16
    """Bins of the firing rate over positions."""
    half_life_firings: int = 10
    """Firings of an atom from which its key side is followed."""
    half_life_limit: int = 128
    """Longest half-life that is looked for, in tokens."""
    effect_firings: int = 3
    """Firings of an atom, in as many sequences, at which its effect on the logits and on later heads is measured.
    0: not measured."""
    effect_horizon: int = 16
    """Effects are averaged over t..t+effect_horizon, both included, and so is the KL of the substitution test."""
    effect_step: float = 0.05
    """The derivative is a central difference of this step, in norms of the native write; its error falls with the
    square of the step."""
    substitution_firings: int = 4
    """Firings of an atom at which it takes the place of the model's own write, where no substitution test is given.
    0: none."""
    seed: int = 0
    """Of all draws."""
    label: str = ""
    """Name of the dictionary on the pages."""

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, found {value}")
        if not 0 < self.effect_step <= 1:
            raise ValueError(f"effect_step is a share of the write's norm in (0, 1], found {self.effect_step}")
        if self.atoms is not None:
            object.__setattr__(self, "atoms", tuple(int(i) for i in self.atoms))
            if not self.atoms or len(set(self.atoms)) != len(self.atoms):
                raise ValueError(f"atoms are named once each, at least one of them, found {list(self.atoms)}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


_LEAST = {
    "n_atoms": 1,
    "min_firings": 1,
    "top": 1,
    "bands": 1,
    "per_band": 0,
    "before": 0,
    "after": 0,
    "n_tokens": 1,
    "min_token_count": 1,
    "position_bins": 1,
    "half_life_firings": 1,
    "half_life_limit": 1,
    "effect_firings": 0,
    "effect_horizon": 1,
    "substitution_firings": 0,
}
