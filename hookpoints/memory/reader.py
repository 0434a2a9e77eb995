"""Which phrases has a memory read? A reader of the memories of language models: no dictionary, label or chosen head.

It scores a phrase by how much the memory's states resemble the phrase's template, head by head (`templates`). It knows
nothing of edits: a phrase that was cut out of a memory reads as one that it never read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from hookpoints.errors import InputError
from hookpoints.memory.caches import chosen_rows
from hookpoints.memory.memory import Memory, TokenSpan, read
from hookpoints.memory.passes import Form, LayerStates, run_tokens, token_list
from hookpoints.memory.phrases import Phrases, distinct
from hookpoints.memory.sealing import fingerprint, load_sealed, save_sealed
from hookpoints.memory.templates import AgeAccuracy, Fitted, Whitening, fit_templates, running_tokens, states_at
from hookpoints.recurrence.canonical import over_time

if TYPE_CHECKING:
    from hookpoints.model.tokens import Tokens
    from hookpoints.recurrence.recurrence import Recurrence

PhraseList = Sequence[str] | Sequence[Sequence[int]] | Tensor
"""Phrases as text, or as token ids. Text stands in the middle of a text: " and so it was"."""

BATCH = 128
"""Phrases of a pass."""
BEAM_BATCH = 512
"""Phrases of a pass over one token."""
STANDING = 1024
"""Phrases of a corpus that are compared at once."""
SHORTLIST = 20
"""How many times more phrases of a corpus are scored exactly than are asked for."""
SHARED = 3
"""Tokens in a row that two phrases of one list do not share."""
FIRST_TOKENS = 4096
"""Tokens with which phrases that are read back may begin: those that the model finds likeliest after the memory."""
FIRST_BEAM = 2
"""How many times wider the beam is after the first token, which tells little."""
TRIED = 48
"""Next tokens of a phrase that are tried: those that the model finds likeliest after the memory and the phrase."""
PER_START = 3
"""Phrases of a beam that may share their first token, so that it does not hold one phrase in many forms."""


class Reading(NamedTuple):
    """A phrase, and whether a memory has read it."""

    text: str
    tokens: tuple[int, ...]
    score: float
    """Log odds that it was read, where as many phrases were read as were not."""
    p: float
    """Share of unread phrases of its kind that score as high, itself counted with them; NaN where none were drawn."""


class Certificate(NamedTuple):
    """One span as a reader reads it in three memories."""

    read: Reading
    """In the memory that read it."""
    cut: Reading
    """Once it was cut out."""
    never: Reading
    """Where all other tokens were read, and it never was."""


@dataclass(frozen=True, eq=False, repr=False)
class MemoryReader:
    """What says which phrases memories of ``model`` have read. Made by `fit`."""

    model: Tokens
    fitted: Fitted

    @classmethod
    def fit(
        cls,
        model: Tokens,
        texts: str | Sequence[str] | Tensor,
        *,
        lead: str | Sequence[int] = ".",
        longest: int = 16,
        context: int = 128,
        seed: int = 0,
    ) -> MemoryReader:
        """A reader of memories of ``model``, from running text alone.

        Args:
            texts: text of the kind that memories read, or its token ids: 40 stretches of ``context`` + ``longest``
                tokens or more, of which 480 are used. No labels: what was read is known for free.
            lead: what stands before a phrase when it is read alone, to make its template: text or token ids.
            longest: tokens of a phrase, at most.
            context: tokens over which phrases are remembered.
            seed: of the draw of phrases.

        Cost: passes over the stretches and over eight phrases of each. Of the model's states, twice K^2 + V^2 + K V
        numbers a head are held.

        Raises:
            InputError: too little text, or ``longest`` and ``context`` do not fit.
        """
        tokens = running_tokens(model, texts)
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
        """Log odds [B,N] that each row of ``memory`` has read each phrase. Cost: a pass over the phrases, in batches.

        Raises:
            InputError: a memory of another model; no phrases, or one that is empty or longer than the longest that was
                fitted.
        """
        tokens = self._phrase_tokens(phrases)
        sides = self._weighted_states(memory)
        scores = self.fitted.weights.new_zeros(memory.tokens.shape[0], len(tokens))
        for places, batch in _batches_by_length(tokens):
            scores[:, places] = self._scores_of(sides, self._template_states(batch))
        return scores

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
        scores = self.scores(memory, tokens)[row].tolist()
        if decoys is None:
            return [self._reading_of(phrase, score) for phrase, score in zip(tokens, scores, strict=True)]
        unread = [token_list(self.model, decoy) for decoy in decoys]
        found = list[Reading]()
        for phrase, score in zip(tokens, scores, strict=True):
            others = [decoy[: len(phrase)] for decoy in unread if len(decoy) >= len(phrase)]
            if not others:
                raise InputError(f"decoys: expected some of {len(phrase)} tokens or more, as the phrase has, got none")
            above = int((self.scores(memory, others)[row] >= score).sum())
            found.append(self._reading_of(phrase, score, (1 + above) / (1 + len(others))))
        return found

    def search(
        self, memory: Memory, corpus: str | Sequence[str] | Tensor, n: int = 10, *, length: int = 12, row: int = 0
    ) -> list[Reading]:
        """The ``n`` phrases of ``corpus`` that a row of ``memory`` most likely read, best first, no two of which share
        three tokens in a row.

        Every phrase of ``length`` tokens of the corpus is a candidate. All are compared by what their tokens write
        where they stand in the corpus, which costs one pass over the corpus; the best, 20 n of them, by `scores`.

        Args:
            corpus: running text, or token ids.

        Raises:
            InputError: what `scores` raises, no such row, or a corpus shorter than a phrase.
        """
        memory.check_row(row)
        tokens = running_tokens(self.model, corpus)
        most = min(self.fitted.longest, len(tokens))
        if not 1 <= length <= most:
            raise InputError(f"length: expected 1 to {most} tokens, of the corpus and of the fit, got {length}")
        sides = [side[row : row + 1] for side in self._weighted_states(memory)]
        scores = torch.cat([self._scores_of(sides, part)[0] for part in self._standing_templates(tokens, length)])
        likely = scores.topk(min(SHORTLIST * n, len(scores))).indices.cpu()
        phrases = tokens.unfold(0, length, 1)[likely].tolist()
        exact = self.scores(memory, phrases)[row]
        order = exact.argsort(descending=True).tolist()
        places = [order[place] for place in distinct([phrases[place] for place in order], SHARED)]
        return [self._reading_of(phrases[place], float(exact[place])) for place in places[:n]]

    # -- phrases that are found

    @torch.no_grad()
    def read_back(self, memory: Memory, n: int = 10, *, length: int = 6, beam: int = 64, row: int = 0) -> list[Reading]:
        """The ``n`` phrases that a row of ``memory`` most likely read, in words, from the memory alone: no candidates
        are given. Best first; no two share three tokens in a row.

        The model proposes tokens, the reader scores the phrases, and a beam searches.

        Cost: passes over one token of (vocabulary + 48 ``beam`` (length + 1)) phrases.

        Raises:
            InputError: what `scores` raises, no such row, a length above the longest that was fitted, or a beam below
                ``n``.
        """
        memory.check_row(row)
        longest = self.fitted.longest
        if not 1 <= length <= longest or beam < n:
            raise InputError(f"length, beam: expected 1 to {longest} tokens, and n = {n} or more; got {length}, {beam}")
        sides = [side[row : row + 1] for side in self._weighted_states(memory)]
        device = self.model.cfg.device
        lead = torch.tensor([list(self.fitted.lead)], device=device)
        # Templates know nothing of the memory; what is proposed does.
        alone = Phrases.start(self.model, lead)
        remembered = Phrases.start(self.model, lead, chosen_rows(memory.cache, torch.tensor([row])), memory.T)
        scores = torch.zeros(1, device=device)
        for step in range(length):
            count = min(TRIED if step else FIRST_TOKENS, self.model.cfg.d_vocab)
            proposed = remembered.log_probs.topk(count).indices.to(device)
            rows = torch.arange(len(proposed), device=device)[:, None].expand_as(proposed).flatten()
            tokens = proposed.flatten()
            scores = self._longer_scores(alone, rows, tokens, sides, memory.forms)
            first = alone.tokens[rows, 0] if step else tokens
            best = _best_of_groups(scores, first, PER_START, beam if step else FIRST_BEAM * beam)
            alone, remembered = (phrases.then(rows[best], tokens[best]) for phrases in (alone, remembered))
            scores = scores[best]
        found = alone.tokens.tolist()
        return [self._reading_of(found[place], float(scores[place])) for place in distinct(found, SHARED)[:n]]

    def forgot(self, memory: Memory, span: TokenSpan, *, decoys: PhraseList | None = None, row: int = 0) -> Certificate:
        """Whether a memory has forgotten a span once `Memory.without` cut it: the span as it reads before the cut,
        after it, and in a memory that read all other tokens and never the span.

        Args:
            decoys: as of `holds`.

        Cost: a pass over all other tokens, `without`, and three times `holds`.

        Raises:
            InputError: what `without` and `holds` raise, as of a span longer than the longest that was fitted.
        """
        start, stop = memory.span_of(span)
        memory.check_row(row)
        phrase = memory.tokens[row, start:stop].tolist()
        others = torch.cat([memory.tokens[:, :start], memory.tokens[:, stop:]], 1)
        memories = (memory, memory.without((start, stop)), read(self.model, others))
        return Certificate(*(self.holds(one, [phrase], decoys=decoys, row=row)[0] for one in memories))

    # -- files

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, aside and then renamed, with a SHA-256 of all of it.

        Raises:
            OSError: it cannot be written, or ``path`` is a link, a folder or a device, which is not replaced.
        """
        named = {"weights": self.fitted.weights}
        for side in ("of_states", "of_templates"):
            for layer, whitening in getattr(self.fitted, side).items():
                named |= {f"{side}/{layer}/{field}": x for field, x in whitening._asdict().items()}
        said = {name: getattr(self.fitted, name) for name in ("bias", "lead", "longest", "horizon")}
        save_sealed(path, named, _file_identity(self.model) | said)

    @classmethod
    def load(cls, path: str | Path, model: Tokens) -> MemoryReader:
        """Read what `save` wrote, onto the model's device. No code is run. Cost: a reading of the model's weights.

        Raises:
            InputError: the file is damaged or not a reader, or was fitted to another model.
            FileNotFoundError: there is none.
        """
        named, said = load_sealed(path, "reader", _file_identity(model))
        try:  # anyone can seal a file
            return cls(model, _fitted_of(named, said, model))
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{path}: expected the tensors and settings of a reader, got others ({error!r})"
            ) from error

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

    def _reading_of(self, phrase: Sequence[int], score: float, p: float = float("nan")) -> Reading:
        return Reading(str(self.model.to_string(list(phrase))), tuple(phrase), score, p)

    def _template_states(self, phrases: Sequence[Sequence[int]]) -> LayerStates:
        """States [N,H,K,V] after phrases of one length."""
        tokens = torch.tensor([[*self.fitted.lead, *phrase] for phrase in phrases])
        return {layer: x[:, 0] for layer, x in states_at(self.model, tokens, [tokens.shape[1] - 1]).items()}

    def _weighted_states(self, memory: Memory) -> list[Tensor]:
        """[B,H,K*V] by layer: the whitened directions of a memory's states, times the heads' weights."""
        if memory.model is not self.model:
            raise InputError(f"memory: expected one of {self.model.cfg.model_name}, the reader's model, got {memory}")
        sides = self.fitted.of_states
        weights = self.fitted.weights.split([whitening.mean.shape[0] for whitening in sides.values()])
        directions = (whitening(memory.state(layer).float()) for layer, whitening in sides.items())
        return [x * weight[:, None].to(x.device) for x, weight in zip(directions, weights, strict=True)]

    def _scores_of(self, sides: Sequence[Tensor], templates: LayerStates) -> Tensor:
        """[B,N], of `_weighted_states` and states [N,H,K,V] of phrases."""
        scores = self.fitted.weights.new_full((), self.fitted.bias)
        for side, (layer, whitening) in zip(sides, self.fitted.of_templates.items(), strict=True):
            of_layer = torch.einsum("bhx,nhx->bn", side, whitening(templates[layer]))
            scores = scores + of_layer.to(scores.device)  # layers may have several devices
        return scores

    def _longer_scores(
        self, phrases: Phrases, rows: Tensor, tokens: Tensor, sides: Sequence[Tensor], forms: Mapping[int, Form]
    ) -> Tensor:
        """Scores [N'] of phrases ``rows`` [N'] with ``tokens`` [N'] more, against one memory."""
        parts = list[Tensor]()
        for some, next_tokens in zip(rows.split(BEAM_BATCH), tokens.split(BEAM_BATCH), strict=True):
            parts.append(self._scores_of(sides, phrases.then(some, next_tokens).states(forms))[0])
        return torch.cat(parts)

    def _standing_templates(self, tokens: Tensor, length: int) -> Iterator[LayerStates]:
        """States [N,H,K,V] that each phrase of ``length`` tokens of a text [T] writes where it stands."""
        for first in range(0, len(tokens) - length + 1, STANDING):
            begin = max(first - length, 0)  # so that the first phrase stands after some text, too
            some = tokens[None, begin : first + STANDING + length - 1].to(self.model.cfg.device)
            with torch.no_grad(), self.model.recording() as recorded:
                run_tokens(self.model, some, 0, None)
            yield {layer: _written_states(x.recurrence, first - begin, length) for layer, x in recorded.items()}


