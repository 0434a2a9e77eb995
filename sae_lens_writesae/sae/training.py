"""Training of matrix-atom autoencoders: SAELens' own step, with upkeep before it and the chosen loss after it.

Upkeep is what matrices need and SAELens' trainer has no hook for: mean-centring, unit norm, resampling of dead atoms.
It runs inside `training_forward_pass`, before the step, on the parameters' data, so that any trainer gives a sound
dictionary. The optimizer's moments are not touched; those of a dead atom have decayed by then.
"""

# No postponed annotations here: SAELens' command line evaluates those of config fields in another module.
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from sae_lens.saes.sae import SAE, TrainingSAE, TrainingSAEConfig, TrainStepInput, TrainStepOutput
from torch import Tensor, nn

from sae_lens_writesae.atom.low_rank import LowRank
from sae_lens_writesae.choices import Loss, MetricName
from sae_lens_writesae.errors import check_fields
from sae_lens_writesae.sae.matrix import MatrixSAE, MatrixSAEConfig, with_checksums, words

PAPER_RUNNER: dict[str, float | int | str] = {
    "lr": 3e-4,
    "lr_end": 3e-5,
    "lr_scheduler_name": "cosineannealing",
    "lr_warm_up_steps": 50,
    "train_batch_size_tokens": 256,
    "dead_feature_window": 100,
}
"""The paper's training settings as arguments of LanguageModelSAERunnerConfig (the paper makes 20 epochs)."""

TRAINING_BUFFERS = ("n_started", "mean_input", "mean_contribution", "mean_batches")
"""Buffers that a `MatrixTrainingSAE` adds, which checkpoints have and inference does not."""


StartDirections = Literal["random", "native"]
StartBias = Literal["mean", "zeros"]


@dataclass(kw_only=True)
class MatrixTrainingSAEConfig(MatrixSAEConfig, TrainingSAEConfig):
    """Fields that the training config of every architecture shares. The paper's values: unit norm every 100 steps,
    resampling every 250 steps, centered inputs."""

    decoder_init_norm: float | None = 1.0
    """Norm of the atoms at the start, the encoder being equal to them, so that 1 makes an activation the projection on
    its atom. SAELens' 0.1 starts 100 times too low, which a short run does not make up. None: SAELens' random init."""
    decoder_init: StartDirections = "random"
    """Directions of the atoms at the start: `random`, or `native`: rows of the first batches, cut to rank R, without
    near-copies. Atoms for which the first batches hold no further direction stay random."""
    b_dec_init: StartBias = "mean"
    """`mean`: the mean of the first batch goes into b_dec, if that is still zero."""
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
    loss: Loss = "mse"
    """What is asked of the reconstruction: see `read_loss` and `write_loss`. All but `mse` need rows with further
    columns, which `sae_lens_writesae.train` takes from a collection."""
    loss_weight: float = 0.5
    """Share of `loss` in (1 - weight) mse + weight * loss, in [0, 1]. Unused by `mse`."""
    metric: MetricName = "frobenius"
    """How errors of a write are measured: by the sum of their squares, or by the KL divergence of all later tokens that
    they cause in the model (see `sae.metric`; for targets `write` and the loss `mse`). The second needs rows that are
    transformed by a metric, as `sae_lens_writesae.train` does with one that it is given."""

    def __post_init__(self) -> None:
        periods = {name: getattr(self, name) for name in ("b_dec_rows", "unit_norm_every", "resample_every")}
        norm = self.decoder_init_norm
        # Where a class has the field and it is off, norms in the encoder change which atoms are on top.
        norms_count = self.unit_norm_every and not getattr(self, "rescale_acts_by_decoder_norm", True)
        is_plain = self.metric == "frobenius" or self.loss == "mse"
        check_fields(
            self, words(self, decoder_init=StartDirections, b_dec_init=StartBias, loss=Loss, metric=MetricName)
        )
        rules = {
            "decoder_init_norm": (norm is None or norm > 0, "a positive number, or None for SAELens' random init"),
            **{name: (number >= 0, "a number, or 0 for never") for name, number in periods.items()},
            "loss_weight": (0 <= self.loss_weight <= 1, "a number from 0 to 1"),
        }
        check_fields(self, rules)
        zero = "0 with rescale_acts_by_decoder_norm=False"
        check_fields(self, {"unit_norm_every": (not norms_count, zero), "loss": (is_plain, "'mse' with a metric")})
        super().__post_init__()
        self.metadata.loss = self.loss  # kept in the export, whose config has no field for it


