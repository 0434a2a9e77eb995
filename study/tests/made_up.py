"""Substitution results made up from chosen medians, for tests of claims and of the report."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

from writesae_study.evaluations.substitution import Substitution
from writesae_study.experiment.evaluation import Evaluation, Result
from writesae_study.verdict.fits import with_control

# Median KL (nats) by condition; a condition that is not named has 2.
HOLDS = {"delete": 1.0, "atom": 0.3, "state": 0.9}
FAILS = {"delete": 1.0, "atom": 1.4}
CONFOUNDED = {"delete": 1.0, "atom": 0.4, "state": 0.1}
NO_EFFECT = {"delete": 1e-13, "atom": 1e-13, "random": 1e-13, "shuffled": 1e-13}


def made_up(
    medians: dict[str, float],
    *,
    label: str = "",
    target: str = "write",
    rule: str = "Gated DeltaNet",
    floor: float = 0.0,
    n_sequences: int = 30,
    per_sequence: int = 8,
    head: int = 2,
    seed: int = 0,
    **settings: Any,
) -> Result:
    """Log-normal KLs with an effect of the firing and of its sequence, shared by all conditions. One choice of atom,
    the dominant one, unless `settings` say otherwise."""
    rng = np.random.default_rng(seed)
    settings = {"atom_choice": ("dominant",), "label": label} | settings
    evaluation = Substitution(**settings)
    n = n_sequences * per_sequence
    sequence = np.repeat(np.arange(n_sequences), per_sequence)
    shared = rng.normal(0, 0.5, n_sequences)[sequence] + rng.normal(0, 0.7, n)
    firings = pd.DataFrame(
        {
            "firing": np.arange(n),
            "sequence": sequence,
            "position": rng.integers(1, 100, n),
            "atom": rng.integers(0, 20, n),
            "activation": rng.gamma(2, 0.5, n),
            "cosine": np.clip(rng.normal(0.45, 0.2, n), -1, 1),
        }
    ).assign(written_atom=lambda t: t["atom"])
    frames = []
    for choice in evaluation.atom_choice:
        scaled = [(name, scale) for scale in evaluation.scales_of(choice) for name in ("atom", *evaluation.controls)]
        for name, scale in [("native", "none"), ("delete", "none"), *scaled]:
            kl = medians.get(name, 2.0) * np.exp(shared + rng.normal(0, 0.4, n))
            kl = floor * rng.random(n) if name == "native" else kl
            frames.append(firings.assign(choice=choice, condition=name, scale=scale, kl_window=kl))
    info = {
        "label": label or f"L1H{head} {target}-trained",
        "model": "made-up",
        "dtype": "float32",
        "rule": rule,
        "layer": 1,
        "head": head,
        "target": target,
        "architecture": "writesae_topk",
        "d_sae": 512,
        "n_sequences": n_sequences,
        "n_positions": 256,
        "unequal": "",
        "n_skipped": {},
        "n_edited_runs": len(frames) * n,
        "seconds": 12.5,
    }
    return Result(evaluation, info, {"firings": pd.concat(frames, ignore_index=True)})


def logit_cells(*, curve: float = 0.0, first: float = 0.0, noise: float = 1.0) -> pd.DataFrame:
    """Cells whose change is `s eps + curve s eps^2` with F2 = s eps; F0 and F1 are first s eps + noise eps."""
    rng, names = np.random.default_rng(0), ["firing", "horizon", "rank", "eps"]
    cells = pd.MultiIndex.from_product([range(40), [0, 4], ["1", "50"], [0.1, 1.0]], names=names).to_frame(index=False)
    slope, wrong = (rng.normal(size=len(cells) // 2).repeat(2) * cells["eps"] for _ in range(2))
    wrong = first * slope + noise * wrong
    cells = cells.assign(sequence=cells["firing"] // 4, position=3, F0=wrong, F1=wrong, F2=slope)
    return with_control(cells.assign(measured=slope * (1 + curve * cells["eps"])), "F2", 0)


def replaced(result: Result, info: dict[str, Any] | None = None, /, **tables: pd.DataFrame) -> Result:
    """The result with some other facts and tables."""
    return Result(result.evaluation, result.info | (info or {}), result.tables | tables)


def runner(evaluation: type[Evaluation], **small: Any) -> Callable[..., Result]:
    """Runs an evaluation with small settings, `run(model, sae, tokens, **changes)`."""
    return lambda model, sae, tokens, **changes: evaluation(**small | changes).run(model, sae, tokens, progress=False)
