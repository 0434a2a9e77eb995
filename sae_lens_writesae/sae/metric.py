"""The model's own metric of a head's writes: what an error in a write costs in KL divergence, instead of its square.

To second order, E added to the write of a head moves all later next-token distributions by KL = (1/2) <E, G E> nats.
G is the Gauss-Newton matrix of the log-likelihood (Martens 2020, arXiv 1412.1193) in the K V entries of a write, here
its mean over tokens. A `Metric` holds it as a Kronecker product, <E, G E> = scale * trace(E^T A E B), with A on the key
side and B on the value side (as in K-FAC, Martens & Grosse 2015, arXiv 1503.05671), because that keeps the rank of a
matrix: E costs what A^1/2 E B^1/2 costs in squared error. So an autoencoder is trained on transformed writes as on any
others, and `fold` then moves the roots into its weights. What is left is an ordinary one that reads the writes.

`sae.metric_fit` fits it to a model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from sae_lens.saes.sae import SAEMetadata
from torch import Tensor

from sae_lens_writesae.atom.low_rank import LowRank
from sae_lens_writesae.sae.matrix import MatrixSAE

DAMPING = 0.05
"""Share of the identity in A and in B. Undamped condition numbers reach the thousands; between 0.001 and 0.2 the
prediction of held-out edits hardly changes."""

SAEType = TypeVar("SAEType", bound=MatrixSAE)


@dataclass(frozen=True, eq=False)
class Metric:
    """The metric of one head's writes, as symmetric roots in float64.

    The roots are scaled so that a transformed write has on average the squared norm of the write itself. Settings of
    training (learning rate, thresholds, penalties) then mean what they mean without a metric.
    """

    key_root: Tensor
    """[K,K], A^1/2"""
    value_root: Tensor
    """[V,V], B^1/2"""
    scale: float
    """Nats: deleting a write costs scale / 2 times its squared transformed norm, on average over writes."""
    damping: float
    """Share of the identity in A and in B, which bounds their condition numbers by about K / damping, V / damping."""
    n_sequences: int
    """Sequences that it was fitted to."""

    @classmethod
    def of(cls, key_side: Tensor, value_side: Tensor, scale: float, damping: float, n_sequences: int) -> Metric:
        """From A [K,K] and B [V,V], symmetric and positive.

        Raises:
            ValueError: one of them is not.
        """
        roots = (_symmetric_root(key_side, "key side"), _symmetric_root(value_side, "value side"))
        return cls(*roots, scale, damping, n_sequences)

    # ------------------------------------------------------------------------------------------ use

    def move(self, writes: LowRank) -> LowRank:
        """A^1/2 W B^1/2 of writes W, in their dtype."""
        return LowRank(_moved_vectors(writes.keys, self.key_root), _moved_vectors(writes.values, self.value_root))

    def to(self, device: torch.device | str) -> Metric:
        """The same on another device."""
        return replace(self, **{name: x.to(device) for name, x in vars(self).items() if isinstance(x, Tensor)})

    @property
    def inverse(self) -> Metric:
        """What moves transformed matrices back."""
        roots = {"key_root": self.key_root.inverse(), "value_root": self.value_root.inverse()}
        return replace(self, **roots, scale=1 / self.scale)

    def apply_rows(self, rows: Tensor) -> Tensor:
        """A^1/2 X B^1/2 of flattened matrices [...,K*V]. Costs K V (K + V) for each."""
        matrices = rows.unflatten(-1, (len(self.key_root), len(self.value_root)))
        return (self.key_root.to(rows) @ matrices @ self.value_root.to(rows)).flatten(-2)

    def nats(self, change: LowRank) -> Tensor:
        """KL [N] that `change` of a write costs to second order: nats, over all later tokens, for an average token."""
        return 0.5 * self.scale * self.move(change).norm().square()

    def fold(self, sae: SAEType) -> SAEType:
        """The autoencoder of writes that does what `sae` does on transformed writes.

        Its activations on X are those of `sae` on A^1/2 X B^1/2; its reconstruction is transformed back.
        Encoder factors become A^1/2 p and B^1/2 q, atoms and b_dec go through the inverses, and biases and thresholds
        stay. Two settings change where they must: activations are no longer rescaled by norms of atoms, which are now
        others (`sae` itself gets unit norms first, and keeps its function), and a tied encoder becomes an untied one.
        """
        cfg = sae.cfg
        sae.settle_b_dec()
        about = {"metric": "gauss_newton", "metric_damping": self.damping, "metric_sequences": self.n_sequences}
        changes: dict[str, object] = {"metadata": SAEMetadata(**cfg.metadata.to_dict() | about)}
        if getattr(cfg, "rescale_acts_by_decoder_norm", False):
            sae.fold_W_dec_norm()
            # The period is a field of training configs only.
            off = {"rescale_acts_by_decoder_norm": False, "unit_norm_every": 0}
            changes |= {name: value for name, value in off.items() if hasattr(cfg, name)}
        if cfg.encoder == "tied":
            changes["encoder"] = "bilinear" if cfg.decoder == "rank" else "dense"
        folded = type(sae)(replace(cfg, **changes))  # pyright: ignore[reportArgumentType]
        folded.load_state_dict(self._folded_state(sae))
        return folded.train(sae.training)

    @torch.no_grad()
    def _folded_state(self, sae: MatrixSAE) -> dict[str, Tensor]:
        cfg = sae.cfg
        state = dict(sae.state_dict())
        scale = state.pop("encoder_scale", None)
        # A tied encoder reads the atoms, which move the other way: it gets separate weights.
        if scale is not None and cfg.decoder == "rank":
            state |= {"v_enc": sae.v * scale[:, None, None], "w_enc": sae.w}
        elif scale is not None:
            state["encoder_matrix"] = sae.decoder_matrix.T * scale
        # What reads moves with the writes; what is reconstructed moves back.
        back = self.inverse
        moved_by = {"v_enc": self.key_root, "w_enc": self.value_root, "v": back.key_root, "w": back.value_root}
        for name in moved_by.keys() & state.keys():
            state[name] = _moved_vectors(state[name], moved_by[name])
        if "encoder_matrix" in state:
            state["encoder_matrix"] = self.apply_rows(state["encoder_matrix"].T).T
        for name in {"decoder_matrix", "b_dec"} & state.keys():
            state[name] = back.apply_rows(state[name])
        return state


def _moved_vectors(vectors: Tensor, matrix: Tensor) -> Tensor:
    """A symmetric matrix times vectors [...,n], in their dtype."""
    return vectors @ matrix.to(vectors)


def _symmetric_root(matrix: Tensor, what: str) -> Tensor:
    """In float64: the inverse of the root is made of the smallest eigenvalues."""
    values, vectors = torch.linalg.eigh(((matrix + matrix.mT) / 2).double().cpu())
    if not values[0] > 0:
        raise ValueError(f"{what}: expected positive eigenvalues, got {float(values[0])}")
    return (vectors * values.sqrt()) @ vectors.mT
