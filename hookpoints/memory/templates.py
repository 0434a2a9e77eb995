"""Whitened states, and the templates of phrases: what readers of memories are fitted from.

The template of a phrase is the state after the phrase alone. A state that has read the phrase resembles its template,
once both are whitened: a head's keys and values, by their own second moments over running text,

    Z = A^(-1/2) (S - mean) B^(-1/2),    A = E[X X^T],    B = E[X^T X],    X = S - mean  [K,V].

A head's feature is the cosine of the whitened state and the whitened template. Heads are weighed by a logistic fit on
running text, where it is known for free what was read: a phrase of the text, and the phrase that follows the text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from hookpoints.errors import InputError
from hookpoints.layer.context import scope
from hookpoints.memory.passes import LayerStates, run_tokens, token_list

if TYPE_CHECKING:
    from hookpoints.model.tokens import Tokens

RIDGE = 0.03
"""Share of the mean eigenvalue that is added to second moments before their inverse root is taken."""
LENGTHS = (2, 4, 8, 12, 16, 24, 32, 48, 64)
"""Numbers of tokens of the phrases that a fit reads."""
WEIGHED_FROM = 4
"""Tokens from which phrases take part in the fit of the heads' weights."""
CHECKPOINTS = 4
"""States of a stretch of text that a fit looks at, at even distances."""
LEAST_STRETCHES = 40
"""Stretches of text without which a fit is refused."""
MOST_STRETCHES = 480
"""Stretches of text that a fit reads at most."""
BATCH = 128
"""States or phrases of a pass, at most."""
HELD = 2**27
"""Numbers of states that are made at once, at most: half a GB."""
SINGULAR = 1e-4
"""Added to the squared sizes of templates, which are 1: their equations are solvable where two are alike."""


class Whitening(NamedTuple):
    """Of the states of some heads of one layer."""

    mean: Tensor
    """[H,K,V]"""
    keys: Tensor
    """[H,K,K], A^(-1/2)."""
    values: Tensor
    """[H,V,V], B^(-1/2)."""

    def __call__(self, states: Tensor) -> Tensor:
        """Directions [N,H,K*V] of whitened states [N,H,K,V], on their device: layers may have several."""
        mean, keys, values = (x.to(states.device) for x in self)
        return F.normalize((keys @ (states - mean) @ values).flatten(2), dim=2)


class AgeAccuracy(NamedTuple):
    """How well phrases of an age are told from unread ones."""

    age: int
    """Tokens read after the phrase, at most; more than in the entry before."""
    auc: float
    """The chance that a phrase that was read scores above one that was not; 0.5 is a coin."""
    phrases: int
    """That were read, on text that took no part in the fit."""


Directions = Sequence[Tensor]
"""[N,H,K*V] of the heads of each layer: whitened states, of length one."""


class LayerFit(NamedTuple):
    """Heads of one layer."""

    heads: Tensor
    """[H], their numbers."""
    weights: Tensor
    """[H]. Below 0, a head says what states of unread phrases have in common with those that were read."""
    of_states: Whitening
    of_templates: Whitening

    def directions(self, states: Tensor, whitening: Whitening) -> Tensor:
        """[N,H,K*V] of states [N,H_all,K,V], on their device."""
        return whitening(states[:, self.heads.to(states.device)].float())

    def above_zero(self) -> LayerFit:
        """The heads whose weight is above 0."""
        chosen = (self.weights > 0).nonzero()[:, 0]
        sides = (Whitening(*(x[chosen] for x in side)) for side in (self.of_states, self.of_templates))
        return LayerFit(self.heads[chosen], self.weights[chosen], *sides)


