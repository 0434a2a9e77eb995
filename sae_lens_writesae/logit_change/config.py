"""The settings of the logit-change evaluation, each with its meaning and its default."""

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

Unit = Literal["write", "coefficient"]
RankGroup = tuple[int, int]


@dataclass(frozen=True)
class LogitChangeConfig:
    """What is sampled, what is added, where it is measured.

    Validates itself; every field goes into the result.
    """

    n_atoms: int | None = 30
    """Atoms drawn uniformly from all alive atoms that can be tested. None: all of them."""
    firings_per_atom: int = 2
    """At most this many firings of an atom, dealt over sequences (`firings.sample_firings`)."""
    atoms: tuple[int, ...] | None = None
    """A hand-picked list instead of a draw. Conclusions then hold for these atoms only."""
    horizons: tuple[int, ...] = (0, 1, 4, 16)
    """Tokens after the write at which logits are predicted and measured."""
    ranks: tuple[RankGroup, ...] = ((1, 1), (2, 5), (50, 50))
    """Groups (lowest, highest) of the native rank of a predicted token; one token is drawn from each group."""
    eps: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0)
    """Sizes of what is added, in `unit`s."""
    unit: Unit = "write"
    """What eps counts: the Frobenius norm of the native write at t, or the atom's own coefficient there (activation
    times the atom's norm)."""
    first_position: int = 1
    """Firings before this token are left out: at token 0 the state holds nothing but the write itself."""
    alive_tokens: int = 65_536
    """An atom is alive if it fires on the first so many evaluation tokens (all, where there are fewer)."""
    min_firings: int = 1
    """Firings on those tokens that make an atom alive."""
    rows_per_run: int = 256
    """Edited rows per batch of forward passes. Lower it when memory runs out; it does not change results."""
    logit_megabytes: int = 512
    """Float32 logits of edited rows held at once; bounds the rows per batch where the vocabulary is large."""
    seed: int = 0
    """Of the draw of atoms, firings and tokens."""
    label: str = ""
    """Name in reports, e.g. "write-trained"."""

    def __post_init__(self) -> None:
        if self.unit not in get_args(Unit):
            raise ValueError(f"unit must be one of {', '.join(get_args(Unit))}, found {self.unit!r}")
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, found {value}")
        for name in ("horizons", "eps", "atoms", "ranks"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _plain_tuple(name, getattr(self, name)))
        if min(self.horizons) < 0:
            raise ValueError(f"horizons count tokens after the write, from 0 on; found {list(self.horizons)}")
        if len(self.eps) < 2 or min(self.eps) <= 0:
            raise ValueError(
                f"eps needs two or more sizes above 0 (R2 over eps is part of the result), found {list(self.eps)}"
            )
        if any(not 1 <= low <= high for low, high in self.ranks):
            raise ValueError(f"ranks are pairs 1 <= lowest <= highest, found {list(self.ranks)}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `LogitChangeConfig(**d)` gives it back."""
        return asdict(self)


def rank_name(group: RankGroup) -> str:
    """A rank group as tables and figures call it: "1", "2-5"."""
    low, high = group
    return str(low) if low == high else f"{low}-{high}"


def _plain_tuple(name: str, values: Any) -> tuple[Any, ...]:
    """Lists, as JSON gives them, are welcome; each value once, at least one."""
    kind = {"eps": float, "ranks": _group}.get(name, int)
    given = tuple(kind(value) for value in values)
    if not given:
        raise ValueError(f"{name} is empty; leave it out for the default")
    if len(set(given)) != len(given):
        raise ValueError(f"{name} are named once each, found {list(given)}")
    return tuple(sorted(given))


def _group(value: Any) -> RankGroup:
    low, high = (value, value) if isinstance(value, int) else value
    return int(low), int(high)


_LEAST = {
    "n_atoms": 1,
    "firings_per_atom": 1,
    "first_position": 0,
    "alive_tokens": 1,
    "min_firings": 1,
    "rows_per_run": 2,
    "logit_megabytes": 1,
}
