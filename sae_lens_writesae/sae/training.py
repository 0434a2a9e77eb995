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
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, cast, get_args

import torch
from sae_lens.saes.sae import SAE, TrainingSAE, TrainingSAEConfig, TrainStepInput, TrainStepOutput, mse_loss
from torch import Tensor, nn

from sae_lens_writesae.atom import sparse
from sae_lens_writesae.atom.low_rank import LowRank
from sae_lens_writesae.choices import MetricName
from sae_lens_writesae.sae.base import (
    MatrixSAE,
    MatrixSAEConfig,
    MatrixWeights,
    check_finite,
    require,
    with_checksums,
)
from sae_lens_writesae.sae.losses import Loss, read_loss, write_loss
from sae_lens_writesae.sae.metric import DAMPING, Metric

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
    decoder_init: Literal["random", "native"] = "random"
    """Directions of the atoms at the start: `random`, or `native`: rows of the first batches, cut to rank R, without
    near-copies. Atoms for which the first batches hold no further direction stay random."""
    b_dec_init: Literal["mean", "zeros"] = "mean"
    """`mean`: the mean of the first batch goes into b_dec, if that is still zero. See also `preset_b_dec`."""
    b_dec_rows: int = 32_768
    """Rows over which running means of inputs and activations reach (fewer early in a run). Outside of training steps
    and in what is saved for inference they decide what is added to reconstructions, so that these are right on average:
    see `MatrixTrainingSAE.output_bias`. 0: b_dec as the optimizer leaves it."""
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
    inputs: Literal["matrices", "factors"] = "matrices"
    """What this package's runner trains on: flattened writes or states, or (writes only) their factors, for the same
    steps at a fraction of the time and memory. `train_on_writes` takes factors whatever this says."""
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
        require(self.decoder_init in ("random", "native"), "decoder_init", self.decoder_init, "'random' or 'native'")
        require(self.b_dec_init in ("mean", "zeros"), "b_dec_init", self.b_dec_init, "'mean' or 'zeros'")
        for field in ("unit_norm_every", "resample_every", "resample_until", "b_dec_rows"):
            require(getattr(self, field) >= 0, field, getattr(self, field), "a number, or 0 for never")
        require(self.loss in get_args(Loss), "loss", self.loss, f"one of {get_args(Loss)}")
        require(0 <= self.loss_weight <= 1, "loss_weight", self.loss_weight, "between 0 and 1")
        require(self.inputs in ("matrices", "factors"), "inputs", self.inputs, "'matrices' or 'factors'")
        require(
            self.inputs == "matrices" or self.loss != "reads",
            "inputs",
            self.inputs,
            "'matrices' with loss='reads', which compares with queries",
        )
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


class Code(NamedTuple):
    """Reconstructions of a batch that are not built: b_dec and the atoms of a range at their activations.

    What `decode` returns within a step on factors.
    """

    acts: Tensor
    """[N,F']"""
    atoms: slice = slice(None)


