"""Memory: everything that a model carries forward after some tokens, as a value.

A recurrent layer's state is the sum of what its tokens wrote, each as the transitions since have left it (the canonical
form of `hookpoints.recurrence`):

    S_T = sum_t P_t k_t u_t^T,    P_t = M_T M_{T-1} ... M_{t+1},    M_i = diag(alpha_i) + a_i b_i^T

A memory keeps these factors, the residual stream that entered each block, and the cache. So it is rewound to any token
exactly, and writes are left out or added by running the recurrence over stored factors: for these tokens no projection,
no attention and no MLP is computed. What holds the last few tokens alone (convolutions, token shifts)
is made by running those few through the model, with every block's input, and what its mixer adds, replaced by what
was recorded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from zipfile import is_zipfile

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Cache

from hookpoints.errors import InputError
from hookpoints.files import check_tensors
from hookpoints.layer.context import all_left, count_tokens, drop_sources
from hookpoints.memory import cuts
from hookpoints.memory.caches import (
    attention_of,
    chosen_rows,
    cut,
    fill,
    joined_rows,
    put_state,
    reach,
    shared,
    state_of,
    tensors_of,
)
from hookpoints.memory.cuts import TokenSpan
from hookpoints.memory.passes import (
    Form,
    Kept,
    LayerStates,
    TokenReader,
    factors_of,
    is_stored,
    read_on,
    recorded_streams,
    run_tokens,
    spelled,
    token_list,
)
from hookpoints.memory.questions import (
    CONTEXT,
    HeldToken,
    Keeping,
    Sentences,
    Suspect,
    check_head_number,
    kept_shares,
    largest_terms,
    term_sizes,
)
from hookpoints.memory.sealing import fingerprint, load_sealed, save_sealed
from hookpoints.model.inputs import check_tokens
from hookpoints.recurrence.canonical import is_dense, terms
from hookpoints.recurrence.recurrence import Recurrence
from hookpoints.rules.base import compute_dtype

if TYPE_CHECKING:
    from hookpoints.model.tokens import Tokens


class WriteTerms(NamedTuple):
    """A state as a sum over tokens of outer products, sum_r keys_r values_r^T."""

    keys: Tensor
    """[B,T,(H,)(R,)K], P_t k_t: the key of each write as the tokens since have left it."""
    values: Tensor
    """[B,T,(H,)(R,)V], u_t."""


@dataclass(frozen=True, eq=False, repr=False)
class Memory:
    """Everything that ``model`` carries forward after some tokens. Made by ``model.memory``.

    Every operation returns another memory and leaves this one as it is; so does reading on from it
    (``model.forward(..., memory=)``).

    Memory use: the model's own cache; factors, 2 K + V numbers per token and head, and K more for each of a, b and a
    decay per channel; D numbers per token for the input of each block that keeps something of its past, and for what
    a mixer adds before a token shift.
    """

    model: Tokens
    cache: Cache
    """The model's own. Not to be changed: ``branch`` makes copies."""
    kept: Kept
    """What is stored of each token."""
    forms: Mapping[int, Form]
    """The recurrent layers."""
    dtype: torch.dtype
    """Of the model when it read the tokens."""
    edited: bool = False
    """Whether states were set by hand, or written under edits. The factors of the tokens do not explain such states:
    they can be read on from, compared and saved, but nothing can be cut from them."""

    @property
    def approximate(self) -> str | None:
        """What differs from the memory of a run over the same tokens; None: nothing but rounding."""
        notes = ["states were set by hand, or written under edits"] if self.edited else []
        notes += [
            f"{tokens} were read with other tokens in view" for tokens in cuts.flagged_stretches(self.kept.inexact)
        ]
        for layer, unmoved in self.kept.unmoved.items():
            notes += [
                f"attention of layer {layer} keeps old positions of {tokens}"
                for tokens in cuts.flagged_stretches(unmoved)
            ]
        return "; ".join(notes) or None

    def __repr__(self) -> str:
        note = f", approximate: {self.approximate}" if self.approximate else ""
        return f"Memory({self.model.cfg.model_name}, tokens {list(self.tokens.shape)}{note})"

    @property
    def tokens(self) -> Tensor:
        """[B,T], those that were read."""
        return self.kept.tokens

    @property
    def T(self) -> int:
        """Number of tokens that were read."""
        return self.kept.T

    # -- what it holds

    def state(self, layer: int, head: int | None = None) -> Tensor:
        """The state S of a recurrent layer, key-first: [B,H,K,V], or [B,K,V] of one head. A copy.

        Raises:
            InputError: the layer has no such head.
            UnsupportedModelError: there is no such layer, or it has no recurrence.
        """
        check_head_number(head, self.model.cfg.layer(layer).H, layer)
        state = state_of(self.cache, layer, self.forms[layer].value_first)
        return (state if head is None else state[:, head]).clone()

    def recurrence(self, layer: int) -> Recurrence:
        """The factors of a recurrent layer over all tokens; its `final_state` is `state`.

        Raises:
            InputError: the state was set by hand, so that no token wrote it.
        """
        self.model.cfg.layer(layer)
        self._check_explained()
        return cuts.stored_recurrence(self.forms, self.kept, layer)

    def terms(self, layer: int, head: int | None = None) -> WriteTerms:
        """What each token still contributes to S, as factors: S is the sum of keys values^T over all tokens exactly.

        In Mamba-1, where a token decays in another way in each value channel, these are the heads: S[:,v] is the sum
        of keys[v] values[v]. So it is for `held` and `keeping`.

        Cost: O(K T) per token and head, T / V times that of the recurrence. `holdings` is cheaper.

        Raises:
            InputError: the state was set by hand, so that no token wrote it.
        """
        r = self.recurrence(layer).by_channel()
        check_head_number(head, r.H, layer)
        # With each write as its own column of values, the last state has their keys as its columns.
        by_source = r.by_source().states(positions=-1)[:, 0].movedim(-1, 1)  # [B,T*R,H,K]
        keys = by_source.unflatten(1, (r.T, r.R)).movedim(2, 3).reshape(r.k.shape)
        heads = slice(None) if head is None else head
        return WriteTerms(keys[:, :, heads], r.u.to(r.dtype)[:, :, heads])

    def holdings(self, layer: int, head: int | None = None) -> Tensor:
        """How much of S each token still contributes: <P_t k_t u_t^T, S> / <S, S>, [B,T], or [B,T,H] of all heads.

        Shares have a sign and sum to 1 over the tokens. Cost: that of the recurrence, since P_t^T S is the state of its
        adjoint (`Recurrence.adjoint`), which starts from S.

        Raises:
            InputError: the state was set by hand, so that no token wrote it.
        """
        r = self.recurrence(layer)
        check_head_number(head, r.H, layer)
        state = self.state(layer).to(r.dtype)
        values = terms(r.u.to(r.dtype))
        back = r.adjoint(torch.zeros_like(values[0])).replace(initial_state=state)
        inner = torch.zeros(())
        for key, value in zip(terms(r.k.to(r.dtype)), values):
            # The adjoint runs from the last token to the first, so that its tokens are flipped on both sides.
            held = back.replace(q=key.flip(1)).outputs().flip(1)  # [B,T,H,V], S^T P k
            inner = inner + (held * value).sum(-1)
        shares = inner / state.square().sum((-1, -2))[:, None]
        return shares if head is None else shares[:, :, head]

    def held(self, n: int = 10, *, layer: int | None = None, head: int | None = None, row: int = 0) -> list[HeldToken]:
        """The ``n`` tokens that heads still hold most of, by the size of their `terms`, each with the tokens before it:
        of one head, or of all heads of a layer or of all layers, each by its own sum. Cost: `terms` of these layers.

        Raises:
            InputError: no such row, layer or head, ``n`` is below 1, or the states were set by hand.
        """
        self.check_row(row)
        layers = self.forms if layer is None else [layer]
        sizes = {number: term_sizes(*self.terms(number))[row] for number in layers}
        tokens = self.tokens[row].tolist()
        held = list[HeldToken]()
        for share, token, of_layer, of_head in largest_terms(sizes, n, head):
            text = spelled(self.model, tokens[token : token + 1])
            before = spelled(self.model, tokens[max(token - CONTEXT, 0) : token])
            held.append(HeldToken(token, text, before, of_layer, of_head, share))
        return held

    def keeping(self, after: int | None = None) -> list[Keeping]:
        """How much heads have left of what they wrote ``after`` tokens ago (None: half of all), best first. Cost:
        `terms` of all layers.

        Raises:
            InputError: fewer tokens than that were read, or the states were set by hand.
        """
        tokens = self.T // 2 if after is None else after
        if not 1 <= tokens < self.T:
            raise InputError(f"after: expected 1 to {self.T - 1}, tokens that were read after a write, got {tokens}")
        heads = list[Keeping]()
        for layer in self.forms:
            left = self.terms(layer)
            written = term_sizes(self.recurrence(layer).k.to(left.keys), left.values)
            shares = kept_shares(term_sizes(*left), written, tokens)
            heads += [Keeping(layer, head, share, tokens) for head, share in enumerate(shares)]
        return sorted(heads, key=lambda keeping: -keeping.kept)

    def suspects(self, question: str | Tensor) -> list[Suspect]:
        """Which sentence made the answer? For each sentence that was read, what the next token after ``question`` is
        without it: those first that contradict another sentence, then by how much the answer changes. Sentences that
        tell the same answer of the same thing are left out together.

        A sentence is left out as by `without` with ``approximate``; ask the memory of an exact cut to be sure.

        Args:
            question: text or tokens [1,T].

        Cost: two runs of the recurrence over stored factors, of all sentences together, and some five passes over few
        tokens. Where a layer attends: `without`, and a pass over the question, for each sentence, and one pass more.

        Raises:
            InputError: several rows, fewer than two sentences, no question, or the states were set by hand.
        """
        if self.tokens.shape[0] != 1:
            raise InputError(f"memory: expected one row, got {self.tokens.shape[0]}")
        asked = question if isinstance(question, Tensor) else torch.tensor([token_list(self.model, question)])
        check_tokens(asked, self.model.cfg)
        asked = asked.to(self.tokens.device)
        sentences = Sentences.of(partial(spelled, self.model), self.tokens[0].tolist(), asked[0].tolist())
        # The answer as it is, and what it is without each sentence.
        plain, *without = self._next_log_probs(asked, [self, *self._without_each(sentences.spans)])
        # A lie that is told twice hides behind itself: sentences that tell the same answer are left out together.
        groups = sentences.telling_together(int(plain.argmax()))
        for group in {*groups.values()}:
            memory = self
            for place in reversed(group):  # the last first: those before it stay where they are
                memory = memory.without(sentences.spans[place], approximate=True)
            (together,) = self._next_log_probs(asked, [memory])
            without = [together if groups.get(place) == group else each for place, each in enumerate(without)]
        suspects = [sentences.suspect(place, plain, each, groups) for place, each in enumerate(without)]
        return sorted(suspects, key=lambda suspect: (not suspect.flagged, -suspect.kl))

    # -- cutting and joining

    def rewind(self, position: int) -> Memory:
        """The memory as it was after ``position`` tokens, exactly; after none, that of a model that begins to read.

        Cost: the recurrence over their stored factors, and a pass over as many tokens as convolutions hold (4, say).

        Raises:
            InputError: ``position`` is not within 0 to T, or states were set by hand and ``position`` is not 0.
        """
        if position not in range(self.T + 1):
            raise InputError(f"position: expected 0 to {self.T}, the tokens read, got {position}")
        if position == self.T:
            return self
        if not position:
            unread = replace(self, cache=cut(self.cache, 0), kept=self.kept.span(0, 0))
            zeros = {layer: torch.zeros_like(state) for layer, state in self._layer_states().items()}
            return replace(unread.with_states(zeros), edited=False)
        return self._composed_memory(position, self.tokens[:, :0], self.kept.span(0, 0), 0)

    def without(self, span: TokenSpan, *, approximate: bool = False) -> Memory:
        """The memory without the tokens of ``span``, as if they had never been read: all tokens after the span are read
        again. `forgot` shows that nothing of the span is left.

        Args:
            span: a slice, or (start, stop).
            approximate: read again only the tokens whose convolution or token shift sees the span (kernel size - 1, or
                1). The others keep their factors, and their attention keys are moved to their new positions. Layers
                made these factors with the span in view: **the span can still be named** from what is left, and
                ``approximate`` says which tokens hold it.

        Cost: `rewind`, and a pass over all tokens after the span. With ``approximate`` the recurrence over stored
        factors, and one pass over the tokens that are read again, with as many before them and at the end as
        convolutions hold.

        Raises:
            InputError: the span is empty or out of range, or states were set by hand.
        """
        start, stop = self.span_of(span)
        if not approximate or stop == self.T:
            return read_instead(self, start, stop, self.tokens[:, :0])
        # Tokens whose convolution sees the span are read again; what the others wrote is stored, made with it in view.
        seeing = min(stop + reach(self.cache), self.T)
        later = self.kept.span(seeing, self.T)
        later = later._replace(inexact=torch.ones_like(later.inexact))
        return self._composed_memory(start, self.tokens[:, stop:seeing], later, start - stop)

    def told(self, new: str | Sequence[int], *, instead_of: str | Sequence[int] | slice | None = None) -> Memory:
        """As if ``new`` had been told ``instead_of`` what was read: it stands in its place, and all tokens after it are
        read again. Without ``instead_of`` it is read after all others.

        Args:
            new: text or token ids.
            instead_of: a sentence that was read, as text or token ids, at every place where it was read (in a batch,
                the places that all rows share); or a slice of tokens.

        Cost: `rewind`, and a pass over the new sentence and all tokens after it.

        Raises:
            InputError: ``new`` is empty, ``instead_of`` was not read, or states were set by hand.
        """
        if instead_of is None:
            return read(self.model, self._rows_of(new), self)
        if isinstance(instead_of, slice):
            return read_instead(self, *self.span_of(instead_of), self._rows_of(new))
        replacements: dict[tuple[int, int], Tensor] = {}
        # A sentence that begins a text has no space before it, and is spelled by other tokens than inside a text.
        for lead in ("", " ") if isinstance(instead_of, str) else ("",):
            for span in cuts.places_of(self.tokens, token_list(self.model, _with_lead(lead, instead_of))):
                replacements[span] = self._rows_of(_with_lead(lead, new))
        if not replacements:
            raise InputError(
                f"instead_of: expected a sentence that was read, in the words that were read, got {instead_of!r}"
            )
        memory = self
        done = self.T
        for (start, stop), row in sorted(replacements.items(), reverse=True):  # the last first: others keep their place
            if stop <= done:  # not of two that overlap
                memory = read_instead(memory, start, stop, row)
                done = start
        return memory

    def paste(self, other: Memory, span: TokenSpan) -> Memory:
        """This memory, and then what ``other`` wrote at the tokens of ``span``.

        Exact where ``other`` read the span after the very tokens of this memory; else ``approximate`` says so.

        Cost: the recurrence over the span's stored factors, and a pass over as many tokens as convolutions hold.

        Raises:
            InputError: ``other`` belongs to another model or has other batch rows, its states were set by hand, or the
                span is empty or out of range.
        """
        self.check_peer(other)
        start, stop = other.span_of(span)
        other._check_explained()
        later = other.kept.span(start, stop)
        if self.edited or not torch.equal(self.tokens, other.tokens[:, :start]):
            later = later._replace(inexact=torch.ones_like(later.inexact))
        return self._composed_memory(self.T, self.tokens[:, :0], later, self.T - start)

    # -- arithmetic on states. Convolutions, token shifts and attention stay as they are.

    def __sub__(self, other: Memory) -> LayerStates:
        """The difference of all states, by layer."""
        self.check_peer(other)
        return {layer: self.state(layer) - other.state(layer) for layer in self.forms}

    def __add__(self, delta: Mapping[int, Tensor]) -> Memory:
        """With ``delta`` [B,H,K,V] added to the states of the layers that it names; later tokens see the sum."""
        self._check_states(delta)
        return self.with_states({layer: self.state(layer) + change for layer, change in delta.items()})

    def lerp(self, other: Memory, t: float) -> Memory:
        """With states S + t (S' - S), where S' are those of ``other``."""
        if not isinstance(t, int | float) or not math.isfinite(t):
            raise InputError(f"t: expected a finite number, got {t!r}")
        return self + {layer: t * change for layer, change in (other - self).items()}

    def truncate(self, rank: int) -> Memory:
        """With the nearest states of ``rank``, head by head (their largest singular values). Cost: an SVD of each."""
        if not isinstance(rank, int) or rank < 1:
            raise InputError(f"rank: expected a whole number from 1 on, got {rank!r}")
        states = self._layer_states()
        for layer, state in states.items():
            # torch has no SVD of half precision.
            left, sizes, right = torch.linalg.svd(state.to(compute_dtype(state)), full_matrices=False)
            states[layer] = left[..., :rank] * sizes[..., None, :rank] @ right[..., :rank, :]
        return self.with_states(states)

    def with_states(self, states: Mapping[int, Tensor]) -> Memory:
        """With copies of other states [B,H,K,V] of the layers that are named. Gradients pass to states that ask for
        them, from ``model.logits_after(memory, input, gradients=True)`` and ``model.forward``. Calls that read tokens
        into a memory, or generate, make none.

        Raises:
            InputError: a state has another shape or device, or is not finite.
            UnsupportedModelError: a layer has no recurrence.
        """
        self._check_states(states)
        cache = shared(self.cache)  # this memory stays as it is
        for layer, state in states.items():
            put_state(cache, layer, state.clone(), self.forms[layer].value_first)
        drop_sources(cache)
        return replace(self, cache=cache, edited=True)

    # -- reading on, and files

    def branch(self, model: Tokens, tokens: Tensor, copies: int = 1) -> Cache:
        """A copy of the cache, for ``model`` to read ``tokens`` [B,T'] on from here; with ``copies`` of each row, one
        after the other, as transformers expands rows to beams and to several returned sequences. In grad mode,
        gradients pass through it to states that ask for them.

        Raises:
            InputError: the memory belongs to another model, dtype or device, or to another number of rows.
        """
        cfg = model.cfg
        expected = [cfg.model_name, tokens.shape[0], cfg.dtype, cfg.device]
        got = [self.model.cfg.model_name, self.tokens.shape[0], self.dtype, self.tokens.device]
        if got != expected or self.model is not model:
            raise InputError(
                f"memory: expected one that this very model read, with (name, rows, dtype, device) {tuple(expected)}, "
                f"got {tuple(got)}{'' if self.model is model else ' of another model'}; read the tokens with this model"
            )
        return chosen_rows(self.cache, torch.arange(tokens.shape[0]).repeat_interleave(copies))

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, aside and then renamed: what is stored of each token, the cache, and a SHA-256 of
        all of it.

        Raises:
            OSError: it cannot be written, or ``path`` is a link, a folder or a device, which is not replaced.
        """
        named = self.kept.filed.named() | {f"cache/{place}": x for place, x in tensors_of(self.cache).items()}
        save_sealed(path, named, {**_file_identity(self.model), "edited": self.edited})

    @classmethod
    def load(cls, path: str | Path, model: Tokens) -> Memory:
        """Read what `save` wrote, onto the devices of the model's layers. No code is run. Cost: a reading of the
        model's weights (`fingerprint`), and a pass over one token, which tells what names and shapes the file needs.

        Raises:
            InputError: the file is damaged or not a memory, or was saved for another model, dtype or version.
            FileNotFoundError: there is none.
        """
        if is_zipfile(path):
            raise InputError(
                f"{path}: expected a memory that was saved, got a file of torch.save, as RWKV's states are: "
                "memory.rewind(0).with_states(hookpoints.rwkv7.load_states(path, model)) begins with those of RWKV-7"
            )
        named, settings = load_sealed(path, "memory", _file_identity(model))
        first = _memory_of_first_token(model, named, str(path))
        kept = first.kept.filed.each(lambda name, x: named[name].to(x.device))
        kept = kept._replace(attention=attention_of(first.cache, kept.T))
        return replace(first, kept=kept, edited=settings.get("edited") is not False)

    # -- helpers

    def check_row(self, row: int) -> None:
        """Raise InputError unless there is such a row."""
        if not 0 <= row < self.tokens.shape[0]:
            raise InputError(f"row: expected 0 to {self.tokens.shape[0] - 1}, got {row}")

    def _next_log_probs(self, question: Tensor, memories: Sequence[Memory]) -> Tensor:
        """[N,vocab], of the token after ``question`` [1,T], which is read after memories of one row: in one pass, where
        no layer attends, so that all may stand at one position."""
        log_probs = list[Tensor]()
        for group in [[memory] for memory in memories] if self.kept.attention else [memories]:
            cache = joined_rows([memory.cache for memory in group])
            log_probs.append(read_on(self.model, question.expand(len(group), -1), group[0].T, cache)[1])
        return torch.cat(log_probs)

    def _rows_of(self, sentence: str | Sequence[int]) -> Tensor:
        """[B,T] of a sentence, the same in each row."""
        tokens = token_list(self.model, sentence)
        if not tokens:
            raise InputError(f"new: expected a sentence, got {sentence!r}")
        return torch.tensor(tokens, device=self.tokens.device).expand(len(self.tokens), -1)

    def _without_each(self, spans: Sequence[tuple[int, int]]) -> list[Memory]:
        """`without` each of ascending spans, ``approximate``, all together as far as can be."""
        memories = list[Memory]()
        for is_inside, group in groupby(spans, lambda span: cuts.is_inside(self.cache, span, self.T)):
            if is_inside and not self.kept.attention:
                self._check_explained()
                memories += map(self.with_states, cuts.states_without_each(self._token_reader, self.kept, [*group]))
            else:
                memories += [self.without(span, approximate=True) for span in group]
        return memories

    def check_peer(self, other: Memory) -> None:
        """Raise InputError unless another memory is of this model, and has as many rows."""
        if other.model is not self.model or other.tokens.shape[0] != self.tokens.shape[0]:
            raise InputError(f"expected a memory of this model with as many rows as {self}, got {other}")

    def _check_states(self, states: Mapping[int, Tensor]) -> None:
        for layer, state in states.items():
            expected_kind = _state_kind(self.state(layer))
            kind = _state_kind(state)
            if kind != expected_kind:
                raise InputError(f"layer {layer}: expected [B,H,K,V], float, device {expected_kind}, got {kind}")
            if not state.isfinite().all():
                raise InputError(f"layer {layer}: expected finite numbers, got NaN or infinity")

    def span_of(self, span: TokenSpan) -> tuple[int, int]:
        """Start and stop of a span of its tokens, checked."""
        return cuts.span_bounds(span, self.T)

    def _layer_states(self) -> LayerStates:
        return {layer: self.state(layer) for layer in self.forms}

    def _check_explained(self) -> None:
        if self.edited:
            raise InputError("expected a memory whose tokens wrote its states, got one edited by hand: cut before")
        if not self.T:
            raise InputError("memory: expected one that has read tokens, got one that has read none")

    @property
    def _token_reader(self) -> TokenReader:
        return TokenReader(self.model, self.cache, self.forms)

    def _composed_memory(self, stop: int, again: Tensor, later: Kept, moved_by: int) -> Memory:
        """`cuts.composed`, of the first tokens of this memory.

        Raises:
            InputError: states were set by hand, so that the tokens do not tell them.
        """
        if stop < self.T:
            self._check_explained()
        parts = cuts.composed(self._token_reader, self.kept, stop, again, later, moved_by)
        return replace(self, cache=parts.cache, kept=parts.kept, edited=self.edited or parts.edited)


@torch.no_grad()
def read(model: Tokens, tokens: Tensor, before: Memory | None = None) -> Memory:
    """The memory after ``tokens`` [B,T], read after those of ``before``. One pass with a cache, without logits.

    Raises:
        UnsupportedModelError: attention does not hold all tokens.
        InputError: the tokens or ``before`` do not fit the model.
    """
    check_tokens(tokens, model.cfg)
    position = 0
    cache = None
    if before is not None:
        position = before.T
        cache = before.branch(model, tokens)
    streams, keeping, _ = model.get_caching_hooks(recorded_streams(model))
    with model.recording() as recorded:
        cache = run_tokens(model, tokens, position, cache, keeping)
    forms: dict[int, Form] = {}
    for layer, record in recorded.items():
        r = record.recurrence
        forms[layer] = Form(record.value_first, r.scale, r.read_before_write, r.rates)
    attention = attention_of(cache, position + tokens.shape[1])
    exact = torch.zeros_like(tokens, dtype=torch.bool)
    kept = Kept(
        tokens=tokens,
        inexact=exact,
        factor=factors_of(recorded),
        stream={name: x for name, x in streams.items() if is_stored(name, cache)},
        attention={},
        unmoved={int(place.split("/")[0]): exact for place in attention},
    )
    edited = not all_left(recorded, {layer: state_of(cache, layer, form.value_first) for layer, form in forms.items()})
    if before is not None:  # what is read after inexact tokens is made of what they left
        kept = kept._replace(inexact=exact | before.kept.inexact.any(1, keepdim=True))
        kept = before.kept.then(kept)
        edited |= before.edited
    return Memory(model, cache, kept._replace(attention=attention), forms, model.cfg.dtype, edited)


def read_instead(memory: Memory, start: int, stop: int, new: Tensor) -> Memory:
    """With ``new`` [B,T'] instead of the tokens start <= t < stop; all after them is read again."""
    before = memory.rewind(start)
    again = torch.cat([new, memory.tokens[:, stop:]], 1)
    return read(memory.model, again, before) if again.shape[1] else before


def _file_identity(model: Tokens) -> dict[str, object]:
    """What a file has to agree in."""
    return {"format": 2, "model": fingerprint(model.hf_model), "dtype": str(model.cfg.dtype)}


def _memory_of_first_token(model: Tokens, named: Mapping[str, Tensor], path: str) -> Memory:
    """The memory of a file's first token, which tells names, shapes and devices, with the cache that the file holds.

    Raises:
        InputError: its tensors are not those of a memory of this model, by name, dtype or shape.
    """
    tokens = named.get("tokens")
    if tokens is None or tokens.ndim != 2 or tokens.dtype not in (torch.int32, torch.int64):
        raise InputError(f"{path}: expected token ids [B,T] under 'tokens', got none")
    rows, count = tokens.shape
    some = tokens if count else F.pad(tokens, (0, 1))  # any token will do for a memory that has read none
    check_tokens(some, model.cfg)
    # Names, shapes and devices are those of a real memory: nothing is taken from the file unchecked. One row tells
    # them, however many the file claims to have.
    first = read(model, some[:1, :1].to(model.cfg.device))
    token_axes = {name: (x, 1) for name, x in first.kept.filed.named().items()}
    places = tensors_of(first.cache)
    token_axes |= {f"cache/{place}": (x, x.ndim - 2 if _has_tokens(place) else None) for place, x in places.items()}
    kinds: dict[str, tuple[torch.dtype, list[int]]] = {}
    for name, (x, axis) in token_axes.items():
        kinds[name] = (x.dtype, [rows, *(count if n == axis else size for n, size in enumerate(x.shape[1:], 1))])
    check_tensors(path, named, kinds)
    fill(first.cache, {place: named[f"cache/{place}"].to(x.device) for place, x in places.items()})
    count_tokens(first.cache, count)
    return first


def _with_lead(lead: str, sentence: str | Sequence[int]) -> str | Sequence[int]:
    """A text with ``lead`` before its first word; token ids as they are."""
    return lead + sentence.strip() if isinstance(sentence, str) else sentence


def _state_kind(state: object) -> list[object]:
    """What a state has in common with those that can replace it."""
    return [*state.shape, state.is_floating_point(), state.device] if is_dense(state) else [type(state).__name__]


def _has_tokens(place: str) -> bool:
    """Whether a tensor of the cache has an axis of tokens."""
    return place.endswith(("/keys/", "/values/"))