def _written_states(r: Recurrence, skipped: int, length: int) -> Tensor:
    """What every ``length`` tokens of one text write, [N,H,K,V]: states that start from zero at each token from
    ``skipped`` on."""
    places = torch.arange(skipped, r.T, device=r.device).unfold(0, length, 1)
    fields = {name: x[0][places] for name, x in over_time(r)}
    return r.replace(**fields, initial_state=None).states(positions=-1)[:, 0].float()


def _best_of_groups(scores: Tensor, groups: Tensor, most: int, wanted: int) -> Tensor:
    """Places of the ``wanted`` largest scores [N], at most so many of each group [N]."""
    group_of = groups.tolist()
    taken: dict[int, int] = {}
    places = list[int]()
    for place in scores.argsort(descending=True).tolist():
        taken[group_of[place]] = taken.get(group_of[place], 0) + 1
        if taken[group_of[place]] <= most:
            places.append(place)
    return torch.tensor(places[:wanted], device=scores.device)


def _batches_by_length(tokens: Sequence[Sequence[int]]) -> Iterator[tuple[list[int], list[Sequence[int]]]]:
    """Phrases of one length together, some at a time, and where they stand."""
    by_length: dict[int, list[int]] = {}
    for place, phrase in enumerate(tokens):
        by_length.setdefault(len(phrase), []).append(place)
    for places in by_length.values():
        for first in range(0, len(places), BATCH):
            some = places[first : first + BATCH]
            yield some, [tokens[place] for place in some]


