"""What dictionaries of several seeds have in common: numbers of alive atoms and registers, and atoms one by one.

Source: WriteSAE (arXiv 2605.12770), which reports counts that vary by 4-12 % and fewer than 1 % of atoms that match at
cosine > 0.9. A matched cosine means nothing by itself, since the best of 2,048 partners is always somewhat alike, so
two nulls are matched in the same way.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from sae_lens_writesae.atom.matching import match_atoms
from sae_lens_writesae.conditions import Factors, norm, random_directions
from sae_lens_writesae.errors import NothingToMeasureError
from sae_lens_writesae.evaluate import check_fits
from sae_lens_writesae.evaluation import Claim, Evaluation, Figure, describe
from sae_lens_writesae.firings import HeadHook, atom_factors, collect_firings
from sae_lens_writesae.head_memory import head_writes
from sae_lens_writesae.plots_seeds import figures
from sae_lens_writesae.report_text import percent
from sae_lens_writesae.verdict import statistics as stats
from sae_lens_writesae.verdict.judge import NO_DATA, too_little
from sae_lens_writesae.verdict.paper import Outcome
from sae_lens_writesae.write_cosines import firing_cosines

SAMPLES: dict[str, str] = {
    "atoms": "alive atoms of the two dictionaries",
    "random": "as many Gaussian directions on either side",
    "writes": "as many native writes on either side, of different sequences",
}
"""What is matched: the dictionaries and the two nulls."""


@dataclass(frozen=True)
class SeedsConfig:
    """What counts as alive, as a register, and as the same atom."""

    alive_tokens: int = 65_536
    """Aliveness is counted on the first so many evaluation tokens (all, where there are fewer)."""
    min_firings: int = 5
    """Firings on those tokens that make an atom alive."""
    threshold: float = 0.05
    """Median cosine with the native write from which on an atom is a register."""
    same: float = 0.9
    """|cosine| above which two atoms are the same (the paper's)."""
    largest_spread: float = 0.12
    """Spread of a count over seeds, (largest - smallest) / mean, up to which kinds are the same (the paper's 12 %)."""
    largest_share: float = 0.01
    """Share of matched atoms up to which atoms are not the same (the paper's 1 %)."""
    seed: int = 0
    """Of the nulls."""
    label: str = ""
    """Name in reports."""

    def __post_init__(self) -> None:
        for name in ("alive_tokens", "min_firings"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, found {getattr(self, name)}")
        for name in ("same", "largest_spread", "largest_share"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in (0, 1], found {getattr(self, name)}")


class Seeds(Evaluation):
    """Dictionaries that differ in their seed only.

    Claim 20, "seeds find the same kinds, not the same atoms", holds where the numbers of alive atoms and of registers
    each spread by at most 12 % of their mean, and at most 1 % of matched atoms exceed cosine 0.9 in every pair; it
    fails otherwise, and the sentence says which half failed. Atoms that were never learned share nothing either, so it
    is inconclusive where in some pair the matched cosines are not above those of random directions (interval), or
    there are fewer than 20 pairs of atoms.

    A claim of this project, "seeds share atoms beyond chance": fails where in some pair the median of (matched cosine -
    that of random directions) has an interval that does not lie above 0 (bootstrap over atoms); is confounded where
    native writes drawn at random match as well (interval of that difference does not lie above 0); holds otherwise.
    """

    kind: ClassVar[str] = "seeds"
    title: ClassVar[str] = "Do seeds find the same atoms?"
    COLUMNS: ClassVar[dict[str, dict[str, str]]] = {
        "counts": {
            "sae": "label of the dictionary",
            "alive": "atoms that fire at least min_firings times",
            "register": "of these, with a median cosine at the threshold or above",
            "dead": "atoms that never fire",
        },
        "matches": {
            "a": "label of one dictionary",
            "b": "label of the other",
            "sample": "atoms, random or writes",
            "n": "matched pairs",
            "median": "of |cosine|",
            "share_same": "share of pairs above `same`",
            "excess": "median over pairs of (matched cosine of the atoms - this sample's, both sorted); 0 for atoms",
            "excess_low": "95 % interval over pairs",
            "excess_high": "95 % interval over pairs",
        },
        "pairs": {
            "a": "label of one dictionary",
            "b": "label of the other",
            "sample": "atoms, random or writes",
            "first": "atom of a (a running number in the nulls)",
            "second": "its partner in b",
            "cosine": "|cosine| of the two",
        },
    }

    def claims(self) -> list[Claim]:
        """Claim 20, and whether atoms match beyond chance."""
        return [self._same_kinds(), self._beyond_chance()]

    def figures(self) -> list[Figure]:
        """Matched cosines beside both nulls."""
        return figures(self)

    def notes(self) -> list[str]:
        """How atoms are matched."""
        how = "Alive atoms are matched one to one, so that the sum of |cosines| is largest; so are both nulls."
        return [how, *super().notes()]

    def _matches(self, sample: str) -> Any:
        table: Any = self.tables["matches"]
        return table[table["sample"] == sample]

    def _same_kinds(self) -> Claim:
        counts, config = self.tables["counts"], self.info["config"]
        spread = {name: _spread(counts[name]) for name in ("alive", "register")}
        share = float(self._matches("atoms")["share_same"].max())
        kinds = all(x <= config["largest_spread"] for x in spread.values())
        atoms = share <= config["largest_share"]
        measured = (
            f"alive vary by {percent(spread['alive'])}, registers by {percent(spread['register'])}; at most "
            f"{percent(share)} of atoms match at cosine > {config['same']:g}"
        )
        nulls = {name: float(self._matches(name)["share_same"].max()) for name in ("random", "writes")}
        controls = ", ".join(f"{name} match {percent(x)}" for name, x in nulls.items())
        faults = [] if kinds else [f"counts vary by more than {percent(config['largest_spread'])}"]
        faults += [] if atoms else [f"more than {percent(config['largest_share'])} of atoms are the same"]
        sentence = f"{' and '.join(faults).capitalize()}." if faults else "Counts agree, and atoms do not."
        outcome: Outcome = "fails" if faults else "holds"
        random = self._matches("random")
        if self._few():
            outcome, sentence = "inconclusive", NO_DATA
        elif not faults and not (random["excess_low"] > 0).all():
            outcome = "inconclusive"
            sentence = "Atoms match no better than random directions do: nothing shows that anything was learned."
        claim = "seeds find the same kinds, not the same atoms"
        return Claim(20, claim, measured, len(counts), "seeds", controls, outcome, sentence)

    def _few(self) -> bool:
        """Whether some pair of dictionaries has too few matched atoms."""
        n = int(self._matches("atoms")["n"].min())
        return too_little(n, n)

    def _beyond_chance(self) -> Claim:
        atoms, random, writes = (self._matches(name) for name in SAMPLES)
        measured = f"median matched |cosine| {', '.join(f'{x:.2f}' for x in atoms['median'])}"
        chance = (random["median"].max(), writes["median"].max())
        controls = "random directions {:.2f}, native writes drawn at random {:.2f}".format(*chance)
        worst = random.loc[random["excess_low"].idxmin()]
        outcome: Outcome
        if self._few():
            outcome, sentence = "inconclusive", NO_DATA
        elif not worst["excess_low"] > 0:
            outcome, sentence = "fails", f"{worst['a']} and {worst['b']} match no better than random directions."
        elif not (writes["excess_low"] > 0).all():
            outcome, sentence = "confounded", "So do native writes drawn at random, without any training."
        else:
            outcome, sentence = (
                "holds",
                "In every pair atoms match better than random directions and than random writes.",
            )
        return Claim(
            None,
            "seeds share atoms beyond chance",
            measured,
            int(atoms["n"].sum()),
            f"atom pairs of {len(atoms)} pairs of seeds",
            controls,
            outcome,
            sentence,
        )


def run_seeds(
    model: Any, saes: Mapping[str, Any], tokens: Tensor, config: SeedsConfig | None = None, progress: bool = True
) -> Seeds:
    """Compare dictionaries of one head, trained alike but for their seed.

    Args:
        saes: label -> SAE; at least two, on one hook, of one size.
        tokens: [N,T] held-out sequences.

    Raises:
        ValueError: fewer than two SAEs, SAEs of different hooks or sizes, or one without alive atoms.

    Cost: two forwards per sequence and SAE, and an assignment per pair and sample.
    """
    begin, config = time.perf_counter(), config or SeedsConfig()
    _check(model, saes)
    alive: dict[str, Factors] = {}
    numbers: dict[str, np.ndarray] = {}
    counts = []
    for label, sae in saes.items():
        row, numbers[label], alive[label] = _counted(model, sae, tokens, config, label, progress)
        counts.append(row)
    pools = _write_pools(model, next(iter(saes.values())), tokens, max(map(len, alive.values())))
    rng = np.random.default_rng(config.seed)
    pairs = [
        _matched(a, b, sample, *sides)
        for a, b in itertools.combinations(saes, 2)
        for sample, sides in _samples(a, b, alive, numbers, pools, rng).items()
    ]
    table = pd.concat(pairs, ignore_index=True)
    info = describe(
        model,
        next(iter(saes.values())),
        label=config.label,
        config=asdict(config),
        saes=list(saes),
        n_sequences=len(tokens),
        n_positions=tokens.shape[1],
        omitted={},
        seconds=time.perf_counter() - begin,
    )
    tables = {"counts": pd.DataFrame(counts), "matches": _summed(table, config), "pairs": table}
    return Seeds(info, tables)


def _check(model: Any, saes: Mapping[str, Any]) -> None:
    if len(saes) < 2:
        raise ValueError(f"seeds need at least two SAEs to compare, found {len(saes)}")
    for label, sae in saes.items():
        check_fits(model, sae, label)
    kinds = {label: f"{HeadHook.of(sae).name} with {sae.cfg.d_sae} atoms" for label, sae in saes.items()}
    if len(set(kinds.values())) > 1:
        found = "; ".join(f"{label}: {kind}" for label, kind in kinds.items())
        raise ValueError(f"seeds are compared on one hook and at one size, found {found}")


def _counted(
    model: Any, sae: Any, tokens: Tensor, config: SeedsConfig, label: str, progress: bool
) -> tuple[dict[str, Any], np.ndarray, Factors]:
    """The row of `counts`, and the alive atoms by number and as factors."""
    shape = model.cfg.layer(HeadHook.of(sae).layer)
    firings = collect_firings(model, sae, tokens, progress=progress)
    n_tokens = min(config.alive_tokens, tokens.numel())
    alive = firings.alive(n_tokens, config.min_firings)
    if len(alive) == 0:
        raise NothingToMeasureError(f"{label} has no atom that fires {config.min_firings} times on {n_tokens:,} tokens")
    cosine: Any = firing_cosines(model, sae, tokens, firings, alive, seed=config.seed).table
    medians = cosine.groupby("atom")["cosine"].median()
    row = {
        "sae": label,
        "alive": len(alive),
        "register": int((medians >= config.threshold).sum()),
        "dead": firings.n_atoms - len(firings.alive(n_tokens)),
    }
    return row, alive, atom_factors(sae, alive, shape.K, shape.V)


@torch.no_grad()
def _write_pools(model: Any, sae: Any, tokens: Tensor, needed: int) -> tuple[Factors, Factors]:
    """Native writes of even and of odd sequences, at least `needed` each where there are so many."""
    hook = HeadHook.of(sae)
    pools = []
    for start in (0, 1):
        rows = range(start, len(tokens), 2)[: -(-needed // tokens.shape[1]) + 1]
        found = [head_writes(model.recurrence(tokens[i : i + 1], hook.layer), hook.head, "additive") for i in rows]
        writes = [each.native.rows(norm(each.native) > 0) for each in found]
        if not writes:
            raise NothingToMeasureError("the null of native writes needs at least two evaluation sequences, found one")
        pools.append(Factors(torch.cat([w.keys for w in writes]), torch.cat([w.values for w in writes])))
    return pools[0], pools[1]


def _samples(a: str, b: str, alive: Any, numbers: Any, pools: Any, rng: np.random.Generator) -> dict[str, Any]:
    """What is matched for one pair of SAEs: (numbers, factors) of either side, by sample."""
    sizes = (len(alive[a]), len(alive[b]))
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    random = [random_directions(each, generator) for each in (alive[a], alive[b])]
    chosen = [rng.permutation(len(pool))[:size] for pool, size in zip(pools, sizes)]
    writes = [pool.rows(torch.tensor(rows)) for pool, rows in zip(pools, chosen)]
    made = {"atoms": ((numbers[a], alive[a]), (numbers[b], alive[b]))}
    for name, sides in (("random", random), ("writes", writes)):
        made[name] = tuple((np.arange(len(side)), side) for side in sides)  # pyright: ignore[reportArgumentType]
    return made


def _matched(a: str, b: str, sample: str, one: Any, other: Any) -> pd.DataFrame:
    found = match_atoms(one[1], other[1])
    ids = {"first": one[0][found.first], "second": other[0][found.second]}
    return pd.DataFrame({"a": a, "b": b, "sample": sample, **ids, "cosine": found.cosine})


def _summed(pairs: Any, config: SeedsConfig) -> pd.DataFrame:
    """The table `matches`. Atoms and a null have no pairing of their own, so both are sorted: a difference of
    quantiles."""
    rows = []
    for (a, b), part in pairs.groupby(["a", "b"], sort=False):
        own = np.sort(part.loc[part["sample"] == "atoms", "cosine"])
        for sample in SAMPLES:
            x = np.sort(part.loc[part["sample"] == sample, "cosine"])
            row = {"a": a, "b": b, "sample": sample, "n": len(x), "median": np.median(x)}
            row["share_same"] = (x > config.same).mean()
            n = min(len(x), len(own))
            gap = own[-n:] - x[-n:]
            boot = stats.cluster_bootstrap(gap, np.arange(n), stats.weighted_median, seed=config.seed)
            low, high = boot.interval if n > 1 else (boot.estimate, boot.estimate)
            rows.append(row | {"excess": boot.estimate, "excess_low": low, "excess_high": high})
    return pd.DataFrame(rows)


def _spread(counts: Any) -> float:
    """(largest - smallest) / mean; 0 where all are 0."""
    return float((counts.max() - counts.min()) / counts.mean()) if counts.max() > 0 else 0.0
