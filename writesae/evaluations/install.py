"""Install a token: add writes toward it at the last tokens of a prompt; does it appear in the greedy continuation?

Source: WriteSAE (arXiv 2605.12770), the three-position install. The paper's rates are exact thirds of 300, that is, 100
units were counted three times; here the unit is an independent pair of a prompt and a target.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from hookpoints import WriteEdit
from sae_lens_writesae.atom.low_rank import LowRank
from sae_lens_writesae.steering import Target, token_id
from writesae.experiment.evaluation import Evaluation, Result, Scope, described
from writesae.experiment.generation import greedy_rows
from writesae.experiment.lab import EditedRows, Lab, Site, Trial
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
from writesae.verdict.finding import Against, Figure, Finding, Paired
from writesae.verdict.format import percent

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
    least: ClassVar[dict[str, int]] = {"pairs": 2, "prompt_tokens": 2}
    columns: ClassVar[dict[str, dict[str, str]]] = {
        "continuations": {
            "pair": "number of the prompt x target pair",
            "sequence": "row of the evaluation tokens that the prompt is taken from",
            "stratum": "stratum of the target",
            **described("token text"),
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

    def findings(self, result: Result) -> list[Finding]:
        """Claim 10 in the paper's stratum, then the same of the other strata; claim 25 over all of them."""
        by_paper = sorted(strata_of(result), key=lambda stratum: stratum != "100-1000")
        return [*(self._hits(result, stratum) for stratum in by_paper), self._ranks(result)]

    def _hits(self, result: Result, stratum: str) -> Finding:
        hits, table = hits_of(result, stratum, self.headline), result.tables["continuations"]
        rows = table.query("stratum == @stratum and condition == 'target' and m == @self.headline")
        moved = Paired(rows, seed=self.seed).mean("log_prob_change")
        gain = hits.mean("target", "nothing")
        finding = Finding(
            number=10 if stratum == "100-1000" else None,
            claim=f"installed writes put a token of stratum {stratum} into the continuation",
            effect=gain,
            what="the gain in hits over nothing",
            against=hits.beaten(
                "target",
                {"random": "a random direction of the same norm", "wrong": "a token that was not installed"},
            ),
            relevant=RELEVANT,
            shown={
                "installed": hits.mean("target"),
                "nothing": hits.mean("nothing"),
                "a random direction of the same norm": hits.mean("random"),
                "a token that was not installed": hits.mean("wrong"),
            },
            write=percent,
            axis=f"of continuations have the token at m = {self.headline:g}",
            measured=f"log-probability of the first token {moved} nats",
            controls=f"installed - nothing {gain}",
            of="prompt x target pairs",
        )
        if finding.verdict.outcome != "holds":
            return finding
        near = "as in the paper" if finding.shown["installed"].mean > 0.9 else "far from the paper's 100%"
        return replace(finding, remark=f"The rate is {near}.")

    def _ranks(self, result: Result) -> Finding:
        rows = result.tables["continuations"].query("m == @self.headline")
        rows = rows.assign(better=rows["edited_rank"] < rows["rank"], shift=rows["rank"] - rows["edited_rank"])
        better = Paired.of(rows, "better", "pair", seed=self.seed)
        target, random, lead = better["target"] > 0, better["random"] > 0, better.mean("target", "random")
        rival, shift = "a random direction of the same norm", rows.loc[rows["condition"] == "target", "shift"].median()
        return Finding(
            number=25,
            claim="installed writes improve the rank of their token",
            effect=better.mean(target),
            what="the share of improved ranks",
            against={rival: Against(lead)},
            chance=0.5,
            relevant=RELEVANT,
            shown={"installed": better.mean(target), rival: better.mean(random)},
            write=percent,
            axis=f"of pairs at m = {self.headline:g}",
            measured=f"median shift of the rank {shift:+,.0f}",
            controls=f"installed - random {lead}",
            of="prompt x target pairs in {} sequences",
        )

    def panels(self, result: Result) -> list[Figure]:
        """Hits by size, one figure for each stratum."""
        panels = []
        shown = {"nothing": "nothing", "random": "random direction", "wrong": "wrong target", "target": "installed"}
        colours = dict(zip(shown, ("muted", "soft", "control", "atom")))
        for stratum in strata_of(result):
            by_size = [hits_of(result, stratum, m) for m in self.sizes]
            lines = []
            for name, text in shown.items():
                rates = [hits.mean(name) for hits in by_size]
                band = ([r.low for r in rates], [r.high for r in rates]) if name == "target" else None
                lines.append(figures.Line(text, self.sizes, [r.mean for r in rates], colours[name], band))
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


def hits_of(result: Result, stratum: str, m: float) -> Paired:
    """By pair, whether the target is in the continuation under each condition at size m; `wrong`: whether the wrong
    target is there while the target is installed."""
    table = result.tables["continuations"]
    rows = table[(table["stratum"] == stratum) & ((table["m"] == m) | (table["condition"] == "nothing"))]
    installed = rows[rows["condition"] == "target"]
    rows = pd.concat([rows, installed.assign(condition="wrong", hit=installed["wrong_hit"])])
    wide = rows.pivot(index=["pair", "sequence"], columns="condition", values="hit").astype(bool)
    return Paired(wide.reset_index(), seed=result.evaluation.seed)


def _moved(rows: EditedRows) -> Mapping[str, NDArray[np.generic]]:
    return {**target_change(rows), **target_rank(rows)}
