"""Which atoms point along the writes they fire on: the paper's partition into registers and bundles, with its nulls.

Source: WriteSAE (arXiv 2605.12770), section on the partition. Per alive atom, the median over its firings of the signed
cosine cos(v_i, k_t) cos(w_i, u_t) between the atom and the native write; an atom is a *register* from 0.05 on and a
*bundle* below. Whether there are two kinds at all is asked of Gaussian mixtures (1-4 components, BIC), and the nulls
say what a dictionary without such atoms would show.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pandas as pd
from torch import Tensor

from sae_lens_writesae import partition_claims, plots_partition
from sae_lens_writesae.errors import NothingToMeasureError
from sae_lens_writesae.evaluate import check_fits
from sae_lens_writesae.evaluation import Claim, Evaluation, Figure, describe
from sae_lens_writesae.firings import Firings, collect_firings
from sae_lens_writesae.substitution import run_substitution
from sae_lens_writesae.substitution_config import SubstitutionConfig
from sae_lens_writesae.substitution_result import SubstitutionResult
from sae_lens_writesae.verdict.mixtures import COLUMNS as MIXTURE_COLUMNS
from sae_lens_writesae.verdict.mixtures import fisher_z, fit_mixtures
from sae_lens_writesae.write_cosines import firing_cosines

SAMPLES: dict[str, str] = {
    "atoms": "median cosine over the atom's firings",
    "shuffled": "the same with writes of other positions of the same sequence",
    "random": "the same firings with a random direction in the atom's place",
}
"""The dictionary and its two nulls: columns of the table `atoms`, samples of the others."""


@dataclass(frozen=True)
class PartitionConfig:
    """What counts as alive, and what is fitted."""

    alive_tokens: int = 65_536
    """Aliveness is counted on the first so many evaluation tokens (all, where there are fewer)."""
    min_firings: int = 5
    """Firings on those tokens that make an atom alive; a median over fewer says little."""
    threshold: float = 0.05
    """Cosine from which on an atom is a register (the paper's operational rule)."""
    sweep: tuple[float, ...] = (0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.09, 0.10)
    """Thresholds at which atoms are counted beside it."""
    components: int = 4
    """Largest mixture that is fitted."""
    restarts: int = 3
    """Starts of each fit; the likeliest is kept."""
    min_atoms: int = 20
    """Alive atoms without which no claim is tested."""
    tested_atoms: int = 16
    """Atoms of each kind whose substitution is tested by `evaluate_partition`, drawn uniformly (claim 4). 0: none."""
    firings_per_atom: int = 4
    """Firings of each of these atoms."""
    controls: tuple[str, ...] = ("random", "state", "mean")
    """Controls of that test, of `conditions.CONTROLS`."""
    seed: int = 0
    """Of the nulls, the fits and the draw of tested atoms."""
    label: str = ""
    """Name in reports."""

    def __post_init__(self) -> None:
        for name in ("sweep", "controls"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # lists, as JSON gives them, are welcome
        for name in ("alive_tokens", "min_firings", "components", "restarts", "min_atoms", "firings_per_atom"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, found {getattr(self, name)}")
        if self.tested_atoms < 0:
            raise ValueError(f"tested_atoms must be at least 0, found {self.tested_atoms}")
        for name, values in (("threshold", (self.threshold,)), ("sweep", self.sweep)):
            if wrong := [x for x in values if not -1 <= x <= 1]:
                raise ValueError(f"{name} holds cosines between -1 and 1, found {wrong[0]}")


class Partition(Evaluation):
    """Registers, bundles and dead atoms of one dictionary, beside two nulls.

    Claim 6, "atoms part into registers and bundles", by these rules in order:

    1. "not tested": fewer than `min_atoms` alive atoms, or all cosines alike.
    2. "fails": on the cosines, BIC is lowest at another number of components than 2, or at 2 by less than 10 under
       that of one (10: "very strong evidence", Kass and Raftery, 1995).
    3. "confounded": the shuffled null, too, takes more than one component by at least 10, or the share of atoms at the
       threshold or above is no higher than in the shuffled null (interval of the difference, over atoms, does not lie
       above 0).
    4. "holds" otherwise.

    A claim of this project, "atoms point along the writes they fire on", holds where the median over atoms of (cosine -
    shuffled) has an interval above 0 (bootstrap over atoms); the random null is stated beside it.

    Claim 4, "register and bundle alike", needs the substitution test of atoms of both kinds (`evaluate_partition` draws
    as many of each): below the floor, inconclusive, confounded or undecided as that test says (inconclusive, too, with
    fewer than 20 firings or 5 atoms of a kind); else it holds where both kinds beat deletion (intervals over atoms
    above 1/2) and a permutation of atoms finds no difference at 5 %, and fails otherwise.
    """

    kind: ClassVar[str] = "partition"
    title: ClassVar[str] = "Do atoms point along the writes they fire on, and are there two kinds?"
    COLUMNS: ClassVar[dict[str, dict[str, str]]] = {
        "atoms": {
            "atom": "index of an alive atom",
            "firings": "firings the medians are over",
            "cosine": SAMPLES["atoms"],
            "shuffled": SAMPLES["shuffled"],
            "random": SAMPLES["random"],
            "z": "Fisher's z of the cosine",
            "kind": "register (cosine >= threshold) or bundle",
        },
        "mixtures": {
            "sample": "atoms, shuffled or random",
            "space": "cosine or z (Fisher's)",
            "components": "components of the mixture",
            "component": "number of the component, by its mean",
            "weight": "its share",
            "mean": "its mean",
            "sd": "its standard deviation",
            "bic": "of the mixture; lower is better",
            "best": "whether this mixture has the lowest BIC of its sample and space",
        },
        "sweep": {
            "threshold": "cosine from which on an atom counts as a register",
            "sample": "atoms, shuffled or random",
            "registers": "atoms at or above it",
            "share": "of alive atoms",
        },
        "substitution": {
            "scale": "scale of the substitution test",
            "kind": "register or bundle",
            "rate": "share of firings on which the atom is nearer to native than deletion",
            "low": "95 % interval over atoms",
            "high": "95 % interval over atoms",
            "n": "firings",
            "n_atoms": "atoms",
        },
    }

    def claims(self) -> list[Claim]:
        """Claims 6 and 4, and whether atoms point along their writes."""
        return partition_claims.claims(self)

    def figures(self) -> list[Figure]:
        """Cosines with nulls, BIC by components, registers by threshold."""
        return plots_partition.figures(self)

    def notes(self) -> list[str]:
        """What alive means, and what was left out."""
        info = self.info
        rule = (
            f"Alive: at least {info['config']['min_firings']} firings on {info['alive_tokens']:,} held-out tokens; "
            f"{info['n_alive']:,} of {info['d_sae']:,} atoms, and {info['dead']:,} never fire there."
        )
        kinds = (
            "Two components of a mixture are no proof of two kinds: one skewed distribution is fitted by two "
            "Gaussians, too, which is why the nulls are fitted beside it."
        )
        return [rule, kinds, *super().notes()]


def run_partition(
    model: Any,
    sae: Any,
    tokens: Tensor,
    config: PartitionConfig | None = None,
    progress: bool = True,
    *,
    substitution: SubstitutionResult | None = None,
) -> Partition:
    """Cosines of all alive atoms of one SAE with the writes they fire on.

    Args:
        tokens: [N,T] held-out sequences.
        substitution: the substitution test of the same SAE, for claim 4.

    Raises:
        ValueError: the SAE does not fit the model, no atom is alive, or the substitution test is of another hook.

    Cost: two forwards per sequence up to the SAE's layer, and the mixtures (a second or two for 2,048 atoms).
    """
    check_fits(model, sae, "hand")
    config = config or PartitionConfig()
    result = _partition(model, sae, tokens, collect_firings(model, sae, tokens, progress=progress), config)
    return result if substitution is None else partition_claims.joined(result, substitution, config.seed)


def evaluate_partition(
    model: Any, sae: Any, tokens: Tensor, config: PartitionConfig | None = None, progress: bool = True
) -> Partition:
    """`run_partition` with a substitution test of as many registers as bundles, drawn uniformly from those that can be
    tested; without one where either kind has fewer than two such atoms.

    Cost: beside `run_partition`, 2 + 1 + controls edited rows for each of 2 * tested_atoms * firings_per_atom firings.
    """
    begin, config = time.perf_counter(), config or PartitionConfig()
    check_fits(model, sae, "hand")
    firings = collect_firings(model, sae, tokens, progress=progress)
    result = _partition(model, sae, tokens, firings, config)
    settings = SubstitutionConfig(
        atom_choice="own",  # the claim is about atoms of either kind, not about those that dominate a position
        firings_per_atom=config.firings_per_atom,
        scales=("coefficient",),
        controls=config.controls,
        last_position_firings=0,
        alive_tokens=config.alive_tokens,
        seed=config.seed,
    )
    drawn = _drawn(result.tables["atoms"], firings, settings, config)
    if drawn:
        test = run_substitution(model, sae, tokens, replace(settings, atoms=drawn), progress)
        result = partition_claims.joined(result, test, config.seed)
        result.info["conditions"] = len(test.frame)
    result.info["seconds"] = time.perf_counter() - begin
    return result


def _drawn(atoms: Any, firings: Firings, settings: SubstitutionConfig, config: PartitionConfig) -> tuple[int, ...]:
    """Up to `tested_atoms` of each kind that fire where they can be tested; none where a kind has fewer than two."""
    inside = firings.position >= settings.first_position
    inside &= firings.position < firings.n_positions - settings.horizon
    testable = atoms[atoms["atom"].isin(np.unique(firings.atom[inside]))]
    rng, chosen = np.random.default_rng([config.seed, 4]), []
    for kind in ("register", "bundle"):
        own = testable.loc[testable["kind"] == kind, "atom"].to_numpy()
        if min(len(own), config.tested_atoms) < 2:
            return ()
        chosen += rng.choice(own, min(len(own), config.tested_atoms), replace=False).tolist()
    return tuple(sorted(chosen))


def _partition(model: Any, sae: Any, tokens: Tensor, firings: Firings, config: PartitionConfig) -> Partition:
    """Everything but claim 4."""
    begin = time.perf_counter()
    alive_tokens = min(config.alive_tokens, tokens.numel())
    alive = firings.alive(alive_tokens, config.min_firings)
    ever = firings.alive(alive_tokens)
    if len(alive) == 0:
        raise NothingToMeasureError(
            f"no atom is alive: {len(ever)} of {firings.n_atoms} fire on {alive_tokens:,} tokens, none of them "
            f"{config.min_firings} times; give more tokens, or lower min_firings"
        )
    found = firing_cosines(model, sae, tokens, firings, alive, seed=config.seed)
    if found.table.empty:
        raise NothingToMeasureError(
            f"no cosine is defined: {found.zero_writes} firings are at zero writes, and the atoms are alive"
        )
    atoms = _atoms(found.table, config.threshold)
    mixtures, unfitted = _mixtures(atoms, config)
    info = describe(
        model,
        sae,
        label=config.label,
        config=asdict(config),
        n_sequences=len(tokens),
        n_positions=tokens.shape[1],
        alive_tokens=alive_tokens,
        n_alive=len(atoms),
        dead=firings.n_atoms - len(ever),
        omitted={
            f"atoms that fire fewer than {config.min_firings} times": len(ever) - len(alive),
            "alive atoms that are zero matrices, or fire at zero writes only": len(alive) - len(atoms),
            "firings at zero writes": found.zero_writes,
            **unfitted,
        },
    )
    tables = {
        "atoms": atoms,
        "mixtures": mixtures,
        "sweep": _sweep(atoms, config),
        "substitution": partition_claims.by_kind(None, atoms, info),
    }
    return Partition(info | {"seconds": time.perf_counter() - begin}, tables)


def _atoms(table: Any, threshold: float) -> pd.DataFrame:
    """The table `atoms`: medians over firings."""
    grouped = table.groupby("atom")[list(("cosine", "shuffled", "random"))]
    atoms = grouped.median().assign(firings=grouped.size()).reset_index()
    atoms["z"] = fisher_z(atoms["cosine"])
    atoms["kind"] = np.where(atoms["cosine"] >= threshold, "register", "bundle")
    return atoms[["atom", "firings", "cosine", "shuffled", "random", "z", "kind"]]


def _mixtures(atoms: Any, config: PartitionConfig) -> tuple[pd.DataFrame, dict[str, int]]:
    """The table `mixtures`, and how many were not fitted for which reason."""
    tables: list[pd.DataFrame] = []
    unfitted: dict[str, int] = {}
    for sample in SAMPLES:
        values = atoms["cosine" if sample == "atoms" else sample].to_numpy()
        for space, x in (("cosine", values), ("z", fisher_z(values))):
            fits = fit_mixtures(x, config.components, restarts=config.restarts, seed=config.seed)
            tables.append(fits.table.assign(sample=sample, space=space))
            missing = config.components - len(set(fits.table["components"]))
            if missing:
                why = f"mixtures of the {sample} sample not fitted: {fits.omitted}"
                unfitted[why] = unfitted.get(why, 0) + missing
    joined: Any = pd.concat(tables, ignore_index=True)
    return joined[["sample", "space", *MIXTURE_COLUMNS]], unfitted


def _sweep(atoms: Any, config: PartitionConfig) -> pd.DataFrame:
    rows = []
    for threshold in config.sweep:
        for sample in SAMPLES:
            at = atoms["cosine" if sample == "atoms" else sample] >= threshold
            rows.append({"threshold": threshold, "sample": sample, "registers": int(at.sum()), "share": at.mean()})
    return pd.DataFrame(rows, columns=list(Partition.COLUMNS["sweep"]))
