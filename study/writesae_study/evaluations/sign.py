"""The sign test: add a write toward a token at one position; does the token's logit move as the formulas say?

Source: WriteSAE (arXiv 2605.12770). The formulas F0 and F2 are those of `experiment.predictors`; no number in them is
fitted.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
import pandas as pd
import torch
from annotated_types import Ge, MinLen
from pydantic import NonNegativeInt, PositiveFloat

from sae_lens_writesae.atom.low_rank import LowRank
from sae_lens_writesae.steering import value_direction
from writesae.experiment.lab import Site, Trial
from writesae.experiment.tokens import token_text
from writesae.page.format import percent
from writesae_study.experiment.bench import Bench, trials_at
from writesae_study.experiment.evaluation import Evaluation, Result, Scope, described
from writesae_study.experiment.predictors import ReadGradients, predict
from writesae_study.experiment.targets import DrawnTarget, Stratum, draw_target, logit_noise, random_unit, target_change
from writesae_study.verdict.finding import Finding, Paired

VALUE_SIDES = ("direct", "gradient", "random", "wrong")
"""Value sides of the writes: two that aim at the target, and two controls."""

RELEVANT = 0.1
"""Distance of a share of right signs from 1/2 from which on it matters, and margin by which a control may be worse and
still count as equal. The paper's share is 0.35 above 1/2."""


