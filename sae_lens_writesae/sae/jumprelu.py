"""`writesae_jumprelu`: a threshold per atom (SAELens' JumpReLU; Rajamanoharan et al. 2024, arXiv 2407.14435).

Also what BatchTopK and Matryoshka are exported as.
"""

from dataclasses import dataclass

import torch
from sae_lens.saes.jumprelu_sae import (
    JumpReLU,
    JumpReLUSAE,
    JumpReLUSAEConfig,
    JumpReLUTrainingSAE,
    JumpReLUTrainingSAEConfig,
)
from torch import Tensor, nn

from sae_lens_writesae.atom.low_rank import LowRank
from sae_lens_writesae.sae.base import Activations, MatrixSAE, MatrixSAEConfig, MatrixWeights
from sae_lens_writesae.sae.training import MatrixTrainingSAE, MatrixTrainingSAEConfig


@dataclass
class WriteJumpReLUSAEConfig(MatrixSAEConfig, JumpReLUSAEConfig):
    """Inference config of `writesae_jumprelu`."""

    @classmethod
    def architecture(cls) -> str:
        return "writesae_jumprelu"


@dataclass
class WriteJumpReLUTrainingSAEConfig(MatrixTrainingSAEConfig, JumpReLUTrainingSAEConfig):
    """Training config of `writesae_jumprelu`."""

    @classmethod
    def architecture(cls) -> str:
        return "writesae_jumprelu"


class _Threshold(MatrixSAE):
    """Thresholds in units of contribution, activation times atom norm."""

    threshold: nn.Parameter

    @torch.no_grad()
    def contributions(self, x: Tensor) -> Tensor:
        """Pre-activations times atom norms [...,F]."""
        return (self.linear(x) + self.b_enc) * self.decoder_norm()

    @torch.no_grad()
    def set_threshold(self, value: float) -> None:
        """Make atoms active where their contribution exceeds `value`."""
        self.threshold.data.copy_(value / self.get_W_dec_norm())


class WriteJumpReLUSAE(_Threshold, JumpReLUSAE, MatrixWeights):
    """JumpReLU over matrix atoms, for inference."""

    cfg: WriteJumpReLUSAEConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    def _activate(self, linear: Tensor) -> Activations:
        hidden_pre = self.hook_sae_acts_pre(linear + self.b_enc)
        on = (hidden_pre > self.threshold).to(hidden_pre.dtype)
        return Activations(self.hook_sae_acts_post(self.activation_fn(hidden_pre) * on), hidden_pre)


class WriteJumpReLUTrainingSAE(_Threshold, MatrixTrainingSAE, JumpReLUTrainingSAE, MatrixWeights):
    """JumpReLU over matrix atoms, in training.

    SAELens' losses use `W_dec.norm()`, so that the dense dictionary is built once per step, and thresholds need the
    gradient of inactive atoms. A step costs a GEMM and the dictionary's memory more than with TopK.
    """

    cfg: WriteJumpReLUTrainingSAEConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    def _activate(self, linear: Tensor) -> Activations:
        hidden_pre = self.hook_sae_acts_pre(linear + self.b_enc)
        threshold = self.threshold.to(hidden_pre.dtype)
        acts = JumpReLU.apply(hidden_pre, threshold, self.bandwidth, self.cfg.jumprelu_ste_to_input)
        return Activations(self.hook_sae_acts_post(acts), hidden_pre)

    @torch.no_grad()
    def replace_atoms(self, indices: Tensor, atoms: LowRank, alive: Tensor) -> None:
        """Also give the new atoms the initial threshold."""
        super().replace_atoms(indices, atoms, alive)
        self.threshold.data[indices] = self.cfg.jumprelu_init_threshold
