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
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import cached_property, lru_cache, partial
from io import BytesIO
from itertools import product
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from sae_lens.training.optim import get_lr_scheduler
from torch import Tensor, nn
from torch.nn.functional import embedding, embedding_bag, pad
from tqdm.auto import tqdm

from hookpoints.files import atomic_write, content_hash, set_aside
from hookpoints.scopes import threads_for
from sae_lens_writesae.atom.low_rank import LowRank
from sae_lens_writesae.files import SAVE_SECONDS
from sae_lens_writesae.sae.matrix import khatri_rao
from sae_lens_writesae.sae.metric import Metric
from sae_lens_writesae.sae.rows import ShuffledWrites, new_sae, seeded, shuffled, train_on_rows, wandb_run
from sae_lens_writesae.sae.target import RunnerConfig
from sae_lens_writesae.sae.training import START_STEPS, MatrixTrainingSAE, mean_row, sizes

if TYPE_CHECKING:
    from sae_lens_writesae.sae.architectures import WriteTopKTrainingSAEConfig as Config

MAX_STACK = 32
"""Dictionaries of one stack: more save nothing, and would hold their scores all at once."""
BLOCK = 2**19
"""Numbers of one block: of scores, or of a gathered factor. On a CPU a block stays in the cache."""
DEVICE_BLOCK = 2**27
"""The same on a device, where each block costs some twenty launches, and memory bounds it (half a GB)."""
LOOK = 64
"""Steps between two looks of the host at a device, each of which waits for it."""
NEVER = 2**60
"""Steps that no run has."""
STATES_FROM = 64 * 64
"""K V from which states are trained on in chunks: a step is then 3.8 times as fast as on matrices, and 8.6 times at
128 x 128. At 64 x 32 it is 1.9 times, which the whole run does not keep, and explained variance is 0.007 lower: rows of
one chunk resemble each other more than shuffled ones."""
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
    the same dictionary (on one machine and number of threads), and torch's global generator is left alone. On CUDA
    atoms sum their gradients in no fixed order (`index_add_`), so that two runs differ by rounding.

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
    sizes = (writes.keys.shape[2], writes.values.shape[2])
    wanted = (cfg.sae.d_k, cfg.sae.d_v)
    if sizes != wanted:
        raise ValueError(f"keys, values={sizes!r}: must be of K, V = {wanted} (d_k, d_v of cfg.sae).")
    inputs = "" if checkpoint is None else content_hash([writes.keys, writes.values, metric and vars(metric)])
    return train_on_rows(cfg, ShuffledWrites(cfg, writes), metric, checkpoint, len(writes), inputs)


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
    if len(shapes) != 1 or None in shapes:
        raise ValueError(f"configs='{len(shapes)} shapes': must be dictionaries on factors that have one `shape_of`.")
    held = _held(writes, torch.device(configs[0].device))
    return Stack(list(zip(configs, held, metrics or [None] * len(configs), strict=True))).train(checkpoint)


def shape_of(cfg: RunnerConfig) -> str | None:
    """What dictionaries that train together on factors have in common; None for one that is trained on matrices.

    On factors are trained, with factors on both sides and squared errors (in either metric), `writesae_topk` on writes;
    and on states of `STATES_FROM` entries or more also `writesae_batchtopk`.
    """
    sae, of_states = cfg.sae, "hook_state" in cfg.hook_name
    if (
        sae.architecture() not in ("writesae_topk", *["writesae_batchtopk"] * of_states)
        or (sae.encoder, sae.decoder, sae.loss) != ("bilinear", "rank", "mse")
        or (cfg.autocast or sae.use_sparse_activations)
        or sae.d_in < STATES_FROM * of_states
    ):
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
    aux: Tensor | None = None
    """[M] the auxiliary loss before its weight, where there are dead atoms."""


class Dead(NamedTuple):
    """Atoms that have been silent for too long."""

    atoms: Tensor
    """[M,F]"""
    most: int
    """At least as many as a dictionary has, known without waiting for the device."""


class Biases(NamedTuple):
    """What b_dec adds to inner products with atoms and encoder, for F atoms of M dictionaries."""

    products: tuple[Tensor, Tensor, Tensor, Tensor]
    """By `FACTORS`: each side of an atom times the matrix of the bias, [M,F,R,K] or [M,F,R,V]."""
    of_atoms: Tensor
    """[M,F] <A_f, B>"""
    shift: Tensor
    """[M,F] b_enc - <encoder atom, B>, or b_enc alone."""
    gain: Tensor
    """[M,F] norms of atoms, if they scale scores; else 1."""


