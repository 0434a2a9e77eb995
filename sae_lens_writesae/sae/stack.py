"""Several dictionaries of writes in one optimizer step: the heads of a layer, seeds, numbers of active atoms.

A step of one small dictionary is mostly what it costs to call its operators. Here the parameters of M dictionaries of
one shape lie side by side, [M,F,K] and so on, and each operator is called once for all of them. Their arithmetic stays
apart: errors, gradient norms, dead atoms, order of the rows and random numbers are those of each dictionary. Upkeep
(`MatrixTrainingSAE._upkeep`), bookkeeping and the schedule of the learning rate are those of the dictionaries' own
SAELens trainers, whose parameters are views of the stack.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from sae_lens.saes.sae import TrainStepInput
from torch import Tensor, nn

from sae_lens_writesae.atom import sparse
from sae_lens_writesae.atom.low_rank import LowRank
from sae_lens_writesae.sae.base import check_finite
from sae_lens_writesae.sae.metric import Metric
from sae_lens_writesae.sae.target import RunnerConfig
from sae_lens_writesae.sae.topk import WriteTopKTrainingSAE, WriteTopKTrainingSAEConfig
from sae_lens_writesae.sae.training import START_STEPS, MatrixTrainingSAE
from sae_lens_writesae.sae.writes import Trainer, check_writes, step_threads, train_on_writes, writes_trainer

MAX_STACK = 32
"""Dictionaries of one stack: more save nothing, and would hold their activations [M,N,F] all at once."""


def shape_of(cfg: RunnerConfig) -> object | None:
    """What dictionaries that train together have in common; None for one that trains alone.

    Together train `writesae_topk` dictionaries of rank 1 with untied encoders on squared errors (in either metric), in
    one precision, without a logger, checkpoints or weights to start from. Seeds, heads and `k` may differ.
    """
    sae, trainer = cfg.sae, cfg.to_sae_trainer_config()
    if (
        type(sae) is not WriteTopKTrainingSAEConfig
        or (sae.encoder, sae.decoder, sae.rank, sae.loss) != ("bilinear", "rank", 1, "mse")
        or (sae.normalize_activations, sae.rescale_acts_by_decoder_norm) != ("none", True)
        or (cfg.autocast, cfg.logger.log_to_wandb, cfg.n_checkpoints, cfg.from_pretrained_path)
        != (False, False, 0, None)
        or trainer.save_final_checkpoint
    ):
        return None
    shared = dataclasses.replace(sae, k=1, metadata=type(sae.metadata)())
    return repr((shared, dataclasses.replace(trainer, checkpoint_path=None), cfg.device))


def train_many_on_writes(
    configs: Sequence[RunnerConfig],
    writes: Sequence[LowRank],
    metrics: Sequence[Metric | None] | None = None,
    say: Callable[[int], object] = lambda done: None,
) -> list[MatrixTrainingSAE]:
    """`train_on_writes` of several dictionaries, in one step for all that have one shape.

    A step is that of `train_on_writes` but for rounding, which training lets grow. The same call gives bitwise the same
    dictionaries; in other company a dictionary differs by rounding. 16 dictionaries of 512 atoms with 128 rows a step
    take a quarter of the time at k 1 (docs/decisions/9); with more rows or active atoms the gain is smaller.

    Args:
        configs: as `train_on_writes` takes them.
        writes: of each dictionary; several may have the same.
        metrics: of each dictionary whose config asks for one.
        say: called with the number of dictionaries that are finished, after each stack.

    Raises:
        ValueError: what `train_on_writes` raises, before any training.
    """
    given = list(metrics) if metrics is not None else [None] * len(configs)
    for cfg, rows, metric in zip(configs, writes, given, strict=True):
        check_writes(cfg, rows.keys, rows.values, metric)
    stacks: dict[object, list[int]] = {}
    for n, (cfg, rows) in enumerate(zip(configs, writes)):
        shape = shape_of(cfg) if rows.keys.shape[1] == 1 else None
        stacks.setdefault((n,) if shape is None else (shape, rows.keys.device), []).append(n)
    trained: dict[int, MatrixTrainingSAE] = {}
    for key, members in stacks.items():
        for first in range(0, len(members), MAX_STACK):
            part = members[first : first + MAX_STACK]
            if key == (part[0],):
                rows = writes[part[0]]
                trained[part[0]] = train_on_writes(configs[part[0]], rows.keys, rows.values, metric=given[part[0]])
            else:
                trained |= dict(zip(part, _train_stack([(configs[n], writes[n], given[n]) for n in part])))
            say(len(trained))
    return [trained[n] for n in range(len(configs))]


def _train_stack(members: Sequence[tuple[RunnerConfig, LowRank, Metric | None]]) -> list[MatrixTrainingSAE]:
    device = torch.device(members[0][0].device)
    with torch.random.fork_rng([device] if device.type == "cuda" else [], device_type=device.type):
        trainers, states = [], []
        for cfg, rows, metric in members:
            torch.manual_seed(cfg.seed)
            trainers.append(writes_trainer(cfg, rows, metric))
            states.append(_random_state(device))
        stack = _Stack(trainers, states)
        with step_threads(trainers[0], stack.cfg.d_k + stack.cfg.d_v, len(trainers)):
            while trainers[0].n_training_samples < trainers[0].cfg.total_training_samples:
                stack.step()
        for trainer in trainers:
            trainer.set_final_sae_metadata()
            for parameter in trainer.sae.parameters():
                parameter.data = parameter.data.clone()
    return [t.sae if metric is None else metric.fold(t.sae) for t, (*_, metric) in zip(trainers, members)]


class _Stack:
    """M dictionaries in training. Atom f of dictionary m is number m F + f of all."""

    def __init__(self, trainers: Sequence[Trainer], states: Sequence[list[Tensor]]):
        self.trainers, self._states = trainers, list(states)
        self.saes: list[WriteTopKTrainingSAE] = [trainer.sae for trainer in trainers]
        self.cfg = self.saes[0].cfg
        names = [name for name, _ in self.saes[0].named_parameters()]
        self.parameters = {
            name: nn.Parameter(torch.stack([sae.get_parameter(name).data for sae in self.saes])) for name in names
        }
        for m, sae in enumerate(self.saes):
            for name, stacked in self.parameters.items():
                sae.get_parameter(name).data = stacked.data[m]
        self.silent = torch.stack([t.n_forward_passes_since_fired for t in trainers])
        self.fired = torch.stack([t.act_freq_scores for t in trainers])
        for m, trainer in enumerate(trainers):
            trainer.n_forward_passes_since_fired, trainer.act_freq_scores = self.silent[m], self.fired[m]
        self.optimizer, self.schedule = trainers[0].optimizer, trainers[0].lr_scheduler
        self.optimizer.param_groups[0]["params"] = list(self.parameters.values())
        active = torch.tensor([sae.cfg.k for sae in self.saes], device=self.silent.device)
        self.k = int(active.max())
        self._allowed = None if bool((active == self.k).all()) else _up_to(active, self.k)[:, None]

    def step(self) -> None:
        """What SAELens' trainer does in a step, for every dictionary."""
        first, M = self.trainers[0], len(self.trainers)
        for trainer in self.trainers:
            trainer.maybe_reset_sparsity()
        rows = torch.stack([next(trainer.data_provider) for trainer in self.trainers]).to(self.silent.device)
        check_finite(rows.flatten(0, 1), rows.flatten(0, 1))
        keys, values = rows.split([self.cfg.d_k, self.cfg.d_v], dim=-1)
        dead = self.silent > first.cfg.dead_feature_window
        self._upkeep(keys, values, dead)
        loss, fired = self._loss(keys, values, dead)
        self.silent += 1
        self.silent[fired > 0] = 0
        self.fired += fired
        loss.backward()
        gradients = [p.grad.view(M, -1) for p in self.parameters.values() if p.grad is not None]
        norms = torch.stack([g.square().sum(1) for g in gradients]).sum(0).sqrt()
        for gradient in gradients:  # clip_grad_norm_, of each dictionary
            gradient.mul_((1 / (norms + 1e-6)).clamp_max(1)[:, None])
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        for trainer in self.trainers:
            trainer.n_training_samples += rows.shape[1]
            trainer.n_frac_active_samples += rows.shape[1]
            trainer.n_training_steps += 1

    def _upkeep(self, keys: Tensor, values: Tensor, dead: Tensor) -> None:
        """What is due before a step, each dictionary with its own random numbers."""
        step, cfg = self.trainers[0].n_training_steps, self.cfg
        if step >= START_STEPS and all(n == 0 or step % n for n in (cfg.unit_norm_every, cfg.resample_every)):
            return
        for m, sae in enumerate(self.saes):
            with self._random_numbers(m):
                rows = LowRank(keys[m][:, None], values[m][:, None])
                sae._upkeep(TrainStepInput(rows, {}, dead[m], step, False))  # pyright: ignore

    @contextmanager
    def _random_numbers(self, m: int) -> Iterator[None]:
        device = self.silent.device
        outer = _random_state(device)
        _set_random_state(device, self._states[m])
        try:
            yield
        finally:
            self._states[m] = _random_state(device)
            _set_random_state(device, outer)

    def _loss(self, keys: Tensor, values: Tensor, dead: Tensor) -> tuple[Tensor, Tensor]:
        """The sum over dictionaries of their losses on rows [M,N,K] and [M,N,V], and how often each atom fired [M,F].

        As in `MatrixTrainingSAE` on factors, but that the number of active atoms of a row is known, so that gradients
        go through the selected pairs alone.
        """
        v, w, v_enc, w_enc, b_enc, b_dec = (self.parameters[n] for n in ("v", "w", "v_enc", "w_enc", "b_enc", "b_dec"))
        (M, N), (F, k) = keys.shape[:2], (v.shape[1], self.k)
        v, w, v_enc, w_enc = (side[:, :, 0] for side in (v, w, v_enc, w_enc))  # [M,F,K] or [M,F,V]
        bias = b_dec.view(M, self.cfg.d_k, self.cfg.d_v)
        norm = v.norm(dim=-1) * w.norm(dim=-1)
        shift = b_enc - _products(bias, v_enc, w_enc) if self.cfg.apply_b_dec_to_input else b_enc
        with torch.no_grad():
            inner = (keys @ v_enc.mT).mul_(values @ w_enc.mT).add_(shift[:, None]).mul_(norm[:, None])
            atoms = inner.topk(k, sorted=self._allowed is not None).indices if k > 1 else inner.argmax(-1, keepdim=True)
            del inner
        at = (atoms + F * torch.arange(M, device=atoms.device)[:, None, None]).view(M * N, k)
        one_key, one_value = keys.reshape(M * N, 1, -1), values.reshape(M * N, 1, -1)
        selected = (_at(v_enc, at) * one_key).sum(-1) * (_at(w_enc, at) * one_value).sum(-1) + _at(shift, at)
        norms = _at(norm, at)
        acts = (selected * norms).relu()
        if self._allowed is not None:
            acts = (acts.view(M, N, k) * self._allowed).view(M * N, k)
        code, decoder = acts / norms, (v.reshape(M * F, 1, -1), w.reshape(M * F, 1, -1))
        distance = sparse.gathered_distances(
            one_key, one_value, _products(bias, v, w).flatten(), code, at, *decoder
        ).view(M, N)
        size = keys.square().sum(-1) * values.square().sum(-1)
        errors = size - 2 * ((keys @ bias) * values).sum(-1) + bias.square().sum((1, 2))[:, None] + distance
        loss = errors.mean(1).sum()
        if self.cfg.aux_loss_coefficient and bool(dead.any()):
            explained = code.detach().view(M, N, k), at.view(M, N, k)
            loss = loss + self.cfg.aux_loss_coefficient * self._aux_loss(keys, values, dead, errors.detach(), explained)
        fired = torch.zeros(M * F, device=acts.device).index_add_(0, at.flatten(), (acts > 0).flatten().float())
        total = acts.new_zeros(M * F).index_add_(0, at.flatten(), acts.detach().flatten()).view(M, 1, F)
        for m, sae in enumerate(self.saes):
            sae.update_means(LowRank(keys[m][:, None], values[m][:, None]), total[m])  # pyright: ignore  (decorator)
        return loss, fired.view(M, F)

    def _aux_loss(
        self, keys: Tensor, values: Tensor, dead: Tensor, errors: Tensor, explained: tuple[Tensor, Tensor]
    ) -> Tensor:
        """`training.aux_loss` of all dictionaries, on their D or fewer dead atoms; `errors` [M,N] are those of the code
        `explained` [M,N,k] with its atoms."""
        M, N = errors.shape
        counts = dead.sum(1)
        index = dead.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, : int(counts.max())]
        there = dead.gather(1, index)[:, None]  # [M,1,D]
        v, w, v_enc, w_enc = (
            self.parameters[n][:, :, 0].gather(1, index[..., None].expand(-1, -1, self.parameters[n].shape[-1]))
            for n in ("v", "w", "v_enc", "w_enc")
        )
        bias, norm = self.parameters["b_dec"].view(M, self.cfg.d_k, self.cfg.d_v), v.norm(dim=-1) * w.norm(dim=-1)
        shift = self.parameters["b_enc"].gather(1, index)
        if self.cfg.apply_b_dec_to_input:
            shift = shift - _products(bias, v_enc, w_enc)
        acts = ((keys @ v_enc.mT) * (values @ w_enc.mT) + shift[:, None]) * norm[:, None]
        wanted = self.cfg.k_aux or min(256, self.cfg.d_sae)
        if acts.shape[-1] > wanted:
            top = acts.detach().masked_fill(~there, -torch.inf).topk(wanted, sorted=False).indices
            there = there & torch.zeros_like(acts, dtype=torch.bool).scatter(-1, top, True)
        code = torch.where(there, acts, 0.0) / norm[:, None]
        bias = bias.detach()
        inner = (keys @ v.mT) * (values @ w.mT) - _products(bias, v, w)[:, None]
        gram = (v @ v.mT) * (w @ w.mT)
        active, at = explained
        sides = [_at(self.parameters[n].detach()[:, :, 0], at.flatten(1)) for n in ("v", "w")]
        overlap = (sides[0] @ v.mT) * (sides[1] @ w.mT)  # [M,N*k,D]
        overlap = (overlap.view(M, N, -1, v.shape[1]) * active[..., None]).sum(2)
        residual = errors + ((code @ gram - 2 * inner) * code).sum(-1) + 2 * (overlap * code).sum(-1)
        return ((counts.to(residual) / wanted).clamp_max(1) * residual.mean(1)).sum()


def _products(matrix: Tensor, v: Tensor, w: Tensor) -> Tensor:
    """<M, A_f> [M,F] of a matrix [M,K,V] of each dictionary with its atoms."""
    return ((v @ matrix) * w).sum(-1)


def _at(stacked: Tensor, atoms: Tensor) -> Tensor:
    """Rows of [M,F,...] by their numbers among all atoms."""
    return stacked.flatten(0, 1).index_select(0, atoms.flatten()).view(*atoms.shape, *stacked.shape[2:])


def _up_to(counts: Tensor, size: int) -> Tensor:
    """[M,size] whether a place is below the count of its dictionary."""
    return torch.arange(size, device=counts.device) < counts[:, None]


def _random_state(device: torch.device) -> list[Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _set_random_state(device: torch.device, state: list[Tensor]) -> None:
    torch.set_rng_state(state[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[1], device)
