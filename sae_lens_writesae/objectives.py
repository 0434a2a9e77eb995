"""What a dictionary should be trained for: objectives of one head side by side, in one report.

The authors of WriteSAE (arXiv 2605.12770) train on states and name a write-aligned loss as what their failures on
larger models lack. An objective here is a target (write, state, last_state) and a loss (`sae.losses.Loss`);
dictionaries that differ in it are measured on the same sequences, and each pair is compared with an interval.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from sae_lens_writesae import objectives_compare as compare
from sae_lens_writesae.conditions import Scale
from sae_lens_writesae.errors import NothingToMeasureError
from sae_lens_writesae.evaluate import check_fits
from sae_lens_writesae.evaluation import Claim, Evaluation, Figure, describe
from sae_lens_writesae.firings import HeadHook
from sae_lens_writesae.interventions.plots import Row, interval_figure
from sae_lens_writesae.objectives_claims import claims
from sae_lens_writesae.reconstruction import reconstruction
from sae_lens_writesae.substitution import run_substitution
from sae_lens_writesae.substitution_config import SubstitutionConfig


@dataclass(frozen=True)
class ObjectivesConfig:
    """How closely each dictionary is looked at."""

    sequences: int = 16
    """Sequences whose reconstruction is measured."""
    n_atoms: int = 40
    """Atoms of each dictionary in the substitution test, drawn uniformly from the alive ones."""
    firings_per_atom: int = 3
    """Firings of each."""
    scale: Scale = "coefficient"
    """Scale that the claims are about, coefficient or matched. Both are measured: the coefficient of a dictionary of
    states is in units of states, so that its atoms can lose by their size alone."""
    controls: tuple[str, ...] = ("random", "state")
    """Its controls, of `conditions.CONTROLS`."""
    horizon: int = 16
    """Its window: KL is averaged over t..t+horizon."""
    alive_tokens: int = 65_536
    """Aliveness is counted on the first so many evaluation tokens (all, where there are fewer)."""
    min_firings: int = 5
    """Firings on those tokens that make an atom alive."""
    seed: int = 0
    """Of draws and controls."""
    label: str = ""
    """Name in reports."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "controls", tuple(self.controls))
        if self.sequences < 2:
            raise ValueError(f"sequences must be at least 2, found {self.sequences}")
        if self.n_atoms < 2:
            raise ValueError(f"n_atoms must be at least 2, since intervals are over atoms, found {self.n_atoms}")
        if self.scale not in compare.SCALES:
            raise ValueError(f"scale must be one of {', '.join(compare.SCALES)}, found {self.scale!r}")
        self.substitution()  # checks the rest

    def substitution(self) -> SubstitutionConfig:
        """The settings of the substitution test of each dictionary."""
        return SubstitutionConfig(
            n_atoms=self.n_atoms,
            firings_per_atom=self.firings_per_atom,
            scales=compare.SCALES,
            controls=self.controls,
            horizon=self.horizon,
            last_position_firings=0,
            alive_tokens=self.alive_tokens,
            min_firings=self.min_firings,
            seed=self.seed,
        )


class Objectives(Evaluation):
    """Dictionaries of one head that differ in what they were trained for.

    Measured of each: the share of variance explained and the share of reads explained (both of the dictionary's own
    target, so that these are compared within a target only); the share of alive atoms; the signed cosine of atom and
    native write at tested firings; and the substitution win rate, the share of tested firings at which the atom is
    nearer to the native model than deletion, at the SAE's own coefficient and at the norm of the native write.

    A dictionary wins a measure where its difference from each other one has an interval above 0 (bootstrap: over
    sequences, paired, for reconstruction; over atoms for all others).

    Claim "training on X substitutes better than training on states by mse", one for each other objective, in order:
    "not tested" without a dictionary of states and mse; "below the floor" where deletion moves the model no more than a
    no-op; "inconclusive" with fewer than 20 firings or 5 atoms, or where the interval of the difference contains both 0
    and 10 points; "fails" where the interval of the difference of win rates does not lie above 0, or X itself does not
    beat deletion; "confounded" where a control beats deletion and X does not beat that control; "holds" otherwise.

    Claim "one objective is best at all that it can be compared in" holds where one dictionary is beaten on no measure
    and wins the substitution; it fails otherwise, and says what wins where.
    """

    kind: ClassVar[str] = "objectives"
    title: ClassVar[str] = "What should a dictionary be trained for?"
    COLUMNS: ClassVar[dict[str, dict[str, str]]] = {
        "dictionaries": {
            "sae": "label of the dictionary",
            "target": "what it was trained on: write, state or last_state",
            "loss": "mse, reads or write",
            "d_sae": "atoms",
            "l0": "atoms active per token",
            "tested_atoms": "atoms in the substitution test",
            "outcome": "verdict of its substitution test",
            "unbeaten": "controls that it does not beat, empty if none",
        },
        "measures": {
            "sae": "label of the dictionary",
            "measure": "explained, reads, alive, cosine; win rates coefficient, matched, or of a control",
            "value": "mean",
            "low": "95 % interval",
            "high": "95 % interval",
            "n": "observations",
            "clusters": "independent units",
            "unit": "what these are",
        },
        "contrasts": {
            "measure": "explained, reads, alive, cosine, coefficient, matched",
            "a": "label of one dictionary",
            "b": "label of another that it can be compared with",
            "difference": "a - b",
            "low": "95 % interval",
            "high": "95 % interval",
        },
        "firings": {
            "sae": "label of the dictionary",
            "sequence": "row of the evaluation tokens",
            "position": "token t that is edited",
            "atom": "atom that fires",
            "cosine": "with the native write, signed",
            "delete": "KL (nats) after deletion of the write",
            "coefficient": "KL with the atom in its place, at the SAE's own coefficient",
            "matched": "the same at the norm of the native write",
        },
    }

    def claims(self) -> list[Claim]:
        """Each objective against states by mse; what wins where."""
        return claims(self)

    def figures(self) -> list[Figure]:
        """Win rates beside the controls, then the other measures."""
        table: Any = self.tables["measures"]
        names = dict.fromkeys(table["sae"])

        def rows(measures: list[str], colours: dict[str, str]) -> list[Row]:
            chosen = [table[(table["sae"] == sae) & (table["measure"] == m)] for m in measures for sae in names]
            return [
                Row(
                    f"{one['sae']}{compare.NAMES[one['measure']]}",
                    one["value"],
                    one["low"],
                    one["high"],
                    colours.get(one["measure"], "soft"),
                )
                for part in chosen
                for one in part.to_dict("records")
            ]

        controls = [m for m in dict.fromkeys(table["measure"]) if m not in compare.MEASURES]
        wins = rows([*compare.SCALES, *controls], dict.fromkeys(compare.SCALES, "atom"))
        rest = rows(["explained", "reads", "alive", "cosine"], {"explained": "ink", "alive": "atom"})
        where = self.label
        return [
            Figure(
                "Nearer to the native model than deletion",
                interval_figure(wins, "% of firings", f"Win rates by objective: {where}", zero=0.5, percent=True),
                "Substitution by the dictionary's own atoms, and by controls of the same norm at the same firings.",
            ),
            Figure(
                "Reconstruction, alive atoms, likeness to the write",
                interval_figure(rest, "share, or cosine", f"Other measures by objective: {where}"),
                "Explained variance and reads are of what each dictionary was trained on.",
            ),
        ]

    def notes(self) -> list[str]:
        """What cannot be compared."""
        return [
            "Writes and states are different things to reconstruct: their explained shares are not compared.",
            *super().notes(),
        ]