class MatrixTrainingSAE(TrainingSAE[Any], MatrixSAE):
    """A `MatrixSAE` in training. It is the first base of the training class of every architecture.

    A batch holds flattened matrices [N,K*V], and behind them the columns that the loss compares with, if it does.
    """

    cfg: MatrixTrainingSAEConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    in_metric = False
    """Whether its rows are writes that a metric has transformed (`Metric.fold` gives the autoencoder of writes)."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.mse_loss_fn = squared_errors
        self.n_started = nn.Buffer(torch.zeros((), dtype=torch.long, device=self.device))
        """[], atoms that were put on rows of the first batches."""
        self.mean_input = nn.Buffer(torch.zeros_like(self.b_dec, dtype=exact_dtype(self.b_dec)))
        """[K*V], a running mean over batches; see `update_means`."""
        self.mean_contribution = nn.Buffer(self.mean_input.new_zeros(self.cfg.d_sae))
        """[F], the running mean of activations times the norms of their atoms."""
        self.mean_batches = nn.Buffer(torch.zeros_like(self.mean_contribution, dtype=torch.long))
        """[F], batches since an atom was put where it began; 0 everywhere: there are no means."""

    # ---------------------------------------------------------------------------------------- the step

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """Upkeep (see `MatrixTrainingSAEConfig`), then SAELens' own step, then the loss that the config asks for.

        The reconstruction error becomes (1 - weight) mse + weight * loss, with weight = `cfg.loss_weight`; SAELens'
        other terms stay. The loss `write` is multiplied by the variance of the batch, so that the weight compares
        fractions of variance with fractions of misalignment.

        Raises:
            ValueError: NaN or infinite input or weights, or the rows are not those that loss and metric need.
        """
        cfg = self.cfg
        rows = step_input.sae_in
        x = rows[:, : cfg.d_in]
        columns = rows[:, cfg.d_in :]
        lacks_columns = cfg.loss != "mse" and columns.shape[1] == 0
        lacks_metric = cfg.metric != "frobenius" and not self.in_metric
        if lacks_columns or lacks_metric:
            raise ValueError(
                f"loss={cfg.loss!r}, metric={cfg.metric!r}: expected rows with {cfg.loss} columns in that metric, got "
                f"plain rows of {rows.shape[1]} entries; train with sae_lens_writesae.train and a collection"
            )
        # The decorator of torch is untyped.
        resampled = self._upkeep_resampled(x, step_input.n_training_steps, step_input.dead_neuron_mask)  # pyright: ignore
        self._built = {}
        try:
            output = super().training_forward_pass(replace(step_input, sae_in=x))
            if cfg.loss != "mse":
                loss = self._extra_loss(output, x, columns)
                output.losses[f"{cfg.loss}_loss"] = loss
                output.loss = output.loss + cfg.loss_weight * (loss - output.losses["mse_loss"])
            self.update_means(x, output.feature_acts.detach().to_dense())  # pyright: ignore  (decorator)
        finally:
            self._built = None
        output.metrics["resampled_atoms"] = resampled
        return output

    def _extra_loss(self, output: TrainStepOutput, x: Tensor, columns: Tensor) -> Tensor:
        if self.cfg.loss == "reads":
            return read_loss((output.sae_out - x).view(-1, self.cfg.d_k, self.cfg.d_v), columns)
        cosines = nn.functional.normalize(columns, dim=1) @ nn.functional.normalize(self.W_dec, dim=1).T
        contribution = self.coefficients(output.feature_acts) * self.decoder_norm()
        return (x - x.mean(0)).square().sum(1).mean() * write_loss(cosines, contribution)

    @torch.compiler.disable
    @torch.no_grad()
    def _upkeep_resampled(self, x: Tensor | LowRank, step: int, dead: Tensor | None) -> int:
        """What is due before this step; returns how many atoms were resampled. Kept out of compiled graphs."""
        cfg = self.cfg
        # Weights that are not finite stay so until the next look.
        is_looked_at = self.b_dec.is_cpu or step < START_STEPS or step % LOOK == 0
        if is_looked_at and not torch.isfinite(mean_row(x).sum() + self.b_dec.sum()):
            raise ValueError(
                "sae_in, b_dec: expected finite numbers, got NaN or infinity; check the model's dtype and the rate"
            )
        self.mean_batches.mul_(step > 0)  # a new run has new means
        if cfg.decoder_init == "native" and step < START_STEPS:
            self.start_from_rows(x, first=step == 0)
        if step == 0 and cfg.b_dec_init == "mean" and not self.b_dec.any():
            self.b_dec.data.copy_(mean_row(x))
        if is_due(cfg.unit_norm_every, step):
            self.fold_W_dec_norm()
            self.balance_factors()
        if dead is not None and is_due(cfg.resample_every, step):
            return self.resample(x, dead)
        return 0

    @torch.no_grad()
    def start_from_rows(self, x: Tensor | LowRank, *, first: bool = True) -> int:
        """Put atoms that still wait for it on directions of rows of a batch, [N,K*V] or of low rank, in decoder and
        encoder; returns how many have such a start by now.

        Rows are drawn in proportion to their squared norm, and none is taken that is near to an atom which an earlier
        batch started. What one batch leaves open waits for the next one. `first` begins with atom 0. Costs one K x V
        SVD for each row that is drawn, unless rows are of rank one.
        """
        cfg = self.cfg
        start = 0 if first else int(self.n_started)
        never_began = not first and start == 0  # those of such a run are in training by now
        if start == cfg.d_sae or never_began:
            return int(self.n_started)
        drawn = draw_rows(sizes(x), cfg.d_sae - start)
        rows = x.rows(drawn) if isinstance(x, LowRank) else x[drawn].view(-1, cfg.d_k, cfg.d_v).float()
        taken = self.atoms(slice(start)) if cfg.decoder == "rank" else self.W_dec[:start].float()
        atoms = distinct_directions(rows, cfg.rank, taken)
        stop = start + len(atoms)
        all_alive = torch.ones(cfg.d_sae, dtype=torch.bool, device=self.device)
        self.replace_atoms(torch.arange(start, stop, device=self.device), atoms, all_alive)
        self.n_started.fill_(stop)
        return stop

    @torch.no_grad()
    def resample(self, x: Tensor | LowRank, dead: Tensor) -> int:
        """Replace the atoms where `dead` [F] by rank-R directions of the residual of a batch [N,K*V]; returns how many.

        At most one atom for each row, and fewer if rows resemble each other; the other dead atoms wait for the next
        time. A new atom has the mean norm of the living ones, in encoder and decoder, and biases of 0. Costs an encode,
        a decode and one K x V SVD for each atom.
        """
        if not dead.any():
            return 0
        x = dense_rows(x)
        code = self.coefficients(self.encode(x))
        residual = (x - code @ self.W_dec - self.b_dec).float()
        # Where the dictionary is worst, there is most to explain.
        drawn = draw_rows(residual.square().sum(1), int(dead.sum()))
        matrices = residual[drawn].view(-1, self.cfg.d_k, self.cfg.d_v)
        atoms = distinct_directions(matrices, self.cfg.rank)
        replaced = torch.nonzero(dead).flatten()[: len(atoms)]
        self.replace_atoms(replaced, atoms, ~dead)
        return len(atoms)

    @torch.no_grad()
    def replace_atoms(self, indices: Tensor, atoms: LowRank, alive: Tensor) -> None:
        """A replaced atom starts anew."""
        super().replace_atoms(indices, atoms, alive)
        if "threshold" in self._parameters:
            self.get_parameter("threshold").data[indices] = cast(Any, self.cfg).jumprelu_init_threshold
        self.mean_batches[indices] = 0
        self.mean_contribution[indices] = 0

    # ---------------------------------------------------------------------------------------- the mean

    def coefficients(self, acts: Tensor) -> Tensor:
        """What the atoms are multiplied by [...,F], from activations, which may be in units of contribution."""
        if getattr(self.cfg, "rescale_acts_by_decoder_norm", False):
            return acts / self.decoder_norm()
        return acts

    @torch.compiler.disable
    @torch.no_grad()
    def update_means(self, x: Tensor, feature_acts: Tensor) -> None:
        """Take a batch [N,K*V] with its activations [N,F] into the running means.

        The weight of the t-th batch is proportional to t among inputs, and to t^5 among contributions, because the
        weights of the autoencoder were others then. Beyond `b_dec_rows` both decay exponentially.
        """
        least = len(x) / max(len(x), self.cfg.b_dec_rows)

        def take(mean: Tensor, new: Tensor, batches: Tensor, power: int) -> None:
            # Weights p / (t + p) of the new one make that of the t-th batch proportional to t^(p - 1).
            weight = (power / (batches + power)).clamp_min(least)
            mean.lerp_(new.to(mean), weight.to(mean))

        acts = feature_acts.sum(0, dtype=exact_dtype(feature_acts)) / len(x)
        contribution = self.coefficients(acts) * self.get_W_dec_norm()
        take(self.mean_input, mean_row(x), self.mean_batches.max(), power=2)
        take(self.mean_contribution, contribution, self.mean_batches, power=6)
        self.mean_batches.add_(1)

    def decode(self, feature_acts: Tensor) -> Tensor:
        """Reconstructions [...,K*V] of activations [...,F]; outside of training steps with `output_bias`."""
        reconstruction = super().decode(feature_acts)
        in_training_step = self._built is not None
        if in_training_step:
            return reconstruction
        return reconstruction + (self.output_bias() - self.b_dec)

    def output_bias(self) -> Tensor:
        """What `decode` adds to the atoms [K*V]. In training steps it is b_dec; outside of them the mean input less the
        mean contributions of the atoms as they are now, where there are means. Costs a decode.

        An error that all writes of a head share adds up in its state for as long as the head remembers, while squared
        errors hardly see it. The optimizer leaves one in b_dec, whose entries move by the learning rate at each step.
        (Set within the steps, b_dec would hide the mean of dense codes from their losses, and they diverge.)
        """
        if not self.cfg.b_dec_rows or not self.mean_batches.any():
            return self.b_dec
        code = (self.mean_contribution / self.get_W_dec_norm()).to(self.b_dec)
        return (self.mean_input - code @ self.W_dec).to(self.b_dec)

    def settle_b_dec(self) -> None:
        """Make b_dec what `output_bias` is, and forget the means. Nothing else changes."""
        self.move_b_dec(self.output_bias() - self.b_dec)
        self.mean_batches.zero_()

    # ---------------------------------------------------------------------------------------- what is saved

    @torch.no_grad()
    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Tensor]) -> None:
        """Settle b_dec, and leave out what only training needs. SAELens may fold norms into `W_enc` and `W_dec`: it is
        given ones, which then are what each atom and its encoder are multiplied by."""
        self.settle_b_dec()  # in place, which the tensors of state_dict see
        for name in TRAINING_BUFFERS:
            del state_dict[name]
        ones = torch.ones_like(self.get_W_dec_norm())
        state_dict |= {"W_dec": ones[:, None], "W_enc": ones[None]}
        super().process_state_dict_for_saving_inference(state_dict)
        decoder = state_dict.pop("W_dec").flatten()
        encoder = state_dict.pop("W_enc").flatten()
        state_dict |= self._scaled_weights(decoder, encoder)

    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        """What was saved for inference gets empty means, so that training can begin with it."""
        super().process_state_dict_for_loading(state_dict)
        for name in TRAINING_BUFFERS:
            empty = torch.zeros_like(self.get_buffer(name), device=state_dict["b_dec"].device)
            state_dict.setdefault(name, empty)

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


def is_due(period: int, step: int) -> bool:
    """Whether upkeep of a period is due before a step; never before the first, nor with a period of 0."""
    return step > 0 and period > 0 and step % period == 0


def exact_dtype(t: Tensor) -> torch.dtype:
    """The dtype of `t`, or fp32 if that has less precision."""
    return torch.promote_types(t.dtype, torch.float32)


LOOK = 64
"""Steps between two looks of the host at a device, each of which waits for it."""
START_STEPS = 16
"""Steps in which atoms are still put on rows of their batches, where one batch has too few distinct ones."""
MAX_COSINE = 0.9
"""Two directions that are closer than this count as one where atoms are put on rows."""


def draw_rows(errors: Tensor, count: int) -> Tensor:
    """Up to `count` row numbers, drawn without repetition in proportion to the rows' squared errors [N]."""
    count = min(count, int((errors > 0).sum()))
    if not count:
        return errors.new_zeros(0, dtype=torch.long)
    return torch.multinomial(errors / errors.max(), count)