class MatrixTrainingSAE(MatrixSAE, TrainingSAE[Any]):
    """A `MatrixSAE` in training. It is the first base of the training class of every architecture.

    A batch holds flattened matrices [N,K*V], or the packed factors of low-rank matrices [N,R*(K+V)] (see `pack`); the
    width says which. On factors the same losses and gradients come from inner products (`atom.sparse`): SAELens'
    step then carries a `LowRank` as `sae_in` and a `Code` as `sae_out`, and no K x V matrix of a row is built.
    """

    cfg: MatrixTrainingSAEConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    mean_input: Tensor
    """[K*V], a running mean over batches; see `update_means`."""
    mean_contribution: Tensor
    """[F], the running mean of activations times the norms of their atoms."""
    mean_batches: Tensor
    """[F], batches since an atom was put where it began; 0 everywhere: there are no means."""
    start_keys: Tensor
    """[F,R,K], with `start_values` [F,R,V] the atoms as they were when their training began."""
    start_values: Tensor
    n_started: int | None = None
    """Atoms that were put on rows of the first batches, which a checkpoint has too; None where there were none."""
    _on_factors = False
    """Whether a step on factors is under way."""

    metric: Metric | None = None
    """The metric whose transformed writes it is being trained on; None for writes as they are. Whoever transforms the
    rows sets it, and has `Metric.fold` give the autoencoder of writes afterwards."""

    def __init__(self, cfg: MatrixTrainingSAEConfig, use_error_term: bool = False) -> None:
        super().__init__(cfg, use_error_term)
        self.mse_loss_fn = self.squared_errors

    def encode_with_hidden_pre(self, x: Tensor | LowRank) -> tuple[Tensor, Tensor]:
        """SAELens' pair (activations, pre-activations)."""
        return self._encode(x)

    def decode(self, feature_acts: Tensor) -> Any:
        """Reconstructions [...,K*V] of activations [...,F]; within a step on factors a `Code`."""
        return Code(feature_acts) if self._on_factors else super().decode(feature_acts)

    def squared_errors(self, reconstruction: Tensor | Code, target: Tensor | LowRank) -> Tensor:
        """What SAELens sums over the last axis for |X - Y|^2: [N,K*V], or from factors [N,1], with the constant
        bias B of the reconstruction

            |X - B - sum_f c_f A_f|^2 = |X|^2 - 2 <X, B> + |B|^2 + `row_distances`
        """
        if not isinstance(reconstruction, Code) or not isinstance(target, LowRank):
            return mse_loss(cast(Tensor, reconstruction), cast(Tensor, target))
        with torch.autocast(target.keys.device.type, enabled=False):
            v, w = self._decoder_range(reconstruction.atoms)
            rows, bias = target.to(exact_dtype(v)), self._bias_matrix()
            code = reconstruction.acts.to(bias.dtype)
            distance = sparse.row_distances(rows.keys, rows.values, bias, code, v, w, full_gradient=self._full_gradient)
            errors = rows.inner(rows) - 2 * rows.products(bias) + bias.square().sum() + distance
            return errors[:, None]

    def _decoder_range(self, atoms: slice) -> tuple[Tensor, Tensor]:
        """Factors of what an activation of 1 adds, for a range of atoms, in at least fp32."""
        v, w, scale = self.v.to(exact_dtype(self.v)), self.w.to(exact_dtype(self.w)), self.coefficient_scale()
        v = v if scale is None else v * scale[:, None, None]
        return (v, w) if atoms == slice(None) else (v[atoms], w[atoms])

    def _bias_matrix(self) -> Tensor:
        """b_dec [K,V] in at least fp32."""
        return self.b_dec.to(exact_dtype(self.b_dec)).view(self.cfg.d_k, self.cfg.d_v)

    # ---------------------------------------------------------------------------------------- the step

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """Upkeep (see `MatrixTrainingSAEConfig`), then SAELens' own step, then the loss that the config asks for.

        Raises:
            ValueError: NaN or infinite input or weights, or the batch lacks the columns that the loss needs.
        """
        return self._with_loss(step_input, self._matrix_step)

    def _matrix_step(self, step_input: TrainStepInput) -> TrainStepOutput:
        """Upkeep and SAELens' step on the matrices alone."""
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
        cfg, step, x = self.cfg, step_input.n_training_steps, cast(Tensor | LowRank, step_input.sae_in)
        check_rows(x)
        self.mean_batches.mul_(step > 0)  # a new run has new means
        if cfg.decoder_init == "native" and step < START_STEPS:
            self.start_from_rows(x, first=step == 0)
        if step == 0:
            if cfg.b_dec_init == "mean" and not self.b_dec.any():
                self.b_dec.data.copy_(batch_mean(x))
            return 0
        if cfg.unit_norm_every and step % cfg.unit_norm_every == 0:
            self.fold_W_dec_norm()
            self.balance_factors()
        due = cfg.resample_every and step % cfg.resample_every == 0 and step <= (cfg.resample_until or step)
        if due and step_input.dead_neuron_mask is not None:
            return self.resample(x, step_input.dead_neuron_mask)
        return 0

    @torch.no_grad()
    def start_from_rows(self, x: Tensor | LowRank, *, first: bool = True) -> int:
        """Put atoms that still wait for it on directions of rows of a batch, in decoder and encoder; returns how many
        have such a start by now.

        Rows are drawn in proportion to their squared norm, and none is taken that is near to an atom which a row
        started. What one batch leaves open waits for the next one. Costs one K x V SVD for each row that is drawn.

        Args:
            x: flattened matrices [N,K*V], or N low-rank matrices, of which only the drawn ones are built.
            first: begin with atom 0; otherwise go on where the last call ended.
        """
        F, R = self.cfg.d_sae, self.cfg.rank
        done = 0 if first else self.n_started
        if done is None or done == F:
            return F
        sizes = x.inner(x) if isinstance(x, LowRank) else x.float().square().sum(1)
        rows = draw_rows(sizes, F - done)
        matrices = x.rows(rows).dense() if isinstance(x, LowRank) else x[rows].view(-1, self.cfg.d_k, self.cfg.d_v)
        atoms = distinct_directions(matrices.float(), R)
        if done and len(atoms):
            before = LowRank(self.start_keys[:done], self.start_values[:done]).to(torch.float32)
            atoms = atoms.rows(atoms.cosines(before).amax(1) <= _MAX_COSINE)
        index = torch.arange(done, done + len(atoms), device=self.device)
        self.replace_atoms(index, atoms, torch.ones(F, dtype=torch.bool, device=self.device))
        self.n_started = done + len(atoms)
        return self.n_started

    @torch.no_grad()
    def resample(self, x: Tensor | LowRank, dead: Tensor) -> int:
        """Replace the atoms where `dead` [F] by rank-R directions of the residual of a batch; returns how many.

        At most one atom for each row, and fewer if rows resemble each other; the other dead atoms wait for the next
        time. A new atom has the mean norm of the living ones, in encoder and decoder, and biases of 0. Costs an encode,
        a decode and one K x V SVD for each atom.

        Args:
            x: flattened matrices [N,K*V], or N low-rank matrices, of which only the drawn ones are built.
        """
        n_dead, K, V = int(dead.sum()), self.cfg.d_k, self.cfg.d_v
        if n_dead == 0:
            return 0
        acts = self._encode(x).acts
        if isinstance(x, LowRank):
            rows = draw_rows(self.squared_errors(Code(acts), x)[:, 0].clamp_min(0), n_dead)
            matrices = x.rows(rows).dense().flatten(1)
        else:
            weights = (x - self.decode_linear(acts) - self.b_dec).float().square().sum(1)
            rows = draw_rows(weights, n_dead)
            matrices = x[rows]
        residual = (matrices - self.decode_linear(acts[rows]) - self.b_dec).float()
        atoms = distinct_directions(residual.view(-1, K, V), self.cfg.rank)
        self.replace_atoms(torch.nonzero(dead).flatten()[: len(atoms)], atoms, ~dead)
        return len(atoms)

    # ---------------------------------------------------------------------------------------- the mean

    @torch.compiler.disable
    @torch.no_grad()
    def update_means(self, x: Tensor | LowRank, feature_acts: Tensor) -> None:
        """Take a batch into the running means.

        The weight of the t-th batch is proportional to t among inputs, and to t^5 among contributions, because the
        weights of the autoencoder were others then. Beyond `b_dec_rows` both decay exponentially.

        Args:
            feature_acts: [N,F], or their sum [1,F].
        """
        acts = feature_acts.sum(0, dtype=exact_dtype(feature_acts)).to_dense() / len(x)
        for mean, new, n, power in (
            (self.mean_input, batch_mean(x), self.mean_batches.max(), 2),
            (self.mean_contribution, acts * self.coefficients(self.get_W_dec_norm()), self.mean_batches, 6),
        ):
            weight = (power / (n + power)).clamp_min(len(x) / max(len(x), self.cfg.b_dec_rows))
            mean.lerp_(new.to(mean), weight.to(mean))
        self.mean_batches.add_(1)

    def output_bias(self) -> Tensor:
        """What `decode` adds to the atoms [K*V]. In training steps it is b_dec; outside of them the mean input less the
        mean contributions of the atoms as they are now, where there are means. Costs a decode.

        An error that all writes of a head share adds up in its state for as long as the head remembers, while squared
        errors hardly see it. The optimizer leaves one in b_dec, whose entries move by the learning rate at each step.
        (Set within the steps, b_dec would hide the mean of dense codes from their losses, and they diverge.)
        """
        if self._step is not None or not self.cfg.b_dec_rows or not self.mean_batches.any():
            return self.b_dec
        units = self.coefficients(self.get_W_dec_norm())
        return (self.mean_input - self.decode_linear((self.mean_contribution / units).to(units))).to(self.b_dec)

    def settle_b_dec(self) -> None:
        """Make b_dec what `output_bias` is, and forget the means. Nothing else changes."""
        move_b_dec(self, self.output_bias() - self.b_dec)
        self.mean_batches.zero_()

    # ---------------------------------------------------------------------------------------- movement

    def _keep_start(self, keys: Tensor, values: Tensor) -> None:
        self.register_buffer("start_keys", keys.clone())
        self.register_buffer("start_values", values.clone())
        self.register_buffer("mean_input", torch.zeros_like(self.b_dec, dtype=exact_dtype(self.b_dec)))
        self.register_buffer("mean_contribution", self.mean_input.new_zeros(self.cfg.d_sae))
        self.register_buffer("mean_batches", torch.zeros_like(self.mean_contribution, dtype=torch.long))

    @torch.no_grad()
    def replace_atoms(self, indices: Tensor, atoms: LowRank, alive: Tensor) -> None:
        """A replaced atom starts anew."""
        super().replace_atoms(indices, atoms, alive)
        self.mean_batches[indices] = self.mean_contribution[indices] = 0
        self.start_keys[indices] = atoms.keys.to(self.start_keys)
        self.start_values[indices] = atoms.values.to(self.start_values)

    @torch.no_grad()
    def start_cosine(self) -> float:
        """Median over atoms of the cosine of an atom with its own start: 1 where nothing was learned. An atom that was
        resampled started where it was put. Costs F R^2 (K + V)."""
        start = LowRank(self.start_keys, self.start_values).to(torch.float32)
        if self.cfg.decoder == "flat":
            matrices = self.decoder_matrix.view(-1, self.cfg.d_k, self.cfg.d_v).float()
            inner = torch.einsum("fkv,frk,frv->f", matrices, start.keys, start.values)
            cosines = inner / (matrices.flatten(1).norm(dim=1) * start.norm()).clamp_min(torch.finfo(inner.dtype).tiny)
        else:
            cosines = LowRank(self.v, self.w).to(torch.float32).cosine(start)
        return float(cosines.quantile(0.5))

    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Tensor]) -> None:
        """Keep how far the atoms moved in the metadata, settle b_dec, and leave out what only training needs."""
        self.process_state_dict_for_saving(state_dict)
        self.cfg.metadata.start_cosine = self.start_cosine()
        self.settle_b_dec()  # in place, which the tensors of state_dict see
        del (
            state_dict["start_keys"],
            state_dict["start_values"],
            state_dict["mean_input"],
            state_dict["mean_contribution"],
            state_dict["mean_batches"],
        )

    def save_inference_model(self, path: str | Path) -> tuple[Path, Path]:
        """Save what inference needs as SAELens does, with checksums."""
        return with_checksums(super().save_inference_model, path)

    def to_saelens(self) -> SAE[Any]:
        """As `MatrixSAE.to_saelens`, of what `save_inference_model` would save: BatchTopK and Matryoshka become
        JumpReLU."""
        state = self.state_dict()
        self.process_state_dict_for_saving_inference(state)
        sae = SAE.from_dict(self.cfg.get_inference_sae_cfg_dict())
        sae.load_state_dict(state)
        return cast(MatrixSAE, sae).to_saelens()

    def _with_loss(
        self, step_input: TrainStepInput, run: Callable[[TrainStepInput], TrainStepOutput]
    ) -> TrainStepOutput:
        """`run` the step on the matrices alone, then mix in the loss of the config.

        The reconstruction error becomes (1 - weight) mse + weight * loss, with weight = `cfg.loss_weight`; SAELens'
        other terms stay. The loss `write` is multiplied by the variance of the batch, so that the weight compares
        fractions of variance with fractions of misalignment.
        """
        cfg = self.cfg
        if self._step is not None:  # within a step the outer call has taken the columns off
            return run(step_input)
        matrices, columns = self.split_batch(step_input.sae_in)
        self._on_factors = isinstance(matrices, LowRank)
        try:
            with self._step_scope():
                output = run(dataclasses.replace(step_input, sae_in=cast(Tensor, matrices)))
                if cfg.loss != "mse":
                    loss = self._loss(output, matrices, columns)
                    output.losses[f"{cfg.loss}_loss"] = loss
                    output.loss = output.loss + cfg.loss_weight * (loss - output.losses["mse_loss"])
                self.update_means(matrices, output.feature_acts)  # pyright: ignore  (decorator)
                if step_input.is_logging_step:
                    output.metrics |= self.write_metrics(matrices, output.feature_acts)  # pyright: ignore  (decorator)
        finally:
            self._on_factors = False
        return output

    @torch.compiler.disable
    @torch.no_grad()
    def write_metrics(self, x: Tensor | LowRank, feature_acts: Tensor) -> dict[str, float]:
        """What is logged at Weights & Biases beside SAELens' metrics, over the first `_LOGGED_ROWS` of a batch.

        `cosine`: mean cosine of a write with its reconstruction. `top_atom_energy`: mean share of a write's squared
        norm along its dominant atom; 0 where no atom is active. Of transformed writes, where a metric is trained in.
        Costs a decode of those rows, as matrices.

        Args:
            x: flattened matrices [N,K*V], or N low-rank matrices.
            feature_acts: [N,F], dense or sparse.
        """
        few, acts = slice(_LOGGED_ROWS), feature_acts.to_dense()[:_LOGGED_ROWS].to(self.dtype)
        rows = x.rows(few).dense().flatten(1) if isinstance(x, LowRank) else x[few]
        sizes, top = (self.coefficients(acts) * self.decoder_norm()).max(1)
        atoms = self.decode_linear(nn.functional.one_hot(top, self.cfg.d_sae).to(acts))
        energy = nn.functional.cosine_similarity(atoms, rows).square() * (sizes > 0)
        cosine = nn.functional.cosine_similarity(self.decode_linear(acts) + self.b_dec, rows)
        return {"cosine": cosine.mean().item(), "top_atom_energy": energy.mean().item()}

    def split_batch(self, batch: Tensor) -> tuple[Tensor | LowRank, Tensor]:
        """The matrices of a batch, and the columns that the loss compares with.

        This is the one place that says which variants train on factors: those that have factors on both sides. The
        others get the matrices of a packed batch built.
        """
        cfg, width = self.cfg, batch.shape[1]
        if width >= cfg.d_in:
            matrices, columns = batch[:, : cfg.d_in], batch[:, cfg.d_in :]
        else:
            rows = unpack(batch, cfg.d_k, cfg.d_v)
            matrices = rows if cfg.is_factored else rows.dense().flatten(1)
            columns = batch if cfg.loss == "write" else batch[:, :0]
        if cfg.loss != "mse" and columns.shape[1] == 0:
            raise ValueError(
                f"loss={cfg.loss!r} needs columns beside the {cfg.d_in} of the matrix (queries or writes), and the "
                "batch has none: train with sae_lens_writesae.train or WriteSAETrainingRunner, since SAELens' own "
                "runner gives none"
            )
        return matrices, columns

    def _loss(self, output: TrainStepOutput, matrices: Tensor | LowRank, columns: Tensor) -> Tensor:
        cfg = self.cfg
        if cfg.loss == "reads":
            assert isinstance(matrices, Tensor)
            return read_loss((output.sae_out - matrices).view(-1, cfg.d_k, cfg.d_v), columns)
        writes = unpack(columns, cfg.d_k, cfg.d_v)
        cosine = self.write_cosines(writes.keys, writes.values)
        in_units_of_contribution = getattr(cfg, "rescale_acts_by_decoder_norm", False)
        contribution = output.feature_acts if in_units_of_contribution else output.feature_acts * self.decoder_norm()
        return batch_variance(matrices).mean().detach() * write_loss(cosine, contribution)


