"""Logit change: an atom is added to a write; formulas say what that does to later logits, and an edit shows it.

The formulas are in `experiment.predictors`, the fits in `verdict.fits`. Source: WriteSAE (arXiv 2605.12770), which
reports a median R^2 over cells, each with a fitted scale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, ClassVar

import numpy as np
import pandas as pd
import torch
from annotated_types import MinLen
from numpy.typing import ArrayLike, NDArray
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from sklearn.metrics import r2_score

from sae_lens_writesae.atom.low_rank import LowRank
from writesae.dictionary.estimates import Estimate
from writesae.experiment.firings import Integers
from writesae.experiment.lab import EditedRows, Readout, Site, Trial
from writesae_study.experiment.at_firings import OfFirings
from writesae_study.experiment.bench import Bench
from writesae_study.experiment.evaluation import Result
from writesae_study.experiment.predictors import FORMULAS, PREDICTORS, ReadGradients, predict
from writesae_study.verdict import fits
from writesae_study.verdict.finding import Against, Finding, Paired
from writesae_study.verdict.fits import CONTROL_COLUMN
from writesae_study.verdict.judge import Verdict, judge
from writesae_study.verdict.notation import r_squared

BAR = {"F0": 0.5, "F1": 0.5, "F2": 0.95, "one scale": 0.9, "linear": 0.5}
"""R^2 at the smallest eps that each prediction must exceed: half of the variance for formulas that leave paths out,
nearly all of it for the exact derivative; 0.9 for F0 with one cross-fitted scale (the rebuttal reports 0.97)."""
RELEVANT_R2 = {"F0": 0.1, "F1": 0.1, "F2": 0.04, "one scale": 0.05, "linear": 0.1}
"""Distance above the bar from which on an R^2 matters. Also the margin by which the shuffled predictions may be worse
and still count as equal."""
PAPER_R2 = 0.9
"""Median R^2 with a scale for each cell beyond which the paper's statistic counts as reproduced (it reports 0.98)."""
REBUTTAL_POSITIONS = 5_000
"""Positions of the rebuttal's held-out test."""

ALIKE = 0.01
"""Two medians of R^2 that are nearer than this are the same."""

CLAIMS: dict[str, tuple[int | None, str]] = {
    "F0": (7, "a formula predicts the logit change (F0, the paper's)"),
    "F1": (None, "exact propagation and the direct path's own Jacobian predict it (F1)"),
    "F2": (None, f"all first-order paths predict it without a fitted number (F2), R² ≥ {BAR['F2']}"),
    "one scale": (22, "the logit change on held-out sequences: F0 with one scale, held out"),
    "linear": (23, "the logit change on held-out sequences: a linear predictor (F0 and F1 by horizon), held out"),
}
"""Number and words of the claim on each prediction."""
SHUFFLED = "F2 shuffled between firings"
"""The control, as a reader should see it."""


