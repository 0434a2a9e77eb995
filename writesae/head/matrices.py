"""Writes or states of a head as matrices, and what a dictionary makes of them."""

from __future__ import annotations

from sae_lens import SAE
from torch import Tensor

from hookpoints import Recurrence
from sae_lens_writesae.sae.matrix import MatrixSAE


def matrices_of(recurrence: Recurrence, target: str) -> Tensor:
    """[T,K,V] writes, or states after each token, of the recurrence of one head (H = 1) on one sequence."""
    return (recurrence.states() if target == "state" else recurrence.write())[0, :, 0]


def encoded(sae: SAE, matrices: Tensor) -> Tensor:
    """Activations [T,F] of matrices [T,K,V], in the dtype of the SAE."""
    place = next(sae.parameters())
    return sae.encode(matrices.flatten(1).to(place.device, place.dtype))


def decoded(sae: SAE, activations: Tensor, like: Tensor) -> Tensor:
    """Decoded activations [T,F] as matrices of the shape and dtype of `like` [T,K,V]."""
    return sae.decode(activations).view(like.shape).to(like)


def dominant(sae: SAE, activations: Tensor) -> Tensor:
    """[T] the atom with the largest |a_i| |A_i| of activations [T,F]; atom 0 where none is active."""
    # SAELens' own dictionaries have no method for the norms.
    norms = sae.decoder_norm() if isinstance(sae, MatrixSAE) else sae.W_dec.norm(dim=-1)
    return (activations.abs() * norms).argmax(1)
