"""WriteEdit: exact, scoped, linear, and cheap to batch."""

from __future__ import annotations

import contextlib
import copy
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from remembering import drawn_ids
from tiny_models import VOCAB, KeepFloat64, continuing, make_hf
from torch.testing import assert_close

from hookpoints import HookedRecurrent, WriteEdit
from hookpoints.errors import EditError, HookpointsError
from hookpoints.model.inputs import cache_argument, cache_of

sys.path.append(str(Path(__file__).parents[1] / "model"))

from test_model_types import by_hand
from test_model_types import normal as vectors

LAYER, HEAD, T = 1, 2, 70


@pytest.fixture(scope="module")
def sequence():
    return drawn_ids(1, T, seed=3)


def edit_of(
    mode: str, position: int | None = 30, rank: int = 2, layer: int = LAYER, head: int = HEAD, seed: int = 0
) -> WriteEdit:
    if mode == "delete":
        return WriteEdit(layer, head, position, mode="delete")
    return WriteEdit(layer, head, position, vectors(seed, rank, 8), vectors(seed + 1, rank, 6), mode=mode)


@pytest.fixture(scope="module")
def session64(_model64, sequence):
    """Whose prefixes are reused from run to run."""
    with KeepFloat64(), torch.no_grad():
        return _model64.edit_session(sequence)


def edited(model, tokens, *scopes) -> torch.Tensor:
    """Logits of a pass in scopes of edits, the first one outermost."""
    with contextlib.ExitStack() as stack:
        for scope in scopes:
            stack.enter_context(model.edits(scope))
        return model(tokens)


@st.composite
def rows_of_edits(draw) -> list[list[WriteEdit]]:
    """Up to four rows; at most one edit of a head at a token, and one more that adds to it."""
    rows = []
    for _ in range(draw(st.integers(1, 4))):
        places = draw(st.sets(st.tuples(st.integers(0, 2), st.integers(0, 3), st.integers(5, 44)), max_size=3))
        modes = st.sampled_from(["add", "replace", "delete", "replace and add"])
        edits = [
            edit_of(mode, t, rank=draw(st.integers(1, 3)), layer=layer, head=head, seed=draw(st.integers(0, 99)))
            for layer, head, t in sorted(places)
            for mode in draw(modes).split(" and ")
        ]
        rows.append(edits)
    return rows


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=rows_of_edits(), stop=st.sampled_from([None, 47]), gradients=st.booleans())
@torch.no_grad()
def test_many_rows_of_a_session_are_what_each_is_alone(model64, session64, sequence, rows, stop, gradients):
    """In batches smaller than the rows, in one pass with edits of their own, and in one with hooks on the writes."""
    assume(any(rows))
    run = session64.run(rows, stop=stop, batch_size=3, gradients=gradients)
    assert run.start == min(edit.position for row in rows for edit in row) and run.stop == (stop or T)
    with model64.edits([], edit_rows=rows):
        together = model64(sequence.expand(len(rows), -1))
    for row, logits, of_batch in zip(rows, run.logits, together, strict=True):
        expected = by_hand(model64, sequence, *row)[0]
        assert_close(of_batch, expected, rtol=0, atol=1e-10)
        assert_close(logits, expected[run.start : run.stop], rtol=0, atol=1e-10)
        if row:
            alone = model64.run_with_edits(sequence, [row], stop=stop)  # in one pass
            assert_close(alone.logits[0], expected[alone.start : alone.stop], rtol=0, atol=1e-10)


@torch.no_grad()
def test_one_row_walks_on_where_the_plain_pass_cannot_be_cut(model64, sequence):
    """As under an edit in force: while positions rise each token is walked once."""
    widths, positions = [], (20, 30, 10)
    with model64.edits(edit_of("add", 3)):
        session = model64.edit_session(sequence)
        with model64.hooks([("hook_embed", lambda x, hook: widths.append(x.shape[1]))]):
            runs = [session.run([edit_of("delete", t)]).logits[0] for t in positions]
    assert widths == [20, 10, 10]
    for t, logits in zip(positions, runs):
        expected = edited(model64, sequence, edit_of("add", 3), edit_of("delete", t))
        assert_close(logits, expected[0, t:], rtol=0, atol=1e-10)


