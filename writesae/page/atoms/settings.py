"""What is shown of atoms, and from how many firings."""

from __future__ import annotations

from dataclasses import dataclass

from writesae.choices import at_least

_AT_LEAST = {
    **dict.fromkeys(("min_firings", "top", "bands", "n_tokens", "half_life_firings", "half_life_limit"), 1),
    **dict.fromkeys(("effect_horizon", "n_atoms", "per_band", "before", "after", "effect_firings"), 0),
}


@dataclass(frozen=True, kw_only=True)
class AtomSettings:
    """What is shown of each atom, and from how many firings; every setting goes into the data.

    Raises:
        ValueError: a setting is out of range; the message names it and what was found.
    """

    atoms: tuple[int, ...] | None = None
    """A hand-picked list instead of a draw."""
    n_atoms: int | None = 100
    """Atoms drawn uniformly from those with `min_firings`. None or 0: all of them."""
    min_firings: int = 4
    """An atom with fewer firings on the tokens has no page."""
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
    half_life_firings: int = 10
    """Firings of an atom after which its write, and what the head reads of it, is followed."""
    half_life_limit: int = 128
    """Longest half-life that is looked for, in tokens."""
    effect_firings: int = 3
    """Firings of an atom at which its effect on the logits is measured. 0: not measured."""
    effect_horizon: int = 16
    """Effects are averaged over t..t+effect_horizon, both included."""
    quality: bool = True
    """Measure the dictionary as a whole; it can take longer than all atoms together."""
    seed: int = 0
    """Seed of all draws."""
    label: str = ""
    """Name of the dictionary on the pages; by default the head and the target."""

    def __post_init__(self) -> None:
        at_least(self, _AT_LEAST)
