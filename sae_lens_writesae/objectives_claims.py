"""What a comparison of objectives says, by the rules in `objectives.Objectives`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sae_lens_writesae.conditions import NAMES
from sae_lens_writesae.evaluation import Claim
from sae_lens_writesae.objectives_compare import MEASURES, WITHIN_TARGET
from sae_lens_writesae.report_text import percent, span
from sae_lens_writesae.verdict.judge import NO_DATA, too_little

if TYPE_CHECKING:
    from sae_lens_writesae.objectives import Objectives

_RELEVANT = 0.1
"""Difference of win rates that matters."""

_WORDS = {
    "explained": "variance of its target",
    "reads": "reads of its target",
    "alive": "alive atoms",
    "cosine": "cosine with writes",
    "coefficient": "substitution at its own coefficient",
    "matched": "substitution at matched norm",
}


def claims(result: Objectives) -> list[Claim]:
    """Each objective against states by mse; what wins where."""
    table: Any = result.tables["dictionaries"]
    base = table[(table["target"] == "state") & (table["loss"] == "mse")]
    if base.empty:
        need = "It needs a dictionary trained on states by mse."
        found = [Claim(None, "another objective substitutes better", "–", 0, "firings", "", "not tested", need)]
    else:
        first = base.iloc[0]["sae"]
        found = [_better(result, row, first) for row in table.to_dict("records") if row["sae"] != first]
    return [*found, _best(result)]


def standings(result: Objectives) -> dict[str, tuple[str, list[str]]]:
    """By measure (and target, where only within one can be compared): the leader, and those that it does not beat."""
    measures: Any = result.tables["measures"]
    contrasts: Any = result.tables["contrasts"]
    targets = dict(zip(result.tables["dictionaries"]["sae"], result.tables["dictionaries"]["target"]))
    found: dict[str, tuple[str, list[str]]] = {}
    for measure in MEASURES:
        groups = {target: [s for s in targets if targets[s] == target] for target in dict.fromkeys(targets.values())}
        for target, group in groups.items() if measure in WITHIN_TARGET else [("", list(targets))]:
            if len(group) < 2:
                continue
            own = measures[(measures["measure"] == measure) & measures["sae"].isin(group)].set_index("sae")["value"]
            leader = str(own.idxmax())
            ahead = contrasts[(contrasts["measure"] == measure) & (contrasts["a"] == leader) & (contrasts["low"] > 0)]
            tied = [sae for sae in group if sae != leader and sae not in set(ahead["b"])]
            found[f"{measure}/{target}" if target else measure] = (leader, tied)
    return found


def _value(result: Objectives, sae: str, measure: str) -> Any:
    table: Any = result.tables["measures"]
    return table[(table["sae"] == sae) & (table["measure"] == measure)].iloc[0]


def _better(result: Objectives, row: dict[str, Any], base: str) -> Claim:
    contrasts: Any = result.tables["contrasts"]
    other: Any = result.tables["dictionaries"].set_index("sae").loc[base]
    scale = result.info["config"]["scale"]
    own, against = _value(result, row["sae"], scale), _value(result, base, scale)
    chosen = (contrasts["measure"] == scale) & (contrasts["a"] == row["sae"]) & (contrasts["b"] == base)
    gap = contrasts[chosen].iloc[0]
    measured = (
        f"{row['sae']} {percent(own['value'])} [{span(own['low'], own['high'])}], "
        f"{base} {percent(against['value'])} [{span(against['low'], against['high'])}] beat deletion; difference "
        f"{100 * gap['difference']:+.1f} [{100 * gap['low']:+.1f}, {100 * gap['high']:+.1f}] points"
    )
    controls = "; ".join(
        f"{NAMES[control]} {percent(_value(result, row['sae'], control)['value'])} at the firings of {row['sae']}"
        for control in result.info["config"]["controls"]
    )
    n, clusters = int(own["n"] + against["n"]), int(min(own["clusters"], against["clusters"]))
    if "below the floor" in (row["outcome"], other["outcome"]):
        outcome, sentence = "below the floor", "Deletion itself moves the model by no more than the no-op."
    elif too_little(n, clusters, gap["low"], gap["high"], relevant=_RELEVANT):
        outcome, sentence = "inconclusive", NO_DATA
    elif not gap["low"] > 0:
        outcome, sentence = "fails", "The interval of the difference does not lie above 0."
    elif row["outcome"] == "fails":
        outcome, sentence = "fails", "It is ahead, but its atoms do not beat deletion themselves."
    elif row["outcome"] == "inconclusive":
        outcome, sentence = "inconclusive", f"It is ahead; of its own atoms against deletion: {NO_DATA}"
    elif row["outcome"] in ("confounded", "undecided"):
        which = ", ".join(NAMES[name] for name in row["unbeaten"].split(", "))
        outcome = row["outcome"]
        sentence = f"It is ahead, but is not shown to beat a control that beats deletion: {which}."
    else:
        outcome, sentence = "holds", "It is ahead, and beats deletion and every control that beats deletion."
    claim = f"training on {_name(row)} substitutes better than training on states by mse"
    unit = f"firings of {int(own['clusters'] + against['clusters'])} atoms"
    return Claim(None, claim, measured, n, unit, controls, outcome, sentence)


def _best(result: Objectives) -> Claim:
    found = standings(result)
    parts = []
    for key, (leader, tied) in found.items():
        measure, _, target = key.partition("/")
        what = _WORDS[measure].replace("its target", f"{target.replace('_', ' ')}s") if target else _WORDS[measure]
        level = f" (not beaten: {', '.join(tied)})" if tied else ""
        parts.append(f"{what}: {leader}{level}")
    names = list(result.tables["dictionaries"]["sae"])
    unbeaten = [sae for sae in names if not _beaten(result, sae)]
    winner, tied = found[result.info["config"]["scale"]]
    holds = winner in unbeaten and not tied
    if holds:
        sentence = f"{winner} wins the substitution and is beaten on nothing that can be measured of it."
    elif tied:
        sentence = f"No objective wins the substitution: {winner} does not beat {', '.join(tied)}."
    else:
        sentence = f"{winner} wins the substitution, but is beaten on {', '.join(_beaten(result, winner))}."
    claim = "one objective is best at all that it can be compared in"
    outcome = "holds" if holds else "fails"
    if any(_few(result, sae) for sae in names):
        outcome, sentence = "inconclusive", NO_DATA
    return Claim(None, claim, "; ".join(parts), len(names), "dictionaries", "", outcome, sentence)


def _few(result: Objectives, sae: str) -> bool:
    """Whether the substitution of a dictionary rests on too little data."""
    row = _value(result, sae, result.info["config"]["scale"])
    return too_little(int(row["n"]), int(row["clusters"]), row["low"], row["high"])


def _beaten(result: Objectives, sae: str) -> list[str]:
    """Measures on which some other dictionary has an interval above this one."""
    table: Any = result.tables["contrasts"]
    lost = table[(table["b"] == sae) & (table["low"] > 0)]
    return [_WORDS[measure] for measure in dict.fromkeys(lost["measure"])]


def _name(row: dict[str, Any]) -> str:
    return f"{row['target'].replace('_', ' ')}s by {'mse' if row['loss'] == 'mse' else row['loss'] + ' loss'}"
