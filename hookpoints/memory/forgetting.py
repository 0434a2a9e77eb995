"""Is a span gone from a memory? By equality: every layer is compared with a memory that never read the span.

    >>> memory = model.memory(text)
    >>> cut = memory.without(span)
    >>> print(forgot(memory, cut, span))

Rounding is the unit: how far two memories of the other tokens are apart, one that read them at once, and one that read
them as an exact cut does, those after the span by themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hookpoints.errors import InputError
from hookpoints.memory.caches import tensors_of
from hookpoints.memory.cuts import TokenSpan
from hookpoints.memory.memory import Memory, read, read_instead
from hookpoints.memory.passes import spelled, token_list

EQUAL = {torch.float64: 10, torch.float32: 10}
"""Units of rounding up to which two memories are equal, by the model's dtype; in half precision 1, since approximate
cuts of shipped models begin at 2.2 there. In float32 they begin at 26,000, and exact cuts that are read in other parts
have 7 at most; those of `Memory.without` have 0."""
RETOLD = 2
"""Tokens that a copy of a span may lack at its ends: a word without a space before it is another token. Spans of fewer
than five tokens are copied whole: two of their tokens stand in many texts."""
_PARTS = {"recurrent_states": "state", "conv_states": "convolution"}
"""What the parts of a cache are called here. A token shift is a convolution over two tokens."""


class Difference(NamedTuple):
    """How far a part of a layer is from that of a memory of the same tokens."""

    layer: int
    part: str
    """`state`, `convolution` (or token shift), or attention's `keys` and `values`."""
    units: float
    """The relative difference (of norms, of the head where it is largest) in units of rounding; inf where attention
    holds another number of tokens."""


class Candidate(NamedTuple):
    """A span that may have been cut, and how near memories are to one from which it was cut approximately."""

    text: str
    distance: float
    """Of the memory after the cut: squared differences of states as shares of their size, summed over layers."""
    never: float
    """Of a memory that never read the span."""


@dataclass(frozen=True)
class Certificate:
    """Whether a memory has forgotten a span. Made by `forgot`; prints as a sentence."""

    text: str
    """The span."""
    differences: Sequence[Difference]
    """From a memory that never read the span: of each part of each layer."""
    copies: Sequence[tuple[int, int]]
    """Where the tokens of the memory still say the span."""
    candidates: Sequence[Candidate]
    """The nearest first; empty where none were given."""
    allowed: float
    """Units of rounding up to which parts are equal."""

    @property
    def missing(self) -> list[str]:
        """What is in the way of the certificate: differences by kind, and copies of the span."""
        reasons = list[str]()
        for part in dict.fromkeys(difference.part for difference in self.differences):
            # NaN is unequal, too
            unequal = [each for each in self.differences if each.part == part and not each.units <= self.allowed]
            if unequal:
                layers = ", ".join(str(each.layer) for each in unequal)
                largest = max(each.units for each in unequal)
                distance = "of other tokens" if largest == torch.inf else f"{largest:,.0f} times rounding"
                reasons.append(f"{part} of layers {layers}: {distance}")
        reasons += [f"tokens {start} to {stop - 1} say it" for start, stop in self.copies]
        return reasons

    @property
    def gone(self) -> bool:
        """Every layer equals, up to rounding, that of a memory that never read the span, and no other tokens say it."""
        return not self.missing

    def __str__(self) -> str:
        largest = max(each.units for each in self.differences)
        equality = f"every layer equals that of a memory that never read it ({largest:.1f} times rounding)"
        verdict = f"gone: {equality}" if self.gone else f"not gone: {'; '.join(self.missing)}"
        nearest = f"; nearest of {len(self.candidates)}: {self.candidates[0].text!r}" if self.candidates else ""
        return f"{self.text!r} is {verdict}{nearest}"


