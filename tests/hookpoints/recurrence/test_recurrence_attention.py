"""Attention of recurrent heads: A u is what is read, to 1e-10, for every rule; nothing lies above the diagonal."""

from __future__ import annotations

import pytest
import torch
from recurrences import FORMS, random_recurrence
from torch.testing import assert_close

from hookpoints.recurrence import Recurrence

EXACT = {"rtol": 0, "atol": 1e-10}


def weighted(attention: torch.Tensor, r: Recurrence) -> torch.Tensor:
    """A u, [B,T,H,V]."""
    return torch.einsum("bhtsr,bshrv->bthv" if r.R > 1 else "bhts,bshv->bthv", attention, r.u)


@pytest.fixture(params=FORMS)
def r(request) -> Recurrence:
    return random_recurrence(request.param, B=2, T=41, H=3, dtype=torch.float64, most_beta=2.0, initial_state=True)


def test_weights_times_values_are_the_reads(r):
    """What is left of the initial state aside, by the step-by-step reference."""
    of_the_start = r.replace(u=torch.zeros_like(r.u)).outputs(method="reference")
    assert_close(weighted(r.attention(), r) + of_the_start, r.outputs(method="reference"), **EXACT)
    assert_close(r.attention(), r.attention(method="reference"), **EXACT)
    assert r.attention().shape == (2, 3, 41, 41) + (() if r.R == 1 else (r.R,))


def test_a_weight_is_the_propagated_key_seen_by_the_query(r):
    """A[t,s] = <p_t(k_s), scale q_t>, write by write; 0 before s (and at s, where a token reads before it writes)."""
    attention = r.attention() if r.R > 1 else r.attention().unsqueeze(-1)
    keys = r.k if r.R > 1 else r.k.unsqueeze(3)
    late = int(r.read_before_write)
    for s in (0, 17, 40):
        for head in range(3):
            key = r.propagate(keys[:, s, head], s, head, method="reference")  # [B,R,T-s,K]
            reads = (r.scale * r.q)[:, s + late :, head]
            expected = torch.einsum("brtk,btk->btr", key[:, :, : reads.shape[1]], reads)
            assert_close(attention[:, head, s + late :, s], expected, **EXACT)
            assert not attention[:, head, : s + late, s].any()
