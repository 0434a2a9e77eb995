"""The three formulas: F2 is the derivative in every family, F1 and F0 are right where they are exact."""

from __future__ import annotations

from functools import lru_cache, partial

import pytest
import torch
from recurrences import random_recurrence
from saes import random_low_rank
from tiny_models import EACH_LAYOUT, MAKERS, MAMBA1, VOCAB, fast_of, hooked_in_float64
from torch import Tensor
from torch.testing import assert_close

from hookpoints import HookedRecurrent, WriteEdit
from writesae.head.writes import head_writes
from writesae_study.experiment.predictors import ReadGradients, predict, read_weights

float64 = pytest.mark.usefixtures("_keep_float64")

tiny = lru_cache(maxsize=4)(partial(hooked_in_float64, backend="recurrence"))


class Case:
    """One matrix of rank 2 added to one head at one token, and one logit later."""

    start, position, token = 7, 19, 5

    def __init__(self, model: HookedRecurrent, layer: int | None = None):
        self.model = model
        self.layer = model.cfg.recurrent_layers[0] if layer is None else layer
        shape = model.cfg.layer(self.layer)
        self.head = shape.H - 1
        self.session = model.edit_session(torch.randint(1, VOCAB, (1, 24), generator=torch.Generator().manual_seed(1)))
        self.recurrence = self.session.recurrence(self.layer).select(heads=slice(self.head, self.head + 1))
        unit = head_writes(self.recurrence, 0).norm()[self.start]
        self.added = random_low_rank(2, 2, n=1, k=shape.K, v=shape.V).with_norm(unit[None])

    @torch.no_grad()
    def predicted(self) -> Tensor:
        """[3], F0, F1 and F2."""
        gradients = ReadGradients(self.model, self.session, self.layer, self.head, [self.position, self.start])
        return predict(self.recurrence, self.added, self.start, [gradients.at(self.position, self.token)])[0, 0]

    def measured(self, eps: float) -> float:
        place = (self.layer, self.head, self.start)
        rows = [[WriteEdit(*place, self.added.keys[0], eps * self.added.values[0])], []]
        edited, plain = self.session.run(rows, stop=self.position + 1).logits[:, -1, self.token]
        return float(edited - plain)


@float64
@pytest.mark.parametrize("kind", fast_of(EACH_LAYOUT, MAKERS.keys() - {*MAMBA1, "glm5_next", "qwen4_exp"}))
def test_f2_is_the_derivative(kind: str) -> None:
    case, eps = Case(tiny(kind)), 1e-3
    slope = (case.measured(eps) - case.measured(-eps)) / (2 * eps)
    assert float(case.predicted()[2]) == pytest.approx(slope, rel=1e-4)


@float64
@pytest.mark.parametrize(
    ("kind", "layer", "silent"),
    [
        ("mamba2", 2, ()),
        ("qwen3_5", 2, ("3.self_attn.o_proj.weight", "2.mlp.down_proj.weight", "3.mlp.down_proj.weight")),
        ("olmo_hybrid", 2, ("3.self_attn.o_proj.weight", "2.mlp.down_proj.weight", "3.mlp.down_proj.weight")),
        ("falcon_h1", 2, ("2.feed_forward.down_proj.weight",)),
        ("granitemoehybrid", 2, ("2.shared_mlp.output_linear.weight",)),
    ],
)
def test_f1_is_exact_where_there_is_only_the_direct_path(kind: str, layer: int, silent: tuple[str, ...]) -> None:
    """Nothing comes after the mixer but the final norm; residual multipliers and post-norms included."""
    model = tiny(kind, seed=3, zeroed=silent)
    _, f1, f2 = Case(model, layer).predicted()
    assert float(f2) != 0
    assert_close(f1, f2, rtol=1e-9, atol=0)


@float64
@pytest.mark.parametrize("kind", ["qwen3_5", "mamba2", "kimi_linear"])
def test_f0_is_the_papers_formula(kind: str) -> None:
    """Decay per head, or per key channel inside the inner product, step by step."""
    case = Case(tiny(kind))
    r, expected = case.recurrence, 0.0
    alpha = torch.ones(r.K, dtype=torch.float64)
    for t in range(case.start + 1, case.position + 1):
        alpha = alpha * r.log_decay[0, t, 0].exp()
    out = (case.model.layer_W_O(case.layer)[case.head] @ case.model.W_U[:, case.token]).detach()
    for key, value in zip(case.added.keys[0], case.added.values[0]):
        expected += float((alpha * key) @ r.q[0, case.position, 0] * r.scale * (value @ out))
    assert float(case.predicted()[0]) == pytest.approx(expected, rel=1e-10)


def test_read_weights_are_the_linear_response_where_reads_come_before_writes() -> None:
    start, r = 3, random_recurrence("rwkv6", T=11, H=1, K=6, V=4, dtype=torch.float64)
    key, value = torch.randn(6, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    edit = torch.eye(r.T, dtype=torch.float64)[start, :, None]  # 1 at the token that is written to
    response = r.with_write((edit * key)[None, :, None], (edit * value)[None, :, None]).outputs()[0, start:, 0]
    assert_close(read_weights(r, key[None, None], start, r.T)[0, 0, :, None] * value, response, rtol=1e-10, atol=1e-13)
