"""Hooked = plain, bit for bit, while nobody edits; for every model type."""

from __future__ import annotations

import pytest
import torch
import transformers
from conftest import VOCAB, continuing, make_hf
from torch.testing import assert_close

from hookpoints import HookedRecurrent, UnsupportedModelError
from hookpoints.errors import SelfCheckError
from hookpoints.model.inputs import cache_of


@pytest.fixture
def hooked(any_hf):
    model = HookedRecurrent.from_hf(any_hf)
    yield model
    model.attachment.detach()


@torch.no_grad()
def test_no_listener_is_bit_identical(hooked, tokens):
    with torch.inference_mode():
        assert torch.equal(hooked(tokens), hooked.hf_model(tokens).logits)
    expected = make_hf(hooked.cfg.model_type.removesuffix("_text"))(tokens).logits
    assert torch.equal(hooked(tokens), expected)


@torch.no_grad()
def test_listening_everywhere_is_bit_identical(hooked, tokens):
    plain = hooked(tokens)
    logits, cache = hooked.run_with_cache(tokens, names_filter=lambda name: True)
    assert torch.equal(logits, plain)
    assert set(cache.keys()) == set(hooked.hook_dict)


@torch.no_grad()
def test_left_padding_is_bit_identical(hooked, tokens):
    mask = torch.ones_like(tokens)
    mask[0, :9] = 0
    plain = make_hf(hooked.cfg.model_type.removesuffix("_text"))(tokens, attention_mask=mask).logits
    listened, _ = hooked.run_with_cache(tokens, attention_mask=mask, names_filter=lambda name: True)
    assert torch.equal(hooked(tokens, attention_mask=mask), plain)
    assert torch.equal(listened, plain)