def pack(writes: LowRank) -> Tensor:
    """N low-rank matrices as the rows of a batch [N,R*(K+V)]: their keys, then their values."""
    return torch.cat([writes.keys.flatten(1), writes.values.flatten(1)], dim=1)


def unpack(rows: Tensor, d_k: int, d_v: int) -> LowRank:
    """The low-rank matrices of packed rows [N,R*(K+V)].

    Raises:
        ValueError: the width is no multiple of K + V.
    """
    terms, rest = divmod(rows.shape[1], d_k + d_v)
    if rest or not terms:
        raise ValueError(
            f"rows of width {rows.shape[1]} are neither matrices of d_in = {d_k} * {d_v} = {d_k * d_v} entries, nor "
            f"packed factors, whose width is a multiple of d_k + d_v = {d_k + d_v}"
        )
    keys, values = rows.split([terms * d_k, terms * d_v], dim=1)
    return LowRank(keys.reshape(-1, terms, d_k), values.reshape(-1, terms, d_v))


def check_rows(x: Tensor | LowRank) -> None:
    """Raise ValueError if a batch holds NaN or infinity; see `check_finite`."""
    for part in (x.keys.flatten(1), x.values.flatten(1)) if isinstance(x, LowRank) else (x,):
        check_finite(part, part)


