"""WriteEdit: exact, scoped, linear, and cheap to batch."""

from __future__ import annotations

import contextlib
import copy
import sys
from pathlib import Path

import pytest
import torch
from remembering import drawn_ids
from tiny_models import VOCAB, continuing, make_hf
from torch.testing import assert_close

from hookpoints import EditSession, HookedRecurrent, WriteEdit
from hookpoints.errors import EditError, HookpointsError
from hookpoints.memory.caches import cut, tensors_of
from hookpoints.model.inputs import cache_argument, cache_of

sys.path.append(str(Path(__file__).parents[1] / "model"))

from test_model_types import by_hand
from test_model_types import normal as vectors

LAYER, HEAD, T = 1, 2, 70


@pytest.fixture(scope="module")
def sequence():
    return drawn_ids(1, T, seed=3)


def edit_of(mode: str, position: int | None = 30, rank: int = 2, layer: int = LAYER, seed: int = 0) -> WriteEdit:
    if mode == "delete":
        return WriteEdit(layer, HEAD, position, mode="delete")
    return WriteEdit(layer, HEAD, position, vectors(seed, rank, 8), vectors(seed + 1, rank, 6), mode=mode)


def edited(model, tokens, *scopes) -> torch.Tensor:
    """Logits of a pass in scopes of edits, the first one outermost."""
    with contextlib.ExitStack() as stack:
        for scope in scopes:
            stack.enter_context(model.edits(scope))
        return model(tokens)


@torch.no_grad()
def test_many_rows_of_a_session_are_what_each_is_alone(model64, sequence):
    """Different layers, heads, positions, several edits a row, batches smaller than the rows."""
    rows = [
        edit_of("delete", 20),
        [edit_of("add", 25, layer=0), WriteEdit(2, 1, 33, mode="delete")],
        [edit_of("replace", 40, rank=3), edit_of("add", 40, seed=5), WriteEdit(LAYER, 0, 22, mode="delete")],
        [],
    ]
    session = model64.edit_session(sequence)
    run = session.run(rows, batch_size=3)
    assert run.start == 20
    for row, logits in zip(rows, run.logits):
        assert_close(logits, edited(model64, sequence, row)[0, 20:], rtol=0, atol=1e-10)
    later = session.run([edit_of("delete", 50)], stop=60)  # a prefix that is reused, and a stretch that ends early
    assert (later.start, later.stop) == (50, 60)
    assert_close(later.logits[0], by_hand(model64, sequence, edit_of("delete", 50))[0, 50:60], rtol=0, atol=1e-10)
    earlier = session.run([edit_of("delete", 10)])
    assert_close(earlier.logits[0], by_hand(model64, sequence, edit_of("delete", 10))[0, 10:], rtol=0, atol=1e-10)


def test_sessions_take_text(embedded):
    text, edit = "The people of the United States", WriteEdit(1, 0, 2, mode="delete")
    for rows in ([edit], [edit, []]):
        expected = embedded.run_with_edits(embedded.to_tokens(text), rows).logits
        assert_close(embedded.run_with_edits(text, rows).logits, expected, rtol=0, atol=0)
    with pytest.raises(EditError, match="at least one edit"):
        embedded.run_with_edits(text, [])


@torch.no_grad()
def test_one_row_is_one_pass(model64, sequence):
    """A session has a plain pass, too; the row is the same, also within edits in force."""
    row = [edit_of("replace", 30), edit_of("delete", 40), edit_of("add", 40, seed=5)]
    widths = []
    with model64.edits(edit_of("replace", 3, rank=1)):
        expected = model64.edit_session(sequence).run([row], stop=60)
        with model64.hooks([("hook_embed", lambda x, hook: widths.append(x.shape[1]))]):
            run = model64.run_with_edits(sequence, [row], stop=60)
    assert widths == [60] and (run.start, run.stop) == (expected.start, expected.stop) == (30, 60)
    assert_close(run.logits, expected.logits, rtol=0, atol=1e-10)


@torch.no_grad()
def test_one_row_walks_on_where_the_plain_pass_cannot_be_cut(model64, sequence):
    """As under an edit in force: while positions rise each token is walked once."""
    widths, positions = [], (20, 30, 10)
    with model64.edits(edit_of("add", 3)):
        session = model64.edit_session(sequence)
        with model64.hooks([("hook_embed", lambda x, hook: widths.append(x.shape[1]))]):
            found = [session.run([edit_of("delete", t)]).logits[0] for t in positions]
        for t, logits in zip(positions, found):
            assert_close(logits, edited(model64, sequence, edit_of("delete", t))[0, t:], rtol=0, atol=1e-10)
    assert widths == [20, 10, 10]


@torch.no_grad()
def test_a_session_may_keep_the_last_logits_alone(model, sequence):
    whole = model.edit_session(sequence)
    session = EditSession(model, sequence, logits_to_keep=1)
    assert_close(session.logits, whole.logits[:, -1:], rtol=0, atol=1e-6)
    hooks = [(f"blocks.{LAYER}.mixer.hook_write_value", lambda x, hook: torch.zeros_like(x))]
    last = session.run_hooked(2, LAYER, 30, hooks).logits
    assert_close(last, whole.run_hooked(2, LAYER, 30, hooks).logits[:, -1:], rtol=0, atol=1e-6)
    assert not torch.allclose(last, session.logits)
    with pytest.raises(EditError, match="all logits"):
        session.run([edit_of("delete", 30)])


def test_a_cut_copies_the_last_inputs_of_convolutions_alone(model, sequence):
    held = model.edit_session(sequence)._held
    convolved = [x for place, x in tensors_of(cut(held, 30)).items() if "/conv_states/" in place]
    assert convolved and all(x.untyped_storage().nbytes() == x.nbytes for x in convolved)


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


