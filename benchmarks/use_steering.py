"""Steering: how much more likely a target token becomes, at an equal change of the rest of the distribution."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import use
from torch import Tensor
from torch.nn.functional import normalize

from sae_lens_writesae import steer
from sae_lens_writesae.steering import Steering, value_direction

QUICK = {
    **{"models": ("embedded",), "sequences": 12, "n_atoms": 16, "rows": 512},
    **{"n_targets": 2, "n_texts": 2, "often": 2, "strengths": (0.1, 1.0, 4.0), "new": 2},
}
Text = tuple[Tensor, Tensor]
COLUMNS = ("effect", "side effect", "loss", "generated")
STEER = [f"steer: {each}" for each in ("the token", "nearest atom", "nearest code", "difference of means", "random")]
RESIDUAL = [f"residual stream: {each}" for each in ("difference of means", "unembedding of the token", "random")]
PAIRS = [
    *((STEER[0], each) for each in (*RESIDUAL[:2], *STEER[3:])),
    *((STEER[1], each) for each in (*STEER[2:], RESIDUAL[0])),
]
INTRODUCTION = """`steer(model, layer, head, toward=...)` adds a value side to every write of one head. Its rivals add
a vector to the residual stream at the output of the same layer, at every token. Sizes are relative to the norms of the
write and of the residual stream. For each way and target, sign and strength are chosen on training text, such that the
side effect there is as large as that of deleting all writes of the head. Effects are then measured on held-out text.

* **effect**: mean change of log p(target), in nats.
* **side effect**: KL divergence of the distribution of the other tokens, in nats per token.
* **loss**: change of the loss at next tokens other than the target, in nats.
* **generated**: share of the target among sampled tokens.