def _fitted_of(named: Mapping[str, Tensor], said: Mapping[str, Any], model: Tokens) -> Fitted:
    """What a reader's file holds, on the model's device.

    Raises:
        KeyError, TypeError, ValueError: its tensors or settings are not those of a reader of this model.
    """
    sides: dict[str, dict[int, Whitening]] = {"of_states": {}, "of_templates": {}}
    shapes: dict[str, list[int]] = {"weights": [sum(model.cfg.layer(n).H for n in model.cfg.recurrent_layers)]}
    for side, whitenings in sides.items():
        for layer in model.cfg.recurrent_layers:
            sizes = model.cfg.layer(layer)
            names = [f"{side}/{layer}/{field}" for field in Whitening._fields]
            ends = ([sizes.K, sizes.V], [sizes.K, sizes.K], [sizes.V, sizes.V])
            shapes |= {name: [sizes.H, *end] for name, end in zip(names, ends, strict=True)}
            whitenings[layer] = Whitening(*(named[name].float().to(model.cfg.device) for name in names))
    if wrong := {name: list(named[name].shape) for name, shape in shapes.items() if list(named[name].shape) != shape}:
        raise ValueError(f"shapes {wrong}")
    return Fitted(
        **sides,
        weights=named["weights"].float().to(model.cfg.device),
        bias=float(said["bias"]),
        lead=tuple(map(int, said["lead"])),
        longest=int(said["longest"]),
        horizon=tuple(AgeAccuracy(*row) for row in said["horizon"]),
    )


def _file_identity(model: Tokens) -> dict[str, object]:
    """What a file has to agree in."""
    return {"format": 1, "kind": "memory reader", "model": fingerprint(model.hf_model)}
