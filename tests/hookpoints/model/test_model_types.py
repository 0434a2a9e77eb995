"""What holds of every family, a test of each kind. fla's models run the same tests (``tests/hookpoints/fla``)."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import VOCAB, make_hf
from torch.testing import assert_close

from hookpoints import HookedRecurrent, UnsupportedModelError, WriteEdit
from hookpoints.fla import is_fla
from hookpoints.hooks.table import HOOKS
from hookpoints.model.inputs import cache_argument, cache_of, position_inputs

EXACT = {"rtol": 0, "atol": 1e-10}
VALUE_FIRST = {False: {"Mamba-2"}, True: {"Gated DeltaNet", "GLA", "HGRN2", "Kimi delta attention", "SimpleGLA"}}
"""Whether a model is fla's -> rules whose states its cache keeps [B,H,V,K]."""


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


SEQUENCE = torch.randint(1, VOCAB, (1, 41), generator=torch.Generator().manual_seed(3))


def left_padding(tokens: torch.Tensor) -> torch.Tensor:
    mask = torch.ones_like(tokens)
    mask[0, :9] = 0
    return mask


def edit_of(model: HookedRecurrent, layer: int, position: int | None, **options) -> WriteEdit:
    shape = model.cfg.layer(layer)
    return WriteEdit(layer, 1, position, normal(0, 2, shape.K), normal(1, 2, shape.V), **options)


def by_hand(model: HookedRecurrent, tokens: torch.Tensor, edit: WriteEdit) -> torch.Tensor:
    """A full run with the write changed at its hook: the oracle, which shares no code with edits."""

    def hook(write, hook):
        write = write.clone()
        at = slice(None) if edit.position is None else edit.position
        new = 0 if edit.keys is None or edit.values is None else edit.keys.T @ edit.values
        write[:, at] = new + (write[:, at] if edit.mode == "add" else 0 * write[:, at])
        return write

    name = f"blocks.{edit.layer}.mixer.heads.{edit.head}.hook_write"
    return model.run_with_hooks(tokens, fwd_hooks=[(name, hook)])


@torch.no_grad()
def test_hooked_is_plain(hooked, tokens):
    """Bit by bit, while nobody listens."""
    plain = make_hf(hooked.cfg.model_type.removesuffix("_text"))
    for mask in (None, left_padding(tokens)):
        assert torch.equal(hooked(tokens, attention_mask=mask), plain(tokens, attention_mask=mask).logits)


@torch.no_grad()
def test_listening_changes_nothing(hooked, tokens):
    """Bit by bit, with a listener on every hook; every hook fires."""
    for mask in (None, left_padding(tokens)):
        logits, cache = hooked.run_with_cache(tokens, attention_mask=mask, names_filter=lambda name: True)
        assert torch.equal(logits, hooked(tokens, attention_mask=mask))
        assert set(cache.keys()) == set(hooked.hook_dict)
    with torch.inference_mode():
        assert torch.equal(hooked(tokens), hooked.hf_model(tokens).logits)


@torch.no_grad()
def test_reads_are_queries_times_states_and_the_last_is_the_caches(hooked, tokens):
    layer, of_fla = hooked.cfg.recurrent_layers[-1], is_fla(hooked.hf_model)
    names = [f"blocks.{layer}.mixer.{name}" for name in ("hook_q", "hook_state", "hook_read")]
    _, kept = hooked.run_with_cache(tokens, names_filter=names)
    (q, states, reads), shape = (kept[name] for name in names), hooked.cfg.layer(layer)
    cache = cache_of(hooked.hf_model(tokens, use_cache=True))
    native = cache[layer]["recurrent_state"] if of_fla else cache.layers[layer].recurrent_states[0]
    native = native.mT if shape.rule in VALUE_FIRST[of_fla] else native
    assert_close(states[:, -1], native, rtol=1e-4, atol=1e-5)
    scale = 1.0 if shape.rule in ("Mamba-2", "RWKV-6", "RWKV-7") else shape.K**-0.5
    if shape.rule == "RWKV-6":  # reads before it writes
        states = torch.cat([torch.zeros_like(states[:, :1]), states[:, :-1]], 1)
    expected = torch.einsum("bthkv,bthk->bthv", states, scale * q)
    assert_close(expected, reads, rtol=1e-4, atol=2e-6 * max(1.0, float(reads.abs().max())))


