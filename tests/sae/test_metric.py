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


def test_the_quadratic_form_predicts_the_kl_of_real_edits(embedded: Any) -> None:
    """KL of all later tokens against (1/2) E^T G E with exact gradients (draws averaged), and against the Kronecker
    form that was fitted to other text."""
    layer, head, length, positions, draws = 4, 1, 48, [5, 14, 23], 48
    train_tokens = sample_sequences(embedded, shipped.text("train"), 64, 32)
    metric = fit_metrics(embedded, train_tokens, [(layer, head)])[layer, head]
    generator = torch.Generator().manual_seed(0)
    measured, exact, changes = [], [], []
    for tokens in sample_sequences(embedded, shipped.text("test"), length, 3).split(1):
        session = embedded.edit_session(tokens)
        of_layer, gradients = read_scores(embedded, tokens.expand(draws, -1), [layer], generator)[layer]
        scores = ReadScores(of_layer.select(heads=head), gradients[:, :, head : head + 1])
        backwards = scores.recurrence.adjoint(scores.gradients).states()  # of the last token first
        gradients = backwards.flip(1)[:, positions, 0].double()
        k, u = (x[0, :, 0].double() for x in (scores.recurrence.k, scores.recurrence.u))
        rows = []
        for i, t in enumerate(positions):
            noise = normal(2, len(k[0]) + len(u[0]), seed=t)
            for key, value in ((k[t], -u[t]), (k[t + 20], 0.5 * u[t + 20]), noise[0].split([len(k[0]), len(u[0])])):
                key, value = key / key.norm() * k[t].norm(), value / value.norm() * u[t].norm()
                rows.append([WriteEdit(layer, head, t, key, value)])
                changes.append((key, value))
                exact.append(0.5 * (gradients[:, i] @ value @ key).square().mean())
        run = session.run(rows)
        native = session.logits[0, run.start :].double().log_softmax(-1)
        measured.append((native.exp() * (native - run.logits.double().log_softmax(-1))).sum((1, 2)))
    kl, quadratic = torch.cat(measured), torch.stack(exact)
    change = LowRank.rank_one(*(torch.stack(side) for side in zip(*changes)))

    def correlation(predicted: Tensor) -> float:
        return float(torch.corrcoef(torch.stack([predicted.log(), kl.log()]))[0, 1])

    kronecker, frobenius = metric.nats(change), change.inner(change)
    assert correlation(quadratic) > 0.9
    assert 0.6 < quadratic.sum() / kl.sum() < 1.5
    assert correlation(kronecker) > correlation(frobenius) + 0.1
    assert 0.3 < kronecker.sum() / kl.sum() < 3


pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
