"""What a dictionary is worth on held-out text, in the standard numbers; and what the writes of a head do at all.

The whole-stream number replaces every write of the head at once by its reconstruction. It needs no choice of an atom, a
scale or a control, and is the median over sequences of what SAELens' own evaluator calls `kl_div_score`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from sae_lens import SAE
from torch import Tensor

from hookpoints import HookedRecurrent
from sae_lens_writesae.atom.low_rank import LowRank
from sae_lens_writesae.errors import NothingToMeasureError
from sae_lens_writesae.sae.target import HeadHook, HookTarget, check_plain_activations, has_plain_activations
from writesae.dictionary.estimates import Estimate, mean_estimate, recovered_share
from writesae.experiment.lab import Lab
from writesae.experiment.readout import divergences
from writesae.files import Json
from writesae.head.matrices import decoded, dominant, encoded, matrices_of
from writesae.head.upper import UpperModel
from writesae.head.writes import ROUNDING, half_lives, head_writes

SEQUENCES = 64
"""Sequences of the text that are looked at, the first ones."""
LASTING = 16.0
"""Half-life of a write, in tokens, from which on a head remembers for a while."""
HEAD_SEQUENCES = 8
"""Sequences on which a head is chosen."""
_HALF_LIVES = 4
"""Sequences from which half-lives are taken: each costs a vector recurrence for two dozen writes of each head."""


@dataclass(frozen=True)
class DictionaryQuality:
    """One dictionary on one text. None: there is nothing to compute it from."""

    target: HookTarget
    """What it reads, and what is replaced: all writes, or all states (where each read sees the reconstruction, and the
    recurrence resumes from the native state)."""
    n_tokens: int
    explained: float | None
    """1 - sum |X - X^|^2 / sum |X - mean|^2 over all tokens. None: the matrices do not vary."""
    l0: float
    """Active atoms per token."""
    alive: float
    """Share of atoms that fire on the text."""
    coverage: float
    """Share of tokens at which an atom fires."""
    cosine: float | None
    """Mean cosine of the dominant atom with the native write, over tokens at which one fires."""
    deleted: Estimate
    """KL(native || edited) in nats per token, over sequences, where all writes are deleted (all states zeroed, for a
    dictionary of states): what this head's writes do."""
    floor: float
    """The same where all are replaced by themselves."""
    recovered: Estimate | None
    """Median over sequences of 1 - KL(replaced) / KL(deleted). None: deletion moves no more than the floor.

    It is the typical share. All matrices of a sequence are replaced at once, so that a sequence is one large
    observation: in 252 whole streams the total differs by 0.4 points in the median, and 4.3 at most."""

    def to_dict(self) -> dict[str, Json]:
        """Plain JSON values; an interval that does not exist is None."""
        plain = dict(vars(self))
        for name, value in plain.items():
            if isinstance(value, Estimate):
                numbers = value._asdict().items()
                plain[name] = {end: None if math.isnan(number) else number for end, number in numbers}
        return plain


def dictionary_quality(model: HookedRecurrent, sae: SAE, tokens: Tensor) -> DictionaryQuality:
    """The quality of one dictionary on the first `SEQUENCES` of tokens [N,T]; cost as of `qualities`.

    Raises:
        ValueError: the dictionary normalizes its input.
        NothingToMeasureError: its activations are not finite.
    """
    check_plain_activations(sae)
    by_label = qualities(Lab(model, {"": sae}, tokens))
    if not by_label:
        raise NothingToMeasureError("the SAE gives NaN or infinite activations on this text")
    return by_label[""]