class Chosen(NamedTuple):
    """The k atoms on top for each of M N rows."""

    atoms: Tensor
    """[M N,k] numbers among those of all dictionaries."""
    code: Tensor
    """[M N,k] coefficients, 0 where an atom is not active."""
    active: Tensor
    """[M N,k]"""
    sides: tuple[Tensor, Tensor]
    """[M N,S,k,R] inner products of the row's keys, and of its values, with those of the encoder."""
    of_bias: Tensor
    """[M N,k] <A_f, B>"""


class Decoded(NamedTuple):
    """The errors of the rows, without what the bias adds to them, and their gradients."""

    errors: Tensor
    """[M N]"""
    by_code: Tensor
    """[M N,k] of the mean error; 0 where an atom is not active."""
    by_atom: Tensor
    """[M F R,K+V] of the mean error, without what the bias adds."""


def gradients(
    p: dict[str, Tensor],
    keys: Tensor,
    values: Tensor,
    ks: Sequence[int],
    cfg: Config,
    dead: Dead | None = None,
) -> Step:
    """One step on rows [M,N,S,K] and [M,N,S,V]; puts the gradients of each dictionary's mean error and weighted
    auxiliary loss (`with_aux`, of the `dead` atoms) into the parameters.

    With c = (<X - B, encoder atom> + b_enc)_+ of the k atoms on top (after a factor of their norms, if
    `rescale_acts_by_decoder_norm`; X instead of X - B unless `apply_b_dec_to_input`), and E = B + sum_f c_f A_f - X,
    the gradients of |E|^2 by c, and by the sides of an atom v w^T, are 2 v^T E w, 2 c E w and 2 c E^T v. E is a sum of
    outer products of the terms of atoms and of rows (and B, which stays apart): M F R + M N S terms.
    """
    M, N = keys.shape[:2]
    with torch.no_grad():
        biases = _biases(p, cfg)
        chosen = _chosen(p, keys, values, biases, ks)
        by_error = chosen.code * (2 / N)
        decoded = _decoded(p, keys, values, chosen, by_error)
        by_shift = _by_atom(chosen.atoms, decoded.by_code, M, p)
        by_product = _by_atom(chosen.atoms, by_error, M, p)
        sides = [*decoded.by_atom.split([keys.shape[3], values.shape[3]], 1)]
        sides += _encoder_gradients(p, keys, values, chosen, decoded.by_code)
        weights = [(by_product, 1), (by_product, 1), (by_shift, -1), (by_shift, -1)]
        for name, side, of_bias, (weight, sign) in zip(FACTORS, sides, biases.products, weights):
            p[name].grad = torch.addcmul(side.view(of_bias.shape), of_bias, weight, value=sign)
        p["b_enc"].grad = by_shift.flatten(1)
        taken = by_shift if cfg.apply_b_dec_to_input else torch.zeros_like(by_shift)
        p["b_dec"].grad = _bias_gradient(p, keys, values, taken, by_product)
        with_bias = torch.add(decoded.errors, (chosen.code * chosen.of_bias).sum(1), alpha=2)
        errors = with_bias.view(M, N) + _bias_errors(p, keys, values)
        step = Step(errors, chosen.atoms.view(M, N, -1), chosen.code.view(M, N, -1))
    return with_aux(p, partial(inners, keys, values), lambda: keys.mT @ values, step, cfg, dead)


def _biases(p: dict[str, Tensor], cfg: Config) -> Biases:
    v, w, v_enc, w_enc = (p[name] for name in FACTORS)
    bias = p["b_dec"].view(len(v), v.shape[3], w.shape[3])
    taken = bias if cfg.apply_b_dec_to_input else torch.zeros_like(bias)
    products = _each(w, bias.mT), _each(v, bias), _each(w_enc, taken.mT), _each(v_enc, taken)
    shift = p["b_enc"] - (v_enc * products[2]).sum((2, 3))
    gain = _norms(v, w) if cfg.rescale_acts_by_decoder_norm else torch.ones_like(shift)
    return Biases(products, of_atoms=(v * products[0]).sum((2, 3)), shift=shift, gain=gain)


