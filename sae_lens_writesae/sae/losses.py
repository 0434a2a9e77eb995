"""What a dictionary is trained for besides reconstruction: the reads of its head, or atoms that point along the write.

This file has the formulas. What they compare with (queries, writes of the same tokens) reaches the training step as
further columns of the activations: `sae.runner` appends them, `MatrixTrainingSAE` takes them off again.
"""

import torch
from torch import Tensor

from hookpoints import Recurrence


def read_loss(error: Tensor, queries: Tensor) -> Tensor:
    """Mean over rows of |E^T q|^2, in units of the squared error: [N,K,V], [N,K] -> [].

    It is multiplied by K / mean |q|^2, so that the size of the queries does not matter, and for queries without a
    preferred direction the loss equals the reconstruction loss, the mean of |E|^2 (Frobenius). It is zero where all
    reads agree, whatever else the error E holds. A row without a query (all zero) counts as read without error.

    The query of a row is the one that reads the state at the row's own token (`read_queries`). A state is read by it,
    so that for states the loss is what it says. A **write** stays in the state and is read by later queries as well,
    at what decay and erase leave of it: for writes the loss weighs the first of these reads only.
    """
    size = queries.square().sum(-1).mean().clamp_min(torch.finfo(queries.dtype).tiny)
    return torch.einsum("nkv,nk->nv", error, queries).square().sum(-1).mean() * queries.shape[-1] / size


def write_loss(cosine: Tensor, contribution: Tensor) -> Tensor:
    """Mean over rows of 1 - sum_f p_f cos(A_f, W), p_f being the atom's share of the code: [N,F], [N,F] -> [].

    It lies between 0 (every active atom points along the write) and 2, and is 1 where nothing is active.
    """
    total = contribution.sum(-1, keepdim=True)
    return 1 - (contribution / total.clamp_min(torch.finfo(total.dtype).tiny) * cosine).sum(-1).mean()


def read_queries(recurrence: Recurrence) -> Tensor:
    """[B,T,H,K] the query that reads the state after each token.

    It is the token's own query, or the next token's where the rule reads before it writes (zero for the last token).
    """
    q = recurrence.q
    if recurrence.read_before_write:
        return torch.cat([q[:, 1:], torch.zeros_like(q[:, :1])], dim=1)
    return q