@torch.no_grad()
def qualities(lab: Lab) -> dict[str, DictionaryQuality]:
    """The quality of every dictionary of a laboratory, by label, on its first `SEQUENCES` sequences.

    One that normalizes its input, or whose activations are not finite, is left out: its activations are no coefficients
    of atoms.

    Cost: per sequence a forward up to the layer, and from the layer on two, one for each target and one for each
    dictionary; an encode and decode of each matrix.
    """
    measured: dict[str, list[OnSequence]] = {}
    for label, sae in lab.saes.items():
        if has_plain_activations(sae):
            measured[label] = []
    layer = lab.hook.layer
    head = lab.hook.head
    for sequence in lab.bar(range(min(SEQUENCES, len(lab.tokens))), "dictionary quality"):
        # The blocks up to the layer run once; all that follows runs from the layer on.
        upper = UpperModel.of(lab.model, [layer], lab.tokens[[sequence]])[layer]
        recurrence = upper.recurrence.select(heads=slice(head, head + 1))
        native, silent = upper.without([head])
        writes = head_writes(recurrence, 0)
        deleted = float(_kl_of_runs(native, silent[None]))
        for target in {lab.hooks[label].target for label in measured}:
            x = matrices_of(recurrence, target)
            # What rounding alone does.
            itself = float(_kl_of_runs(native, upper(head, target, x)[None]))
            of_target = [label for label in measured if lab.hooks[label].target == target]
            for label in of_target:
                activations = encoded(lab.saes[label], x)
                # One sequence without finite activations leaves the dictionary out.
                if not bool(activations.isfinite().all()):
                    del measured[label]
                    continue
                # What the dictionary leaves of the model: its reconstruction in the place of what the head has.
                rebuilt = decoded(lab.saes[label], activations, x)
                kl = float(_kl_of_runs(native, upper(head, target, rebuilt)[None]))
                cosine = _dominant_cosines(lab, label, activations, writes)
                measured[label].append(OnSequence.of(x, rebuilt, activations, cosine, deleted, itself, kl))
    n_positions = lab.tokens.shape[1]
    return {label: _quality_of_rows(lab.hooks[label].target, rows, n_positions) for label, rows in measured.items()}


class OnSequence(NamedTuple):
    """What is measured of one dictionary on one sequence, and added up over sequences."""

    sum: Tensor
    """[K*V] of the matrices, in float64."""
    square: float
    """Of all their entries."""
    error: float
    """Squares of what the reconstruction leaves."""
    active: int
    """Activations above 0."""
    covered: int
    """Tokens at which an atom fires."""
    fired: Tensor
    """[F] whether each atom fires."""
    cosine: Tensor
    """Of the dominant atom and the write, at covered tokens."""
    deleted: float
    """KL in nats per token, as `itself` and `kl`: of all writes deleted, replaced by themselves, reconstructed."""
    itself: float
    kl: float

    @classmethod
    def of(
        cls, x: Tensor, rebuilt: Tensor, activations: Tensor, cosine: Tensor, deleted: float, itself: float, kl: float
    ) -> OnSequence:
        """From matrices and reconstructions [T,K,V] and activations [T,F]."""
        flat = x.flatten(1).double()  # squares of 8,192 float32 tokens lose digits that the variance needs
        is_active = activations > 0
        return cls(
            sum=flat.sum(0),
            square=float(flat.square().sum()),
            error=float((x - rebuilt).double().square().sum()),
            active=int(is_active.sum()),
            covered=int(is_active.any(1).sum()),
            fired=is_active.any(0).cpu(),
            cosine=cosine,
            deleted=deleted,
            itself=itself,
            kl=kl,
        )


def _dominant_cosines(lab: Lab, label: str, activations: Tensor, writes: LowRank) -> Tensor:
    """Cosines of the dominant atoms with the writes, at the tokens at which an atom fires."""
    fires = (activations > 0).any(1)
    # Distinct atoms are decoded once: an atom of 128 x 128 is the dominant one of many tokens.
    strongest, which = dominant(lab.saes[label], activations)[fires].unique(return_inverse=True)
    device = writes.keys.device
    atoms = lab.atoms(strongest.cpu().numpy(), label).to(writes.keys).rows(which.to(device))
    return atoms.cosine(writes.rows(fires.to(device))).cpu()


