"""Control dictionaries beside trained ones: made from a text, evaluated by the same rules, and held against a claim.

A rule that also holds for a dictionary that learned nothing says nothing of learning. That is one rule for all
evaluations, and `against_controls` is the only place that has it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Literal, NamedTuple, get_args

import torch
from sae_lens import SAE
from torch import Tensor

from hookpoints import HookedRecurrent
from sae_lens_writesae.errors import NothingToMeasureError
from sae_lens_writesae.sae.controls import native, untrained
from sae_lens_writesae.sae.matrix import MatrixSAE
from writesae.experiment.evaluation import Result
from writesae.experiment.head import matrices_of
from writesae.experiment.lab import Lab
from writesae.verdict.finding import Claim

Control = Literal["untrained", "native writes"]
"""See `sae.controls`."""
CONTROLS: tuple[Control, ...] = get_args(Control)

_TOKENS = 4096
"""Tokens of the reference text on which b_dec and thresholds of control dictionaries are set, in sequences spread over
all of it: a head with a long memory adds up what the mean of too little text is wrong by."""


@torch.no_grad()
def control_dictionaries(
    model: HookedRecurrent, saes: Mapping[str, SAE], reference: Tensor, *, seed: int = 0
) -> dict[Control, dict[str, SAE]]:
    """For each dictionary an untrained one and one of native writes, by the same labels. Each has a seed of its own.
    Dictionaries of other packages have none; where the head writes nothing, there is none of native writes.

    Args:
        reference: [N,T] tokens apart from those that are tested. Writes are drawn from all of it; what is set is set on
            some 4,096 tokens.

    Cost: a forward of each sequence up to the layer for each dictionary, and what `sae.controls` says.
    """
    made: dict[Control, dict[str, SAE]] = {control: {} for control in CONTROLS}
    for n, (label, sae) in enumerate(saes.items()):
        if not isinstance(sae, MatrixSAE):
            continue
        lab = Lab(model, {label: sae}, reference)
        n_sequences, length = reference.shape
        some = torch.linspace(0, n_sequences - 1, min(n_sequences, -(-_TOKENS // length))).long().tolist()
        x = torch.cat([matrices_of(lab.recurrence(i), lab.hook.target).flatten(1) for i in some])
        made["untrained"][label] = untrained(sae, x, seed=seed + n)
        with suppress(NothingToMeasureError):
            made["native writes"][label] = native(sae, x, lab.native_writes(range(n_sequences)), seed=seed + n)
    return made


class Answer(NamedTuple):
    """A claim as one dictionary, one head or one comparison answers it."""

    label: str
    claim: Claim


def answers(results: Sequence[Result]) -> list[Answer]:
    """Every answer of trained dictionaries, held against those of their controls where these are among the results."""
    controlled = {control: _own(results, control) for control in CONTROLS}
    rows: list[Answer] = []
    for of, own in _own(results, None).items():
        for label, claim in own:
            found: dict[Control, Claim] = {
                control: other.claim
                for control in CONTROLS
                for other in controlled[control].get(of, [])
                if (other.claim.number, other.claim.claim) == (claim.number, claim.claim)
            }
            rows.append(Answer(label, against_controls(claim, found)))
    return rows


def against_controls(claim: Claim, controls: Mapping[Control, Claim]) -> Claim:
    """The claim of a trained dictionary, with what the same rule says of its control dictionaries.

    What holds for an untrained dictionary too is confounded. What holds for native writes as well is named: drawing
    them is a way to find atoms, which needs no training but the model's own writes.
    """
    names = {"untrained": "untrained dictionary", "native writes": "dictionary of native writes"}
    shown = [f"{names[name]}: {each.measured} ({each.outcome})" for name, each in controls.items()]
    outcome, sentence = claim.outcome, claim.sentence
    holds = [name for name, each in controls.items() if claim.outcome == each.outcome == "holds"]
    if "untrained" in holds:
        outcome, sentence = "confounded", "An untrained dictionary does as well: the same rule holds for it."
    if "native writes" in holds:
        sentence += " It holds for native writes drawn at random as well."
    told = "; ".join(filter(None, [claim.controls, *shown]))
    return replace(claim, controls=told, outcome=outcome, sentence=sentence)


def _own(results: Sequence[Result], control: Control | None) -> dict[tuple[object, ...], list[Answer]]:
    """Answers of one kind of dictionary by what they are about, which its controls share."""
    found: dict[tuple[object, ...], list[Answer]] = defaultdict(list)
    measured: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        if result.info.get("control") == control:
            of = result.label if control is None else result.info["control_of"]
            place = (*(result.info.get(name) for name in ("model", "layer", "head")), result.kind, of)
            found[place] += [Answer(result.label, claim) for claim in result.claims()]
            if result.skipped is None:
                measured[result.kind].append(result)
    for kind, group in measured.items():
        for label, claim in type(group[0].evaluation).across(group):
            found[kind, label].append(Answer(label, claim))
    return found
