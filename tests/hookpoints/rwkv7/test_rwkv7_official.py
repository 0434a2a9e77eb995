"""Official RWKV-7 files: another implementation agrees, and a file that is not whole is refused by names."""

from __future__ import annotations

import pytest
import torch
from rwkv7_oracles import ask_official, official_weights
from tiny_models import make_hf
from torch.testing import assert_close

from hookpoints import HookedRecurrent
from hookpoints.errors import InputError, UnsupportedModelError
from hookpoints.model.inputs import cache_of
from hookpoints.rwkv7 import from_official, from_pth


@pytest.fixture(scope="module")
def wide():
    """Heads of 64, the only size that the official package knows; K = V, as its states are square."""
    return make_hf("rwkv7", hidden_size=128, head_dim=64, value_dim=128)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated:FutureWarning", "ignore:.*without a tokenizer")
@torch.no_grad()
def test_a_file_has_the_logits_and_states_of_the_official_package(wide, tokens, tmp_path, monkeypatch):
    path = tmp_path / "official.pth"
    answer = ask_official(wide, tokens[0].tolist(), tmp_path, monkeypatch)  # writes the file
    as_published = {
        name: value[None, None] if value.ndim == 1 and ".ln" not in name else value
        for name, value in torch.load(path, weights_only=True).items()
    }
    torch.save(as_published | {f"blocks.0.att.v{i}": torch.ones(1, 1, 128) for i in range(3)}, path)
    model = HookedRecurrent.from_pretrained(str(path), device="cpu")
    out = model.hf_model(tokens[:1])
    assert_close(out.logits[0], answer.logits, rtol=0, atol=1e-5 * max(1.0, float(out.logits.abs().max())))
    for layer, state in zip(cache_of(out).layers, answer.states, strict=True):
        assert_close(layer.recurrent_states[0][0], state, rtol=1e-4, atol=1e-5 * float(state.abs().max()))
    assert from_pth(path, torch.bfloat16).dtype == torch.bfloat16


@torch.no_grad()
def test_a_model_of_one_block_has_no_first_values_to_mix_in(tokens):
    """So its file does not tell the rank of that mix, which later blocks have."""
    one = make_hf("rwkv7", hidden_size=128, head_dim=64, value_dim=128, num_hidden_layers=1)
    weights = official_weights(one)
    assert not [name for name in weights if ".att.v1" in name]
    assert_close(from_official(weights)(tokens).logits, one(tokens).logits)


@torch.no_grad()
def test_a_model_owns_its_weights(wide, tokens):
    """A change of the tensors that it was made of is none of the model."""
    weights = {name: value.clone() for name, value in official_weights(wide).items()}
    model = from_official(weights)
    plain = model(tokens).logits
    for value in weights.values():
        value.zero_()
    assert torch.equal(model(tokens).logits, plain)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("blocks.1.att.k_k", None),
        ("emb.weight", None),
        ("blocks.2.ln1.weight", torch.ones(7)),
        ("blocks.0.ffn.s_emb.weight", torch.ones(7)),
    ],
)
def test_a_file_that_is_not_whole_is_refused_by_names(wide, name, change):
    weights = official_weights(wide) | {name: change}
    with pytest.raises(UnsupportedModelError, match=name):
        from_official({each: value for each, value in weights.items() if value is not None})


@pytest.mark.parametrize(("block", "gap"), [(999_999, 3), (4, 3)])
def test_blocks_that_a_file_lacks_are_not_built(wide, monkeypatch, block, gap):
    """Of a file that names block 999999 no model of a million layers is made."""
    monkeypatch.setattr("hookpoints.rwkv7.official.RWKV7Config", None)
    with pytest.raises(UnsupportedModelError, match=f"has block {block} and lacks block {gap}"):
        from_official(official_weights(wide) | {f"blocks.{block}.ln1.weight": torch.ones(7)})


def test_a_number_that_a_stride_repeats_is_no_matrix(wide):
    weights = official_weights(wide)
    weights["emb.weight"] = torch.zeros(1).expand(weights["emb.weight"].shape)
    with pytest.raises(UnsupportedModelError, match="stored whole"):
        from_official(weights)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ({"emb.weight": print}, "got code, another object or a damaged file"),
        (b"damaged", "got code, another object or a damaged file"),
        (torch.zeros(3), "got code, another object or a damaged file"),
        ({"emb.weight": torch.zeros(3, 3).to_sparse()}, "got 'emb.weight': torch.sparse_coo"),
        ({"emb.weight": None}, "got 'emb.weight': NoneType"),
    ],
    ids=str,
)
def test_a_file_without_dense_tensors_is_refused_in_one_line(tmp_path, content, match):
    """Code in a file is not run, and nobody is told how to run it."""
    path = tmp_path / "file.pth"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    for load in (from_pth, HookedRecurrent.from_pretrained):
        with pytest.raises(InputError, match=match) as caught:
            load(str(path))
        assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)
