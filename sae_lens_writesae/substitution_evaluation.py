"""The substitution test as an `Evaluation`: its answers to the paper's claims."""

from __future__ import annotations

from dataclasses import replace
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
from sae_lens_writesae.verdict.judge import NO_DATA, too_few_wins, too_little
from sae_lens_writesae.verdict.paper import Outcome

_CLAIM_OF_RULE = {"Mamba-2": 11, "RWKV-7": 12, "DeltaNet": 13}
"""Rules for which the paper reports a substitution test of their own; for all others it is its first claim."""


class Substitution(Evaluation):
    """At a firing, the write is exchanged for the atom or for a control of the same norm, and the model runs on. A win:
    the KL divergence from the native next-token distributions, over t..t+16, is smaller than after deleting the write.

    The headline writes the dominant atom of the position, as the paper does (section 3.2). Beside it stands the same
    test with the firing's own atom (`own`): any atom of the code, however small its coefficient.

    Verdict, at the SAE's own coefficient: below the floor where deletion moves the model no more than a no-op does;
    inconclusive with fewer than 20 firings or 5 sequences, or where the interval of the win rate contains both 1/2 and
    60 %; fails where it does not lie above 1/2; confounded where a control also beats deletion and the atom is no
    better than that control (interval of atom < control ends below 60 %), undecided where that interval contains both;
    holds otherwise. The state after the write contains the write: it is shown as a reference and confounds nothing.

    Claims 2 and 3 are about matched norm, where the paper's "random" is another atom (`shuffled`): a small random write
    against none is a coin flip, whatever atoms do. Claim 2 holds where the interval of the rate of the strict chain
    atom < delete < shuffled lies above 1/2. Claim 3 holds where the interval of the paired median ratio atom / delete
    lies below 1, and that of shuffled / delete above 1. Both are inconclusive with too little data.
    """

    kind: ClassVar[str] = "substitution"
    title: ClassVar[str] = "Can an atom stand in for the write it replaces?"
    COLUMNS: ClassVar[dict[str, dict[str, str]]] = {"firings": COLUMNS}

    @classmethod
    def of(cls, result: SubstitutionResult, own: SubstitutionResult | None = None) -> Substitution:
        """Wrap a result, and that of the same test with each firing's own atom where there is one."""
        info = result.info.to_dict() | {"label": result.info.label, "conditions": len(result.frame)}
        if own is None:
            return cls(info, {"firings": result.frame})
        info["conditions"] += len(own.frame)
        info["seconds"] += own.info.seconds
        return cls(info, {"firings": result.frame, "own": own.frame})

    @property
    def result(self) -> SubstitutionResult:
        """The test itself, for `write_report` and for its own `summary`."""
        return SubstitutionResult(self.tables["firings"], SubstitutionInfo.from_dict(self.info))

    @property
    def own(self) -> SubstitutionResult | None:
        """The same test with each firing's own atom; None where the headline is that test."""
        if "own" not in self.tables:
            return None
        info = self.result.info
        return SubstitutionResult(self.tables["own"], replace(info, config=replace(info.config, atom_choice="own")))

    @property
    def _scale(self) -> str:
        scales = self.info["config"]["scales"]
        return "coefficient" if "coefficient" in scales else scales[0]

    def claims(self) -> list[Claim]:
        """Claim 1 (11, 12, 13 by rule), the same with the firing's own atom, then claims 2 and 3."""
        scale, summary, own = self._scale, self.result.summary(), self.own
        number = _CLAIM_OF_RULE.get(self.info["rule"], 1)
        found = [_wins(summary, scale, number, "an atom is nearer to the native write than deletion")]
        if own is not None:
            found.append(_wins(own.summary(), scale, None, "own atom: nearer to the native write than deletion"))
        if "matched" in self.info["config"]["scales"] and "shuffled" in self.info["config"]["controls"]:
            return [*found, _chain(summary), _medians(summary)]
        need = "It needs the scale matched and the control shuffled."
        return [
            *found,
            Claim(2, "atom < delete < shuffled", "–", 0, "firings", "", "not tested", need),
            Claim(3, "median KL of atom / delete / shuffled", "–", 0, "firings", "", "not tested", need),
        ]

    def figures(self) -> list[Figure]:
        summary, scale = self.result.summary(), self._scale
        rivals = summary.verdicts[scale].controls
        wide = self.result.wide(summary.metric)
        return [
            Figure(
                "Does anything else do as well?",
                plots.win_rate_figure(summary, rivals, self.label),
                "Share of firings on which each condition is nearer to the native model than deletion. Controls have "
                "the norm of the atom; orange confounds the result.",
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


def _wins(summary: Summary, scale: str, number: int | None, claim: str) -> Claim:
    """The verdict of one test at one scale."""
    verdict, win = summary.verdicts[scale], summary.rate("atom", "delete", scale).to_dict()
    measured = f"{percent(win['rate'])} [{span(win['boot_low'], win['boot_high'])}]"
    controls = _controls(summary, scale)
    return Claim(
        number, claim, measured, summary.n_firings, _unit(summary), controls, verdict.outcome, verdict.sentence
    )


def _unit(summary: Summary) -> str:
    return f"firings in {summary.n_clusters} sequences"


def _chain(summary: Summary) -> Claim:
    """Claim 2, at matched norm; the chain that ends in a Gaussian direction stands beside it."""
    table: Any = summary.chains
    chains = {row["chain"]: row for row in table[table["scale"] == "matched"].to_dict("records")}
    rates = {
        name: f"{percent(row['rate'])} [{span(row['boot_low'], row['boot_high'])}]" for name, row in chains.items()
    }
    paper, *others = chains
    row = chains[paper]
    outcome: Outcome
    if summary.verdicts["matched"].outcome == "below the floor":
        outcome, sentence = "below the floor", summary.verdicts["matched"].sentence
    elif too_few_wins(row["n"], row["n_clusters"], row["boot_low"], row["boot_high"]):
        outcome, sentence = "inconclusive", NO_DATA
    elif row["boot_low"] > 0.5:
        outcome, sentence = "holds", "At matched norm the strict order holds on more than half of the firings."
    else:
        outcome, sentence = "fails", "At matched norm the interval of the strict order does not lie above 1/2."
    beside = "; ".join(f"{name} (Gaussian) {rates[name]}" for name in others)
    return Claim(
        2, f"{paper}, matched norm", rates[paper], summary.n_firings, _unit(summary), beside, outcome, sentence
    )


_RELEVANT_RATIO = 0.95
"""Of two KLs: a smaller change than this one is no relevant effect."""


def _medians(summary: Summary) -> Claim:
    """Claim 3, at matched norm, by the paired ratios."""
    table: Any = summary.conditions.set_index(["condition", "scale"])["median"]
    wanted = (("atom", "matched"), ("delete", "none"), ("shuffled", "matched"))
    medians = [float(table[pair]) for pair in wanted]
    atom, other = (summary.rate(name, "delete", "matched").to_dict() for name in ("atom", "shuffled"))
    size = atom["n"], atom["n_clusters"]
    unclear = too_little(
        *size, atom["ratio_low"], atom["ratio_high"], chance=1, relevant=_RELEVANT_RATIO
    ) or too_little(*size, other["ratio_low"], other["ratio_high"], chance=1, relevant=1 / _RELEVANT_RATIO)
    outcome: Outcome
    if medians[1] <= summary.floor:
        outcome, sentence = "below the floor", summary.verdicts["matched"].sentence
    elif too_little(*size) or (unclear and not (atom["ratio_low"] > 1 or other["ratio_high"] < 1)):
        outcome, sentence = "inconclusive", NO_DATA
    elif atom["ratio_high"] < 1 < other["ratio_low"]:
        outcome, sentence = "holds", "Both paired ratios lie on the paper's side of 1, with their intervals."
    else:
        outcome, sentence = "fails", "A paired ratio does not lie on the paper's side of 1 with its interval."
    ratios = ", ".join(
        f"{name} / delete {plots.number(row['median_ratio'])} [{span(row['ratio_low'], row['ratio_high'], 1)}]"
        for name, row in (("atom", atom), ("shuffled", other))
    )
    return Claim(
        3,
        "median KL of atom / delete / shuffled, matched norm",
        f"{' / '.join(plots.number(value) for value in medians)} nats; paired median ratios: {ratios}",
        summary.n_firings,
        _unit(summary),
        f"no-op {plots.number(summary.floor)} nats (95th percentile)",
        outcome,
        sentence,
    )


def evaluate_substitution(
    model: Any,
    sae: Any,
    tokens: Tensor,
    config: SubstitutionConfig | None = None,
    progress: bool = True,
    *,
    parts: Path | None = None,
) -> Substitution:
    """`run_substitution` as an evaluation: with the dominant atom, and beside it with each firing's own (that alone
    where the config asks for it). Cost: that of both."""
    config = config or SubstitutionConfig()
    result = run_substitution(model, sae, tokens, config, progress, parts=parts)
    if config.atom_choice == "own":
        return Substitution.of(result)
    own = replace(config, atom_choice="own")
    beside = run_substitution(model, sae, tokens, own, progress, parts=parts / "own" if parts is not None else None)
    return Substitution.of(result, beside)


_WORST: tuple[Outcome, ...] = ("confounded", "undecided", "fails", "inconclusive", "below the floor")


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
        f"confounded by a control on {outcomes.count('confounded')}",
        "holds" if held == len(rates) else next(o for o in _WORST if o in outcomes),
        f"The substitution test holds on {held} of {len(rates)} heads.",
    )


def _controls(summary: Summary, scale: str) -> str:
    """Every control's win rate against deletion, the highest first."""
    table: Any = summary.comparisons
    rows = table[(table["scale"] == scale) & (table["b"] == "delete") & (table["a"] != "atom")]
    rows = rows.sort_values("rate", ascending=False)
    return ", ".join(f"{NAMES[row.a]} {percent(row.rate)}" for row in rows.itertuples())
