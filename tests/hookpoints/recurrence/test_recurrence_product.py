"""A token of several delta steps (Gated DeltaProduct) as one rank-R write and one rank-R erase."""

from __future__ import annotations

import pytest
import torch
from recurrences import random_recurrence
from torch.nn import functional as F
from torch.testing import assert_close

from hookpoints.recurrence import Recurrence, carried_keys

B, T, H, K, V = 2, 41, 3, 6, 4
EXACT = {"rtol": 1e-11, "atol": 1e-11}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def steps_of(R: int, negative: bool) -> dict[str, torch.Tensor]:
    """Raw micro-steps: R keys, values and strengths a token; one decay, met before the first of them."""
    return {
        "q": normal(B, T, H, K, seed=1),
        "k": F.normalize(normal(B, T, H, R, K, seed=2), dim=-1),
        "v": normal(B, T, H, R, V, seed=3),
        "beta": torch.sigmoid(normal(B, T, H, R, seed=4)) * (2 if negative else 1),
        "g": -F.softplus(normal(B, T, H, seed=5)),
        "initial_state": normal(B, H, K, V, seed=6),
    }


def by_token(q, k, v, beta, g, initial_state) -> Recurrence:
    b = g.exp()[..., None, None] * k
    u = beta[..., None] * v
    return Recurrence(q, carried_keys(k, beta), u, g, b=b, beta=beta, scale=K**-0.5, initial_state=initial_state)


def by_step(q, k, v, beta, g, initial_state) -> Recurrence:
    """The same as T*R tokens of rank 1, of which the last of each R is read."""
    R = k.shape[3]

    def in_time(x: torch.Tensor) -> torch.Tensor:
        return x.transpose(2, 3).flatten(1, 2)

    first = torch.cat([g[:, :, None], g.new_zeros(B, T, R - 1, H)], 2).flatten(1, 2)
    key, strength = in_time(k), in_time(beta)
    queries, writes, reads = q.repeat_interleave(R, 1), strength[..., None] * in_time(v), first.exp()[..., None] * key
    return Recurrence(queries, key, writes, first, b=reads, beta=strength, scale=K**-0.5, initial_state=initial_state)


every_rank = pytest.mark.parametrize(("R", "negative"), [(1, False), (2, True), (3, False), (4, True)])


@every_rank
def test_a_token_is_its_steps(R: int, negative: bool) -> None:
    tokens, steps = by_token(**steps_of(R, negative)), by_step(**steps_of(R, negative))
    assert (tokens.R, tokens.T, steps.T) == (R, T, T * R)
    for method in ("chunked", "reference"):
        found = tokens.scan(method=method)
        assert_close(found.outputs, steps.outputs(method="reference")[:, R - 1 :: R], **EXACT)
        assert_close(found.final_state, steps.final_state(method="reference"), **EXACT)
    assert_close(tokens.states(1, [0, 7, -1]), steps.states(1, slice(R - 1, None, R))[:, [0, 7, -1]], **EXACT)


def test_rank_of_write_and_erase_are_free() -> None:
    """A write of rank 3 on a transition of rank 1 (as edits make them), and the other way round."""
    r = random_recurrence("rwkv7", B=B, T=T, H=H, K=K, V=V, dtype=torch.float64)
    k, u = normal(B, T, H, 3, K), normal(B, T, H, 3, V, seed=1)
    found = r.with_write(k, u)
    apart = [r.with_write(k[:, :, :, i], u[:, :, :, i]).outputs() for i in range(3)]
    assert_close(found.outputs(), torch.stack(apart).sum(0), **EXACT)
    assert_close(found.outputs(), found.outputs(method="reference"), **EXACT)
    one = by_token(**steps_of(3, True)).with_write(k[:, :, :, 0], u[:, :, :, 0])
    assert_close(one.outputs(), one.outputs(method="reference"), **EXACT)
    with pytest.raises(ValueError, match=r"each term of the write has its own erase.*3, 6.*"):
        found.corrected_values()


def test_wrong_ranks_are_refused() -> None:
    r = by_token(**steps_of(2, False))
    with pytest.raises(ValueError, match=r"^u "):
        r.replace(u=normal(B, T, H, 3, V))
    with pytest.raises(ValueError, match=r"^a "):
        r.replace(a=normal(B, T, H, 3, K))
    with pytest.raises(ValueError, match="each term of the write erases along its own key"):
        r.replace(k=normal(B, T, H, K), u=normal(B, T, H, V), beta=normal(B, T, H))
    assert repr(r).startswith("Recurrence(B=2, T=41, H=3, R=2, K=6, V=4, log_decay")