def batch_mean(x: Tensor | LowRank) -> Tensor:
    """The mean matrix of a batch [K*V], in at least fp32."""
    if isinstance(x, LowRank):
        rows = x.to(exact_dtype(x.keys))
        return (rows.keys.flatten(0, 1).T @ rows.values.flatten(0, 1) / len(x)).flatten()
    return x.to(exact_dtype(x)).mean(0)


def batch_variance(x: Tensor | LowRank) -> Tensor:
    """|X_n - mean|^2 [N] of a batch, from the factors where there are some."""
    if isinstance(x, LowRank):
        rows, mean = x.to(exact_dtype(x.keys)), batch_mean(x).view(x.keys.shape[-1], x.values.shape[-1])
        return rows.inner(rows) - 2 * rows.products(mean) + mean.square().sum()
    return (x - x.mean(0)).square().sum(-1)


def exact_dtype(t: Tensor) -> torch.dtype:
    """The dtype of `t`, or fp32 if that has less precision."""
    return torch.promote_types(t.dtype, torch.float32)


_LOGGED_ROWS = 64
"""Rows of a batch that `write_metrics` looks at."""
START_STEPS = 16
"""Steps in which atoms are still put on rows of their batches, where one batch has too few distinct ones."""
_MAX_COSINE = 0.9
"""Two candidates for resampling that are closer than this count as one."""


