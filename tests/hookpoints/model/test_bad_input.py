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
    model_types,
)
from hookpoints.errors import HookShapeError, InputError
from hookpoints.model.inputs import cache_of, continuing
from hookpoints.rules.known import REFUSED

LEFT, RIGHT, WHOLE, HOLE = [0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [1] * 5, [1, 0, 1, 1, 1]
IDS = torch.arange(1, 11).view(2, 5)


MASKS = {
    "left": torch.tensor([WHOLE, [0, 1, 1, 1, 0]]),
    "hole": torch.tensor([WHOLE, HOLE]),
    "no token": torch.tensor([LEFT, [0] * 5]),
    r"\[2, 4\]": torch.ones(2, 4),
    r"\[1, 5\]": torch.ones(1, 5),
    r"\[2, 1, 5, 5\]": torch.ones(2, 1, 5, 5),
    "0 and 1": torch.tensor([[0.5] * 5, WHOLE]),
    "attention_mask": [WHOLE, WHOLE],
    "meta": torch.ones(2, 5, device="meta"),
}


@torch.no_grad()
def test_masks_that_recurrent_layers_cannot_obey(model):
    for message, mask in MASKS.items():
        for call in (model, lambda ids, **mask: model.generate(ids, max_new_tokens=1, **mask)):
            with pytest.raises(InputError, match=message):
                call(IDS, attention_mask=mask)


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
    more, onward = torch.tensor([[*LEFT, 1], [1] * 6]), continuing(model.hf_model, cache_of(out), 5, IDS[:, :1])
    assert model(IDS[:, :1], attention_mask=more, **onward).shape == (2, 1, 64)
    with pytest.raises(InputError, match=r"must be \[2,past\+5\]"):
        model(IDS, attention_mask=more[:, :4], **onward)


NO_TOKENS = (
    torch.tensor([[1, 64]]),
    torch.tensor([[1, -1]]),
    IDS[:, :0],
    IDS.float(),
    IDS.to_sparse(),
    IDS.view(1, 2, 5),
    [[1, 2], [3]],
    b"text",
    None,
)


def test_tokens_that_are_none(model):
    """Ids outside of the vocabulary, no ids at all, and what is neither ids nor text."""
    for tokens in NO_TOKENS:
        for call in (model, model.run_with_cache, lambda ids: model.generate(ids, max_new_tokens=1)):
            with pytest.raises(InputError):
                call(tokens)


def test_longer_than_attention_was_made_for(model):
    with torch.no_grad(), pytest.warns(UserWarning, match="513 tokens, but the attention layers .* made for 512"):
        model(torch.ones(1, 513, dtype=torch.long))


def test_layers_without_recurrence(model):
    for layer, message in (
        (3, r"layer 3 of \S+ has no recurrence and so no writes; .*recurrent layers are \[0, 1, 2\]"),
        (-1, "-1"),
    ):
        delete = WriteEdit(layer, 0, 0, mode="delete")
        for call in (lambda: model.recurrence(IDS, layer), lambda: model.run_with_edits(IDS[:1], [delete])):  # noqa: B023
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


@torch.no_grad()
@pytest.mark.parametrize("name", ["hook_embed", "blocks.1.mixer.hook_q", "blocks.1.mixer.heads.1.hook_write_vec"])
def test_what_a_hook_returns_fits_or_is_refused(model, tokens, name):
    def returning(change):
        return model.run_with_hooks(tokens, fwd_hooks=[(name, lambda x, hook: change(x))])

    assert torch.equal(returning(lambda x: x.double() * 0.5), returning(lambda x: x * 0.5))
    for change in (lambda x: x[:1], lambda x: x.to("meta"), lambda x: x + 1j, lambda x: "text"):
        with pytest.raises(HookShapeError, match=name.split(".")[-1]):
            returning(change)


@torch.no_grad()
def test_small_integers_are_ids(model, tokens):
    for dtype in (torch.uint8, torch.int16, torch.uint64):
        assert torch.equal(model(tokens.to(dtype)), model(tokens))


def test_a_loss_of_no_token(model, tokens):
    last = (torch.arange(tokens.shape[1]) == tokens.shape[1] - 1).expand_as(tokens)
    for rows, mask in ((tokens[:, :1], None), (tokens, last)):
        with pytest.raises(InputError, match="loss"):
            model(rows, return_type="loss", attention_mask=mask)
