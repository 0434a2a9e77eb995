"""Install a token: add writes toward it at the last tokens of a prompt; does it appear in the greedy continuation?

Source: WriteSAE (arXiv 2605.12770), the three-position install. The paper's rates are exact thirds of 300, that is, 100
units were counted three times; here the unit is an independent pair of a prompt and a target.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
import pandas as pd
import torch
from annotated_types import Ge, MinLen
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from sae_lens_writesae.atom.low_rank import LowRank
from sae_lens_writesae.steering import TargetToken, token_id, value_direction
from writesae.experiment.lab import Site, Trial
from writesae.experiment.tokens import token_text
from writesae.page.format import percent
from writesae_study.experiment.bench import Bench
from writesae_study.experiment.evaluation import Evaluation, Result, Scope, described
from writesae_study.experiment.generation import greedy_rows
from writesae_study.experiment.targets import Stratum, draw_target, random_unit, target_change
from writesae_study.verdict.finding import Against, Finding, Paired, with_interval
from writesae_study.verdict.notation import points

STRATA = (Stratum("frequent", 2, 10), Stratum("100-1000", 100, 1000), Stratum("rare", 1001))
"""Targets by their native rank at the end of the prompt; the second stratum is the paper's."""
RELEVANT = 0.1
"""Difference of hit rates that matters, and margin by which a control may be worse and still count as equal: the
paper's gain is 0.67 to 1, and 0.1 is 2 of the default 20 pairs."""


