"""What holds of every recurrence, over random shapes, rules, decays and chunk sizes, in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recurrences import Form, normal, random_recurrence
from torch.testing import assert_close

from hookpoints.recurrence import Loop, Method, Recurrence, chunked, dense, reference

forms = st.builds(
    Form,
    decay=st.sampled_from(["none", "head", "channel"]),
    erase=st.sampled_from(["none", "delta", "aside", "free"]),
    read_before_write=st.booleans(),
    rank=st.integers(1, 3),
)


@st.composite
def recurrences(draw, least_T=1) -> Recurrence:
    """Any rule; lengths around and beyond several chunks; decays from none to a full reset."""
    return random_recurrence(
        draw(forms),
        B=draw(st.integers(1, 2)),
        T=draw(st.integers(least_T, 75)),
        H=draw(st.integers(1, 3)),
        K=draw(st.integers(1, 6)),
        V=draw(st.integers(1, 6)),
        dtype=torch.float64,
        seed=draw(st.integers(0, 2**20)),
        most_beta=draw(st.sampled_from([1.0, 2.0])),
        strongest_decay=draw(st.sampled_from([1e-3, 0.3, 50.0, 1000.0])),
        initial_state=draw(st.booleans()),
        declare_beta=draw(st.booleans()),
    )


def exact(ours: object, expected: object, tolerance: float = 1e-10) -> None:
    assert_close(ours, expected, rtol=tolerance, atol=tolerance)


sizes = st.one_of(st.none(), st.integers(1, 80))
methods = st.sampled_from(["chunked", "reference"])
often = settings(max_examples=60, deadline=None, derandomize=True)
seldom = settings(max_examples=25, deadline=None, derandomize=True)


@often
@given(r=recurrences(), chunk_size=sizes)
def test_chunked_is_the_reference(r: Recurrence, chunk_size: int | None) -> None:
    fast = chunked.scan(r, chunk_size)
    exact(tuple(fast), tuple(r.scan(method="reference")))
    blocks = list(chunked.state_blocks(r, chunk_size))
    exact(torch.cat(blocks, 1), r.states(method="reference"))
    exact(torch.cat(list(r.state_blocks()), 1), r.states(method="reference"))


@often
@given(r=recurrences(), data=st.data(), chunk_size=sizes)
def test_states_are_those_of_the_reference(r: Recurrence, data, chunk_size: int | None) -> None:
    heads = data.draw(st.one_of(st.none(), st.lists(st.integers(-r.H, r.H - 1), min_size=1, max_size=3)))
    positions = data.draw(st.one_of(st.none(), st.lists(st.integers(-r.T, r.T - 1), min_size=1, max_size=8)))
    expected = r.states(heads, positions, method="reference")
    exact(r.states(heads, positions), expected)
    at = range(r.T) if positions is None else [t % r.T for t in positions]
    exact(chunked.states(r.select(heads=heads), list(at), chunk_size), expected)


@seldom
@given(r=recurrences(least_T=2), data=st.data())
def test_carrying_the_state_over_a_split_equals_one_pass(r: Recurrence, data) -> None:
    t = data.draw(st.integers(1, r.T - 1))
    left = r.select(tokens=slice(0, t))
    rest = r.select(tokens=slice(t, None), initial_state=left.final_state())
    exact(torch.cat([left.outputs(), rest.outputs()], dim=1), r.outputs())
    exact(rest.final_state(), r.final_state())


@seldom
@given(r=recurrences(), data=st.data(), loop=st.sampled_from(["closed", "open"]))
def test_an_edit_acts_by_its_propagated_key_and_nowhere_else(r: Recurrence, data, loop: Loop) -> None:
    head, t0 = data.draw(st.integers(0, r.H - 1)), data.draw(st.integers(0, r.T - 1))
    x, y = normal(2, r.K), normal(2, r.V, seed=1)  # a change of rank 1, whatever the rank of the writes
    p = r.propagate(x, t0, head, loop=loop)
    reads = r.scale * r.q[:, t0:, head]
    if r.read_before_write:
        p, reads = p[:, :, :-1], reads[:, 1:]
    predicted = torch.zeros(2, r.B, r.T, r.H, r.V, dtype=r.dtype)
    effect = torch.einsum("bntk,btk->nbt", p, reads)
    predicted[:, :, r.T - effect.shape[2] :, head] = effect[..., None] * y[:, None, None]

    def edited(n: int, size: float) -> torch.Tensor:
        k, u = torch.zeros_like(r.q), r.q.new_zeros(r.B, r.T, r.H, r.V)
        k[:, t0, head], u[:, t0, head] = x[n], size * y[n]
        return r.with_write(k, u, loop=loop).outputs()

    exact(edited(0, 1.0), predicted[0])
    exact(edited(1, -3.0), -3.0 * predicted[1])


@seldom
@given(r=recurrences(), data=st.data())
def test_propagate_is_the_reference(r: Recurrence, data) -> None:
    head, t0 = data.draw(st.integers(0, r.H - 1)), data.draw(st.integers(0, r.T - 1))
    x = normal(r.B, 3, r.K)
    for loop in ("closed", "open"):
        carried = r.propagate(x, t0, head, loop=loop)
        assert carried.shape == (r.B, 3, r.T - t0, r.K)
        exact(carried, r.propagate(x, t0, head, loop=loop, method="reference"))
    if r.a is None:
        exact(r.propagate(x, t0, head), r.propagate(x, t0, head, loop="open"), 0.0)


@seldom
@given(r=recurrences(), data=st.data())
def test_attention_is_what_reads_take_of_a_write(r: Recurrence, data) -> None:
    """o_t of the write of token s alone is A[t,s] u_s, over its terms."""
    s = data.draw(st.integers(0, r.T - 1))
    attention = r.attention(method=data.draw(methods)).reshape(r.B, r.H, r.T, r.T, r.R)
    values = torch.zeros_like(r.u)
    values[:, s] = r.u[:, s]
    reads = r.with_write(r.k, values).outputs(method="reference")
    written = r.u[:, s].reshape(r.B, r.H, r.R, r.V)
    exact(torch.einsum("bhtr,bhrv->bthv", attention[:, :, :, s], written), reads)
    assert not attention[:, :, : s + r.read_before_write, s].any()


@seldom
@given(r=recurrences(least_T=2), method=methods)
def test_gradients_of_writes_and_values_are_those_of_autograd(r: Recurrence, method: Method) -> None:
    """dL/dW for L = <g, o>, with each write given as its K rank-1 rows, so that all of it can vary."""
    g = normal(r.B, r.T, r.H, r.V)
    writes = r.write().requires_grad_()
    rows = torch.eye(r.K, dtype=r.dtype).expand(r.B, r.T, r.H, r.K, r.K)
    reads = r.with_write(rows, writes).outputs(method="reference")
    (expected,) = torch.autograd.grad((reads * g).sum(), writes)
    exact(r.adjoint(g).states(method=method).flip(1), expected)
    u = r.u.clone().requires_grad_()
    (expected,) = torch.autograd.grad((r.replace(u=u).outputs(method="reference") * g).sum(), u)
    exact(r.value_gradients(g, method=method), expected)


@seldom
@given(r=recurrences(), wide=st.booleans(), block=st.integers(8, 80))
def test_dense_writes_are_those_of_the_reference(r: Recurrence, wide: bool, block: int) -> None:
    """Rows one by one, and tokens where they are looped over; blocks of a few tokens."""
    writes = normal(*r.q.shape, r.V)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dense, "_NUMBERS", 1)
        patch.setattr(dense, "_LOOPED", 1)
        patch.setattr(dense, "_BLOCK", block)
        patch.setattr(dense, "_WIDE", {"cpu": 0} if wide else {})
        ours = dense.scan_with(r, lambda rows, tokens: writes[rows, tokens])
    exact(tuple(ours), tuple(reference.scan(r, writes)))
