"""Features of one head's writes on equal terms: dictionaries, their rivals that need no gradients, and nulls.

Every set of features is fitted to the same rows of the same head in the same metric, with the same number of atoms.
Alphabet: N writes, F features, K key side, V value side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from sae_lens import SAE
from torch import Tensor
from torch.nn.functional import normalize

from hookpoints import HookedRecurrent, embedded
from sae_lens_writesae import train_many_on_writes, training_config
from sae_lens_writesae.atom.low_rank import LowRank
from sae_lens_writesae.sae.matrix import MatrixSAE
from writesae.codes.books import lloyd, residual_quantizer
from writesae.codes.components import fit_pca
from writesae.dictionary.quality import HEAD_SEQUENCES, head_effects, strongest_head
from writesae.experiment.terms import Terms
from writesae.experiment.tokens import sample_sequences

ONE, FOUR = "WriteSAE (1 active)", "WriteSAE (4 active)"
RIVALS = {
    ONE: ("quantizer (1 active)", "random codes (1 active)"),
    FOUR: ("residual quantizer (4 stages)", "quantizer by pursuit (4 active)", "random codes (4 active)"),
}
"""Each dictionary, and what has as many atoms, numbers and active atoms; the last one is the null."""
CONTEXT = 128
"""Tokens of a training sequence."""


class Features(NamedTuple):
    """Features of one head's writes."""

    encode: Callable[[Tensor, Tensor], Tensor]
    """Keys [N,K] and values [N,V] -> activations [N,F], 0 where an atom does not fire."""
    values: Tensor
    """[F,V] value sides of the atoms."""


class HeadTerms(Terms):
    """Equal terms of one head: the head of a shipped model that `writesae demo` chooses, its writes on the training
    text, and its metric.

    Args:
        rows: rows that a dictionary is trained on, in epochs; quantizers and components are fitted to all writes.
    """

    def __init__(self, name: str, sequences: int, n_atoms: int, rows: int):
        model = HookedRecurrent.from_pretrained(name)
        super().__init__(model, sample_sequences(model, embedded.text("train"), CONTEXT, sequences))
        layer, head, _, nats = strongest_head(head_effects(model, self.tokens[:HEAD_SEQUENCES], progress=True))
        self.place = (layer, head)
        self.nats = nats
        """KL per token of deleting all writes of the head."""
        self.n_atoms = n_atoms
        self.rows = rows
        self.native = self.writes(layer, head)
        self.in_metric = self.metric(layer, head)

    def describe(self) -> dict[str, object]:
        """What a record says of them."""
        numbers_of_an_atom = self.native.keys.shape[2] + self.native.values.shape[2]
        return {
            "rows": len(self.native),
            "atoms": self.n_atoms,
            "numbers": self.n_atoms * numbers_of_an_atom,
            "nats": self.nats,
            "head": "L{}H{}".format(*self.place),
        }

    def features(self) -> dict[str, Features]:
        """Dictionaries as the demo trains them, in the metric, with 1 and 4 active atoms; their rivals; and nulls."""
        generator = torch.Generator().manual_seed(0)
        moved = self.in_metric.move(self.native)
        moved = moved.rows(torch.nonzero(moved.norm()).flatten())
        order = torch.randperm(len(moved), generator=generator)
        drawn = moved.rows(order[: self.n_atoms])
        quantizer = lloyd(moved, drawn)
        random = drawn.random_like(generator)
        return {
            **dict(zip(RIVALS, self.trained((1, 4)))),
            "quantizer (1 active)": self.pursuit([quantizer]),
            "residual quantizer (4 stages)": self.pursuit(residual_quantizer(moved, self.n_atoms // 4, 4, seed=0)),
            "quantizer by pursuit (4 active)": self.pursuit([quantizer], 4),
            "native writes (1 active)": self.pursuit([drawn]),
            **{f"random codes ({k} active)": self.pursuit([random], k) for k in (1, 4)},
        }

    def trained(self, active: Sequence[int]) -> list[Features]:
        """Dictionaries with k active atoms each."""
        configs = [
            training_config(
                self.model,
                *self.place,
                sae={"k": k},
                d_sae=self.n_atoms,
                context_size=CONTEXT,
                training_tokens=self.rows,
                metric="gauss_newton",
                verbose=False,
            )
            for k in active
        ]
        saes = train_many_on_writes(configs, [self.native] * len(active), [self.in_metric] * len(active))
        return [features_of(sae, k) for sae, k in zip(saes, active)]

    def pursuit(self, stages: Sequence[LowRank], rounds: int = 1) -> Features:
        """The best code of each stage for what the codes before it leave, at its least-squares coefficient."""
        keys = torch.cat([stage.keys for stage in stages])
        values = torch.cat([stage.values for stage in stages])
        codes = LowRank(normalize(keys, dim=-1), normalize(values, dim=-1))
        gram = codes.inners(codes)
        n = len(stages[0])

        def encode(keys: Tensor, values: Tensor) -> Tensor:
            # Inner products with all codes are updated by their Gram matrix, so that no matrix is subtracted.
            products = self.in_metric.move(LowRank.rank_one(keys, values)).inners(codes)
            activations = torch.zeros_like(products)
            for first in [*range(0, len(codes), n)] * rounds:
                best = first + products[:, first : first + n].abs().argmax(1, keepdim=True)
                gain = products.gather(1, best)
                activations.scatter_add_(1, best, gain)
                products = products - gain * gram[best[:, 0]]
            return activations

        return Features(encode, codes.values[:, 0] @ self.in_metric.value_inverse.to(codes.values))

    def components(self, n: int) -> Features:
        """Scores of the first n principal components, in the metric; they have no sides."""
        components = fit_pca(self.in_metric.move(self.native), n)

        def encode(keys: Tensor, values: Tensor) -> Tensor:
            rows = self.in_metric.move(LowRank.rank_one(keys, values)).dense().flatten(1)
            return (rows - components.mean) @ components.components.T

        return Features(encode, torch.empty(0, 0))


@torch.no_grad()
def features_of(sae: SAE, k: int) -> Features:
    """A TopK dictionary with a metric folded in, from the factors of a write: rows of K V numbers are never built."""
    if not isinstance(sae, MatrixSAE):
        raise TypeError(f"expected a dictionary of matrices, got {type(sae).__name__}")
    encoder = LowRank(sae.v_enc.detach(), sae.w_enc.detach())
    bias = sae.b_enc.detach()
    if sae.cfg.apply_b_dec_to_input:
        bias = bias - sae.b_dec @ sae.W_enc  # (x - b_dec) W_enc + b_enc

    def encode(keys: Tensor, values: Tensor) -> Tensor:
        top = (LowRank.rank_one(keys, values).inners(encoder) + bias).topk(k)
        activations = top.values.clamp_min(0)
        return torch.zeros(len(keys), len(bias)).scatter(1, top.indices, activations)

    return Features(encode, sae.atoms().values[:, 0])
