"""Training of matrix-atom autoencoders: SAELens' step with upkeep before it and the chosen loss after it.

Upkeep is what matrices need and SAELens' trainer has no hook for: mean-centring, unit norm, resampling of dead atoms.
It runs inside `training_forward_pass`, before the step, on the parameters' data. The optimizer's moments are not
touched; those of a dead atom have decayed by then.
"""

# No postponed annotations here: SAELens' command line evaluates those of config fields in another module.
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import torch
from sae_lens.saes.sae import TrainingSAE, TrainingSAEConfig, TrainStepInput, TrainStepOutput
from torch import Tensor

from sae_lens_writesae.atom import sparse
from sae_lens_writesae.atom.low_rank import LowRank
from sae_lens_writesae.sae.base import MatrixSAE, MatrixSAEConfig, MatrixWeights, check_finite, require
from sae_lens_writesae.sae.losses import Loss, read_loss, write_loss
from sae_lens_writesae.sae.metric import DAMPING, Metric, MetricName

PAPER_RUNNER: dict[str, float | int | str] = {
    "lr": 3e-4,
    "lr_end": 3e-5,
    "lr_scheduler_name": "cosineannealing",
    "lr_warm_up_steps": 50,
    "train_batch_size_tokens": 256,
    "dead_feature_window": 100,
}
"""The paper's training settings as arguments of LanguageModelSAERunnerConfig (the paper makes 20 epochs)."""


@dataclass(kw_only=True)
class MatrixTrainingSAEConfig(MatrixSAEConfig, TrainingSAEConfig):
    """Fields that the training config of every architecture shares. The paper's values: unit norm every 100 steps,
    resampling every 250 steps, centred inputs."""

    decoder_init_norm: float | None = 1.0
    """Norm of the atoms at the start, the encoder being equal to them, so that 1 makes an activation the projection on
    its atom. SAELens' 0.1 starts 100 times too low, which a short run does not make up. None: SAELens' random init."""
    b_dec_init: Literal["mean", "zeros"] = "mean"
    """`mean`: the mean of the first batch goes into b_dec, if that is still zero. See also `preset_b_dec`."""
    unit_norm_every: int = 100
    """Period in steps of moving the norms of atoms into the encoder, which leaves the function as it is, and of
    balancing their factors. 0: never."""
    resample_every: int = 250
    """Period in steps of replacing dead atoms by residual directions. The trainer's `dead_feature_window` says which
    atoms are dead: those silent for 1000 steps by default, 100 in the paper. 0: never."""
    resample_until: int = 0
    """Last step with resampling, so that the new atoms are still trained. 0: no limit."""
    loss: Loss = "mse"
    """What is asked of the reconstruction: see `losses.Loss`. All but `mse` need this package's runner."""
    loss_weight: float = 0.5
    """Share of `loss` in (1 - weight) mse + weight * loss, in [0, 1]. Unused by `mse`."""
    metric: MetricName = "frobenius"
    """How errors of a write are measured: by the sum of their squares, or by the KL divergence of all later tokens that
    they cause in the model (see `sae.metric`; for targets `write` and the loss `mse`). The second needs this package's
    runner, which fits the metric, trains on transformed writes, and folds the metric into the weights at the end."""
    metric_sequences: int = 256
    """Sequences of the training text that the Gauss-Newton metric is fitted to, of `context_size` tokens each."""
    metric_damping: float = DAMPING
    """Share of the identity in both factors of the Gauss-Newton metric, above 0 and at most 1 (Frobenius again)."""

    def __post_init__(self) -> None:
        norm = self.decoder_init_norm
        require(norm is None or norm > 0, "decoder_init_norm", norm, "positive, or None for SAELens' random init")
        require(self.b_dec_init in ("mean", "zeros"), "b_dec_init", self.b_dec_init, "'mean' or 'zeros'")
        for field in ("unit_norm_every", "resample_every", "resample_until"):
            require(getattr(self, field) >= 0, field, getattr(self, field), "a number of steps, or 0 for never")
        require(self.loss in get_args(Loss), "loss", self.loss, f"one of {get_args(Loss)}")
        require(0 <= self.loss_weight <= 1, "loss_weight", self.loss_weight, "between 0 and 1")
        require(self.metric in get_args(MetricName), "metric", self.metric, f"one of {get_args(MetricName)}")
        require(
            self.metric == "frobenius" or self.loss == "mse",
            "loss",
            self.loss,
            "'mse' with metric='gauss_newton', which already says what an error in a write costs later reads",
        )
        require(self.metric_sequences >= 1, "metric_sequences", self.metric_sequences, "at least 1")
        require(0 < self.metric_damping <= 1, "metric_damping", self.metric_damping, "above 0 and at most 1")
        super().__post_init__()
        self.metadata.loss = self.loss  # kept in the export, whose config has no field for it


