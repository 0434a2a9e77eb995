"""Training on factors: many TopK or BatchTopK dictionaries at once, in one plain loop.

Errors, gradients, dead atoms, order of the rows and random numbers are those of each dictionary, which is the one that
trains alone, but for rounding. The step is in `fused`. Other variants are trained by SAELens' trainer on matrices: a
dense or flat side has K V numbers an atom, of the other architectures any number of atoms may be active (Matryoshka
decodes once for each width, and pursuit once for each atom).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from sae_lens.training.optim import get_lr_scheduler
from torch import Tensor, nn
from tqdm.auto import tqdm

from hookpoints.scopes import threads_for
from sae_lens_writesae.atom.low_rank import LowRank
from sae_lens_writesae.atom.mapped import Writes
from sae_lens_writesae.sae.fused import Dead, Step, atom_norms, step_on_writes
from sae_lens_writesae.sae.metric import Metric
from sae_lens_writesae.sae.rows import (
    Checkpoint,
    inputs_of,
    new_sae,
    row_orders,
    saved_state,
    seeded,
    step_settings,
    wandb_run,
)
from sae_lens_writesae.sae.target import RunnerConfig
from sae_lens_writesae.sae.training import LOOK, START_STEPS, MatrixTrainingSAE, is_due, mean_row, sizes

if TYPE_CHECKING:
    from sae_lens_writesae.sae.architectures import WriteBatchTopKTrainingSAEConfig as BatchConfig
    from sae_lens_writesae.sae.architectures import WriteTopKTrainingSAEConfig as Config

MAX_STACK = 32
"""Dictionaries of one stack: more save nothing, and would hold their scores all at once."""
NEVER = 2**60
"""Steps that no run has."""


def shape_of(cfg: RunnerConfig) -> str | None:
    """What dictionaries that train together on factors have in common; None for one that is trained on matrices.

    On factors are trained `writesae_topk` and `writesae_batchtopk` with factors on both sides, a tied encoder too, and
    squared errors (in either metric).
    """
    sae = cfg.sae
    if sae.architecture() not in ("writesae_topk", "writesae_batchtopk") or cfg.autocast or sae.use_sparse_activations:
        return None
    if sae.encoder == "dense" or (sae.decoder, sae.loss) != ("rank", "mse"):
        return None
    # One step has the scores of all dictionaries, and takes of each as many as its own k.
    return step_settings(cfg, k=1)


# ------------------------------------------------------------------------------------------------ the loop


def writes_at_hand(writes: Sequence[Writes], device: torch.device) -> Sequence[Writes]:
    """Writes on the device of training, where they take less than half of what is free there: no step then copies."""
    different = set(writes)  # several dictionaries may have the same rows
    needed = sum(part.keys.nbytes + part.values.nbytes for part in different)
    free = getattr(torch.get_device_module(device), "mem_get_info", None)
    if device.type == "cpu" or free is None or 2 * needed > free(device)[0]:
        return writes
    moved = {part: part.to(device) for part in different}
    return [moved[part] for part in writes]


class Stack:
    """M dictionaries in training. Atom f of dictionary m is number m F + f of all. Parameters and buffers of the M
    autoencoders are views of the stacked ones, `p` and `buffers`, so that their own upkeep works on them.
    """

    def __init__(
        self, configs: Sequence[RunnerConfig], writes: Sequence[Writes], metrics: Sequence[Metric | None]
    ) -> None:
        self.configs = configs
        self.writes = writes
        self.metrics = metrics
        self.saes = [new_sae(cfg, metric) for cfg, metric in zip(configs, metrics)]
        self.runner = configs[0]
        self.cfg = cast("Config", self.saes[0].cfg)
        self.ks = [cfg.sae.k for cfg in self.configs]
        self.p: dict[str, Tensor]
        self.buffers: dict[str, Tensor]
        self.p, self.buffers = torch.func.stack_module_state(self.saes)
        # The optimizer steps the stacked parameters; each autoencoder sees its part of them.
        for m, sae in enumerate(self.saes):
            for name, x in (self.p | self.buffers).items():
                getattr(sae, name).data = x.data[m]
        self.scales = [1.0] * len(configs)
        if self.cfg.normalize_activations != "none":
            self.scales = [self._input_scale(m) for m in range(len(configs))]
        self.trainer = self.runner.to_sae_trainer_config()
        self.optimizer = torch.optim.Adam(
            list(self.p.values()),
            lr=self.trainer.lr,
            betas=(self.trainer.adam_beta1, self.trainer.adam_beta2),
            fused=True,
        )
        self.schedule = get_lr_scheduler(
            self.trainer.lr_scheduler_name,
            lr=self.trainer.lr,
            optimizer=self.optimizer,
            warm_up_steps=self.trainer.lr_warm_up_steps,
            decay_steps=self.trainer.lr_decay_steps,
            training_steps=self.trainer.total_training_steps,
            lr_end=cast(float, self.trainer.lr_end),
            num_cycles=self.trainer.n_restart_cycles,
        )
        self.silent = torch.zeros_like(self.p["b_enc"], dtype=torch.long)
        self.step = 0
        self.looks = 1 if self.silent.device.type == "cpu" else LOOK
        self.errors = self.p["b_dec"].new_zeros(())
        """Sum since the last look: NaN or infinite from the first that is."""
        self.most_dead: int | None = None
        """At least as many atoms as a dictionary has dead before the next look."""

    def _input_scale(self, m: int) -> float:
        """What SAELens multiplies inputs by, so that their mean norm is sqrt(K V)."""
        squares = [sizes(self.rows(m, part)) for part in self._spread_rows(m, 32_768)]
        return self.cfg.d_in**0.5 / float(torch.cat(squares).sqrt().mean())

    def _spread_rows(self, m: int, most: int) -> Sequence[Tensor]:
        """Numbers of at most so many rows of a dictionary, evenly spaced, for a thousand rows at a time."""
        n = len(self.writes[m])
        return torch.linspace(0, n - 1, min(n, most)).long().split(1024)

    def rows(self, m: int, index: Tensor) -> LowRank:
        """Some rows of a dictionary [n], as it sees them: in its metric, then scaled."""
        metric = self.metrics[m]
        writes = self.writes[m]
        b_dec = self.p["b_dec"]
        # The device first: rows in half precision cross the bus as such.
        part = writes.rows(index.to(writes.keys.device)).to(b_dec.device).to(b_dec.dtype)
        if metric is not None:
            part = metric.move(part)
        if self.scales[m] == 1:
            return part
        return part * self.scales[m]

    def losses(
        self, p: dict[str, Tensor], batch: Sequence[LowRank], ks: Sequence[float], dead: Dead | None = None
    ) -> Step:
        """A step on N rows of each dictionary; puts the gradients of its losses into the parameters `p` (which come
        with the buffers). The loss of `dead` atoms is among them, where they are given."""
        keys = torch.stack([rows.keys for rows in batch])
        values = torch.stack([rows.values for rows in batch])
        return step_on_writes(p, keys, values, ks, self.cfg, dead)

    def train(self, checkpoint: Path | None) -> list[MatrixTrainingSAE]:
        """All steps from those of a checkpoint on, where there is one, and the dictionaries.

        Raises:
            OSError, ValueError: what `Checkpoint` raises, or numbers that are not finite.
        """
        kept = Checkpoint(checkpoint, self.configs, self.inputs)
        if folder := kept.unfinished():
            self._set_run_state(saved_state(folder))
        n_rows = self.trainer.train_batch_size_samples
        steps = self.trainer.total_training_steps
        orders = [
            row_orders(len(rows), n_rows, cfg.seed, self.step, rows.keys.device)
            for rows, cfg in zip(self.writes, self.configs)
        ]
        scores = n_rows * (self.p["v"].numel() + self.p["w"].numel())  # multiply-adds, most of a step's
        log = self.runner.logger
        with ExitStack() as scope:
            scope.enter_context(threads_for(scores))
            runs = [scope.enter_context(wandb_run(cfg, reinit="create_new")) for cfg in self.configs]
            quiet = not self.runner.verbose
            for _ in tqdm(range(self.step, steps), initial=self.step, total=steps, desc="Training SAE", disable=quiet):
                batch = [self.rows(m, next(order)) for m, order in enumerate(orders)]
                done = self.take(batch)
                if log.log_to_wandb and self.step % log.wandb_log_frequency == 0:
                    for m, run in enumerate(runs):
                        run.log(self._step_numbers(done, m, batch[m]), step=self.step)
                kept.save(self._run_state)
        self._check_finite()
        finished = [self._finished_sae(m) for m in range(len(self.saes))]
        kept.remove()
        return finished

    def take(self, batch: Sequence[LowRank]) -> Step:
        """Upkeep, losses, clipped gradients, the optimizer's step, and the count of atoms that did not fire.

        Raises:
            ValueError: NaN or infinite errors.
        """
        window = self.trainer.dead_feature_window
        # The host looks at a device only now and then, and takes a bound that holds until the next look: atoms that
        # are silent for so long by now that they may be dead before it.
        if self.most_dead is None or self.step % self.looks == 0:
            dying = self.silent > window - self.looks + 1
            self.most_dead = int(dying.sum(1).max())
        dead = Dead(self.silent > window, self.most_dead) if self.most_dead else None
        periods = (self.cfg.unit_norm_every, self.cfg.resample_every)
        if self.step < START_STEPS or any(is_due(period, self.step) for period in periods):
            for m, (sae, cfg) in enumerate(zip(self.saes, self.configs)):
                dead_atoms = None if dead is None else dead.atoms[m]
                # Each draws what it would draw alone.
                with seeded(cfg.seed, self.step):
                    sae._upkeep_resampled(batch[m], self.step, dead_atoms)  # pyright: ignore  (decorator)
        done = self.losses(self.p | self.buffers, batch, self.ks, dead if self.cfg.aux_loss_coefficient else None)
        self._follow_thresholds(done)
        self.errors += done.errors.sum()
        if self.step % self.looks == 0:
            self._check_finite()
        with torch.no_grad():
            self._clip_gradients()
        self.optimizer.step()
        self.schedule.step()
        # An atom that is active in any row has been silent for 0 steps. Scattering minima needs no look at which are.
        since = (done.code <= 0) * NEVER
        self.silent += 1
        self.silent.view(-1).scatter_reduce_(0, done.atoms.flatten(), since.flatten(), "amin")
        self.step += 1
        return done

    @torch.no_grad()
    def _follow_thresholds(self, done: Step) -> None:
        """SAELens' running mean of the least active score of a batch, without a wait for the device."""
        threshold = self.buffers.get("topk_threshold")
        if threshold is None:
            return
        scores = done.code
        if self.cfg.rescale_acts_by_decoder_norm:
            scores = scores * atom_norms(self.p["v"], self.p["w"]).flatten()[done.atoms]
        least = scores.masked_fill(scores == 0, torch.inf).flatten(1).amin(1).to(threshold)
        moved = threshold.lerp(least, cast("BatchConfig", self.cfg).topk_threshold_lr)
        threshold.copy_(torch.where(least.isfinite(), moved, threshold))  # as it is, where no atom is active

    def _check_finite(self) -> None:
        if not self.errors.isfinite():
            raise ValueError(f"step {self.step}: expected finite errors, got NaN or infinity: of the writes, or of lr")
        self.errors.zero_()

    def _clip_gradients(self) -> None:
        """clip_grad_norm_, of each dictionary."""
        if len(self.saes) == 1 and self.silent.device.type != "cpu":  # half of the launches
            nn.utils.clip_grad_norm_(list(self.p.values()), 1.0, foreach=True)
            return
        gradients = [cast(Tensor, x.grad).flatten(1) for x in self.p.values()]
        norms = torch.stack([gradient.square().sum(1) for gradient in gradients]).sum(0).sqrt()
        factor = (1 / (norms + 1e-6)).clamp_max(1)[:, None]
        for gradient in gradients:
            gradient.mul_(factor)

    def _step_numbers(self, done: Step, m: int, rows: LowRank) -> dict[str, float]:
        """Numbers of a step of one dictionary by SAELens' names."""
        loss = float(done.errors[m].mean())
        return {
            "losses/mse_loss": loss,
            "metrics/explained_variance": 1 - loss / float(sizes(rows).mean() - mean_row(rows).square().sum()),
            "metrics/l0": float((done.code[m] > 0).sum(-1).float().mean()),
            "sparsity/dead_features": float((self.silent[m] > self.trainer.dead_feature_window).sum()),
            "details/current_learning_rate": float(self.optimizer.param_groups[0]["lr"]),
            "details/n_training_samples": float(self.step * self.trainer.train_batch_size_samples),
        }

    @torch.no_grad()
    def _finished_sae(self, m: int) -> MatrixTrainingSAE:
        """A dictionary with its own weights, whose reconstructions are right on average over `b_dec_rows` rows."""
        sae = self.saes[m]
        metric = self.metrics[m]
        for x in (*sae.parameters(), *sae.buffers()):  # views of the stack so far, which all would keep alive
            x.data = x.data.clone()
        p: dict[str, Tensor] = {name: nn.Parameter(x[m : m + 1]) for name, x in self.p.items()}
        p |= {name: x[m : m + 1] for name, x in self.buffers.items()}
        parts = self._spread_rows(m, sae.cfg.b_dec_rows or self.trainer.train_batch_size_samples)
        total = sum(map(len, parts))
        code = torch.zeros_like(sae.b_enc)
        mean = torch.zeros_like(sae.b_dec)
        active = 0
        for part in parts:
            rows = self.rows(m, part)
            done = self.losses(p, [rows], self.ks[m : m + 1])
            code.index_add_(0, done.atoms.flatten(), done.code.flatten() / total)
            mean += mean_row(rows) * (len(part) / total)
            active += int((done.code > 0).sum())
        if sae.cfg.b_dec_rows:  # mean input less mean contributions, as `MatrixTrainingSAE.output_bias`
            sae.move_b_dec(mean - sae.b_dec - code @ sae.W_dec)
        sae.fold_activation_norm_scaling_factor(self.scales[m])
        metadata = sae.cfg.metadata
        metadata.l0 = active / total
        metadata.n_training_rows = len(self.writes[m])
        metadata.num_dead_features = int((self.silent[m] > self.trainer.dead_feature_window).sum())
        return sae if metric is None else metric.fold(sae)

    # -- checkpoints

    @cached_property
    def inputs(self) -> object:
        """What it trains on, as `content_hash` takes it: the rows, and the metrics."""
        writes = [inputs_of(rows) for rows in self.writes]
        return [writes, [metric and vars(metric) for metric in self.metrics]]

    def _run_state(self) -> dict[str, object]:
        self._check_finite()
        return {
            "step": self.step,
            "silent": self.silent,
            "saes": nn.ModuleList(self.saes).state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
        }

    def _set_run_state(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.silent = state["silent"]
        nn.ModuleList(self.saes).load_state_dict(state["saes"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
