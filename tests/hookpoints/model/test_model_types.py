"""Shapes of hooks and exactness of edits in every family, fla's too; and what is some family's own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from recurrences import drawn as normal
from remembering import drawn_ids
from tiny_models import make_hf
from torch.testing import assert_close

from hookpoints import HookedRecurrent, WriteEdit
from hookpoints.hooks.table import HOOKS

EXACT = {"rtol": 0, "atol": 1e-10}


SEQUENCE = drawn_ids(1, 41, seed=3)


def edit_of(model: HookedRecurrent, layer: int, position: int | None, rank: int = 2, **options) -> WriteEdit:
    shape = model.cfg.layer(layer)
    factors = (normal(0, rank, shape.K), normal(1, rank, shape.V)) if rank else ()
    return WriteEdit(layer, min(1, shape.H - 1), position, *factors, **options)


def by_hand(model: HookedRecurrent, tokens: torch.Tensor, *edits: WriteEdit) -> torch.Tensor:
    """A full run with the writes changed at their hooks: the oracle, which shares no code with edits."""

    def hook_of(edit: WriteEdit) -> tuple[str, Callable]:
        def hook(write, hook):
            write = write.clone()
            at = slice(None) if edit.position is None else edit.position
            new = 0 if edit.keys is None or edit.values is None else edit.keys.T @ edit.values
            write[:, at] = new + (write[:, at] if edit.mode == "add" else 0 * write[:, at])
            return write

        return f"blocks.{edit.layer}.mixer.heads.{edit.head}.hook_write", hook

    return model.run_with_hooks(tokens, fwd_hooks=[hook_of(edit) for edit in edits])


@torch.no_grad()
def test_hooks_fire_with_their_shapes(hooked, tokens):
    """In the prompt and at each decoded token."""
    layer, seen = hooked.cfg.recurrent_layers[-1], {}
    shape = hooked.cfg.layer(layer)
    rows = {row.full_name(layer, min(1, shape.H - 1)): row for row in HOOKS if row.scope != "attn"}
    rows = {name: row for name, row in rows.items() if name in hooked.hook_dict}

    def note(value, hook):
        seen.setdefault(hook.name, []).append(tuple(value.shape))

    with hooked.hooks([(name, note) for name in rows]):
        hooked.generate(tokens, max_new_tokens=2, do_sample=False)
    sizes = {"B": 2, "H": shape.H, "K": shape.K, "V": shape.V, "R": shape.R, "F": shape.K * shape.V}
    sizes["D"] = hooked.cfg.d_model
    for name, row in rows.items():
        expected = [
            [tuple({**sizes, "T": t, "S": s}[axis] for axis in axes) for t, s in ((70, 70), (1, 71))]
            for axes in row.axes_of(shape.R).replace("(KV)", "F").split(" or ")
        ]
        assert seen[name] in expected, name


@torch.no_grad()
def test_edits_are_exact_in_prefill_and_session(ruled64):
    """The first and the last recurrent layer; the first token or one in the middle, the last, and all. Nine terms are
    added up as a matrix."""
    sequence, session = SEQUENCE, ruled64.edit_session(SEQUENCE)
    first, *_, last = ruled64.cfg.recurrent_layers
    for layer, position, mode, rank in (
        (first, 0, "delete", 0),
        (first, 40, "replace", 9),
        (first, None, "add", 2),
        (last, 25, "replace", 9),
        (last, 40, "add", 2),
        (last, None, "delete", 0),
    ):
        edit = edit_of(ruled64, layer, position, rank, mode=mode)
        expected = by_hand(ruled64, sequence, edit)
        unread = position == 40 and ruled64.recurrence(sequence, layer).read_before_write
        assert torch.allclose(expected, session.logits, rtol=0, atol=1e-6) is bool(unread)
        with ruled64.edits(edit):
            assert_close(ruled64(sequence), expected, **EXACT)
        run = session.run([[], edit])
        assert_close(run.logits[1], expected[0, run.start :], **EXACT)
        assert_close(run.logits[0], session.logits[0, run.start :], **EXACT)


@torch.no_grad()
def test_edits_are_exact_in_generation(ruled64):
    """In the prompt, among generated tokens, everywhere; each generated token is the full run's."""
    how = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    for position in (10, 21, None):
        edit = edit_of(ruled64, ruled64.cfg.recurrent_layers[0], position)
        out = ruled64.generate(SEQUENCE[:, :20], edits=edit, **how)
        whole = by_hand(ruled64, out.sequences, edit)
        assert_close(torch.stack(out.logits, 1).double(), whole[:, 19:-1], rtol=0, atol=1e-6)
        assert_close(whole[0, 19:-1].argmax(-1), out.sequences[0, 20:])


@torch.no_grad()
def test_loops_differ_only_where_there_is_an_erase(ruled64):
    layer, runs = ruled64.cfg.recurrent_layers[0], {}
    for loop in ("closed", "open"):
        with ruled64.edits(edit_of(ruled64, layer, 12, loop=loop)):
            runs[loop] = ruled64(SEQUENCE)
    erases = ruled64.recurrence(SEQUENCE, layer).b is not None
    assert torch.allclose(runs["closed"], runs["open"], rtol=0, atol=1e-6 if erases else 0) is not erases


def test_starting_at_a_block_that_rereads_the_embeddings_needs_tokens(tokens):
    model = HookedRecurrent.from_hf(make_hf("zamba2"), self_check=False)
    with torch.no_grad(), pytest.raises(ValueError, match="needs tokens="):
        model(model(tokens, stop_at_layer=1), start_at_layer=1)


def test_starting_in_the_middle_before_any_pass(tokens):
    """Bamba's blocks return tuples, which a block that is skipped must do as well."""
    model = HookedRecurrent.from_hf(make_hf("bamba"), self_check=False)
    with torch.no_grad():
        residual = torch.randn(2, 70, 32, generator=torch.Generator().manual_seed(0))
        first = model(residual, start_at_layer=1)
        model(tokens)
        assert torch.equal(model(residual, start_at_layer=1), first)
