"""What is wrong is refused with what was asked, what was found and how to mend it, or is computed rightly."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_models import MAKERS

from hookpoints import (
    HookedRecurrent,
    UnsupportedModelError,
    WriteEdit,
    attribute,
    model_types,
    write_attribution,
)
from hookpoints.errors import HookShapeError, InputError
from hookpoints.rules.known import REFUSED

LEFT, RIGHT, WHOLE, HOLE = [0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [1] * 5, [1, 0, 1, 1, 1]
IDS = torch.arange(1, 11).view(2, 5)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.tensor([LEFT, RIGHT]), "left"),
        (torch.tensor([WHOLE, [0, 1, 1, 1, 0]]), "left"),
        (torch.tensor([WHOLE, HOLE]), "hole"),
        (torch.tensor([LEFT, [0] * 5]), "no token"),
        (torch.ones(2, 4), r"\[2, 4\]"),
        (torch.ones(1, 5), r"\[1, 5\]"),
        (torch.ones(2, 8), r"\[2, 8\]"),
        (torch.ones(2, 1, 5, 5), r"\[2, 1, 5, 5\]"),
        (torch.tensor([[0.5] * 5, WHOLE]), "0 and 1"),
        ([WHOLE, WHOLE], "attention_mask"),
        (torch.ones(2, 5).numpy(), "attention_mask"),
        ("left", "attention_mask"),
        (1, "attention_mask"),
        (True, "attention_mask"),
        (torch.ones(2, 5, dtype=torch.complex64), "attention_mask"),
        (torch.ones(2, 5).to_sparse(), "attention_mask"),
        (torch.ones(2, 5, device="meta"), "attention_mask"),
    ],
)
@torch.no_grad()
def test_masks_that_recurrent_layers_cannot_obey(model, mask, message):
    for call in (
        lambda: model(IDS, attention_mask=mask),
        lambda: model(IDS, attention_mask=mask, return_type="loss"),
        lambda: model.generate(IDS, attention_mask=mask, max_new_tokens=1),
    ):
        with pytest.raises(InputError, match=message):
            call()


@pytest.mark.parametrize("token", [-1, 64])
def test_ids_outside_the_vocabulary_are_refused(model, token):
    with pytest.raises(InputError, match=rf"token id {token} is outside .* ids 0 to 63"):
        model(torch.tensor([[1, token]]))


@torch.no_grad()
def test_padding_on_one_side_gives_what_the_rows_give_alone(model):
    """Left or right, real tokens have the logits that they have without padding."""
    for mask in ([LEFT, WHOLE], [RIGHT, WHOLE]):
        logits = model(IDS, attention_mask=torch.tensor(mask))
        alone = model(IDS[:1, torch.tensor(mask[0]) == 1])
        torch.testing.assert_close(logits[:1, torch.tensor(mask[0]) == 1], alone, rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match="generate needs prompts padded on the left"):
        model.generate(IDS, attention_mask=torch.tensor([RIGHT, WHOLE]), max_new_tokens=1)


@torch.no_grad()
def test_a_cache_takes_the_mask_of_all_tokens(model):
    out = model.hf_model(IDS, attention_mask=torch.tensor([LEFT, WHOLE]), use_cache=True)
    more = torch.tensor([[*LEFT, 1], [1] * 6])
    where = torch.full((2, 1), 5)
    name = "cache" if "cache" in out else "past_key_values"
    logits = model(IDS[:, :1], attention_mask=more, position_ids=where, use_cache=True, **{name: out[name]})
    assert logits.shape == (2, 1, 64)
    with pytest.raises(InputError, match=r"must be \[2,past\+5\]"):
        model(IDS, attention_mask=more[:, :4], **{name: out[name]})


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (IDS + 64, "vocabulary"),
        (IDS - 2, "vocabulary"),
        (IDS[:, :0], "token ids"),
        (IDS[:0], "token ids"),
        (IDS.float(), "token ids"),
        (IDS > 3, "token ids"),
        (IDS.to(torch.complex64), "token ids"),
        (IDS.to_sparse(), "token ids"),
        (IDS.view(1, 2, 5), "token ids"),
        ([], "token ids"),
    ],
)
def test_tokens_that_are_none(model, tokens, message):
    for call in (model, model.run_with_cache, lambda ids: model.generate(ids, max_new_tokens=1)):
        with pytest.raises(InputError, match=message):
            call(tokens)


def test_longer_than_attention_was_made_for(model):
    with torch.no_grad(), pytest.warns(UserWarning, match="513 tokens, but the attention layers .* made for 512"):
        model(torch.ones(1, 513, dtype=torch.long))


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (3, r"layer 3 of \S+ has no recurrence and so no writes; .*recurrent layers are \[0, 1, 2\]"),
        (9, "layer 9 is out of range"),
        (-1, "-1"),
    ],
)
def test_layers_without_recurrence(model, layer, message):
    delete = WriteEdit(layer, 0, 0, mode="delete")
    for call in (
        lambda: model.recurrence(IDS, layer),
        lambda: model.run_with_edits(IDS[:1], [delete]),
        lambda: model.edits(delete).__enter__(),
        lambda: model.edit_session(IDS[:1]).recurrence(layer),
    ):
        with pytest.raises(UnsupportedModelError, match=message):
            call()


@pytest.mark.parametrize("model_type", sorted(REFUSED))
def test_checkpoints_that_are_refused(tmp_path, model_type):
    """Before anything but the configuration is read; those that transformers does not know (Mamba-3) as well."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(UnsupportedModelError, match="cannot be hooked: ") as error:
        HookedRecurrent.from_pretrained(str(tmp_path))
    assert REFUSED[model_type] in str(error.value)


