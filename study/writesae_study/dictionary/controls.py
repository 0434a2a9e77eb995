"""Control dictionaries for trained ones: made from a text, evaluated by the same rules, and compared with a claim.

A rule that also holds for a dictionary that learned nothing says nothing of learning. That is one rule for all
evaluations, and `against_controls` is the only place that has it.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple, get_args

import torch
from sae_lens import SAE
from torch import Tensor

from hookpoints import HookedRecurrent
from sae_lens_writesae.atom.low_rank import LowRank
from sae_lens_writesae.sae.matrix import MatrixSAE
from sae_lens_writesae.sae.training import calibrate_threshold
from writesae.head.matrices import matrices_of
from writesae_study.experiment.bench import Bench
from writesae_study.experiment.evaluation import Result
from writesae_study.experiment.terms import Terms
from writesae_study.verdict.finding import Claim

ControlKind = Literal["untrained", "native writes"]
"""Atoms of random directions, and atoms that are writes of the model drawn at random."""
CONTROL_KINDS: tuple[ControlKind, ...] = get_args(ControlKind)

_TOKENS = 4096
"""Tokens of the reference text on which b_dec and thresholds of control dictionaries are set, in sequences spread over
all of it: a head with a long memory adds up what the mean of too little text is wrong by."""


@torch.no_grad()
def control_dictionaries(
    model: HookedRecurrent, saes: Mapping[str, SAE], reference: Tensor | Terms, *, seed: int = 0
) -> dict[ControlKind, dict[str, SAE]]:
    """For each dictionary an untrained one and one of native writes, by the same labels. Each has another seed.
    Dictionaries of other packages have none; where the head writes nothing, there is none of native writes.

    Args:
        reference: [N,T] tokens apart from those that are tested, or their terms. Writes are drawn from all of it;
            what is set is set on some 4,096 tokens.

    Cost: a forward of each sequence up to the layer for each dictionary, and what `control_dictionary` says.
    """
    terms = Terms(model, reference) if isinstance(reference, Tensor) else reference
    made: dict[ControlKind, dict[str, SAE]] = {control: {} for control in CONTROL_KINDS}
    for n, (label, sae) in enumerate(saes.items()):
        if not isinstance(sae, MatrixSAE):
            continue
        lab = Bench(model, {label: sae}, terms.tokens)
        n_sequences, length = terms.tokens.shape
        count = min(n_sequences, math.ceil(_TOKENS / length))
        spread = torch.linspace(0, n_sequences - 1, count).long().tolist()
        x = torch.cat([matrices_of(lab.recurrence(n), lab.hook.target).flatten(1) for n in spread])
        made["untrained"][label] = control_dictionary(sae, x, seed=seed + n)
        writes = terms.writes(lab.hook.layer, lab.hook.head)
        if writes.norm().any():
            made["native writes"][label] = control_dictionary(sae, x, writes, seed=seed + n)
    return made


@torch.no_grad()
def control_dictionary(sae: MatrixSAE, matrices: Tensor, writes: LowRank | None = None, *, seed: int = 0) -> MatrixSAE:
    """A dictionary of the class, config and size of a trained one, with atoms that nothing was learned for: random
    unit-norm atoms, as training would begin with them, or native writes. The encoder is equal to the atoms.

    Args:
        matrices: [N,K*V] of the kind that `sae` reads, from a text that nothing is tested on. Their mean becomes b_dec,
            unless the trained one began with zeros. Where the architecture has a threshold (or biases that act as one),
            it is set so that as many atoms are active per matrix as in `sae`.
        writes: from which as many are drawn as the dictionary has atoms, without repetition if there are enough; zero
            ones are left out. They are cut to the rank of the dictionary's atoms where theirs is higher.
        seed: of the atoms, the same on every device.

    Cost: an encode by both dictionaries, N F numbers.
    """
    # An untrained dictionary of the same class and config.
    cfg: Any = copy.deepcopy(sae.cfg)
    cfg.device = "cpu"  # so that a seed means the same on every device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        new = type(sae)(cfg).to(sae.b_dec.device, sae.b_dec.dtype).eval()
    new._scale_in_place(1 / new.decoder_norm(), 1 / new.encoder_norm())  # unit norms, as training leaves them
    details = cfg.metadata.training_architecture_details or {}
    if details.get("b_dec_init", "mean") == "mean":
        new.b_dec.data.copy_(matrices.float().mean(0))
    # Native writes as atoms: drawn without repetition while there are enough.
    if writes is not None:
        n_atoms = int(cfg.d_sae)
        written = torch.nonzero(writes.norm() > 0).flatten().cpu()
        order = torch.randperm(len(written), generator=torch.Generator().manual_seed(seed))
        rounds = math.ceil(n_atoms / len(written))
        drawn = written[order.repeat(rounds)[:n_atoms]]
        atoms = writes.rows(drawn.to(writes.keys.device)).to(torch.float32)
        if cfg.decoder == "rank" and atoms.rank != cfg.rank:
            atoms = LowRank.svd(atoms.dense(), cfg.rank, balanced=True)
        atoms = atoms.with_norm(atoms.norm().new_ones(n_atoms)).to(new.b_dec.device)
        all_atoms = torch.arange(n_atoms, device=new.b_dec.device)
        new.replace_atoms(all_atoms, atoms, torch.ones_like(all_atoms, dtype=torch.bool))
    # As many active atoms per matrix as in the trained one, by a threshold or by biases.
    x = matrices.to(new.b_dec)
    n_active = int((sae.encode(x) > 0).sum())
    if {"threshold", "topk_threshold"} & {*new.state_dict()}:
        calibrate_threshold(new, x, min(n_active / len(x), cfg.d_sae - 1))
    elif getattr(cfg, "k", None) is None and n_active < len(x) * cfg.d_sae:
        # Standard and Gated, which have no threshold, get one bias for all atoms, between the last one in and the next.
        top = (new.process_sae_in(x) @ new.W_enc).flatten().topk(n_active + 1).values
        between = top[-2:].mean() if n_active else 2 * top[0]
        bias = new.get_parameter("b_gate" if hasattr(new, "b_gate") else "b_enc")
        bias.data.fill_(-max(float(between), 0.0))
    return new


class Answer(NamedTuple):
    """A claim as one dictionary, one head or one comparison answers it."""

    label: str
    claim: Claim


def answers(results: Sequence[Result]) -> list[Answer]:
    """Every answer of trained dictionaries, compared with those of their controls where these are among the results."""
    by_control = {control: _answers_of(results, control) for control in CONTROL_KINDS}

    def same_claim(place: tuple[object, ...], claim: Claim) -> dict[ControlKind, Claim]:
        same: dict[ControlKind, Claim] = {}
        for control in CONTROL_KINDS:
            for answer in by_control[control].get(place, []):
                # By both: claims of this project have no number.
                if (answer.claim.number, answer.claim.claim) == (claim.number, claim.claim):
                    same[control] = answer.claim
        return same

    compared = []
    for place, trained in _answers_of(results, None).items():
        for label, claim in trained:
            compared.append(Answer(label, against_controls(claim, same_claim(place, claim))))
    return compared


def against_controls(claim: Claim, controls: Mapping[ControlKind, Claim]) -> Claim:
    """The claim of a trained dictionary, with what the same rule says of its control dictionaries.

    What holds for an untrained dictionary too is confounded. What holds for native writes as well is named: drawing
    them is a way to find atoms, which needs no training but the model's own writes.
    """
    names = {"untrained": "untrained dictionary", "native writes": "dictionary of native writes"}
    shown = []
    for name, control in controls.items():
        # "; " ends a control: what one measured has commas.
        shown.append(f"{names[name]} ({control.outcome}): {control.measured.replace('; ', ', ')}")
    outcome = claim.outcome
    sentence = claim.sentence
    holds = [name for name, control in controls.items() if claim.outcome == control.outcome == "holds"]
    if "untrained" in holds:
        outcome, sentence = "confounded", "An untrained dictionary does as well: the same rule holds for it."
    if "native writes" in holds:
        sentence += " It holds for native writes drawn at random as well."
    return replace(
        claim, controls="; ".join(filter(None, [claim.controls, *shown])), outcome=outcome, sentence=sentence
    )


def _answers_of(results: Sequence[Result], control: ControlKind | None) -> dict[tuple[object, ...], list[Answer]]:
    """Answers of one kind of dictionary by what they are about, which its controls share."""
    made: dict[tuple[object, ...], list[Answer]] = defaultdict(list)
    measured: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        if result.info.get("control") != control:
            continue
        label = result.label if control is None else result.info["control_of"]
        head = [result.info.get(name) for name in ("model", "layer", "head")]
        made[*head, result.kind, label] += [Answer(result.label, claim) for claim in result.claims()]
        if result.skipped is None:
            measured[result.kind].append(result)
    for kind, group in measured.items():
        for label, claim in type(group[0].evaluation).across(group):
            made[kind, label].append(Answer(label, claim))
    return made
