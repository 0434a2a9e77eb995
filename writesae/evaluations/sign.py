"""The sign test: add a write toward a token at one position; does the token's logit move as the formulas say?

Source: WriteSAE (arXiv 2605.12770). The formulas F0 and F2 are those of `experiment.predictors`; no number in them is
fitted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from sae_lens_writesae.atom.low_rank import LowRank
from sae_lens_writesae.steering import Target, token_id
from writesae.experiment.evaluation import Evaluation, Result, Scope, described
from writesae.experiment.lab import Lab, Site, Trial
from writesae.experiment.predictors import ReadGradients, predict
from writesae.experiment.targets import (
    DrawnTarget,
    Stratum,
    draw_target,
    logit_noise,
    random_unit,
    target_change,
    token_directions,
)
from writesae.experiment.tokens import token_text
from writesae.verdict import figures
from writesae.verdict.finding import Against, Figure, Finding, Paired, said
from writesae.verdict.format import percent, r_squared
from writesae.verdict.judge import Verdict
from writesae.verdict.statistics import Estimate

DIRECTIONS = ("direct", "gradient", "random", "wrong")
"""Value sides of the writes: two that aim at the target, and two controls."""

RELEVANT = 0.1
"""Distance of a share of right signs from 1/2 from which on it matters, and margin by which a control may be worse and
still count as equal. The paper's share is 0.35 above 1/2."""

GOOD_FIT = 0.9
"""Unfitted R^2 from which on sizes count as predicted."""


