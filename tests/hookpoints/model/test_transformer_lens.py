"""Names of TransformerLens' HookedTransformer: there with its meaning, or refused with a reason."""

from __future__ import annotations

import inspect
from importlib.metadata import version

import pytest
import torch
import transformer_lens
from tiny_models import make_hf
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from hookpoints import HookedRecurrent, attribute
from hookpoints.errors import InputError
from hookpoints.model.refused import refuse_arguments
from hookpoints.refused import REFUSED_NAMES

THEIRS = getattr(transformer_lens, "HookedTransformer", None) if version("transformer-lens") < "4" else None


def refuses(owner, name):
    with pytest.raises(AttributeError, match=f"'{name}'") as raised:
        getattr(owner, name)
    assert str(raised.value).endswith(f": {REFUSED_NAMES[name]}") and "\n" not in str(raised.value)


def test_parts_and_graphs_say_what_to_use_for_names_of_other_tools(embedded):
    for owner, name in (
        (embedded.blocks[0], "ln1"),
        (embedded.blocks[0].attn, "W_Q"),
        (embedded.unembed, "W_U"),
        (attribute("The people", embedded, measure=1, targets=0), "to_pt"),
    ):
        refuses(owner, name)
    with pytest.raises(InputError, match=r"^attribute takes no prompt: text= takes it$"):
        attribute(prompt="The people", model=embedded)  # type: ignore[call-arg]


def test_every_public_name_is_there_or_refused(model):
    names = {name for name in dir(THEIRS) if not name.startswith("_")} if THEIRS else set()
    absent = {name for name in names - set(dir(nn.Module)) if not hasattr(model, name)}
    assert absent - {"W_O"} <= set(REFUSED_NAMES)  # W_O: of heads of one shape
    for name in REFUSED_NAMES.keys() - {"W_E", "W_U", "b_U"}:  # of its own module there
        assert not hasattr(model, name)
        refuses(model, name)
    with pytest.raises(AttributeError, match="no attribute 'W_X'"):
        _ = model.W_X


def test_arguments_of_its_loading_are_taken_where_they_ask_for_nothing_and_refused_else():
    names = inspect.signature(THEIRS.from_pretrained).parameters if THEIRS else {}
    ours = inspect.signature(HookedRecurrent.from_pretrained).parameters
    assert refuse_arguments({"fold_ln": False, "n_ctx": None, "device_map": "cpu"}) == {"device_map": "cpu"}
    for name in {"load_in_4bit"} | names.keys() - ours.keys() - {"model_name", "from_pretrained_kwargs"}:
        with pytest.raises(InputError, match=name):
            HookedRecurrent.from_pretrained("embedded", **{name: "something"})


@torch.no_grad()
def test_ends_of_the_residual_stream(model, tokens):
    logits, cache = model.run_with_cache(tokens)
    assert torch.equal(model.embed(tokens), cache["embed"])
    assert_close(model.ln_final(cache["resid_post", -1]), cache["normalized"])
    assert_close(model.unembed(cache["normalized"]), logits, rtol=1e-4, atol=1e-5)
    assert not model.b_U.any() and model.b_U.shape == (64,) and model.b_O.shape == (4, 32)
    assert model.all_head_labels()[7:] == ["L1H3", "L2H0", "L2H1", "L2H2", "L2H3", "L3H0", "L3H1"]


def test_directions_of_tokens(embedded):
    token = embedded.to_single_token("e")
    for one in ("e", token, torch.tensor([token])):
        assert torch.equal(embedded.tokens_to_residual_directions(one), embedded.W_U[:, token])
    many = torch.tensor([[token, 1], [2, 3]])
    assert torch.equal(embedded.tokens_to_residual_directions(many)[1, 0], embedded.W_U[:, 2])


def test_the_configuration_has_transformer_lens_fields():
    model = HookedRecurrent.from_hf(make_hf())
    cfg = model.cfg
    assert (cfg.d_head, cfg.d_mlp, cfg.act_fn, cfg.attn_only) == (6, 48, "silu", False)
    assert (cfg.normalization_type, cfg.eps) == ("RMS", 1e-6)
    assert cfg.to_dict()["layers"][0]["K"] == 8
    for dtype in (torch.bfloat16, torch.float64):  # it follows the model
        model.hf_model.to(dtype)
        assert model.cfg.dtype == dtype


def test_arguments_of_its_generation(model, tokens):
    how, seen = {"max_new_tokens": 3, "do_sample": False}, []
    plain = model.generate(tokens[:1], **how)
    assert torch.equal(
        model.generate(tokens[:1], use_past_kv_cache=True, freq_penalty=0.0, verbose=False, **how), plain
    )
    with model.hooks([("hook_embed", lambda x, hook: seen.append(x.shape[1]))]):
        assert torch.equal(model.generate(tokens[:1], use_past_kv_cache=False, **how), plain)
    assert seen == [70, 71, 72]  # without a cache all tokens are read again
    model.hf_model.generation_config.eos_token_id = int(plain[0, 70])
    try:
        assert model.generate(tokens[:1], **how).shape[1] == 71
        assert torch.equal(model.generate(tokens[:1], stop_at_eos=False, **how), plain)
    finally:
        model.hf_model.generation_config.eos_token_id = None


def test_the_first_token_is_forced_or_taken_off(embedded):
    start = embedded.tokenizer.bos_token_id
    plain = embedded.to_tokens("of the people")[0].tolist()
    for text in ("of the people", f"{embedded.tokenizer.bos_token}of the people"):
        for wanted, ids in ((True, [start, *plain]), (False, plain)):
            assert embedded.to_tokens(text, prepend_bos=wanted)[0].tolist() == ids
            assert torch.equal(embedded(text, prepend_bos=wanted), embedded(torch.tensor([ids])))
    assert embedded.to_string([start, *plain]) == f"{embedded.tokenizer.bos_token}of the people"


@torch.no_grad()
def test_hooks_stay_where_they_are_not_to_be_reset(model, tokens):
    plain, hook = model(tokens), ("blocks.1.mixer.hook_write", lambda x, hook: 2 * x)
    with model.hooks([hook], reset_hooks_end=False):
        edited = model(tokens)
    assert not torch.equal(edited, plain) and torch.equal(model(tokens), edited)
    model.reset_hooks()
    assert torch.equal(model(tokens), plain)


def test_losses(model, tokens):
    with torch.no_grad():
        logits, loss = model(tokens, return_type="both", loss_per_token=True)
        mean = model(tokens, return_type="loss")
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    assert_close(loss.flatten(), expected)
    assert_close(mean, expected.mean())
    mask = torch.ones_like(tokens)
    mask[1, 9:] = 0
    assert_close(model.loss_fn(logits, tokens, mask), expected[mask[:, 1:].flatten() == 1].mean())