@torch.no_grad()
def test_the_native_write_put_back_is_bitwise_nothing(model, sequence):
    session = model.edit_session(sequence)
    r = session.recurrence(LAYER)
    again = WriteEdit(LAYER, HEAD, 30, r.k[0, 30, HEAD], r.u[0, 30, HEAD], mode="replace")
    assert torch.equal(edited(model, sequence, again), session.logits)
    run = session.run([[], again])  # here the native write was rounded in a shorter pass
    assert_close(run.logits[0], run.logits[1], rtol=0, atol=1e-6)


@torch.no_grad()
def test_an_edited_cache_continues_outside_the_scope(model, sequence):
    edit = edit_of("add", 5)
    with model.edits(edit):
        whole = model(sequence)
        out = model.hf_model(sequence[:, :40], use_cache=True)
    onward = continuing(model.hf_model, out)
    rest = model.hf_model(sequence[:, 40:], position_ids=torch.arange(40, T)[None], **onward)
    assert_close(rest.logits, whole[:, 40:], rtol=0, atol=5e-5)


BAD_EDITS = {
    "position must be >= 0": lambda: WriteEdit(1, 0, -1, mode="delete"),
    "needs both keys": lambda: WriteEdit(1, 0, 1),
    "layer 1 has heads 0 to 3": lambda: WriteEdit(1, 7, 1, mode="delete"),
    r"must be \[R,8\]": lambda: WriteEdit(1, 0, 1, torch.ones(6), torch.ones(8)),
    "position 99": lambda: WriteEdit(1, 0, 99, mode="delete"),
    "open loop": lambda: [WriteEdit(1, 0, 4, mode="delete", loop=loop) for loop in ("closed", "open")],
    "dense": lambda: WriteEdit(1, 0, 3, torch.ones(8), torch.ones(6, device="meta")),
    "NaN": lambda: WriteEdit(1, 0, 3, torch.full((8,), float("nan")), torch.ones(6)),
    "None": lambda: None,
}


def test_bad_edits_are_refused(model, sequence):
    for message, make in BAD_EDITS.items():
        with pytest.raises(EditError, match=message), model.edits(make()):
            model(sequence)
        with pytest.raises(EditError, match=message):
            model.run_with_edits(sequence, [make()])


# -- several edits at once


@torch.no_grad()
def test_nested_scopes_compose(model64, sequence):
    """An inner scope edits the model as the outer one edited it; a delete takes away what the outer scope adds, too."""
    far, deleted, added, replaced = (
        edit_of("add", 10, layer=0), edit_of("delete", 30), edit_of("add", 30), edit_of("replace", 30),
    )  # fmt: skip
    for outer, inner, same in (
        (far, deleted, [far, deleted]),
        (added, deleted, [deleted]),
        (deleted, deleted, [deleted]),
        (deleted, added, [replaced]),
    ):
        expected = edited(model64, sequence, same)
        assert_close(edited(model64, sequence, outer, inner), expected, rtol=0, atol=1e-10)


@torch.no_grad()
def test_generation_and_sessions_inside_a_scope(model64, sequence):
    """A session keeps the edits that it was made under, and no others."""
    outer, inner = edit_of("add", 5, layer=0), WriteEdit(LAYER, HEAD, 21, 5 * vectors(0, 8), 5 * vectors(1, 6))
    how = {"max_new_tokens": 5, "do_sample": False}
    expected = model64.generate(sequence[:, :20], edits=[outer, inner], **how)
    with model64.edits(outer):
        assert torch.equal(model64.generate(sequence[:, :20], edits=inner, **how), expected)
        session = model64.edit_session(sequence)
    with pytest.raises(EditError, match="never acted"), model64.edits(edit_of("delete", 0)):
        run = session.run([[], inner])
    assert_close(run.logits[1], edited(model64, sequence, [outer, inner])[0, 21:], rtol=0, atol=1e-10)


@torch.no_grad()
def test_an_edit_behind_the_last_token_never_acts(model64, sequence):
    assert not torch.equal(edited(model64, sequence, edit_of("add", T - 1)), model64(sequence))
    with pytest.raises(EditError, match="never acted"):
        edited(model64, sequence, edit_of("add", T))


@torch.no_grad()
def test_generated_rows_have_edits_of_their_own(model64, sequence):
    rows = [[], edit_of("delete", 10), [edit_of("add", 12, layer=0), edit_of("replace", 22)]]
    batch = sequence[:, :20].expand(3, -1)
    how = {"max_new_tokens": 5, "do_sample": False}
    alone = [model64.generate(batch[:1], edits=row, **how) for row in rows]
    assert torch.equal(model64.generate(batch, edit_rows=rows, **how), torch.cat(alone))
    for prompts, beams in ((batch[:2], 1), (batch, 2)):  # beams are rows as well
        with pytest.raises(EditError, match="rows"):
            model64.generate(prompts, edit_rows=rows, num_beams=beams, **how)
    same = edit_of("delete", 30)  # one object in two rows, of which neither acts
    with pytest.raises(EditError, match="2 edit"):
        model64.generate(batch, edit_rows=[same, [], same], **how)