def distinct_directions(matrices: LowRank | Tensor, rank: int, taken: LowRank | Tensor | None = None) -> LowRank:
    """Unit-norm atoms of rank R from matrices [n,K,V], no two with a cosine above 0.9, and none so near to one of the
    matrices or rows [m,K*V] that are `taken`.

    The matrices are cut to rank R by SVD, unless they have rank one. (The paper's code draws rows of the raw state with
    repetition; a batch with one dominant direction then gives many copies of it.)
    """
    if isinstance(matrices, LowRank) and matrices.rank == 1:
        atoms = LowRank(_padded_unit(matrices.keys, rank), _padded_unit(matrices.values, rank))
    else:
        dense = matrices.dense() if isinstance(matrices, LowRank) else matrices
        atoms = LowRank.svd(dense, rank, balanced=True)
        size = atoms.norm().rsqrt()[:, None, None]
        atoms = LowRank(atoms.keys * size, atoms.values * size)
    cosines = [atoms.cosines(atoms).tril(-1)]  # with those before it
    if isinstance(taken, LowRank):
        cosines.append(atoms.cosines(taken.to(atoms.keys)))
    elif taken is not None:
        cosines.append(atoms.dense().flatten(1) @ nn.functional.normalize(taken, dim=1).T)
    is_near = torch.cat(cosines, dim=1) > MAX_COSINE
    return atoms.rows(~is_near.any(1))


