"""The substitution test as an `Evaluation`: its answers to the paper's claims."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
from torch import Tensor

from sae_lens_writesae import plots
from sae_lens_writesae.conditions import NAMES
from sae_lens_writesae.evaluation import Claim, Evaluation, Figure
from sae_lens_writesae.report_text import percent, span
from sae_lens_writesae.substitution import run_substitution
from sae_lens_writesae.substitution_config import SubstitutionConfig
from sae_lens_writesae.substitution_result import COLUMNS, SubstitutionInfo, SubstitutionResult
from sae_lens_writesae.summary import Summary

_CLAIM_OF_RULE = {"Mamba-2": 11, "RWKV-7": 12, "DeltaNet": 13}
"""Rules for which the paper reports a substitution test of their own; for all others it is its first claim."""


class Substitution(Evaluation):
    """At a firing, the write is exchanged for the atom or for a control of the same norm, and the model runs on. A win:
    the KL divergence from the native next-token distributions, over t..t+16, is smaller than after deleting the write.

    Verdict, at the SAE's own coefficient: below the floor where deletion moves the model no more than a no-op does;
    fails where the interval of the win rate does not lie above 1/2; explained where a control also beats deletion and
    the atom does not beat that control; holds otherwise.
    """

    kind: ClassVar[str] = "substitution"
    title: ClassVar[str] = "Can an atom stand in for the write it replaces?"
    COLUMNS: ClassVar[dict[str, dict[str, str]]] = {"firings": COLUMNS}

    @classmethod
    def of(cls, result: SubstitutionResult) -> Substitution:
        """Wrap a result."""
        info = result.info.to_dict() | {"label": result.info.label, "conditions": len(result.frame)}
        return cls(info, {"firings": result.frame})

    @property
    def result(self) -> SubstitutionResult:
        """The test itself, for `write_report` and for its own `summary`."""
        return SubstitutionResult(self.tables["firings"], SubstitutionInfo.from_dict(self.info))

    @property
    def _scale(self) -> str:
        scales = self.info["config"]["scales"]
        return "coefficient" if "coefficient" in scales else scales[0]

    def claims(self) -> list[Claim]:
        summary, scale = self.result.summary(), self._scale
        verdict = summary.verdicts[scale]
        unit = f"firings in {summary.n_clusters} sequences"
        number = _CLAIM_OF_RULE.get(self.info["rule"], 1)
        win: Any = summary.rate("atom", "delete", scale)
        found = [
            Claim(
                number,
                "an atom is nearer to the native write than deletion",
                f"{percent(win['rate'])} [{span(win['boot_low'], win['boot_high'])}]",
                summary.n_firings,
                unit,
                _controls(summary, scale),
                verdict.outcome,
                verdict.sentence,
            )
        ]
        chains: Any = summary.chains
        for row in chains[chains["scale"] == scale].to_dict("records"):
            holds = row["boot_low"] > 0.5
            sentence = (
                "The strict order holds on more than half of the firings."
                if holds
                else ("The interval of the strict order does not lie above 1/2.")
            )
            measured = f"{percent(row['rate'])} [{span(row['boot_low'], row['boot_high'])}]"
            found.append(
                Claim(2, row["chain"], measured, summary.n_firings, unit, "", "holds" if holds else "fails", sentence)
            )
        found.append(self._medians(summary, scale, unit))
        return found

    def _medians(self, summary: Summary, scale: str, unit: str) -> Claim:
        table: Any = summary.conditions
        wanted = [("atom", scale), ("delete", "none"), ("random", scale)]
        medians = {
            name: float(row["median"].iloc[0])
            for name, at in wanted
            if not (row := table[(table["condition"] == name) & (table["scale"] == at)]).empty
        }
        ordered = list(medians.values()) == sorted(medians.values())
        return Claim(
            3,
            f"median KL of {' / '.join(medians)}",
            " / ".join(plots.number(value) for value in medians.values()) + " nats",
            summary.n_firings,
            unit,
            f"no-op {plots.number(summary.floor)} nats (95th percentile)",
            "below the floor" if medians["delete"] <= summary.floor else "holds" if ordered else "fails",
            "The medians stand in the paper's order." if ordered else "The medians do not stand in the paper's order.",
        )

    def figures(self) -> list[Figure]:
        summary, scale = self.result.summary(), self._scale
        rivals = summary.verdicts[scale].controls
        wide = self.result.wide(summary.metric)
        return [
            Figure(
                "Does anything else do as well?",
                plots.win_rate_figure(summary, rivals, self.label),
                "Share of firings on which each condition is nearer to the native model than deletion. Controls have "
                "the norm of the atom; orange explains the result.",
            ),
            Figure(
                "How far each moves the model",
                plots.kl_figure(wide, scale, summary.floor, rivals, self.label),
                "Median, quartiles and 5-95 % of KL from native over firings.",
            ),
            Figure(
                "The same against deletion",
                plots.ratio_figure(wide, scale, rivals, self.label),
                "Left of 1 is a win; how far left is how much of the deletion's effect is taken back.",
            ),
            Figure(
                "By the size of the effect",
                plots.quartile_figure(summary, scale, rivals, self.label),
                "A result that is real should be strongest in Q4.",
            ),
            Figure(
                "By the likeness of atom and write",
                plots.cosine_figure(summary, scale, self.label),
                "At matched norm only a cosine above 1/2 (shaded) makes an atom nearer to the write than nothing is.",
            ),
        ]


def evaluate_substitution(
    model: Any,
    sae: Any,
    tokens: Tensor,
    config: SubstitutionConfig | None = None,
    progress: bool = True,
    *,
    parts: Path | None = None,
) -> Substitution:
    """`run_substitution` as an evaluation."""
    return Substitution.of(run_substitution(model, sae, tokens, config, progress, parts=parts))


def all_heads(results: list[Substitution]) -> Claim | None:
    """Claim 5 over the tests of several heads of one layer: mean win rate, its spread, and how many heads hold."""
    by_head = {(r.info["layer"], r.info["head"]): r for r in results}
    if len(by_head) < 2:
        return None
    rates: Any = pd.Series([r.result.summary().rate("atom", "delete", r._scale)["rate"] for r in by_head.values()])
    outcomes = [r.claims()[0].outcome for r in by_head.values()]
    held = outcomes.count("holds")
    return Claim(
        5,
        "all heads of a layer",
        f"{percent(rates.mean())} ± {percent(rates.std())} (SD over heads)",
        len(rates),
        "heads",
        f"explained by a control on {outcomes.count('explained')}",
        "holds" if held == len(rates) else "explained" if "explained" in outcomes else "fails",
        f"The substitution test holds on {held} of {len(rates)} heads.",
    )


def _controls(summary: Summary, scale: str) -> str:
    """Every control's win rate against deletion, the highest first."""
    table: Any = summary.comparisons
    rows = table[(table["scale"] == scale) & (table["b"] == "delete") & (table["a"] != "atom")]
    rows = rows.sort_values("rate", ascending=False)
    return ", ".join(f"{NAMES[row.a]} {percent(row.rate)}" for row in rows.itertuples())