@torch.no_grad()
def test_decoding_continues_the_prompt(hooked, tokens):
    """Token by token from a cache: logits and writes are those of the whole, and listening changes no bit."""
    names = [f"blocks.{layer}.mixer.hook_write" for layer in hooked.cfg.recurrent_layers]
    whole, kept = hooked.run_with_cache(tokens, names_filter=names)
    heard, argument = cache_of(hooked.hf_model(tokens[:, :65], use_cache=True)), cache_argument(hooked.hf_model)
    plain, slack = copy.deepcopy(heard), 1 if is_fla(hooked.hf_model) else 10
    for t in range(65, 70):
        how = {"use_cache": True, **position_inputs(hooked.hf_model, torch.full((2, 1), t))}
        step = hooked(tokens[:, t : t + 1], **{argument: plain}, **how)
        listened, at_t = hooked.run_with_cache(
            tokens[:, t : t + 1], names_filter=lambda name: "mixer." in name, **{argument: heard}, **how
        )
        assert torch.equal(step, listened)
        assert_close(step[:, 0], whole[:, t], rtol=0, atol=2e-5 * slack)
        for name in names:
            assert_close(at_t[name][:, 0], kept[name][:, t], rtol=1e-3, atol=1e-5 * slack)


@torch.no_grad()
def test_own_kernel_gives_the_models_logits(hooked, tokens):
    own = HookedRecurrent.from_hf(hooked.hf_model, backend="recurrence", self_check=False)
    logits = own(tokens)
    own.attachment.detach()
    assert_close(logits, hooked(tokens), rtol=0, atol=5e-5)


@torch.no_grad()
def test_stop_and_start_meet(hooked, tokens):
    plain = hooked(tokens)
    for layer in range(hooked.cfg.n_layers):
        residual = hooked(tokens, stop_at_layer=layer)
        assert residual.shape == (*tokens.shape, hooked.cfg.d_model)
        if layer and hooked.attachment.layout.first_block_feeds_all:  # fla's RWKV-7; from_pretrained takes another
            with pytest.raises(UnsupportedModelError, match="cannot start at layer"):
                hooked(residual, start_at_layer=layer, tokens=tokens)
        else:
            assert torch.equal(hooked(residual, start_at_layer=layer, tokens=tokens), plain)


@torch.no_grad()
def test_hooks_fire_with_their_shapes(hooked, tokens):
    """In the prompt and at each decoded token."""
    layer, seen = hooked.cfg.recurrent_layers[-1], {}
    shape, per_channel = hooked.cfg.layer(layer), hooked.recurrence(tokens, layer).decays_per_channel
    has = hooked.attachment.mixers[layer].rule.factor_names
    rows = [row for row in HOOKS if row.scope in ("mixer", "head") and (row.factor is None or row.factor in has)]

    def note(value, hook):
        seen.setdefault(hook.name, []).append(tuple(value.shape))

    with hooked.hooks([(row.full_name(layer, 1), note) for row in rows]):
        hooked.generate(tokens, max_new_tokens=2, do_sample=False)
    sizes = {"B": 2, "H": shape.H, "K": shape.K, "V": shape.V, "R": shape.R, "F": shape.K * shape.V}
    for row in rows:
        axes = row.axes_of(shape.R).replace("(KV)", "F").split(" or ")[-1 if per_channel else 0]
        expected = [tuple({**sizes, "T": t, "S": s}[axis] for axis in axes) for t, s in ((70, 70), (1, 71))]
        assert seen[row.full_name(layer, 1)] == expected