def _padded_unit(side: Tensor, rank: int) -> Tensor:
    """A side [n,1,D] of norm 1, with zeros for the other terms of a rank: [n,R,D]."""
    return nn.functional.pad(nn.functional.normalize(side, dim=-1), (0, 0, 0, rank - 1))


def dense_rows(x: Tensor | LowRank) -> Tensor:
    """Rows [N,K*V] of matrices that may be of low rank."""
    return x.dense().flatten(1) if isinstance(x, LowRank) else x


def mean_row(x: Tensor | LowRank) -> Tensor:
    """[K*V] the mean of rows [N,K*V], or of matrices of low rank."""
    if isinstance(x, LowRank):
        return x.total().dense().flatten() / len(x)
    return x.to(exact_dtype(x)).mean(0)


def sizes(x: Tensor | LowRank) -> Tensor:
    """[N] squared norms of rows [N,K*V], or of matrices of low rank."""
    if isinstance(x, LowRank):
        return x.inner(x)
    return x.to(exact_dtype(x)).square().sum(1)


def squared_errors(reconstructions: Tensor, rows: Tensor) -> Tensor:
    """Squared errors [N,D] of rows [N,D], in the wider of both dtypes.

    SAELens calls `mse_loss`, which in torch 2.8 has no gradient where the dtypes differ.
    """
    return (reconstructions - rows).square()


