"""Substitution results made up from chosen medians, for tests of summaries and reports."""

from typing import Any

import numpy as np
import pandas as pd

from sae_lens_writesae.substitution_config import SubstitutionConfig
from sae_lens_writesae.substitution_result import METRICS, SubstitutionInfo, SubstitutionResult

#: Median KL (nats) by condition; what is not named gets 2.
HOLDS = {"delete": 1.0, "atom": 0.3, "state": 0.9}
FAILS = {"delete": 1.0, "atom": 1.4}
CONFOUNDED = {"delete": 1.0, "atom": 0.4, "state": 0.1}
NO_EFFECT = {"delete": 1e-13, "atom": 1e-13, "random": 1e-13}


def fake_result(
    medians: dict[str, float],
    *,
    label: str = "",
    target: str = "write",
    half_life: float = 20.0,
    floor: float = 0.0,
    last_position: bool = True,
    n_sequences: int = 30,
    per_sequence: int = 8,
    head: int = 2,
    seed: int = 0,
    **settings: Any,
) -> SubstitutionResult:
    """Log-normal KLs with an effect of the firing and of its sequence, shared by all conditions."""
    rng = np.random.default_rng(seed)
    config = SubstitutionConfig(label=label, last_position_firings=None if last_position else 0, **settings)
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
            "write_norm": rng.gamma(4, 0.3, n),
        }
    ).assign(written_atom=lambda t: t["atom"])
    named = [("native", "none"), ("delete", "none")]
    named += [(name, scale) for scale in config.scales for name in ("atom", *config.controls)]
    frames = []
    for name, scale in named:
        kl = medians.get(name, 2.0) * np.exp(shared + rng.normal(0, 0.4, n))
        kl = floor * rng.random(n) if name == "native" else kl
        size = 0.0 if name == "delete" else firings["write_norm"]
        measured = {m: kl * (1.1 if m.startswith("reverse") else 1) for m in METRICS}
        if not last_position:
            measured |= {"kl_last": np.nan, "reverse_kl_last": np.nan}
        frames.append(firings.assign(condition=name, scale=scale, norm=size, **measured))
    info = SubstitutionInfo(
        config=config,
        hook_name=f"blocks.1.mixer.heads.{head}.hook_{target}_vec",
        layer=1,
        head=head,
        target=target,
        rule="Gated DeltaNet",
        K=32,
        V=48,
        dtype="float32",
        model="made-up",
        architecture="writesae_topk",
        d_sae=512,
        n_alive=300,
        alive_tokens=30_000,
        n_testable=280,
        n_sequences=n_sequences,
        n_positions=256,
        half_life=half_life,
        half_life_limit=128,
        mean_write_rank=5,
        seconds=12.5,
    )
    return SubstitutionResult(pd.concat(frames, ignore_index=True), info)
