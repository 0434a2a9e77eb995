"""How one substitution spreads over the next tokens: through the state of its head, and through the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from pydantic import PositiveInt
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from sae_lens_writesae.atom.low_rank import LowRank
from writesae.experiment.lab import EditedRows
from writesae.page.format import percent
from writesae_study.evaluations.substitution import Substitution
from writesae_study.experiment.at_firings import RELEVANT_RATE, Exchange
from writesae_study.experiment.bench import Bench
from writesae_study.experiment.conditions import DIRECTIONS, REFERENCES, Control
from writesae_study.experiment.evaluation import Evaluation, Result, described
from writesae_study.verdict.finding import Against, Finding, Paired
from writesae_study.verdict.judge import Verdict
from writesae_study.verdict.names import NAMES

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
    reference and never compared with an atom.

    **Verdict** (a claim of this project): on each firing, the distance is the mean over steps 0..n of 1 - cosine. The
    ladder of `judge` is applied to the rate at which the atom's distance is smaller than deletion's (chance 1/2, an
    effect matters from 60% on), against every control that beats deletion by itself. Claim 21, of the paper's
    rebuttal: the state gap after the atom, mean over steps 0..n, is below 5% (one point more or less matters). Where
    deletion stays below 5% as well, that says nothing of atoms, and the claim is confounded.
    """

    n_steps: PositiveInt = 10
    """Tokens after t."""
    n_atoms: PositiveInt | None = 40
    """Atoms drawn uniformly from all alive atoms that can be tested. None: all of them."""
    firings_per_atom: PositiveInt = 3
    """At most this many firings of an atom, dealt over sequences."""
    scale: Literal["coefficient", "matched", "least_squares"] = "coefficient"
    """How the atom is scaled; every control follows its norm."""
    controls: tuple[Control, ...] = (*DIRECTIONS, *REFERENCES)
    """Controls and references to run."""

    min_sequences: ClassVar[int] = 1
    columns: ClassVar[dict[str, dict[str, str]]] = {
        "steps": described(
            "firing sequence position atom condition scale",
            step="tokens after t",
            state_gap="norm of the change of the head's state over the norm of the native state",
            residual_cosine="cosine of the edited and the native residual stream after the last block",
        )
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

    def measure(self, lab: Bench) -> dict[str, pd.DataFrame]:
        test = self.substitution
        parts = []
        for exchange in test.exchanges(lab, test.drawn(lab, test.horizon, "dominant"), test.scales):
            table = self._residual_cosines(lab, exchange)
            # Both measures have one number for each step: a row becomes as many rows.
            cosines = np.concatenate(table.pop("residual_cosine").tolist())
            gaps = _state_gaps(exchange, self.n_steps + 1).ravel()
            table = table.loc[table.index.repeat(self.n_steps + 1)]
            steps = table.groupby(level=0).cumcount()
            parts.append(table.assign(step=steps, state_gap=gaps, residual_cosine=cosines))
        return {"steps": pd.concat(parts, ignore_index=True)}

    def _residual_cosines(self, lab: Bench, exchange: Exchange) -> pd.DataFrame:
        """One row per condition and firing; the column `residual_cosine` holds an array [S] each."""
        name = f"blocks.{lab.model.cfg.n_layers - 1}.hook_resid_post"
        _, cache = lab.model.run_with_cache(exchange.site.session.tokens, names_filter=[name])
        native = cache[name][0]
        newest: dict[str, Tensor] = {}

        def keep(value: Tensor, hook: HookPoint) -> None:
            newest[name] = value

        def read(rows: EditedRows) -> Mapping[str, NDArray[np.generic]]:
            # The laboratory runs batch by batch and reads each at once, so that the hook holds one batch.
            window = rows.windows(newest[name])  # of the batch that has just run
            cosines = torch.cosine_similarity(window, native[rows.positions], dim=-1)
            return {"residual_cosine": cosines.cpu().numpy()}

        with lab.model.hooks([(name, keep)]):
            return lab.read(exchange.site, exchange.trials(lab), read, self.n_steps + 1)

    # -- judging

    def findings(self, result: Result) -> list[Finding]:
        """Whether an atom leaves the model nearer to its native course than deletion does, and claim 21."""
        steps = result.tables["steps"].assign(distance=lambda table: 1 - table["residual_cosine"])
        far = Paired.of(steps, "distance", "firing", "sequence", seed=self.seed)
        gaps = Paired.of(steps, "state_gap", "firing", "sequence", seed=self.seed)
        wins = {name: far.wins(name, "delete") for name in ("atom", *self.controls)}
        against = {}
        for name in self.controls:
            if name not in REFERENCES:
                against[NAMES[name]] = Against(far.wins("atom", name), wins[name], chance=0.5)
        gap = {name: gaps.mean(name) for name in ("atom", "delete", *self.controls) if name in gaps}
        # Claim 21: the state gap, which says nothing of atoms where deletion keeps it small too.
        small_gaps = (gaps["atom"] < SMALL_GAP).mean()
        small = Verdict("confounded", "Deletion leaves the state within 5% of its norm as well.", ("delete",))
        return [
            Finding(
                claim=f"over {self.n_steps} tokens an atom moves the model less than deletion",
                effect=wins["atom"],
                what="the win rate against deletion",
                null=next(iter(against), ""),
                against=against,
                chance=0.5,
                relevant=RELEVANT_RATE,
                **far.size_of("delete"),
                shown={NAMES[name]: rate for name, rate in wins.items()},
                write=percent,
                axis="of firings nearer to the native residual stream than after deletion",
                of="firings in {} sequences",
            ),
            Finding(
                number=21,
                claim=f"over {self.n_steps} tokens an atom leaves the state within {percent(SMALL_GAP)} of its norm",
                effect=gap["atom"],
                what="the mean state gap",
                chance=SMALL_GAP + RELEVANT_GAP,  # so that the gap must be below SMALL_GAP
                less=True,
                relevant=RELEVANT_GAP,
                null="delete",
                against={"delete": Against(gaps.mean("atom", "delete"))},
                **gaps.size_of("delete"),
                unless=None if gap["delete"].high > SMALL_GAP else small,
                shown={NAMES[name]: mean for name, mean in gap.items()},
                write=percent,
                axis="of the norm of the native state",
                measured=f"below {percent(SMALL_GAP)} at {percent(small_gaps)} of firings",
                of="firings in {} sequences",
            ),
        ]


def _state_gaps(exchange: Exchange, length: int) -> NDArray[np.generic]:
    """[C,N,S] relative change of the head's state under each condition at the first `length` tokens of each firing."""
    gaps = []
    for n, start in enumerate(exchange.site.rows["position"].tolist()):
        stop = start + length
        # What is written minus the native write: of higher rank, but never dense.
        ablated = exchange.native.rows([n]) * -1.0
        changes = []
        for condition in exchange.conditions:
            written = condition.written
            changes.append(ablated if written is None else LowRank.cat([written.rows([n]), ablated]))
        recurrence = exchange.site.recurrence.select(tokens=slice(0, stop))
        states = recurrence.states(positions=list(range(start, stop)))[0, :, 0]
        native = torch.linalg.matrix_norm(states)  # [S]
        # The keys of all conditions are carried at once, as rows of one batch.
        keys = torch.cat([change.keys[0] for change in changes])
        ranks = [change.rank for change in changes]
        carried = recurrence.propagate(keys, start, 0)[0].split(ranks)  # [R,S,K] each
        for change, later_keys in zip(changes, carried):
            moved = LowRank(later_keys.transpose(0, 1), change.values.expand(length, -1, -1))
            gaps.append(moved.norm() / native)
    by_firing = torch.stack(gaps).view(-1, len(exchange.conditions), length)
    return by_firing.transpose(0, 1).cpu().numpy()