@torch.no_grad()
def test_edits_are_exact_in_prefill_and_session(hooked64):
    """The first and the last recurrent layer; the first token, the last, and all."""
    sequence, session = SEQUENCE, hooked64.edit_session(SEQUENCE)
    for layer in hooked64.cfg.recurrent_layers[:: len(hooked64.cfg.recurrent_layers) - 1]:
        for position in (0, 40, None):
            edit = edit_of(hooked64, layer, position, mode="replace")
            expected = by_hand(hooked64, sequence, edit)
            unread = position == 40 and hooked64.recurrence(sequence, layer).read_before_write
            assert torch.allclose(expected, session.logits, rtol=0, atol=1e-6) is bool(unread)
            with hooked64.edits(edit):
                assert_close(hooked64(sequence), expected, **EXACT)
            run = session.run([[], edit])
            assert_close(run.logits[1], expected[0, run.start :], **EXACT)
            assert_close(run.logits[0], session.logits[0, run.start :], **EXACT)


@torch.no_grad()
def test_edits_are_exact_in_generation(hooked64):
    """In the prompt, among generated tokens, everywhere; each generated token is the full run's."""
    how = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    for position in (10, 21, None):
        edit = edit_of(hooked64, hooked64.cfg.recurrent_layers[0], position)
        out = hooked64.generate(SEQUENCE[:, :20], edits=edit, **how)
        whole = by_hand(hooked64, out.sequences, edit)
        assert_close(torch.stack(out.logits, 1).double(), whole[:, 19:-1], rtol=0, atol=1e-6)
        assert_close(whole[0, 19:-1].argmax(-1), out.sequences[0, 20:])


@torch.no_grad()
def test_loops_differ_only_where_there_is_an_erase(hooked64):
    layer, runs = hooked64.cfg.recurrent_layers[0], {}
    for loop in ("closed", "open"):
        with hooked64.edits(edit_of(hooked64, layer, 12, loop=loop)):
            runs[loop] = hooked64(SEQUENCE)
    erases = hooked64.recurrence(SEQUENCE, layer).b is not None
    assert torch.allclose(runs["closed"], runs["open"], rtol=0, atol=1e-6 if erases else 0) is not erases


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("model_type", ["qwen3_5", "falcon_h1", "rwkv7"])
def test_other_dtypes_are_bit_identical(model_type, dtype, tokens):
    plain, model = make_hf(model_type).to(dtype), HookedRecurrent.from_hf(make_hf(model_type).to(dtype))
    listened, cache = model.run_with_cache(tokens, names_filter=lambda name: True)
    assert torch.equal(listened, plain(tokens).logits)
    assert listened.dtype == plain(tokens).logits.dtype and cache["blocks.0.hook_resid_pre"].dtype == dtype
    with model.hooks([(lambda name: True, lambda x, hook: None)]):
        out = model.generate(tokens, max_new_tokens=3, do_sample=False)
    assert torch.equal(out, plain.generate(tokens, max_new_tokens=3, do_sample=False))


@pytest.mark.parametrize("hook", ["hook_mixer_out", "hook_attn_out", "hook_mlp_out"])
@torch.no_grad()
def test_scaled_outputs_can_be_edited(hook, tokens):
    """Falcon-H1's multipliers lie between the module and the residual stream; an edit is made behind them."""
    model = HookedRecurrent.from_hf(make_hf("falcon_h1"), self_check=False)
    names = [f"blocks.1.{name}" for name in ("hook_resid_post", hook)]
    _, plain = model.run_with_cache(tokens, names_filter=names)
    for edit in (lambda x, hook: 0 * x, lambda x, hook: x.zero_()):
        with model.hooks([(names[1], edit)]):
            _, edited = model.run_with_cache(tokens, names_filter=names[0])
        gone = plain[names[0]] - edited[names[0]]
        assert gone.abs().max() > 1e-3
        if hook == "hook_mlp_out":  # the others reach the MLP as well
            assert_close(gone, plain[names[1]], rtol=1e-4, atol=1e-5)


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
