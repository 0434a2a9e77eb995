"""Settings and result of installed tokens (`install`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from sae_lens_writesae.evaluation import Claim, Evaluation, Figure
from sae_lens_writesae.interventions import plots
from sae_lens_writesae.interventions.common import Estimate, check_at_least, estimate
from sae_lens_writesae.interventions.targets import Stratum
from sae_lens_writesae.steering import Target
from sae_lens_writesae.verdict import statistics as stats
from sae_lens_writesae.verdict.judge import NO_DATA, too_little

STRATA = (Stratum("frequent", 2, 10), Stratum("100-1000", 100, 1000), Stratum("rare", 1001, None))
SEMANTIC = "semantic"


_RELEVANT = 0.1
"""Difference of hit rates that matters."""


@dataclass(frozen=True)
class InstallConfig:
    """What is installed, where, and how often."""

    pairs: int = 20
    """Prompt x target pairs in each stratum. Prompts are distinct windows of the sequences."""
    prompt_tokens: int = 24
    """Length of a prompt."""
    n_positions: int = 3
    """Consecutive positions that are written at: the last of the prompt."""
    sizes: tuple[float, ...] = (1.5, 3.0, 6.0)
    """m: norm of what is added, in norms of the native write at the same position."""
    headline: float = 3.0
    """The m of the claim; one of `sizes`."""
    new_tokens: int = 20
    """Greedy tokens in which the target is looked for."""
    semantic: tuple[Target, ...] = ()
    """Tokens or strings (each one token) that mean something to you: a stratum of their own. Empty: skipped."""
    rows_per_run: int = 128
    """Continuations at once."""
    seed: int = 0
    """Of prompts, targets and random directions."""
    label: str = ""
    """Name in reports."""

    def __post_init__(self) -> None:
        check_at_least(self, {"pairs": 2, "prompt_tokens": 2, "n_positions": 1, "new_tokens": 1, "rows_per_run": 1})
        object.__setattr__(self, "sizes", tuple(float(m) for m in self.sizes))
        object.__setattr__(self, "semantic", tuple(self.semantic))
        if self.headline not in self.sizes:
            raise ValueError(f"headline must be one of sizes {self.sizes}, found {self.headline}")
        if any(m <= 0 for m in self.sizes):
            raise ValueError(f"sizes are norms and positive, found {self.sizes}")
        if self.n_positions > self.prompt_tokens:
            raise ValueError(f"n_positions ({self.n_positions}) is above prompt_tokens ({self.prompt_tokens})")
        if len(self.semantic) == 1:
            raise ValueError("semantic needs at least two tokens: the other ones are the wrong targets")


class Install(Evaluation):
    """Whether installed tokens appear in 20 greedy tokens.

    Definition: at each of the last n prompt positions t the head also writes m |W_t| k_t w_T^T / |k_t|, with
    w_T = normalise(W_O^h^T W_U[T]). A hit: T is among the new tokens. Strata by the rank of T at the end of the prompt.

    Controls, on the same prompt: nothing written; a random value side of equal norm (does T appear?); a wrong target
    (does another token of the same stratum appear when T is installed?).

    Verdict of claim 10, in the stratum 100-1000 at the headline m (intervals: bootstrap over prompts' sequences):
    1. "inconclusive" with too little data (`verdict.judge`); else "fails":
       the interval of hits(installed) - hits(nothing) does not lie above 0.
    2. "confounded": hits(installed) - hits(random), or - hits(wrong target), does not lie above 0.
    3. "holds" otherwise; the sentence says whether the rate comes near the paper's 100 %.
    """

    kind: ClassVar[str] = "install"
    title: ClassVar[str] = "Do installed writes put a token into the continuation?"
    COLUMNS: ClassVar[dict[str, dict[str, str]]] = {
        "continuations": {
            "pair": "index of the prompt x target pair",
            "sequence": "sequence of the prompt",
            "stratum": "of the target",
            "token": "target T",
            "text": "T as text",
            "rank": "native rank of T at the end of the prompt, from 1",
            "wrong": "the wrong target: another token of the stratum, not installed",
            "condition": "nothing, target, random",
            "m": "norm of what is added in norms of the native write; 0 for nothing",
            "hit": "T is in the continuation",
            "wrong_hit": "the wrong target is",
            "first": "index of the first T among the new tokens, or -1",
            "log_prob_change": "of T at the first new token, nats; 0 for nothing",
        }
    }

    def _difference(self, stratum: str, m: float, against: str) -> Estimate:
        """hits(installed) - hits(against), paired by prompt and target."""
        table: Any = self.tables["continuations"]
        own = table[table["stratum"] == stratum].set_index("pair")
        installed = own[(own["condition"] == "target") & (own["m"] == m)]
        if against == "wrong":
            other = installed["wrong_hit"]
        else:
            rows = (own["condition"] == against) & (own["m"] == (0 if against == "nothing" else m))
            other = own[rows]["hit"].loc[installed.index]
        return estimate(installed["hit"].astype(float) - other.astype(float), installed["sequence"])

    def rate(self, stratum: str, condition: str, m: float) -> stats.Rate:
        """Share of hits, with intervals."""
        table: Any = self.tables["continuations"]
        own = table[(table["stratum"] == stratum) & (table["condition"] == condition) & (table["m"] == m)]
        return stats.success_rate(own["hit"], own["sequence"])

    @property
    def strata(self) -> list[str]:
        """Those with at least one pair."""
        return list(dict.fromkeys(self.tables["continuations"]["stratum"]))

    def claims(self) -> list[Claim]:
        """Claim 10 in the paper's stratum, then the other strata."""
        m = self.info["config"]["headline"]
        return [self._claim(s, m, 10 if s == "100-1000" else None) for s in sorted(self.strata, key=_paper_first)]

    def _claim(self, stratum: str, m: float, number: int | None) -> Claim:
        rate, nothing, random = (self.rate(stratum, c, x) for c, x in (("target", m), ("nothing", 0), ("random", m)))
        gains = {against: self._difference(stratum, m, against) for against in ("nothing", "random", "wrong")}
        same = [against for against in ("random", "wrong") if not gains[against].low > 0]
        gain = gains["nothing"]
        if too_little(gain.n, gain.n_clusters, gain.low, gain.high, relevant=_RELEVANT):
            outcome, why = "inconclusive", NO_DATA
        elif not gain.low > 0:
            outcome, why = "fails", "Installing does not make the target appear more often than nothing does."
        elif same:
            names = {"random": "a random direction of the same norm", "wrong": "a token that was not installed"}
            outcome, why = "confounded", f"It does no better than {' and '.join(names[s] for s in same)}."
        else:
            near = "as in the paper" if rate.rate > 0.9 else "far from the paper's 100 %"
            outcome, why = "holds", f"The target appears more often than under every control; the rate is {near}."
        table: Any = self.tables["continuations"]
        own = table[(table["stratum"] == stratum) & (table["condition"] == "target") & (table["m"] == m)]
        moved = estimate(own["log_prob_change"], own["sequence"])
        return Claim(
            number,
            f"installed writes put a token of stratum {stratum} into the continuation",
            f"{nothing.rate:.0%} to {rate.rate:.0%} [{rate.wilson.low:.0%}, {rate.wilson.high:.0%}] at m = {m:g}; "
            f"log-probability of the first token {moved} nats",
            rate.n,
            "prompt x target pairs",
            f"random direction {random.rate:.0%}, wrong target {own['wrong_hit'].mean():.0%}; "
            f"installed - nothing {gains['nothing']}",
            outcome,
            why,
        )

    def figures(self) -> list[Figure]:
        """Hits by size, one figure a stratum."""
        made = []
        sizes = self.info["config"]["sizes"]
        table: Any = self.tables["continuations"]
        for stratum in self.strata:
            rates = {c: [self.rate(stratum, c, m) for m in sizes] for c in ("target", "random")}
            own = table[(table["stratum"] == stratum) & (table["condition"] == "target")]
            wrong = own.groupby("m")["wrong_hit"].mean().loc[list(sizes)]
            band = ([r.wilson.low for r in rates["target"]], [r.wilson.high for r in rates["target"]])
            nothing = self.rate(stratum, "nothing", 0).rate
            lines = [
                plots.Line("nothing", sizes, [nothing] * len(sizes), "muted"),
                plots.Line("random direction", sizes, [r.rate for r in rates["random"]], "soft"),
                plots.Line("wrong target", sizes, list(wrong), "rival"),
                plots.Line("installed", sizes, [r.rate for r in rates["target"]], "atom", band),
            ]
            title = f"Hits by size, stratum {stratum}, install: {self.label}"
            svg = plots.curve_figure(
                lines, "norm of what is written, in native writes", title, log_x=True, percent=True
            )
            made.append(Figure(f"Targets of initial rank: {stratum}", svg, "Continuations with the target in them."))
        return made

    def notes(self) -> list[str]:
        """What the paper did otherwise."""
        skipped = [] if SEMANTIC in self.strata else ["No semantic stratum: no tokens were given for it."]
        unit = "A pair of a prompt and a target is counted once; the paper's rates are exact thirds of 300."
        return [unit, *skipped, *super().notes()]


def _paper_first(stratum: str) -> int:
    return 0 if stratum == "100-1000" else 1
