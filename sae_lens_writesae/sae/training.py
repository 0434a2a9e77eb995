"""Training that serves matrices: centring, unit norm, resampling, and a threshold that is right after short runs.

The trainer of SAELens has no hook for any of these, so they run inside `training_forward_pass`, before the step, on
the parameters' data. The optimizer's moments are not touched: those of a dead atom have decayed by then.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from sae_lens.saes.sae import TrainingSAEConfig, TrainStepInput
from torch import Tensor

from sae_lens_writesae.sae.base import MatrixAtoms, MatrixAtomsConfig
from sae_lens_writesae.sae.checks import check_finite, require
from sae_lens_writesae.sae.losses import Loss
from sae_lens_writesae.sae.resampling import resample

if TYPE_CHECKING:
    from sae_lens_writesae.sae.coding import TrainingCoding

PAPER_RUNNER: dict[str, Any] = {
    "lr": 3e-4,
    "lr_end": 3e-5,
    "lr_scheduler_name": "cosineannealing",
    "lr_warm_up_steps": 50,
    "train_batch_size_tokens": 256,
    "dead_feature_window": 100,
}
"""The paper's recipe as arguments of LanguageModelSAERunnerConfig (with 20 epochs over its data)."""


@dataclass(kw_only=True)
class MatrixTrainingConfig(MatrixAtomsConfig, TrainingSAEConfig):
    """Fields that the training config of every architecture shares. The paper's values: unit norm every 100 steps,
    resampling every 250 steps, centred inputs."""

    decoder_init_norm: float | None = 1.0
    """Norm of the atoms at the start, the encoder being equal to them, so that 1 makes an activation the projection on
    its atom. SAELens' 0.1 starts 100 times too low, which a short run does not make up. None: SAELens' random init."""
    b_dec_init: Literal["mean", "zeros"] = "mean"
    """`mean`: the mean of the first batch goes into b_dec, if that is still zero. See also `preset_b_dec`."""
    unit_norm_every: int = 100
    """Every so many steps give atoms norm 1 and their encoders the inverse (the function stays the same), and balance
    the factors of each. 0: never."""
    resample_every: int = 250
    """Every so many steps replace dead atoms by residual directions. Dead is what the trainer's `dead_feature_window`
    says: 1000 steps by default, 100 in the paper. 0: never."""
    resample_until: int = 0
    """No resampling after this step, so that the last atoms get trained. 0: no limit."""
    loss: Loss = "mse"
    """What is asked of the reconstruction: see `training_loss.Loss`. All but `mse` need this package's runner."""
    loss_weight: float = 0.5
    """Share of `loss` in (1 - weight) mse + weight * loss, in [0, 1]. Unused by `mse`."""

    def __post_init__(self) -> None:
        norm = self.decoder_init_norm
        require(norm is None or norm > 0, "decoder_init_norm", norm, "positive, or None for SAELens' random init")
        require(self.b_dec_init in ("mean", "zeros"), "b_dec_init", self.b_dec_init, "'mean' or 'zeros'")
        for field in ("unit_norm_every", "resample_every", "resample_until"):
            require(getattr(self, field) >= 0, field, getattr(self, field), "a number of steps, or 0 for never")
        require(self.loss in get_args(Loss), "loss", self.loss, f"one of {get_args(Loss)}")
        require(0 <= self.loss_weight <= 1, "loss_weight", self.loss_weight, "between 0 and 1")
        super().__post_init__()
        self.metadata.loss = self.loss  # goes along with the exported autoencoder, whose own config has no losses


