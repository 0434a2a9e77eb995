"""Words that flags take, and the names of dictionaries."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast, get_args

Target = Literal["write", "state", "last_state"]
"""The words of `sae_lens_writesae.choices`, here and below: importing them would load torch, and help must be fast. A
test compares them."""
Loss = Literal["mse", "reads", "write"]
MetricName = Literal["frobenius", "gauss_newton"]
VARIANTS = ("WriteSAE", "TiedSAE", "MatrixSAE", "BilinearFlatSAE", "FlatSAE", "WriteSAE-rank2", "WriteSAE-rank4")
Dtype = Literal["float32", "bfloat16", "float16"]
"""A language model's dtype."""


def at_least(settings: object, bounds: Mapping[str, float]) -> None:
    """ValueError for a setting below its bound, or an entry of it; None is in order."""
    for name, bound in bounds.items():
        value = getattr(settings, name)
        for entry in value if isinstance(value, tuple) else (value,):
            if entry is not None and (isinstance(entry, str) or not entry >= bound):
                raise ValueError(f"{name}: expected at least {bound:g}, got {entry!r}")


def expect(settings: object, rules: Mapping[str, tuple[bool, str]]) -> None:
    """ValueError for the first setting whose rule does not hold; a rule is whether it does, and what is expected."""
    for name, (holds, expected) in rules.items():
        if not holds:
            raise ValueError(f"{name}: expected {expected}, got {getattr(settings, name)}")


def once_each(settings: object, some: Sequence[str], needed: Sequence[str] = ()) -> None:
    """ValueError for a setting that names a value twice, or for one of `needed` that names none."""
    for name in (*some, *needed):
        values = getattr(settings, name)
        once = len(set(map(str, values))) == len(values) and bool(values or name not in needed)
        expect(settings, {name: (once, f"{'one or more ' * (name in needed)}values, each once")})


MATCHED = "FlatSAE-matched"
"""A flat SAE with as many parameters as the WriteSAE has."""


@dataclass(frozen=True)
class DictionaryName:
    """What a dictionary is, as its folder says it: `write-seed0`, `state-reads-seed0`, `write-FlatSAE-seed2`,
    `write-gauss_newton-seed0`."""

    target: Target
    loss: Loss = "mse"
    variant: str = "WriteSAE"
    """Of `sae_lens_writesae.VARIANTS`, or `MATCHED`."""
    seed: int = 0
    metric: MetricName = "frobenius"
    """What errors are measured by."""

    def __str__(self) -> str:
        usual = ("mse", "WriteSAE", "frobenius")  # not said, so that names are short
        unusual = [word for word in (self.loss, self.variant, self.metric) if word not in usual]
        return "-".join([self.target, *unusual, f"seed{self.seed}"])

    @classmethod
    def parse(cls, name: str) -> DictionaryName:
        """From its folder's name; ValueError, with what there is, where it is none."""
        targets = get_args(Target)
        losses = get_args(Loss)
        variants = (*VARIANTS, MATCHED)
        optional = "".join(f"(?:-({'|'.join(words)}))?" for words in (losses, variants, get_args(MetricName)))
        match = re.fullmatch(f"({'|'.join(targets)}){optional}-seed([0-9]+)", name)
        if match is None:
            raise ValueError(
                f"{name!r} names no dictionary; names are TARGET[-LOSS][-VARIANT][-gauss_newton]-seedN, with targets "
                f"{', '.join(targets)}, losses {', '.join(losses)} and variants {', '.join(variants)}"
            )
        target, loss, variant, metric, seed = match.groups()
        return cls(
            target=cast(Target, target),
            loss=cast(Loss, loss or "mse"),
            variant=variant or "WriteSAE",
            seed=int(seed),
            metric=cast(MetricName, metric or "frobenius"),
        )

    @property
    def company(self) -> str:
        """One word for those that may train in one step: seeds of a variant with factors on both sides, on writes."""
        stacks = self.on_factors and self.variant in ("WriteSAE", "TiedSAE", "WriteSAE-rank2", "WriteSAE-rank4")
        return str(replace(self, seed=0)) if stacks else str(self)

    @property
    def on_factors(self) -> bool:
        """Whether it trains on factors of writes, without a matrix and in minutes, so that it needs no checkpoints."""
        return self.target == "write" and self.loss == "mse"
