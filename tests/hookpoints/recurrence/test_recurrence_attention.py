"""Attention of recurrent heads, to 1e-10, for every rule. ``hooks/test_pattern.py``: A u is what a model reads."""

from __future__ import annotations

import pytest
import torch
from recurrences import FORMS, random_recurrence
from torch.testing import assert_close

from hookpoints.recurrence import Recurrence

EXACT = {"rtol": 0, "atol": 1e-10}


@pytest.fixture(params=FORMS)
def r(request) -> Recurrence:
    return random_recurrence(request.param, B=2, T=41, H=3, dtype=torch.float64, most_beta=2.0, initial_state=True)


def test_a_weight_is_the_propagated_key_seen_by_the_query(r):
    """A[t,s] = <p_t(k_s), scale q_t>, write by write; 0 before s (and at s, where a token reads before it writes)."""
    assert_close(r.attention(), r.attention(method="reference"), **EXACT)
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
