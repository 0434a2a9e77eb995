"""`writesae_product` with the encoder `pursuit`: any matrix, a state above all, as a sum of at most `n_pairs` pairs,
which matching pursuit takes (`sae.pursuit`). The parameters are the atoms of both sides, whose norms have no effect: an
activation is the coefficient of a pair of norm 1, and has a sign. The loss is the squared error of the sum, whose
gradient flows to both sides. (Coefficients are those of least squares, so that nothing is lost by holding them fixed.)
Atoms that are hardly used, and the less used one of two that are alike, are replaced by singular vectors of what is
left. With half as many atoms again as a side has directions, all of these are found; with as many, two share an atom
here and there.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import normalize

from sae_lens_writesae.atom.low_rank import LowRank
from sae_lens_writesae.sae.product import Product, WriteProductSAE, WriteProductTrainingSAE
from sae_lens_writesae.sae.training import dense_rows, exact_dtype

UNUSED = 0.15
"""An atom whose contribution is below this share of its side's mean is replaced."""
ALIKE = 0.95
"""Two atoms of a side whose cosine, of either sign, is above this are one; the less used one is replaced."""


class PairSums(Product):
    """Sums of pairs, by pursuit. Atoms are decoded with norm 1."""

    coder = "pursuit"

    directions = readers = cast(Any, property(lambda self: tuple(normalize(atoms, dim=1) for (atoms,) in self.sides)))

    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Activations and pre-activations [...,d_sae] of [...,K*V]."""
        matrices = self.process_sae_in(x).unflatten(-1, (self.cfg.d_k, self.cfg.d_v))
        pairs = self.pursue(matrices.flatten(0, -3))
        pre = self.hook_sae_acts_pre(pairs.scores.view(*x.shape[:-1], -1))
        return self.hook_sae_acts_post(pairs.acts().view_as(pre)), pre

    def fold_activation_norm_scaling_factor(self, scaling_factor: float) -> None:
        """Refused: it is trained on inputs as they are."""
        raise NotImplementedError(
            "writesae_product with pursuit has atoms of norm 1, and the code of s X is s times that of X: give it "
            "inputs as they are."
        )


class PairSumsSAE(PairSums, WriteProductSAE):
    """For inference."""


class PairSumsTrainingSAE(PairSums, WriteProductTrainingSAE):  # pyright: ignore  (cfg)
    """In training."""

    @torch.no_grad()
    def start_from_rows(self, x: Tensor | LowRank, *, first: bool = True) -> int:
        """Put atoms on the first singular vectors of the rows [N,K*V] of the first batch; returns 0."""
        if first:
            everywhere = [atoms.isfinite().all(1) for (atoms,) in self.sides]
            self._put_distinct(everywhere, _singular_vectors(self._row_matrices(x)), either_sign=True)
        return int(self.n_started)

    @torch.no_grad()
    def resample(self, x: Tensor | LowRank, dead: Tensor) -> int:
        """Put spare atoms (`_spare_atoms`) on singular vectors of what is left of the rows [N,K*V], those first of
        which most is left; returns how many. Costs N SVDs."""
        self._turn_to_positive()
        used = self.mean_contribution.view(self.cfg.f_key, -1).abs()
        spare = [_spare_atoms(side, used.sum(1 - number)) for number, side in enumerate(self.directions)]
        matrices = self._row_matrices(x)
        left = matrices - self._row_matrices(self.weighted_sum(self.encode(matrices.flatten(1))))
        by_size = left.square().sum((1, 2)).argsort(descending=True)
        return self._put_distinct(spare, _singular_vectors(left[by_size]), either_sign=True)

    def _row_matrices(self, x: Tensor | LowRank) -> Tensor:
        """Rows [N,K*V] as matrices [N,K,V] in the dtype of the atoms."""
        return dense_rows(x).to(self.dtype).unflatten(1, (self.cfg.d_k, self.cfg.d_v))

    def _turn_to_positive(self) -> None:
        """Turn atoms to their negative, so that most contributions are positive: by the first singular vectors of
        the signs of mean contributions. Where the signs of all pairs follow from those of their sides, this gives them
        (Perron and Frobenius). Sizes are left out: a pair that all states have would outweigh the others."""
        grid = self.mean_contribution.view(self.cfg.f_key, -1)
        left, _, right = torch.linalg.svd(grid.sign(), full_matrices=False)
        one = torch.ones_like(grid[0, 0])
        of_keys = one.copysign(left[:, :1])
        of_values = one.copysign(right[0])
        self.key_atoms.data.mul_(of_keys)
        self.value_atoms.data.mul_(of_values[:, None])
        grid.mul_(of_keys * of_values)


def _spare_atoms(directions: Tensor, used: Tensor) -> Tensor:
    """[F] which atoms of a side, of norm 1, are hardly `used` [F] or are the less used one of two that are alike."""
    spare = used < UNUSED * used.mean()
    alike = (directions @ directions.T).abs().triu(1) > ALIKE
    one, other = alike.nonzero().T
    spare[torch.where(used[one] < used[other], one, other)] = True
    return spare


def _singular_vectors(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """The first left and right singular vectors [N,K] and [N,V]."""
    left, _, right = torch.linalg.svd(matrices.to(exact_dtype(matrices)), full_matrices=False)
    return left[..., 0], right[:, 0]
