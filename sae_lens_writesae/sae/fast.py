"""Training on the factors of writes: many TopK dictionaries at once, in one plain loop.

A write is sum_s k_s u_s^T, and its inner product with an atom sum_r v_r w_r^T is sum_rs (v_r.k_s)(w_r.u_s): neither
writes nor atoms are built. M dictionaries of one shape lie side by side, [M,F,R,K] and so on, and each operator is
called once for all of them; a step of one small dictionary is mostly what it costs to call its operators. Errors,
gradients, dead atoms, order of the rows and random numbers are those of each dictionary, which is the one that trains
alone, but for rounding. Loss and gradients of a block of rows are computed together, from the selected pairs of row and
atom, so that nothing of size N*F outlives its block.

Shapes in one step: 16 heads of 64 x 32, F 256, R 1, N 128 rows, S 1, k 4: keys [16,128,1,64], scores [16,128,256],
selected atoms [2048,4], their factors [2048,4,1,64] and [2048,4,1,32].

Other variants (a dense or flat side, other architectures) are trained by SAELens' trainer on matrices.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from sae_lens.saes.sae import TrainStepInput
from sae_lens.training.optim import get_lr_scheduler
from torch import Tensor, nn
from tqdm.auto import tqdm

from hookpoints.scopes import threads_for
from sae_lens_writesae.atom.low_rank import LowRank
from sae_lens_writesae.files import atomic_write
from sae_lens_writesae.sae.architectures import WriteTopKTrainingSAEConfig as Config
from sae_lens_writesae.sae.matrix import require
from sae_lens_writesae.sae.metric import Metric
from sae_lens_writesae.sae.rows import matrices, new_sae, seeded, shuffled, train_on_rows, wandb_run
from sae_lens_writesae.sae.target import RunnerConfig
from sae_lens_writesae.sae.training import START_STEPS, MatrixTrainingSAE

MAX_STACK = 32
"""Dictionaries of one stack: more save nothing, and would hold their scores all at once."""
BLOCK = 2**20
"""Numbers of one block: of scores, or of a gathered factor."""
SAVE_SECONDS = 60.0
"""Time between two checkpoints: what a kill can lose."""
FACTORS = ("v", "w", "v_enc", "w_enc")

# ------------------------------------------------------------------------------------------------ entry points


def train_on_writes(
    cfg: RunnerConfig,
    keys: Tensor,
    values: Tensor,
    *,
    metric: Metric | None = None,
    checkpoint: Path | None = None,
) -> MatrixTrainingSAE:
    """Train a dictionary on writes in memory, sum_s k_ns u_ns^T, and return it, still of its training class.

    The seed of the config draws initial atoms, the order of the rows and resampled atoms: the same seed gives bitwise
    the same dictionary (on one machine and number of threads), and torch's global generator is left alone.

    Args:
        cfg: SAELens' runner config; `training_config` makes one for a head of a model. Its SAE, seed, device,
            `training_tokens` (rows seen, in as many epochs as that needs), batch size, optimizer, schedule and logger
            are used; its model and its text are not.
        keys, values: [N,S,K] and [N,S,V], or [N,K] and [N,V] for S = 1, of any float dtype.
        metric: where `cfg.sae.metric` is `gauss_newton`, the metric of this head (`sae.metric_fit.fit_metrics`). The
            dictionary that is returned has it folded in.
        checkpoint: a file that is written every minute, from which the same call resumes after a kill, to the same
            weights. It is removed at the end. (For SAELens' trainer a folder: see `train_on_rows`.)

    Cost of a step: F*R*S*(K+V) operations a row, and k*k*R*R*(K+V) for the selected atoms; on matrices F*K*V.

    Raises:
        ValueError: a metric that the config cannot have, or none where it needs one; writes of another shape than the
            config's; NaN or infinite values.
    """
    writes = LowRank(*(side[:, None] if side.ndim == 2 else side for side in (keys, values)))
    if shape_of(cfg) is not None:
        return train_many_on_writes([cfg], [writes], [metric], checkpoint=checkpoint)[0]
    found, wanted = (writes.keys.shape[2], writes.values.shape[2]), (cfg.sae.d_k, cfg.sae.d_v)
    require(found == wanted, "keys, values", found, f"of K, V = {wanted} (d_k, d_v of cfg.sae)")
    return train_on_rows(cfg, matrices(cfg, writes), metric, checkpoint)


def train_many_on_writes(
    configs: Sequence[RunnerConfig],
    writes: Sequence[LowRank],
    metrics: Sequence[Metric | None] | None = None,
    *,
    checkpoint: Path | None = None,
) -> list[MatrixTrainingSAE]:
    """`train_on_writes` of several dictionaries, all in one step. Seeds, heads and `k` may differ.

    Args:
        configs: of one `shape_of`. More than `MAX_STACK` save nothing.
        writes: of each dictionary; several may have the same.
        metrics: of each dictionary whose config asks for one.
        checkpoint: as in `train_on_writes`.

    Raises:
        ValueError: what `train_on_writes` raises, or dictionaries of different shapes.
    """
    shapes = {shape_of(cfg) for cfg in configs}
    one = len(shapes) == 1 and None not in shapes
    require(one, "configs", f"{len(shapes)} shapes", "dictionaries on factors that have one `shape_of`")
    return _Stack(list(zip(configs, writes, metrics or [None] * len(configs), strict=True))).train(checkpoint)


def shape_of(cfg: RunnerConfig) -> str | None:
    """What dictionaries that train together on factors have in common; None for one that is trained on matrices. On
    factors are trained `writesae_topk` dictionaries with factors on both sides, on squared errors (in either metric).
    """
    sae = cfg.sae
    if type(sae) is not Config or cfg.autocast or sae.use_sparse_activations:
        return None
    if (sae.encoder, sae.decoder, sae.loss) != ("bilinear", "rank", "mse"):
        return None
    shared = dataclasses.replace(sae, k=1, metadata=type(sae.metadata)())
    return repr((shared, dataclasses.replace(cfg.to_sae_trainer_config(), checkpoint_path=None), cfg.device))


# ------------------------------------------------------------------------------------------------ the step


class Step(NamedTuple):
    """What a step did, for M dictionaries and N rows each."""

    errors: Tensor
    """[M,N] |X - B - sum_f c_f A_f|^2"""
    atoms: Tensor
    """[M,N,k] numbers of the selected atoms, among those of all dictionaries."""
    code: Tensor
    """[M,N,k] their coefficients, 0 where an atom is not active."""


def inners(keys: Tensor, values: Tensor, v: Tensor, w: Tensor) -> Tensor:
    """<X_n, A_f> [M,N,F] of sum_s k_s u_s^T [M,N,S,K], [M,N,S,V] and sum_r v_r w_r^T [M,F,R,K], [M,F,R,V]."""
    total = 0.0
    for s in range(keys.shape[2]):
        for r in range(v.shape[2]):
            total = total + (keys[:, :, s] @ v[:, :, r].mT) * (values[:, :, s] @ w[:, :, r].mT)
    return cast(Tensor, total)


@torch.no_grad()
def gradients(p: dict[str, nn.Parameter], keys: Tensor, values: Tensor, ks: Sequence[int], cfg: Config) -> Step:
    """One step on rows [M,N,S,K] and [M,N,S,V]; puts the gradient of sum_m mean_n errors into the parameters.

    With c = (<X - B, encoder atom> + b_enc)_+ of the k atoms on top (after a factor of their norms, if
    `rescale_acts_by_decoder_norm`; X instead of X - B unless `apply_b_dec_to_input`), G_ij = <A_i, A_j> and N rows,

        d errors / d c_i = 2 ((G c)_i - <X, A_i> + <B, A_i>)

    and the derivatives by a side of an atom are those of the products of sides that <.,.> is made of.
    """
    (M, N, _, K), V, (F, R) = keys.shape, values.shape[-1], p["v"].shape[1:3]
    v, w, v_enc, w_enc = (p[name] for name in FACTORS)
    bias, g = p["b_dec"].view(M, K, V), 2.0 / N
    by_left = {"dec": (w.flatten(1, 2) @ bias.mT).view_as(v), "enc": (w_enc.flatten(1, 2) @ bias.mT).view_as(v_enc)}
    by_right = {"dec": (v.flatten(1, 2) @ bias).view_as(w), "enc": (v_enc.flatten(1, 2) @ bias).view_as(w_enc)}
    shift = p["b_enc"] - (v_enc * by_left["enc"]).sum((2, 3)) if cfg.apply_b_dec_to_input else p["b_enc"]
    biased = (v * by_left["dec"]).sum((2, 3)).flatten()
    gain = _norms(v, w) if cfg.rescale_acts_by_decoder_norm else torch.ones_like(shift)
    k, most = max(ks), torch.tensor(ks, device=keys.device)
    at = torch.empty(M, N, k, dtype=torch.long, device=keys.device)
    for rows in _blocks(N, M * F):
        scores = (inners(keys[:, rows], values[:, rows], v_enc, w_enc) + shift[:, None]) * gain[:, None]
        at[:, rows] = scores.topk(k, sorted=min(ks) < k).indices if k > 1 else scores.argmax(-1, keepdim=True)
    at += F * torch.arange(M, device=at.device)[:, None, None]
    kept = (torch.arange(k, device=at.device) < most[:, None, None]).expand(M, N, k).flatten(0, 1)
    grad = {name: torch.zeros_like(p[name]).flatten(0, 1) for name in FACTORS}
    by_shift, by_product = (torch.zeros(M * F, dtype=bias.dtype, device=bias.device) for _ in range(2))
    code, errors = torch.empty(M * N, k, dtype=bias.dtype, device=bias.device), []
    all_at, all_keys, all_values = at.flatten(0, 1), keys.flatten(0, 1), values.flatten(0, 1)
    for rows in _blocks(M * N, k * R * max(K, V, k * R)):
        x, u, at_here = all_keys[rows], all_values[rows], all_at[rows]
        flat = at_here.flatten()
        vd, wd, ve, we = (p[n].flatten(0, 1).index_select(0, flat).view(*at_here.shape, R, -1) for n in FACTORS)
        pk, pu = torch.einsum("nkrd,nsd->nkrs", ve, x), torch.einsum("nkrd,nsd->nkrs", we, u)
        c = ((pk * pu).sum((2, 3)) + shift.flatten()[at_here]).relu() * kept[rows]
        left, right = torch.einsum("nkrd,nsd->nkrs", vd, x), torch.einsum("nkrd,nsd->nkrs", wd, u)
        inner, of_bias = (left * right).sum((2, 3)), biased[at_here]
        terms_v, terms_w, terms_c = vd.flatten(1, 2), wd.flatten(1, 2), c.repeat_interleave(R, dim=1)
        gram_v, gram_w = terms_v @ terms_v.mT, terms_w @ terms_w.mT
        weighted = ((gram_v * gram_w) @ terms_c[..., None]).view(*c.shape, R).sum(2)
        errors.append(((weighted - 2 * inner + 2 * of_bias) * c).sum(1))
        by_code, size, code[rows] = (weighted - inner + of_bias) * (c > 0) * g, c * g, c
        pairs = g * terms_c[..., None] * terms_c[:, None]
        for name, change in (
            ("v_enc", torch.einsum("nk,nkrs,nsd->nkrd", by_code, pu, x)),
            ("w_enc", torch.einsum("nk,nkrs,nsd->nkrd", by_code, pk, u)),
            ("v", ((pairs * gram_w) @ terms_v).view_as(vd) - torch.einsum("nk,nkrs,nsd->nkrd", size, right, x)),
            ("w", ((pairs * gram_v) @ terms_w).view_as(wd) - torch.einsum("nk,nkrs,nsd->nkrd", size, left, u)),
        ):
            grad[name].index_add_(0, flat, change.flatten(0, 1))
        by_shift.index_add_(0, flat, by_code.flatten())
        by_product.index_add_(0, flat, size.flatten())
    by_shift, by_product = by_shift.view(M, F), by_product.view(M, F)
    grad = {name: x.view_as(p[name]) for name, x in grad.items()}
    grad["v"] += by_product[..., None, None] * by_left["dec"]
    grad["w"] += by_product[..., None, None] * by_right["dec"]
    of_rows = torch.einsum("mnsk,mnsv->mkv", keys, values)
    by_bias = torch.einsum("mfrk,mf,mfrv->mkv", v, by_product, w) - g * of_rows + 2 * bias
    if cfg.apply_b_dec_to_input:
        grad["v_enc"] -= by_shift[..., None, None] * by_left["enc"]
        grad["w_enc"] -= by_shift[..., None, None] * by_right["enc"]
        by_bias -= torch.einsum("mfrk,mf,mfrv->mkv", v_enc, by_shift, w_enc)
    for name, x in (grad | {"b_enc": by_shift, "b_dec": by_bias.flatten(1)}).items():
        p[name].grad = x
    plain = ((keys @ keys.mT) * (values @ values.mT)).sum((2, 3))
    plain = plain - 2 * ((keys @ bias[:, None]) * values).sum((2, 3)) + bias.square().sum((1, 2))[:, None]
    return Step(plain + torch.cat(errors).view(M, N), at, code.view(M, N, k))


def aux_loss(p: dict[str, nn.Parameter], keys: Tensor, values: Tensor, dead: Tensor, step: Step, cfg: Config) -> Tensor:
    """SAELens' auxiliary loss of every dictionary [M], differentiable: the most active dead atoms ([M,F] `dead`), at
    most d_in // 2, reconstruct what the step left. Costs D (F + N) (K+V) + D D (K+V) for D dead atoms."""
    (M, N, _, K), V, F = keys.shape, values.shape[-1], p["v"].shape[1]
    counts, wanted = dead.sum(1), K * V // 2
    index = dead.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, : int(counts.max())]
    there = dead.gather(1, index)[:, None]  # [M,1,D]
    v, w, v_enc, w_enc = (torch.stack([x[i] for x, i in zip(p[name], index)]) for name in FACTORS)
    bias = p["b_dec"].view(M, 1, K, V)
    shift = p["b_enc"].gather(1, index)
    if cfg.apply_b_dec_to_input:
        shift = shift - ((v_enc @ bias) * w_enc).sum((2, 3))
    norm = _norms(v, w)
    acts = inners(keys, values, v_enc, w_enc) + shift[:, None]
    if acts.shape[-1] > wanted:
        by = (
            (acts * norm[:, None] if cfg.rescale_acts_by_decoder_norm else acts)
            .detach()
            .masked_fill(~there, -torch.inf)
        )
        top = by.topk(wanted, sorted=False).indices
        there = there & torch.zeros_like(acts, dtype=torch.bool).scatter(-1, top, True)
    code = torch.where(there, acts, 0.0)
    with torch.no_grad():
        numbers = step.atoms - F * torch.arange(M, device=keys.device)[:, None, None]
        explained = torch.zeros(M, N, F, dtype=code.dtype, device=code.device).scatter(-1, numbers, step.code)
    of_row = inners(keys, values, v, w) - ((v @ bias.detach()) * w).sum((2, 3))[:, None]
    of_row = of_row - explained @ inners(p["v"].detach(), p["w"].detach(), v, w)
    errors = step.errors + ((code @ inners(v, w, v, w) - 2 * of_row) * code).sum(-1)
    return (counts.to(errors) / wanted).clamp_max(1) * errors.mean(1)