# -- caches that come from outside


@pytest.mark.parametrize("model_type", ["qwen3_5", "olmo_hybrid", "bamba", "mamba2", "rwkv7"])
@torch.no_grad()
def test_positions_in_a_cache_from_outside(model_type, sequence):
    """Attention layers advance a cache in the middle of a pass; edits above them must still find their token."""
    model = HookedRecurrent.from_hf(make_hf(model_type))
    layer = model.cfg.recurrent_layers[-1]
    shape = model.cfg.layer(layer)
    where = {} if model_type in ("mamba2", "rwkv7") else {"position_ids": torch.arange(40, 50)[None]}
    out = model.hf_model(sequence[:, :40], use_cache=True)
    assert model.position_of(cache_of(out)) == 40 and model.position_of(None) == 0
    for position in (40, 43, 49):
        edit = WriteEdit(layer, 1, position, 9 * vectors(0, shape.K), 9 * vectors(1, shape.V))
        with model.edits(edit):
            expected = model(sequence[:, :50])[:, 40:]
            onward = {cache_argument(model.hf_model): copy.deepcopy(cache_of(out))}
            logits = model.hf_model(sequence[:, 40:50], use_cache=True, **onward, **where).logits
        assert_close(logits, expected, rtol=0, atol=2e-4)
        assert not torch.allclose(expected, model(sequence[:, :50])[:, 40:], rtol=0, atol=1e-2)


@torch.no_grad()
def test_hooks_know_where_a_pass_begins(model, sequence):
    begins = []
    with model.hooks([("blocks.2.mixer.hook_q", lambda q, hook: begins.append(model.first_token()))]):
        model(sequence)
        model.generate(sequence[:, :20], max_new_tokens=3, do_sample=False)
    assert begins == [0, 0, 20, 21]
    with pytest.raises(HookpointsError, match="in a hook"):
        model.first_token()


@pytest.mark.parametrize(("mode", "position"), [("add", 30), ("replace", None)])
def test_runs_have_gradients_by_the_factors_of_edits(model64, sequence, mode, position):
    """Against finite differences in float64: of a row's own edits, and of those in force around the session."""
    keys, values = (x.requires_grad_() for x in (vectors(0, 1, 8), vectors(1, 6)))
    mix = vectors(2, 45, VOCAB)

    def metric(keys, values):
        edit = WriteEdit(LAYER, HEAD, position, keys, values, mode=mode)
        rows = [edit, [edit_of("delete", 20)], [edit, WriteEdit(2, 0, 33, vectors(3, 8), 2 * values)]]
        with model64.edits(WriteEdit(0, 1, 5, keys, vectors(4, 6))):
            logits = model64.run_with_edits(sequence, rows, stop=45, batch_size=2, gradients=True).logits
        return (logits.log_softmax(-1) * mix[45 - logits.shape[1] :]).sum((1, 2))

    assert torch.autograd.gradcheck(metric, (keys, values), eps=1e-6, atol=1e-5, rtol=1e-5, fast_mode=True)


def test_trained_factors_are_not_detached_without_a_word(model64, sequence):
    """Native factors have a graph too, because the model's weights require gradients; those ask for nothing."""
    edit = WriteEdit(LAYER, HEAD, 30, torch.nn.Parameter(vectors(0, 1, 8)), vectors(1, 6))
    with pytest.raises(EditError, match="gradients=True"):
        model64.run_with_edits(sequence, [edit])
    with model64.edits(edit), pytest.raises(EditError, match="gradients=True"):
        model64.run_with_edits(sequence, [edit_of("delete", 40)])
    assert model64.run_with_edits(sequence, [edit], gradients=True).logits.requires_grad
    r = model64.recurrence(sequence, LAYER, gradients=True)
    native = WriteEdit(LAYER, HEAD, 30, r.k[0, 3, HEAD], r.u[0, 3, HEAD], mode="replace")
    assert r.k.requires_grad and not model64.run_with_edits(sequence, [native]).logits.requires_grad
