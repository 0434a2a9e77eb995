"""Settings and result of the sign test (`sign`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from sae_lens_writesae.evaluation import Claim, Evaluation, Figure
from sae_lens_writesae.interventions import plots
from sae_lens_writesae.interventions.common import FLOOR, Estimate, check_at_least, estimate
from sae_lens_writesae.report_text import r_squared
from sae_lens_writesae.steering import Target
from sae_lens_writesae.verdict import statistics as stats
from sae_lens_writesae.verdict.judge import NO_DATA, too_few_wins

DIRECTIONS = ("direct", "gradient", "random", "wrong")


@dataclass(frozen=True)
class SignConfig:
    """What is written, where, and toward what."""

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
    rows_per_run: int = 256
    """Edited rows at once."""
    seed: int = 0
    """Of positions, targets and random directions."""
    label: str = ""
    """Name in reports."""

    def __post_init__(self) -> None:
        check_at_least(self, {"n_positions": 2, "first_position": 0, "rows_per_run": 1})
        object.__setattr__(self, "sizes", tuple(float(m) for m in self.sizes))
        object.__setattr__(self, "ranks", tuple((int(low), int(high)) for low, high in self.ranks))
        if not self.sizes or any(m <= 0 for m in self.sizes):
            raise ValueError(f"sizes are norms and positive, found {self.sizes}")
        object.__setattr__(self, "targets", tuple(self.targets))
        if len(self.targets) == 1:
            raise ValueError("targets needs at least two tokens: the other ones are the wrong targets")
        if not self.ranks or any(not 1 <= low <= high for low, high in self.ranks):
            raise ValueError(f"ranks are pairs 1 <= low <= high, found {self.ranks}")


class Sign(Evaluation):
    """Signs and sizes of a target's logit change after one added write, against what is predicted.

    Definition: at position t the head also writes +- m |W_t| k_t y^T / |k_t|; measured is the change of the logit of T
    at the first read of it (t, or t + 1 where the rule reads before it writes). Value sides y, all of norm 1:
    `direct` w_T = normalise(W_O^h^T W_U[T]); `gradient`, the gradient of the logit with respect to the head's read;
    and as controls `random`, and `wrong`, w of another token of the same ranks.

    Predictions: F0 = +- m |W_t| <k_t, q_t> <y, W_O^h^T W_U[T]>; F2 with the gradient in the last factor. The sign of
    F0 under `direct` is the sign of what is added times that of <k_t, q_t>; `as written` (the first alone) stands
    beside it. For `wrong` the sign that is checked is the one predicted for the token that was aimed at, not for T.

    Verdict of claim 9, over all direct writes (cluster bootstrap by sequence):
    1. "below the floor": the median size of the effect is below 1e-5.
    2. "inconclusive" with too little data (`verdict.judge`); else "fails":
       the interval of the share of right signs (F0) does not lie above 1/2.
    3. "confounded": writes toward another token do so as well: their share lies above 1/2, and the difference does not
       lie above 0.
    4. "holds" otherwise.
    """

    kind: ClassVar[str] = "sign"
    title: ClassVar[str] = "Does the sign of a write set the sign of its effect?"
    COLUMNS: ClassVar[dict[str, dict[str, str]]] = {
        "writes": {
            "sequence": "evaluation sequence",
            "position": "t",
            "token": "target T",
            "text": "T as text",
            "rank": "native rank of T at t, from 1",
            "direction": "direct, gradient, random, wrong",
            "m": "signed size, in norms of the native write",
            "measured": "change of the logit of T",
            "f0": "its prediction by F0 (the paper's)",
            "f2": "its prediction by F2",
            "aimed": "the sign that the write aims at by F0: for `wrong`, of the other token's logit",
        }
    }

    def _right(self, direction: str, by: str) -> pd.DataFrame:
        """Which writes moved T as predicted: columns right, sequence."""
        table: Any = self.tables["writes"]
        own = table[table["direction"] == direction]
        sign = np.sign(own["m"] if by == "written" else own[by])
        return pd.DataFrame({"right": np.sign(own["measured"]) == sign, "sequence": own["sequence"]})

    def rate(self, direction: str, by: str) -> stats.Rate:
        """Share of right signs; `by` is aimed, f0, f2 or written."""
        own: Any = self._right(direction, by)
        return stats.success_rate(own["right"], own["sequence"])

    def sizes(self) -> pd.DataFrame:
        """Per direction and |m|: the unfitted R2 and the correlation of measured with F0 and F2, and median size."""
        table: Any = self.tables["writes"]
        rows = []
        for (direction, m), own in table.assign(size=table["m"].abs()).groupby(["direction", "size"], sort=False):
            row = {"direction": direction, "m": m, "median": own["measured"].abs().median(), "n": len(own)}
            total = ((own["measured"] - own["measured"].mean()) ** 2).sum()
            for by in ("f0", "f2"):
                row[f"{by}_r2"] = 1 - ((own["measured"] - own[by]) ** 2).sum() / max(total, 1e-300)
                spread = own["measured"].std() * own[by].std()
                row[f"{by}_r"] = float(np.cov(own["measured"], own[by])[0, 1] / spread) if spread > 0 else 0.0
            rows.append(row)
        return pd.DataFrame(rows)

    def claims(self) -> list[Claim]:
        """Claim 9 by F0, and how far F2 predicts signs and sizes."""
        table: Any = self.tables["writes"]
        direct, wrong = self.rate("direct", "aimed"), self.rate("wrong", "aimed")
        written, random = self.rate("direct", "written"), self.rate("random", "f0")
        gap = self._gap()
        median = float(table[table["direction"] == "direct"]["measured"].abs().median())
        if median < FLOOR:
            outcome, why = "below the floor", f"The median effect is {median:.2g}, below {FLOOR:g}."
        elif too_few_wins(direct.n, direct.n_clusters, *direct.bootstrap):
            outcome, why = "inconclusive", NO_DATA
        elif not direct.bootstrap.low > 0.5:
            outcome, why = "fails", "The target's logit moves as predicted no more often than by chance."
        elif wrong.bootstrap.low > 0.5 and not gap.low > 0:
            outcome, why = "confounded", "A write toward another token moves the target's logit as reliably."
        else:
            outcome, why = "holds", "Signs are right, and more often than for writes toward another token."
        pairs = len(table[["sequence", "position", "token"]].drop_duplicates())
        n_sequences, each = table["sequence"].nunique(), table["m"].nunique()
        unit = f"position x target pairs in {n_sequences} sequences, {each} writes each"
        first = Claim(
            9,
            "the sign of a write is the sign of its effect",
            f"{_share(direct)} by F0 (with the sign of <k, q>); {_share(written)} by the sign that was written",
            pairs,
            unit,
            f"toward another token {_share(wrong)}, random direction {_share(random)} by F0",
            outcome,
            why,
        )
        f2 = self.rate("direct", "f2")
        small: Any = self.sizes()
        small = small[(small["direction"] == "direct") & (small["m"] == small["m"].min())].iloc[0]
        second = Claim(
            None,
            "all first-order paths together predict signs and sizes",
            f"{_share(f2)} of signs by F2; R² {r_squared(small['f2_r2'])} at m = {small['m']:g} "
            f"(F0: {r_squared(small['f0_r2'])})",
            pairs,
            unit,
            "F0, which leaves norms, gates and later layers out",
            "inconclusive"
            if too_few_wins(f2.n, f2.n_clusters, *f2.bootstrap)
            else "holds"
            if f2.bootstrap.low > 0.5 and small["f2_r2"] > 0.9
            else "fails",
            "Holds where F2's signs are above chance and its unfitted R² is above 0.9 at the smallest m.",
        )
        return [first, second]

    def _gap(self) -> Estimate:
        own, other = self._right("direct", "aimed"), self._right("wrong", "aimed")
        return estimate(own["right"].to_numpy(float) - other["right"].to_numpy(float), own["sequence"])

    def figures(self) -> list[Figure]:
        """Shares of right signs; predicted against measured."""
        kinds = [
            ("direct, by F0", self.rate("direct", "aimed"), "atom"),
            ("direct, as written", self.rate("direct", "written"), "atom"),
            ("gradient, by F2", self.rate("gradient", "f2"), "ink"),
            ("toward another token", self.rate("wrong", "aimed"), "rival"),
            ("random, by F0", self.rate("random", "f0"), "soft"),
        ]
        rows = [plots.Row(name, rate.rate, *rate.bootstrap, colour) for name, rate, colour in kinds]
        title = f"Right signs, sign test: {self.label}"
        svg = plots.interval_figure(rows, "right signs, % of writes", title, zero=0.5, percent=True)
        table: Any = self.tables["writes"]
        small = table[(table["direction"] == "direct") & (table["m"].abs() == table["m"].abs().min())]
        made = [Figure("Signs", svg, "95 % intervals by sequence. Dashed: chance.")]
        for by in ("f0", "f2"):
            labels = (f"predicted by {by.upper()}", "measured change of the logit")
            title = f"Sizes by {by}, sign test: {self.label}"
            svg = plots.scatter_figure(small[by], small["measured"], labels, title, size=6)
            made.append(Figure(f"Sizes, by {by.upper()}", svg, f"Direct writes of m = {small['m'].abs().min():g}."))
        return made


def _share(rate: stats.Rate) -> str:
    return f"{rate.rate:.1%} [{rate.bootstrap.low:.1%}, {rate.bootstrap.high:.1%}]"