def _quality_of_rows(target: HookTarget, rows: Sequence[OnSequence], n_positions: int) -> DictionaryQuality:
    """From what was measured on each sequence."""
    n = len(rows) * n_positions
    sequences = np.arange(len(rows))
    total = torch.stack([row.sum for row in rows]).sum(0)
    squares = sum(row.square for row in rows)
    # sum |x - mean|^2 = sum |x|^2 - |sum x|^2 / n
    variance = squares - float(total @ total) / n
    error = sum(row.error for row in rows)
    fired = torch.stack([row.fired for row in rows]).any(0)
    cosines = torch.cat([row.cosine for row in rows])
    deleted = [row.deleted for row in rows]
    floor = float(np.mean([row.itself for row in rows]))
    # Where deleting the writes does no more than rounding, there is nothing to recover.
    recovered = None
    if np.mean(deleted) > floor:
        recovered = recovered_share([row.kl for row in rows], deleted, sequences)
    return DictionaryQuality(
        target=target,
        n_tokens=n,
        explained=1 - error / variance if variance > ROUNDING * squares else None,
        l0=sum(row.active for row in rows) / n,
        alive=float(fired.float().mean()),
        coverage=sum(row.covered for row in rows) / n,
        cosine=float(cosines.mean()) if len(cosines) else None,
        deleted=mean_estimate(deleted, sequences),
        floor=floor,
        recovered=recovered,
    )


@torch.no_grad()
def quality_of_heads(model: HookedRecurrent, saes: Mapping[str, SAE], tokens: Tensor) -> Callable[[str], Json]:
    """A function that gives the quality of a dictionary by its label, as `DictionaryQuality.to_dict` has it. All
    dictionaries of a head are measured together, when the first of them is asked for. None: `qualities` has none."""

    @cache
    def of_head(cell: str) -> dict[str, DictionaryQuality]:
        of_cell = {label: sae for label, sae in saes.items() if HeadHook.of(sae).cell == cell}
        return qualities(Lab(model, of_cell, tokens))

    def of(label: str) -> Json:
        quality = of_head(HeadHook.of(saes[label]).cell).get(label)
        return None if quality is None else quality.to_dict()

    return of


@torch.no_grad()
def head_effects(
    model: HookedRecurrent,
    tokens: Tensor,
    layers: Iterable[int] | None = None,
    heads: Iterable[int] | None = None,
) -> pd.DataFrame:
    """What the writes of heads do, to choose one by: sorted by it, the largest first.

    Args:
        tokens: [N,T]
        layers: None: all recurrent layers.
        heads: None: all heads of each.

    Returns: columns layer, head, half_life (tokens, median over writes of the first 4 sequences) and nats
    (KL(native || edited) per token where all writes of the head are deleted).

    Cost: per sequence a forward, and for each layer one from it on with a row for each head.
    """
    places: dict[int, list[int]] = {}
    for layer in model.cfg.recurrent_layers if layers is None else layers:
        places[layer] = list(range(model.cfg.layer(layer).H) if heads is None else heads)
    nats = {layer: list[Tensor]() for layer in places}
    lives = {layer: list[Tensor]() for layer in places}
    for n, sequence in enumerate(tokens.split(1)):
        for layer, upper in UpperModel.of(model, list(places), sequence).items():
            native, *silent = upper.without(places[layer])
            nats[layer].append(_kl_of_runs(native, torch.stack(silent)))
            if n < _HALF_LIVES:
                lives[layer].append(half_lives(upper.recurrence.select(heads=places[layer])))
    tables = []
    for layer, of_layer in places.items():
        columns = {
            "layer": layer,
            "head": of_layer,
            "half_life": torch.cat(lives[layer]).median(0).values.tolist(),
            "nats": torch.stack(nats[layer]).mean(0).tolist(),
        }
        tables.append(pd.DataFrame(columns))
    return pd.concat(tables).sort_values("nats", ascending=False, ignore_index=True)


def strongest_head(effects: pd.DataFrame) -> tuple[int, int, float, float]:
    """Of rows of `head_effects`: layer, head, half-life and nats of the head whose writes do most, of those with a
    half-life of `LASTING` tokens or more, or where there is none of all."""
    lasting = effects[effects["half_life"] >= LASTING]
    candidates = effects if lasting.empty else lasting
    return next(candidates.itertuples(index=False, name=None))


def _kl_of_runs(native: Tensor, edited: Tensor) -> Tensor:
    """[N] KL(native || edited) of next-token distributions, mean over tokens, from logits [T,vocab] and [N,T,vocab]."""
    positions = torch.arange(len(native), device=native.device).expand(len(edited), -1)
    return divergences(native, positions, edited).forward.double().mean(1)
