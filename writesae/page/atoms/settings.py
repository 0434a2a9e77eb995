"""What is shown of atoms, and from how many firings."""

from __future__ import annotations

from dataclasses import dataclass

from sae_lens import SAE

from writesae.choices import at_least

_AT_LEAST = {
    **dict.fromkeys(("min_firings", "top", "bands", "n_tokens", "min_token_count", "position_bins"), 1),
    **dict.fromkeys(("half_life_firings", "half_life_limit", "effect_horizon"), 1),
    **dict.fromkeys(("n_atoms", "per_band", "before", "after", "effect_firings", "substitution_firings"), 0),
    **dict.fromkeys(("n_nearest", "n_timelines"), 0),
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
    """Atoms drawn uniformly from those with `min_firings` (and, where a substitution test is given, from those that it
    looked at). None or 0: all of them."""
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
    """Tokens listed at each end of the key side and of the value side, and heads among the readers."""
    n_nearest: int = 6
    """Other atoms listed by the cosine with this one."""
    n_timelines: int = 3
    """Firings, of those that are followed, whose text is shown with what the head reads of the atom at each token."""
    min_token_count: int = 3
    """Tokens that occur less often in the evaluation text are left out of the key side."""
    position_bins: int = 16
    """Bins of the firing rate over positions."""
    half_life_firings: int = 10
    """Firings of an atom after which its write, and what the head reads of it, is followed."""
    half_life_limit: int = 128
    """Longest half-life that is looked for, in tokens."""
    effect_firings: int = 3
    """Firings of an atom, in as many sequences, at which its effect on the logits and on heads of later layers is
    measured. 0: not measured."""
    effect_horizon: int = 16
    """Effects are averaged over t..t+effect_horizon, both included, and so is the KL of the substitution test."""
    effect_step: float = 0.05
    """The derivative is a central difference of this step, in norms of the native write; its error falls with the
    square of the step."""
    substitution_firings: int = 4
    """Firings of an atom at which it takes the place of the model's own write, where no substitution test is given.
    0: none."""
    quality: bool = True
    """Measure the dictionary as a whole; it can take longer than all atoms together."""
    seed: int = 0
    """Seed of all draws."""
    label: str = ""
    """Name of the dictionary on the pages; by default the head and the target."""

    def __post_init__(self) -> None:
        at_least(self, _AT_LEAST)
        if not 0 < self.effect_step <= 1:
            raise ValueError(f"effect_step is a share of the write's norm in (0, 1], found {self.effect_step}")
        if self.atoms is not None and (not self.atoms or len(set(self.atoms)) != len(self.atoms)):
            raise ValueError(f"atoms are named once each, at least one of them, found {list(self.atoms)}")

    def check(self, sae: SAE) -> None:
        """ValueError where `atoms` names one that the dictionary does not have."""
        if beyond := [atom for atom in self.atoms or () if not 0 <= atom < int(sae.cfg.d_sae)]:
            raise ValueError(f"atoms: expected 0 to {int(sae.cfg.d_sae) - 1}, got {beyond}")
