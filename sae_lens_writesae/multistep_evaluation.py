"""Multi-step divergence as an `Evaluation`: the state and the residual stream for some tokens after a substitution."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import pandas as pd
from torch import Tensor

from sae_lens_writesae import plots
from sae_lens_writesae.conditions import CONTROLS, NAMES, REFERENCES, Scale
from sae_lens_writesae.evaluation import Claim, Evaluation, Figure, describe
from sae_lens_writesae.multistep import multistep_divergence
from sae_lens_writesae.report_text import percent, span
from sae_lens_writesae.substitution_config import SubstitutionConfig
from sae_lens_writesae.verdict import statistics
from sae_lens_writesae.verdict.judge import NO_DATA, RELEVANT_RATE, too_few_wins
from sae_lens_writesae.verdict.paper import Outcome


@dataclass(frozen=True)
class MultistepConfig:
    """Which firings are followed, and for how long. The draw is that of the substitution test with the same seed."""

    n_steps: int = 10
    """Tokens after t, the referee's ten."""
    n_atoms: int | None = 40
    firings_per_atom: int = 3
    scale: Scale = "coefficient"
    controls: tuple[str, ...] = (*CONTROLS, *REFERENCES)
    seed: int = 0
    label: str = ""

    def substitution(self) -> SubstitutionConfig:
        """The draw and the conditions, which check themselves."""
        return SubstitutionConfig(
            n_atoms=self.n_atoms,
            firings_per_atom=self.firings_per_atom,
            scales=(self.scale,),
            controls=tuple(self.controls),
            horizon=max(16, self.n_steps),
            seed=self.seed,
            label=self.label,
        )


class Multistep(Evaluation):
    """Norm of the state's change and distance of the last residual stream, for some tokens after one substitution.

    The claim is that an atom leaves the model nearer to its native course than deletion does: on each firing, the mean
    over steps 0..n of 1 - cosine of the residual stream is smaller. It fails where the cluster interval of that rate
    does not lie above 1/2 (inconclusive where it contains both 1/2 and 60 %, or with fewer than 20 firings or 5
    sequences), and is confounded by a control that also beats deletion and is not beaten by the atom (undecided where
    the interval of atom < control contains both). The state after the write is a reference, no control.
    """

    kind: ClassVar[str] = "multistep"
    title: ClassVar[str] = "How far does one substitution lead the model astray?"
    COLUMNS: ClassVar[dict[str, dict[str, str]]] = {
        "steps": {
            "firing": "number of the firing",
            "sequence": "row of the evaluation tokens",
            "position": "token t that is edited",
            "atom": "atom that fires",
            "condition": "what is written at t",
            "scale": "how the atom is scaled",
            "step": "tokens after t",
            "state_gap": "norm of the change of the head's state over the norm of the native state",
            "residual_cosine": "cosine of the edited and the native residual stream after the last block",
        }
    }

    def claims(self) -> list[Claim]:
        scale = self.info["scale"]
        steps: Any = self.tables["steps"].assign(distance=lambda t: 1 - t["residual_cosine"])
        steps = steps[steps["scale"].isin([scale, "none"])]
        wide = steps.pivot_table(index=["firing", "sequence"], columns="condition", values="distance").reset_index()

        def rate(a: str, b: str) -> statistics.Rate:
            return statistics.win_rate(wide[a], wide[b], wide["sequence"], seed=self.info["seed"])

        win = rate("atom", "delete")
        rivals = [c for c in CONTROLS if c in wide]
        beats = {c: rate(c, "delete") for c in (*CONTROLS, *REFERENCES) if c in wide}
        ties = [c for c in rivals if beats[c].bootstrap.low > 0.5 and not rate("atom", c).bootstrap.low > 0.5]
        ties.sort(key=lambda c: -beats[c].rate)
        as_good = [c for c in ties if rate("atom", c).bootstrap.high < RELEVANT_RATE]
        outcome: Outcome
        if too_few_wins(win.n, win.n_clusters, *win.bootstrap):
            outcome, why = "inconclusive", NO_DATA
        elif not win.bootstrap.low > 0.5:
            outcome, why = "fails", "Its interval does not lie above 1/2."
        elif as_good:
            outcome, why = "confounded", f"So does {NAMES[as_good[0]]}, which the atom does not beat."
        elif ties:
            outcome, why = "undecided", f"So does {NAMES[ties[0]]}; whether the atom beats it is undecided."
        else:
            outcome, why = "holds", "No control that beats deletion does as well."
        return [
            Claim(
                None,
                f"over {self.info['n_steps']} tokens an atom leads less far astray than deletion",
                f"{percent(win.rate)} [{span(*win.bootstrap)}]",
                win.n,
                f"firings in {win.n_clusters} sequences",
                ", ".join(f"{NAMES[c]} {percent(beats[c].rate)}" for c in sorted(beats, key=lambda c: -beats[c].rate)),
                outcome,
                why,
            )
        ]

    def figures(self) -> list[Figure]:
        steps, scale = self.tables["steps"], self.info["scale"]
        return [
            Figure(title, plots.steps_figure(steps, column, scale, (), self.label), caption)
            for column, title, caption in (
                ("state_gap", "Change of the head's state", "Median over firings, relative to the native state."),
                ("residual_cosine", "Distance of the residual stream", "Median of 1 - cosine after the last block."),
            )
        ]


def evaluate_multistep(
    model: Any, sae: Any, tokens: Tensor, config: MultistepConfig | None = None, progress: bool = True
) -> Multistep:
    """`multistep_divergence` as an evaluation. Same arguments; cost: one edited row a firing and condition."""
    config = config or MultistepConfig()
    begin = time.perf_counter()
    steps: pd.DataFrame = multistep_divergence(
        model, sae, tokens, config.substitution(), n_steps=config.n_steps, progress=progress
    )
    settings = asdict(config) | {"controls": list(config.controls), "seconds": time.perf_counter() - begin}
    settings["conditions"] = len(steps) // (config.n_steps + 1)
    return Multistep(settings | describe(model, sae, label=config.label), {"steps": steps})
