"""Logit change: an atom is added to a write; formulas say what that does to later logits, and an edit shows it.

The formulas are in `experiment.predictors`, the scores in `verdict.fits`. Source: WriteSAE (arXiv 2605.12770), which
reports a median R^2 over cells, each with a fitted scale.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from sae_lens_writesae.atom.low_rank import LowRank
from writesae.experiment import logit_changes
from writesae.experiment.at_firings import OfFirings
from writesae.experiment.evaluation import Result
from writesae.experiment.lab import Lab, Site, Trial
from writesae.experiment.predictors import DEFINITIONS, PREDICTORS
from writesae.verdict import figures, fits
from writesae.verdict.finding import Against, Figure, Finding, Paired
from writesae.verdict.fits import ALL, CONTROL, varies
from writesae.verdict.format import r_squared
from writesae.verdict.judge import Verdict, judge

RankGroup = tuple[int, int]

SCORED = (*PREDICTORS, CONTROL)
"""What is scored: the formulas, and F2's prediction for another firing."""

BAR = {"F0": 0.5, "F1": 0.5, "F2": 0.95}
"""Unfitted R^2 at the smallest eps that each formula must exceed: half of the variance for those that leave paths out,
nearly all of it for the exact derivative."""
RELEVANT = {"F0": 0.1, "F1": 0.1, "F2": 0.04}
"""Distance above the bar from which on an R^2 matters: 0.6, 0.6 and 0.99. Also the margin by
which the shuffled predictions may be worse and still count as equal."""
PAPER_R2 = 0.9
"""Median R^2 with a scale for each cell beyond which the paper's statistic counts as reproduced (it reports 0.98)."""
BAR_HELD_OUT, RELEVANT_HELD_OUT = 0.9, 0.05
"""R^2 of F0 with one cross-fitted scale beyond which the rebuttal's number (0.97) counts as reproduced, and distance
above it that matters."""
REBUTTAL_POSITIONS = 5_000
"""Positions of the rebuttal's held-out test."""
LINEAR = ("F0", "F1")
"""Formulas that the linear predictor of Mamba-2 combines."""
ALIKE = 0.01
"""Two medians of R^2 that are nearer than this are the same."""

ZERO_WRITE = "the native write is zero, so that eps has no unit"
ZERO_ATOM = "the atom is zero and has no direction"
NO_CHANGE = "scores of groups in which no measured change differs from another"

_CLAIMS: dict[str, tuple[int | None, str]] = {
    "F0": (7, "a formula predicts the logit change (F0, the paper's)"),
    "F1": (None, "exact propagation and the direct path's own Jacobian predict it (F1)"),
    "F2": (None, f"all first-order paths predict it without a fitted number (F2), R² ≥ {BAR['F2']}"),
}
_COLOURS = {"F0": "control", "F1": "ink", "F2": "atom", CONTROL: "soft"}
_LOWEST = -0.25
"""An R^2 below this is drawn here."""