class MatrixTrainingSAE(MatrixSAE, TrainingSAE[Any]):
    """A `MatrixSAE` in training. It is the first base of the training class of every architecture."""

    cfg: MatrixTrainingSAEConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    metric: Metric | None = None
    """The metric whose transformed writes it is being trained on; None for writes as they are. Whoever transforms the
    rows sets it, and has `Metric.fold` give the autoencoder of writes afterwards."""

    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """SAELens' pair (activations, pre-activations)."""
        return self._encode(x)

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """Upkeep (see `MatrixTrainingSAEConfig`), then SAELens' own step, then the loss that the config asks for.

        Raises:
            ValueError: NaN or infinite input or weights, or the batch lacks the columns that the loss needs.
        """
        return self._with_loss(step_input, self._matrix_step)

    def _matrix_step(self, step_input: TrainStepInput) -> TrainStepOutput:
        """Upkeep and SAELens' step on the matrices alone [N,K*V]."""
        if self.cfg.metric != "frobenius" and self.metric is None:
            raise ValueError(
                f"metric={self.cfg.metric!r} needs transformed writes, and nothing here transforms them: train with "
                "sae_lens_writesae.train or WriteSAETrainingRunner, since SAELens' own runner does not. To go on with "
                "an autoencoder whose metric is folded in, set cfg.metric='frobenius'"
            )
        resampled = self._upkeep(step_input)  # pyright: ignore  (torch's decorator is untyped)
        with self._step_scope():
            output = super().training_forward_pass(step_input)
        output.metrics["resampled_atoms"] = resampled
        return output

    @contextmanager
    def _step_scope(self) -> Iterator[None]:
        """The scope of one training step: dense matrices and norms are computed once, and decode skips the gradients
        that the activation function would drop. A class with further losses opens it around them; scopes nest."""
        outer = self._step
        self._step = {} if outer is None else outer
        try:
            yield
        finally:
            self._step = outer

    @torch.compiler.disable
    @torch.no_grad()
    def _upkeep(self, step_input: TrainStepInput) -> int:
        """What is due before this step; returns how many atoms were resampled. Kept out of compiled graphs."""
        cfg, step, x = self.cfg, step_input.n_training_steps, step_input.sae_in
        check_finite(x, x)
        if step == 0:
            if cfg.b_dec_init == "mean" and not self.b_dec.any():
                self.b_dec.data.copy_(x.float().mean(0))
            return 0
        if cfg.unit_norm_every and step % cfg.unit_norm_every == 0:
            self.fold_W_dec_norm()
            self.balance_factors()
        due = cfg.resample_every and step % cfg.resample_every == 0 and step <= (cfg.resample_until or step)
        if due and step_input.dead_neuron_mask is not None:
            return self.resample(x, step_input.dead_neuron_mask)
        return 0

    @torch.no_grad()
    def resample(self, x: Tensor, dead: Tensor) -> int:
        """Replace the atoms where `dead` [F] by rank-R directions of the residual of x [N,K*V]; returns how many.

        At most one atom for each row, and fewer if rows resemble each other; the other dead atoms wait for the next
        time. A new atom has the mean norm of the living ones, in encoder and decoder, and biases of 0. Costs an encode,
        a decode and one K x V SVD for each atom.
        """
        n_dead = int(dead.sum())
        if n_dead == 0:
            return 0
        residual = (x - self.decode(self.encode(x))).float()
        atoms = distinct_directions(residual.view(-1, self.cfg.d_k, self.cfg.d_v), n_dead, self.cfg.rank)
        self.replace_atoms(torch.nonzero(dead).flatten()[: len(atoms)], atoms, ~dead)
        return len(atoms)

    def _with_loss(
        self, step_input: TrainStepInput, run: Callable[[TrainStepInput], TrainStepOutput]
    ) -> TrainStepOutput:
        """`run` the step on the matrices alone, then mix in the loss of the config.

        The reconstruction error becomes (1 - weight) mse + weight * loss, with weight = `cfg.loss_weight`; SAELens'
        other terms stay. The loss `write` is multiplied by the variance of the batch, so that the weight compares
        fractions of variance with fractions of misalignment.
        """
        cfg = self.cfg
        if cfg.loss == "mse" or self._step is not None:  # within a step the outer call has taken the columns off
            return run(step_input)
        matrices, columns = step_input.sae_in[:, : cfg.d_in], step_input.sae_in[:, cfg.d_in :]
        if columns.shape[1] == 0:
            raise ValueError(
                f"loss={cfg.loss!r} needs columns beside the {cfg.d_in} of the matrix (queries or writes), and the "
                "batch has none: train with sae_lens_writesae.train or WriteSAETrainingRunner, since SAELens' own "
                "runner gives none"
            )
        with self._step_scope():
            output = run(dataclasses.replace(step_input, sae_in=matrices))
            loss = self._loss(output, matrices, columns)
        output.losses[f"{cfg.loss}_loss"] = loss
        output.loss = output.loss + cfg.loss_weight * (loss - output.losses["mse_loss"])
        return output

    def _loss(self, output: TrainStepOutput, matrices: Tensor, columns: Tensor) -> Tensor:
        cfg = self.cfg
        if cfg.loss == "reads":
            return read_loss((output.sae_out - matrices).view(-1, cfg.d_k, cfg.d_v), columns)
        terms = columns.shape[1] // (cfg.d_k + cfg.d_v)
        keys, values = columns.split([terms * cfg.d_k, terms * cfg.d_v], dim=1)
        cosine = self.write_cosines(keys.view(-1, terms, cfg.d_k), values.view(-1, terms, cfg.d_v))
        in_units_of_contribution = getattr(cfg, "rescale_acts_by_decoder_norm", False)
        contribution = output.feature_acts if in_units_of_contribution else output.feature_acts * self.decoder_norm()
        variance = (matrices - matrices.mean(0)).square().sum(-1).mean().detach()
        return variance * write_loss(cosine, contribution)


