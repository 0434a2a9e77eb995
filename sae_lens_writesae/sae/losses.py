"""What a dictionary is asked for besides reconstruction: the reads of its head, or atoms that point along the write.

A training step of SAELens receives activations and nothing else, so what these losses compare with (queries, writes of
the same tokens) travels as further columns of the same rows, through SAELens' own mixing buffer and trainer
(`aligned_store`). The step takes the columns off before the autoencoder sees its input: `d_in` stays K*V, and what is
saved is an autoencoder like any other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from torch import Tensor

if TYPE_CHECKING:
    from sae_lens_writesae.sae.coding import TrainingCoding

Loss = Literal["mse", "reads", "write"]
"""``mse``: the matrix itself. ``reads``: what the head's queries get from it. ``write``: reconstruction, and atoms
along the write of the same token."""


def n_columns(loss: Loss, d_k: int, d_v: int, terms: int = 1) -> int:
    """Columns beside the matrix: the query [K], or keys and values of a write of so many rank-1 `terms`."""
    return {"mse": 0, "reads": d_k, "write": terms * (d_k + d_v)}[loss]


def read_loss(error: Tensor, queries: Tensor) -> Tensor:
    """Mean over rows of |E^T q|^2, in units of the squared error: [N,K,V], [N,K] -> [].

    Times K / mean |q|^2, so that for queries of no preferred direction it equals the mean of |E|^2 (Frobenius), the
    reconstruction loss, and the size of queries does not matter. Zero where all reads agree, whatever the rest of the
    matrices does. Rows without a query (all zero) count as read without error.
    """
    size = queries.square().sum(-1).mean().clamp_min(torch.finfo(queries.dtype).tiny)
    read = torch.einsum("nkv,nk->nv", error, queries)
    return read.square().sum(-1).mean() * queries.shape[-1] / size


def write_loss(cosine: Tensor, contribution: Tensor) -> Tensor:
    """Mean over rows of 1 - sum_f p_f cos(A_f, W), with p the atoms' shares of the code: [N,F], [N,F] -> [].

    Between 0 (all that is active points along the write) and 2; 1 where nothing is active.
    """
    total = contribution.sum(-1, keepdim=True)
    shares = contribution / total.clamp_min(torch.finfo(total.dtype).tiny)
    return 1 - (shares * cosine).sum(-1).mean()


def atom_write_cosines(sae: Any, keys: Tensor, values: Tensor) -> Tensor:
    """Signed cosines of writes sum_r k_r u_r^T and decoder atoms, differentiable in the atoms: [N,R,K], [N,R,V] ->
    [N,F]. 0 where the write is zero. Costs N F R R' (K + V); a flat decoder builds the writes."""
    if sae.cfg.decoder == "flat":
        inner = (keys.mT @ values).flatten(1) @ sae.decoder_matrix.T
    else:
        sides = (torch.einsum("nrk,fsk->nfrs", keys, sae.v), torch.einsum("nrv,fsv->nfrs", values, sae.w))
        inner = (sides[0] * sides[1]).sum((-2, -1))
    size = (keys @ keys.mT * (values @ values.mT)).sum((1, 2)).clamp_min(0).sqrt()[:, None] * sae.decoder_norm()
    return torch.where(size > 0, inner / size.clamp_min(torch.finfo(size.dtype).tiny), 0)


def step_with_loss(
    sae: TrainingCoding, step_input: TrainStepInput, run: Callable[[TrainStepInput], TrainStepOutput]
) -> TrainStepOutput:
    """`run` the step on the matrices alone, then mix in what `cfg.loss` asks for.

    The reconstruction error becomes (1 - weight) mse + weight * loss, with weight = `cfg.loss_weight`; SAELens' other
    terms stay. The loss of ``write`` is in units of the batch's variance, so that weights compare fractions of variance
    with fractions of misalignment.

    Raises:
        ValueError: the columns are missing, which is so in every runner but this package's.
    """
    cfg = sae.cfg
    if cfg.loss == "mse" or sae._step is not None:  # in a scope the columns have been taken off, by an outer call
        return run(step_input)
    matrices, beside = step_input.sae_in[:, : cfg.d_in], step_input.sae_in[:, cfg.d_in :]
    if beside.shape[1] == 0:
        raise ValueError(
            f"loss={cfg.loss!r} needs columns beside the {cfg.d_in} of the matrix (queries or writes), and the batch "
            "has none: train with sae_lens_writesae.train or WriteSAETrainingRunner, since SAELens' own runner gives "
            "none"
        )
    with sae.step_scope():
        output = run(dataclasses.replace(step_input, sae_in=matrices))
        extra = _extra_loss(sae, output, matrices, beside)
    output.losses[f"{cfg.loss}_loss"] = extra
    output.loss = output.loss + cfg.loss_weight * (extra - output.losses["mse_loss"])
    return output


def _extra_loss(sae: TrainingCoding, output: TrainStepOutput, matrices: Tensor, beside: Tensor) -> Tensor:
    cfg = sae.cfg
    if cfg.loss == "reads":
        return read_loss((output.sae_out - matrices).view(-1, cfg.d_k, cfg.d_v), beside)
    terms = beside.shape[1] // (cfg.d_k + cfg.d_v)
    keys, values = beside.split([terms * cfg.d_k, terms * cfg.d_v], dim=1)
    cosine = atom_write_cosines(sae, keys.view(-1, terms, cfg.d_k), values.view(-1, terms, cfg.d_v))
    in_units_of_contribution = getattr(cfg, "rescale_acts_by_decoder_norm", False)
    contribution = output.feature_acts if in_units_of_contribution else output.feature_acts * sae.decoder_norm()
    variance = (matrices - matrices.mean(0)).square().sum(-1).mean().detach()
    return variance * write_loss(cosine, contribution)