def draw_rows(errors: Tensor, count: int) -> Tensor:
    """Up to `count` row numbers, drawn without repetition in proportion to the rows' squared errors [N]."""
    count = min(count, int((errors > 0).sum()))
    if count == 0:
        return errors.new_zeros(0, dtype=torch.long)
    return torch.multinomial(errors / errors.max(), count, replacement=False)


def distinct_directions(residuals: Tensor, rank: int) -> LowRank:
    """Unit-norm atoms of rank R from drawn residual matrices [n,K,V], no two with a cosine above 0.9.

    The matrices are cut to rank R by SVD, and near-copies are left out. (The paper's code draws rows of the raw state
    with repetition; a batch with one dominant direction then gives many copies of it.)
    """
    atoms = LowRank.svd(residuals, rank, balanced=True)
    if len(atoms) == 0:
        return atoms
    scale = sparse.atom_norm(atoms.keys, atoms.values).rsqrt()[:, None, None]
    atoms = LowRank(atoms.keys * scale, atoms.values * scale)
    dense = atoms.dense().flatten(1)
    repeated = (dense @ dense.T).tril(-1).amax(1) > _MAX_COSINE
    return atoms.rows(~repeated)


@torch.no_grad()
def preset_b_dec(sae: MatrixWeights, batches: Iterable[Tensor | LowRank], n_batches: int = 16) -> Tensor:
    """Mean-centring: put the mean of the first batches into b_dec [K*V], which the encoder subtracts, and return it.

    The batches are flattened matrices [...,K*V] or low-rank matrices. They must be scaled as the SAE will see them:
    with normalize_activations='expected_average_only_in' leave this to `b_dec_init='mean'`, which sees scaled ones.

    Raises:
        ValueError: no batch, or the data is not finite.
    """
    total, count = torch.zeros(sae.cfg.d_in, dtype=torch.float64), 0
    for _, batch in zip(range(n_batches), batches):
        rows = batch if isinstance(batch, LowRank) else batch.reshape(-1, sae.cfg.d_in)
        check_rows(rows)
        mean = batch_mean(rows.to(torch.float64))
        total += mean.cpu() * len(rows)
        count += len(rows)
    require(count > 0, "batches", count, "at least one batch of activations [N, d_in]")
    sae.b_dec.data.copy_(total / count)
    return sae.b_dec.data.clone()


