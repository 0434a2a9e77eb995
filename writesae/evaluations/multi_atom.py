"""Multi-atom substitution: the write is replaced by its sparse code of 1, 2, ... atoms, and by all of them.

The substitution test replaces a write by one atom. Its code has k of them; here the n strongest are written together,
so that a reader sees how many it takes. Source: future work of WriteSAE (arXiv 2605.12770).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from sae_lens_writesae.atom.low_rank import LowRank, mean_write, nonzero_terms
from sae_lens_writesae.sae.matrix import MatrixSAE
from writesae.evaluations.substitution import Substitution
from writesae.experiment.conditions import REFERENCES, state_after, state_before
from writesae.experiment.evaluation import Evaluation
from writesae.experiment.lab import Lab, Site, Trial
from writesae.experiment.readout import kl_window
from writesae.experiment.result import Claim, Figure, Result
from writesae.verdict import figures
from writesae.verdict.judge import Against, judge
from writesae.verdict.names import NAMES
from writesae.verdict.statistics import Estimate, estimate

ALL = 0
"""The count that stands for "all active atoms"."""
RELEVANT = 0.1
"""Change of log KL that matters: a tenth of the KL, the step of the substitution test's rates."""
_SMALLEST_KL = 1e-16
"""Rounding of float64: no KL is told from a smaller one below this, or below what a no-op moves."""


class _Written(NamedTuple):
    """One condition at one position, with what the table says of it."""

    name: str
    scale: str
    n_atoms: int
    is_all: bool
    matrix: LowRank | None
    """N = 1; None: nothing is written."""


