"""The settings of a substitution test, each with its meaning and its default."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from sae_lens_writesae.conditions import CONTROLS, REFERENCES, SCALES, Scale

AtomChoice = Literal["dominant", "own"]


@dataclass(frozen=True)
class SubstitutionConfig:
    """What is sampled, what is written, what is measured.

    Validates itself; every field goes into the result.
    """

    n_atoms: int | None = 100
    """Atoms drawn uniformly from all alive atoms that can be tested. None: all of them."""
    firings_per_atom: int = 10
    """At most this many firings of an atom, dealt over sequences (`firings.sample_firings`)."""
    atoms: tuple[int, ...] | None = None
    """A hand-picked list instead of a draw. Tested are positions at which one of these fires; with atom_choice="own",
    conclusions hold for these atoms only."""
    atom_choice: AtomChoice = "dominant"
    """Atom that is written: the one with the largest activation at that position (the paper, section 3.2; firings that
    share a position are one test), or the firing's own."""
    positions: Literal["firing", "silent"] = "firing"
    """Where: at the firings, or (a null) at random positions of the same sequences where the atom is silent,
    with the activation of the firing. The null needs atom_choice="own"."""
    write: Literal["additive", "corrected"] = "additive"
    """The native write: k_t u_t^T, keeping the erase (the paper's), or k_t u~_t^T, which takes the erase along."""
    scales: tuple[Scale, ...] = SCALES
    """How the atom is scaled; every control follows the norm of the atom at the same scale."""
    controls: tuple[str, ...] = (*CONTROLS, *REFERENCES)
    """Controls to run, of `conditions.CONTROLS`, and references, of `conditions.REFERENCES`."""
    horizon: int = 16
    """KL is averaged over t..t+horizon, both included (17 positions).

    Firings closer to the end are left out.
    """
    first_position: int = 1
    """Firings before this token are left out: at token 0 the state holds nothing but the write itself."""
    last_position_firings: int | None = 100
    """Firings, drawn from those tested, that are run on to the last token of the sequence and measured there too. The
    others are run for horizon + 1 tokens, which is many times cheaper. None: all firings; 0: none."""
    alive_tokens: int = 65_536
    """An atom is alive if it fires on the first so many evaluation tokens (all, where there are fewer)."""
    min_firings: int = 1
    """Firings on those tokens that make an atom alive."""
    mean_write_sequences: int = 16
    """Sequences from which the head's mean write and half-life are estimated."""
    mean_write_energy: float = 0.99
    """The mean write is kept as the fewest rank-1 terms that hold this share of its squared norm."""
    rows_per_run: int = 256
    """Edited rows per batch of forward passes. Lower it when memory runs out; it does not change results."""
    logit_megabytes: int = 512
    """Float32 logits of edited rows held at once; bounds the rows per batch where the vocabulary is large."""
    seed: int = 0
    """Of the draw of atoms, firings, controls."""
    label: str = ""
    """Name in reports, e.g. "write-trained"."""

    def __post_init__(self) -> None:
        for name, values in _CHOICES.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name} must be one of {', '.join(values)}, found {getattr(self, name)!r}")
        if self.positions == "silent" and self.atom_choice != "own":
            raise ValueError('positions="silent" writes the atom that is silent there: set atom_choice="own"')
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, found {value}")
        for name, known in (("scales", SCALES), ("controls", (*CONTROLS, *REFERENCES))):
            given = tuple(getattr(self, name))  # lists, as JSON gives them, are welcome
            object.__setattr__(self, name, given)
            if unknown := [x for x in given if x not in known]:
                raise ValueError(f"{name} must be among {', '.join(known)}, found {', '.join(map(str, unknown))}")
            if len(set(given)) != len(given):
                raise ValueError(f"{name} are named once each, found {', '.join(given)}")
        if not self.scales:
            raise ValueError(f"scales must name at least one of {', '.join(SCALES)}, found none")
        if not 0 < self.mean_write_energy <= 1:
            raise ValueError(f"mean_write_energy is a share in (0, 1], found {self.mean_write_energy}")
        if self.atoms is not None:
            object.__setattr__(self, "atoms", tuple(int(i) for i in self.atoms))
            if not self.atoms:
                raise ValueError("atoms is an empty list; leave it None to draw atoms")
            if len(set(self.atoms)) != len(self.atoms):
                raise ValueError(f"atoms are named once each, found {list(self.atoms)}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `SubstitutionConfig(**d)` gives it back."""
        return asdict(self)


_CHOICES = {
    "atom_choice": ("dominant", "own"),
    "positions": ("firing", "silent"),
    "write": ("additive", "corrected"),
}
_LEAST = {
    "n_atoms": 1,
    "firings_per_atom": 1,
    "horizon": 1,
    "first_position": 0,
    "last_position_firings": 0,
    "alive_tokens": 1,
    "min_firings": 1,
    "mean_write_sequences": 1,
    "rows_per_run": 1,
    "logit_megabytes": 1,
}