@torch.compiler.disable
@torch.no_grad()
def before_step(sae: "TrainingCoding", step_input: TrainStepInput) -> int:
    """The upkeep due at this step; returns how many atoms were resampled. Kept out of compiled graphs."""
    cfg, step, x = sae.cfg, step_input.n_training_steps, step_input.sae_in
    check_finite(x, x)
    if step == 0 and cfg.b_dec_init == "mean" and not sae.b_dec.any():
        sae.b_dec.data.copy_(x.float().mean(0))
    if step == 0:
        return 0
    if cfg.unit_norm_every and step % cfg.unit_norm_every == 0:
        sae.fold_W_dec_norm()
        sae.balance_factors()
    due = cfg.resample_every and step % cfg.resample_every == 0 and step <= (cfg.resample_until or step)
    if due and step_input.dead_neuron_mask is not None:
        return resample(sae, x, step_input.dead_neuron_mask)
    return 0


@torch.no_grad()
def preset_b_dec(sae: MatrixAtoms, batches: Iterable[Tensor], n_batches: int = 16) -> Tensor:
    """Put the mean of the first batches into b_dec [K*V], which the encoder subtracts: mean-centring. Returns it.

    For activations as the SAE will see them: with normalize_activations='expected_average_only_in' leave this to
    `b_dec_init='mean'`, which sees them scaled.

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


def aux_loss(sae: Any, residual: Tensor, hidden_pre: Tensor, dead: Tensor, atoms: slice = slice(None)) -> Tensor:
    """The auxiliary loss of TopK: the `k_aux` most active dead atoms reconstruct the residual, without bias.

    Sum of squares over d_in, mean over rows, scaled down when there are fewer dead atoms than k_aux (Gao et al. 2024,
    arXiv 2406.04093, A.2). The coefficient is left to the caller. SAELens uses k_aux = d_in // 2, which at
    d_in = 16384 means every dead atom; the paper's code decodes with a bias the residual does not have.

    Args:
        residual: [N,K*V], detached.
        hidden_pre: [N,F'] and dead [F'], for the range `atoms`.
    """
    n_dead = int(dead.sum())
    if n_dead == 0:
        return residual.new_tensor(0.0)
    wanted = sae.cfg.k_aux or min(256, sae.cfg.d_sae)
    top = torch.where(dead, hidden_pre, -torch.inf).topk(min(wanted, n_dead), sorted=False)
    acts = torch.zeros_like(hidden_pre).scatter(-1, top.indices, top.values)
    error = sae.decode_linear(acts, atoms) - residual
    return min(n_dead / wanted, 1.0) * error.pow(2).sum(-1).mean()


@torch.no_grad()
def calibrate_threshold(sae: Any, batches: Iterable[Tensor], l0: float | None = None, n_batches: int = 16) -> float:
    """Set the threshold so that exactly `l0` atoms are active on average over these batches, and return it.

    For a BatchTopK or Matryoshka SAE in training (before export; `l0` defaults to its k) and for a `writesae_jumprelu`
    SAE, exported or not, where all atoms get the threshold in units of their contribution, activation times atom
    norm. Holds N*F pre-activations at once.

    Raises:
        ValueError: no data, an l0 out of range, or a class without a threshold.
    """
    l0 = float(getattr(sae.cfg, "k", 0) if l0 is None else l0)
    require(0 < l0 < sae.cfg.d_sae, "l0", l0, f"above 0 and below d_sae={sae.cfg.d_sae}")
    require(hasattr(sae, "set_threshold"), "sae", type(sae).__name__, "a BatchTopK, Matryoshka or JumpReLU SAE")
    found = [sae.contributions(b.reshape(-1, sae.cfg.d_in)) for _, b in zip(range(n_batches), batches)]
    require(bool(found), "batches", 0, "at least one batch of activations [N, d_in]")
    flat = torch.cat(found).float().flatten()
    wanted = round(l0 * len(flat) / sae.cfg.d_sae)
    require(0 < wanted < len(flat), "l0", l0, f"large enough for {len(flat) // sae.cfg.d_sae} rows")
    top = flat.topk(wanted + 1).values  # sorted: the threshold goes between the last one in and the first one out
    threshold = max(float(top[-2:].mean()), 0.0)
    sae.set_threshold(threshold)
    return threshold