@dataclass(frozen=True, kw_only=True)
class LogitChange(OfFirings):
    """At a firing of atom i at token t, eps times A_i is added to the write, where eps = 1 is as large as the native
    write (or as the atom's own coefficient). The edit runs in closed loop. The change of the logits of chosen tokens at
    t + horizon is measured against a run without edits in the same batch, and predicted by three formulas without a
    fitted number:

    * F0 is the paper's: decay only (one number per head, or one per key channel and then inside the inner product), and
      the direct path by W_O and W_U as they are, without the norms between them.
    * F1 carries the key exactly and takes the direct path with its Jacobian.
    * F2 is the exact derivative, along all paths.

    The control is F2's prediction for another firing at the same horizon, rank group and eps: it has F2's distribution
    and knows nothing of the firing. A scale fitted to each cell makes R² over eps near 1 for any prediction that grows
    with eps, a wrong one too: it only says that the measured curve is straight, and is no evidence for a formula.

    **Verdict**, at the smallest eps, on raw logits, over all horizons and ranks: the ladder of `judge` on the unfitted
    R², against the R² of the control. The bar is 1/2 for F0 (claim 7) and F1, and 0.95 for F2; an R² that matters is
    0.6, 0.6 and 0.99. The median change must exceed what arithmetic alone moves.

    * F0 that fails is *confounded* where the paper's own statistic (median R² over eps, a scale fitted to each cell)
      lies above 0.9, and the control reaches the same within 0.01: that statistic then holds for any number.
    * F2 fails also where R² at one horizon, with changes above the floor, is below 0.95.
    * Claims 22 and 23 are the rebuttal's two numbers, by the same ladder. 22: R² of F0 with one scale, where each half
      of the sequences is scaled by the other half; the bar is 0.9. 23, on Mamba-2: R² of a linear predictor, least
      squares on F0 and F1 for each horizon, fitted on the other half; the bar is 1/2. In both the shuffled predictions
      get the same fit. For the rebuttal's size give firings enough for 5,000 positions (`n_atoms`, `firings_per_atom`).
    """

    n_atoms: int | None = 30
    """Atoms drawn uniformly from all alive atoms that can be tested. None: all of them."""
    firings_per_atom: int = 2
    """At most this many firings of an atom, dealt over sequences."""
    horizons: tuple[int, ...] = (0, 1, 4, 16)
    """Tokens after the write at which logits are predicted and measured."""
    ranks: tuple[RankGroup, ...] = ((1, 1), (2, 5), (50, 50))
    """Groups (lowest, highest) of the native rank of a predicted token; one token is drawn from each group."""
    eps: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0)
    """Sizes of what is added, in `unit`s."""
    unit: Literal["write", "coefficient"] = "write"
    """What eps counts: the Frobenius norm of the native write at t, or the atom's own coefficient there (activation
    times the atom's norm)."""

    kind: ClassVar[str] = "logit_change"
    question: ClassVar[str] = "Can a formula predict the change of a logit?"
    answers: ClassVar[tuple[int, ...]] = (7, 22, 23)
    columns: ClassVar[dict[str, dict[str, str]]] = {
        "cells": {
            "firing": "number of the firing: one atom at one token of one sequence",
            "sequence": "row of the evaluation tokens",
            "position": "token t, whose write is added to",
            "atom": "atom that is added",
            "unit": "Frobenius norm of what eps = 1 adds",
            "quantity": "logit (raw, not centred) or log_prob (nats)",
            "horizon": "tokens from the write to the prediction",
            "rank": "group of native ranks from which the token was drawn",
            "token": "id of the token that is predicted",
            "native_rank": "rank of that token in the unedited model, from 1",
            "eps": "size of what is added, in units",
            "measured": "change of the quantity in the edited model",
            **{name: f"predicted change, {DEFINITIONS[name]}" for name in PREDICTORS},
            CONTROL: "control: F2 of another firing at the same horizon, rank group and eps",
        },
        "scores": fits.SCORES,
        "per_cell": fits.PER_CELL,
    }

    def __post_init__(self) -> None:
        pairs = [(group, group) if isinstance(group, int) else tuple(group) for group in self.ranks]
        for name, values in {"horizons": self.horizons, "ranks": pairs, "eps": self.eps, "atoms": self.atoms}.items():
            object.__setattr__(self, name, None if values is None else tuple(sorted(values)))
        super().__post_init__()
        if not self.horizons or self.horizons[0] < 0:
            raise ValueError(f"horizons count tokens after the write, from 0 on; found {list(self.horizons)}")
        if len(self.eps) < 2 or self.eps[0] <= 0:
            raise ValueError(f"eps needs two or more sizes above 0, because R^2 is taken over them; found {self.eps}")
        if not self.ranks or any(not 1 <= low <= high for low, high in self.ranks):
            raise ValueError(f"ranks are pairs 1 <= lowest <= highest, found {list(self.ranks)}")

    @property
    def shortest(self) -> int:
        return self.first_position + max(self.horizons) + 1

    # -- measuring

    def measure(self, lab: Lab) -> dict[str, pd.DataFrame]:
        highest = max(high for _, high in self.ranks)
        if highest > lab.model.cfg.d_vocab:
            raise ValueError(
                f"ranks asks for rank {highest}, but the vocabulary has {lab.model.cfg.d_vocab} tokens; change ranks"
            )
        draw = self.drawn(lab, np.random.default_rng(self.seed), max(1, *self.horizons))
        path = logit_changes.direct_path(lab)
        parts = [self._sequence(lab, site, path) for site in lab.sites(draw.table, self.kind)]
        parts = [part for part in parts if len(part)]
        lab.require(
            len(parts) >= 2,
            f"firings that could be measured lie in {len(parts)} sequence(s), and intervals need two or more: give "
            "more sequences, or more atoms",
        )
        cells = fits.with_control(pd.concat(parts, ignore_index=True), "F2", self.seed)
        scores = fits.scores_table(cells, SCORED, self.seed)
        if (unscored := len(SCORED) * sum(1 for _ in fits.groups_of(cells)) - len(scores)) > 0:
            lab.skipped[NO_CHANGE] += unscored
        once = cells[(cells["quantity"] == "logit") & (cells["eps"] == self.eps[0])]
        lab.facts |= {
            "n_firings": int(cells["firing"].nunique()),
            "n_atoms": int(cells["atom"].nunique()),
            "floor": float(np.quantile(once["floor"].to_numpy(float), 0.95)),
        }
        return {"cells": cells, "scores": scores, "per_cell": fits.per_cell_table(cells, SCORED, self.seed)}

    def _sequence(self, lab: Lab, site: Site, path: Tensor) -> pd.DataFrame:
        """The cells of one sequence: one row per quantity, firing, eps, horizon and rank group."""
        firings, added = self._added(lab, site)
        if firings.empty:
            return pd.DataFrame()
        starts = firings["position"].tolist()
        rng = lab.rng(site.sequence)
        targets = logit_changes.choose_targets(site.session.logits[0], starts, self.horizons, self.ranks, rng)
        trials = [
            Trial({"index": i, "eps": size}, start, lab.add(start, added.rows([i]) * size))
            for i, start in enumerate(starts)
            for size in self.eps
        ]
        runs = lab.read(site, trials, logit_changes.measured_changes(targets), max(self.horizons) + 1, plain=True)
        slopes_of = logit_changes.predicted_changes(lab, site, path, starts, added, targets)
        i, e, z, g = (n.ravel() for n in np.indices((len(starts), len(self.eps), *targets.tokens.shape[1:])))
        eps = np.array(self.eps)[e]
        described = firings.iloc[i].reset_index(drop=True)
        described = described.assign(
            horizon=np.array(self.horizons)[z],
            rank=np.array([logit_changes.rank_name(group) for group in self.ranks])[g],
            token=targets.tokens[i, z, g],
            native_rank=targets.ranks[i, z, g],
            eps=eps,
            floor=np.stack(runs["floor"].tolist()).ravel(),
        )
        frames = []
        for quantity, slopes in slopes_of.items():
            predicted = {name: eps * slopes[i, z, g, p] for p, name in enumerate(PREDICTORS)}
            measured = np.stack(runs[quantity].tolist()).ravel()
            frames.append(described.assign(quantity=quantity, measured=measured, **predicted))
        return pd.concat(frames, ignore_index=True)

    def _added(self, lab: Lab, site: Site) -> tuple[pd.DataFrame, LowRank]:
        """The firings of a sequence that have a unit and a direction, and what eps = 1 adds at each."""
        native = site.at(site.rows["position"].tolist())
        atom = lab.atoms(site.rows["written_atom"].to_numpy()).to(native.values)
        size, activation = atom.norm(), torch.tensor(site.rows["activation"].to_numpy()).to(native.values)
        unit = native.norm() if self.unit == "write" else activation * size
        for reason, where in ((ZERO_ATOM, size == 0), (ZERO_WRITE, (unit == 0) & (size > 0))):
            if bool(where.any()):
                lab.skipped[reason] += int(where.sum())
        usable = (size > 0) & (unit != 0)
        added = (atom * (unit / size.clamp_min(torch.finfo(size.dtype).tiny))).rows(usable)
        firings = site.rows.loc[usable.cpu().numpy(), ["firing", "sequence", "position", "atom"]]
        return firings.assign(unit=added.norm().cpu().numpy().astype(float)), added

    # -- judging

    @property
    def smallest(self) -> float:
        """The smallest eps, at which claims are judged."""
        return min(self.eps)

    def findings(self, result: Result) -> list[Finding]:
        """Claim 7 for the paper's formula, whether F1 and F2 predict the change, and the rebuttal's two numbers."""
        rows = self._smallest_rows(result)
        of = f"logits (firing, horizon, token) in {rows['sequence'].nunique()} sequences, eps {self.smallest:g}"
        if not varies(rows):
            ruled = Verdict("below the floor", "No logit changed at the smallest eps, so there is nothing to predict.")
            named = ((number, claim) for number, claim in _CLAIMS.values())
            return [
                Finding(number=number, claim=claim, ruled=ruled, measured="–", n=len(rows), of=of)
                for number, claim in named
            ]
        unfitted = {name: self._predicted(result, rows, name, rows[name], rows[CONTROL]) for name in _CLAIMS}
        found = [
            replace(finding, number=_CLAIMS[name][0], claim=_CLAIMS[name][1], axis="R² unfitted", of=of)
            for name, finding in unfitted.items()
        ]
        found[0] = self._paper(result, found[0])
        found[2] = self._every_horizon(result, rows, found[2])
        measured, sequence = rows["measured"].to_numpy(float), rows["sequence"]
        scaled = [fits.one_scale(measured, rows[name].to_numpy(float), sequence).predicted for name in ("F0", CONTROL)]
        kinds = [(22, "F0 with one scale, held out", scaled, BAR_HELD_OUT, RELEVANT_HELD_OUT)]
        if result.info["rule"] == "Mamba-2":
            linear = [
                fits.linear_fit(measured, rows[list(names)].to_numpy(float), sequence, rows["horizon"])
                for names in (LINEAR, (CONTROL,))
            ]
            what = "a linear predictor (F0 and F1 by horizon), held out"
            kinds.append((23, what, linear, BAR["F0"], RELEVANT["F0"]))
        n_positions = len(rows[["sequence", "position"]].drop_duplicates())
        size = "" if n_positions >= REBUTTAL_POSITIONS else f" of the rebuttal's {REBUTTAL_POSITIONS:,}"
        for number, what, (predicted, control), bar, relevant in kinds:
            held_out = self._predicted(result, rows, "F0", predicted, control)
            claim, axis = f"the logit change on held-out sequences: {what}", f"R² at {n_positions:,}{size} positions"
            named = {"number": number, "claim": claim, "what": f"the R² of {what}", "axis": axis, "of": of}
            found.append(replace(held_out, **named, chance=bar, relevant=relevant))
        return found

    def _predicted(
        self, result: Result, rows: pd.DataFrame, name: str, predicted: ArrayLike, control: ArrayLike
    ) -> Finding:
        """R² of a prediction of the measured changes, against that of the control."""
        data = (rows["measured"], rows["sequence"])
        own, rival, lead = (
            fits.r2_estimate(data[0], each, data[1], rival=other, seed=self.seed)
            for each, other in ((predicted, None), (control, None), (predicted, control))
        )
        return Finding(
            claim="",
            effect=own,
            what=f"the unfitted R² of {name}",
            against={"F2 shuffled between firings": Against(lead)},
            typical=float(rows["measured"].abs().median()),
            floor=result.fact("floor"),
            chance=BAR[name],
            relevant=RELEVANT[name],
            shown={name: own, "F2 shuffled between firings": rival},
            write=r_squared,
            least=_LOWEST,
        )

    def _paper(self, result: Result, unfitted: Finding) -> Finding:
        """Claim 7, with the paper's own statistic, which may be what any prediction reaches."""
        scale = r_squared(fits.score(result.tables["scores"], "F0", eps=self.smallest)["r2_global_scale"])
        table = result.tables["per_cell"].query("quantity == 'logit'").set_index("predictor")["median_r2"]
        real, control = (r_squared(float(table.get(name, math.nan))) for name in ("F0", CONTROL))
        measured = f"{scale} with one scale for all; {real} (median) with a scale per cell"
        measured += " (Mamba-2; the paper reports -0.07 there)" * (result.info["rule"] == "Mamba-2")
        controls = f"shuffled, with a scale per cell {control}"
        unfitted = replace(unfitted, measured=measured, controls=controls)
        own, shuffled = (fits.cell_r2(result.tables["cells"], name) for name in ("F0", CONTROL))
        if unfitted.verdict.outcome != "fails" or own.empty:
            return unfitted
        # Both fits are the best line through 0; rounding must not decide which of them is better.
        cells = Paired(own.assign(shuffled=shuffled["r2"], lead=(own["r2"] - shuffled["r2"]).round(9)), seed=self.seed)
        against = {CONTROL: Against(cells.median("lead"), cells.median("shuffled"))}
        fitted = judge(cells.median("r2"), against, chance=PAPER_R2, relevant=ALIKE)
        if fitted.outcome != "confounded":
            return unfitted
        sentence = (
            "With a scale fitted per cell the paper's number is reached, but predictions shuffled between firings "
            f"reach {r_squared(float(shuffled['r2'].median()))} as well. {unfitted.verdict.sentence}"
        )
        return replace(unfitted, ruled=Verdict("confounded", sentence, ("F2 shuffled between firings",)))

    def _every_horizon(self, result: Result, rows: pd.DataFrame, finding: Finding) -> Finding:
        """The finding on F2, which must predict every horizon with changes above the floor."""
        typical, verdict = rows["measured"].abs().groupby(rows["horizon"]).median(), finding.verdict
        scores = result.tables["scores"]
        seen = typical[typical > result.fact("floor")].index.tolist()
        horizons = {int(h): float(fits.score(scores, "F2", horizon=h, eps=self.smallest)["r2"]) for h in seen}
        worst = min(horizons, key=lambda h: horizons[h], default=None)
        if worst is None or verdict.outcome not in ("holds", "fails"):
            return finding
        sentence = f"{verdict.sentence} R² is lowest at horizon {worst}: {horizons[worst]:.4f}."
        if verdict.outcome == "holds" and horizons[worst] >= BAR["F2"]:
            return replace(finding, ruled=Verdict("holds", sentence))
        order = fits.error_order(result.tables["cells"])
        cause = "the model is curved here" if order > 1.5 else "arithmetic, not curvature; use float32 or float64"
        return replace(finding, ruled=Verdict("fails", f"{sentence} Its error grows as eps^{order:.2f}: {cause}."))

    def _smallest_rows(self, result: Result) -> pd.DataFrame:
        """Cells of logits at the smallest eps."""
        cells = result.tables["cells"]
        return cells[(cells["quantity"] == "logit") & (cells["eps"] == self.smallest)]

    def panels(self, result: Result) -> list[Figure]:
        """Predicted against measured for each formula; R^2 by horizon and by eps."""
        rows, name, panels = self._smallest_rows(result), result.label, []
        if not varies(rows):
            return []
        for formula in PREDICTORS:
            labels = ("predicted change of the logit", "measured")
            title = f"{formula}, predicted against measured logit changes at eps {self.smallest:g}: {name}"
            colour = _COLOURS[formula]
            svg = figures.scatter(rows[formula], rows["measured"], labels, title, colour=colour, size=7, symlog=True)
            panels.append(Figure(f"{formula}: predicted and measured", svg, DEFINITIONS[formula]))
        scores = result.tables["scores"]
        logits = scores[(scores["quantity"] == "logit") & (scores["rank"] == ALL) & (scores["horizon"] != ALL)]
        here, full = logits[logits["eps"] == f"{self.smallest:g}"], logits[logits["predictor"] == "F2"]
        of_formula = [(f, here[here["predictor"] == f], _COLOURS[f]) for f in PREDICTORS]
        of_horizon = [
            (f"t + {h}", full[(full["horizon"] == f"{h:g}") & (full["eps"] != ALL)], "atom") for h in self.horizons
        ]
        for title, axis, label, parts in (
            ("R² by horizon", "horizon", "tokens from the write to the prediction", of_formula),
            ("F2 by size of the edit", "eps", "eps", of_horizon),
        ):
            lines = []
            for text, part, colour in parts:
                x = part[axis].astype(float).sort_values()
                if len(x):
                    lines.append(figures.Line(text, x.tolist(), part.loc[x.index, "r2"].tolist(), colour))
            svg = figures.curves(lines, label, f"{title}, logits: {name}", even=True, chance=0.0, lowest=_LOWEST)
            panels.append(Figure(title, svg, f"Unfitted; values below {_LOWEST} are drawn there."))
        return panels

    def notes(self, result: Result) -> list[str]:
        """What eps counts, where F2 holds, and what a fitted scale hides."""
        if not varies(self._smallest_rows(result)):
            return []
        scores, order = result.tables["scores"], fits.error_order(result.tables["cells"])
        full = fits.score(scores, "F2", eps=self.smallest)["r2"]
        probability = fits.score(scores, "F2", quantity="log_prob", eps=self.smallest)["r2"]
        reached = [f"{eps:g}" for eps in self.eps if fits.score(scores, "F2", eps=eps)["r2"] >= BAR["F2"]]
        small, large = self.eps[:2]
        unit = {"write": "the norm of the native write", "coefficient": "the atom's own coefficient at the firing"}
        return [
            f"What is added is eps times the atom's direction; eps counts {unit[self.unit]}.",
            "Logits are raw, not centred. The softmax ignores a shift common to all tokens; on log-probabilities F2's "
            f"R² is {probability:.4f} (logits: {full:.4f}) at eps {self.smallest:g}.",
            f"F2 reaches R² {BAR['F2']} at eps {', '.join(reached) or 'none of those tried'}. Its error grows as "
            f"eps^{order:.2f} from {small:g} to {large:g}; 2 says that what it misses is curvature, less "
            "that it is arithmetic.",
            "With a scale fitted to each cell, any prediction that grows with eps has an R² near 1.",
            "Floor: a run without an edit, in the batch of the edited ones, differs from the plain pass by up to "
            f"{result.info['floor']:.1e} (95% of logits).",
        ]