def _chosen(p: dict[str, Tensor], keys: Tensor, values: Tensor, biases: Biases, ks: Sequence[int]) -> Chosen:
    M, N = keys.shape[:2]
    F = p["v"].shape[1]
    top, of_keys, of_values = _select(keys, values, p["v_enc"], p["w_enc"], biases.shift, biases.gain, ks)
    first, asked = _of_dictionaries(M, N, F, tuple(ks), keys.device)
    atoms = top if M == 1 else top + first
    table = torch.stack([biases.shift, biases.gain, biases.of_atoms], -1).flatten(0, 1)
    shift, gain, of_bias = embedding(atoms, table).unbind(-1)
    of_values /= gain[:, None, :, None]
    code = (of_keys * of_values).sum((1, 3)) + shift
    if min(ks) < max(ks):
        code = code * asked
    return Chosen(atoms, code.relu(), code > 0, (of_keys, of_values), of_bias)


@lru_cache(maxsize=16)
def _of_dictionaries(M: int, N: int, F: int, ks: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Of the dictionary of each of M N rows the number of its first atom [M N,1], and whether a place is among its k
    [M N,k]: dictionaries of one stack may have another. Made once: on a device a list is a copy that waits."""
    dictionary = torch.arange(M).repeat_interleave(N)[:, None]
    asked = torch.arange(max(ks)) < torch.tensor(ks)[dictionary]
    return (F * dictionary).to(device), asked.to(device)


@lru_cache(maxsize=64)
def _numbers(*shape: int, device: torch.device, first: int = 0) -> Tensor:
    """Numbers one after the other in a shape, made once."""
    return torch.arange(first, first + math.prod(shape), device=device).view(shape)


def _decoded(p: dict[str, Tensor], keys: Tensor, values: Tensor, chosen: Chosen, by_error: Tensor) -> Decoded:
    """Errors and gradients, some rows at a time: a row is a sum of k R terms of atoms less its own S. `by_error` are
    the coefficients in the gradient of the mean error."""
    (M, N, S, K), (F, R, V), k = keys.shape, p["w"].shape[1:], chosen.atoms.shape[1]
    lefts = torch.cat([p["v"].flatten(0, 2), keys.flatten(0, 2)])  # [M F R + M N S,K]
    rights = torch.cat([p["w"].flatten(0, 2), values.flatten(0, 2)])
    of_atoms = _terms(chosen.atoms, R)
    own = _numbers(M * N, S, first=M * F * R, device=keys.device)
    index = torch.cat([of_atoms, own], 1)  # [M N,k R + S]
    sizes = pad(_of_terms(chosen.code, R), (0, S), value=-1.0)
    by_atom = keys.new_zeros(M * F * R, K + V)
    by_term = list[Tensor]()
    errors = list[Tensor]()
    for rows in _blocks(M * N, (k * R + S) * max(K, V), keys.device):
        size, terms = sizes[rows], index[rows]
        left = embedding(terms, lefts)
        right = embedding(terms, rights)
        by_left, by_right = _products_of_three(left, right, size)
        inner = (by_left * left).sum(-1)
        by_term.append(inner[:, : k * R])
        errors.append((inner * size).sum(1))
        change = torch.cat([by_left[:, : k * R], by_right[:, : k * R]], 2)
        change.mul_(_of_terms(by_error[rows], R)[..., None])
        by_atom.index_add_(0, of_atoms[rows].flatten(), change.flatten(0, 1))
    of_terms = _joined(by_term)
    by_code = (of_terms if R == 1 else of_terms.unflatten(1, (k, R)).sum(2)) + chosen.of_bias
    return Decoded(_joined(errors), by_code * chosen.active * (2 / N), by_atom)


def _products_of_three(left: Tensor, right: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """E w of each term w and E^T v of each v, where E = sum_i size_i left_i right_i^T [n,terms,K], [n,terms,V]."""
    width, K, V = left.shape[1], left.shape[2], right.shape[2]
    if 2 * width * (K + V) < 3 * K * V:  # the cheaper order of a product of three, by 6 at k 4, or 2 at k 64
        by_left = ((right @ right.mT) * size[:, None]) @ left
        by_right = ((left @ left.mT) * size[:, None]) @ right
        return by_left, by_right
    matrix = (right * size[..., None]).mT @ left
    return right @ matrix, left @ matrix.mT


def _encoder_gradients(
    p: dict[str, Tensor], keys: Tensor, values: Tensor, chosen: Chosen, by_code: Tensor
) -> list[Tensor]:
    """[M F R,K] and [M F R,V], without what the bias adds. They are sums of rows: those for one term of an atom lie
    side by side, in a bag."""
    (M, N, S, _), (F, R), k = keys.shape, p["v"].shape[1:3], by_code.shape[1]
    of = partial(_numbers, device=keys.device)
    shape = (M * N, S, k, R)
    terms, order = _terms(chosen.atoms, R).view(-1, 1, k, R).expand(shape).flatten().sort(stable=True)
    bags = torch.searchsorted(terms, of(M * F * R))
    rows = order // (k * R)  # of [M N S], each k R times
    gradients_of_sides = []
    for side, other in zip((keys, values), reversed(chosen.sides)):
        weights = (by_code[:, None, :, None] * other).flatten().index_select(0, order)
        summed = embedding_bag(rows, side.flatten(0, 2), bags, mode="sum", per_sample_weights=weights)
        gradients_of_sides.append(summed)
    return gradients_of_sides


def _bias_gradient(p: dict[str, Tensor], keys: Tensor, values: Tensor, by_shift: Tensor, by_product: Tensor) -> Tensor:
    """[M,K*V] of the mean error."""
    (M, N, _, K), V = keys.shape, values.shape[3]
    v, w, v_enc, w_enc = (p[name] for name in FACTORS)
    of_atoms, of_rows, of_encoder = (
        left.flatten(1, 2).mT @ right.flatten(1, 2)
        for left, right in ((v * by_product, w), (keys * (-2 / N), values), (v_enc * by_shift, w_enc))
    )
    return (of_atoms + of_rows - of_encoder).add(p["b_dec"].view(M, K, V), alpha=2).flatten(1)


def _bias_errors(p: dict[str, Tensor], keys: Tensor, values: Tensor) -> Tensor:
    """[M,N] |B|^2 - 2 <X, B>."""
    bias = p["b_dec"].view(len(keys), keys.shape[3], values.shape[3])
    return bias.square().sum((1, 2))[:, None].sub((_each(keys, bias) * values).sum((2, 3)), alpha=2)


def _terms(atoms: Tensor, R: int) -> Tensor:
    """[M N,k R] numbers of the terms of atoms [M N,k]."""
    return atoms if R == 1 else (atoms[..., None] * R + _numbers(R, device=atoms.device)).flatten(1)


def _of_terms(x: Tensor, R: int) -> Tensor:
    """[M N,k R] numbers of atoms [M N,k] for each of their terms."""
    return x if R == 1 else x.repeat_interleave(R, 1)


def _by_atom(atoms: Tensor, x: Tensor, M: int, p: dict[str, Tensor]) -> Tensor:
    """[M,F,1,1] sums of x [M N,k] over the rows that have the atom."""
    F = p["v"].shape[1]
    return x.new_zeros(M * F).index_add_(0, atoms.flatten(), x.flatten()).view(M, F, 1, 1)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Blocks one after the other."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _select(
    keys: Tensor, values: Tensor, v_enc: Tensor, w_enc: Tensor, shift: Tensor, gain: Tensor, ks: Sequence[int]
) -> list[Tensor]:
    """The max(ks) atoms on top for each row [M*N,k], and inner products of the row's keys, and of its values times the
    `gain`, with those of the encoder [M*N,S,k,R]."""
    (M, N, S, _), (F, R), k = keys.shape, v_enc.shape[1:3], max(ks)
    encoder, offset = (v_enc, w_enc * gain[..., None, None]), (shift * gain)[:, None]
    found, blocks = list[tuple[Tensor, ...]](), list(_blocks(N, M * F * R * S, keys.device))
    room = keys.new_empty(3, M, blocks[0].stop, S * F * R)  # allocating it for each block would take half the time
    for rows in blocks:
        n = rows.stop - rows.start
        sides = [
            torch.bmm(x[:, rows].flatten(1, 2), side.flatten(1, 2).mT, out=out[:, :n].view(M, n * S, F * R))
            for x, side, out in zip((keys, values), encoder, room)
        ]
        of_keys, of_values = (x.view(M, n, S, F, R) for x in sides)
        scores = offset
        for s, r in product(range(S), range(R)):
            scores = torch.addcmul(scores, of_keys[:, :, s, :, r], of_values[:, :, s, :, r], out=room[2, :, :n, :F])
        top = top_atoms(scores, k, ordered=min(ks) < k)
        at = top[:, :, None, :, None].expand(-1, -1, S, -1, R)
        found.append((top, of_keys.gather(3, at), of_values.gather(3, at)))
    parts = found[0] if len(found) == 1 else [torch.cat(each, 1) for each in zip(*found)]
    return [part.flatten(0, 1) for part in parts]


def with_aux(
    p: dict[str, Tensor],
    of_rows: Callable[[Tensor, Tensor], Tensor],
    dense: Callable[[], Tensor],
    step: Step,
    cfg: Config,
    dead_atoms: Dead | None,
) -> Step:
    """A step and SAELens' auxiliary loss of TopK, whose gradients it adds: of the dead atoms the most active
    ones, at most K V / 2, reconstruct what the step left.

    It takes the cheaper of two ways for D dead atoms: by inner products of atoms, D F (K + V) + N D (K + V + k + D), or
    by matrices, N D K V.

    Args:
        of_rows: inner products [M,N,D] of the rows with [M,D,R,K] and [M,D,R,V].
        dense: the rows [M,N,K,V].
    """
    if dead_atoms is None:
        return step
    dead, most = dead_atoms
    (M, N, k), F, wanted = step.atoms.shape, dead.shape[1], cfg.d_in // 2
    index = dead.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :most]
    v, w, v_enc, w_enc = (p[name].take_along_dim(index[..., None, None], 1) for name in FACTORS)
    bias = p["b_dec"].view(M, cfg.d_k, cfg.d_v)
    shift = p["b_enc"].gather(1, index) - cfg.apply_b_dec_to_input * (_each(v_enc, bias) * w_enc).sum((2, 3))
    acts = of_rows(v_enc, w_enc) + shift[:, None]
    by = acts.detach() * (_norms(v, w).detach()[:, None] if cfg.rescale_acts_by_decoder_norm else 1)
    there = dead.gather(1, index)[:, None].expand_as(by)
    top = by.masked_fill(~there, -torch.inf).topk(min(wanted, most), sorted=False).indices
    code = acts * (torch.zeros_like(by).scatter(-1, top, 1) * there)
    numbers, given, every = step.atoms.flatten(0, 1), step.code.flatten(0, 1), (p["v"].detach(), p["w"].detach())
    if (F / N + 1) * (cfg.d_k + cfg.d_v) + k + most < cfg.d_in:  # by a factor of 3 to 14, one way or the other
        of_atoms = inners(*every, v, w).flatten(0, 1)
        explained = embedding_bag(numbers, of_atoms, mode="sum", per_sample_weights=given).view(M, N, -1)
        left = of_rows(v, w) - (_each(v, bias.detach()) * w).sum((2, 3))[:, None] - explained
        errors = step.errors + ((code @ inners(v, w, v, w) - 2 * left) * code).sum(-1)
    else:
        keys, values = (embedding(numbers, x.flatten(0, 1).flatten(1)).view(M * N, -1, x.shape[3]) for x in every)
        given = given.repeat_interleave(cfg.rank, 1)[..., None]
        left = torch.baddbmm((dense() - bias.detach()[:, None]).flatten(0, 1), (keys * given).mT, values, alpha=-1)
        atoms = khatri_rao(v.flatten(0, 1), w.flatten(0, 1)).view(M, most, -1)
        errors = torch.baddbmm(left.view(M, N, -1), code, atoms, alpha=-1).square().sum(-1)
    aux = (dead.sum(1).to(errors) / wanted).clamp_max(1) * errors.mean(1)
    (cfg.aux_loss_coefficient * aux).sum().backward()
    return step._replace(aux=aux.detach())


def inners(keys: Tensor, values: Tensor, v: Tensor, w: Tensor) -> Tensor:
    """<X_n, A_f> [M,N,F] of sum_s k_s u_s^T [M,N,S,K], [M,N,S,V] and sum_r v_r w_r^T [M,F,R,K], [M,F,R,V]."""
    sides = ((x.flatten(1, 2) @ side.flatten(1, 2).mT) for x, side in ((keys, v), (values, w)))
    return torch.mul(*sides).view(*keys.shape[:3], *v.shape[1:3]).sum((2, 4))


def _norms(v: Tensor, w: Tensor) -> Tensor:
    """[M,F] of atoms, above 0."""
    return ((v @ v.mT) * (w @ w.mT)).sum((2, 3)).clamp_min(1e-36).sqrt()


def top_atoms(scores: Tensor, k: int, *, ordered: bool = False) -> Tensor:
    """[...,k] numbers of the k largest of [...,F], exact: they lie in the k groups whose maxima are the largest."""
    F, size = scores.shape[-1], 4
    if k == 1:
        return scores.argmax(-1, keepdim=True)
    if F % size or 4 * size * k > F or scores.device.type != "cpu":  # a device selects without sorting
        return scores.topk(k, sorted=ordered).indices
    groups = top_atoms(scores.unflatten(-1, (size, F // size)).amax(-2), k)  # atom f is in group f % (F / size)
    members = (groups[..., None, :] + F // size * torch.arange(size, device=groups.device)[:, None]).flatten(-2)
    return members.gather(-1, scores.gather(-1, members).topk(k, sorted=ordered).indices)


def _each(side: Tensor, matrices: Tensor) -> Tensor:
    """Vectors [M,F,R,D] times the matrix of their dictionary [M,D,D']."""
    return (side.flatten(1, 2) @ matrices).unflatten(1, side.shape[1:3])


def _blocks(n: int, width: int, device: torch.device) -> Iterator[slice]:
    size = max(16, (BLOCK if device.type == "cpu" else DEVICE_BLOCK) // max(width, 1))
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


# ------------------------------------------------------------------------------------------------ the loop


def _held(writes: Sequence[LowRank], device: torch.device) -> Sequence[LowRank]:
    """Writes on the device of training, where they take less than half of what is free there: no step then copies."""
    different = {id(part): part for part in writes}
    needed = sum(part.keys.nbytes + part.values.nbytes for part in different.values())
    free = getattr(torch.get_device_module(device), "mem_get_info", None)
    if device.type == "cpu" or free is None or 2 * needed > free(device)[0]:
        return writes
    there = {name: part.to(device) for name, part in different.items()}
    return [there[id(part)] for part in writes]


class Stack:
    """M dictionaries in training. Atom f of dictionary m is number m F + f of all. Parameters of the M autoencoders are
    views of the stacked ones, `p`, so that their own upkeep works on them.

    A subclass trains on other rows with `rows`, `losses` and `matrices`.
    """

    together = 1
    """Rows that are drawn together, and have one number."""

    def __init__(self, members: Sequence[tuple[RunnerConfig, LowRank, Metric | None]]):
        self.configs, self.writes, self.metrics = zip(*members)
        self.saes = [new_sae(cfg, metric) for cfg, _, metric in members]
        self.runner, self.cfg = self.configs[0], cast("Config", self.saes[0].cfg)
        self.ks = [int(cfg.sae.k) for cfg in self.configs]
        self.p: dict[str, Tensor] = torch.func.stack_module_state(self.saes)[0]
        for (m, sae), (name, x) in product(enumerate(self.saes), self.p.items()):
            sae.get_parameter(name).data = x.data[m]
        self.scales = [1.0] * len(members)
        for m in range(len(members) if self.cfg.normalize_activations != "none" else 0):  # as SAELens scales inputs
            squares = [sizes(self.matrices(self.rows(m, part))) for part in self._spread(m, 32_768)]
            self.scales[m] = self.cfg.d_in**0.5 / float(torch.cat(squares).sqrt().mean())
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
        self.silent = torch.zeros(self.p["b_enc"].shape, dtype=torch.long, device=self.runner.device)
        self.step = 0
        self.looks = 1 if self.silent.device.type == "cpu" else LOOK
        self.errors = self.p["b_dec"].new_zeros(())
        """Sum since the last look: NaN or infinite from the first that is."""
        self.most_dead: int | None = None
        """At least as many atoms as a dictionary has dead before the next look."""

    def _spread(self, m: int, most: int) -> Sequence[Tensor]:
        """Numbers of at most so many rows of a dictionary, evenly spaced, for a thousand rows at a time."""
        n = len(self.writes[m])
        return torch.linspace(0, n - 1, min(n, most // self.together)).long().split(1024 // self.together)

    def place(self, writes: LowRank) -> torch.device:
        """Where numbers of rows are used."""
        return writes.keys.device

    def rows(self, m: int, index: Tensor) -> LowRank:
        """Some rows of a dictionary [n], as it sees them: in its metric, then scaled."""
        metric, like = self.metrics[m], self.p["b_dec"]
        part = self.writes[m].rows(index.to(self.writes[m].keys.device)).to(like.device).to(like.dtype)
        part = metric.move(part) if metric else part
        return part if self.scales[m] == 1 else part * self.scales[m]

    def losses(
        self, p: dict[str, Tensor], batch: Sequence[LowRank], ks: Sequence[int], dead: Dead | None = None
    ) -> Step:
        """A step on N rows of each dictionary; puts the gradients of its losses into the parameters `p`. The loss of
        `dead` atoms is among them, where they are given."""
        if len(batch) == 1:
            keys, values = batch[0].keys[None], batch[0].values[None]
        else:
            keys, values = (torch.stack(side) for side in zip(*((rows.keys, rows.values) for rows in batch)))
        return gradients(p, keys, values, ks, self.cfg, dead)

    def matrices(self, rows: LowRank) -> LowRank | Tensor:
        """Rows of one dictionary as its upkeep takes them: of low rank, or flattened [n,K*V]."""
        return rows

    def train(self, file: Path | None) -> list[MatrixTrainingSAE]:
        """All steps from those of a checkpoint on, where there is one, and the dictionaries.

        Raises:
            ValueError: a checkpoint of other settings or other rows, or a file that is none; names it. A checkpoint
                that is damaged is renamed, with a DamageWarning, and training begins again.
        """
        if file is not None and file.exists():
            self._resume(file)
        batch, steps = self.trainer.train_batch_size_samples, self.trainer.total_training_steps
        order = [
            shuffled(len(rows), batch // self.together, cfg.seed, self.step, self.place(rows))
            for rows, cfg in zip(self.writes, self.configs)
        ]
        size = len(self.saes) * batch * self.cfg.d_sae * self.cfg.rank * (self.cfg.d_k + self.cfg.d_v)
        saved, log, quiet = time.monotonic(), self.runner.logger, not self.runner.verbose
        with ExitStack() as scope:
            scope.enter_context(threads_for(size))
            runs = [scope.enter_context(wandb_run(cfg, reinit="create_new")) for cfg in self.configs]
            for _ in tqdm(range(self.step, steps), initial=self.step, total=steps, desc="Training SAE", disable=quiet):
                batch = [self.rows(m, next(numbers)) for m, numbers in enumerate(order)]
                done = self.take(batch)
                if log.log_to_wandb and self.step % log.wandb_log_frequency == 0:
                    for m, run in enumerate(runs):
                        run.log(self._measured(done, m, self.matrices(batch[m])), step=self.step)
                if file is not None and time.monotonic() - saved > SAVE_SECONDS:
                    self._check_finite()
                    state = self._state()
                    atomic_write(file, partial(torch.save, state | {"sha256": content_hash(state)}))
                    saved = time.monotonic()
        self._check_finite()
        found = [self._finished(m) for m in range(len(self.saes))]
        if file is not None:
            file.unlink(missing_ok=True)
        return found

    def take(self, batch: Sequence[LowRank]) -> Step:
        """Upkeep, losses, clipped gradients, the optimizer's step, and the count of atoms that did not fire.

        Raises:
            ValueError: NaN or infinite errors.
        """
        window = self.trainer.dead_feature_window
        if self.most_dead is None or self.step % self.looks == 0:
            dying = self.silent > window - self.looks + 1
            self.most_dead = int(dying.sum(1).max())
        dead = Dead(self.silent > window, self.most_dead) if self.most_dead else None
        if self.step < START_STEPS or any(
            n and self.step % n == 0 for n in (self.cfg.unit_norm_every, self.cfg.resample_every)
        ):
            of_one = [None] * len(self.saes) if dead is None else dead.atoms
            for m, (sae, cfg) in enumerate(zip(self.saes, self.configs)):
                with seeded(cfg.seed, self.step):
                    sae._upkeep(self.matrices(batch[m]), self.step, of_one[m])  # pyright: ignore  (decorator)
        done = self.losses(self.p, batch, self.ks, dead if self.cfg.aux_loss_coefficient else None)
        self.errors += done.errors.sum()
        if self.step % self.looks == 0:
            self._check_finite()
        with torch.no_grad():
            self._clip()
        self.optimizer.step()
        self.schedule.step()
        since = (done.code <= 0) * NEVER
        self.silent += 1
        self.silent.view(-1).scatter_reduce_(0, done.atoms.flatten(), since.flatten(), "amin")
        self.step += 1
        return done

    def _check_finite(self) -> None:
        if not bool(self.errors.isfinite()):
            raise ValueError(f"step {self.step}: expected finite errors, got NaN or infinity: of the writes, or of lr")
        self.errors.zero_()

    def _clip(self) -> None:
        """clip_grad_norm_, of each dictionary."""
        if len(self.saes) == 1 and self.silent.device.type != "cpu":  # half of the launches
            nn.utils.clip_grad_norm_(list(self.p.values()), 1.0, foreach=True)
            return
        every = [cast(Tensor, x.grad).flatten(1) for x in self.p.values()]
        norms = torch.stack([x.square().sum(1) for x in every]).sum(0).sqrt()
        factor = (1 / (norms + 1e-6)).clamp_max(1)[:, None]
        for x in every:
            x.mul_(factor)

    def _measured(self, done: Step, m: int, rows: LowRank | Tensor) -> dict[str, float]:
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
    def _finished(self, m: int) -> MatrixTrainingSAE:
        """A dictionary with its own weights, whose reconstructions are right on average over `b_dec_rows` rows."""
        sae, metric, metadata = self.saes[m], self.metrics[m], self.saes[m].cfg.metadata
        for parameter in sae.parameters():
            parameter.data = parameter.data.clone()
        parts = self._spread(m, sae.cfg.b_dec_rows or self.trainer.train_batch_size_samples)
        code, mean, active = torch.zeros_like(sae.b_enc), torch.zeros_like(sae.b_dec), 0
        total = self.together * sum(map(len, parts))
        for part in parts:
            rows = self.rows(m, part)
            done = self.losses({n: nn.Parameter(x[m : m + 1]) for n, x in self.p.items()}, [rows], self.ks[m : m + 1])
            code.index_add_(0, done.atoms.flatten(), done.code.flatten() / total)
            mean += mean_row(self.matrices(rows)) * (self.together * len(part) / total)
            active += int((done.code > 0).sum())
        if sae.cfg.b_dec_rows:
            sae.move_b_dec(mean - sae.b_dec - code @ sae.W_dec)
        sae.fold_activation_norm_scaling_factor(self.scales[m])
        metadata.l0 = active / total
        metadata.n_training_rows = len(self.writes[m]) * self.together
        metadata.num_dead_features = int((self.silent[m] > self.trainer.dead_feature_window).sum())
        return sae if metric is None else metric.fold(sae)

    # -- checkpoints

    def _state(self) -> dict[str, Any]:
        return {
            "settings": repr([(shape_of(cfg), cfg.seed, cfg.sae.k, cfg.hook_name) for cfg in self.configs]),
            "inputs": self.inputs,
            "step": self.step,
            "silent": self.silent,
            "saes": nn.ModuleList(self.saes).state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
        }

    @cached_property
    def inputs(self) -> str:
        """Names the rows that it trains on, and the metrics. Costs a pass over them."""
        writes = [[rows.keys, rows.values] for rows in self.writes]
        return content_hash([writes, [metric and vars(metric) for metric in self.metrics]])

    def _resume(self, file: Path) -> None:
        content = BytesIO(file.read_bytes())
        try:
            state = torch.load(content, map_location=self.runner.device, weights_only=True)
        except (EOFError, KeyError, OSError, RuntimeError, ValueError, UnpicklingError) as error:
            set_aside(file, str(error).partition("\n")[0])
            return
        mine = self._state()
        if not isinstance(state, dict) or state.keys() != {*mine, "sha256"}:
            raise ValueError(f"{file}: expected no file, or a checkpoint of this training, got another; name another")
        if state.pop("sha256") != content_hash(state):
            set_aside(file, "its numbers are not those of its checksum")
            return
        for name, what in (("settings", "settings"), ("inputs", "rows, or in the same metric")):
            if state[name] != mine[name]:
                raise ValueError(f"{file}: expected a checkpoint of these {what}, got one of others; delete it")
        self.step, self.silent = state["step"], state["silent"]
        for part, name in (
            (nn.ModuleList(self.saes), "saes"),
            (self.optimizer, "optimizer"),
            (self.schedule, "schedule"),
        ):
            part.load_state_dict(state[name])
