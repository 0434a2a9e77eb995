"""fla's models on a CPU: the tests of every family, and padded batches, which their layers run packed."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from fla_models import MODEL_TYPES, make_fla
from remembering import drawn_ids
from tiny_models import KeepFloat64
from torch.testing import assert_close

from hookpoints import HookedRecurrent, UnsupportedModelError, WriteEdit, attach, attribute

sys.path += [str(Path(__file__).parents[2] / "tests/hookpoints" / room) for room in ("model", "hooks", "circuit")]

from test_attribute import test_writes_and_states_are_taken_apart  # noqa: F401
from test_cache import (  # noqa: F401
    run,
    test_parts_add_up_to_the_stream,
    test_parts_behind_a_blocks_norm_are_what_its_mixer_is_given,
    test_parts_behind_the_final_norm_add_up_to_the_logits,
)
from test_heads import test_heads_times_their_weights_are_what_the_layer_adds  # noqa: F401
from test_model_types import (  # noqa: F401
    test_edits_are_exact_in_generation,
    test_edits_are_exact_in_prefill_and_session,
    test_hooks_fire_with_their_shapes,
    test_loops_differ_only_where_there_is_an_erase,
)
from test_parity import (  # noqa: F401
    test_decoding_continues_the_prompt,
    test_listening_changes_nothing,
    test_reads_are_queries_times_states_and_the_last_is_the_caches,
    test_stop_and_start_meet,
)
from test_pattern import test_weights_times_values_are_the_reads  # noqa: F401
from test_state_in_and_erase import (  # noqa: F401
    test_a_state_that_is_set_is_as_a_cache_that_is_set,
    test_a_token_without_write_decay_and_erase_is_as_if_it_were_not_there,
)
from test_write_attribution import (  # noqa: F401
    test_first_order_is_a_derivative,
)


@pytest.fixture(scope="module", params=MODEL_TYPES)
def hooked(request):
    return HookedRecurrent.from_hf(make_fla(request.param))


@pytest.fixture(scope="module", params=MODEL_TYPES)
def _hooked64(request):
    with KeepFloat64():
        return HookedRecurrent.from_hf(make_fla(request.param).double())


@pytest.fixture(scope="module")
def _ruled64(_hooked64):
    return _hooked64


@pytest.fixture(scope="module", params=[*MODEL_TYPES, "short_convolution"])
def model(request):
    if request.param == "short_convolution":
        return make_fla("gla", use_short_conv=True)
    return make_fla(request.param)


def padded(pads: list[tuple[int, int]], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and their mask [B,T], zero at that many tokens on the left and on the right of each row."""
    tokens = drawn_ids(len(pads), length)
    at = torch.arange(length)
    return tokens, torch.stack([((at >= left) & (at < length - right)).long() for left, right in pads])


@torch.no_grad()
def test_padded_rows_are_as_if_alone(model):
    """On either side: logits, writes, states and what heads hand on. Padding writes nothing and leaves the state alone.
    70 tokens: fla's layers change from one op to the other at 64. In float32 a batch and a row alone round up to 3e-5
    apart."""
    pads = [(9, 0), (0, 0), (23, 0), (0, 30), (0, 5)]
    with KeepFloat64(), attach(copy.deepcopy(model).double()) as hooked:
        layer = hooked.cfg.recurrent_layers[-1]
        names = [f"blocks.{layer}.mixer.{name}" for name in ("hook_write", "hook_state", "hook_z")]
        tokens, mask = padded(pads, 70)
        out, kept = hooked.run_with_cache(tokens, attention_mask=mask, use_cache=False, names_filter=names)
        for row, real in enumerate(mask.bool()):
            alone, own = hooked.run_with_cache(tokens[row : row + 1, real], names_filter=names)
            assert_close(out.logits[row, real], alone.logits[0], rtol=0, atol=1e-10)
            for name in names:
                assert_close(kept[name][row, real], own[name][0], rtol=0, atol=1e-10)
            assert not kept[names[0]][row, ~real].any()
        if hooked.cfg.layer(layer).rule not in ("RWKV-6", "RWKV-7"):  # at whose padding the decay goes on
            assert_close(kept[names[1]][-1, -1], kept[names[1]][-1, 64])  # the state passes through


@torch.no_grad()
def test_edits_in_a_padded_batch(model):
    """Positions count padding. Generation, which fla's own ``generate`` does without a cache, follows the edited state
    as a whole pass over the row alone does."""
    tokens, mask = padded([(9, 0), (0, 0), (23, 0)], 30)
    hooked = HookedRecurrent.from_hf(model)
    layer, generator = hooked.cfg.recurrent_layers[0], torch.Generator().manual_seed(0)
    shape = hooked.cfg.layer(layer)
    head = min(1, shape.H - 1)
    write = [torch.randn(size, generator=generator) for size in (shape.K, shape.V)]
    how = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    out = hooked.generate(tokens, attention_mask=mask, edits=WriteEdit(layer, head, 25, *write), **how)
    hooked.attachment.detach()
    for row, pad in enumerate((9, 0, 23)):
        ids = out.sequences[row : row + 1, pad:]
        with attach(model) as alone, alone.edits(WriteEdit(layer, head, 25 - pad, *write)):
            edited = alone(ids).logits[0, 29 - pad : -1]
        assert_close(torch.stack(out.logits, 1)[row], edited, rtol=0, atol=5e-5)
        with attach(model) as plain:
            assert (edited - plain(ids).logits[0, 29 - pad : -1]).abs().max() > 1e-4


def test_packed_sequences_are_refused():
    model = HookedRecurrent.from_hf(make_fla("gla"))
    with pytest.raises(UnsupportedModelError, match="cu_seqlens"):
        model.hf_model(torch.ones(1, 70).long(), cu_seqlens=torch.tensor([0, 30, 70]))


def test_a_key_that_gates_alone_make_has_edges():
    """That of HGRN2 is constant where gates are held fixed; a source that is off changes the gates."""
    model = HookedRecurrent.from_hf(make_fla("hgrn2"))
    tokens = drawn_ids(1, 16, seed=3)
    graph = attribute(tokens, model, [5], measure=3, targets=1)
    keys = graph.edges[graph.edges.port == "key"]
    assert keys.measured.abs().max() > 0