@dataclass(frozen=True, kw_only=True)
class MultiAtom(Evaluation):
    """At a firing's position t, the active atoms are ordered by |a_i| |A_i|. Written is the sum of the n first a_i A_i
    (`code`), and the same with the decoder bias where the dictionary has one (`code + bias`; `bias` alone is n = 0 of
    it), at the dictionary's own scale or at the norm of the native write. KL(native || edited) is the mean over
    t..t+horizon.

    Beside it are native (a no-op), delete, and, with the same number of rank-1 terms and at the same norm, the top
    terms of the mean write and of the state S_t - W_t before the write. The state after the write contains the write:
    it is a reference and never held against the code.

    For a dictionary of states, the code is that of the state S_t, and its atoms are written in the place of the write.
    The question is then whether what the state's dictionary says is there can stand in for what the token adds. At the
    dictionary's own scale it has the norm of a whole state.

    **Verdict** (a claim of this project), with all atoms, at the first scale, with the bias where that is nearer: the
    ladder of `judge` on the mean of log KL(all atoms) - log KL(delete), which lies below 0 where the claim holds (a
    change of 0.1 matters), against every control that is nearer than deletion by itself. A KL below the floor (the 95th
    percentile of the no-op) counts as the floor, because the logarithm of what rounding leaves says nothing. The median
    KL of deletion must exceed the floor.
    """

    n_atoms: int | None = 20
    """Atoms whose firings are drawn, as in the substitution test. None: all of them."""
    firings_per_atom: int = 2
    """Firings of each atom; several at one position count once."""
    counts: tuple[int, ...] = (1, 2, 4, 8, 16)
    """How many of the strongest atoms are written (by |a_i| |A_i|); all active ones are always run too."""
    scales: tuple[Literal["coefficient", "matched"], ...] = ("coefficient", "matched")
    """The partial sum as the dictionary gives it, or brought to the norm of the native write."""
    controls: tuple[str, ...] = ("mean", "state", "state_after")
    """The n top terms of the head's mean write or of the state before the write, at the norm of the partial sum;
    `state_after`, the state after the write, is a reference that confounds nothing."""
    horizon: int = 16
    """KL is averaged over t..t+horizon, both included."""
    first_position: int = 1
    """Firings before this token are left out."""
    mean_write_sequences: int = 16
    """Sequences from which the mean write is estimated."""

    kind: ClassVar[str] = "multi_atom"
    question: ClassVar[str] = "How many atoms does a write take?"
    min_sequences: ClassVar[int] = 1
    at_least: ClassVar[dict[str, float]] = {
        "n_atoms": 1,
        "firings_per_atom": 1,
        "horizon": 1,
        "first_position": 0,
        "mean_write_sequences": 1,
    }
    choices: ClassVar[dict[str, tuple[str, ...]]] = {
        "scales": ("coefficient", "matched"),
        "controls": ("mean", "state", "state_after"),
    }
    columns: ClassVar[dict[str, dict[str, str]]] = {
        "writes": {
            "sequence": "row of the evaluation tokens",
            "position": "token t that is edited",
            "condition": "what is written at t: native, delete, code, code + bias, bias, mean, state, state_after",
            "scale": "coefficient or matched; none for native and delete",
            "count": "atoms written (controls: atoms whose terms and norm they have); 0 for native, delete, bias",
            "all": "whether these are all active atoms",
            "terms": "rank-1 terms written",
            "kl": "nats, mean over t..t+horizon of KL(native || edited)",
            "kl_at": "nats, at t",
            "norm": "norm of what is written over the norm of the native write",
            "cosine": "cosine of what is written and the native write",
        }
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if list(self.counts) != sorted(set(self.counts)) or not self.counts or self.counts[0] < 1:
            raise ValueError(f"counts must rise from 1 or more, found {self.counts}")
        if not self.scales:
            raise ValueError("scales must name at least one of coefficient, matched; found none")

    @property
    def substitution(self) -> Substitution:
        """The test whose firings are drawn."""
        return Substitution(
            n_atoms=self.n_atoms,
            firings_per_atom=self.firings_per_atom,
            horizon=self.horizon,
            first_position=self.first_position,
            seed=self.seed,
        )

    @property
    def shortest(self) -> int:
        return self.substitution.shortest

    # -- measuring

    def measure(self, lab: Lab) -> dict[str, pd.DataFrame]:
        places = self.substitution.draw(lab, "dominant").table
        writes = lab.native_writes(range(min(self.mean_write_sequences, len(lab.tokens))))
        mean, bias = mean_write(writes.keys[:, 0], writes.values[:, 0]), _decoder_bias(lab)
        tables: list[pd.DataFrame] = []
        zero = "positions with a zero native write"
        for site in lab.sites(places, self.kind):
            trials: list[Trial] = []
            for t in site.rows["position"].tolist():
                if float(site.at([t]).norm()) == 0:
                    lab.skipped[zero] += 1
                    continue
                trials += [_trial(lab, site, t, each) for each in self._conditions(lab, site, t, mean, bias)]
            if trials:
                tables.append(lab.read(site, trials, kl_window, self.horizon + 1))
        lab.require(bool(tables), "every native write at the drawn positions is zero, so there is nothing to replace")
        return {"writes": pd.concat(tables, ignore_index=True)}

    def _conditions(
        self, lab: Lab, site: Site, position: int, mean: LowRank, bias: LowRank | None
    ) -> Iterator[_Written]:
        """What is written at one position."""
        native, code = site.at([position]), _code(lab, site, position)
        bases = _bases(site, position, mean)

        def scaled(matrix: LowRank, scale: str) -> LowRank:
            return matrix.with_norm(native.norm().to(matrix.values)) if scale == "matched" else matrix

        yield _Written("native", "none", 0, False, native)
        yield _Written("delete", "none", 0, False, None)
        counts = [n for n in self.counts if n < len(code)]
        for scale in self.scales:
            if bias is not None:
                yield _Written("bias", scale, 0, False, scaled(bias, scale))
            for n, is_all in [*((n, False) for n in counts), (len(code), True)]:
                partial = _sum(code.rows(slice(n)))
                if float(partial.norm()) == 0:
                    continue
                yield _Written("code", scale, n, is_all, scaled(partial, scale))
                if bias is not None:
                    yield _Written("code + bias", scale, n, is_all, scaled(LowRank.cat([partial, bias]), scale))
                size = scaled(partial, scale).norm()
                for name in self.controls:
                    top = bases[name].terms(slice(partial.rank)).to(partial.values)
                    yield _Written(name, scale, n, is_all, top.with_norm(size))

    # -- judging

    def claims(self, result: Result) -> list[Claim]:
        """All atoms against deletion and the controls."""
        scale, code = self.scales[0], self._code_condition(result)
        delete = rows_of(result, "delete")
        effect = self._log_ratio(result, code, delete)
        controls = [name for name in self.controls if not rows_of(result, name, scale, ALL).empty]
        by_itself = {name: self._log_ratio(result, name, delete) for name in controls}
        against = {
            NAMES[name]: Against(self._log_ratio(result, code, rows_of(result, name, scale, ALL)), by_itself[name])
            for name in controls
            if name not in REFERENCES
        }
        verdict = judge(
            effect,
            against,
            typical=float(np.median(delete["kl"])),
            floor=_floor(result),
            less=True,
            relevant=RELEVANT,
            what="the log KL ratio of the whole code to deletion",
        )
        curve = ", ".join(
            f"{'all' if n == ALL else n}: {np.median(rows_of(result, code, scale, n)['kl']):.3g}"
            for n in self._counts(result, code, scale)
        )
        return [
            Claim(
                None,
                f"a write can be replaced by its sparse code ({code}, {scale})",
                f"median KL by atoms {curve} nats; delete {np.median(delete['kl']):.3g}; "
                f"KL ratio to delete {np.exp(effect.mean):.2f} [{np.exp(effect.low):.2f}–{np.exp(effect.high):.2f}]",
                effect.n,
                f"writes in {effect.n_clusters} sequences",
                "; ".join(
                    f"{NAMES[name]}: ratio to delete {np.exp(each.mean):.2f}" for name, each in by_itself.items()
                ),
                verdict.outcome,
                verdict.sentence,
            )
        ]

    def _log_ratio(self, result: Result, condition: str, reference: pd.DataFrame) -> Estimate:
        """Mean log KL ratio of a condition (all atoms, first scale) to `reference`, with its interval by sequence."""
        rows = rows_of(result, condition, self.scales[0], ALL)
        paired = rows.join(reference["kl"].rename("kl_reference"), how="inner")
        logs = np.log(np.maximum(paired[["kl", "kl_reference"]].to_numpy(), max(_SMALLEST_KL, _floor(result))))
        return estimate(logs[:, 0] - logs[:, 1], paired["sequence"], seed=self.seed)

    def _code_condition(self, result: Result) -> str:
        """With the bias, if there is one and it is nearer with all atoms."""
        biased, plain = (rows_of(result, name, self.scales[0], ALL)["kl"] for name in ("code + bias", "code"))
        return "code + bias" if len(biased) and np.median(biased) < np.median(plain) else "code"

    def _counts(self, result: Result, condition: str, scale: str) -> list[int]:
        table = result.tables["writes"]
        partial = table[(table["condition"] == condition) & (table["scale"] == scale) & ~table["all"]]
        return [*sorted({int(n) for n in partial["count"]}), ALL]

    def figures(self, result: Result) -> list[Figure]:
        """KL, and norm and cosine of what is written, by the number of atoms."""
        panels = [
            Figure(
                f"KL by number of atoms ({scale})",
                self._curves(result, scale, "kl", "KL"),
                "Median over writes, in nats.",
            )
            for scale in self.scales
        ]
        for column, name in (("norm", "Norm over the native norm"), ("cosine", "Cosine with the native write")):
            panels.append(Figure(name, self._curves(result, self.scales[0], column, name), "Median over writes."))
        return panels

    def _curves(self, result: Result, scale: str, column: str, name: str) -> str:
        counts = self._counts(result, "code", scale)
        most = int(np.max(rows_of(result, "code", scale, ALL)["count"]))
        x = [float(n) for n in (*counts[:-1], max(most, *(n + 1 for n in counts)))]
        controls = () if column == "norm" else self.controls  # a control has the norm of the code
        lines = []
        for condition in (*controls, "code + bias", "code"):
            rows = [rows_of(result, condition, scale, n)[column] for n in counts]
            if all(len(each) for each in rows):
                y = [float(np.median(each)) for each in rows]
                short = NAMES.get(condition, condition).split(" (")[0]
                lines.append(figures.Line(short, x, y, "atom" if "code" in condition else "soft"))
        if column == "kl":
            level = float(np.median(rows_of(result, "delete")["kl"]))
            lines.append(figures.Line("delete", x, [level] * len(x), "ink"))
        title = f"{name} by atoms at scale {scale}, multi_atom: {result.label}"
        return figures.curves(lines, "atoms written (last: all)", title, log_x=True)

    def notes(self, result: Result) -> list[str]:
        """What the code of a state means."""
        if result.info["target"] != "state":
            return []
        return ["The dictionary reads states: its code of the state after the write is written in place of the write."]


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


def _floor(result: Result) -> float:
    """What a no-op moves, in nats (95th percentile)."""
    return float(np.quantile(rows_of(result, "native")["kl"], 0.95))


def _trial(lab: Lab, site: Site, position: int, written: _Written) -> Trial:
    native, matrix = site.at([position]), written.matrix
    row: dict[str, object] = {
        "sequence": site.sequence,
        "position": position,
        "condition": written.name,
        "scale": written.scale,
        "count": written.n_atoms,
        "all": written.is_all,
        "terms": 0 if matrix is None else matrix.rank,
        "norm": 0.0 if matrix is None else float(matrix.norm() / native.norm()),
        "cosine": 0.0 if matrix is None else float(matrix.cosine(native)),
    }
    return Trial(row, position, lab.replace(position, matrix))


def _sum(matrices: LowRank) -> LowRank:
    """N matrices as one (N = 1) with all of their terms."""
    return LowRank(matrices.keys.flatten(0, 1)[None], matrices.values.flatten(0, 1)[None])


def _code(lab: Lab, site: Site, position: int) -> LowRank:
    """a_i A_i of the atoms that are active at one position, strongest first."""
    firings = lab.firings()
    active = firings.frame((firings.sequence == site.sequence) & (firings.position == position))
    atoms = lab.atoms(active["atom"].to_numpy())
    scaled = atoms * torch.tensor(active["activation"].to_numpy()).to(atoms.values)
    return scaled.rows(scaled.norm().argsort(descending=True))


def _bases(site: Site, position: int, mean: LowRank) -> Mapping[str, LowRank]:
    """The controls at one position as singular terms, largest first."""
    before, after = state_before(site, [position]), state_after(site, [position])
    return {"mean": mean, "state": LowRank.svd(before), "state_after": LowRank.svd(after)}


def _decoder_bias(lab: Lab) -> LowRank | None:
    """The decoder bias as its singular terms; None where there is none, or it is zero."""
    bias = lab.sae.output_bias() if isinstance(lab.sae, MatrixSAE) else getattr(lab.sae, "b_dec", None)
    if not isinstance(bias, Tensor) or not bool(bias.any()):
        return None
    return nonzero_terms(bias.detach().float().reshape(lab.key_value).to(lab.model.cfg.device))
