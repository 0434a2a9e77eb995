"""The front of every architecture: encode, decode and the training step, written once over factored maps.

SAELens' classes say `sae_in @ self.W_enc`, which would build the whole dictionary at each call. These mixins come first
among the bases and route the same computation through `encode_linear` and `decode_linear`; an architecture only
says, in `_activate`, what happens to the pre-activations. Everything else (losses, thresholds, hooks) stays SAELens'.
"""

from typing import Any, NamedTuple

from sae_lens.saes.sae import TrainingSAE, TrainStepInput, TrainStepOutput
from torch import Tensor, nn

from sae_lens_writesae.sae.base import MatrixAtoms
from sae_lens_writesae.sae.checks import check_finite
from sae_lens_writesae.sae.losses import step_with_loss
from sae_lens_writesae.sae.training import before_step


class Activations(NamedTuple):
    """What an encoder returns."""

    acts: Tensor
    """[...,F]"""
    hidden_pre: Tensor
    """[...,F] before the activation function, as SAELens' losses expect it."""


class Coding(MatrixAtoms):
    """Encode and decode for all architectures; list it before the SAELens class and `MatrixAtoms` after it."""

    b_enc: nn.Parameter
    """[F]; not in the gated architecture."""

    def _activate(self, linear: Tensor) -> Activations:
        """Biases, hooks and activation function on <X, encoder atom> [...,F]."""
        raise NotImplementedError

    def encode(self, x: Tensor) -> Tensor:
        """Feature activations [...,F] of flattened matrices [...,K*V]. Costs one GEMM.

        Raises:
            ValueError: NaN or infinite input.
        """
        return self._encode(x).acts

    def _encode(self, x: Tensor) -> Activations:
        linear = self.encode_linear(self.process_sae_in(x))
        check_finite(linear, x)
        return self._activate(linear)

    def encode_writes(self, keys: Tensor, values: Tensor) -> Tensor:
        """Feature activations [...,F] of rank-1 matrices keys values^T, [...,K] and [...,V].

        Equals `encode` of the flattened outer products, at R*(K+V) instead of K*V operations per atom and row and
        without building them. `hook_sae_input` does not fire.
        """
        linear = self.encode_linear_write(keys.to(self.dtype), values.to(self.dtype))
        if self.cfg.apply_b_dec_to_input:
            linear = linear - self.encode_linear(self.b_dec)
        check_finite(linear, keys, values)
        return self._activate(linear).acts

    def decode(self, feature_acts: Tensor) -> Tensor:
        """Reconstructions [...,K*V] of activations [...,F]. Costs 2*R*K*V per active atom."""
        recons = self.hook_sae_recons(self.decode_linear(feature_acts) + self.b_dec)
        return self.reshape_fn_out(self.run_time_activation_norm_fn_out(recons), self.d_head)

    def fold_activation_whitening(self, mean: Tensor, whitening_matrix: Tensor, unwhitening_matrix: Tensor) -> None:
        """Refused before an architecture has changed anything."""
        MatrixAtoms.fold_activation_whitening(self, mean, whitening_matrix, unwhitening_matrix)


class _Step:
    """The scope of one training step: views and norms are computed once, and decode may skip the gradients that
    the activation function would drop."""

    def __init__(self, sae: MatrixAtoms) -> None:
        self.sae = sae

    def __enter__(self) -> None:
        self.outer, self.sae._step = self.sae._step, {} if self.sae._step is None else self.sae._step

    def __exit__(self, *exc: object) -> None:
        self.sae._step = self.outer


class TrainingCoding(Coding, TrainingSAE[Any]):
    """The same for training classes, with the upkeep of `MatrixTrainingConfig` before each step.

    A class that adds losses after `super().training_forward_pass` opens the scope itself: scopes nest.
    """

    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """SAELens' pair (activations, pre-activations)."""
        return self._encode(x)

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """Upkeep (mean centring, unit norm, resampling: see `MatrixTrainingConfig`), then SAELens' own step, with the
        loss that the config asks for.

        Raises:
            ValueError: NaN or infinite input or weights, or a loss whose columns the batch lacks.
        """
        return step_with_loss(self, step_input, self._matrix_step)

    def _matrix_step(self, step_input: TrainStepInput) -> TrainStepOutput:
        """Upkeep and SAELens' step on matrices alone [N,K*V]."""
        resampled = before_step(self, step_input)  # pyright: ignore[reportCallIssue]  (torch's decorator)
        with self.step_scope():
            output: TrainStepOutput = super().training_forward_pass(step_input)
        output.metrics["resampled_atoms"] = resampled
        return output

    def step_scope(self) -> _Step:
        """The scope in which views are shared and blocked gradients are skipped."""
        return _Step(self)