def test_every_recurrent_type_of_transformers_is_hooked_or_refused():
    """Whatever calls a rule's op and is not refused has a tiny model that all tests run on."""
    of_transformers = {name for rule, names in model_types().items() if rule != "with the extra fla" for name in names}
    assert len(of_transformers) > 10 and of_transformers <= set(MAKERS)


POINTS = ["hook_embed", "blocks.1.hook_resid_pre", "blocks.3.attn.hook_z"]
POINTS += [f"blocks.1.mixer.{name}" for name in ("hook_q", "hook_k", "hook_write_key", "hook_write", "hook_read")]
POINTS += ["blocks.1.mixer.hook_state", "blocks.1.mixer.heads.1.hook_write_vec"]


@torch.no_grad()
@pytest.mark.parametrize("name", POINTS)
def test_edits_in_place_act_however_they_are_made(model, tokens, name):
    """Through numpy and ``.data`` too, of whose changes PyTorch takes no note."""
    half = model.run_with_hooks(tokens, fwd_hooks=[(name, lambda x, hook: x * 0.5)])
    assert not torch.equal(half, model(tokens))

    def by_numpy(x, hook):
        x.detach().numpy()[...] *= 0.5

    def by_data(x, hook):
        x.data.mul_(0.5)

    def in_place(x, hook):
        x.mul_(0.5)

    for edit in (by_numpy, by_data, in_place):
        assert torch.equal(model.run_with_hooks(tokens, fwd_hooks=[(name, edit)]), half)


@torch.no_grad()
@pytest.mark.parametrize("name", POINTS)
def test_what_a_hook_returns_fits_or_is_refused(model, tokens, name):
    def returning(change):
        return model.run_with_hooks(tokens, fwd_hooks=[(name, lambda x, hook: change(x))])

    assert torch.equal(returning(lambda x: x.double() * 0.5), returning(lambda x: x * 0.5))
    for change in (lambda x: x[:1], lambda x: x.to("meta"), lambda x: x + 1j, lambda x: "text"):
        with pytest.raises(HookShapeError, match=name.split(".")[-1]):
            returning(change)


@torch.no_grad()
def test_small_integers_are_ids(model, tokens):
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint32, torch.uint64):
        assert torch.equal(model(tokens.to(dtype)), model(tokens))
    edits = [WriteEdit(1, 0, 5, mode="delete")]
    runs = [model.run_with_edits(tokens[:1].to(dtype), edits).logits for dtype in (torch.uint8, torch.long)]
    assert torch.equal(*runs)


@pytest.mark.parametrize("input", [None, [], {}, b"text", 3, ["a", None], [[1, 2], [3]], object()])
def test_input_that_is_no_text_and_no_ids(embedded, input):
    for call in (embedded, embedded.to_tokens):
        with pytest.raises(InputError):
            call(input)


@pytest.mark.parametrize("call", [attribute, lambda model, text: write_attribution(text, model, torch.sum)])
def test_exchanged_arguments_are_named(embedded, call):
    with pytest.raises(InputError, match=r"attribute\(text, model\)"):
        call(embedded, "The people")


def test_a_loss_of_no_token(model, tokens):
    last = (torch.arange(tokens.shape[1]) == tokens.shape[1] - 1).expand_as(tokens)
    for call in (
        lambda: model(tokens[:, :1], return_type="loss"),
        lambda: model(tokens, return_type="loss", attention_mask=last),
        lambda: model.loss_fn(model(tokens[:, :1]), tokens[:, :1]),
        lambda: model.loss_fn(model(tokens), tokens, "left"),
    ):
        with pytest.raises(InputError, match=r"loss|attention_mask"):
            call()
    assert model(tokens[:, :1], return_type="loss", loss_per_token=True).shape == (2, 0)