@torch.no_grad()
def test_rows_below_the_edit_run_once(model, sequence):
    """Blocks below the edited layer are skipped, and tokens before the edit as well."""
    session = model.edit_session(sequence)
    session.run([edit_of("delete", 60, layer=2)])
    seen = []
    calls = [mixer.calls for mixer in model.attachment.mixers.values()]
    with model.hooks([("blocks.2.hook_resid_pre", lambda x, hook: seen.append(x.shape[:2]))]):
        session.run([edit_of("delete", 60, layer=2)] * 5)
    assert [mixer.calls for mixer in model.attachment.mixers.values()] == [calls[0], calls[1], calls[2] + 1]
    assert seen == [(5, 10)]


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: WriteEdit(1, 0, -1, mode="delete"), EditError, "position must be >= 0"),
        (lambda: WriteEdit(1, 0, 1, mode="erase"), EditError, "mode must be"),
        (lambda: WriteEdit(1, 0, 1), EditError, "needs both keys"),
        (lambda: WriteEdit(1, 0, 1, torch.ones(2, 8), torch.ones(3, 6)), EditError, "share their rank"),
        (lambda: WriteEdit(1, 0, 1, torch.ones(8), torch.ones(6), mode="delete"), EditError, "takes no keys"),
        (lambda: WriteEdit(1, 7, 1, mode="delete"), EditError, "layer 1 has heads 0 to 3"),
        (lambda: WriteEdit(1, 0, 1, torch.ones(6), torch.ones(8)), EditError, r"keys .* must be \[R,8\]"),
        (lambda: WriteEdit(1, 0, 99, mode="delete"), EditError, "position 99"),
        (lambda: [WriteEdit(1, 0, 4, mode="delete")] * 2, EditError, "position 4"),
        (lambda: [WriteEdit(1, 0, 4, mode="delete", loop=loop) for loop in ("closed", "open")], EditError, "open loop"),
        (lambda: WriteEdit(1, 0, 3, [1.0] * 8, torch.ones(6)), EditError, "keys"),  # type: ignore[arg-type]
        (lambda: WriteEdit(1, 0, 3, torch.ones(8), torch.ones(6, device="meta")), EditError, "values"),
        (lambda: WriteEdit(1, 0, 3, torch.full((8,), float("nan")), torch.ones(6)), EditError, "NaN"),
        (lambda: WriteEdit(1, 0, 3.0, mode="delete"), TypeError, "float"),  # type: ignore[arg-type]
        (lambda: None, EditError, "None"),
    ],
)
def test_bad_edits_are_refused(model, sequence, make, error, match):
    with pytest.raises(error, match=match), model.edits(make()):
        model(sequence)
    with pytest.raises(error, match=match):
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
    outer, inner = edit_of("add", 5, layer=0), WriteEdit(LAYER, HEAD, 21, 5 * vectors(0, 8), 5 * vectors(1, 6))
    prompt = sequence[:, :20]
    expected = model64.generate(prompt, edits=[outer, inner], max_new_tokens=5, do_sample=False)
    with model64.edits(outer):
        assert torch.equal(model64.generate(prompt, edits=inner, max_new_tokens=5, do_sample=False), expected)
        session = model64.edit_session(sequence)
        run = session.run([[], inner])
    assert_close(run.logits[1], edited(model64, sequence, [outer, inner])[0, 21:], rtol=0, atol=1e-10)
    # A session keeps the edits that it was made under.
    assert_close(session.run([[], inner]).logits, run.logits, rtol=0, atol=1e-10)
    with pytest.raises(EditError, match="never acted"), model64.edits(edit_of("delete", 0)):
        assert_close(session.run([[], inner]).logits, run.logits, rtol=0, atol=1e-10)


@torch.no_grad()
def test_an_edit_behind_the_last_token_never_acts(model64, sequence):
    last = sequence.shape[1] - 1
    assert not torch.equal(edited(model64, sequence, edit_of("add", last)), model64(sequence))
    for position in (last + 1, last + 9):
        with pytest.raises(EditError, match="never acted"):
            edited(model64, sequence, edit_of("add", position))


@torch.no_grad()
def test_rows_have_edits_of_their_own(model64, sequence):
    rows = [[], edit_of("delete", 10), [edit_of("add", 12, layer=0), edit_of("replace", 22)]]
    batch = sequence[:, :20].expand(3, -1)
    how = {"max_new_tokens": 5, "do_sample": False}
    alone = [model64.generate(batch[:1], edits=row, **how) for row in rows]
    assert torch.equal(model64.generate(batch, edit_rows=rows, **how), torch.cat(alone))
    with model64.edits(edit_of("add", 3), edit_rows=rows):
        together = model64(sequence.expand(3, -1))
    for row, logits in zip(rows, together, strict=True):
        assert_close(logits, edited(model64, sequence, edit_of("add", 3), row)[0], rtol=0, atol=1e-10)
    for given, beams in ((batch[:2], 1), (batch, 2)):  # beams are rows as well
        with pytest.raises(EditError, match="rows"):
            model64.generate(given, edit_rows=rows, num_beams=beams, **how)
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
    with torch.no_grad():
        plain = model64.run_with_edits(sequence, [edit]).logits
    differentiable = model64.run_with_edits(sequence, [edit], gradients=True).logits
    assert differentiable.requires_grad
    assert_close(plain, differentiable.detach(), rtol=0, atol=1e-10)
    r = model64.recurrence(sequence, LAYER, gradients=True)
    native = WriteEdit(LAYER, HEAD, 30, r.k[0, 3, HEAD], r.u[0, 3, HEAD], mode="replace")
    assert r.k.requires_grad and not model64.run_with_edits(sequence, [native]).logits.requires_grad
