"""Install a token: add writes toward it at the last tokens of a prompt; does it appear in the greedy continuation?

Source: WriteSAE (arXiv 2605.12770), the three-position install. The paper's rates are exact thirds of 300, that is, 100
units were counted three times; here the unit is an independent pair of a prompt and a target.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from hookpoints import WriteEdit
from sae_lens_writesae.atom.low_rank import LowRank
from sae_lens_writesae.steering import Target, token_id
from writesae.experiment.evaluation import Evaluation, Scope
from writesae.experiment.generation import greedy_rows
from writesae.experiment.lab import EditedRows, Lab, Site, Trial
from writesae.experiment.result import Claim, Figure, Result
from writesae.experiment.targets import (
    Stratum,
    draw_target,
    random_unit,
    target_change,
    target_rank,
    token_directions,
)
from writesae.experiment.tokens import token_text
from writesae.verdict import figures
from writesae.verdict import statistics as stats
from writesae.verdict.judge import Against, judge

STRATA = (Stratum("frequent", 2, 10), Stratum("100-1000", 100, 1000), Stratum("rare", 1001))
"""Targets by their native rank at the end of the prompt; the second stratum is the paper's."""
SEMANTIC = "semantic"
"""Name of the stratum of tokens that are given by hand."""

RELEVANT = 0.1
"""Difference of hit rates that matters, and margin by which a control may be worse and still count as equal: the
paper's gain is 0.67 to 1, and 0.1 is 2 of the default 20 pairs."""


