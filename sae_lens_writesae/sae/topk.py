"""`writesae_topk`: the k most active atoms of each matrix (SAELens' TopK; Gao et al. 2024, arXiv 2406.04093)."""

from dataclasses import dataclass

import torch
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig, TopKTrainingSAE, TopKTrainingSAEConfig
from torch import Tensor

from sae_lens_writesae.sae.base import Activations, MatrixSAE, MatrixSAEConfig, MatrixWeights, require
from sae_lens_writesae.sae.training import MatrixTrainingSAE, MatrixTrainingSAEConfig, aux_loss


@dataclass
class WriteTopKSAEConfig(MatrixSAEConfig, TopKSAEConfig):
    """Inference config of `writesae_topk`."""

    def __post_init__(self) -> None:
        _check_k(self.k, self.d_sae, whole=True)
        super().__post_init__()

    @classmethod
    def architecture(cls) -> str:
        return "writesae_topk"


@dataclass
class WriteTopKTrainingSAEConfig(MatrixTrainingSAEConfig, TopKTrainingSAEConfig):
    """Training config of `writesae_topk`.

    Raises:
        ValueError: k or k_aux out of range, sparse COO activations, or unit norm without rescaling.
    """

    k: int = 32
    """Active atoms per matrix (the paper's 32)."""
    k_aux: int = 0
    """Dead atoms that reconstruct the residual in the auxiliary loss. 0: the paper's 256, or d_sae if that is less.
    (SAELens takes d_in // 2.)"""
    aux_loss_coefficient: float = 1e-2
    """Weight of the auxiliary loss: 1e-2 in the paper, 1 in its code and in SAELens, 1/32 in Gao et al."""

    def __post_init__(self) -> None:
        _check_k(self.k, self.d_sae, whole=self.architecture() == "writesae_topk")
        require(0 <= self.k_aux <= self.d_sae, "k_aux", self.k_aux, f"between 1 and d_sae={self.d_sae}, or 0")
        coefficient = self.aux_loss_coefficient
        require(coefficient >= 0, "aux_loss_coefficient", coefficient, "at least 0")
        require(
            not self.use_sparse_activations,
            "use_sparse_activations",
            True,
            "False: decoding gathers the active atoms by itself, and faster than a COO product",
        )
        require(
            self.rescale_acts_by_decoder_norm or not self.unit_norm_every,
            "unit_norm_every",
            self.unit_norm_every,
            "0 with rescale_acts_by_decoder_norm=False, where moving norms into the encoder changes which atoms are on"
            " top",
        )
        super().__post_init__()

    @classmethod
    def architecture(cls) -> str:
        return "writesae_topk"


def _check_k(k: float, d_sae: int, *, whole: bool) -> None:
    wanted = f"{'an integer' if whole else 'a number'} above 0 and at most d_sae={d_sae}"
    require(0 < k <= d_sae and (not whole or k == int(k)), "k", k, wanted)


class _TopKMaps(MatrixSAE):
    """With `rescale_acts_by_decoder_norm` activations are in units of contribution, and decode divides by norms."""

    cfg: WriteTopKSAEConfig | WriteTopKTrainingSAEConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    def _activate(self, linear: Tensor) -> Activations:
        hidden_pre = self.hook_sae_acts_pre(linear + self.b_enc)
        if self.cfg.rescale_acts_by_decoder_norm:
            hidden_pre = hidden_pre * self.decoder_norm()
        return Activations(self.hook_sae_acts_post(self.activation_fn(hidden_pre)), hidden_pre)

    def coefficient_scale(self) -> Tensor | None:
        return 1 / self.decoder_norm() if self.cfg.rescale_acts_by_decoder_norm else None


class WriteTopKSAE(_TopKMaps, TopKSAE, MatrixWeights):
    """TopK over matrix atoms, for inference."""

    cfg: WriteTopKSAEConfig  # pyright: ignore[reportIncompatibleVariableOverride]


class WriteTopKTrainingSAE(_TopKMaps, MatrixTrainingSAE, TopKTrainingSAE, MatrixWeights):
    """TopK over matrix atoms, in training. Exported as `writesae_topk` with unit-norm atoms."""

    cfg: WriteTopKTrainingSAEConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    _zeros_block_gradient = True

    def calculate_topk_aux_loss(
        self, sae_in: Tensor, sae_out: Tensor, hidden_pre: Tensor, dead_neuron_mask: Tensor | None
    ) -> Tensor:
        """SAELens' auxiliary loss with `k_aux`; see `sae.training.aux_loss`."""
        if dead_neuron_mask is None:
            return hidden_pre.new_tensor(0.0)
        loss = aux_loss(self, self.cfg.k_aux, sae_in, sae_out, hidden_pre, dead_neuron_mask)
        return self.cfg.aux_loss_coefficient * loss

    @torch.no_grad()
    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Tensor]) -> None:
        """Move decoder norms into the encoder, if training computed activations as if they were there."""
        super().process_state_dict_for_saving_inference(state_dict)
        if self.cfg.rescale_acts_by_decoder_norm:
            norms = self.get_W_dec_norm()
            state_dict.update(self._scaled(1 / norms, norms), b_enc=self.b_enc * norms)
