"""How one substitution spreads over the next tokens: through the state of its own head, and through the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, cast

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from sae_lens_writesae.atom.low_rank import LowRank
from writesae.evaluations.substitution import RELEVANT, Exchange, Substitution
from writesae.experiment.conditions import CONTROLS, DIRECTIONS, REFERENCES, SCALES, Condition, Scale, edits_of
from writesae.experiment.evaluation import Evaluation
from writesae.experiment.lab import EditedRows, Lab, Trial
from writesae.experiment.result import Claim, Figure, Result
from writesae.verdict import figures
from writesae.verdict import statistics as stats
from writesae.verdict.format import percent, span
from writesae.verdict.judge import Against, Verdict, judge
from writesae.verdict.names import NAMES

SMALL_GAP = 0.05
"""State gap that counts as small, in norms of the native state (the rebuttal's)."""
RELEVANT_GAP = 0.01
"""Distance from it that matters."""


@dataclass(frozen=True, kw_only=True)
class Multistep(Evaluation):
    """At a firing, the conditions of the substitution test differ only in what is written at token t. Each condition
    is followed for `n_steps` tokens. The **state gap** is the Frobenius norm of the change of the edited head's state,
    over the norm of the native state; it is exact, because the change obeys the same linear recurrence. (States of
    later layers change too; they are not in it.) The **residual cosine** compares the residual stream after the last
    block with the native one.

    The firings are those of the substitution test with the same seed, and the dominant atom of the position is
    written. The controls have the norm of the atom condition. The state after the write contains the write: it is a
    reference and never held against an atom.

    **Verdict** (a claim of this project): on each firing, the distance is the mean over steps 0..n of 1 - cosine. The
    ladder of `judge` is applied to the rate at which the atom's distance is smaller than deletion's (chance 1/2, an
    effect matters from 60 % on), against every control that beats deletion by itself. Claim 21, of the paper's
    rebuttal: the state gap after the atom, mean over steps 0..n, lies below 5 % (one point more or less matters). Where
    deletion stays below 5 % as well, that says nothing of atoms, and the claim is confounded.
    """

    n_steps: int = 10
    """Tokens after t."""
    n_atoms: int | None = 40
    """Atoms drawn uniformly from all alive atoms that can be tested. None: all of them."""
    firings_per_atom: int = 3
    """At most this many firings of an atom, dealt over sequences."""
    scale: Scale = "coefficient"
    """How the atom is scaled; every control follows its norm."""
    controls: tuple[str, ...] = (*DIRECTIONS, *REFERENCES)
    """Controls and references to run."""

    kind: ClassVar[str] = "multistep"
    question: ClassVar[str] = "How far does one substitution lead the model astray?"
    answers: ClassVar[tuple[int, ...]] = (21,)
    min_sequences: ClassVar[int] = 1
    at_least: ClassVar[dict[str, float]] = {"n_steps": 1, "n_atoms": 1, "firings_per_atom": 1}
    choices: ClassVar[dict[str, tuple[str, ...]]] = {"scale": SCALES[:3], "controls": (*CONTROLS, *REFERENCES)}
    columns: ClassVar[dict[str, dict[str, str]]] = {
        "steps": {
            "firing": "number of the firing, shared by all of its conditions",
            "sequence": "row of the evaluation tokens",
            "position": "token t that is edited",
            "atom": "atom whose firing was drawn",
            "condition": "what is written at t",
            "scale": "how the atom is scaled; none for native and delete",
            "step": "tokens after t",
            "state_gap": "norm of the change of the head's state over the norm of the native state",
            "residual_cosine": "cosine of the edited and the native residual stream after the last block",
        }
    }

    @property
    def substitution(self) -> Substitution:
        """The test whose firings and conditions are followed."""
        return Substitution(
            atom_choice=("dominant",),
            n_atoms=self.n_atoms,
            firings_per_atom=self.firings_per_atom,
            scales=(self.scale,),
            controls=self.controls,
            horizon=max(16, self.n_steps),
            seed=self.seed,
        )

    @property
    def shortest(self) -> int:
        return self.substitution.shortest

    # -- measuring

    def measure(self, lab: Lab) -> dict[str, pd.DataFrame]:
        test = self.substitution
        exchanges = test.exchanges(lab, test.draw(lab, "dominant"))
        return {"steps": pd.concat([self._followed(lab, each) for each in exchanges], ignore_index=True)}

    def _followed(self, lab: Lab, exchange: Exchange) -> pd.DataFrame:
        """All firings of one sequence: one row per firing, condition and step."""
        rows = cast(list[dict[str, object]], exchange.site.rows.to_dict("records"))
        edits = [edits_of(lab, each, exchange.native, exchange.positions, "additive") for each in exchange.conditions]
        trials: list[Trial] = []
        gaps: list[NDArray[np.generic]] = []
        for n, row in enumerate(rows):
            gaps.append(_state_gaps(exchange, n, self.n_steps + 1))
            for condition, of_firings in zip(exchange.conditions, edits):
                named = row | {"condition": condition.name, "scale": condition.scale}
                trials.append(Trial(named, exchange.positions[n], of_firings[n]))
        table = self._residual_cosines(lab, exchange, trials)
        cosines = np.concatenate(table.pop("residual_cosine").tolist())
        steps = np.tile(np.arange(self.n_steps + 1), len(table))
        table = table.loc[table.index.repeat(self.n_steps + 1)]
        return table.assign(step=steps, state_gap=np.concatenate(gaps).ravel(), residual_cosine=cosines)

    def _residual_cosines(self, lab: Lab, exchange: Exchange, trials: list[Trial]) -> pd.DataFrame:
        """The column `residual_cosine` holds one array [S] per trial."""
        name = f"blocks.{lab.model.cfg.n_layers - 1}.hook_resid_post"
        _, cache = lab.model.run_with_cache(exchange.site.session.tokens, names_filter=[name])
        native = cache[name][0]
        seen: list[Tensor] = []

        def read(rows: EditedRows) -> Mapping[str, NDArray[np.generic]]:
            edited = seen[-1]  # earlier ones are of the prefix, or of batches before
            seen.clear()
            each = torch.arange(len(rows.trials), device=edited.device)[:, None]
            window = edited[each, rows.positions - rows.start]
            return {"residual_cosine": torch.cosine_similarity(window, native[rows.positions], dim=-1).cpu().numpy()}

        with lab.model.hooks(fwd_hooks=[(name, lambda value, hook: seen.append(value))]):
            return lab.read(exchange.site, trials, read, self.n_steps + 1)

    # -- judging

    def claims(self, result: Result) -> list[Claim]:
        """Whether an atom leaves the model nearer to its native course than deletion does."""
        steps = result.tables["steps"].assign(distance=lambda table: 1 - table["residual_cosine"])
        wide = steps.pivot_table(index=["firing", "sequence"], columns="condition", values="distance").reset_index()

        def rate(a: str, b: str) -> stats.Rate:
            return stats.win_rate(wide[a], wide[b], wide["sequence"])

        win, by_itself = rate("atom", "delete"), {name: rate(name, "delete") for name in self.controls}
        against = {
            NAMES[name]: Against(rate("atom", name).over_clusters, by_itself[name].over_clusters, chance=0.5)
            for name in self.controls
            if name not in REFERENCES
        }
        verdict = judge(
            win.over_clusters,
            against,
            typical=float(np.median(wide["delete"])),
            floor=float(np.quantile(wide["native"], 0.95)),
            chance=0.5,
            relevant=RELEVANT,
            what="the win rate against deletion",
        )
        return [
            Claim(
                None,
                f"over {self.n_steps} tokens an atom leads less far astray than deletion",
                f"{percent(win.rate)} [{span(*win.over_clusters.interval)}]",
                win.n,
                f"firings in {win.over_clusters.n_clusters} sequences",
                ", ".join(
                    f"{NAMES[n]} {percent(r.rate)}" for n, r in sorted(by_itself.items(), key=lambda x: -x[1].rate)
                ),
                verdict.outcome,
                verdict.sentence,
            ),
            self._small_gap(result),
        ]

    def _small_gap(self, result: Result) -> Claim:
        """Claim 21: how far the head's state is from the native one."""
        steps, by = result.tables["steps"], ["firing", "sequence"]
        gaps = steps.pivot_table(index=by, columns="condition", values="state_gap").reset_index()

        def mean(values: pd.Series) -> stats.Estimate:
            return stats.estimate(values, gaps["sequence"], seed=self.seed)

        gap, deleted = mean(gaps["atom"]), mean(gaps["delete"])
        verdict = judge(
            gap,
            typical=float(gaps["delete"].median()),
            floor=float(gaps["native"].quantile(0.95)),
            chance=SMALL_GAP,
            less=True,
            relevant=RELEVANT_GAP,
            what="the mean state gap",
        )
        if verdict.outcome == "holds" and not deleted.high > SMALL_GAP:
            verdict = Verdict("confounded", "Deletion leaves the state within 5 % of its norm as well.", ("deletion",))
        shown = {name: gaps[name].mean() for name in ("delete", *self.controls)}
        return Claim(
            21,
            f"over {self.n_steps} tokens an atom leaves the state within {percent(SMALL_GAP)} of its norm",
            f"{percent(gap.mean)} [{span(*gap.interval)}] of the norm of the native state; below "
            f"{percent(SMALL_GAP)} at {percent(float((gaps['atom'] < SMALL_GAP).mean()))} of firings",
            gap.n,
            f"firings in {gap.n_clusters} sequences",
            ", ".join(f"{NAMES[name]} {percent(float(value))}" for name, value in shown.items()),
            verdict.outcome,
            verdict.sentence,
        )

    def figures(self, result: Result) -> list[Figure]:
        """Medians of both distances by tokens after t."""
        steps = result.tables["steps"].assign(distance=lambda table: 1 - table["residual_cosine"])
        panels = []
        for column, title, caption in (
            ("state_gap", "Change of the head's state", "Median over firings, relative to the native state."),
            ("distance", "Distance of the residual stream", "Median over firings of 1 - cosine after the last block."),
        ):
            medians = steps.groupby(["condition", "step"])[column].median().unstack("step").clip(lower=1e-16)
            shown = [name for name in (*CONTROLS, "delete", "atom") if name in medians.index]
            lines = [
                figures.Line(
                    NAMES[name],
                    [float(step) for step in medians.columns],
                    np.asarray(medians.loc[name]).tolist(),
                    {"atom": "atom", "delete": "ink"}.get(name, "soft"),
                )
                for name in shown
            ]
            values = np.asarray(medians.loc[shown])
            svg = figures.curves(
                lines,
                "tokens after t",
                f"{title} by tokens after t, {self.scale}: {result.label}",
                log_y=bool(values.max() > 10 * values.min()),
            )
            panels.append(Figure(title, svg, caption))
        return panels


def _state_gaps(exchange: Exchange, n: int, length: int) -> NDArray[np.generic]:
    """[C,S] relative change of the head's state under each condition of firing n, at the first `length` tokens."""
    start = exchange.positions[n]
    stop = start + length
    changes = [_change(condition, exchange.native, n) for condition in exchange.conditions]
    recurrence = exchange.site.recurrence.select(tokens=slice(0, stop))
    keys = recurrence.propagate(torch.cat([change.keys[0] for change in changes]), start, 0)[0]  # [R,S,K], all changes
    native = torch.linalg.matrix_norm(recurrence.states(positions=list(range(start, stop)))[0, :, 0])  # [S]
    gaps = []
    for change, carried in zip(changes, keys.split([change.rank for change in changes])):
        gaps.append(LowRank(carried.transpose(0, 1), change.values.expand(length, -1, -1)).norm() / native)
    return torch.stack(gaps).cpu().numpy()


def _change(condition: Condition, native: LowRank, n: int) -> LowRank:
    """What a condition adds to the native write of firing n, as a single matrix."""
    gone = native.rows([n]) * -1.0
    return gone if condition.written is None else LowRank.cat([condition.written.rows([n]), gone])
