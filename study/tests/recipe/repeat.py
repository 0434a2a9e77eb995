"""Does a repeated write disturb the model more than a missing one?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
import pandas as pd

from writesae.choices import AtLeast
from writesae.experiment.lab import Trial
from writesae.page.format import percent
from writesae_study.experiment.bench import Bench
from writesae_study.experiment.evaluation import Evaluation, Result, Scope
from writesae_study.experiment.readout import kl_window
from writesae_study.verdict.finding import Against, Finding, Paired


@dataclass(frozen=True, kw_only=True)
class Repeat(Evaluation):
    """At token t the head writes what it wrote at t - 1, at the norm of its own write at t. Measured is the KL
    divergence from the native next-token distributions, mean over t..t+horizon, beside that of writing nothing.

    **Control.** `elsewhere`, the write of a random other position at the same norm: any foreign write may disturb.

    **Verdict.** The ladder of `judge` on the share of positions at which the repeated write disturbs more than a
    missing one (chance 1/2, a share matters from 60 % on; intervals over sequences), against `elsewhere`.
    """

    n_positions: int = 200
    """Positions, drawn uniformly from all sequences."""
    horizon: Annotated[int, AtLeast(0)] = 16
    """KL is averaged over t..t+horizon, both included."""

    question: ClassVar[str] = "Does a repeated write disturb more than a missing one?"
    scope: ClassVar[Scope] = Scope.HEAD
    columns: ClassVar[dict[str, dict[str, str]]] = {
        "positions": {
            "sequence": "row of the evaluation tokens",
            "position": "token t that is edited",
            "condition": "what is written at t: native (a no-op), delete, previous or elsewhere",
            "kl": "nats, mean over t..t+horizon of KL(native || edited)",
        }
    }

    @property
    def shortest(self) -> int:
        return self.horizon + 2

    def measure(self, lab: Bench) -> dict[str, pd.DataFrame]:
        n, length = lab.tokens.shape
        rng, per_sequence = lab.rng(), length - 1 - self.horizon  # token 0 has no write before it
        places = np.sort(rng.choice(n * per_sequence, min(self.n_positions, n * per_sequence), replace=False))
        units = pd.DataFrame({"sequence": places // per_sequence, "position": 1 + places % per_sequence})
        tables = []
        for site in lab.sites(units, self.kind):
            trials, norms = [], site.writes.norm()
            for t in site.rows["position"].tolist():
                other = int(rng.choice(np.setdiff1d(np.arange(length), [t - 1, t])))
                if not bool((norms[[t, t - 1, other]] > 0).all()):
                    lab.skipped["positions where a write is zero"] += 1
                    continue
                places_of = {"native": t, "previous": t - 1, "elsewhere": other}
                written = {name: site.at([place]).with_norm(norms[[t]]) for name, place in places_of.items()}
                for name in ("native", "delete", "previous", "elsewhere"):
                    row = {"sequence": site.sequence, "position": t, "condition": name}
                    trials.append(Trial(row, t, lab.replace(t, written.get(name))))
            if trials:
                tables.append(lab.read(site, trials, kl_window, self.horizon + 1))
        lab.require(bool(tables), "no position has a write")
        return {"positions": pd.concat(tables, ignore_index=True)}

    def findings(self, result: Result) -> list[Finding]:
        kl = Paired.of(result.tables["positions"], "kl", "sequence", "position", seed=self.seed)
        rate, control = kl.wins("delete", "previous"), kl.wins("delete", "elsewhere")
        return [
            Finding(
                claim=self.question,
                effect=rate,
                what="the share of positions where the repeated write disturbs more",
                null="write from elsewhere",
                against={"write from elsewhere": Against(kl.wins("elsewhere", "previous"), control, chance=0.5)},
                chance=0.5,
                relevant=0.1,
                **kl.size_of("delete"),
                shown={"repeated write": rate, "write from elsewhere": control},
                write=percent,
                axis="of positions",
                of="positions in {} sequences",
            )
        ]
