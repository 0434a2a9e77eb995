"""Generation, caches and padded batches of fla's models: equal to whole passes over single sequences."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import VOCAB
from fla_models import MODEL_TYPES, make_fla
from torch.testing import assert_close

from hookpoints import HookedRecurrent, UnsupportedModelError, WriteEdit

HYBRIDS = {
    "hybrid": {"attn": {"layers": [1], "num_heads": 2}},
    "hybrid_window": {"attn": {"layers": [1], "num_heads": 4, "num_kv_heads": 2, "window_size": 20}},
    "short_convolution": {"use_short_conv": True},
}
PADDED = {"left": [9, 0, 23], "right": [0, 30, 5]}


@pytest.fixture(scope="module", params=[*MODEL_TYPES, *HYBRIDS])
def hooked(request):
    if request.param in MODEL_TYPES:
        return HookedRecurrent.from_hf(make_fla(request.param))
    return HookedRecurrent.from_hf(make_fla("gla", **HYBRIDS[request.param]))


@pytest.fixture
def tokens():
    """[3,70]: more than 64, where fla's layers change from one op to the other."""
    return torch.randint(1, VOCAB, (3, 70), generator=torch.Generator().manual_seed(1))


def mask_of(tokens, side: str) -> torch.Tensor:
    mask = torch.ones_like(tokens)
    for row, count in enumerate(PADDED[side]):
        mask[row, slice(0, count) if side == "left" else slice(tokens.shape[1] - count, None)] = 0
    return mask


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padded_rows_are_as_if_alone(hooked, tokens, side):
    """Logits, writes, states and what heads hand on; padding writes nothing and leaves the state alone."""
    layer = hooked.cfg.recurrent_layers[-1]
    names = [f"blocks.{layer}.mixer.{name}" for name in ("hook_write", "hook_state", "hook_z")]
    mask = mask_of(tokens, side)
    logits, kept = hooked.run_with_cache(tokens, attention_mask=mask, names_filter=names)
    for row, real in enumerate(mask.bool()):
        alone, own = hooked.run_with_cache(tokens[row : row + 1, real], names_filter=names)
        assert_close(logits[row, real], alone[0], rtol=0, atol=2e-5)
        for name in names:
            assert_close(kept[name][row, real], own[name][0], rtol=1e-4, atol=1e-5)
        assert not kept[names[0]][row, ~real].any()
    if not hooked.cfg.layer(layer).rule.startswith("RWKV"):  # at whose padding the decay goes on
        assert_close(kept[names[1]][1, -1], kept[names[1]][1, mask[1].nonzero().max()])  # the state passes through


@torch.no_grad()
def test_decoding_from_the_cache_equals_prefill(hooked, tokens):
    names = [f"blocks.{layer}.mixer.hook_write" for layer in hooked.cfg.recurrent_layers]
    whole, kept = hooked.run_with_cache(tokens, names_filter=names)
    cache = hooked.hf_model(tokens[:, :60], use_cache=True).past_key_values
    cache = hooked.hf_model(tokens[:, 60:64], use_cache=True, past_key_values=cache).past_key_values
    for t in range(64, 70):
        step, at_t = hooked.run_with_cache(
            tokens[:, t : t + 1], names_filter=names, past_key_values=cache, use_cache=True
        )
        assert_close(step[:, 0], whole[:, t], rtol=0, atol=2e-5)
        for name in names:
            assert_close(at_t[name][:, 0], kept[name][:, t], rtol=1e-3, atol=1e-5)


@torch.no_grad()
def test_generation_is_greedy_decoding(hooked, tokens):
    """fla's own ``generate`` loses the cache on new versions of transformers; hooked, it is what it should be."""
    prompt, mask = tokens[:, :30], mask_of(tokens[:, :30], "left")
    out = hooked.generate(prompt, attention_mask=mask, max_new_tokens=5, do_sample=False)
    for row, real in enumerate(mask.bool()):
        ids = prompt[row : row + 1, real]
        for _ in range(5):
            ids = torch.cat([ids, hooked(ids)[:, -1:].argmax(-1)], 1)
        assert torch.equal(out[row, 30:], ids[0, -5:])


@torch.no_grad()
def test_edits_in_a_padded_batch(hooked, tokens):
    """Positions count padding; generated tokens follow the edited state."""
    prompt, mask = tokens[:, :30], mask_of(tokens[:, :30], "left")
    layer = hooked.cfg.recurrent_layers[0]
    shape = hooked.cfg.layer(layer)
    generator = torch.Generator().manual_seed(0)
    write = [torch.randn(size, generator=generator) for size in (shape.K, shape.V)]
    out = hooked.generate(
        prompt,
        attention_mask=mask,
        edits=WriteEdit(layer, 1, 25, *write),
        max_new_tokens=3,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    row, pad = 2, PADDED["left"][2]
    with hooked.edits(WriteEdit(layer, 1, 25 - pad, *write)):
        alone = hooked(out.sequences[row : row + 1, pad:])
    assert_close(torch.stack(out.logits, 1)[row], alone[0, 29 - pad : -1], rtol=0, atol=5e-5)
    plain = hooked(out.sequences[row : row + 1, pad:])
    assert (alone - plain)[0, 29 - pad :].abs().max() > 1e-4


@torch.no_grad()
def test_shared_caches_stay_as_they_are(hooked, tokens):
    """A branch of a cache goes on with edits; the cache that it came from does not notice."""
    cache = hooked.hf_model(tokens[:, :20], use_cache=True).past_key_values
    branch = copy.deepcopy(cache)
    more = tokens[:, 20:22]  # two tokens: RWKV-6 reads before it writes
    plain = hooked(more, past_key_values=copy.deepcopy(cache), use_cache=True)
    with hooked.edits(WriteEdit(hooked.cfg.recurrent_layers[0], 0, 20, mode="delete")):
        edited = hooked(more, past_key_values=branch, use_cache=True)
    assert not torch.equal(edited, plain)
    assert torch.equal(hooked(more, past_key_values=cache, use_cache=True), plain)


@torch.no_grad()
def test_packed_sequences_are_refused(tokens):
    model = HookedRecurrent.from_hf(make_fla("gla"))
    with pytest.raises(UnsupportedModelError, match=r"cu_seqlens.*attention_mask"):
        model.hf_model(tokens[:1], cu_seqlens=torch.tensor([0, 30, 70]))
    assert model(tokens[:1]).isfinite().all()  # the scope that the error left is closed
