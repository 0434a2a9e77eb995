"""Multi-atom substitution: the write is replaced by its sparse code of 1, 2, ... atoms, and by all of them.

The substitution test replaces a write by one atom. Its code has k of them; here the n strongest are written together,
so that a reader sees how many it takes. Source: future work of WriteSAE (arXiv 2605.12770).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import pandas as pd
import torch

from sae_lens_writesae.atom.low_rank import LowRank
from writesae.experiment.at_firings import OfFirings
from writesae.experiment.conditions import REFERENCES, scaled
from writesae.experiment.evaluation import Result, described
from writesae.experiment.head import mean_write
from writesae.experiment.lab import Lab, Site, Trial
from writesae.experiment.readout import kl_window
from writesae.verdict.finding import Against, Figure, Finding, Paired, medians
from writesae.verdict.names import NAMES

ALL = 0
"""The count that stands for "all active atoms"."""
RELEVANT = 0.1
"""Change of log KL that matters: a tenth of the KL, the step of the substitution test's rates."""
_SMALLEST_KL = 1e-16
"""Rounding of float64: no KL is told from a smaller one below this, or below what a no-op moves."""


@dataclass(frozen=True, kw_only=True)
class MultiAtom(OfFirings):
    """At a firing's position t, the active atoms are ordered by |a_i| |A_i|. Written is the sum of the n first a_i A_i
    (`code`), without the decoder's bias, at the dictionary's own scale or at the norm of the native write.
    KL(native || edited) is the mean over t..t+horizon.

    Also written are native (a no-op), delete, and, with the same number of rank-1 terms and at the same norm, the top
    terms of the mean write and of the state S_t - W_t before the write. The state after the write contains the write:
    it is a reference and never compared with the code.

    For a dictionary of states, the code is that of the state S_t, and its atoms replace the write.
    The question is then whether what the state's dictionary says is there can stand in for what the token adds. At the
    dictionary's own scale it has the norm of a whole state.

    **Verdict** (a claim of this project), with all atoms, at the first scale: the
    ladder of `judge` on the mean of log KL(all atoms) - log KL(delete), which is below 0 where the claim holds (a
    change of 0.1 matters), against every control that is nearer than deletion by itself. A KL below the floor (the 95th
    percentile of the no-op) counts as the floor, because the logarithm of what rounding leaves says nothing. The median
    KL of deletion must exceed the floor.
    """

    n_atoms: int | None = 20
    """Times `firings_per_atom`: positions, drawn uniformly as in the substitution test. None: all alive atoms."""
    firings_per_atom: int = 2
    """See `n_atoms`."""
    counts: tuple[int, ...] = (1, 2, 4, 8, 16)
    """How many of the strongest atoms are written (by |a_i| |A_i|); all active ones are always run too."""
    scales: tuple[Literal["coefficient", "matched"], ...] = ("coefficient", "matched")
    """The partial sum as the dictionary gives it, or brought to the norm of the native write."""
    controls: tuple[Literal["mean", "state", "state_after"], ...] = ("mean", "state", "state_after")
    """The n top terms of the head's mean write or of the state before the write, at the norm of the partial sum;
    `state_after`, the state after the write, is a reference that confounds nothing."""
    horizon: int = 16
    """KL is averaged over t..t+horizon, both included."""
    mean_write_sequences: int = 16
    """Sequences from which the mean write is estimated."""

    question: ClassVar[str] = "How many atoms does a write take?"
    min_sequences: ClassVar[int] = 1
    columns: ClassVar[dict[str, dict[str, str]]] = {
        "writes": described(
            "sequence position",
            condition="what is written at t: native, delete, code, mean, state, state_after",
            scale="coefficient or matched; none for native and delete",
            count="atoms written (controls: atoms whose terms and norm they have); 0 for native, delete",
            all="whether these are all active atoms",
            terms="rank-1 terms written",
            kl="nats, mean over t..t+horizon of KL(native || edited)",
            kl_at="nats, at t",
            norm="norm of what is written over the norm of the native write",
            cosine="cosine of what is written and the native write",
        )
    }

    # -- measuring

    def measure(self, lab: Lab) -> dict[str, pd.DataFrame]:
        places = self.drawn(lab, self.horizon, "dominant").table
        writes = lab.native_writes(range(min(self.mean_write_sequences, len(lab.tokens))))
        mean = mean_write(writes.keys[:, 0], writes.values[:, 0])
        tables = []
        for site in lab.sites(places, self.kind):
            written = site.at(site.rows["position"].tolist()).norm().cpu().numpy() > 0
            lab.skipped["positions with a zero native write"] += int((~written).sum())
            trials = [
                trial for t in site.rows.loc[written, "position"].tolist() for trial in self._trials(lab, site, t, mean)
            ]
            if trials:
                tables.append(lab.read(site, trials, kl_window, self.horizon + 1))
        lab.require(bool(tables), "every native write at the drawn positions is zero, so there is nothing to replace")
        return {"writes": pd.concat(tables, ignore_index=True)}

    def _trials(self, lab: Lab, site: Site, position: int, mean: LowRank) -> Iterator[Trial]:
        """What is written at one position: the code is a_i A_i of the active atoms, strongest first."""
        firings, native = lab.firings(), site.at([position])
        active = firings.frame((firings.sequence == site.sequence) & (firings.position == position))
        code = lab.atoms(active["atom"].to_numpy())
        code = code * torch.tensor(active["activation"].to_numpy()).to(code.values)
        code = code.rows(code.norm().argsort(descending=True))
        bases = {
            "mean": mean,
            "state": LowRank.svd(site.state_before([position])),
            "state_after": LowRank.svd(site.state_after([position])),
        }
        written = [("native", "none", 0, native), ("delete", "none", 0, native.terms([]))]
        for scale in self.scales:
            for n in [*(n for n in sorted(self.counts) if n < len(code)), len(code)]:
                partial = code.rows(slice(n)).total()
                if float(partial.norm()) == 0:
                    continue
                own = scaled(partial, native, scale)
                written.append(("code", scale, n, own))
                for name in self.controls:
                    top = bases[name].terms(slice(partial.rank)).to(partial.values)
                    written.append((name, scale, n, top.with_norm(own.norm())))
        for name, scale, n, matrix in written:
            yield Trial(
                {
                    "sequence": site.sequence,
                    "position": position,
                    "condition": name,
                    "scale": scale,
                    "count": n,
                    "all": 0 < n == len(code),
                    "terms": matrix.rank,
                    "norm": float(matrix.norm() / native.norm()),
                    "cosine": float(matrix.cosine(native)),
                },
                position,
                lab.replace(position, matrix if matrix.rank else None),
            )

    # -- judging

    def findings(self, result: Result) -> list[Finding]:
        """All atoms compared with deletion and the controls."""
        table, scale = result.tables["writes"], self.scales[0]
        rows = table[(table["all"] & (table["scale"] == scale)) | table["condition"].isin(["native", "delete"])]
        kl = Paired.of(rows, "kl", "sequence", "position", seed=self.seed)
        size, names = kl.size_of("delete"), [name for name in self.controls if name in kl]
        least = max(_SMALLEST_KL, size["floor"])
        logs = Paired(
            kl.wide.assign(**{n: np.log(kl[n].clip(lower=least)) for n in ("code", "delete", *names)}), seed=self.seed
        )
        ratio = {name: logs.mean(name, "delete") for name in ("code", *names)}
        counts = [*sorted({int(n) for n in rows_of(result, "code", scale).query("~all")["count"]}), ALL]
        curve = ", ".join(
            f"{'all' if n == ALL else n}: {rows_of(result, 'code', scale, n)['kl'].median():.3g}" for n in counts
        )
        return [
            Finding(
                claim=f"a write can be replaced by its sparse code ({scale})",
                effect=ratio["code"],
                what="the log KL ratio of the whole code to deletion",
                null=next((NAMES[n] for n in names if n not in REFERENCES), ""),
                against={NAMES[n]: Against(logs.mean("code", n), ratio[n]) for n in names if n not in REFERENCES},
                less=True,
                relevant=RELEVANT,
                **size,
                shown={"all atoms" if name == "code" else NAMES[name]: each for name, each in ratio.items()},
                write=lambda log: f"{np.exp(log):.2f}",
                axis="KL over that of deletion",
                measured=f"median KL by atoms {curve} nats; delete {size['typical']:.3g}",
                of="writes in {} sequences",
            )
        ]

    def panels(self, result: Result) -> list[Figure]:
        """KL by the number of atoms; the last point of a line is all."""
        table, names = result.tables["writes"], ["code", *self.controls]
        every = table.loc[table["scale"] == self.scales[0]].assign(
            x=lambda rows: rows["count"].mask(rows["all"], rows["count"].max())
        )
        shown = {name: NAMES.get(name, name).split(" (")[0] for name in names}
        title = f"KL in nats by atoms at scale {self.scales[0]}, multi_atom: {result.label}"
        return [medians(every, "x", "kl", shown, "atoms written (last: all)", title, log_x=True)]


def rows_of(result: Result, condition: str, scale: str = "none", count: int | None = None) -> pd.DataFrame:
    """Rows of one condition, indexed by (sequence, position).

    Args:
        count: atoms written. ALL: all active atoms. Where fewer than `count` are active, all of them.
    """
    table = result.tables["writes"]
    rows = table[(table["condition"] == condition) & (table["scale"] == scale)]
    if count is not None:
        is_all = rows["all"] & ((rows["count"] <= count) | (count == ALL))
        rows = rows[is_all | (~rows["all"] & (rows["count"] == count))]
    return pd.DataFrame(rows).set_index(["sequence", "position"], drop=False).rename_axis([None, None])