class Fitted(NamedTuple):
    """What a fit to running text gives."""

    layers: Mapping[int, LayerFit]
    """By recurrent layer."""
    biases: tuple[float, ...]
    """For each of `LENGTHS` up to the longest: what is added to the overlaps of phrases of that many tokens, so that as
    many that were read score below 0 as of those that were not score above."""
    lead: tuple[int, ...]
    """Tokens that stand before a phrase when its template is made."""
    longest: int
    """Tokens of a phrase, at most: no longer ones were fitted."""
    context: int
    """Tokens of a memory over which phrases were remembered."""
    horizon: tuple[AgeAccuracy, ...]
    """Accuracy by age, on text that took no part in the fit."""

    def bias(self, length: int) -> float:
        """Of phrases of so many tokens; between two lengths that were fitted, in proportion."""
        return float(np.interp(length, LENGTHS[: len(self.biases)], self.biases))

    def of_states(self, states: LayerStates) -> Directions:
        """Of states [N,H,K,V] that have read texts, by layer."""
        return [fit.directions(states[layer], fit.of_states) for layer, fit in self.layers.items()]

    def of_templates(self, states: LayerStates) -> Directions:
        """Of states [N,H,K,V] after phrases alone, by layer."""
        return [fit.directions(states[layer], fit.of_templates) for layer, fit in self.layers.items()]

    def overlaps(self, some: Directions, others: Directions) -> Tensor:
        """[N,M]: the weighted sums of the heads' cosines, of N and M directions. On the first layer's device, since
        layers may have several."""
        total = some[0].new_zeros(len(some[0]), len(others[0]))
        for x, y, fit in zip(some, others, self.layers.values(), strict=True):
            total += torch.einsum("nhx,mhx,h->nm", x, y, fit.weights.to(x.device)).to(total.device)
        return total

    def above_zero(self) -> Fitted:
        """The heads alone whose weight is above 0, so that overlaps are an inner product.

        Raises:
            InputError: there is none.
        """
        above = {layer: fit.above_zero() for layer, fit in self.layers.items()}
        layers = {layer: fit for layer, fit in above.items() if len(fit.heads)}
        if not layers:
            raise InputError("reader: expected heads whose weight is above 0, got none; fit a reader to more text")
        return self._replace(layers=layers)


class Pursuit:
    """Explains a target as a sum of templates, taken one after another: orthogonal matching pursuit (Pati et al. 1993).
    Heads do not forget alike, so no two share their coefficients.

    Args:
        fitted: heads whose weights are above 0.
        target: directions of one state.
    """

    def __init__(self, fitted: Fitted, target: Directions) -> None:
        self.fitted = fitted
        self.target = target
        self.left = target
        """What the templates that were taken leave of the target."""
        self._taken: Directions = [x[:0] for x in target]

    def take(self, template: Directions) -> None:
        """Explain the target by one more template."""
        self._taken = [torch.cat(both) for both in zip(self._taken, template, strict=True)]
        self.left = [_unexplained_part(*of_layer) for of_layer in zip(self.target, self._taken, strict=True)]


def _unexplained_part(target: Tensor, taken: Tensor) -> Tensor:
    """[1,H,K*V]: what no sum of ``taken`` [N,H,K*V] explains of a target."""
    among = torch.einsum("nhx,mhx->hnm", taken, taken)
    among.diagonal(dim1=1, dim2=2).add_(SINGULAR)
    sizes = torch.linalg.solve(among, torch.einsum("nhx,mhx->hnm", taken, target))
    return target - torch.einsum("hnm,nhx->mhx", sizes, taken)


def fit_templates(model: Tokens, tokens: Tensor, lead: Sequence[int], longest: int, context: int, seed: int) -> Fitted:
    """What running text [T] tells: half of its stretches give the moments, three tenths the weights of heads, and two
    tenths the accuracy by age. No state is held longer than its batch."""
    if longest < LENGTHS[0] or context < CHECKPOINTS * longest:
        raise InputError(
            f"longest, context: expected {LENGTHS[0]} tokens or more, and at least {CHECKPOINTS} times as many; got "
            f"{longest} and {context}"
        )
    if not lead:
        raise InputError("lead: expected text or token ids that stand before a phrase, got none")
    stretches = _text_stretches(tokens, context, longest)
    part = torch.arange(len(stretches)) % 10
    lengths = [length for length in LENGTHS if length <= longest]
    plan = _Plan(model, tuple(lead), context, lengths, torch.Generator().manual_seed(seed))
    state_moments = _Moments()
    template_moments = _Moments()
    for sample in plan.samples(stretches[part < 5]):
        state_moments.add(sample.states)
        template_moments.add(sample.read)
        template_moments.add(sample.unread)
    sides = (state_moments.whitenings(), template_moments.whitenings())
    first = sum(length < min(WEIGHED_FROM, lengths[-1]) for length in lengths)  # shorter phrases weigh no heads
    read, unread, _ = _head_cosines(plan, sides, stretches[(part >= 5) & (part < 8)])
    weights = _logistic_fit(read[first:].flatten(0, 1), unread[first:].flatten(0, 1))
    scores = zip(read @ weights, unread @ weights)
    biases = [-_equal_error_score(of_read, of_unread) for of_read, of_unread in scores]
    read, unread, ages = _head_cosines(plan, sides, stretches[part >= 8])
    tested_read, tested_unread = ((x[first:] @ weights).flatten() for x in (read, unread))
    horizon = _accuracy_by_age(tested_read, tested_unread, ages.repeat(len(lengths) - first), context)
    by_layer = weights.split([len(whitening.mean) for whitening in sides[0].values()])
    layers = {
        layer: LayerFit(torch.arange(len(own)), own, of_states, sides[1][layer])
        for (layer, of_states), own in zip(sides[0].items(), by_layer, strict=True)
    }
    return Fitted(layers, tuple(biases), tuple(lead), longest, context, horizon)