_MAX_COSINE = 0.9
"""Two candidates for resampling that are closer than this count as one."""


def distinct_directions(residuals: Tensor, count: int, rank: int) -> LowRank:
    """Up to `count` unit-norm atoms of rank R from residual matrices [N,K,V], no two with a cosine above 0.9.

    Rows are drawn without repetition, in proportion to their squared error, cut to rank R by SVD, and near-copies are
    left out. (The paper's code draws rows of the raw state with repetition; a batch with one dominant direction then
    gives many copies of it.)
    """
    weights = residuals.flatten(1).square().sum(1)
    count = min(count, int((weights > 0).sum()))
    if count == 0:
        return LowRank.svd(residuals[:0], rank, balanced=True)
    rows = torch.multinomial(weights / weights.max(), count, replacement=False)
    atoms = LowRank.svd(residuals[rows], rank, balanced=True)
    scale = sparse.atom_norm(atoms.keys, atoms.values).rsqrt()[:, None, None]
    atoms = LowRank(atoms.keys * scale, atoms.values * scale)
    dense = atoms.dense().flatten(1)
    repeated = (dense @ dense.T).tril(-1).amax(1) > _MAX_COSINE
    return atoms.rows(~repeated)


@torch.no_grad()
def preset_b_dec(sae: MatrixWeights, batches: Iterable[Tensor], n_batches: int = 16) -> Tensor:
    """Mean-centring: put the mean of the first batches into b_dec [K*V], which the encoder subtracts, and return it.

    The batches must be scaled as the SAE will see them: with normalize_activations='expected_average_only_in' leave
    this to `b_dec_init='mean'`, which sees scaled activations.

    Raises:
        ValueError: no batch, or the data is not finite.
    """
    total, count = torch.zeros(sae.cfg.d_in, dtype=torch.float64), 0
    for _, batch in zip(range(n_batches), batches):
        rows = batch.reshape(-1, sae.cfg.d_in)
        check_finite(rows, rows)
        total += rows.sum(0, dtype=torch.float64).cpu()
        count += len(rows)
    require(count > 0, "batches", count, "at least one batch of activations [N, d_in]")
    sae.b_dec.data.copy_(total / count)
    return sae.b_dec.data.clone()