@dataclass(frozen=True, kw_only=True)
class Sign(Evaluation):
    """At position t the head also writes +- m |W_t| k_t y^T / |k_t|, where W_t is the native write and y a value side
    of norm 1. Measured is the change of the logit of a target T at the first read of that write: at t, or at t + 1
    where the rule reads before it writes. The value sides are `direct`, w_T = normalize(W_O^h W_U[T]), and `gradient`,
    the gradient of the logit with respect to the head's read. The **nulls** are `random`, and `wrong`, w of another
    token of the same ranks; what is looked at under both is the sign of the change of T.

    **Predictions.** F0 = +- m |W_t| <k_t, q_t> <y, W_O^h W_U[T]> / |k_t|; F2 has the gradient in the last factor. The
    sign of F0 under `direct` is the sign of what is added times that of <k_t, q_t>.

    **Verdict** of claim 9, over all direct writes (intervals over sequences): the ladder of `judge` on the share of
    changes that have the sign that was written (chance 1/2, a share matters from 60% on), against both nulls. The share
    of F0's right signs is shown with it: it asks about the sign of <k_t, q_t>, too. The floor is what a no-op moves a
    logit by. How well F2 predicts sizes is asked by `logit_change`.
    """

    n_positions: Annotated[int, Ge(2)] = 96
    """Positions t, spread evenly over the sequences."""
    ranks: tuple[tuple[int, int], ...] = ((1, 10), (11, 100), (101, 1000))
    """One target is drawn at each position from each of these native ranks at t (from 1, both ends included)."""
    sizes: Annotated[tuple[PositiveFloat, ...], MinLen(1)] = (0.3, 1.0, 3.0)
    """m: norm of what is added, in norms of the native write; each with both signs."""
    first_position: NonNegativeInt = 8
    """Positions before this one are left out."""

    scope: ClassVar[Scope] = Scope.HEAD
    columns: ClassVar[dict[str, dict[str, str]]] = {
        "writes": described(
            "sequence position token text",
            rank="native rank of T at the read, from 1",
            direction="value side of the added write: direct, gradient, random, wrong",
            m="signed norm of what is added, in norms of the native write",
            measured="change of the logit of T",
            f0="the change that F0, the paper's formula, predicts",
            f2="the change that F2, all first-order paths, predicts",
            aimed="the sign that the write aims at by F0; for `wrong`, of the other token's logit",
        )
    }

    def rules(self) -> dict[str, tuple[bool, str]]:
        return {"ranks": (all(1 <= low <= high for low, high in self.ranks), "pairs 1 <= low <= high")}

    # -- measuring

    def measure(self, lab: Bench) -> dict[str, pd.DataFrame]:
        strata = [Stratum("", *ends) for ends in self.ranks]
        rng = lab.rng(4)
        n, length = lab.tokens.shape
        # Positions are dealt evenly over the sequences, at random in each.
        candidates = np.arange(self.first_position, length - 1)
        share = np.full(n, self.n_positions // n)  # as evenly spread over sequences as can be
        share[rng.permutation(n)[: self.n_positions % n]] += 1
        places_of = []
        for sequence, count in enumerate(share.clip(max=len(candidates))):
            drawn = np.sort(rng.choice(candidates, count, replace=False))
            places_of.append(pd.DataFrame({"sequence": sequence, "position": drawn}))
        places = pd.concat(places_of, ignore_index=True)
        tables = []
        for site in lab.sites(places, self.kind):
            positions = site.rows["position"].tolist()
            delay = int(site.recurrence.read_before_write)  # tokens until the first read of a write
            if "floor" not in lab.facts:
                lab.facts["floor"] = lab.floor(logit_noise, "logit", 1 + delay)
            reads = [t + delay for t in positions]
            # One forward with its graph for all positions of the sequence.
            gradients = ReadGradients(lab.model, site.session, lab.hook.layer, lab.hook.head, reads)
            sizes = site.at(positions).norm().tolist()
            written = [t for t, size in zip(positions, sizes) if size > 0]
            lab.skipped["positions with a zero write"] += len(positions) - len(written)
            for t in written:
                # By place: a position has the same targets whichever others are tested.
                rng = lab.rng(5, site.sequence, t)
                trials: list[Trial] = []
                for stratum in strata:
                    target = draw_target(lab.model, site.session.logits[0, t + delay], stratum, rng)
                    if target is None:
                        lab.skipped["targets whose ranks are not in the vocabulary"] += 1
                    else:
                        trials += self._signed_trials(lab, site, t, target, gradients, rng)
                if trials:  # position by position: the window is one or two tokens, and no other token need be run
                    tables.append(lab.read(site, trials, target_change, 1 + delay))
        lab.require(bool(tables), "no position could be written at")
        return {"writes": pd.concat(tables)}

    def _signed_trials(
        self, lab: Bench, site: Site, t: int, target: DrawnTarget, gradients: ReadGradients, rng: np.random.Generator
    ) -> list[Trial]:
        """The writes of every direction, size and sign toward one target at one position, with their predictions."""
        read = t + int(site.recurrence.read_before_write)
        of_target = gradients.at(read, target.token)
        of_wrong = gradients.at(read, target.wrong)
        direct = value_direction(lab.model, lab.hook.layer, lab.hook.head, target.token)
        sides = {
            "direct": direct,
            "gradient": torch.nn.functional.normalize(of_target.reads[-1], dim=0),
            "random": random_unit(direct, rng),
            "wrong": value_direction(lab.model, lab.hook.layer, lab.hook.head, target.wrong),
        }
        # Each value side at each size and with both signs, all as one batch of rank-1 matrices.
        kinds = [(name, sign * m) for name, m, sign in itertools.product(VALUE_SIDES, self.sizes, (1, -1))]
        size = site.at([t]).norm()
        key = torch.nn.functional.normalize(site.writes.keys[t, 0], dim=0)
        values = torch.stack([m * size * sides[name].to(key) for name, m in kinds])
        added = LowRank.rank_one(key.expand(len(values), -1), values)
        # F0 and F2 of the target, and F0 of the wrong target, which the write of that one aims at.
        for_target, for_wrong = predict(site.recurrence, added, t, [of_target, of_wrong]).mT.cpu().numpy()  # [P,N]
        f0, _, f2 = for_target
        rows = pd.DataFrame(kinds, columns=["direction", "m"])
        rows = rows.assign(
            sequence=site.sequence,
            position=t,
            token=target.token,
            rank=target.rank,
            text=token_text(lab.model, target.token),
            f0=f0,
            f2=f2,
            aimed=np.sign(np.where(rows["direction"] == "wrong", for_wrong[0], f0)),
        )
        return trials_at(rows, lab.add, added)

    # -- judging

    def findings(self, result: Result) -> list[Finding]:
        """Claim 9. Judged by the sign that was written: F0's right signs also ask about the sign of <k, q>."""
        writes = result.tables["writes"].assign(written=lambda table: table["m"])
        # Right signs: of what is written, of F0 (`aimed`) and of F2.
        sign = np.sign(writes["measured"])
        table = writes.assign(**{by: sign == np.sign(writes[by]) for by in ("aimed", "f2", "written")})
        by_direction = {direction: Paired(rows) for direction, rows in table.groupby("direction")}
        direct = by_direction["direct"]
        paired = Paired.of(table, "written", "sequence", "position", "token", "m", by="direction", seed=self.seed)
        rivals = {"wrong": "toward another token", "random": "random direction"}
        written = direct.mean("written")
        moved = writes.loc[writes["direction"] == "direct", "measured"]
        finding = Finding(
            number=9,
            claim="the sign of a write is the sign of its effect",
            effect=written,
            what="the share of right signs",
            null=rivals["random"],
            against=paired.beaten("direct", rivals),
            chance=0.5,
            relevant=RELEVANT,
            typical=float(moved.abs().median()),
            floor=result.fact("floor"),
            shown={
                "as written": written,
                **{shown: by_direction[name].mean("written") for name, shown in rivals.items()},
                "by F0": direct.mean("aimed"),
                "gradient, by F2": by_direction["gradient"].mean("f2"),
            },
            write=percent,
            axis="of signs as written (F0: times the sign of <k, q>)",
            n=len(table[["sequence", "position", "token"]].drop_duplicates()),
            of=f"position x target pairs in {{}} sequences, {table['m'].nunique()} writes each",
        )
        return [finding]