@torch.no_grad()
def move_b_dec(sae: MatrixSAE, error: Tensor) -> None:
    """Add `error` [K*V] to b_dec. Codes stay as they are: the encoder's biases take back what it now subtracts."""
    sae.b_dec.data.add_(error)
    if sae.cfg.apply_b_dec_to_input:
        shift = sae.encode_linear(error)
        for name in ("b_enc", "b_gate", "b_mag"):
            bias = getattr(sae, name, None)
            if isinstance(bias, nn.Parameter):
                bias.data.add_(shift * cast(Tensor, sae.r_mag).exp() if name == "b_mag" else shift)


@torch.no_grad()
def calibrate_b_dec(sae: MatrixSAE, batches: Iterable[Tensor | LowRank], n_batches: int = 16) -> Tensor:
    """Move b_dec [K*V] by the mean residual, so that reconstructions are right on average, and return it. Codes stay as
    they are: the encoder's biases take back what it now subtracts.

    Training does so from its own rows (`MatrixTrainingSAE.output_bias`); this is for other rows, or more of them.

    Args:
        sae: in training or exported; the batches, of flattened matrices [...,K*V] or of low-rank matrices, are scaled
            as it sees them.

    Cost: an encode of each batch, and one decode.

    Raises:
        ValueError: no batch, or the data is not finite.
    """
    sae.settle_b_dec()
    cfg, count = sae.cfg, 0
    total, code = sae.b_dec.new_zeros(cfg.d_in).double(), sae.b_dec.new_zeros(cfg.d_sae).double()
    for _, batch in zip(range(n_batches), batches):
        x = (batch if isinstance(batch, LowRank) else batch.reshape(-1, cfg.d_in)).to(sae.b_dec)
        total += batch_mean(x) * len(x)
        code += sae._encode(x).acts.sum(0, dtype=torch.float64)
        count += len(x)
    require(count > 0, "batches", count, "at least one batch of activations [N, d_in]")
    error = (total / count).to(sae.b_dec) - sae.b_dec - sae.decode_linear((code / count).to(sae.b_dec))
    move_b_dec(sae, error)
    return sae.b_dec.data.clone()


