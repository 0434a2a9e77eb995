"""Precisions, compiled steps, matching pursuit, SAELens' command line, and folders that hold no dictionary."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sae_lens
import torch
from sae_lens.saes.sae import TrainStepInput
from saes import drawn_sae, train_step
from safetensors.torch import load_file, save_file
from sealing import reseal

import sae_lens_writesae as W
from sae_lens_writesae import sae as S
from sae_lens_writesae.sae.load import CheckpointError

K, V, D_IN, F, N = 5, 6, 30, 16, 11
SHAPE: dict[str, Any] = {"d_in": D_IN, "d_sae": F, "d_k": K, "d_v": V, "dtype": "float64"}


def build(name: str, **fields: Any) -> Any:
    return drawn_sae(name, **SHAPE | fields)


@torch.no_grad()
@pytest.mark.parametrize("rank", [1, 2])
def test_pursuit_takes_what_explains_most_of_the_rest(rank: int) -> None:
    sae, x = build("writesae_matching_pursuit", k=3, rank=rank), torch.randn(9, D_IN, dtype=torch.float64)
    left, acts = x - sae.b_dec, torch.zeros(9, F, dtype=torch.float64)
    for _, n in itertools.product(range(3), range(9)):
        gains = [float((left[n] @ atom).relu() / atom.norm()) for atom in sae.W_dec]
        best = max(range(F), key=gains.__getitem__)
        size = gains[best] / sae.W_dec[best].norm()
        acts[n, best] += size
        left[n] = left[n] - size * sae.W_dec[best]
    torch.testing.assert_close(sae.encode(x), acts, rtol=1e-10, atol=1e-10)
    with pytest.raises(NotImplementedError, match="any norm"):
        sae.to_saelens()


# ---------------------------------------------------------------------------------------- configs


def test_saelens_command_line_takes_our_architectures() -> None:
    from sae_lens.llm_sae_training_runner import _parse_cfg_args

    fields = "--d_in 30 --d_sae 12 --d_k 5 --d_v 6 --k 3 --encoder tied --rank 2"
    cfg = _parse_cfg_args(["--architecture", "writesae_batchtopk", *fields.split()]).sae
    assert isinstance(cfg, S.WriteBatchTopKTrainingSAEConfig)
    assert (cfg.d_k, cfg.d_v, cfg.k, cfg.encoder, cfg.rank) == (5, 6, 3, "tied", 2)


# ---------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("name", S.TRAINING)
def test_low_precision_training_steps(name: str) -> None:
    """Weights in bfloat16; for gated ones autocast, since SAELens' class mixes dtypes in its auxiliary loss."""
    dtype = "bfloat16" if name != "writesae_gated" else "float32"
    sae = build(name, dtype=dtype, resample_every=1, unit_norm_every=int(name != "writesae_matching_pursuit"))
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-2)
    for step in range(3):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "float32"):
            loss = train_step(sae, torch.randn(N, D_IN), step, torch.arange(F) < 6).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(p.isfinite().all() for p in sae.parameters())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute", "ignore:<class 'torch.autograd.function.Function'>")
def test_compiled_training_step_is_the_same() -> None:
    plain, compiled = build("writesae_topk"), build("writesae_topk")
    torch._dynamo.reset()
    batch = TrainStepInput(torch.randn(N, D_IN, dtype=torch.float64), {}, torch.arange(F) < 6, 0, False)
    expected = plain.training_forward_pass(batch).loss
    got = torch.compile(compiled.training_forward_pass, backend="aot_eager")(batch).loss
    torch.testing.assert_close(got, expected)
    for each in (expected, got):
        each.backward()
    for p, q in zip(plain.parameters(), compiled.parameters()):
        torch.testing.assert_close(p.grad, q.grad)


# ---------------------------------------------------------------------------------------- damaged folders


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    build("writesae_topk").save_inference_model(tmp_path)
    return tmp_path


Change = Callable[[Path], object]
"""What is done to a file."""


def cut(length: int) -> Change:
    return lambda file: file.write_bytes(file.read_bytes()[:length])


def config(**fields: Any) -> Change:
    return lambda file: file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def weights(**tensors: torch.Tensor) -> Change:
    return lambda file: save_file(load_file(file) | tensors, file)


CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (CONFIG, Path.unlink, r"cfg\.json"),
        (WEIGHTS, cut(-40), r"weights\.safetensors"),
        (CONFIG, config(d_sae=17), r"of shape \[17"),
        (CONFIG, config(d_k=7), "d_in: expected .* got 30"),
        (CONFIG, config(rank=1, normalise_activations="none"), "normalize_activations"),
        (CONFIG, config(architecture="writesae_topp"), "writesae_topk"),
        (CONFIG, config(architecture="writesae_batchtopk"), r"\['k', "),
        (CONFIG, lambda file: file.write_text("[]"), "list"),
        (WEIGHTS, weights(extra=torch.zeros(1)), "extra"),
        (WEIGHTS, weights(w=torch.full((F, 1, V), torch.nan)), "NaN"),
    ],
)
def test_what_is_no_dictionary_is_named(saved: Path, name: str, change: Change, message: str) -> None:
    change(saved / name)
    reseal(saved)  # to reach what is checked after the seal
    with pytest.raises(CheckpointError, match=message):
        W.load_sae(saved)


def test_a_folder_without_a_seal_is_loaded(saved: Path) -> None:
    """SAELens' own uploader leaves it out. With one, a changed bit is told: `reliability/folders.py`."""
    (saved / "SHA256SUMS").unlink()
    W.load_sae(saved)
    with pytest.raises(CheckpointError, match=r"nowhere/cfg\.json"):
        W.load_sae(saved / "nowhere")


def test_stock_autoencoders_load_too(tmp_path: Path) -> None:
    sae = sae_lens.StandardTrainingSAE(sae_lens.StandardTrainingSAEConfig(d_in=D_IN, d_sae=F))
    sae.save_inference_model(tmp_path)
    assert type(W.load_sae(tmp_path)) is sae_lens.StandardSAE
