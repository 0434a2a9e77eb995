"""Words and numbers of the report: the paper's values, and how numbers are written."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from sae_lens_writesae.conditions import NAMES
from sae_lens_writesae.plots import SCALE_NAMES
from sae_lens_writesae.substitution_result import SubstitutionInfo
from sae_lens_writesae.summary import Verdict


class PaperNumbers(NamedTuple):
    """WriteSAE (arXiv 2605.12770, v4): Qwen3.5-0.8B, layers 1, 9 and 17, head 4; 4,851 firings of 18 atoms."""

    win: str = "92.4 %"
    chain: str = "89.5 %"
    medians: str = "0.40 / 1.09 / 2.02"
    controls: str = "not run"
    failures: str = "48.3 % on DeltaNet-1.3B, 48 % on Qwen3.5-4B, 45.3 % on RWKV-7-1.5B"


PAPER = PaperNumbers()

METRIC_NAMES = {
    "kl_window": "mean over t..t+horizon",
    "kl_at": "at t",
    "kl_next": "at t + 1",
    "kl_last": "at the last token",
    "reverse_kl_window": "mean over t..t+horizon, reverse",
    "reverse_kl_at": "at t, reverse",
    "reverse_kl_next": "at t + 1, reverse",
    "reverse_kl_last": "at the last token, reverse",
}


def r_squared(x: float) -> str:
    """Three decimals; whole numbers where a prediction is so far off that decimals say nothing."""
    return f"{x:.3f}" if abs(x) < 100 else f"{x:,.0f}"


def outcome(verdict: Verdict) -> str:
    """A verdict in a few words: "holds", "confounded by mean write", ..."""
    if verdict.outcome == "confounded":
        return f"confounded by {NAMES[verdict.controls[0]]}"
    return verdict.outcome


def lead(verdicts: Sequence[Verdict], names: Sequence[str], scale: str) -> str:
    """One sentence over all tests of a report: which dictionaries it holds for, by name or, if many, by number."""
    where = {"matched": "At matched norm", "coefficient": "At the SAE's own coefficient"}.get(
        scale, f"At the {SCALE_NAMES[scale]} scale"
    )
    if len(verdicts) == 1:
        return f"{where}, {_ALONE[verdicts[0].outcome]}."
    parts = []
    for kind, phrase in _TOGETHER.items():
        members = [name for name, verdict in zip(names, verdicts) if verdict.outcome == kind]
        if members:
            many = len(verdicts) > _NAMED_DICTIONARIES
            parts.append(f"{phrase} {len(members) if many else _listed(members)}")
    total = f" of {len(verdicts)} tests" if len(verdicts) > _NAMED_DICTIONARIES else ""
    return f"{where}, substitution {', '.join(parts[:-1])}{' and ' if parts[1:] else ''}{parts[-1]}{total}."


_NAMED_DICTIONARIES = 4
_ALONE = {
    "holds": "atoms stand in for the writes they replace, and no control does as well",
    "fails": "atoms do not stand in for the writes they replace",
    "confounded": "atoms beat deletion, but so does a control that they do not beat",
    "undecided": "atoms beat deletion, but so does a control, and which is better is undecided",
    "inconclusive": "there is too little data to say whether atoms stand in for the writes they replace",
    "below the floor": "the test says nothing: deleting the write moves the model no more than a no-op does",
}
_TOGETHER = {
    "holds": "holds for",
    "confounded": "is confounded by a control for",
    "fails": "fails for",
    "undecided": "is undecided for",
    "inconclusive": "is inconclusive for",
    "below the floor": "is below the floor for",
}


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def unique_names(infos: Sequence[SubstitutionInfo]) -> list[str]:
    """Labels, with the head added where heads differ, and a number where that is not enough."""
    heads = {(info.layer, info.head) for info in infos}
    names = [info.label + (f" L{info.layer}H{info.head}" if len(heads) > 1 else "") for info in infos]
    seen: Counter[str] = Counter()
    unique = []
    for name in names:
        seen[name] += 1
        unique.append(f"{name} ({seen[name]})" if names.count(name) > 1 else name)
    return unique


def percent(x: float) -> str:
    """A share in percent, one decimal."""
    return f"{100 * x:.1f}\u00a0%"


def span(low: float, high: float, factor: float = 100) -> str:
    """An interval; a dash where there is none (a single cluster)."""
    if math.isnan(low) or math.isnan(high):
        return "–"
    digits = 1 if factor == 100 else 2
    return f"{factor * low:.{digits}f}–{factor * high:.{digits}f}"


def p_value(p: float) -> str:
    """A p-value; below 0.001 only that."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"
