"""Settings and result of substitution by several atoms (`multi_atom`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from sae_lens_writesae.conditions import REFERENCES
from sae_lens_writesae.evaluation import Claim, Evaluation, Figure
from sae_lens_writesae.interventions import plots
from sae_lens_writesae.interventions.common import Estimate, check_at_least, estimate
from sae_lens_writesae.substitution_config import SubstitutionConfig
from sae_lens_writesae.verdict.judge import NO_DATA, too_little

ALL = 0
"""The count that stands for "all active atoms"."""
_FLOOR_KL = 1e-9
"""As `summary.EXACT_FLOOR`."""


@dataclass(frozen=True)
class MultiAtomConfig:
    """Which firings, how many atoms, what beside them."""

    n_atoms: int | None = 20
    """Atoms whose firings are drawn, as in the substitution test. None: all."""
    firings_per_atom: int = 2
    """Firings of each; several at one position count once."""
    counts: tuple[int, ...] = (1, 2, 4, 8, 16)
    """How many of the strongest atoms are written (by |a_i| |A_i|); all active ones are always run too."""
    scales: tuple[str, ...] = ("coefficient", "matched")
    """The partial sum as the SAE gives it, or brought to the norm of the native write."""
    controls: tuple[str, ...] = ("mean", "state", "state_after")
    """The n top terms of the head's mean write or of the state before the write, at the norm of the partial sum;
    `state_after`, the state after the write, is a reference that confounds nothing."""
    horizon: int = 16
    """KL is averaged over t..t+horizon."""
    first_position: int = 1
    """Firings before this token are left out."""
    mean_write_sequences: int = 16
    """Sequences from which the mean write is estimated."""
    rows_per_run: int = 256
    """Edited rows at once."""
    seed: int = 0
    """Of the draw."""
    label: str = ""
    """Name in reports."""

    def __post_init__(self) -> None:
        for name, known in (("scales", ("coefficient", "matched")), ("controls", ("mean", "state", "state_after"))):
            given = tuple(getattr(self, name))
            object.__setattr__(self, name, given)
            if unknown := [x for x in given if x not in known]:
                raise ValueError(f"{name} must be among {', '.join(known)}, found {', '.join(map(str, unknown))}")
        object.__setattr__(self, "counts", tuple(int(n) for n in self.counts))
        if list(self.counts) != sorted(set(self.counts)) or not self.counts or self.counts[0] < 1:
            raise ValueError(f"counts rise from 1 or more, found {self.counts}")
        if not self.scales:
            raise ValueError("scales must name at least one of coefficient, matched")
        check_at_least(self, {"n_atoms": 1, "firings_per_atom": 1, "horizon": 1, "mean_write_sequences": 1})

    def substitution(self) -> SubstitutionConfig:
        """The substitution test whose firings are drawn."""
        names = ("n_atoms", "firings_per_atom", "horizon", "first_position", "mean_write_sequences", "rows_per_run")
        return SubstitutionConfig(**{n: getattr(self, n) for n in names}, last_position_firings=0, seed=self.seed)


class MultiAtom(Evaluation):
    """KL from the native model when a write is replaced by n atoms of its own code.

    Definition: at a firing's position t the SAE's active atoms are ordered by |a_i| |A_i|; written is the sum of the n
    first a_i A_i (`code`), and the same with the decoder bias where the SAE has one (`code + bias`; `bias` alone is
    n = 0 of it), at the SAE's own scale or at the norm of the native write. KL(native || patched), mean over
    t..t+horizon. Beside it: native (a no-op), delete, and at the same number of rank-1 terms and the same norm the top
    terms of the mean write and of the state S_t - W_t before the write; the state after it is a reference.

    For an SAE of states the code is that of the state S_t, and its atoms are written in the place of the write: the
    question is then whether what the state's dictionary says is there can stand in for what the token adds. At the
    SAE's own scale that has the norm of a whole state.

    Verdict (a claim of this project), with all atoms, at the first scale, with the bias where that is nearer:
    1. "below the floor": the median KL of deletion is below 1e-9.
    2. "inconclusive" with too little data (`verdict.judge`); else "fails":
       the interval of log KL(all atoms) - log KL(delete) does not lie below 0.
    3. "confounded": a control at the same rank has an interval below 0 too, and all atoms do not beat it.
    4. "holds" otherwise.
    """

    kind: ClassVar[str] = "multi_atom"
    title: ClassVar[str] = "How many atoms does a write take?"
    COLUMNS: ClassVar[dict[str, dict[str, str]]] = {
        "writes": {
            "sequence": "evaluation sequence",
            "position": "t",
            "condition": "native, delete, code, code + bias, bias, mean, state, state_after",
            "scale": "coefficient, matched; none for native and delete",
            "count": "atoms written (controls: atoms whose terms and norm they have); 0 for native, delete, bias",
            "all": "these are all active atoms",
            "terms": "rank-1 terms written",
            "kl": "nats, mean over t..t+horizon",
            "kl_at": "nats, at t",
            "norm": "of what is written over the native norm",
            "cosine": "of what is written with the native write",
        }
    }

    def _log_ratio(self, condition: str, scale: str, count: int, against: Any) -> Estimate:
        """Mean log KL ratio with its interval by sequence."""
        own = self.part(condition, scale, count)
        ratio = np.log(np.maximum(own["kl"], 1e-16)) - np.log(np.maximum(against["kl"].loc[own.index], 1e-16))
        return estimate(ratio, own["sequence"])

    def part(self, condition: str, scale: str = "none", count: int | None = None) -> Any:
        """Rows of one condition by (sequence, position); `count` ALL: with all active atoms. Where fewer than `count`
        are active, all of them."""
        table: Any = self.tables["writes"]
        own = table[(table["condition"] == condition) & (table["scale"] == scale)]
        if count is not None:
            reached = own["all"] & ((own["count"] <= count) | (count == ALL))
            own = own[reached | (~own["all"] & (own["count"] == count))]
        return own.assign(place=list(zip(own["sequence"], own["position"]))).set_index("place")

    @property
    def _code(self) -> str:
        """With the bias, if there is one and it is nearer with all atoms."""
        scale = self.info["config"]["scales"][0]
        biased = self.part("code + bias", scale, ALL)
        if biased.empty:
            return "code"
        return "code + bias" if biased["kl"].median() < self.part("code", scale, ALL)["kl"].median() else "code"

    def claims(self) -> list[Claim]:
        """All atoms against deletion and the controls."""
        scale, code = self.info["config"]["scales"][0], self._code
        delete = self.part("delete")
        against_delete = self._log_ratio(code, scale, ALL, delete)
        controls = [c for c in self.info["config"]["controls"] if not self.part(c, scale, ALL).empty]
        beaten = {c: self._log_ratio(c, scale, ALL, delete) for c in controls}
        versus = {c: self._log_ratio(code, scale, ALL, self.part(c, scale, ALL)) for c in controls}
        rivals = [c for c in controls if c not in REFERENCES and beaten[c].high < 0 and not versus[c].high < 0]
        medians = {n: float(self.part(code, scale, n)["kl"].median()) for n in self._counts(code, scale)}
        if float(delete["kl"].median()) < _FLOOR_KL:
            outcome, why = "below the floor", "Deletion itself does not move the model."
        elif too_little(against_delete.n, against_delete.n_clusters, against_delete.low, against_delete.high):
            outcome, why = "inconclusive", NO_DATA
        elif not against_delete.high < 0:
            outcome, why = "fails", "The whole code is not nearer to the native model than writing nothing."
        elif rivals:
            outcome, why = "confounded", f"At the same rank and norm {' and '.join(rivals)} does as well."
        else:
            outcome, why = "holds", "The whole code is nearer than nothing, and than every control of its rank."
        curve = ", ".join(f"{'all' if n == ALL else n}: {value:.3g}" for n, value in medians.items())
        return [
            Claim(
                None,
                f"a write can be replaced by its sparse code ({code}, {scale})",
                f"median KL by atoms {curve} nats; delete {delete['kl'].median():.3g}; "
                f"KL ratio to delete {np.exp(against_delete.mean):.2f}",
                against_delete.n,
                f"writes in {against_delete.n_clusters} sequences",
                "; ".join(f"{c}: ratio to delete {np.exp(e.mean):.2f}" for c, e in beaten.items()),
                outcome,
                why,
            )
        ]

    def _counts(self, condition: str, scale: str) -> list[int]:
        table: Any = self.tables["writes"]
        own = table[(table["condition"] == condition) & (table["scale"] == scale)]
        counts = sorted(set(own.loc[~own["all"], "count"]) - {ALL})
        return [*counts, ALL]

    def figures(self) -> list[Figure]:
        """KL, and norm and cosine of what is written, by the number of atoms."""
        made = []
        for scale in self.info["config"]["scales"]:
            title = f"KL by atoms at scale {scale}, multi_atom: {self.label}"
            svg = plots.curve_figure(self._curves(scale, "kl"), "atoms written (last: all)", title, log_x=True)
            made.append(Figure(f"KL by number of atoms ({scale})", svg, "Median over writes, nats."))
        scale = self.info["config"]["scales"][0]
        for column, name in (("norm", "norm over the native norm"), ("cosine", "cosine with the native write")):
            title = f"{column} by atoms, multi_atom: {self.label}"
            lines = [line for line in self._curves(scale, column) if line.name not in ("delete", "native")]
            made.append(
                Figure(name.capitalize(), plots.curve_figure(lines, "atoms written (last: all)", title, log_x=True))
            )
        return made

    def _curves(self, scale: str, column: str) -> list[plots.Line]:
        counts = self._counts("code", scale)
        x = [float(n) for n in counts[:-1]]
        x.append(max(float(self.part("code", scale, ALL)["count"].max()), *(n + 1 for n in x), 1.0))
        lines = []
        for name in ("mean", "state", "state_after", "code + bias", "code"):
            if all(not self.part(name, scale, n).empty for n in counts):
                y = [float(self.part(name, scale, n)[column].median()) for n in counts]
                lines.append(plots.Line(name, x, y, "atom" if name == "code" else "ink" if "bias" in name else "soft"))
        if column == "kl":
            lines.append(plots.Line("delete", x, [float(self.part("delete")["kl"].median())] * len(x), "rival"))
        return lines

    def notes(self) -> list[str]:
        """What the code of a state means."""
        state = "The SAE reads states: its code of the state after the write is written in the place of the write."
        return [*([state] if self.info["target"] == "state" else []), *super().notes()]