class _Sample(NamedTuple):
    """Stretches of text at checkpoints, as rows, with a phrase of each that was read and one that was not."""

    states: LayerStates
    """[N,1,H,K,V]"""
    read: LayerStates
    """[N,P,H,K,V], after the first tokens of the phrase: one state a length."""
    unread: LayerStates
    ages: Tensor
    """[N], tokens after the phrase that was read, if it is of the longest."""


class _Plan(NamedTuple):
    """How a fit draws phrases from stretches of text."""

    model: Tokens
    lead: tuple[int, ...]
    context: int
    lengths: list[int]
    drawn: torch.Generator

    def samples(self, stretches: Tensor) -> Iterator[_Sample]:
        """Of batches of stretches [N,context + longest]."""
        longest = self.lengths[-1]
        ends = torch.arange(1, CHECKPOINTS + 1) * (self.context // CHECKPOINTS)
        of_stretch = CHECKPOINTS * (1 + 2 * len(self.lengths))
        for batch in stretches.split(rows_at_once(self.model, BATCH // CHECKPOINTS, of_stretch)):
            states = states_at(self.model, batch[:, : self.context], (ends - 1).tolist())
            last = ends.repeat(len(batch))
            starts = (torch.rand(len(last), generator=self.drawn) * (last - longest + 1)).long()
            rows = torch.arange(len(batch)).repeat_interleave(CHECKPOINTS)
            inside = torch.arange(longest)
            yield _Sample(
                {layer: x.flatten(0, 1)[:, None] for layer, x in states.items()},
                self._template_states(batch[rows[:, None], starts[:, None] + inside]),
                self._template_states(batch[rows[:, None], last[:, None] + inside]),
                last - starts - longest,
            )

    def _template_states(self, phrases: Tensor) -> LayerStates:
        lead = torch.tensor(self.lead).expand(len(phrases), -1)
        positions = [len(self.lead) + length - 1 for length in self.lengths]
        return states_at(self.model, torch.cat([lead, phrases], 1), positions)


class _Moments:
    """Streamed first and second moments of states, by layer."""

    def __init__(self) -> None:
        self.counts: dict[int, int] = {}
        self.sums: dict[int, list[Tensor]] = {}
        self.devices: dict[int, torch.device] = {}

    def add(self, states: LayerStates) -> None:
        for layer, x in states.items():
            rows = x.flatten(0, 1)
            by_key = torch.einsum("nhkv,nhlv->hkl", rows, rows)
            by_value = torch.einsum("nhkv,nhkw->hvw", rows, rows)
            sums = (rows.sum(0), by_key, by_value)
            parts = [part.cpu().double() for part in sums]  # not every device has float64
            held = self.sums.get(layer)
            self.sums[layer] = parts if held is None else [old + new for old, new in zip(held, parts)]
            self.counts[layer] = self.counts.get(layer, 0) + len(rows)
            self.devices[layer] = x.device

    def whitenings(self) -> dict[int, Whitening]:
        by_layer: dict[int, Whitening] = {}
        for layer, (total, by_key, by_value) in self.sums.items():
            mean = total / self.counts[layer]
            keys = _inverse_root(by_key / self.counts[layer] - mean @ mean.mT)
            values = _inverse_root(by_value / self.counts[layer] - mean.mT @ mean)
            by_layer[layer] = Whitening(*(x.float().to(self.devices[layer]) for x in (mean, keys, values)))
        return by_layer


def _inverse_root(moments: Tensor) -> Tensor:
    """M^(-1/2) of second moments [H,n,n], with a ridge."""
    sizes, vectors = torch.linalg.eigh(moments)
    sizes = sizes.clamp_min(0)
    ridge = RIDGE * sizes.mean(-1, keepdim=True)
    return vectors * (sizes + ridge).clamp_min(1e-30).rsqrt()[..., None, :] @ vectors.mT


def _head_cosines(
    plan: _Plan, sides: tuple[Mapping[int, Whitening], Mapping[int, Whitening]], stretches: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Cosines [L,N,H_all] of states with phrases of each length that were read, with phrases that were not, and the
    ages [N]; on the CPU, which has float64."""
    batches: tuple[list[Tensor], list[Tensor]] = ([], [])
    ages = list[Tensor]()
    for sample in plan.samples(stretches):
        states = {layer: whitening(sample.states[layer][:, 0]) for layer, whitening in sides[0].items()}
        for cosines, templates in zip(batches, (sample.read, sample.unread)):
            of_lengths = list[Tensor]()
            for n in range(len(plan.lengths)):
                by_layer = [(x * sides[1][layer](templates[layer][:, n])).sum(2).cpu() for layer, x in states.items()]
                of_lengths.append(torch.cat(by_layer, 1))
            cosines.append(torch.stack(of_lengths))
        ages.append(sample.ages)
    read, unread = (torch.cat(batch, 1) for batch in batches)
    return read, unread, torch.cat(ages)


def _logistic_fit(read: Tensor, unread: Tensor) -> Tensor:
    """Weights [H_all] of the log odds, which have a bias as well, with a Gaussian prior of variance 1 on each."""
    features = torch.cat([read, unread]).double()
    labels = torch.cat([torch.ones(len(read)), torch.zeros(len(unread))]).to(features)
    weights = features.new_zeros(features.shape[1] + 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> float:
        optimizer.zero_grad()
        odds = features @ weights[:-1] + weights[-1]
        total = F.binary_cross_entropy_with_logits(odds, labels, reduction="sum") + weights[:-1].square().sum() / 2
        total.backward()
        return total.item()

    with torch.enable_grad():
        optimizer.step(loss)
    return weights.detach()[:-1].float()


def _equal_error_score(read: Tensor, unread: Tensor) -> float:
    """Where as many of ``read`` [N] are below as of ``unread`` [N] are above."""
    lowest = read.sort().values
    highest = unread.sort(descending=True).values
    crossing = min(int((lowest < highest).sum()), len(lowest) - 1)
    return float(lowest[crossing] + highest[crossing]) / 2


def _accuracy_by_age(read: Tensor, unread: Tensor, ages: Tensor, context: int) -> tuple[AgeAccuracy, ...]:
    """AUC by age, in doublings from 16 tokens on."""
    rows = list[AgeAccuracy]()
    lower, upper = -1, 16
    while lower < context:
        inside = (ages > lower) & (ages <= upper)
        if bool(inside.any()):
            rows.append(AgeAccuracy(upper, area_under_curve(read[inside], unread), int(inside.sum())))
        lower, upper = upper, 2 * upper
    return tuple(rows)


def area_under_curve(above: Tensor, below: Tensor) -> float:
    """AUC: the chance that one of ``above`` [N] exceeds one of ``below`` [M]; ties count half."""
    order = below.sort().values
    lower, upper = (torch.searchsorted(order, above.contiguous(), right=right) for right in (False, True))
    return float((lower + upper).double().mean()) / (2 * len(below))


def rows_at_once(model: Tokens, most: int, states: int = 1) -> int:
    """How many rows, ``most`` at most, a pass has: their states, so many of each row, stay within `HELD` numbers."""
    numbers = sum(layer.H * layer.K * layer.V for layer in model.cfg.layers.values())
    return max(1, min(most, HELD // (states * numbers)))


@torch.no_grad()
def states_at(model: Tokens, tokens: Tensor, positions: list[int]) -> LayerStates:
    """States [N,P,H,K,V] after each of ``positions`` of tokens [N,T], in float32 at least."""
    # On a CPU, upstream's ops pad short texts to their chunk.
    short = tokens.device.type == "cpu" and tokens.shape[1] < 64
    with model.recording() as recorded, scope(model.attachment, backend="recurrence" if short else None):
        run_tokens(model, tokens.to(model.cfg.device), 0, None)
    return {layer: record.recurrence.states(positions=positions).float() for layer, record in recorded.items()}


def running_tokens(model: Tokens, texts: str | Sequence[str] | Tensor) -> Tensor:
    """Token ids [T] of texts, one after the other."""
    if isinstance(texts, Tensor):
        return texts.flatten().long().cpu()
    several = [texts] if isinstance(texts, str) else texts
    return torch.tensor([token for text in several for token in token_list(model, text)], dtype=torch.long)


def _text_stretches(tokens: Tensor, context: int, longest: int) -> Tensor:
    """[N,context + longest]: stretches that do not overlap, evenly over all tokens."""
    size = context + longest
    count = min(len(tokens) // size, MOST_STRETCHES)
    if count < LEAST_STRETCHES:
        raise InputError(
            f"texts: expected at least {LEAST_STRETCHES * size} tokens ({LEAST_STRETCHES} stretches of context + "
            f"longest), got {len(tokens)}; give more text, or a smaller context"
        )
    return torch.stack([tokens[n * len(tokens) // count :][:size] for n in range(count)])