def forgot(
    before: Memory, after: Memory, span: TokenSpan, *, candidates: Sequence[str] | Sequence[Sequence[int]] = ()
) -> Certificate:
    """Whether ``after``, from which a ``span`` of ``before`` was cut, has forgotten it. Memories may come from files.

    Args:
        before: the memory that read the span.
        after: the memory of its other tokens; or one of all its tokens, with other states.
        span: tokens of ``before``.
        candidates: spans that may have been cut. Each is read at the place of the cut and cut approximately, and
            compared with ``after``: what an attacker does who has a list. The span itself is one of them.

    The stored factors of ``before`` are taken to be what its tokens wrote: a forged file of it can hide a difference.

    Cost: two passes over the other tokens; for each candidate, one pass over those after the span.

    Raises:
        InputError: the memories belong to two models, have other rows, or ``after`` read other tokens; candidates of
            several rows.
    """
    before.check_peer(after)
    start, stop = before.span_of(span)
    rest = torch.cat([before.tokens[:, :start], before.tokens[:, stop:]], 1)
    if not any(torch.equal(after.tokens, tokens) for tokens in (rest, before.tokens)):
        raise InputError(
            f"after: expected a memory of the {before.T - stop + start} tokens of `before` without the span, got "
            f"{after}: cut the span from `before`, and read on afterwards"
        )
    if candidates and len(before.tokens) != 1:
        raise InputError(f"candidates: expected memories of one row, got {len(before.tokens)}")
    never = read(before.model, rest) if rest.shape[1] else before.rewind(0)
    phrase = before.tokens[:, start:stop]
    # The same tokens as an exact cut reads them, from a memory before the span that nothing later was in view of.
    exact, resumed = (before, stop) if before.approximate is None else (never, start)
    parted = read_instead(exact, start, resumed, phrase[:, :0])
    return Certificate(
        text=spelled(before.model, phrase[0].tolist()),
        differences=_part_differences(after, never, parted),
        copies=_phrase_copies(after.tokens, phrase),
        candidates=_nearest_candidates(after, never, phrase[0], start, candidates),
        allowed=EQUAL.get(before.dtype, 1),
    )


def _part_differences(memory: Memory, never: Memory, parted: Memory) -> list[Difference]:
    """How far each part of a memory is from the nearer of two that never read the span, in units of rounding: how far
    these two are apart."""
    tensors, at_once, in_parts = (tensors_of(each.cache) for each in (memory, never, parted))
    differences = list[Difference]()
    for place, x in at_once.items():
        layer, name, _ = place.split("/")
        units = torch.inf
        if tensors[place].shape == x.shape:
            # What is made of half precision has its rounding, whatever its own type.
            rounding = max(_relative_error(in_parts[place], x), torch.finfo(never.dtype).eps)
            units = min(_relative_error(tensors[place], each[place]) for each in (at_once, in_parts)) / rounding
        differences.append(Difference(int(layer), _PARTS.get(name, name), units))
    return differences


def _relative_error(x: Tensor, y: Tensor) -> float:
    """The norm of x - y over that of y, of the row and head [B,H,...] where it is largest."""
    by_head = [each.double().flatten(2 if y.ndim == 4 else 1).norm(dim=-1) for each in (x.double() - y.double(), y)]
    return float((by_head[0] / by_head[1].clamp_min(1e-30)).max()) if y.numel() else 0.0


def _phrase_copies(tokens: Tensor, phrase: Tensor) -> list[tuple[int, int]]:
    """Where some row of tokens [B,T] has those of its phrase [B,T'], but for `RETOLD` at the ends of longer ones."""
    length = phrase.shape[1] - (RETOLD if phrase.shape[1] > 2 * RETOLD else 0)
    if length > tokens.shape[1]:
        return []
    windows = tokens.unfold(1, length, 1)  # [B,N,length]
    parts = phrase.unfold(1, length, 1)
    is_copy = (windows[:, :, None] == parts[:, None]).all(3).any(2).any(0)
    starts = is_copy.nonzero()[:, 0].tolist()
    first = [start for start in starts if start - 1 not in starts]  # a whole copy has several parts in a row
    return [(start, start + length) for start in first]


def _nearest_candidates(
    after: Memory, never: Memory, phrase: Tensor, start: int, candidates: Sequence[str] | Sequence[Sequence[int]]
) -> list[Candidate]:
    """Each candidate read at the place of the cut, and cut again approximately: the nearest to ``after`` first."""
    model = after.model
    before, later = never.rewind(start), never.tokens[:, start:]
    spans = dict.fromkeys(tuple(token_list(model, each)) for each in (phrase, *candidates)) if candidates else {}
    rows = list[Candidate]()
    for tokens in spans:
        inserted = torch.cat([torch.tensor([tokens], device=later.device), later], 1)
        cut = read(model, inserted, before).without((start, start + len(tokens)), approximate=True)
        distances = [_state_distance(cut, each) for each in (after, never)]
        rows.append(Candidate(spelled(model, tokens), *distances))
    return sorted(rows, key=lambda row: row.distance)


def _state_distance(cut: Memory, memory: Memory) -> float:
    """Squared differences of states, as shares of the size of those of ``memory``, summed over layers."""
    sizes = {layer: memory.state(layer).double().square().sum() for layer in memory.forms}
    return sum(float(change.double().square().sum() / sizes[layer]) for layer, change in (cut - memory).items())
