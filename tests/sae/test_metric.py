"""The model's own metric: its arithmetic, what a fit recovers, and that it predicts the KL of real edits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from saes import normal, positive
from torch import Tensor
from torch.testing import assert_close

from hookpoints import Recurrence, WriteEdit
from hookpoints import embedded as shipped
from sae_lens_writesae.atom.low_rank import LowRank
from sae_lens_writesae.sae.metric import Metric
from sae_lens_writesae.sae.metric_fit import ReadScores, Sums, fit_metrics, read_scores
from writesae.experiment.tokens import sample_sequences

K, V, N = 5, 6, 11


# ---- arithmetic


def test_vectors_rows_and_inner_products_agree_with_dense_matrices() -> None:
    keys, values = normal(N, 2, K), normal(N, 2, V, seed=1)
    a, b = positive(K), positive(V, 1)
    metric = Metric.of(a, b, scale=2.0, damping=0.05, n_sequences=7)
    write = LowRank(keys, values)
    moved = metric.move(LowRank(keys, values))
    assert_close(metric.apply_rows(write.dense().flatten(1)), moved.dense().flatten(1), rtol=1e-10, atol=1e-10)
    expected = torch.einsum("nkv,kl,nlw,wv->n", write.dense(), a, write.dense(), b)
    assert_close(metric.nats(write), expected, rtol=1e-10, atol=1e-10)  # scale 2, halved
    assert_close(metric.inverse.move(moved).dense(), write.dense(), rtol=1e-10, atol=1e-10)


def test_a_metric_is_positive() -> None:
    with pytest.raises(ValueError, match="value side"):
        Metric.of(positive(K), -positive(V), 1.0, 0.05, 1)


# ---- fitting


def test_a_planted_kronecker_metric_is_recovered() -> None:
    """Single tokens, whose gradient is q g^T with independent Gaussian sides of known covariance."""
    a, b, n = positive(4), positive(3, 1), 40_000
    a, b = a * 4 / a.trace(), b * 3 / b.trace()
    q, g = normal(n, 4) @ torch.linalg.cholesky(a).mT, normal(n, 3, seed=1) @ torch.linalg.cholesky(b).mT
    k, u = normal(n, 4, seed=2), normal(n, 3, seed=3)
    sums = Sums()
    sums.add(ReadScores(Recurrence(q[:, None, None], k[:, None, None], u[:, None, None]), g[:, None, None]))
    metric = sums.metric(1e-6, n)
    change = LowRank.rank_one(normal(5, 4, seed=4), normal(5, 3, seed=5))
    predicted = 2 * metric.nats(change)
    dense = change.dense()
    assert_close(predicted, torch.einsum("nkv,kl,nlw,wv->n", dense, a, dense, b), rtol=0.05, atol=0)
    write = LowRank.rank_one(k, u)
    assert_close(metric.nats(write).sum(), metric.scale / 2 * write.inner(write).sum(), rtol=1e-4, atol=0)


def test_the_scale_is_what_deleting_writes_costs_on_average() -> None:
    """The gradient of a write is that of all later reads of it: sum over writes of <gradient, write>^2 by their
    squares."""
    q, k, u, g = (normal(1, 5, 1, size, seed=seed) for seed, size in enumerate((4, 4, 3, 3)))
    sums = Sums()
    sums.add(ReadScores(Recurrence(q, k, u), g))
    writes = (k[0].mT @ u[0]).flatten(1)
    costs = ((q[0].mT @ g[0]).flatten(1) @ writes.T).tril().sum(0).square()
    assert sums.metric(0.05, 1).scale == pytest.approx(float(costs.sum() / writes.square().sum()))


def kl_of_edits(model: Any, tokens: Tensor, place: tuple[int, int], edits: list[tuple[int, Tensor, Tensor]]) -> Tensor:
    """[n] KL of all later tokens, each edit (position, key, value) added alone to what a head writes."""
    session = model.edit_session(tokens)
    run = session.run([[WriteEdit(*place, *edit)] for edit in edits])
    native = session.logits[0, run.start :].double().log_softmax(-1)
    return (native.exp() * (native - run.logits.double().log_softmax(-1))).sum((1, 2))


def test_the_quadratic_form_predicts_the_kl_of_real_edits(embedded: Any) -> None:
    """KL of all later tokens against (1/2) E^T G E with exact gradients (draws averaged), and against the Kronecker
    form that was fitted to other text."""
    layer, head, positions, draws = 4, 1, [5, 14, 23], 48
    train_tokens = sample_sequences(embedded, shipped.text("train"), 64, 32)
    metric = fit_metrics(embedded, train_tokens, [(layer, head)])[layer, head]
    generator = torch.Generator().manual_seed(0)
    measured, exact, changes = [], [], list[LowRank]()
    for tokens in sample_sequences(embedded, shipped.text("test"), 48, 4).split(1):
        of_layer, gradients = read_scores(embedded, tokens.expand(draws, -1), [layer], generator)[layer]
        r = of_layer.select(heads=head)
        gamma = r.adjoint(gradients[:, :, head : head + 1]).states().flip(1)[:, :, 0].double()  # of each write
        keys, values = (x[0, :, 0].double() for x in (r.k, r.u))
        edits = []
        for t in positions:  # half of the write less, and that of a later token
            edits += [(t, keys[t], -0.5 * values[t]), (t, keys[t + 20], 0.5 * values[t + 20])]
            exact += [0.5 * (gamma[:, t] @ value @ key).square().mean() for _, key, value in edits[-2:]]
        measured.append(kl_of_edits(embedded, tokens, (layer, head), edits))
        changes += [LowRank.rank_one(key[None], value[None]) for _, key, value in edits]
    kl, quadratic = torch.cat(measured), torch.stack(exact)
    kronecker = torch.cat([metric.nats(change) for change in changes])
    frobenius = torch.cat([change.inner(change) for change in changes])

    def correlation(predicted: Tensor) -> float:
        return float(torch.corrcoef(torch.stack([predicted.log(), kl.log()]))[0, 1])

    assert correlation(quadratic) > 0.9
    assert 0.6 < quadratic.sum() / kl.sum() < 1.5
    assert correlation(kronecker) > 0.5
    assert correlation(kronecker) > correlation(frobenius) + 0.1
    assert 0.3 < kronecker.sum() / kl.sum() < 3


pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