@torch.no_grad()
def test_states_are_the_caches_states(hooked, tokens):
    """The last state of the trajectory is what the model itself hands on to generation."""
    out = hooked.hf_model(tokens, use_cache=True)
    states = [f"blocks.{layer}.mixer.hook_state" for layer in hooked.cfg.recurrent_layers]
    _, cache = hooked.run_with_cache(tokens, names_filter=states)
    for layer in hooked.cfg.recurrent_layers:
        native = cache_of(out).layers[layer].recurrent_states[0]
        if hooked.cfg.layer(layer).rule == "Mamba-2":  # upstream keeps these value-first
            native = native.mT
        assert_close(cache[f"blocks.{layer}.mixer.hook_state"][:, -1], native, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_reads_are_states_times_queries(hooked, tokens):
    layer = hooked.cfg.recurrent_layers[0]
    prefix = f"blocks.{layer}.mixer."
    _, cache = hooked.run_with_cache(tokens, names_filter=[prefix + n for n in ("hook_q", "hook_state", "hook_read")])
    rule, states = hooked.cfg.layer(layer).rule, cache[prefix + "hook_state"]
    scale = 1.0 if rule in ("Mamba-2", "RWKV-6", "RWKV-7") else hooked.cfg.layer(layer).K ** -0.5
    if rule == "RWKV-6":  # reads before it writes
        states = torch.cat([torch.zeros_like(states[:, :1]), states[:, :-1]], 1)
    read = torch.einsum("bthkv,bthk->bthv", states, scale * cache[prefix + "hook_q"])
    largest = max(1.0, float(read.abs().max()))
    assert_close(read, cache[prefix + "hook_read"], rtol=1e-4, atol=2e-6 * largest)


@torch.no_grad()
def test_own_kernel_gives_the_models_logits(any_hf, tokens):
    own = HookedRecurrent.from_hf(any_hf, backend="recurrence", self_check=False)
    logits = own(tokens)
    own.attachment.detach()
    assert_close(logits, any_hf(tokens).logits, rtol=0, atol=5e-5)


@torch.no_grad()
def test_decoding_from_the_cache_equals_prefill(hooked, tokens):
    names = [f"blocks.{layer}.mixer.hook_write" for layer in hooked.cfg.recurrent_layers]
    whole, cache = hooked.run_with_cache(tokens, names_filter=names)
    out = hooked.hf_model(tokens[:, :60], use_cache=True)
    for t in range(60, tokens.shape[1]):
        step, at_t = hooked.run_with_cache(
            tokens[:, t : t + 1],
            names_filter=names,
            position_ids=torch.full((2, 1), t),
            use_cache=True,
            **continuing(hooked.hf_model, out),
        )
        assert_close(step[:, 0], whole[:, t], rtol=0, atol=5e-4)
        for name in names:
            assert_close(at_t[name][:, 0], cache[name][:, t], rtol=1e-3, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("model_type", ["qwen3_5", "mamba2", "falcon_h1", "bamba"])
def test_other_dtypes_are_bit_identical(model_type, dtype, tokens):
    plain = make_hf(model_type).to(dtype)
    model = HookedRecurrent.from_hf(make_hf(model_type).to(dtype))
    listened, cache = model.run_with_cache(tokens, names_filter=lambda name: True)
    assert torch.equal(listened, plain(tokens).logits)
    assert listened.dtype == plain(tokens).logits.dtype and cache["blocks.0.hook_resid_pre"].dtype == dtype
    with model.hooks([(lambda name: True, lambda x, hook: None)]):
        out = model.generate(tokens, max_new_tokens=3, do_sample=False)
    assert torch.equal(out, plain.generate(tokens, max_new_tokens=3, do_sample=False))


@torch.no_grad()
def test_stop_and_start_meet(hooked, tokens):
    plain = hooked(tokens)
    for layer in range(hooked.cfg.n_layers):
        residual = hooked(tokens, stop_at_layer=layer)
        assert residual.shape == (*tokens.shape, hooked.cfg.d_model)
        assert torch.equal(hooked(residual, start_at_layer=layer, tokens=tokens), plain)
    assert torch.equal(hooked(tokens, stop_at_layer=-1), hooked(tokens, stop_at_layer=hooked.cfg.n_layers - 1))


@torch.no_grad()
def test_partial_runs_leave_nothing_behind(model, tokens):
    plain = model(tokens)
    with pytest.raises(RuntimeError, match="boom"), model.hooks([("blocks.2.mixer.hook_q", _boom)]):
        model(model(tokens, stop_at_layer=1), start_at_layer=1)
    assert torch.equal(model(tokens), plain)
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


def _boom(value, hook):
    raise RuntimeError("boom")


def test_losses(model, tokens):
    with torch.no_grad():
        logits, loss = model(tokens, return_type="both", loss_per_token=True)
        mean = model(tokens, return_type="loss")
    expected = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
    )
    assert_close(loss.flatten(), expected)
    assert_close(mean, expected.mean())


def test_weights_are_in_transformer_lens_orientation(model):
    assert model.W_E.shape == (VOCAB, 32) and model.W_U.shape == (32, VOCAB)
    assert model.layer_W_O(0).shape == (4, 6, 32)
    weight = model.attachment.layout.blocks[0].mixer.out_proj.weight
    assert torch.equal(model.layer_W_O(0)[3], weight[:, 18:24].T)


def test_multimodal_checkpoint_gives_its_text_model(tmp_path, tokens):
    """Published Qwen3.5 checkpoints name the multimodal class."""
    text = make_hf().config.to_dict()
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    config = transformers.Qwen3_5Config(text_config=text, vision_config=vision)
    torch.manual_seed(0)
    whole = transformers.Qwen3_5ForConditionalGeneration(config).eval()
    whole.save_pretrained(tmp_path)
    model = HookedRecurrent.from_pretrained(str(tmp_path), device="cpu")
    assert type(model.hf_model).__name__ == "Qwen3_5ForCausalLM"
    with torch.no_grad():
        assert_close(model(tokens), whole(tokens).logits, rtol=0, atol=5e-6)


@pytest.mark.filterwarnings("ignore:.*loaded without a tokenizer")
def test_saved_checkpoint_loads_with_device_map(tmp_path, hf, tokens):
    hf.save_pretrained(tmp_path)
    model = HookedRecurrent.from_pretrained(str(tmp_path), device_map={"": "cpu"})
    with torch.no_grad():
        assert torch.equal(model(tokens), hf(tokens).logits)


def test_a_model_without_recurrence_is_refused():
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(UnsupportedModelError, match="'llama' cannot be hooked: none of its layers"):
        HookedRecurrent.from_hf(transformers.LlamaForCausalLM(config))


def test_self_check_refuses_a_layer_that_is_not_what_it_seems():
    hf = make_hf()
    mixer = hf.model.layers[1].linear_attn
    original = mixer.forward
    mixer.forward = lambda hidden_states, **kwargs: torch.zeros_like(hidden_states)  # never calls its op
    with pytest.raises(SelfCheckError, match=r"layer 1 \(Gated DeltaNet\).*none of its ops"):
        HookedRecurrent.from_hf(hf)
    mixer.forward = original
    HookedRecurrent.from_hf(hf)


def test_self_check_refuses_a_wrong_formula(monkeypatch):
    from hookpoints.rules import Rule

    true_form = Rule.form
    monkeypatch.setattr(Rule, "form", lambda self, f, arguments: true_form(self, f, arguments).replace(scale=1.0))
    with pytest.raises(SelfCheckError, match=r"layer 0 .*differ by"):
        HookedRecurrent.from_hf(make_hf())


def test_a_broken_tokenizer_is_not_mistaken_for_none(tmp_path, hf):
    hf.save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (tmp_path / "tokenizer.json").write_text("{ truncated")
    with pytest.warns(UserWarning, match="loaded without a tokenizer"):
        model = HookedRecurrent.from_pretrained(str(tmp_path), device="cpu")
    with pytest.raises(ValueError, match="has no tokenizer"):
        model.to_tokens("text")
