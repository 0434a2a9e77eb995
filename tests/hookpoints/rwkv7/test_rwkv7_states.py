"""Files of RWKV-7 states: the official package begins with them as this one does."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest
import torch
from rwkv7_oracles import ask_official
from tiny_models import make_hf
from torch.testing import assert_close

from hookpoints import HookedRecurrent, Memory
from hookpoints.errors import InputError
from hookpoints.rwkv7 import RWKV7ForCausalLM, load_states, save_states


def tuned(folder: Path, *sizes: int) -> Path:
    """A file of three layers."""
    torch.manual_seed(0)
    path = folder / "state.pth"
    torch.save({f"blocks.{layer}.att.time_state": torch.randn(*sizes).bfloat16() for layer in range(3)}, path)
    return path


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated:FutureWarning")
def test_a_model_begins_with_the_states_of_a_file_as_the_official_package_does(tokens, tmp_path, monkeypatch):
    hf = cast(RWKV7ForCausalLM, make_hf("rwkv7", hidden_size=128, head_dim=64, value_dim=128))
    model, path = HookedRecurrent.from_hf(hf), tuned(tmp_path, 2, 64, 64)
    begin = model.memory(tokens[:1, :1]).rewind(0).with_states(load_states(path, model))
    answer = ask_official(hf, tokens[0].tolist(), tmp_path, monkeypatch, path)
    logits = model.logits_after(begin, tokens[:1])[0]
    assert_close(logits, answer.logits, rtol=0, atol=1e-5 * max(1.0, float(logits.abs().max())))
    assert not torch.allclose(logits, model(tokens[:1])[0], atol=0.1)
    after = model.memory(tokens[:1], memory=begin)
    for layer, state in enumerate(answer.states):
        assert_close(after.state(layer)[0], state, rtol=1e-4, atol=1e-5 * float(state.abs().max()))


@pytest.fixture(scope="module")
def model():
    """With K = 8 and V = 16."""
    return HookedRecurrent.from_hf(make_hf("rwkv7"), self_check=False)


def test_states_are_written_as_they_are_read(model, tokens, tmp_path):
    memory, path = model.memory(tokens[:1]), tmp_path / "trained.pth"
    states = {layer: memory.state(layer).requires_grad_() for layer in memory.forms}
    save_states(path, states)
    written = torch.load(path, weights_only=True)
    assert {name: (list(x.shape), x.dtype) for name, x in written.items()} == {
        f"blocks.{layer}.att.time_state": ([4, 16, 8], torch.float32) for layer in range(3)
    }
    assert_close(load_states(path, model), {layer: state.detach() for layer, state in states.items()}, rtol=0, atol=0)
    with pytest.raises(InputError, match=r"one row \[1,H,K,V\]"):
        save_states(path, {0: model.memory(tokens).state(0)})


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ({0: torch.zeros(4, 8, 16)}, r"expected .*\[4, 16, 8\].*, got .*\[4, 8, 16\]"),
        ({2: torch.zeros(4, 16, 8).to_sparse()}, "dense tensors"),
        ({1: torch.full((4, 16, 8), torch.nan)}, r"blocks\.1\.att\.time_state: expected finite"),
        ({2: None}, r"blocks\.2\.att\.time_state: expected .*got None"),
        ({3: torch.zeros(4, 16, 8)}, r"blocks\.3\.att\.time_state: expected None"),
    ],
    ids=str,
)
def test_a_file_of_another_shape_is_refused(model, tmp_path, content, match):
    states = dict.fromkeys(range(3), torch.zeros(4, 16, 8)) | content
    named = {f"blocks.{layer}.att.time_state": state for layer, state in states.items() if state is not None}
    torch.save(named, tmp_path / "state.pth")
    with pytest.raises(InputError, match=match):
        load_states(tmp_path / "state.pth", model)


def test_what_is_no_file_of_states_is_refused(model, tmp_path):
    path = tuned(tmp_path, 4, 16, 8)
    with pytest.raises(InputError, match=r"hookpoints\.rwkv7\.load_states"):
        Memory.load(path, model)
    path.write_bytes(path.read_bytes()[:99])
    with pytest.raises(InputError, match=r"as torch\.save writes them"):
        load_states(path, model)