@torch.no_grad()
def run_objectives(
    model: Any, saes: Mapping[str, Any], tokens: Tensor, config: ObjectivesConfig | None = None, progress: bool = True
) -> Objectives:
    """Compare dictionaries of one head.

    Args:
        saes: label -> SAE; at least two, of one layer and head. An SAE that was trained with another loss than mse says
            so in its metadata.
        tokens: [N,T] held-out sequences.

    Raises:
        ValueError: fewer than two SAEs, SAEs of different heads, or one without atoms that can be tested.

    Cost: per dictionary N + `sequences` forwards up to its layer, and 3 + controls edited rows a tested firing.
    """
    begin, config = time.perf_counter(), config or ObjectivesConfig()
    _check(model, saes)
    fits = reconstruction(model, saes, tokens[: config.sequences])
    if (fits.table["sae"].value_counts().reindex(list(saes), fill_value=0) < 2).any():
        raise NothingToMeasureError(
            "what a dictionary was trained on varies on fewer than two sequences: nothing to explain"
        )
    tests = {}
    for label, sae in saes.items():
        try:
            tests[label] = run_substitution(model, sae, tokens, config.substitution(), progress)
        except NothingToMeasureError as error:
            raise NothingToMeasureError(f"{label}: {error}") from error
        if tests[label].frame["written_atom"].nunique() < 2:
            raise NothingToMeasureError(
                f"{label}: only one atom can be tested, and an interval needs two; give more tokens"
            )
    units = compare.units(fits.table, tests)
    targets = {label: objective(sae) for label, sae in saes.items()}
    info = describe(
        model,
        next(iter(saes.values())),
        label=config.label or _head(next(iter(saes.values()))),
        config=asdict(config),
        saes=list(saes),
        target=", ".join(dict.fromkeys(target for target, _ in targets.values())),
        n_sequences=len(tokens),
        n_positions=tokens.shape[1],
        omitted={"sequences whose matrices, or reads, do not vary": fits.without_variance},
        conditions=sum(len(test.frame) for test in tests.values()),
        seconds=time.perf_counter() - begin,
    )
    tables = {
        "dictionaries": compare.dictionaries(saes, targets, fits.table, tests, config.scale),
        "measures": compare.measures(units, tests, config),
        "contrasts": compare.contrasts(units, targets, config.seed),
        "firings": compare.firings(tests),
    }
    return Objectives(info, tables)


def objective(sae: Any) -> tuple[str, str]:
    """(target, loss) of a trained SAE, from its metadata."""
    metadata = sae.cfg.metadata
    target = HeadHook.of(sae).target
    kept = tuple(metadata.get("seqpos_slice") or ())
    return ("last_state" if target == "state" and kept[:1] == (-1,) else target), metadata.get("loss") or "mse"


def _head(sae: Any) -> str:
    hook = HeadHook.of(sae)
    return f"L{hook.layer}H{hook.head} objectives"


def _check(model: Any, saes: Mapping[str, Any]) -> None:
    if len(saes) < 2:
        raise ValueError(f"objectives need at least two SAEs to compare, found {len(saes)}")
    for label, sae in saes.items():
        check_fits(model, sae, label)
    heads = {label: HeadHook.of(sae)[1:3] for label, sae in saes.items()}
    if len(set(heads.values())) > 1:
        found = "; ".join(f"{label}: layer {layer}, head {head}" for label, (layer, head) in heads.items())
        raise ValueError(f"objectives are compared on one head, found {found}")