@dataclass(frozen=True, kw_only=True)
class Sign(Evaluation):
    """At position t the head also writes +- m |W_t| k_t y^T / |k_t|, where W_t is the native write and y a value side
    of norm 1. Measured is the change of the logit of a target T at the first read of that write: at t, or at t + 1
    where the rule reads before it writes. The value sides are `direct`, w_T = normalise(W_O^h W_U[T]), and `gradient`,
    the gradient of the logit with respect to the head's read. The **controls** are `random`, and `wrong`, w of another
    token of the same ranks.

    **Predictions.** F0 = +- m |W_t| <k_t, q_t> <y, W_O^h W_U[T]> / |k_t|; F2 has the gradient in the last factor. The
    sign of F0 under `direct` is the sign of what is added times that of <k_t, q_t>; `as written` (the first alone)
    stands beside it. For `wrong`, the sign that is checked is the one predicted for the token that the write aims at,
    not for T.

    **Verdict** of claim 9, over all direct writes (intervals over sequences): the ladder of `judge` on the share of
    right signs by F0 (chance 1/2, a share matters from 60 % on), against writes toward another token, where their share
    lies above 1/2 by itself. The floor is what a no-op moves a logit by. The second claim asks the same of F2, and
    besides an unfitted R² above 0.9 at the smallest m.
    """

    n_positions: int = 96
    """Positions t, spread evenly over the sequences."""
    ranks: tuple[tuple[int, int], ...] = ((1, 10), (11, 100), (101, 1000))
    """One target is drawn at each position from each of these native ranks at t (from 1, both ends included)."""
    targets: tuple[Target, ...] = ()
    """Tokens (ids or strings, at least two) of which one is drawn at each position, instead of `ranks`."""
    sizes: tuple[float, ...] = (0.3, 1.0, 3.0)
    """m: norm of what is added, in norms of the native write; each with both signs."""
    first_position: int = 8
    """Positions before this one are left out."""

    kind: ClassVar[str] = "sign"
    question: ClassVar[str] = "Does the sign of a write set the sign of its effect?"
    answers: ClassVar[tuple[int, ...]] = (9,)
    scope: ClassVar[Scope] = Scope.HEAD
    least: ClassVar[dict[str, int]] = {"n_positions": 2, "first_position": 0}
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

    def __post_init__(self) -> None:
        object.__setattr__(self, "ranks", tuple((int(low), int(high)) for low, high in self.ranks))
        super().__post_init__()
        if not self.sizes or any(m <= 0 for m in self.sizes):
            raise ValueError(f"sizes are norms and positive, found {self.sizes}")
        if len(self.targets) == 1:
            raise ValueError("targets needs at least two tokens, because the other ones are the wrong targets; found 1")
        if not self.ranks or any(not 1 <= low <= high for low, high in self.ranks):
            raise ValueError(f"ranks are pairs 1 <= low <= high, found {self.ranks}")

    @property
    def shortest(self) -> int:
        return self.first_position + 2

    # -- measuring

    def measure(self, lab: Lab) -> dict[str, pd.DataFrame]:
        strata = [Stratum("", *ends) for ends in self.ranks]
        if self.targets:
            strata = [Stratum("", among=tuple(token_id(lab.model, target) for target in self.targets))]
        directions = token_directions(lab)
        tables = []
        for site in lab.sites(self._positions(lab), self.kind):
            positions, delay = site.rows["position"].tolist(), int(site.recurrence.read_before_write)
            if "floor" not in lab.facts:
                lab.facts["floor"] = lab.floor(logit_noise, "logit", 1 + delay)
            at = [t + delay for t in positions]
            gradients = ReadGradients(lab.model, site.session, lab.hook.layer, lab.hook.head, at)
            for t in positions:
                if float(site.writes.rows([t]).norm()) == 0:
                    lab.skipped["positions with a zero write"] += 1
                    continue
                rng = lab.rng(5, site.sequence, t)
                trials: list[Trial] = []
                for stratum in strata:
                    target = draw_target(lab.model, site.session.logits[0, t + delay], stratum, rng)
                    if target is None:
                        lab.skipped["targets whose ranks are not in the vocabulary"] += 1
                        continue
                    trials += self._trials(lab, site, t, target, gradients, directions, rng)
                if trials:  # position by position: the window is one or two tokens, and no other token need be run
                    tables.append(lab.read(site, trials, target_change, 1 + delay))
        lab.require(bool(tables), "no position could be written at")
        return {"writes": pd.concat(tables, ignore_index=True).rename(columns={"logit": "measured"})}

    def _positions(self, lab: Lab) -> pd.DataFrame:
        """Positions as evenly spread over sequences as can be, uniform within each."""
        rng = lab.rng(4)
        n, length = lab.tokens.shape
        candidates = np.arange(self.first_position, length - 1)
        share = np.full(n, self.n_positions // n)
        share[rng.permutation(n)[: self.n_positions % n]] += 1
        drawn = [np.sort(rng.choice(candidates, min(k, len(candidates)), replace=False)) for k in share]
        sequence = np.repeat(np.arange(n), [len(positions) for positions in drawn])
        return pd.DataFrame({"sequence": sequence, "position": np.concatenate(drawn)})

    def _trials(
        self,
        lab: Lab,
        site: Site,
        t: int,
        target: DrawnTarget,
        gradients: ReadGradients,
        directions: Callable[[int], Tensor],
        rng: np.random.Generator,
    ) -> list[Trial]:
        """The writes of every direction, size and sign toward one target at one position, with their predictions."""
        one_hot = torch.zeros_like(site.session.logits[0, 0])
        one_hot[target.token] = 1
        gradient = gradients.at(t + int(site.recurrence.read_before_write), one_hot)
        direct = directions(target.token)
        sides = {
            "direct": direct,
            "gradient": torch.nn.functional.normalize(gradient.reads[-1], dim=0),
            "random": random_unit(direct, rng),
            "wrong": directions(target.wrong),
        }
        size = site.writes.rows([t]).norm()
        signed = [sign * m for m in self.sizes for sign in (1, -1)]
        kinds = [(name, m) for name in DIRECTIONS for m in signed]
        key = torch.nn.functional.normalize(site.writes.keys[t, 0], dim=0)
        values = torch.stack([m * size * sides[name].to(key) for name, m in kinds])
        added = LowRank.rank_one(key.expand(len(values), -1), values)
        out = lab.model.layer_W_O(lab.hook.layer)[lab.hook.head]
        naive = torch.stack([out @ lab.model.W_U[:, token] for token in (target.token, target.wrong)])
        of_target, of_wrong = predict(site.recurrence, added, t, [gradient, gradient], naive)
        described = {
            "sequence": site.sequence,
            "position": t,
            "token": target.token,
            "text": token_text(lab.model, target.token),
            "rank": target.rank,
        }
        f0, f2, wrong = of_target.F0.tolist(), of_target.F2.tolist(), of_wrong.F0.tolist()
        trials = []
        for n, (direction, m) in enumerate(kinds):
            aimed = float(np.sign(wrong[n] if direction == "wrong" else f0[n]))
            row = described | {"direction": direction, "m": m, "f0": f0[n], "f2": f2[n], "aimed": aimed}
            trials.append(Trial(row, t, lab.add(t, added, n)))
        return trials

    # -- judging

    def findings(self, result: Result) -> list[Finding]:
        """Claim 9 by F0, and how far F2 predicts signs and sizes."""
        table, fits = signs(result), sizes(result).query("direction == 'direct'")
        of = f"position x target pairs in {{}} sequences, {table['m'].nunique()} writes each"
        names = {"aimed": "by F0", "written": "by the sign that was written", "f2": "by F2"}
        direct = {shown: right_signs(result, "direct", by) for by, shown in names.items()}
        wrong = right_signs(result, "wrong", "aimed")
        units = ("sequence", "position", "token", "m")
        gap = Paired.of(table, "aimed", *units, by="direction", seed=self.seed).mean("direct", "wrong")
        smallest = fits.nsmallest(1, "m").iloc[0]
        first = Finding(
            number=9,
            claim="the sign of a write is the sign of its effect",
            effect=direct["by F0"],
            what="the share of right signs",
            against={"writes toward another token": Against(gap, wrong)},
            chance=0.5,
            relevant=RELEVANT,
            typical=float(table.loc[table["direction"] == "direct", "measured"].abs().median()),
            floor=result.fact("floor"),
            shown={
                "by F0": direct["by F0"],
                "toward another token": wrong,
                "random direction": right_signs(result, "random", "f0"),
                "gradient, by F2": right_signs(result, "gradient", "f2"),
            },
            write=percent,
            axis="of signs by F0 (with the sign of <k, q>)",
            measured=f"{said(direct['by the sign that was written'], percent)} by the sign that was written",
            n=len(table[["sequence", "position", "token"]].drop_duplicates()),
            of=of,
        )
        poor = f"Signs are right, but the unfitted R² at the smallest m is not above {GOOD_FIT}."
        second = replace(
            first,
            number=None,
            claim="all first-order paths together predict signs and sizes",
            effect=direct["by F2"],
            what="the share of F2's right signs",
            against={},
            typical=float(smallest["median"]),
            unless=None if smallest["f2_r2"] > GOOD_FIT else Verdict("fails", poor),
            shown=dict(reversed(direct.items())),
            axis="of signs by F2",
            measured=f"R² {r_squared(smallest['f2_r2'])} at m = {smallest['m']:g} (F0: {r_squared(smallest['f0_r2'])})",
            controls="F0 leaves out norms, gates and later layers",
        )
        return [first, second]

    def panels(self, result: Result) -> list[Figure]:
        """Predicted against measured, at the smallest size."""
        table, panels = result.tables["writes"], []
        smallest = table["m"].abs().min()
        small = table[(table["direction"] == "direct") & (table["m"].abs() == smallest)]
        for by in ("f0", "f2"):
            labels = (f"predicted by {by.upper()}", "measured change of the logit")
            title = f"Sizes by {by}, sign test: {result.label}"
            svg = figures.scatter(small[by], small["measured"], labels, title, size=6)
            panels.append(Figure(f"Sizes, by {by.upper()}", svg, f"Direct writes of m = {smallest:g}."))
        return panels


def signs(result: Result) -> pd.DataFrame:
    """The table `writes`, where `aimed`, `f0`, `f2` and `written` (the sign of m) say whether that sign was right."""
    table = result.tables["writes"].assign(written=lambda t: t["m"])
    right = {by: np.sign(table["measured"]) == np.sign(table[by]) for by in ("aimed", "f0", "f2", "written")}
    return table.assign(**right)


def right_signs(result: Result, direction: str, by: str) -> Estimate:
    """Share of the writes of one direction that moved the target as a column of `signs` expects."""
    table = signs(result)
    return Paired(table[table["direction"] == direction]).mean(by)


def sizes(result: Result) -> pd.DataFrame:
    """For each direction and |m|: the unfitted R^2 of F0 and F2 (f0_r2, f2_r2), and the median size of the change."""
    rows, table = [], result.tables["writes"].assign(m=lambda t: t["m"].abs())
    for (direction, m), writes in table.groupby(["direction", "m"], sort=False):  # pyright: ignore
        measured = writes["measured"]
        total = max(float(((measured - measured.mean()) ** 2).sum()), 1e-300)
        r2 = {f"{by}_r2": 1 - float(((measured - writes[by]) ** 2).sum()) / total for by in ("f0", "f2")}
        rows.append({"direction": direction, "m": m, "median": measured.abs().median(), **r2})
    return pd.DataFrame(rows)
