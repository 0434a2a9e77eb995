"""Padded batches whose layer runs them packed: rows end to end on one time axis, without their padding.

fla's layers unpad a batch [B,T,...] to [1,N,...] (N real tokens) and give the op the sequences' bounds. Hooks, edits
and states keep the batch's own rows and positions; at padding, factors are zero, so nothing is written or erased there
and the state passes through.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from hookpoints.rules.base import OpFactors, OpResult


@dataclass(frozen=True, eq=False)
class Padding:
    """Which tokens of a pass are real."""

    mask: Tensor | None
    """[B,T] bool, or None where the op is given the batch as it is."""

    def spread(self, factors: OpFactors) -> OpFactors:
        """Factors of a packed call in the batch's rows."""
        return replace(factors, **{name: self._rows(x) for name, x in factors.by_token().items()})

    def packed(self, factors: OpFactors) -> OpFactors:
        """The way back."""
        return replace(factors, **{name: self._tokens(x) for name, x in factors.by_token().items()})

    def spread_result(self, result: OpResult) -> OpResult:
        """Outputs of a packed call in the batch's rows; zero at padding."""
        return result._replace(outputs=self._rows(result.outputs))

    def packed_result(self, result: OpResult) -> OpResult:
        """The way back."""
        return result._replace(outputs=self._tokens(result.outputs))

    def spread_tokens(self, x: Tensor) -> Tensor:
        """A tensor of the layer's own, [1,N,...] or already [B,T,...], in the batch's rows; zero at padding."""
        return x if self._has_rows(x) else self._rows(x)

    def packed_tokens(self, x: Tensor, like: Tensor) -> Tensor:
        """The way back, to the form that ``like`` has."""
        return x if self._has_rows(like) else self._tokens(x)

    def _has_rows(self, x: Tensor) -> bool:
        return self.mask is None or x.shape[:2] == self.mask.shape

    def _rows(self, x: Tensor) -> Tensor:
        if self.mask is None:
            return x
        return x.new_zeros(*self.mask.shape, *x.shape[2:]).index_put((self.mask,), x[0])

    def _tokens(self, x: Tensor) -> Tensor:
        return x if self.mask is None else x[self.mask].unsqueeze(0)


UNPADDED = Padding(None)