@dataclass(frozen=True, kw_only=True)
class Install(Evaluation):
    """At each of the last `n_positions` tokens t of a prompt the head also writes m |W_t| k_t w_T^T / |k_t|, where W_t
    is the native write and w_T = normalise(W_O^h W_U[T]). A **hit**: the target T is among the `new_tokens` greedy
    tokens. Targets are drawn from strata by their native rank at the end of the prompt.

    **Controls**, on the same prompt: nothing is written; a random value side of equal norm (does T appear?); a wrong
    target (does another token of the same stratum appear when T is installed?).

    **Verdict** of claim 10, in the stratum 100-1000 at the headline m (intervals over the prompts' sequences): the
    ladder of `judge` on the difference of hit rates, installed - nothing (chance 0, a difference matters from 0.1 on),
    against the random value side and the wrong target. Where it holds, the sentence says whether the rate comes near
    the paper's 100 %. The other strata are judged by the same rule. Claim 25, over all strata, as the paper pools them:
    the share of pairs whose target has a better rank at the first new token than without edits (chance 1/2, from 60 %
    on it matters), against the same share under the random value side.
    """

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
    """Tokens or strings (each one token) that mean something to you: a stratum of their own. Empty: left out."""
    rows_per_run: int = 128
    """Continuations at once. Lower it when memory runs out; results stay the same."""

    kind: ClassVar[str] = "install"
    question: ClassVar[str] = "Do installed writes put a token into the continuation?"
    answers: ClassVar[tuple[int, ...]] = (10, 25)
    scope: ClassVar[Scope] = Scope.HEAD
    at_least: ClassVar[dict[str, float]] = {"pairs": 2, "prompt_tokens": 2, "n_positions": 1, "new_tokens": 1}
    columns: ClassVar[dict[str, dict[str, str]]] = {
        "continuations": {
            "pair": "number of the prompt x target pair",
            "sequence": "row of the evaluation tokens that the prompt is taken from",
            "stratum": "stratum of the target",
            "token": "target T",
            "text": "the target as text",
            "rank": "native rank of T at the end of the prompt, from 1",
            "wrong": "the wrong target: another token of the stratum, which is not installed",
            "condition": "what is written: nothing, target, random",
            "m": "norm of what is added, in norms of the native write; 0 for nothing",
            "hit": "whether T is in the continuation",
            "wrong_hit": "whether the wrong target is in the continuation",
            "first": "index of the first T among the new tokens, or -1",
            "log_prob_change": "nats, change of log p(T) at the first new token; 0 for nothing",
            "edited_rank": "rank of T at the end of the prompt under the edits, from 1; the native rank for nothing",
        }
    }

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", tuple(float(m) for m in self.sizes))
        super().__post_init__()
        if self.headline not in self.sizes:
            raise ValueError(f"headline must be one of sizes {self.sizes}, found {self.headline}")
        if any(m <= 0 for m in self.sizes):
            raise ValueError(f"sizes are norms and positive, found {self.sizes}")
        if self.n_positions > self.prompt_tokens:
            raise ValueError(f"n_positions ({self.n_positions}) is above prompt_tokens ({self.prompt_tokens})")
        if len(self.semantic) == 1:
            raise ValueError("semantic needs at least two tokens, because the others are the wrong targets; found 1")

    @property
    def shortest(self) -> int:
        return self.prompt_tokens

    # -- measuring

    def measure(self, lab: Lab) -> dict[str, pd.DataFrame]:
        rng = lab.rng(2)
        strata = [*STRATA]
        if self.semantic:
            strata.append(Stratum(SEMANTIC, among=tuple(token_id(lab.model, target) for target in self.semantic)))
        directions = token_directions(lab)
        tables, prompts, edits = [], [], []
        for place, (sequence, start) in enumerate(lab.bar(self._windows(lab, rng, len(strata)), self.kind)):
            stratum, span = strata[place % len(strata)], slice(start, start + self.prompt_tokens)
            site = lab.site(sequence, span=span)
            target = draw_target(lab.model, site.session.logits[0, -1], stratum, rng)
            if target is None:
                lab.skipped["pairs whose stratum is not in the vocabulary"] += 1
                continue
            pair = len(tables)
            row = {"pair": pair, "sequence": sequence, "stratum": stratum.name, "token": target.token}
            row |= {"text": token_text(lab.model, target.token), "rank": target.rank, "wrong": target.wrong}
            trials = self._trials(lab, site, row, directions(target.token), lab.rng(3, pair))
            nothing = pd.DataFrame(
                [row | {"condition": "nothing", "m": 0.0, "log_prob": 0.0, "edited_rank": target.rank}]
            )
            tables.append(pd.concat([nothing, lab.read(site, trials, _moved, self.n_positions)]))
            edits += [[], *(trial.edits for trial in trials)]
            prompts += [lab.tokens[sequence, span]] * (1 + len(trials))
        lab.require(bool(tables), f"no stratum has two tokens: the vocabulary has {lab.model.W_U.shape[1]}")
        lab.count_edited_runs(len(edits) - lab.n_edited_runs)  # a continuation and its first token are one condition
        continuations = greedy_rows(
            lab.model, torch.stack(prompts), edits, self.new_tokens, batch_size=self.rows_per_run, progress=lab.progress
        )
        table = pd.concat(tables, ignore_index=True).rename(columns={"log_prob": "log_prob_change"})
        table["hit"] = [token in new for token, new in zip(table["token"], continuations)]
        table["wrong_hit"] = [wrong in new for wrong, new in zip(table["wrong"], continuations)]
        table["first"] = [new.index(t) if t in new else -1 for t, new in zip(table["token"], continuations)]
        return {"continuations": table}

    def _windows(self, lab: Lab, rng: np.random.Generator, n_strata: int) -> list[tuple[int, int]]:
        """Sequence and first token of as many prompts as there are pairs; prompts are dealt over sequences."""
        n, length = lab.tokens.shape
        windows = [
            (int(sequence), int(window) * self.prompt_tokens)
            for window in rng.permutation(length // self.prompt_tokens)
            for sequence in rng.permutation(n)
        ]
        needed = self.pairs * n_strata
        lab.require(
            len(windows) >= needed,
            f"{n_strata} strata x {self.pairs} pairs need {needed} prompts of {self.prompt_tokens} tokens, the text "
            f"gives {len(windows)}; give more sequences, or lower pairs",
        )
        return windows[:needed]

    def _trials(
        self, lab: Lab, site: Site, row: dict[str, object], direction: Tensor, rng: np.random.Generator
    ) -> list[Trial]:
        """The target and a random direction at every size."""
        noise = random_unit(direction, rng)
        return [
            Trial(
                row | {"condition": condition, "m": m},
                self.prompt_tokens - self.n_positions,
                install_edits(lab, site.writes, value, m, self.n_positions),
            )
            for m in self.sizes
            for condition, value in (("target", direction), ("random", noise))
        ]

    # -- judging

    def claims(self, result: Result) -> list[Claim]:
        """Claim 10 in the paper's stratum, then the same of the other strata; claim 25 over all of them."""
        by_paper = sorted(strata_of(result), key=lambda stratum: stratum != "100-1000")
        return [*(self._claim(result, stratum) for stratum in by_paper), self._ranks(result)]

    def _ranks(self, result: Result) -> Claim:
        target, random = (improved(result, condition, self.headline) for condition in ("target", "random"))
        clusters = target.index.get_level_values("sequence")
        rate = stats.success_rate(target, clusters)
        lead = stats.estimate(target.astype(float) - random.loc[target.index], clusters, seed=self.seed)
        verdict = judge(
            rate.over_clusters,
            {"a random direction of the same norm": Against(lead)},
            chance=0.5,
            relevant=RELEVANT,
            what="the share of improved ranks",
        )
        low, high = rate.over_clusters.interval
        rows = result.tables["continuations"].query("condition == 'target' and m == @self.headline")
        return Claim(
            25,
            "installed writes improve the rank of their token",
            f"{rate.rate:.0%} [{low:.0%}, {high:.0%}] of pairs at m = {self.headline:g}; median shift of the rank "
            f"{float((rows['rank'] - rows['edited_rank']).median()):+,.0f}",
            rate.n,
            f"prompt x target pairs in {rate.over_clusters.n_clusters} sequences",
            f"random direction {float(random.mean()):.0%}; installed - random {lead}",
            verdict.outcome,
            verdict.sentence,
        )

    def _claim(self, result: Result, stratum: str) -> Claim:
        m = self.headline
        gains = {name: gain(result, stratum, m, name) for name in ("nothing", "random", "wrong")}
        verdict = judge(
            gains["nothing"],
            {
                "a random direction of the same norm": Against(gains["random"]),
                "a token that was not installed": Against(gains["wrong"]),
            },
            relevant=RELEVANT,
            what="the gain in hits over nothing",
        )
        installed = hits(result, stratum, "target", m)
        near = "as in the paper" if installed.rate > 0.9 else "far from the paper's 100 %"
        remark = f" The rate is {near}." if verdict.outcome == "holds" else ""
        rows = _rows(result, stratum, "target", m)
        moved = stats.estimate(rows["log_prob_change"], rows["sequence"], seed=self.seed)
        return Claim(
            10 if stratum == "100-1000" else None,
            f"installed writes put a token of stratum {stratum} into the continuation",
            f"{hits(result, stratum, 'nothing', 0).rate:.0%} to {installed.rate:.0%} [{installed.wilson.low:.0%}, "
            f"{installed.wilson.high:.0%}] at m = {m:g}; log-probability of the first token {moved} nats",
            installed.n,
            "prompt x target pairs",
            f"random direction {hits(result, stratum, 'random', m).rate:.0%}, wrong target "
            f"{wrong_hits(result, stratum, m):.0%}; installed - nothing {gains['nothing']}",
            verdict.outcome,
            verdict.sentence + remark,
        )

    def figures(self, result: Result) -> list[Figure]:
        """Hits by size, one figure for each stratum."""
        panels = []
        for stratum in strata_of(result):
            rates = {c: [hits(result, stratum, c, m) for m in self.sizes] for c in ("target", "random")}
            wrong = [wrong_hits(result, stratum, m) for m in self.sizes]
            nothing = [hits(result, stratum, "nothing", 0).rate] * len(self.sizes)
            band = ([r.wilson.low for r in rates["target"]], [r.wilson.high for r in rates["target"]])
            lines = [
                figures.Line("nothing", self.sizes, nothing, "muted"),
                figures.Line("random direction", self.sizes, [r.rate for r in rates["random"]], "soft"),
                figures.Line("wrong target", self.sizes, wrong, "control"),
                figures.Line("installed", self.sizes, [r.rate for r in rates["target"]], "atom", band),
            ]
            title = f"Hits by size, stratum {stratum}, install: {result.label}"
            label = "norm of what is written, in native writes"
            svg = figures.curves(lines, label, title, log_x=True, percent=True)
            panels.append(Figure(f"Targets of initial rank: {stratum}", svg, "Continuations with the target in them."))
        return panels

    def notes(self, result: Result) -> list[str]:
        """What the paper did otherwise."""
        unit = "A pair of a prompt and a target is counted once; the paper's rates are exact thirds of 300."
        no_semantic = "No semantic stratum: no tokens were given for it."
        return [unit] if SEMANTIC in strata_of(result) else [unit, no_semantic]


def install_edits(lab: Lab, writes: LowRank, value: Tensor, size: float, n_positions: int) -> list[WriteEdit]:
    """Add size |W_t| k_t value^T / |k_t| at the last `n_positions` of a prompt.

    Args:
        writes: the native writes of the prompt, N = its tokens.
        value: [V], of norm 1.
    """
    norms = size * writes.norm()
    keys = torch.nn.functional.normalize(writes.keys[:, 0], dim=-1)
    added = LowRank.rank_one(keys, norms[:, None] * value.to(norms))
    return [lab.add(t, added, t) for t in range(len(writes) - n_positions, len(writes))]


def strata_of(result: Result) -> list[str]:
    """The strata with at least one pair."""
    return [str(name) for name in result.tables["continuations"]["stratum"].unique()]


def hits(result: Result, stratum: str, condition: str, m: float) -> stats.Rate:
    """Share of continuations with the target in them, with intervals."""
    rows = _rows(result, stratum, condition, m)
    return stats.success_rate(rows["hit"], rows["sequence"])


def wrong_hits(result: Result, stratum: str, m: float) -> float:
    """Share of the continuations under an installed target that have the wrong target in them."""
    return float(np.mean(_rows(result, stratum, "target", m)["wrong_hit"].to_numpy(float)))


def gain(result: Result, stratum: str, m: float, against: str) -> stats.Estimate:
    """Difference of hit rates, installed - `against` (nothing, random, wrong), paired by prompt and target."""
    installed = _rows(result, stratum, "target", m)
    if against == "wrong":
        other = installed["wrong_hit"]
    else:
        other = _rows(result, stratum, against, 0 if against == "nothing" else m)["hit"].loc[installed.index]
    difference = installed["hit"].to_numpy(float) - other.to_numpy(float)
    return stats.estimate(difference, installed["sequence"], seed=result.evaluation.seed)


def improved(result: Result, condition: str, m: float) -> pd.Series:
    """Whether the rank of the target is better (smaller) than without edits, by (pair, sequence), over all strata."""
    table = result.tables["continuations"]
    rows = table[(table["condition"] == condition) & (table["m"] == m)].set_index(["pair", "sequence"]).sort_index()
    return rows["edited_rank"] < rows["rank"]


def _moved(rows: EditedRows) -> Mapping[str, NDArray[np.generic]]:
    return {**target_change(rows), **target_rank(rows)}


def _rows(result: Result, stratum: str, condition: str, m: float) -> pd.DataFrame:
    """Continuations of one stratum, condition and size, by pair."""
    table = result.tables["continuations"]
    chosen = np.logical_and.reduce([table["stratum"] == stratum, table["condition"] == condition, table["m"] == m])
    return table[chosen].set_index("pair")
