"""What the page says of the benchmarks whose files know nothing of it, with the goals."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from frame import Line, rest

Found = dict[str, Any]
LARGEST = 2**27
"""Parameters of SAELens' dictionary beside which a step on factors is measured: one of 2^28 takes 12 GB."""


def substitution() -> SimpleNamespace:
    """How many times faster edited runs are than full forwards."""

    def measure(
        n_tokens: int = 512, n_firings: int = 12, n_full: int = 6, n_positions: int = 64, rounds: int = 1
    ) -> Found:
        import substitution

        settings = {"n_tokens": n_tokens, "n_firings": n_firings, "n_full": n_full, "n_positions": n_positions}
        with tempfile.TemporaryDirectory() as folder:
            return substitution.measure(**settings, rounds=rounds, folder=Path(folder))

    def lines(found: Found) -> list[Line]:
        said = []
        for label, row in found["substitution"].items():
            goal = 30.0 if "T = 512" in label else 15.0 if "T = 128" in label else None
            what = f"{label}: edited rows of the substitution test, times as fast as a full forward each"
            said.append(Line(what, row["window_gain"], " ×", goal, least=True))
        dense = rest({"every write of a head replaced, times as fast as token by token": found["dense"]}, " ×")
        return said + rest({"deletions at many positions": found["positions"]}) + dense

    quick = {"n_tokens": 64, "n_firings": 2, "n_full": 2, "n_positions": 8, "rounds": 1}
    return SimpleNamespace(TITLE="Sessions, deletions, dense writes", QUICK=quick, measure=measure, lines=lines)


def sae_step() -> SimpleNamespace:
    """A training step on factors beside SAELens' TopK."""

    def measure(steps: int = 5, d_sae: int = 0) -> Found:
        import sae_step

        plain = {"d_k": 128, "d_v": 128, "d_sae": 2048, "k": 32, "batch": 256, "dead": 0.0, "threads": 1}
        found = {}
        for title, setting in getattr(sae_step, "GOALS", {"128 x 128, F 2048, k 32": {}}).items():
            own = plain | setting | {"steps": steps} | ({"d_sae": d_sae} if d_sae else {})
            if own["d_k"] * own["d_v"] * own["d_sae"] > LARGEST:
                continue
            flags = [f"--{name.replace('_', '-')}={value}" for name, value in own.items()]
            found[title] = sae_step.measure(argparse.Namespace(**own, only=["on factors"], forward=flags))
        return found

    def lines(found: Found) -> list[Line]:
        said = []
        for title, (base, own) in {title: tuple(rows.values()) for title, rows in found.items()}.items():
            said.append(Line(f"{title}: a step on factors / SAELens' TopK, time on a CPU", own["ratio"], "", 0.045))
            said.append(Line(f"{title}: memory that it adds", own["added_mb"] / base["added_mb"], "", 0.11))
        return said

    return SimpleNamespace(TITLE="Training steps", QUICK={"steps": 1, "d_sae": 256}, measure=measure, lines=lines)


SUBJECTS: dict[str, Callable[[], SimpleNamespace]] = {each.__name__: each for each in (substitution, sae_step)}
