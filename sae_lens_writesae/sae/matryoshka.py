"""`writesae_matryoshka`: BatchTopK with nested dictionaries (Bussmann et al. 2025, arXiv 2503.17547)."""

from collections.abc import Generator
from dataclasses import dataclass
from typing import cast

from sae_lens.saes.matryoshka_batchtopk_sae import (
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
)
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from torch import Tensor

from sae_lens_writesae.sae.batchtopk import WriteBatchTopKTrainingSAE, WriteBatchTopKTrainingSAEConfig
from sae_lens_writesae.sae.training import Code, aux_loss


@dataclass
class WriteMatryoshkaTrainingSAEConfig(WriteBatchTopKTrainingSAEConfig, MatryoshkaBatchTopKTrainingSAEConfig):
    """Training config of `writesae_matryoshka`; `matryoshka_widths` is required."""

    @classmethod
    def architecture(cls) -> str:
        return "writesae_matryoshka"


class WriteMatryoshkaTrainingSAE(MatryoshkaBatchTopKTrainingSAE, WriteBatchTopKTrainingSAE):
    """Nested BatchTopK over matrix atoms, in training. Exported as `writesae_jumprelu`."""

    cfg: WriteMatryoshkaTrainingSAEConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """SAELens' step with the reconstructions of the inner widths, always scored by squared error."""
        return self._with_loss(step_input, self._nested_step)

    def _nested_step(self, step_input: TrainStepInput) -> TrainStepOutput:
        with self._step_scope():
            return super().training_forward_pass(step_input)

    def _iterable_decode(
        self, feature_acts: Tensor, include_outer_loss: bool = False
    ) -> Generator[tuple[int, Tensor], None, None]:
        """(width, reconstruction [N,K*V] from the first `width` atoms) for growing widths."""
        widths = self.cfg.matryoshka_widths if include_outer_loss else self.cfg.matryoshka_widths[:-1]
        if self._on_factors:
            for width in widths:
                yield width, cast(Tensor, Code(feature_acts[:, :width], slice(0, width)))
            return
        decoded: Tensor = self.b_dec
        for start, width in zip([0, *widths], widths):
            level = slice(start, width)
            decoded = self.decode_linear(feature_acts[:, level], level) + decoded
            yield width, self.run_time_activation_norm_fn_out(decoded)

    def calculate_matryoshka_aux_loss(
        self,
        sae_in: Tensor,
        sae_out: Tensor,
        feature_acts: Tensor,
        hidden_pre: Tensor,
        dead_neuron_mask: Tensor | None,
    ) -> Tensor:
        """The sum over widths of the auxiliary loss, each against the residual of its width."""
        total = hidden_pre.new_tensor(0.0)
        if dead_neuron_mask is None:
            return total
        start = 0
        for width, decoded in self._iterable_decode(feature_acts, include_outer_loss=True):
            level, start = slice(start, width), width
            dead = dead_neuron_mask[level]
            total = total + aux_loss(self, self.cfg.k_aux, sae_in, decoded, hidden_pre[:, level], dead, level)
        return self.cfg.aux_loss_coefficient * total