def aux_loss(
    sae: MatrixTrainingSAE,
    k_aux: int,
    x: Tensor | LowRank,
    reconstruction: Tensor | Code,
    hidden_pre: Tensor,
    dead: Tensor,
    atoms: slice = slice(None),
) -> Tensor:
    """The auxiliary loss of TopK: the `k_aux` most active dead atoms reconstruct the residual, without bias.

    Sum of squares over d_in, mean over rows, scaled down when there are fewer dead atoms than k_aux (Gao et al. 2024,
    arXiv 2406.04093, A.2). The coefficient is left to the caller. SAELens uses k_aux = d_in // 2, which at
    d_in = 16384 means every dead atom; the paper's code decodes with a bias the residual does not have.

    Args:
        k_aux: 0: the paper's 256, or d_sae if that is less.
        x, reconstruction: the batch and its reconstruction, whose difference is taken as constant.
        hidden_pre: [N,F'] and dead [F'], for the range `atoms`.
    """
    n_dead = int(dead.sum())
    if n_dead == 0:
        return hidden_pre.new_tensor(0.0)
    wanted = k_aux or min(256, sae.cfg.d_sae)
    index = torch.nonzero(dead).flatten()
    acts = hidden_pre[:, index]
    if n_dead > wanted:
        top = acts.topk(wanted, sorted=False)
        acts = torch.zeros_like(acts).scatter(-1, top.indices, top.values)
    if isinstance(reconstruction, Code) and isinstance(x, LowRank):
        errors = _residual_errors(sae, x, reconstruction, acts, index + (atoms.start or 0))
    else:
        acts = torch.zeros_like(hidden_pre).index_copy(1, index, acts)
        residual = (cast(Tensor, x) - cast(Tensor, reconstruction)).detach()
        errors = (sae.decode_linear(acts, atoms) - residual).pow(2).sum(-1)
    return min(n_dead / wanted, 1.0) * errors.mean()