@dataclass(frozen=True, kw_only=True)
class LogitChange(OfFirings):
    """At a firing of atom i at token t, eps times A_i is added to the write, where eps = 1 is as large as the native
    write. The edit runs in closed loop. The change of the logits of chosen tokens at
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
      exceeds 0.9, and the control reaches the same within 0.01: that statistic then holds for any number.
    * F2 fails also where R² at one horizon, with changes above the floor, is below 0.95.
    * Claims 22 and 23 are the rebuttal's two numbers, by the same ladder. 22: R² of F0 with one scale, where each half
      of the sequences is scaled by the other half; the bar is 0.9. 23, on Mamba-2: R² of a linear predictor, least
      squares on F0 and F1 for each horizon, fitted on the other half; the bar is 1/2. In both the shuffled predictions
      get the same fit. For the rebuttal's size give firings enough for 5,000 positions (`n_atoms`, `firings_per_atom`).
    """

    n_atoms: PositiveInt | None = 30
    """Atoms drawn uniformly from all alive atoms that can be tested. None: all of them."""
    firings_per_atom: PositiveInt = 2
    """At most this many firings of an atom, dealt over sequences."""
    horizons: tuple[NonNegativeInt, ...] = (0, 1, 4, 16)
    """Tokens after the write at which logits are predicted and measured."""
    ranks: tuple[tuple[int, int], ...] = ((1, 1), (2, 5), (50, 50))
    """Groups (lowest, highest) of the native rank of a predicted token; one token is drawn from each group."""
    eps: Annotated[tuple[PositiveFloat, ...], MinLen(2)] = (0.1, 0.3, 1.0, 3.0)
    """Sizes of what is added, in Frobenius norms of the native write at t; two or more, as R² is taken over them."""

    columns: ClassVar[dict[str, dict[str, str]]] = {
        "cells": {
            "firing": "number of the firing: one atom at one token of one sequence",
            "sequence": "row of the evaluation tokens",
            "position": "token t, whose write is added to",
            "atom": "atom that is added",
            "horizon": "tokens from the write to the prediction",
            "rank": "group of native ranks from which the token was drawn",
            "token": "id of the token that is predicted",
            "eps": "size of what is added, in units",
            "measured": "change of the logit (raw, not centered) in the edited model",
            **{name: f"predicted change, {FORMULAS[name]}" for name in PREDICTORS},
            CONTROL_COLUMN: "control: F2 of another firing at the same horizon, rank group and eps",
        },
    }

    def rules(self) -> dict[str, tuple[bool, str]]:
        return {"ranks": (all(1 <= low <= high for low, high in self.ranks), "pairs 1 <= lowest <= highest")}

    @property
    def shortest(self) -> int:
        return self.first_position + max(self.horizons) + 1

    # -- measuring

    def measure(self, lab: Bench) -> dict[str, pd.DataFrame]:
        """Cost: for each firing one edited row for each eps, and one backward pass for each horizon and rank group."""
        highest = max(high for _, high in self.ranks)
        d_vocab = lab.model.cfg.d_vocab
        if highest > d_vocab:
            raise ValueError(f"ranks asks for rank {highest}, but the vocabulary has {d_vocab} tokens; change ranks")
        draw = self.drawn(lab, max(1, *self.horizons))
        measured = [self._sequence_cells(lab, site) for site in lab.sites(draw.table, self.kind)]
        parts = [part for part in measured if len(part)]
        lab.require(
            len(parts) >= 2,
            f"firings that could be measured lie in {len(parts)} sequence(s), and intervals need two or more: give "
            "more sequences, or more atoms",
        )
        cells = fits.with_control(pd.concat(parts, ignore_index=True), "F2", self.seed)
        smallest = cells[cells["eps"] == min(self.eps)]
        lab.require(smallest["measured"].nunique() > 1, "no logit changes at the smallest eps; give larger ones")
        lab.facts["floor"] = float(smallest["floor"].quantile(0.95))
        return {"cells": cells}

    def _sequence_cells(self, lab: Bench, site: Site) -> pd.DataFrame:
        """The cells of one sequence. Axes: I firings, E sizes, Z horizons, G rank groups."""
        firings, added = self._added_directions(lab, site)
        if firings.empty:
            return pd.DataFrame()
        starts = firings["position"].tolist()
        positions = np.array(starts)[:, None] + np.array(self.horizons)  # [I,Z]
        low, high = np.array(self.ranks).T
        # A token of each rank group at each position, by the native logits there.
        ranks = lab.rng(site.sequence).integers(low, high + 1, (*positions.shape, len(low)))  # [I,Z,G]
        best = site.session.logits[0].topk(int(high.max())).indices.cpu().numpy()
        tokens = best[positions[..., None], ranks - 1]  # ranks count from 1
        # The measured change: an edited run for each firing and size.
        trials = []
        for i, start in enumerate(starts):
            for size in self.eps:
                trials.append(Trial({"index": i}, start, lab.add(start, added.rows([i]) * size)))
        changes = _change_readout(positions, tokens)
        runs = lab.read(site, trials, changes, max(self.horizons) + 1, plain=True)
        slopes = _predicted_slopes(lab, site, added, starts, positions, tokens)
        # One row for each firing, size, horizon and rank group.
        cells = np.indices((len(starts), len(self.eps), *tokens.shape[1:]))
        i, e, z, g = cells.reshape(4, -1)
        names = np.array([str(low) if low == high else f"{low}-{high}" for low, high in self.ranks])
        eps = np.array(self.eps)[e]
        return firings.iloc[i].assign(
            horizon=np.array(self.horizons)[z],
            rank=names[g],
            token=tokens[i, z, g],
            eps=eps,
            measured=np.stack(runs["measured"].tolist()).ravel(),
            floor=np.stack(runs["floor"].tolist()).ravel(),
            **{name: eps * slopes[i, z, g, p] for p, name in enumerate(PREDICTORS)},
        )

    def _added_directions(self, lab: Bench, site: Site) -> tuple[pd.DataFrame, LowRank]:
        """The firings of a sequence that have a unit and a direction, and what eps = 1 adds at each."""
        native = site.at(site.rows["position"].tolist())
        atom = lab.atoms(site.rows["written_atom"].to_numpy()).to(native.values)
        size = atom.norm()
        unit = native.norm()
        usable = (size > 0) & (unit != 0)
        lab.skipped["the atom or the native write is zero, so that eps has no unit"] += int((~usable).sum())
        smallest = torch.finfo(size.dtype).tiny  # where the size is 0; such rows are dropped
        added = (atom * (unit / size.clamp_min(smallest))).rows(usable)
        return site.rows.loc[usable.cpu().numpy(), ["firing", "sequence", "position", "atom"]], added

    # -- judging

    def findings(self, result: Result) -> list[Finding]:
        """Claim 7 for the paper's formula, whether F1 and F2 predict the change, and the rebuttal's two numbers."""
        cells = result.tables["cells"]
        rows = cells[cells["eps"] == min(self.eps)]

        def fitted(names: Sequence[str], groups: pd.Series | None = None) -> ArrayLike:
            """Predictions by columns whose coefficients come from the other half of the sequences."""
            measured = rows["measured"].to_numpy(float)
            return fits.cross_fitted(measured, rows[list(names)].to_numpy(float), rows["sequence"], groups)

        # Of each prediction also what the control gets by the same fit.
        predictions: dict[str, tuple[ArrayLike, ArrayLike]] = {}
        for name in PREDICTORS:
            predictions[name] = (rows[name], rows[CONTROL_COLUMN])
        predictions["one scale"] = (fitted(["F0"]), fitted([CONTROL_COLUMN]))
        if result.info["rule"] == "Mamba-2":
            horizon = rows["horizon"]
            predictions["linear"] = (fitted(["F0", "F1"], horizon), fitted([CONTROL_COLUMN], horizon))
        n_positions = len(rows[["sequence", "position"]].drop_duplicates())
        size = "" if n_positions >= REBUTTAL_POSITIONS else f" of the rebuttal's {REBUTTAL_POSITIONS:,}"
        by_name: dict[str, Finding] = {}
        for name, (predicted, control) in predictions.items():
            axis = "R² unfitted" if name in PREDICTORS else f"R² at {n_positions:,}{size} positions"
            by_name[name] = self._prediction_finding(result, name, rows, predicted, control, axis)
        low = self._low_horizon(rows, result.fact("floor"))
        if low is not None:
            by_name["F2"] = replace(by_name["F2"], unless=low)
        one_scale = by_name["one scale"].shown["one scale"]
        by_name["F0"] = self._paper_finding(result, by_name["F0"], one_scale)
        return list(by_name.values())

    def _low_horizon(self, rows: pd.DataFrame, floor: float) -> Verdict | None:
        """The verdict of F2 where it misses its bar at one horizon whose changes exceed the floor."""
        typical = rows["measured"].abs().groupby(rows["horizon"]).transform("median")
        by_horizon = {}
        for horizon, part in rows[typical > floor].groupby("horizon"):
            by_horizon[horizon] = r2_score(part["measured"], part["F2"])
        worst = min(by_horizon, key=lambda horizon: by_horizon[horizon], default=None)
        if worst is None or by_horizon[worst] >= BAR["F2"]:
            return None
        return Verdict("fails", f"R² is {by_horizon[worst]:.4f} at horizon {worst}, and exceeds the bar over all.")

    def _prediction_finding(
        self, result: Result, name: str, rows: pd.DataFrame, predicted: ArrayLike, control: ArrayLike, axis: str
    ) -> Finding:
        """Whether a prediction of the changes of some rows is right, compared with one that is shuffled."""
        sequence = rows["sequence"]
        r2 = partial(fits.r2_estimate, rows["measured"].to_numpy(float), seed=self.seed)
        effect = r2(predicted, sequence)
        number, claim = CLAIMS[name]
        return Finding(
            number=number,
            claim=claim,
            effect=effect,
            what=f"the R² of {name}",
            null=SHUFFLED,
            against={SHUFFLED: Against(r2(predicted, sequence, rival=control))},
            typical=float(rows["measured"].abs().median()),
            floor=result.fact("floor"),
            chance=BAR[name],
            relevant=RELEVANT_R2[name],
            shown={name: effect, SHUFFLED: r2(control, sequence)},
            write=r_squared,
            axis=axis,
            least=-0.25,
            of=f"logits (firing, horizon, token) in {sequence.nunique()} sequences, eps {min(self.eps):g}",
        )

    def _paper_finding(self, result: Result, unfitted: Finding, one_scale: Estimate) -> Finding:
        """Claim 7, with the paper's own statistic, which may be what any prediction reaches."""
        of_formula = fits.cell_r2(result.tables["cells"], "F0")
        shuffled = fits.cell_r2(result.tables["cells"], CONTROL_COLUMN)["r2"]
        # Both fits are the best line through 0; rounding must not decide which of them is better.
        lead = (of_formula["r2"] - shuffled).round(9)
        cells = Paired(of_formula.assign(shuffled=shuffled, lead=lead), seed=self.seed)
        median = cells.median("r2")
        control = cells.median("shuffled")
        of_paper = " (Mamba-2; the paper reports -0.07 there)" if result.info["rule"] == "Mamba-2" else ""
        unfitted = replace(
            unfitted,
            measured=f"{r_squared(one_scale.mean)} with one scale for all; {r_squared(median.mean)} (median) with a "
            f"scale per cell{of_paper}",
            controls=f"shuffled, with a scale per cell {r_squared(control.mean)}",
        )
        rival = Against(cells.median("lead"), control)
        fitted = judge(median, {SHUFFLED: rival}, chance=PAPER_R2, relevant=ALIKE)
        if unfitted.verdict.outcome != "fails" or fitted.outcome != "confounded":
            return unfitted
        sentence = (
            "With a scale fitted per cell the paper's number is reached, but predictions shuffled between firings "
            f"reach {r_squared(control.mean)} as well. {unfitted.verdict.sentence}"
        )
        return replace(unfitted, ruled=Verdict("confounded", sentence, (SHUFFLED,)))