# ------------------------------------------------------------------------------------------------------- losses
# What they compare with (queries, writes of the same tokens) reaches the step as further columns of the rows:
# `sae.rows` appends them, and `MatrixTrainingSAE` takes them off again.


def read_loss(error: Tensor, queries: Tensor) -> Tensor:
    """Mean over rows of |E^T q|^2, in units of the squared error: [N,K,V], [N,K] -> [].

    It is multiplied by K / mean |q|^2, so that the size of the queries does not matter, and for queries without a
    preferred direction the loss equals the reconstruction loss, the mean of |E|^2 (Frobenius). It is zero where all
    reads agree, whatever else the error E holds. A row without a query (all zero) counts as read without error.

    The query of a row is the one that reads the state at the row's own token (`rows.read_queries`). A state is read by
    it, so that for states the loss is what it says. A **write** stays in the state and is read by later queries as
    well, at what decay and erase leave of it: for writes the loss weighs the first of these reads only.
    """
    size = queries.square().sum(-1).mean().clamp_min(torch.finfo(queries.dtype).tiny)
    return torch.einsum("nkv,nk->nv", error, queries).square().sum(-1).mean() * queries.shape[-1] / size


def write_loss(cosine: Tensor, contribution: Tensor) -> Tensor:
    """Mean over rows of 1 - sum_f p_f cos(A_f, W), p_f being the atom's share of the code: [N,F], [N,F] -> [].

    It lies between 0 (every active atom points along the write) and 2, and is 1 where nothing is active.
    """
    total = contribution.sum(-1, keepdim=True)
    return 1 - (contribution / total.clamp_min(torch.finfo(total.dtype).tiny) * cosine).sum(-1).mean()


