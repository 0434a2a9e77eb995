"""Which phrases has a memory read? A reader of the memories of language models: no dictionary, label or chosen head.

It scores a phrase by how much the memory's states resemble the phrase's template, head by head (`templates`). It knows
nothing of edits: a phrase that was cut out of a memory reads as one that it never read.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from hookpoints import embedded
from hookpoints.errors import InputError, ReaderWarning
from hookpoints.files import check_tensors
from hookpoints.memory.caches import chosen_rows
from hookpoints.memory.memory import Memory
from hookpoints.memory.passes import Form, LayerStates, run_tokens, spelled, token_list
from hookpoints.memory.phrases import Phrases, runs
from hookpoints.memory.sealing import fingerprint, load_sealed, save_sealed
from hookpoints.memory.templates import (
    BATCH,
    CHECKPOINTS,
    LENGTHS,
    AgeAccuracy,
    Directions,
    Fitted,
    LayerFit,
    Pursuit,
    Whitening,
    fit_templates,
    rows_at_once,
    running_tokens,
    states_at,
)
from hookpoints.model.inputs import check_tokens
from hookpoints.recurrence.canonical import over_time

if TYPE_CHECKING:
    from hookpoints.model.tokens import Tokens
    from hookpoints.recurrence.recurrence import Recurrence

PhraseList = Sequence[str] | Sequence[Sequence[int]] | Tensor
"""Phrases as text, or as token ids. Text stands in the middle of a text: " and so it was"."""

BEAM_BATCH = {"cpu": 64}
"""Phrases of a pass over one token, at most, by device: what fits into a cache; 512 elsewhere, where launches cost."""
STANDING = 1024
"""Phrases of a corpus that are compared at once, at most."""
SHORTLIST = 40
"""How many times more phrases are compared with one another than are asked for, at most; at least four times as many,
where states are large."""
SEARCHED = 12
"""Tokens of a phrase that is searched for, where they are not given."""
SHARED = 3
"""Tokens in a row that two phrases of one list do not share."""
FIRST_TOKENS = 4096
"""Tokens with which phrases that are read back may begin: those that the model finds likeliest after the memory."""
FIRST_BEAM = 2
"""How many times wider the beam is after the first token, which tells little."""
TRIED = 32
"""Next tokens of a phrase that are tried: those that the model finds likeliest after the memory and the phrase."""
PER_START = 3
"""Phrases of a beam that may share their first token, so that it does not hold one phrase in many forms."""
WEAK = 0.75
"""AUC of the last tokens below which a reader is called weak."""
SIDES = ("of_states", "of_templates")
"""Whitenings of a layer, in a file."""


class Reading(NamedTuple):
    """A phrase, and whether a memory has read it."""

    text: str
    tokens: tuple[int, ...]
    score: float
    """Above 0 it is more like phrases that were read, in text of the fit and as long as this one: there, as many that
    were read score below 0 as of those that were not score above. It ranks phrases; it is no probability."""
    p: float
    """Share of unread phrases of its kind that score as high, itself counted with them; NaN where none were drawn."""


@dataclass(frozen=True, eq=False, repr=False)
class MemoryReader:
    """What says which phrases memories of ``model`` have read. Made by `fit`."""

    model: Tokens
    fitted: Fitted

    @classmethod
    def fit(
        cls,
        model: Tokens,
        texts: str | Sequence[str] | Tensor | None = None,
        *,
        lead: str | Sequence[int] = ".",
        longest: int = 16,
        context: int = 128,
        seed: int = 0,
    ) -> MemoryReader:
        """A reader of memories of ``model``, from running text alone.

        Args:
            texts: text of the kinds that memories read, or its token ids: 40 stretches of ``context`` + ``longest``
                tokens or more, of which 480 are used. No labels: what was read is known for free. None:
                `embedded.mixed`, speeches, code, documentation and licenses.
            lead: what stands before a phrase when it is read alone, to make its template: text or token ids.
            longest: tokens of a phrase, at most.
            context: tokens over which phrases are remembered.
            seed: of the draw of phrases.

        Cost: passes over the stretches and over eight phrases of each. Of the model's states, twice K^2 + V^2 + K V
        numbers a head are held.

        Raises:
            InputError: too little text, or ``longest`` and ``context`` do not fit.
        """
        tokens = running_tokens(model, embedded.mixed() if texts is None else texts)
        return cls(model, fit_templates(model, tokens, token_list(model, lead), longest, context, seed))

    @property
    def horizon(self) -> tuple[AgeAccuracy, ...]:
        """Accuracy by age, on text that took no part in the fit. Past the horizon it is a coin's, 0.5."""
        return self.fitted.horizon

    def __repr__(self) -> str:
        curve = ", ".join(f"{row.auc:.2f} to age {row.age}" for row in self.horizon)
        return f"MemoryReader({self.model.cfg.model_name}, phrases of up to {self.fitted.longest} tokens, AUC {curve})"

    # -- phrases that are given

    def scores(self, memory: Memory, phrases: PhraseList) -> Tensor:
        """Scores [B,N] (`Reading.score`) of phrases in rows of ``memory``. Cost: a pass over the phrases, in batches.

        Raises:
            InputError: a memory of another model; no phrases, or one that is empty or longer than the longest that was
                fitted.
        """
        tokens = self._phrase_tokens(phrases)
        return self._scores_of(self.fitted, memory, tokens)

    def holds(
        self, memory: Memory, phrases: PhraseList, *, decoys: PhraseList | None = None, row: int = 0
    ) -> list[Reading]:
        """Whether a row of ``memory`` has read each phrase, with a p value from unread phrases of the same kind.

        Args:
            decoys: unread text, each cut to the length of the phrase: of the same document, or as near to it as there
                is, since words and names that a memory has read make unread phrases of their topic score higher. The
                smallest p is 1 / (1 + their number). None: scores alone, and p is NaN.

        Raises:
            InputError: what `scores` raises; no such row; no decoy is as long as a phrase.
        """
        memory.check_row(row)
        tokens = self._phrase_tokens(phrases)
        readings = self._readings_of(memory, row, tokens)
        if decoys is None:
            return readings
        unread = [token_list(self.model, decoy) for decoy in decoys]
        readings_with_p = list[Reading]()
        for reading in readings:
            length = len(reading.tokens)
            cut_decoys = [decoy[:length] for decoy in unread if len(decoy) >= length]
            if not cut_decoys:
                raise InputError(f"decoys: expected some of {length} tokens or more, as the phrase has, got none")
            above = int((self.scores(memory, cut_decoys)[row] >= reading.score).sum())
            readings_with_p.append(reading._replace(p=(1 + above) / (1 + len(cut_decoys))))
        return readings_with_p

    def search(
        self,
        memory: Memory,
        corpus: str | Sequence[str] | Tensor,
        n: int = 10,
        *,
        length: int | None = None,
        row: int = 0,
    ) -> list[Reading]:
        """The ``n`` phrases of ``corpus`` that a row of ``memory`` most likely read, picked as by `pick`; no two share
        three tokens in a row.

        Every phrase of ``length`` tokens of the corpus is a candidate. All are compared by what their tokens write
        where they stand in the corpus, which costs one pass over the corpus; the best, 40 n of them, by `pick`.

        Args:
            corpus: running text, or token ids.
            length: None: 12, or the longest that was fitted.

        Raises:
            InputError: what `scores` raises, no such row, ``n`` is below 1, or a corpus shorter than a phrase.
        """
        _check_request(memory, row, n)
        tokens = running_tokens(self.model, corpus)
        most = min(self.fitted.longest, len(tokens))
        length = min(SEARCHED, self.fitted.longest) if length is None else length
        if not 1 <= length <= most:
            raise InputError(f"length: expected 1 to {most} tokens, of the corpus and of the fit, got {length}")
        fitted = self._above_zero
        target = self._pursuit_of(memory, row).target
        standing = self._standing_templates(tokens, length)
        overlaps = torch.cat([fitted.overlaps(target, fitted.of_templates(part))[0] for part in standing])
        likely = overlaps.topk(min(self._shortlist_size(n), len(overlaps))).indices.cpu()
        return self._picked_readings(memory, row, tokens.unfold(0, length, 1)[likely].tolist(), n, SHARED)

    def pick(self, memory: Memory, phrases: PhraseList, n: int, *, row: int = 0) -> list[Reading]:
        """The ``n`` of ``phrases`` that together explain a row of ``memory`` best, picked one after another: each by
        what those before it leave unexplained (orthogonal matching pursuit). Phrases that are like one that was read
        have high `scores` too; once that one is picked, nothing speaks for them.

        Cost: of `scores`, and of the templates of the 40 n highest, which are held.

        Raises:
            InputError: what `scores` raises, no such row, or ``n`` is below 1.
        """
        _check_request(memory, row, n)
        tokens = self._phrase_tokens(phrases)
        overlaps = self._scores_of(self._above_zero, memory, tokens)[row]
        likely = overlaps.topk(min(self._shortlist_size(n), len(tokens))).indices.tolist()
        return self._picked_readings(memory, row, [tokens[place] for place in likely], n, self.fitted.longest)

    # -- phrases that are found

    @torch.no_grad()
    def read_back(self, memory: Memory, n: int = 10, *, length: int = 6, beam: int = 32, row: int = 0) -> list[Reading]:
        """The ``n`` phrases that a row of ``memory`` most likely read, in words, from the memory alone: no candidates
        are given. Picked as by `pick`; no two share three tokens in a row.

        The model proposes tokens, the reader scores the phrases, and a beam searches. Where a search has too few
        phrases, another one searches what they leave unexplained.

        Cost: of each search, passes over one token of (vocabulary + 32 ``beam`` (length + 1)) phrases.

        Raises:
            InputError: what `scores` raises, no such row, ``n`` is below 1, a length above the longest that was
                fitted, or a beam below ``n``.
        """
        _check_request(memory, row, n)
        longest = self.fitted.longest
        if not 1 <= length <= longest or beam < n:
            raise InputError(f"length, beam: expected 1 to {longest} tokens, and n = {n} or more; got {length}, {beam}")
        lead = torch.tensor([list(self.fitted.lead)], device=self.model.cfg.device)
        # Templates know nothing of the memory; what is proposed does.
        alone = Phrases.start(self.model, lead)
        remembered = Phrases.start(self.model, lead, chosen_rows(memory.cache, torch.tensor([row])), memory.T)
        pursuit = self._pursuit_of(memory, row)
        taken = list[Sequence[int]]()
        more = True
        while more and len(taken) < n:
            phrases = self._beam_phrases(alone, remembered, pursuit.left, memory.forms, length, beam)
            templates = self._above_zero.of_templates(phrases.states(memory.forms))
            more = _taken_phrases(pursuit, phrases.tokens.tolist(), templates, n - len(taken), SHARED, taken)
            taken += more
        return self._readings_of(memory, row, taken)

    # -- files

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, aside and then renamed, with a SHA-256 of all of it.

        Raises:
            OSError: it cannot be written, or ``path`` is a link, a folder or a device, which is not replaced.
        """
        named: dict[str, Tensor] = {}
        for layer, fit in self.fitted.layers.items():
            named[f"{layer}/weights"] = fit.weights
            for side in SIDES:
                whitening = getattr(fit, side)
                named |= {f"{layer}/{side}/{field}": x for field, x in whitening._asdict().items()}
        save_sealed(path, named, _file_identity(self.model) | _settings_of(self.fitted))

    @classmethod
    def load(cls, path: str | Path, model: Tokens) -> MemoryReader:
        """Read what `save` wrote, onto the model's device. No code is run. Cost: a reading of the model's weights.

        Raises:
            InputError: the file is damaged or not a reader, or was fitted to another model.
            FileNotFoundError: there is none.
        """
        named, settings = load_sealed(path, "reader", _file_identity(model))
        check_tensors(path, named, _tensor_kinds(model), finite=True)  # anyone can seal a file
        try:
            return cls(model, _fitted_of(named, settings, model))
        except (LookupError, OverflowError, RuntimeError, TypeError, ValueError) as error:
            raise InputError(f"{path}: expected the settings of a reader, got others ({error})") from error

    # -- helpers

    def _phrase_tokens(self, phrases: PhraseList) -> list[list[int]]:
        if isinstance(phrases, str):
            raise InputError(f"phrases: expected a list of phrases, got one text; use [{phrases[:20]!r}]")
        lists = [token_list(self.model, phrase) for phrase in phrases]
        if not lists:
            raise InputError("phrases: expected at least one, got none")
        longest = self.fitted.longest
        if wrong := [len(tokens) for tokens in lists if not 1 <= len(tokens) <= longest]:
            raise InputError(
                f"phrases: expected 1 to {longest} tokens, the longest that was fitted, got {wrong[0]}; split the "
                "phrase, or fit a reader with another `longest`"
            )
        return lists

    def _readings_of(self, memory: Memory, row: int, phrases: Sequence[Sequence[int]]) -> list[Reading]:
        scores = self._scores_of(self.fitted, memory, phrases)[row].tolist()
        return [
            Reading(spelled(self.model, phrase), tuple(phrase), score, float("nan"))
            for phrase, score in zip(phrases, scores, strict=True)
        ]

    def _template_states(self, phrases: Sequence[Sequence[int]]) -> LayerStates:
        """States [N,H,K,V] after phrases of one length."""
        tokens = torch.tensor([[*self.fitted.lead, *phrase] for phrase in phrases])
        return {layer: x[:, 0] for layer, x in states_at(self.model, tokens, [tokens.shape[1] - 1]).items()}

    @cached_property
    def _above_zero(self) -> Fitted:
        return self.fitted.above_zero()

    def _pursuit_of(self, memory: Memory, row: int) -> Pursuit:
        """Of what one row of a memory holds."""
        directions = self._above_zero.of_states(self._states_of(memory))
        return Pursuit(self._above_zero, [x[row : row + 1] for x in directions])

    def _states_of(self, memory: Memory) -> LayerStates:
        if memory.model is not self.model:
            raise InputError(f"memory: expected one of {self.model.cfg.model_name}, the reader's model, got {memory}")
        longest = self.fitted.context + self.fitted.longest
        if longest < memory.T:
            message = (
                f"memory: expected at most {longest} tokens, as the reader was fitted to, got {memory.T}: what was "
                f"read first scores as unread; fit with context={memory.T}"
            )
            warnings.warn(message, ReaderWarning, stacklevel=4)
        recent = self.horizon[0]
        if recent.auc < WEAK:
            message = (
                f"this reader is weak: of the last {recent.age} tokens it distinguishes read and unread phrases with "
                f"an AUC of {recent.auc:.2f}, where 0.5 is chance; fit it to more text"
            )
            warnings.warn(message, ReaderWarning, stacklevel=4)
        return {layer: memory.state(layer) for layer in self.fitted.layers}

    def _scores_of(self, fitted: Fitted, memory: Memory, phrases: Sequence[Sequence[int]]) -> Tensor:
        """[B,N]"""
        directions = fitted.of_states(self._states_of(memory))
        scores = directions[0].new_zeros(len(directions[0]), len(phrases))
        for places, batch in self._batches_of(phrases):
            scores[:, places] = fitted.overlaps(directions, fitted.of_templates(self._template_states(batch)))
        return scores + scores.new_tensor([fitted.bias(len(phrase)) for phrase in phrases])

    def _batches_of(self, phrases: Sequence[Sequence[int]]) -> Iterator[tuple[list[int], list[Sequence[int]]]]:
        """Phrases of one length together, some at a time, and where they stand."""
        by_length: dict[int, list[int]] = {}
        for place, phrase in enumerate(phrases):
            by_length.setdefault(len(phrase), []).append(place)
        size = rows_at_once(self.model, BATCH)
        for places in by_length.values():
            for first in range(0, len(places), size):
                some = places[first : first + size]
                yield some, [phrases[place] for place in some]

    def _shortlist_size(self, n: int) -> int:
        """How many phrases are compared with one another, where n are asked for: their templates are held."""
        return max(4 * n, rows_at_once(self.model, SHORTLIST * n // 4) * 4)

    def _picked_readings(
        self, memory: Memory, row: int, phrases: list[list[int]], n: int, shared: int
    ) -> list[Reading]:
        """The n of phrases that explain a row best; the templates of all are held."""
        parts = list[Directions]()
        order = list[int]()
        for places, batch in self._batches_of(phrases):
            parts.append(self._above_zero.of_templates(self._template_states(batch)))
            order += places
        templates = [torch.cat(of_layer) for of_layer in zip(*parts, strict=True)]
        sorted_phrases = [phrases[place] for place in order]
        picked = _taken_phrases(self._pursuit_of(memory, row), sorted_phrases, templates, n, shared)
        return self._readings_of(memory, row, picked)

    def _beam_phrases(
        self,
        alone: Phrases,
        remembered: Phrases,
        target: Directions,
        forms: Mapping[int, Form],
        length: int,
        width: int,
    ) -> Phrases:
        """Phrases of ``length`` tokens that have most in common with a target, after the lead alone."""
        fitted = self._above_zero
        for step in range(length):
            count = min(TRIED if step else FIRST_TOKENS, self.model.cfg.d_vocab)
            proposed = remembered.log_probs.topk(count).indices.to(alone.tokens.device)
            rows = torch.arange(len(proposed), device=proposed.device)[:, None].expand_as(proposed).flatten()
            tokens = proposed.flatten()
            parts = list[Tensor]()
            at_once = rows_at_once(self.model, BEAM_BATCH.get(self.model.cfg.device.type, 512))
            for some, next_tokens in zip(rows.split(at_once), tokens.split(at_once), strict=True):
                states = alone.then(some, next_tokens).states(forms)
                parts.append(fitted.overlaps(target, fitted.of_templates(states))[0])
            first = alone.tokens[rows, 0] if step else tokens
            best = _best_of_groups(torch.cat(parts), first, PER_START, width if step else FIRST_BEAM * width)
            alone, remembered = (phrases.then(rows[best], tokens[best]) for phrases in (alone, remembered))
        return alone

    def _standing_templates(self, tokens: Tensor, length: int) -> Iterator[LayerStates]:
        """States [N,H,K,V] that each phrase of ``length`` tokens of a text [T] writes where it stands."""
        at_once = rows_at_once(self.model, STANDING)
        for first in range(0, len(tokens) - length + 1, at_once):
            begin = max(first - length, 0)  # so that the first phrase stands after some text, too
            some = tokens[None, begin : first + at_once + length - 1].to(self.model.cfg.device)
            with torch.no_grad(), self.model.recording() as recorded:
                run_tokens(self.model, some, 0, None)
            yield {layer: _written_states(x.recurrence, first - begin, length) for layer, x in recorded.items()}


def _check_request(memory: Memory, row: int, n: int) -> None:
    memory.check_row(row)
    if n < 1:
        raise InputError(f"n: expected a number of phrases from 1 on, got {n}")


def _written_states(r: Recurrence, skipped: int, length: int) -> Tensor:
    """What every ``length`` tokens of one text write, [N,H,K,V]: states that start from zero at each token from
    ``skipped`` on."""
    places = torch.arange(skipped, r.T, device=r.device).unfold(0, length, 1)
    fields = {name: x[0][places] for name, x in over_time(r)}
    return r.replace(**fields, initial_state=None).states(positions=-1)[:, 0].float()


def _taken_phrases(
    pursuit: Pursuit,
    phrases: Sequence[Sequence[int]],
    templates: Directions,
    n: int,
    shared: int,
    before: Sequence[Sequence[int]] = (),
) -> list[Sequence[int]]:
    """Up to n phrases that a pursuit takes, no two of which, and none with those ``before``, share so many tokens in a
    row."""
    own_runs = [runs(phrase, shared) for phrase in phrases]
    seen = set[tuple[int, ...]]().union(*(runs(phrase, shared) for phrase in before))
    taken = list[Sequence[int]]()
    while len(taken) < n:
        left = pursuit.fitted.overlaps(pursuit.left, templates)[0]
        left[[place for place, own in enumerate(own_runs) if own & seen]] = -torch.inf
        best = int(left.argmax())
        if left[best] == -torch.inf:
            break
        pursuit.take([x[best : best + 1] for x in templates])
        seen |= own_runs[best]
        taken.append(phrases[best])
    return taken


def _best_of_groups(scores: Tensor, groups: Tensor, most: int, count: int) -> Tensor:
    """Places of the ``count`` largest scores [N], at most so many of each group [N]."""
    group_of = groups.tolist()
    taken: dict[int, int] = {}
    places = list[int]()
    for place in scores.argsort(descending=True).tolist():
        taken[group_of[place]] = taken.get(group_of[place], 0) + 1
        if taken[group_of[place]] <= most:
            places.append(place)
    return torch.tensor(places[:count], device=scores.device)


def _tensor_kinds(model: Tokens) -> dict[str, tuple[torch.dtype, list[int]]]:
    """Dtypes and shapes of a file, by name."""
    kinds: dict[str, tuple[torch.dtype, list[int]]] = {}
    for layer in model.cfg.recurrent_layers:
        sizes = model.cfg.layer(layer)
        ends = ([sizes.K, sizes.V], [sizes.K, sizes.K], [sizes.V, sizes.V])
        kinds[f"{layer}/weights"] = (torch.float32, [sizes.H])
        for side in SIDES:
            for field, end in zip(Whitening._fields, ends):
                kinds[f"{layer}/{side}/{field}"] = (torch.float32, [sizes.H, *end])
    return kinds


def _settings_of(fitted: Fitted) -> dict[str, object]:
    """What a file says of its tensors."""
    return {name: value for name, value in fitted._asdict().items() if name != "layers"}


def _fitted_of(named: Mapping[str, Tensor], settings: Mapping[str, Any], model: Tokens) -> Fitted:
    """What a reader's file holds, on the model's device; its tensors are checked.

    Raises:
        LookupError, OverflowError, RuntimeError, TypeError, ValueError: its settings are not those of a reader.
    """
    layers: dict[int, LayerFit] = {}
    for layer in model.cfg.recurrent_layers:
        weights, *sides = (
            named[name].to(model.cfg.device) for name in _tensor_kinds(model) if name.startswith(f"{layer}/")
        )
        heads = torch.arange(len(weights))
        layers[layer] = LayerFit(heads, weights, Whitening(*sides[:3]), Whitening(*sides[3:]))
    fitted = Fitted(
        layers,
        biases=tuple(map(float, settings["biases"])),
        lead=tuple(map(int, settings["lead"])),
        longest=int(settings["longest"]),
        context=int(settings["context"]),
        horizon=tuple(AgeAccuracy(*row) for row in settings["horizon"]),
    )
    # As JSON, 3.7 is no whole number, and neither is true or "3".
    if json.dumps(settings) != json.dumps({**settings, **_settings_of(fitted)}):
        raise InputError(f"expected numbers, as a fit writes them, got {settings}")
    check_tokens(torch.tensor([fitted.lead]), model.cfg)
    most = sys.float_info.max
    # A state that a fit reads has seen several times as many tokens as the longest phrase has.
    count = sum(length <= fitted.longest for length in LENGTHS)
    limits = [("longest", fitted.longest, LENGTHS[0], fitted.context // CHECKPOINTS)]
    limits += [("context", fitted.context, 1, 2 * fitted.horizon[-1].age), ("biases", len(fitted.biases), count, count)]
    limits += [("bias", bias, -most, most) for bias in fitted.biases]
    for name, value, low, high in limits + [("AUC", row.auc, 0, 1) for row in fitted.horizon]:
        if not low <= value <= high:
            raise InputError(f"{name}: expected {low} to {high}, got {value}")
    return fitted


def _file_identity(model: Tokens) -> dict[str, object]:
    """What a file has to agree in."""
    return {"format": 3, "kind": "memory reader", "model": fingerprint(model.hf_model)}
