"""The numbers of a substitution test, and a verdict by fixed rules."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from sae_lens_writesae.conditions import NAMES, REFERENCES
from sae_lens_writesae.substitution_result import SubstitutionResult
from sae_lens_writesae.verdict import statistics as stats
from sae_lens_writesae.verdict.judge import NO_DATA, RELEVANT_RATE, too_few_wins
from sae_lens_writesae.verdict.paper import Outcome

#: A no-op above this KL (nats) is not float32 rounding: float32 logits differ by 1e-5, KL goes with its
#: square.
EXACT_FLOOR = 1e-9

#: A DataFrame inside this file: pandas' own annotations are too loose to check by.
Table = Any


class Verdict(NamedTuple):
    """What the test says at one scale. The rules, in order:

    1. "below the floor": the median deletion effect is not above the floor, so there is nothing to explain.
    2. "inconclusive": fewer than 20 firings or 5 clusters, or the interval of the win rate atom < delete contains both
       1/2 and 60 % (`verdict.judge`).
    3. "fails": that interval does not lie above 1/2.
    4. "confounded": some control also beats deletion (interval above 1/2), and the atom is no better than that control:
       the interval of atom < control ends below 60 %. All such controls are named. References
       (`conditions.REFERENCES`) are no controls.
    5. "undecided": the same, but the interval of atom < control contains both 1/2 and 60 %.
    6. "holds" otherwise.
    """

    outcome: Outcome
    controls: tuple[str, ...]  # that it does not beat, the one with the highest win rate first
    sentence: str


@dataclass(frozen=True)
class Summary:
    """Tables of one metric. Every rate comes with Wilson's interval and the cluster bootstrap's."""

    metric: str
    cluster: str
    n_firings: int
    n_clusters: int
    floor: float
    """95th percentile of the no-op's KL."""
    floor_is_exact: bool
    """Every no-op KL is float32 rounding at most (EXACT_FLOOR)."""
    share_below_floor: float
    """Share of firings whose deletion effect is not above the floor: their wins and losses are arithmetic."""
    median_cosine: float
    share_cosine_half: float
    """Share of firings with cosine(atom, write) > 1/2: where a matched atom is nearer to the write than 0."""
    conditions: pd.DataFrame
    """Per scale and condition: n, median, q25, q75, mean (KL), norm (median), below_floor."""
    comparisons: pd.DataFrame
    """Per scale and pair (a, b): the rate of a < b with intervals, ties, the paired median ratio a / b, Cliff's delta,
    paired sign rate, Wilcoxon and sign-flip p-values, and `holm_p` over all pairs of all scales."""
    chains: pd.DataFrame
    """Per scale: the rate of the strict chain atom < delete < shuffled (the paper's), and with `random` at its end."""
    quartiles: pd.DataFrame
    """Per scale, condition and quartile of the deletion effect: the rate of condition < delete."""
    atoms: pd.DataFrame
    """Per scale and atom: n, rate of atom < delete, median cosine."""
    verdicts: dict[str, Verdict]
    """By scale."""

    def rate(self, a: str, b: str, scale: str) -> pd.Series:
        """The row of `comparisons` for a < b at `scale`. KeyError names what there is."""
        table: Table = self.comparisons
        rows = table[(table["a"] == a) & (table["b"] == b) & (table["scale"] == scale)]
        if rows.empty:
            known = sorted({f"{r.a} < {r.b} at {r.scale}" for r in table.itertuples()})
            raise KeyError(f"no comparison {a} < {b} at {scale}; there are {', '.join(known)}")
        return rows.iloc[0]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; NaN becomes None."""
        plain = {}
        for name, value in vars(self).items():
            if isinstance(value, pd.DataFrame):
                plain[name] = [{k: _plain(v) for k, v in row.items()} for row in value.to_dict("records")]
            elif name == "verdicts":
                plain[name] = {scale: verdict._asdict() for scale, verdict in value.items()}
            else:
                plain[name] = _plain(value)
        return plain


def summarise(
    result: SubstitutionResult, metric: str = "kl_window", *, cluster: str = "sequence", seed: int = 0
) -> Summary:
    """All numbers of one metric. Firings whose metric is missing (NaN) raise ValueError in `statistics`."""
    if cluster not in ("sequence", "atom"):
        raise ValueError(f"cluster must be sequence or atom, found {cluster!r}")
    wide: Table = result.wide(metric).assign(atom=lambda table: table["written_atom"])
    scales = result.info.config.scales
    controls = result.info.config.controls
    floor = float(wide["native"].quantile(0.95))
    wide["quartile"] = stats.quartile(wide["delete"])
    comparisons = _comparisons(wide, scales, controls, cluster, seed)
    medians = _conditions(result.frame, metric, floor)
    return Summary(
        metric=metric,
        cluster=cluster,
        n_firings=len(wide),
        n_clusters=int(wide[cluster].nunique()),
        floor=floor,
        floor_is_exact=bool(wide["native"].max() <= EXACT_FLOOR),
        share_below_floor=float((wide["delete"] <= floor).mean()),
        median_cosine=float(wide["cosine"].median()),
        share_cosine_half=float((wide["cosine"] > 0.5).mean()),
        conditions=medians,
        comparisons=comparisons,
        chains=_chains(wide, scales, controls, cluster, seed),
        quartiles=_quartiles(wide, scales, controls, cluster, seed),
        atoms=_atoms(wide, scales),
        verdicts={scale: _verdict(comparisons, wide["delete"].median(), floor, scale) for scale in scales},
    )


def _comparisons(wide: Table, scales: Iterable[str], controls: Iterable[str], cluster: str, seed: int) -> pd.DataFrame:
    """Everything against deletion, then the atom against every control."""
    rows = []
    for scale in scales:
        pairs = [(name, "delete") for name in ("atom", *controls)] + [("atom", name) for name in controls]
        for a, b in pairs:
            x, y, ids = wide[f"{a}/{scale}"], wide[_column(b, scale)], wide[cluster]
            moved = (y > 0).to_numpy()  # a ratio to an effect of exactly 0 says nothing
            ratio = stats.paired_median_ratio(x[moved], y[moved], ids[moved], seed=seed) if moved.any() else None
            rows.append(
                {"scale": scale, "a": a, "b": b}
                | _rate_columns(stats.win_rate(x, y, ids, seed=seed))
                | {
                    "median_ratio": ratio.estimate if ratio else np.nan,
                    "ratio_low": ratio.interval.low if ratio else np.nan,
                    "ratio_high": ratio.interval.high if ratio else np.nan,
                    "cliffs_delta": stats.cliffs_delta(x, y),
                    "sign_rate": stats.paired_sign_rate(x, y),
                    "wilcoxon_p": stats.paired_wilcoxon(x, y).p_value,
                    "sign_flip_p": stats.sign_flip_test(x, y, ids, seed=seed).p_value,
                }
            )
    table: Table = pd.DataFrame(rows)
    names = table["scale"] + "/" + table["a"] + "/" + table["b"]
    table["holm_p"] = list(stats.holm(dict(zip(names, table["sign_flip_p"]))).values())
    return table


def _conditions(frame: Table, metric: str, floor: float) -> pd.DataFrame:
    grouped = frame.groupby(["scale", "condition"], sort=False)
    table = grouped[metric].describe()[["count", "50%", "25%", "75%", "mean"]].reset_index()
    table.columns = ["scale", "condition", "n", "median", "q25", "q75", "mean"]
    table["norm"] = grouped["norm"].median().to_numpy()
    table["below_floor"] = table["median"] <= floor
    return table.astype({"n": int})


def _chains(wide: Table, scales: Iterable[str], controls: Iterable[str], cluster: str, seed: int) -> pd.DataFrame:
    rows = []
    for scale in scales:
        for last in (name for name in ("shuffled", "random") if name in controls):
            ordered = (wide[f"atom/{scale}"], wide["delete"], wide[f"{last}/{scale}"])
            rate = stats.chain_rate(*ordered, clusters=wide[cluster], seed=seed)
            rows.append({"scale": scale, "chain": f"atom < delete < {last}"} | _rate_columns(rate))
    return pd.DataFrame(rows) if rows else pd.DataFrame(columns=["scale", "chain"])


def _quartiles(wide: Table, scales: Iterable[str], controls: Iterable[str], cluster: str, seed: int) -> pd.DataFrame:
    rows = []
    for scale in scales:
        for name in ("atom", *controls):
            for quartile, part in wide.groupby("quartile"):
                rate = stats.win_rate(part[f"{name}/{scale}"], part["delete"], part[cluster], seed=seed)
                effect = {"quartile": quartile, "delete_median": part["delete"].median()}
                rows.append({"scale": scale, "condition": name} | effect | _rate_columns(rate))
    return pd.DataFrame(rows)


def _atoms(wide: Table, scales: Iterable[str]) -> pd.DataFrame:
    rows = []
    for scale in scales:
        wins = wide[f"atom/{scale}"] < wide["delete"]
        grouped = wide.assign(win=wins).groupby("atom")
        table = grouped.agg(n=("win", "size"), rate=("win", "mean"), cosine=("cosine", "median"))
        rows.append(table.reset_index().assign(scale=scale))
    return pd.concat(rows, ignore_index=True)


def _verdict(comparisons: Table, delete_median: float, floor: float, scale: str) -> Verdict:
    """The rules in the docstring of `Verdict`."""
    table = comparisons[comparisons["scale"] == scale].set_index(["a", "b"])
    atom = table.loc[("atom", "delete")]
    low, high = 100 * atom["boot_low"], 100 * atom["boot_high"]
    share = f"{_percent(atom['rate'])} of {atom['n']} firings (95 % interval {low:.1f} to {high:.1f})"
    if delete_median <= floor:
        return Verdict(
            "below the floor",
            (),
            f"Deletion itself moves the model by {delete_median:.2g} nats, no more than the no-op's {floor:.2g}.",
        )
    if too_few_wins(atom["n"], atom["n_clusters"], atom["boot_low"], atom["boot_high"]):
        return Verdict("inconclusive", (), f"The atom is nearer to the native model on {share}. {NO_DATA}")
    if not atom["boot_low"] > 0.5:
        return Verdict("fails", (), f"The atom is nearer to the native model than deletion on {share}.")
    controls = [a for a, b in table.index if b == "delete" and a not in ("atom", *REFERENCES)]
    unbeaten = [
        c
        for c in controls
        if table.loc[(c, "delete"), "boot_low"] > 0.5 and not table.loc[("atom", c), "boot_low"] > 0.5
    ]
    unbeaten.sort(key=lambda c: -float(table.loc[(c, "delete"), "rate"]))
    as_good = [c for c in unbeaten if table.loc[("atom", c), "boot_high"] < RELEVANT_RATE]
    if unbeaten:
        shown = as_good or unbeaten
        named = ", ".join(f"{NAMES[c]} ({_percent(table.loc[(c, 'delete'), 'rate'])})" for c in shown)
        but = "so does what it does not beat" if as_good else "it is undecided whether it beats"
        sentence = f"The atom beats deletion on {share}, but {but}: {named}."
        return Verdict("confounded" if as_good else "undecided", tuple(shown), sentence)
    others = "and every control that beats deletion" if controls else "but no control was run"
    return Verdict("holds", (), f"The atom beats deletion on {share}, {others}.")


def _rate_columns(rate: stats.Rate) -> dict[str, float]:
    return {
        "rate": rate.rate,
        "wilson_low": rate.wilson.low,
        "wilson_high": rate.wilson.high,
        "boot_low": rate.bootstrap.low,
        "boot_high": rate.bootstrap.high,
        "ties": rate.ties,
        "n": rate.n,
        "n_clusters": rate.n_clusters,
    }


def _percent(x: float) -> str:
    return f"{100 * x:.1f}\u00a0%"


def _column(name: str, scale: str) -> str:
    return name if name in ("native", "delete") else f"{name}/{scale}"


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and np.isnan(value) else value
