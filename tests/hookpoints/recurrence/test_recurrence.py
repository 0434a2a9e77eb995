"""Recurrences of random shapes, rules and decays against the token-by-token reference, in float64; then dtypes, errors,
and decays for each entry of the state."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recurrences import FORMS, Form, entrywise, normal, random_recurrence
from torch.nn import functional as F
from torch.testing import assert_close

from hookpoints.recurrence import Loop, Method, Recurrence, chunked, dense, reference

FACTORS = ("q", "k", "u", "log_decay", "a", "b", "beta", "initial_state")
METHODS: tuple[Method, ...] = ("chunked", "reference")

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
        resets=draw(st.booleans()),
        initial_state=draw(st.booleans()),
        declare_beta=draw(st.booleans()),
    )


def exact(ours: object, expected: object, tolerance: float = 1e-10) -> None:
    assert_close(ours, expected, rtol=tolerance, atol=tolerance)


sizes = st.integers(1, 80)
often = settings(max_examples=60, deadline=None, derandomize=True)
seldom = settings(max_examples=25, deadline=None, derandomize=True)


@often
@given(r=recurrences(), data=st.data(), chunk_size=sizes)
def test_chunked_is_the_reference(r: Recurrence, data, chunk_size: int) -> None:
    states = r.states(method="reference")
    heads = data.draw(st.lists(st.integers(-r.H, r.H - 1), min_size=1, max_size=3))
    positions = data.draw(st.lists(st.integers(-r.T, r.T - 1), min_size=1, max_size=8))
    chosen = states[:, positions][:, :, heads]
    exact(r.states(heads, positions), chosen)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked, "_CHUNK", {"cpu": chunk_size})
        patch.setattr(chunked, "_EXPANDED", chunk_size)
        exact(tuple(chunked.scan(r)), tuple(r.scan(method="reference")))
        exact(torch.cat(list(chunked.state_blocks(r)), 1), states)
        exact(chunked.states(r.select(heads=heads), [t % r.T for t in positions]), chosen)


@seldom
@given(r=recurrences(), data=st.data())
def test_gradients_are_those_of_the_reference(r: Recurrence, data) -> None:
    """In every factor, of outputs, states and propagation; over several spans of one chunk each."""
    leaves = {name: x.clone().requires_grad_() for name in FACTORS if (x := getattr(r, name)) is not None}
    if r.beta is not None:
        del leaves["a"]  # beta makes it
    x = normal(2, r.K).requires_grad_()
    t = data.draw(st.integers(0, r.T - 1))
    changed = r.replace(**leaves)

    def slopes(method: Method) -> tuple[torch.Tensor, ...]:
        states = changed.states(0, [t, r.T - 1], method=method)
        total = sum(y.square().sum() for y in (*changed.scan(method=method), states))
        total = total + changed.propagate(x, t, 0, method=method).square().sum()
        return torch.autograd.grad(total, [x, *leaves.values()])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked, "_SPAN", {"cpu": 1})
        exact(slopes("chunked"), slopes("reference"), 1e-9)


@seldom
@given(r=recurrences(least_T=2), data=st.data())
def test_a_part_that_begins_with_its_state_is_that_part_of_the_whole(r: Recurrence, data) -> None:
    t = data.draw(st.integers(1, r.T - 1))
    heads = data.draw(st.lists(st.integers(0, r.H - 1), min_size=1, max_size=3))
    part = r.select(-1, heads, slice(t, None), initial_state=r.states(heads, t - 1)[-1:, 0])
    exact(part.outputs(), r.outputs()[-1:, t:, heads])
    exact(part.final_state(), r.final_state()[-1:, heads])


@seldom
@given(r=recurrences(), data=st.data(), loop=st.sampled_from(["closed", "open"]))
def test_an_edit_acts_by_its_propagated_key_and_nowhere_else(r: Recurrence, data, loop: Loop) -> None:
    head, t0 = data.draw(st.integers(0, r.H - 1)), data.draw(st.integers(0, r.T - 1))
    x, y = normal(2, r.K), normal(2, r.V, seed=1)  # a change of rank 1, whatever the rank of the writes
    p = r.propagate(x, t0, head, loop=loop)
    exact(p, r.propagate(x.expand(r.B, -1, -1), t0, head, loop=loop, method="reference"))
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
def test_attention_is_what_reads_take_of_a_write(r: Recurrence, data) -> None:
    """o_t of the write of token s alone is A[t,s] u_s, over its terms."""
    s = data.draw(st.integers(0, r.T - 1))
    attention = r.attention(method=data.draw(st.sampled_from(METHODS))).reshape(r.B, r.H, r.T, r.T, r.R)
    values = torch.zeros_like(r.u)
    values[:, s] = r.u[:, s]
    reads = r.with_write(r.k, values).outputs(method="reference")
    written = r.u[:, s].reshape(r.B, r.H, r.R, r.V)
    exact(torch.einsum("bhtr,bhrv->bthv", attention[:, :, :, s], written), reads)
    assert not attention[:, :, : s + r.read_before_write, s].any()


@seldom
@given(r=recurrences(least_T=2), method=st.sampled_from(METHODS))
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


# -- float32 and less


def relative_error(ours: torch.Tensor, truth: torch.Tensor) -> float:
    """In the root mean square."""
    return float((ours - truth).norm() / truth.norm())


def lifted(r: Recurrence) -> Recurrence:
    """The same numbers in float64."""
    return r.replace(q=r.q.double()).working()


@pytest.mark.parametrize("strongest_decay", [1e-3, 1.0, 1000.0])
@pytest.mark.parametrize("form", FORMS)
def test_float32_is_near_the_float64_reference(form: str, strongest_decay: float) -> None:
    r = random_recurrence(form, T=300, K=32, V=16, most_beta=2.0, strongest_decay=strongest_decay, initial_state=True)
    truth = lifted(r)
    assert r.outputs().dtype == torch.float32
    for ours, expected in zip(r.scan(), truth.scan(method="reference")):
        assert relative_error(ours, expected) < 1e-6
    some = slice(None, None, 7)
    assert relative_error(r.states(1, some), truth.states(1, some, method="reference")) < 1e-6


@pytest.mark.parametrize("declare_beta", [True, False])
@pytest.mark.parametrize("form", ["deltanet", "gdn", "kda"])
@pytest.mark.parametrize("spread", [1e-3, 1e-1])
def test_nearly_equal_keys_with_beta_near_two(form: str, declare_beta: bool, spread: float) -> None:
    """The erase is then nearly a reflection, again and again the same: the hardest solve there is."""
    r = random_recurrence(form, T=512, K=64, V=32, strongest_decay=1e-3)
    common_key = F.normalize(normal(1, 1, 2, 64), dim=-1)
    k = F.normalize(common_key + spread / 8 * normal(1, 512, 2, 64, seed=1), dim=-1).float()
    b = k if r.log_decay is None else k * (r.log_decay if form == "kda" else r.log_decay[..., None]).exp()
    r = r.replace(k=k, beta=torch.full((1, 512, 2), 1.99), b=b)
    solved = r if declare_beta else r.replace(a=r.a)
    assert relative_error(solved.outputs(), lifted(r).outputs(method="reference")) < 1e-5


@pytest.mark.parametrize("form", ["gdn", "gated_deltaproduct"])
def test_half_precision_factors_with_a_declared_beta_give_one_result(form: str) -> None:
    """The erase that beta declares is not rounded to half, so every algorithm computes with the same erase."""
    r = random_recurrence(form, T=40)
    assert r.beta is not None
    r = r.replace(k=r.k.bfloat16(), u=r.u.bfloat16(), beta=r.beta.bfloat16())
    exact(r.outputs(), r.outputs(method="reference"), 1e-5)
    exact(r.replace(beta=None, a=r.a).outputs(), r.outputs(), 1e-5)


def test_autocast_does_not_reach_the_state() -> None:
    r = random_recurrence("rwkv7", T=40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = r.scan()
    exact(tuple(inside), tuple(r.scan()), 0.0)


# -- errors


def ones(*shape: int) -> torch.Tensor:
    return torch.ones(shape)


Q, U = ones(2, 5, 3, 4), ones(2, 5, 3, 6)
WRONG_FACTORS = {
    r"q .*H=3": dict(q=ones(2, 5, 1, 4)),
    r"^k ": dict(k=ones(2, 5, 12)),
    r"log_decay": dict(log_decay=ones(2, 5)),
    r"initial_state .*K=4,V=6": dict(initial_state=ones(2, 3, 6, 4)),
    r"only a": dict(a=Q),
    r"only beta": dict(beta=ones(2, 5, 3)),
    r"rates .*an erase": dict(log_decay=U, rates=ones(3, 4, 6), a=Q, b=Q),
    r"rates .*no log_decay": dict(rates=ones(3, 4, 6)),
}
MISUSES = {
    "heads 3": lambda r: r.states(3),
    "fast": lambda r: r.outputs(method="fast"),
    "rates": lambda r: entrywise(r).propagate(normal(1, 5), 0, 0),
    "initial_state": lambda r: r.select(tokens=slice(4, 9)),
    "step 1": lambda r: r.select(tokens=slice(0, 9, 2)),
}


@pytest.fixture
def r() -> Recurrence:
    return random_recurrence("gdn", B=2, T=40, H=3, K=5, V=4, dtype=torch.float64, initial_state=True)


def test_wrong_factors_and_calls_are_refused(r: Recurrence) -> None:
    for message, changes in WRONG_FACTORS.items():
        with pytest.raises(ValueError, match=message):
            Recurrence(**{"q": Q, "k": Q, "u": U, **changes})
    for message, call in MISUSES.items():
        with pytest.raises((ValueError, IndexError), match=message):
            call(r)


# -- a decay for each entry of the state, as in Mamba-1


@pytest.mark.parametrize("method", METHODS)
def test_with_a_decay_for_each_entry_value_channels_are_heads(r: Recurrence, method: Method) -> None:
    """Outputs, states, gradients, of a part as well, and the answer to other writes."""
    r = entrywise(r)
    part = r.select(heads=1, tokens=slice(0, 20))
    part_of_heads = r.by_channel().select(heads=slice(r.V, 2 * r.V), tokens=slice(0, 20))
    answer = r.with_write(r.q, r.u.flip(1))
    for one, heads in ((r, r.by_channel()), (part, part_of_heads), (answer, answer.by_channel())):
        exact(one.outputs(), heads.outputs(method=method).unflatten(2, (-1, r.V)).squeeze(-1))
        exact(one.states(0, [3, 17]), heads.states(range(r.V), [3, 17], method=method)[..., 0].mT.unsqueeze(2))
        exact(one.value_gradients(one.u), heads.value_gradients(heads.u, method=method).unflatten(2, (-1, r.V))[..., 0])


def test_with_a_decay_for_each_entry_value_channels_have_their_own_pattern(r: Recurrence) -> None:
    """As the equation has it; of keys that were carried as well."""
    r = entrywise(r).replace(initial_state=None)
    passed = (r.log_decay[..., None, :] * r.rates).cumsum(1)
    since = (passed[:, :, None] - passed[:, None]).exp()  # [B,T,S,H,K,V]
    weights = r.scale * torch.einsum("bthk,btshkv,bshk->bhvts", r.q, since, r.k).tril().flatten(1, 2)
    exact(r.attention(), weights)
    first, later = (r.select(tokens=part, initial_state=r.starting_state()) for part in (slice(0, 17), slice(17, 40)))
    exact(later.by_source(first.by_source().final_state()).outputs().transpose(1, 2), weights[:, :, 17:])