def aux_loss(
    sae: MatrixWeights, k_aux: int, residual: Tensor, hidden_pre: Tensor, dead: Tensor, atoms: slice = slice(None)
) -> Tensor:
    """The auxiliary loss of TopK: the `k_aux` most active dead atoms reconstruct the residual, without bias.

    Sum of squares over d_in, mean over rows, scaled down when there are fewer dead atoms than k_aux (Gao et al. 2024,
    arXiv 2406.04093, A.2). The coefficient is left to the caller. SAELens uses k_aux = d_in // 2, which at
    d_in = 16384 means every dead atom; the paper's code decodes with a bias the residual does not have.

    Args:
        k_aux: 0: the paper's 256, or d_sae if that is less.
        residual: [N,K*V], detached.
        hidden_pre: [N,F'] and dead [F'], for the range `atoms`.
    """
    n_dead = int(dead.sum())
    if n_dead == 0:
        return residual.new_tensor(0.0)
    wanted = k_aux or min(256, sae.cfg.d_sae)
    top = torch.where(dead, hidden_pre, -torch.inf).topk(min(wanted, n_dead), sorted=False)
    acts = torch.zeros_like(hidden_pre).scatter(-1, top.indices, top.values)
    error = sae.decode_linear(acts, atoms) - residual
    return min(n_dead / wanted, 1.0) * error.pow(2).sum(-1).mean()


class HasThreshold(Protocol):
    """A BatchTopK or Matryoshka SAE in training, or a JumpReLU SAE."""

    @property
    def cfg(self) -> MatrixSAEConfig: ...

    def contributions(self, x: Tensor) -> Tensor: ...

    def set_threshold(self, value: float) -> None: ...


@torch.no_grad()
def calibrate_threshold(
    sae: HasThreshold, batches: Iterable[Tensor], l0: float | None = None, n_batches: int = 16
) -> float:
    """Set the threshold so that exactly `l0` atoms are active on average over these batches, and return it.

    It takes a BatchTopK or Matryoshka SAE in training (before export; `l0` defaults to its k) or a `writesae_jumprelu`
    SAE, exported or not, in which all atoms get the same threshold in units of their contribution (activation times
    atom norm). Holds N*F pre-activations at once.

    Raises:
        ValueError: no data, an l0 out of range, or a class without a threshold.
    """
    l0 = float(getattr(sae.cfg, "k", 0) if l0 is None else l0)
    require(0 < l0 < sae.cfg.d_sae, "l0", l0, f"above 0 and below d_sae={sae.cfg.d_sae}")
    require(hasattr(sae, "set_threshold"), "sae", type(sae).__name__, "a BatchTopK, Matryoshka or JumpReLU SAE")
    contributions = [sae.contributions(b.reshape(-1, sae.cfg.d_in)) for _, b in zip(range(n_batches), batches)]
    require(bool(contributions), "batches", 0, "at least one batch of activations [N, d_in]")
    flat = torch.cat(contributions).float().flatten()
    wanted = round(l0 * len(flat) / sae.cfg.d_sae)
    require(0 < wanted < len(flat), "l0", l0, f"large enough for {len(flat) // sae.cfg.d_sae} rows")
    top = flat.topk(wanted + 1).values  # sorted: the threshold goes between the last one in and the first one out
    threshold = max(float(top[-2:].mean()), 0.0)
    sae.set_threshold(threshold)
    return threshold