def _norms(v: Tensor, w: Tensor) -> Tensor:
    """|A_f| [M,F]."""
    return ((v @ v.mT) * (w @ w.mT)).sum((2, 3)).clamp_min(0).sqrt()


def _blocks(n: int, width: int) -> Iterator[slice]:
    size = max(16, BLOCK // max(width, 1))
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


# ------------------------------------------------------------------------------------------------ the loop


class _Stack:
    """M dictionaries in training. Atom f of dictionary m is number m F + f of all. Parameters of the M autoencoders are
    views of the stacked ones, so that their own upkeep works on them."""

    def __init__(self, members: Sequence[tuple[RunnerConfig, LowRank, Metric | None]]):
        self.configs, self.writes, self.metrics = zip(*members)
        self.saes = [new_sae(cfg, metric) for cfg, _, metric in members]
        self.runner, self.cfg = self.configs[0], cast(Config, self.saes[0].cfg)
        self.ks = [int(cfg.sae.k) for cfg in self.configs]
        names = [name for name, _ in self.saes[0].named_parameters()]
        stacked = {name: torch.stack([sae.get_parameter(name).data for sae in self.saes]) for name in names}
        self.p = {name: nn.Parameter(x) for name, x in stacked.items()}
        for (m, sae), name in product(enumerate(self.saes), names):
            sae.get_parameter(name).data = stacked[name][m]
        self.scales = [1.0] * len(members)
        if self.cfg.normalize_activations != "none":  # SAELens' scaling factor of the inputs
            norms = [LowRank(*self.rows(m, self._spread(m, 32_768))).norm().mean() for m in range(len(members))]
            self.scales = [self.cfg.d_in**0.5 / float(norm) for norm in norms]
        self.trainer = self.runner.to_sae_trainer_config()
        adam = self.trainer.adam_beta1, self.trainer.adam_beta2
        self.optimizer = torch.optim.Adam(list(self.p.values()), lr=self.trainer.lr, betas=adam, fused=True)
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
        self.silent = torch.zeros(self.p["b_enc"].shape, dtype=torch.long, device=self.runner.device)
        self.step = 0

    def _spread(self, m: int, most: int) -> Tensor:
        """Numbers of at most so many rows of a dictionary, evenly spaced."""
        n = len(self.writes[m])
        return torch.linspace(0, n - 1, min(n, most)).long()

    def rows(self, m: int, index: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [n,S,K] and values [n,S,V] of some rows of a dictionary, as it sees them: in its metric, then scaled."""
        metric, like = self.metrics[m], self.p["b_dec"]
        part = self.writes[m].rows(index.to(self.writes[m].keys.device)).to(like.device).to(like.dtype)
        keys, values = metric.apply(part.keys, part.values) if metric else (part.keys, part.values)
        return keys, values * self.scales[m]

    def train(self, file: Path | None) -> list[MatrixTrainingSAE]:
        """All steps from those of a checkpoint on, where there is one, and the dictionaries.

        Raises:
            ValueError: a checkpoint of other settings; names the file.
        """
        if file is not None and file.exists():
            self._resume(file)
        batch, steps = self.trainer.train_batch_size_samples, self.trainer.total_training_steps
        of_each = list(zip(self.writes, self.configs))
        order = [shuffled(len(writes), batch, cfg.seed, self.step) for writes, cfg in of_each]
        size = len(self.saes) * batch * self.cfg.d_sae * self.cfg.rank * self.writes[0].rank
        left, quiet = range(self.step, steps), not self.runner.verbose
        saved = time.monotonic()
        with ExitStack() as scope:
            scope.enter_context(threads_for(size * (self.cfg.d_k + self.cfg.d_v)))
            runs = [scope.enter_context(wandb_run(cfg, reinit="create_new")) for cfg in self.configs]
            for _ in tqdm(left, initial=self.step, total=steps, desc="Training SAE", disable=quiet):
                rows = [self.rows(m, next(numbers)) for m, numbers in enumerate(order)]
                keys, values = (torch.stack(side) for side in zip(*rows))
                done = self._step(keys, values)
                self.step += 1
                log = self.runner.logger
                if log.log_to_wandb and self.step % log.wandb_log_frequency == 0:
                    measured = self._measured(done, keys, values)
                    for m, run in enumerate(runs):
                        run.log({name: float(x[m]) for name, x in measured.items()}, step=self.step)
                if file is not None and time.monotonic() - saved > SAVE_SECONDS:
                    atomic_write(file, partial(torch.save, self._state()))
                    saved = time.monotonic()
        found = [self._finished(m) for m in range(len(self.saes))]
        if file is not None:
            file.unlink(missing_ok=True)
        return found

    def _step(self, keys: Tensor, values: Tensor) -> Step:
        dead = self.silent > self.trainer.dead_feature_window
        periods = self.cfg.unit_norm_every, self.cfg.resample_every
        if self.step < START_STEPS or any(n and self.step % n == 0 for n in periods):
            for m, (sae, cfg) in enumerate(zip(self.saes, self.configs)):
                x = LowRank(keys[m], values[m]).dense().flatten(1)
                with seeded(cfg.seed, self.step):
                    sae._upkeep(x, TrainStepInput(x, {}, dead[m], self.step, False))  # pyright: ignore  (decorator)
        done = gradients(self.p, keys, values, self.ks, self.cfg)
        if not bool(done.errors.sum().isfinite()):
            raise ValueError(f"step {self.step}: expected finite errors, got NaN or infinity: of the writes, or of lr")
        if self.cfg.aux_loss_coefficient and bool(dead.any()):
            aux = aux_loss(self.p, keys, values, dead, done, self.cfg)
            (self.cfg.aux_loss_coefficient * aux).sum().backward()
        with torch.no_grad():
            every = [cast(Tensor, x.grad).flatten(1) for x in self.p.values()]
            norms = torch.stack([x.square().sum(1) for x in every]).sum(0).sqrt()
            for x in every:  # clip_grad_norm_, of each dictionary
                x.mul_((1 / (norms + 1e-6)).clamp_max(1)[:, None])
        self.optimizer.step()
        self.schedule.step()
        active = (done.code > 0).flatten().long()
        fired = torch.zeros_like(self.silent).flatten().index_add_(0, done.atoms.flatten(), active).view_as(self.silent)
        self.silent = torch.where(fired > 0, 0, self.silent + 1)
        return done

    @torch.no_grad()
    def _measured(self, done: Step, keys: Tensor, values: Tensor) -> dict[str, Tensor]:
        """Numbers of a step by SAELens' names, each [M]."""
        size = ((keys @ keys.mT) * (values @ values.mT)).sum((2, 3)).mean(1)
        mean = torch.einsum("mnsk,mnsv->mkv", keys, values) / keys.shape[1]
        loss = done.errors.mean(1)
        return {
            "losses/mse_loss": loss,
            "metrics/explained_variance": 1 - loss / (size - mean.square().sum((1, 2))),
            "metrics/l0": (done.code > 0).sum(-1).float().mean(1),
            "sparsity/dead_features": (self.silent > self.trainer.dead_feature_window).sum(1),
            "details/current_learning_rate": torch.full_like(loss, self.optimizer.param_groups[0]["lr"]),
            "details/n_training_samples": torch.full_like(loss, self.step * keys.shape[1]),
        }

    @torch.no_grad()
    def _finished(self, m: int) -> MatrixTrainingSAE:
        """A dictionary with weights of its own, whose reconstructions are right on average over `b_dec_rows` rows."""
        sae, metric, metadata = self.saes[m], self.metrics[m], self.saes[m].cfg.metadata
        for parameter in sae.parameters():
            parameter.data = parameter.data.clone()
        keys, values = self.rows(m, self._spread(m, sae.cfg.b_dec_rows or self.trainer.train_batch_size_samples))
        p = {name: nn.Parameter(x[m : m + 1].detach()) for name, x in self.p.items()}
        done = gradients(p, keys[None], values[None], self.ks[m : m + 1], self.cfg)
        if sae.cfg.b_dec_rows:
            code = torch.zeros_like(sae.b_enc).index_add_(0, done.atoms.flatten(), done.code.flatten()) / len(keys)
            mean = torch.einsum("nsk,nsv->kv", keys, values).flatten() / len(keys)
            sae.move_b_dec(mean - sae.b_dec - code @ sae.W_dec)
        sae.fold_activation_norm_scaling_factor(self.scales[m])
        metadata.l0 = float((done.code > 0).sum()) / len(keys)
        metadata.num_dead_features = int((self.silent[m] > self.trainer.dead_feature_window).sum())
        return sae if metric is None else metric.fold(sae)

    # -- checkpoints

    def _state(self) -> dict[str, Any]:
        return {
            "settings": repr([(shape_of(cfg), cfg.seed, cfg.sae.k, cfg.hook_name) for cfg in self.configs]),
            "step": self.step,
            "silent": self.silent,
            "saes": nn.ModuleList(self.saes).state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
        }

    def _resume(self, file: Path) -> None:
        state = torch.load(file, map_location=self.runner.device, weights_only=True)
        if state["settings"] != self._state()["settings"]:
            raise ValueError(f"{file}: expected a checkpoint of these settings, got one of others; delete it")
        self.step, self.silent = state["step"], state["silent"]
        for part, name in (
            (nn.ModuleList(self.saes), "saes"),
            (self.optimizer, "optimizer"),
            (self.schedule, "schedule"),
        ):
            part.load_state_dict(state[name])
