"""What holds of every recurrence, over random shapes, rules, decays and chunk sizes, in float64."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recurrences import Form, normal, random_recurrence
from torch.testing import assert_close

from hookpoints.recurrence import Loop, Recurrence

forms = st.builds(
    Form,
    decay=st.sampled_from(["none", "head", "channel"]),
    erase=st.sampled_from(["none", "delta", "aside", "free"]),
    read_before_write=st.booleans(),
    rank=st.integers(1, 3),
)
along_key = forms.filter(lambda form: form.erase != "free")


@st.composite
def recurrences(draw, forms=forms, least_T=1) -> Recurrence:
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


def exact(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-10) -> None:
    assert_close(found, expected, rtol=tolerance, atol=tolerance)


sizes = st.one_of(st.none(), st.integers(1, 80))
often = settings(max_examples=100, deadline=None)
seldom = settings(max_examples=50, deadline=None)


@often
@given(r=recurrences(), chunk_size=sizes)
def test_chunked_is_the_reference(r: Recurrence, chunk_size: int | None) -> None:
    fast, slow = r.scan(chunk_size=chunk_size), r.scan(method="reference")
    exact(fast.outputs, slow.outputs)
    exact(fast.final_state, slow.final_state)


@often
@given(r=recurrences(), data=st.data(), chunk_size=sizes)
def test_states_are_those_of_the_reference(r: Recurrence, data, chunk_size: int | None) -> None:
    heads = data.draw(st.one_of(st.none(), st.lists(st.integers(-r.H, r.H - 1), min_size=1, max_size=3)))
    positions = data.draw(st.one_of(st.none(), st.lists(st.integers(-r.T, r.T - 1), min_size=1, max_size=8)))
    exact(r.states(heads, positions, chunk_size=chunk_size), r.states(heads, positions, method="reference"))


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
        found = r.propagate(x, t0, head, loop=loop)
        assert found.shape == (r.B, 3, r.T - t0, r.K)
        exact(found, r.propagate(x, t0, head, loop=loop, method="reference"))
    if r.a is None:
        exact(r.propagate(x, t0, head), r.propagate(x, t0, head, loop="open"), 0.0)


@seldom
@given(r=recurrences(along_key))
def test_corrected_values_leave_decay_alone_between_states(r: Recurrence) -> None:
    states = r.states(method="reference")
    before = torch.cat([r.starting_state()[:, None], states[:, :-1]], dim=1)
    if r.log_decay is not None:
        decay = r.log_decay.exp()
        before = before * (decay[..., None] if decay.ndim == 4 else decay[..., None, None])
    exact(before + r.write(kind="corrected"), states)
    exact(r.corrected_values(), r.corrected_values(method="reference"))