def _residual_errors(sae: MatrixTrainingSAE, x: LowRank, reconstruction: Code, acts: Tensor, index: Tensor) -> Tensor:
    """|E - Z|^2 [N] for the constant residual E = X - B - Y of a reconstruction and what the atoms `index` [D] add, Z:
    |E|^2 + (|X - B - Z|^2 - |X - B|^2) + 2 <Y, Z>. Costs F*D*(K+V) once and F*D a row."""
    with torch.autocast(acts.device.type, enabled=False):
        v, w = (side.index_select(0, index) for side in sae._decoder_range(slice(None)))
        code = acts.to(v.dtype)
        with torch.no_grad():
            size = sae.squared_errors(reconstruction, x)[:, 0]
        bias, y = sae._bias_matrix().detach(), reconstruction.acts.to(v.dtype).detach()
        all_v, all_w = sae._decoder_range(reconstruction.atoms)
        products = y @ sparse.gram(all_v.detach(), all_w.detach(), v, w)
        distance = sparse.row_distances(x.keys, x.values, bias, code, v, w, full_gradient=False)
        return size + distance + 2 * (products * code).sum(-1)


class HasThreshold(Protocol):
    """A BatchTopK or Matryoshka SAE in training, or a JumpReLU SAE."""

    @property
    def cfg(self) -> MatrixSAEConfig: ...

    def contributions(self, x: Tensor | LowRank) -> Tensor: ...

    def set_threshold(self, value: float) -> None: ...


@torch.no_grad()
def calibrate_threshold(
    sae: HasThreshold, batches: Iterable[Tensor | LowRank], l0: float | None = None, n_batches: int = 16
) -> float:
    """Set the threshold so that exactly `l0` atoms are active on average over these batches, and return it.

    It takes a BatchTopK or Matryoshka SAE in training (before export; `l0` defaults to its k) or a `writesae_jumprelu`
    SAE, exported or not, in which all atoms get the same threshold in units of their contribution (activation times
    atom norm). Batches are flattened matrices [...,K*V] or low-rank matrices, which are not built. Holds N*F
    pre-activations at once.

    Raises:
        ValueError: no data, an l0 out of range, or a class without a threshold.
    """
    l0 = float(getattr(sae.cfg, "k", 0) if l0 is None else l0)
    require(0 < l0 < sae.cfg.d_sae, "l0", l0, f"above 0 and below d_sae={sae.cfg.d_sae}")
    require(hasattr(sae, "set_threshold"), "sae", type(sae).__name__, "a BatchTopK, Matryoshka or JumpReLU SAE")
    contributions = [
        sae.contributions(batch if isinstance(batch, LowRank) else batch.reshape(-1, sae.cfg.d_in))
        for _, batch in zip(range(n_batches), batches)
    ]
    require(bool(contributions), "batches", 0, "at least one batch of activations [N, d_in]")
    flat = torch.cat(contributions).float().flatten()
    wanted = round(l0 * len(flat) / sae.cfg.d_sae)
    require(0 < wanted < len(flat), "l0", l0, f"large enough for {len(flat) // sae.cfg.d_sae} rows")
    top = flat.topk(wanted + 1).values  # sorted: the threshold goes between the last one in and the first one out
    threshold = max(float(top[-2:].mean()), 0.0)
    sae.set_threshold(threshold)
    return threshold
