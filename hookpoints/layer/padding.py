"""Padded batches whose layer runs them packed: rows end to end on one time axis, without their padding.

fla's layers unpad a batch [B,T,...] to [1,N,...] (N real tokens) and give the op the sequences' bounds. Hooks, edits
and states keep the batch's own rows and positions; at padding, factors are zero, so nothing is written or erased there
and the state passes through.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Padding:
    """Which tokens of a pass are real."""

    mask: Tensor | None
    """[B,T] bool, or None where the op is given the batch as it is."""

    def spread(self, x: Tensor) -> Tensor:
        """A packed tensor [1,N,...] in the batch's rows, zero at padding; one that has these already, as it is."""
        if self.mask is None or x.shape[:2] == self.mask.shape:
            return x
        # Not in place, so that gradients pass from the batch's rows to the packed tensor.
        return x.new_zeros(*self.mask.shape, *x.shape[2:]).index_put((self.mask,), x[0])

    def packed(self, x: Tensor) -> Tensor:
        """The way back."""
        return x if self.mask is None else x[self.mask].unsqueeze(0)


UNPADDED = Padding(None)