def _change_readout(positions: Integers, tokens: Integers) -> Readout:
    """`measured`: change of the logits of `tokens` [I,Z,G] at `positions` [I,Z], against the run without edits of the
    same batch; `floor`: the distance of that from the plain pass."""

    def read(rows: EditedRows) -> Mapping[str, ArrayLike]:
        assert rows.plain is not None
        device = rows.logits.device
        index = np.array([trial.row["index"] for trial in rows.trials])
        token_ids = torch.tensor(tokens[index], device=device)  # [n,Z,G]
        read_at = torch.tensor(positions[index], device=device)  # [n,Z]
        column = read_at - rows.start
        row = torch.arange(len(index), device=device)[:, None]
        edited = rows.logits[row, column].gather(-1, token_ids).double()
        unedited = rows.plain[column].gather(-1, token_ids).double()
        native = rows.native[read_at].gather(-1, token_ids).double()
        # A batch rounds otherwise than the plain pass, which would drown the effect of a small eps.
        measured = edited - unedited
        floor = (unedited - native).abs()
        return {"measured": measured.cpu().numpy(), "floor": floor.cpu().numpy()}

    return read


def _predicted_slopes(
    lab: Bench, site: Site, added: LowRank, starts: Sequence[int], positions: Integers, tokens: Integers
) -> NDArray[np.float64]:
    """[I,Z,G,P] what each predictor gives for eps = 1: change of tokens [I,Z,G] at positions [I,Z] by what is added at
    each start [I]."""
    gradients = ReadGradients(lab.model, site.session, lab.hook.layer, lab.hook.head, positions.ravel().tolist())
    slopes = np.empty((*tokens.shape, len(PREDICTORS)))
    for (i, z), position in np.ndenumerate(positions):
        reads = [gradients.at(int(position), token) for token in tokens[i, z].tolist()]
        predicted = predict(site.recurrence, added.rows([i]), starts[i], reads)  # [G,1,P]
        slopes[i, z] = predicted[:, 0].cpu().numpy()
    return slopes