@dataclass(frozen=True, kw_only=True)
class Install(Evaluation):
    """At each of the last `n_positions` tokens t of a prompt the head also writes m |W_t| k_t w_T^T / |k_t|, where W_t
    is the native write and w_T = normalize(W_O^h W_U[T]). A **hit**: the target T is among the `new_tokens` greedy
    tokens. Targets are drawn from strata by their native rank at the end of the prompt.

    **Controls**, on the same prompt: nothing is written; a random value side of equal norm (does T appear?); a wrong
    target (does another token of the same stratum appear when T is installed?).

    **Verdict** of claim 10, in the stratum 100-1000 at the headline m (intervals over the prompts' sequences): the
    ladder of `judge` on the difference of hit rates, installed - nothing (chance 0, a difference matters from 0.1 on),
    against the random value side and the wrong target. The other strata are judged by the same rule. Claim 25, over all
    strata, as the paper pools them: the share of pairs whose target has a better rank at the first new token than
    without edits (chance 1/2, from 60% on it matters), against the same share under the random value side.
    """

    pairs: Annotated[int, Ge(2)] = 20
    """Prompt x target pairs in each stratum. Prompts are distinct windows of the sequences."""
    prompt_tokens: Annotated[int, Ge(2)] = 24
    """Length of a prompt."""
    n_positions: PositiveInt = 3
    """Consecutive positions that are written at: the last of the prompt."""
    sizes: Annotated[tuple[PositiveFloat, ...], MinLen(1)] = (1.5, 3.0, 6.0)
    """m: norm of what is added, in norms of the native write at the same position."""
    headline: float = 3.0
    """The m of the claim; one of `sizes`."""
    new_tokens: PositiveInt = 20
    """Greedy tokens in which the target is looked for."""
    semantic: tuple[TargetToken, ...] = ()
    """Tokens or strings (each one token) that mean something to you: one more stratum. Empty: left out."""

    scope: ClassVar[Scope] = Scope.HEAD
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

    def rules(self) -> dict[str, tuple[bool, str]]:
        return {
            "headline": (self.headline in self.sizes, f"one of sizes {self.sizes}"),
            "n_positions": (self.n_positions <= self.prompt_tokens, f"at most prompt_tokens ({self.prompt_tokens})"),
            "semantic": (len(self.semantic) != 1, "two tokens or more, because the others are the wrong targets"),
        }

    # -- measuring

    def measure(self, lab: Bench) -> dict[str, pd.DataFrame]:
        rng = lab.rng(2)
        # Which tokens are aimed at: the strata of native ranks, and tokens that a user named.
        strata = [*STRATA]
        if self.semantic:
            meant = tuple(token_id(lab.model, target) for target in self.semantic)
            strata.append(Stratum("semantic", among=meant))
        windows = self._prompt_windows(lab, len(strata), rng)
        tables, prompts, edits = [], [], []
        for n, (sequence, start) in enumerate(lab.bar(windows, self.kind)):
            stratum = strata[n % len(strata)]  # prompts go to the strata in turn
            span = slice(start, start + self.prompt_tokens)
            # The plain pass over the prompt alone: its last logits say the native ranks.
            site = lab.site(sequence, span=span)
            target = draw_target(lab.model, site.session.logits[0, -1], stratum, rng)
            if target is None:
                lab.skipped["pairs whose stratum is not in the vocabulary"] += 1
                continue
            row: dict[str, object] = {
                "pair": len(tables),
                "sequence": sequence,
                "stratum": stratum.name,
                "token": target.token,
                "text": token_text(lab.model, target.token),
                "rank": target.rank,
                "wrong": target.wrong,
            }
            # The two value sides that are written, the target's and a random one of the same norm.
            direction = value_direction(lab.model, lab.hook.layer, lab.hook.head, target.token)
            sides = {"target": direction, "random": random_unit(direction, lab.rng(3, len(tables)))}
            trials = self._install_trials(lab, site, row, sides)
            nothing = row | {"condition": "nothing", "m": 0.0, "log_prob_change": 0.0, "edited_rank": target.rank}
            edited = lab.read(site, trials, target_change, self.n_positions)
            tables.append(pd.concat([pd.DataFrame([nothing]), edited]))
            # Continuations of all prompts run together below, in the order of the rows.
            edits += [[], *(trial.edits for trial in trials)]
            prompts += [lab.tokens[sequence, span]] * (1 + len(trials))
        lab.require(bool(tables), f"no stratum has two tokens: the vocabulary has {lab.model.W_U.shape[1]}")
        lab.counts["runs"] = len(edits)  # a continuation and its first token are one condition
        # A continuation per row of the tables; what is in it is looked up below.
        new = greedy_rows(
            lab.model, torch.stack(prompts), edits, self.new_tokens, batch_size=self.rows_per_run, progress=lab.progress
        )
        table = pd.concat(tables, ignore_index=True)
        table = table.assign(
            hit=[token in row for token, row in zip(table["token"], new)],
            wrong_hit=[wrong in row for wrong, row in zip(table["wrong"], new)],
            first=[row.index(token) if token in row else -1 for token, row in zip(table["token"], new)],
        )
        return {"continuations": table}

    def _prompt_windows(self, lab: Bench, n_strata: int, rng: np.random.Generator) -> list[tuple[int, int]]:
        """Sequence and first token of each prompt, dealt over sequences."""
        n_sequences, length = lab.tokens.shape
        windows = []
        # One window of every sequence before a second of any: pairs of one sequence are not independent.
        for window in rng.permutation(length // self.prompt_tokens):
            for sequence in rng.permutation(n_sequences):
                windows.append((int(sequence), int(window) * self.prompt_tokens))
        needed = self.pairs * n_strata
        lab.require(
            len(windows) >= needed,
            f"{n_strata} strata x {self.pairs} pairs need {needed} prompts of {self.prompt_tokens} tokens, the text "
            f"gives {len(windows)}; give more sequences, or lower pairs",
        )
        return windows[:needed]

    def _install_trials(
        self, lab: Bench, site: Site, row: dict[str, object], sides: Mapping[str, Tensor]
    ) -> list[Trial]:
        """What is added to the last writes of a prompt: each value side [V] at each size."""
        first = self.prompt_tokens - self.n_positions
        norms = site.writes.norm()[:, None]
        keys = torch.nn.functional.normalize(site.writes.keys[:, 0], dim=-1)
        trials = []
        for m in self.sizes:
            for condition, value in sides.items():
                added = LowRank.rank_one(keys, m * norms * value.to(norms))
                edits = [lab.add(t, added, t) for t in range(first, self.prompt_tokens)]
                trials.append(Trial(row | {"condition": condition, "m": m}, first, edits))
        return trials

    # -- judging

    def findings(self, result: Result) -> list[Finding]:
        """Claim 10 in the paper's stratum, then the same of the other strata; claim 25 over all of them."""
        table = result.tables["continuations"]
        rows = table[table["m"].isin([0.0, self.headline])]
        papers_first = sorted(rows["stratum"].unique(), key=lambda stratum: stratum != "100-1000")
        of_strata = [self._hits_finding(stratum, rows[rows["stratum"] == stratum]) for stratum in papers_first]
        return [*of_strata, self._ranks_finding(rows)]

    def _hits_finding(self, stratum: str, rows: pd.DataFrame) -> Finding:
        """Whether the target is in the continuation; `wrong`: the wrong target, while the target is installed."""
        installed = rows[rows["condition"] == "target"]
        # The control `wrong` is the installed continuation, asked for another token.
        wrong = installed.assign(condition="wrong", hit=installed["wrong_hit"])
        wide = pd.concat([rows, wrong]).pivot(index=["pair", "sequence"], columns="condition", values="hit")
        hits = Paired(wide.astype(bool).reset_index(), seed=self.seed)
        gain = hits.mean("target", "nothing")
        moved = Paired(installed, seed=self.seed).mean("log_prob_change")
        controls = {"random": "a random direction of the same norm", "wrong": "a token that was not installed"}
        return Finding(
            number=10 if stratum == "100-1000" else None,
            claim=f"installed writes put a token of stratum {stratum} into the continuation",
            effect=gain,
            what="the gain in hits over nothing",
            null=controls["random"],
            against=hits.beaten("target", controls),
            relevant=RELEVANT,
            shown=hits.means({"target": "installed", "nothing": "nothing"} | controls),
            write=percent,
            axis=f"of continuations have the token at m = {self.headline:g}",
            measured=f"log-probability of the first token {with_interval(moved)} nats",
            controls=f"installed - nothing {with_interval(gain, points)} points",
            of="prompt x target pairs",
        )

    def _ranks_finding(self, rows: pd.DataFrame) -> Finding:
        ranks = rows.assign(better=rows["edited_rank"] < rows["rank"], shift=rows["rank"] - rows["edited_rank"])
        better = Paired.of(ranks, "better", "pair", seed=self.seed)
        target = better["target"] > 0
        random = better["random"] > 0
        lead = better.mean("target", "random")
        rival = "a random direction of the same norm"
        shift = ranks.loc[ranks["condition"] == "target", "shift"].median()
        return Finding(
            number=25,
            claim="installed writes improve the rank of their token",
            effect=better.mean(target),
            what="the share of improved ranks",
            null=rival,
            against={rival: Against(lead)},
            chance=0.5,
            relevant=RELEVANT,
            shown={"installed": better.mean(target), rival: better.mean(random)},
            write=percent,
            axis=f"of pairs at m = {self.headline:g}",
            measured=f"median shift of the rank {shift:+,.0f}",
            controls=f"installed - random {with_interval(lead, points)} points",
            of="prompt x target pairs in {} sequences",
        )