Targets are words with a space before them that occur {often} times or more in the training text. Of these, sorted by
id, every n-th is used. "The token" is the value side that raises the target's logit along the direct path. "Nearest" is
the atom of WriteSAE (1 active), or the code of the quantizer (1 active), whose value side has the largest |cosine| with
it. Differences of means compare tokens before the target with all tokens of the training text, in the head's values or
in the residual stream: they use labels; the token and its unembedding use weights alone. "Random" is a Gaussian
direction: the null. Intervals are 95%, over targets."""


def targets(terms: use.Terms, n: int, often: int) -> list[int]:
    """Words, by the rule of the page."""
    counts = terms.tokens.flatten().bincount(minlength=terms.model.cfg.d_vocab)
    frequent = torch.nonzero(counts >= often).flatten().tolist()
    words = [i for i in frequent if re.fullmatch(" [A-Za-z]{3,}", str(terms.model.to_string(i)))]
    return words[:: max(1, len(words) // n)][:n]


@torch.no_grad()
def ways(
    terms: use.Terms, codes: dict[str, use.Code], chosen: list[int]
) -> dict[str, Callable[[int, float], Steering]]:
    """Each way to steer toward the n-th target at a strength."""
    model, (layer, head) = terms.model, terms.place
    name, generator = f"blocks.{layer}.hook_resid_post", torch.Generator().manual_seed(0)
    texts = terms.tokens[:, :-1]
    residual = torch.cat([model.run_with_cache(each, names_filter=[name])[1][name] for each in texts.split(8)])
    u = terms.writes(layer, head).values[:, 0].unflatten(0, terms.tokens.shape)[:, :-1]
    toward = torch.stack([value_direction(model, layer, head, each) for each in chosen])

    def means(x: Tensor) -> list[Tensor]:
        """Of the tokens before each target, minus that of all tokens."""
        return [x[terms.tokens[:, 1:] == each].mean(0) - x.mean((0, 1)) for each in chosen]

    def nearest(label: str) -> Tensor:
        return codes[label].values[(toward @ normalize(codes[label].values, dim=1).T).abs().argmax(1)]

    def of_values(sides: Any) -> Callable[[int, float], Steering]:
        return lambda n, strength: steer(model, layer, head, toward=sides[n], strength=strength)

    def of_residual(vectors: Any) -> Callable[[int, float], Steering]:
        def add(n: int, strength: float) -> Steering:
            unit = strength * normalize(vectors[n], dim=0)
            return Steering(model, [(name, lambda x, hook: x + x.norm(dim=-1, keepdim=True) * unit)])

        return add

    own = (toward, nearest("WriteSAE (1 active)"), nearest("quantizer (1 active)"), means(u))
    others = (means(residual), model.W_U[:, chosen].T)
    draw = [torch.randn(len(chosen), each.shape[2], generator=generator) for each in (u, residual)]
    return dict(zip([*STEER, *RESIDUAL], [*map(of_values, (*own, draw[0])), *map(of_residual, (*others, draw[1]))]))


@torch.no_grad()
def effects(text: Text, target: int, steering: Steering) -> tuple[float, float, float]:
    """Effect, side effect and change of loss on tokens [B,T], compared with native log-probabilities [B,T,vocab]."""
    tokens, native = text
    with steering:
        steered = steering.model(tokens).log_softmax(-1)
    change, p, following = native - steered, native.exp(), tokens[:, 1:]
    # Log-probabilities that another token is next; a probability of 1 is rounding.
    left = [torch.log1p(-x[..., target].exp().clamp_max(1 - 1e-6)) for x in (native, steered)]
    others = ((p * change).sum(-1) - (p * change)[..., target]) / left[0].exp() - left[0] + left[1]
    loss = change[:, :-1].gather(-1, following[..., None])[..., 0][following != target]
    return -float(change[..., target].mean()), float(others.mean()), float(loss.mean())


def measure(
    models: tuple[str, ...] = ("embedded",),
    sequences: int = 320,
    n_atoms: int = 256,
    rows: int = 128_000,
    n_targets: int = 8,
    often: int = 50,
    n_texts: int = 2,
    strengths: tuple[float, ...] = (0.05, 0.4, 3.0, 24.0),
    new: int = 16,
) -> dict[str, Any]:
    """Effects of every way and target."""
    found: dict[str, Any] = {"often": often, "heads": {}}
    for name in models:
        terms = use.Terms(name, sequences, n_atoms, rows)
        model, chosen = terms.model, targets(terms, n_targets, often)
        texts = (use.sample_sequences(model, use.embedded.text(part), 64, n_texts) for part in ("train", "test"))
        train, test = ((each, model(each).log_softmax(-1).detach()) for each in texts)
        head: dict[str, list[list[float]]] = {}
        for way, make in ways(terms, terms.codes(), chosen).items():
            for n, target in enumerate(chosen):
                sizes, sides = np.log(strengths), list[tuple[float, float]]()
                for sign in (1, -1):
                    curve = np.array([effects(train, target, make(n, sign * s))[:2] for s in strengths])
                    reached = np.log(terms.nats), np.log(np.maximum.accumulate(curve[:, 1].clip(1e-9)))
                    sides.append((np.interp(*reached, curve[:, 0]), sign * np.exp(np.interp(*reached, sizes))))
                strength = float(max(sides)[1])
                with torch.random.fork_rng(), make(n, strength):
                    torch.manual_seed(0)
                    out = model.generate(test[0][:, :16], max_new_tokens=new, do_sample=True, stop_at_eos=False)
                share = float((out[:, 16:] == target).float().mean())
                head.setdefault(way, []).append([strength, *effects(test, target, make(n, strength)), share])
        words = [str(model.to_string(each)) for each in chosen]
        found["heads"][name] = terms.describe() | {"targets": words, "ways": head}
    return found


def text(found: dict[str, Any]) -> list[str]:
    """The section of the page."""
    parts = [INTRODUCTION.format(**found)]
    for name, head in found["heads"].items():
        of_way = {way: dict(zip(COLUMNS, list(zip(*of))[1:])) for way, of in head["ways"].items()}
        cells = ([way, *(use.told(use.over(x)) for x in of.values())] for way, of in of_way.items())
        gains = {
            (x, y): {each: use.over(np.subtract(of_way[x][each], of_way[y][each])) for each in COLUMNS[::3]}
            for x, y in PAIRS
        }
        parts += [use.HEADING.format(name=name, **head) + f", a side effect of {head['nats']:.4f} nats"]
        parts += [f"Targets:{','.join(head['targets'])}.", use.table(("way", *COLUMNS), cells), use.differences(gains)]
    return parts