# -------------------------------------------------------------------------------------------------- calibration


@torch.no_grad()
def calibrate_threshold(sae: MatrixSAE, x: Tensor, l0: float | None = None) -> float:
    """Set the threshold so that exactly `l0` atoms are active on average over matrices [N,K*V], and return it.

    It takes a BatchTopK or Matryoshka SAE in training (before export; `l0` defaults to its k) or a `writesae_jumprelu`
    SAE, exported or not, in which all atoms get the same threshold in units of their contribution (activation times
    atom norm). Holds N*F pre-activations.

    Raises:
        ValueError: an l0 out of range.
        AttributeError: a class without a threshold.
    """
    l0 = float(getattr(sae.cfg, "k", 0) if l0 is None else l0)
    if not 0 <= l0 < sae.cfg.d_sae:
        raise ValueError(f"l0: expected a number from 0 to below d_sae = {sae.cfg.d_sae}, got {l0}")
    pre = sae.process_sae_in(x) @ sae.W_enc + sae.b_enc
    if getattr(sae.cfg, "rescale_acts_by_decoder_norm", True):
        pre = pre * sae.decoder_norm()
    n_active = round(l0 * len(x))
    top = pre.float().flatten().topk(n_active + 1).values  # the threshold goes between the last one in and the next
    between = float(top[-2:].mean()) if n_active else 2 * float(top[0])
    threshold = max(between, 0.0)
    if "threshold" in sae._parameters:
        sae.get_parameter("threshold").data.copy_(threshold / sae.get_W_dec_norm())
    else:
        sae.get_buffer("topk_threshold").fill_(threshold)
    return threshold
