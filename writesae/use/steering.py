"""Steering: how much more likely a target token becomes, at an equal change of the rest of the distribution."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformer_lens.hook_points import HookPoint

from hookpoints import embedded
from sae_lens_writesae import steer
from sae_lens_writesae.steering import Steering, value_direction
from writesae.experiment.tokens import sample_sequences
from writesae.use.features import ONE, Features, HeadTerms

QUICK = {
    "models": ("embedded",),
    "sequences": 12,
    "n_atoms": 16,
    "rows": 512,
    "n_targets": 2,
    "n_texts": 2,
    "often": 2,
    "strengths": (0.1, 1.0, 4.0),
    "new": 2,
}
PROMPT = 16
"""Tokens after which text is generated."""
SteeringWay = Callable[[int, float], Steering]
"""Steers toward the n-th target at a strength."""


def targets(terms: HeadTerms, n: int, often: int) -> list[int]:
    """Words with a space before them that occur `often` times or more; sorted by id, every so many."""
    counts = terms.tokens.flatten().bincount(minlength=terms.model.cfg.d_vocab)
    frequent = torch.nonzero(counts >= often).flatten().tolist()
    words = [i for i in frequent if re.fullmatch(" [A-Za-z]{3,}", str(terms.model.to_string(i)))]
    return words[:: max(1, len(words) // n)][:n]


@torch.no_grad()
def ways(terms: HeadTerms, codes: dict[str, Features], chosen: list[int]) -> dict[str, SteeringWay]:
    """Each way to steer: a value side that is added to every write, or a vector that is added to the residual stream.
    Sizes are relative to what they are added to."""
    model = terms.model
    layer, head = terms.place
    name = f"blocks.{layer}.hook_resid_post"
    texts = terms.tokens[:, :-1]
    residual = torch.cat([model.run_with_cache(batch, names_filter=[name])[1][name] for batch in texts.split(8)])
    u = terms.native.values[:, 0].unflatten(0, terms.tokens.shape)[:, :-1]
    toward = torch.stack([value_direction(model, layer, head, target) for target in chosen])

    def difference_of_means(x: Tensor) -> list[Tensor]:
        """At the tokens before each target, compared with all tokens."""
        return [x[terms.tokens[:, 1:] == target].mean(0) - x.mean((0, 1)) for target in chosen]

    def nearest_value(label: str) -> Tensor:
        """For each target the value side with the largest |cosine|."""
        values = codes[label].values
        return values[(toward @ normalize(values, dim=1).T).abs().argmax(1)]

    def by_write(sides: Sequence[Tensor] | Tensor) -> SteeringWay:
        return lambda n, strength: steer(model, layer, head, toward=sides[n], strength=strength)

    def by_residual(vectors: Sequence[Tensor] | Tensor) -> SteeringWay:
        def way(n: int, strength: float) -> Steering:
            unit = strength * normalize(vectors[n], dim=0)

            def add(x: Tensor, hook: HookPoint) -> Tensor:
                return x + x.norm(dim=-1, keepdim=True) * unit

            return Steering(model, [(name, add)])

        return way

    generator = torch.Generator().manual_seed(0)
    random_sides = torch.randn(len(chosen), u.shape[2], generator=generator)
    random_vectors = torch.randn(len(chosen), residual.shape[2], generator=generator)
    return {
        "steer: the token": by_write(toward),
        "steer: nearest atom": by_write(nearest_value(ONE)),
        "steer: nearest code": by_write(nearest_value("quantizer (1 active)")),
        "steer: difference of means": by_write(difference_of_means(u)),
        "steer: random": by_write(random_sides),
        "residual stream: difference of means": by_residual(difference_of_means(residual)),
        "residual stream: unembedding of the token": by_residual(model.W_U[:, chosen].T),
        "residual stream: random": by_residual(random_vectors),
    }


@torch.no_grad()
def effects(text: tuple[Tensor, Tensor], target: int, steering: Steering) -> tuple[float, float, float]:
    """What steering changes on tokens [B,T], whose native log-probabilities are [B,T,vocab].

    Returns:
        The mean change of log p(target); the KL divergence of the distribution of the other tokens, a token; and the
        change of the loss at next tokens other than the target. All in nats."""
    tokens, native = text
    with steering:
        steered = steering.model(tokens).log_softmax(-1)
    change = native - steered
    p = native.exp()
    # Log-probabilities that another token is next; a probability of 1 is rounding.
    other_native, other_steered = (torch.log1p(-x[..., target].exp().clamp_max(1 - 1e-6)) for x in (native, steered))
    # KL of the others' distributions, p_o / (1 - p_T) and q_o / (1 - q_T):
    # sum_o p_o (log p_o - log q_o) / (1 - p_T) - log (1 - p_T) + log (1 - q_T)
    of_others = (p * change).sum(-1) - (p * change)[..., target]
    side_effect = of_others / other_native.exp() - other_native + other_steered
    following = tokens[:, 1:]
    loss = change[:, :-1].gather(-1, following[..., None])[..., 0][following != target]
    return -float(change[..., target].mean()), float(side_effect.mean()), float(loss.mean())


def strength_for(
    way: SteeringWay, n: int, target: int, text: tuple[Tensor, Tensor], nats: float, strengths: tuple[float, ...]
) -> float:
    """The signed strength at which the side effect is `nats`, of the sign with the larger effect. Both are
    interpolated between strengths, on a log scale."""
    sides: list[tuple[float, float]] = []
    for sign in (1, -1):
        curve = np.array([effects(text, target, way(n, sign * strength))[:2] for strength in strengths])
        # Rising: where a side effect falls again, the smallest strength that has it counts.
        side_effect = np.log(np.maximum.accumulate(curve[:, 1].clip(1e-9)))
        effect = np.interp(np.log(nats), side_effect, curve[:, 0])
        strength = np.exp(np.interp(np.log(nats), side_effect, np.log(strengths)))
        sides.append((float(effect), float(sign * strength)))
    return max(sides)[1]


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
) -> dict[str, object]:
    """Of every way and target: strength, effect, side effect, change of the loss, and the share of generated tokens."""
    heads: dict[str, dict[str, object]] = {}
    for name in models:
        terms = HeadTerms(name, sequences, n_atoms, rows)
        model = terms.model
        chosen = targets(terms, n_targets, often)
        texts = [sample_sequences(model, embedded.text(part), 64, n_texts) for part in ("train", "test")]
        train, test = ((tokens, model(tokens).log_softmax(-1).detach()) for tokens in texts)
        of_ways: dict[str, list[list[float]]] = {}
        for label, way in ways(terms, terms.features(), chosen).items():
            for n, target in enumerate(chosen):
                strength = strength_for(way, n, target, train, terms.nats, strengths)
                with torch.random.fork_rng(), way(n, strength):
                    torch.manual_seed(0)
                    prompts = test[0][:, :PROMPT]
                    out = model.generate(prompts, max_new_tokens=new, do_sample=True, stop_at_eos=False)
                share = float((out[:, PROMPT:] == target).float().mean())
                of_ways.setdefault(label, []).append([strength, *effects(test, target, way(n, strength)), share])
        words = [str(model.to_string(target)) for target in chosen]
        heads[name] = terms.describe() | {"targets": words, "ways": of_ways}
    return {"often": often, "heads": heads}
