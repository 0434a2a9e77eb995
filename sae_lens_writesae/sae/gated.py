"""`writesae_gated`: separate gate and magnitude (Rajamanoharan et al. 2024, arXiv 2404.16014).

The paper reports that its gated variant failed; it is here so that this can be checked.
"""

from dataclasses import dataclass

import torch
from sae_lens.saes.gated_sae import GatedSAE, GatedSAEConfig, GatedTrainingSAE, GatedTrainingSAEConfig
from sae_lens.saes.sae import TrainStepInput
from torch import Tensor, nn

from sae_lens_writesae.sae.base import Activations, MatrixSAE, MatrixSAEConfig, MatrixWeights
from sae_lens_writesae.sae.training import MatrixTrainingSAE, MatrixTrainingSAEConfig


@dataclass
class WriteGatedSAEConfig(MatrixSAEConfig, GatedSAEConfig):
    """Inference config of `writesae_gated`."""

    @classmethod
    def architecture(cls) -> str:
        return "writesae_gated"


@dataclass
class WriteGatedTrainingSAEConfig(MatrixTrainingSAEConfig, GatedTrainingSAEConfig):
    """Training config of `writesae_gated`."""

    @classmethod
    def architecture(cls) -> str:
        return "writesae_gated"


class _GatedMaps(MatrixSAE):
    b_gate: nn.Parameter
    b_mag: nn.Parameter
    r_mag: nn.Parameter

    def _activate(self, linear: Tensor) -> Activations:
        """Gate and magnitude read the same inner products: one GEMM where SAELens takes two."""
        magnitude = self.hook_sae_acts_pre(linear * self.r_mag.exp() + self.b_mag)
        gate = (linear + self.b_gate > 0).to(self.dtype)
        return Activations(self.hook_sae_acts_post(gate * self.activation_fn(magnitude)), magnitude)


class WriteGatedSAE(_GatedMaps, GatedSAE, MatrixWeights):
    """Gated over matrix atoms, for inference."""

    cfg: WriteGatedSAEConfig  # pyright: ignore[reportIncompatibleVariableOverride]


class WriteGatedTrainingSAE(_GatedMaps, MatrixTrainingSAE, GatedTrainingSAE, MatrixWeights):
    """Gated over matrix atoms, in training."""

    cfg: WriteGatedTrainingSAEConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    _zeros_block_gradient = True

    def calculate_aux_loss(
        self, step_input: TrainStepInput, feature_acts: Tensor, hidden_pre: Tensor, sae_out: Tensor
    ) -> dict[str, Tensor]:
        """SAELens' two losses on the gate path: L1, and a reconstruction from the gate alone."""
        gate = torch.relu(self.linear(step_input.sae_in) + self.b_gate)
        l1 = step_input.coefficients["l1"] * (gate * self.decoder_norm()).sum(-1).mean()
        errors = self.squared_errors(self.decode(gate), step_input.sae_in)
        return {"l1_loss": l1, "auxiliary_reconstruction_loss": errors.sum(-1).mean()}
