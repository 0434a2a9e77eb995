"""`writesae_standard`: ReLU with an L1 penalty (SAELens' Standard)."""

from dataclasses import dataclass

from sae_lens.saes.sae import TrainStepInput
from sae_lens.saes.standard_sae import (
    StandardSAE,
    StandardSAEConfig,
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
)
from torch import Tensor

from sae_lens_writesae.sae.base import Activations, MatrixSAE, MatrixSAEConfig, MatrixWeights
from sae_lens_writesae.sae.training import MatrixTrainingSAE, MatrixTrainingSAEConfig


@dataclass
class WriteStandardSAEConfig(MatrixSAEConfig, StandardSAEConfig):
    """Inference config of `writesae_standard`."""

    @classmethod
    def architecture(cls) -> str:
        return "writesae_standard"


@dataclass
class WriteStandardTrainingSAEConfig(MatrixTrainingSAEConfig, StandardTrainingSAEConfig):
    """Training config of `writesae_standard`."""

    @classmethod
    def architecture(cls) -> str:
        return "writesae_standard"


class _ReLUMaps(MatrixSAE):
    def _activate(self, linear: Tensor) -> Activations:
        hidden_pre = self.hook_sae_acts_pre(linear + self.b_enc)
        return Activations(self.hook_sae_acts_post(self.activation_fn(hidden_pre)), hidden_pre)


class WriteStandardSAE(_ReLUMaps, StandardSAE, MatrixWeights):
    """ReLU over matrix atoms, for inference."""

    cfg: WriteStandardSAEConfig  # pyright: ignore[reportIncompatibleVariableOverride]


class WriteStandardTrainingSAE(_ReLUMaps, MatrixTrainingSAE, StandardTrainingSAE, MatrixWeights):
    """ReLU and L1 over matrix atoms, in training. Slow until the penalty has made the code sparse."""

    cfg: WriteStandardTrainingSAEConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    _zeros_block_gradient = True

    def calculate_aux_loss(
        self, step_input: TrainStepInput, feature_acts: Tensor, hidden_pre: Tensor, sae_out: Tensor
    ) -> dict[str, Tensor]:
        """SAELens' penalty, with atom norms from the factors."""
        sparsity = (feature_acts * self.decoder_norm()).norm(p=self.cfg.lp_norm, dim=-1)
        return {"l1_loss": (step_input.coefficients["l1"] * sparsity).mean()}
