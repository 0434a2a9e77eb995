"""What several parts raise alike."""

from collections.abc import Mapping


class NothingToMeasureError(ValueError):
    """What was asked is in order, but this dictionary gives this text nothing to measure it by: no atom is alive, too
    few firings, every write is zero. A single evaluation raises it; a run over many reports it and continues."""


class DiskTooSmallError(ValueError):
    """What was asked for needs more room than the disk has. Nothing was computed."""


def check_fields(config: object, rules: Mapping[str, tuple[bool, object]]) -> None:
    """Raise ValueError for the first field whose rule does not hold: whether it does, and what is expected."""
    for name, (holds, expected) in rules.items():
        if not holds:
            raise ValueError(f"{name}: expected {expected}, got {getattr(config, name)!r}")
