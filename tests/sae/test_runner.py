"""SAELens' own runners, metrics and patching utilities on a recurrent model's writes and states, unchanged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from sae_lens import (
    SAE,
    CacheActivationsRunner,
    CacheActivationsRunnerConfig,
    LanguageModelSAETrainingRunner,
    TrainingSAE,
)
from sae_lens.multi_sae_training_runner import MultiSAETrainingRunner, MultiSAETrainingRunnerConfig
from saes import exact_sae, make_sae
from torch.testing import assert_close

from hookpoints import HookedRecurrent, UnknownHookError, UnsupportedModelError
from hookpoints import embedded as shipped
from sae_lens_writesae import load_sae
from sae_lens_writesae.sae.collecting import collect
from sae_lens_writesae.sae.hooked import HookedSAERecurrent
from sae_lens_writesae.sae.runner import MODEL_CLASS_NAME, train, training_config
from sae_lens_writesae.sae.target import head_target
from sae_lens_writesae.sae.texts import text_dataset

LAYER, HEAD = 2, 1
SMALL = {
    "training_tokens": 512,
    "context_size": 32,
    "store_batch_size_prompts": 4,
    "n_batches_in_buffer": 8,
    "train_batch_size_tokens": 64,
    "lr": 1e-3,
    "verbose": False,
}
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="module")
def dataset():
    return text_dataset(shipped.text("train")[:60_000])


def small_config(model, target="write", architecture="writesae_topk", sae=None, **changes):
    sae = {"k": 4} if sae is None else sae
    return training_config(
        model, LAYER, HEAD, target=target, architecture=architecture, d_sae=24, sae=sae, **(SMALL | changes)
    )


@pytest.mark.parametrize(("architecture", "target"), [("writesae_topk", "last_state"), ("writesae_batchtopk", "write")])
def test_what_saelens_runner_leaves_loads(architecture, target, embedded, dataset, tmp_path, monkeypatch):
    """Checkpoints, the export, and a release of both in the cache of the hub: by SAELens' loaders. A checkpoint that is
    loaded for inference is what an export at that step would be."""
    folders = {"checkpoint_path": str(tmp_path / "runs"), "output_path": str(tmp_path / "exported")}
    sizes = {"training_tokens": 256, "n_batches_in_buffer": 64, "n_checkpoints": 1, "save_final_checkpoint": True}
    cfg = small_config(embedded, target, architecture, **sizes, **folders)
    runner = LanguageModelSAETrainingRunner(cfg, override_dataset=dataset)
    assert isinstance(runner.model, HookedRecurrent) and runner.model.cfg.model_name == "embedded"
    sae = runner.run()
    hook = sae.cfg.metadata.hook_name
    assert hook == head_target(embedded, LAYER, HEAD, target).hook_name
    _, cache = embedded.run_with_cache(shipped.text("test")[:400], names_filter=hook)
    rows = cache[hook][0]
    checkpoints = sorted(Path(str(cfg.checkpoint_path)).iterdir())
    assert len(checkpoints) == 2
    for checkpoint in checkpoints:
        in_training = TrainingSAE.load_from_disk(checkpoint)
        assert type(in_training) is type(sae) is type(load_sae(checkpoint, training=True))
        in_training.save_inference_model(tmp_path / "of_checkpoint")
        same(SAE.load_from_disk(tmp_path / "of_checkpoint"), SAE.load_from_disk(checkpoint), rows)
    same(SAE.load_from_disk(tmp_path / "exported"), SAE.load_from_disk(checkpoints[-1]), rows)
    runner_cfg = json.loads((tmp_path / "exported" / "runner_cfg.json").read_text())
    assert runner_cfg["model_class_name"] == MODEL_CLASS_NAME and runner_cfg["model_name"] == "embedded"
    repository, commit = tmp_path / "models--me--saes", "0" * 40
    shutil.copytree(tmp_path / "exported", repository / "snapshots" / commit / "exported")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    same(SAE.load_from_disk(tmp_path / "exported"), SAE.from_pretrained("me/saes", "exported"), rows)


@torch.no_grad()
def same(one, other, rows):
    """Equal codes and reconstructions, as far as float32 tells."""
    codes = one.encode(rows)
    assert codes.count_nonzero() > 0
    assert_close(other.encode(rows), codes, rtol=1e-5, atol=1e-5 * float(codes.abs().max()))
    assert_close(other(rows), one(rows), rtol=1e-5, atol=1e-5 * float(rows.abs().max()))


@pytest.mark.parametrize(("architecture", "name"), [("topk", "writesae_topk"), ("writesae_top", "writesae_topk")])
def test_an_architecture_without_matrix_atoms_is_refused(embedded, architecture, name):
    with pytest.raises(ValueError, match=f"architecture: .*got '{architecture}'; nearest: {name}"):
        small_config(embedded, architecture=architecture)


def test_cached_activations_are_the_writes(embedded, dataset, tmp_path):
    cfg = CacheActivationsRunnerConfig(
        model_name="embedded",
        model_class_name=MODEL_CLASS_NAME,
        dataset_path="",
        d_in=2048,
        hook_name=head_target(embedded, LAYER, HEAD).hook_name,
        training_tokens=512,
        context_size=32,
        prepend_bos=False,
        new_cached_activations_path=str(tmp_path / "cache"),
        model_batch_size=4,
        buffer_size_gb=0.01,
        shuffle=False,
        streaming=False,
        dtype="float32",
        device="cpu",
    )
    stored = CacheActivationsRunner(cfg, override_dataset=dataset).run()
    row = stored[0]
    tokens = torch.tensor(row["token_ids"])[None]
    _, cache = embedded.run_with_cache(tokens, names_filter=cfg.hook_name)
    written = torch.tensor(row[cfg.hook_name]).reshape(-1, 2048)
    assert_close(written, cache[cfg.hook_name][0], rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("no_grad")
def test_saes_stand_in_for_hook_points():
    """add_sae, run_with_saes, the error term, and inner hooks, in prefill and generation."""
    model = HookedSAERecurrent.from_pretrained("embedded")
    sae = make_sae(model, hook=head_target(model, LAYER, HEAD).hook_name)
    tokens = model.to_tokens("The Congress of the United States shall")
    plain = model(tokens)
    replaced = model.run_with_saes(tokens, saes=[sae])
    with_error = model.run_with_saes(tokens, saes=[sae], use_error_term=True)
    assert not torch.allclose(replaced, plain, atol=1e-4)
    assert_close(with_error, plain, rtol=0, atol=5e-4)
    hook = sae.cfg.metadata.hook_name
    for with_error in (False, True):
        _, cache = model.run_with_cache_with_saes(tokens, saes=[sae], use_error_term=with_error)
        assert (f"{hook}.hook_sae_error" in cache) == with_error and f"{hook}.hook_sae_acts_post" in cache
    with model.saes(sae), pytest.raises(UnknownHookError):
        model.run_with_cache(tokens, names_filter=f"{hook}.hook_sae_error")
    assert torch.equal(model(tokens), plain) and not model.acts_to_saes
    by_hand = model.run_with_hooks(tokens, fwd_hooks=[(hook, lambda x, hook: sae(x))])
    assert_close(replaced, by_hand, rtol=0, atol=1e-5)
    model.add_sae(sae)
    generated = model.generate(tokens, max_new_tokens=4, do_sample=False)
    step = model(generated)
    model.reset_saes()
    assert torch.equal(generated[0, tokens.shape[1] :], step[0, tokens.shape[1] - 1 : -1].argmax(-1))


def test_an_sae_that_does_not_fit_is_not_attached():
    """SAELens goes on without an SAE whose hook it does not find, and knows nothing of K and V."""
    model = HookedSAERecurrent.from_pretrained("embedded")
    for name, error in ((head_target(model, LAYER, HEAD).hook_name, ValueError), ("blocks.0.hook_x", UnknownHookError)):
        with pytest.raises(error):
            model.run_with_saes(model.to_tokens("The Congress"), saes=[exact_sae(name, k=32, v=64)])
        assert not model.acts_to_saes


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"layer": 0}, UnsupportedModelError, "layer 0"),
        ({"head": 7}, UnknownHookError, "head 7"),
        ({"target": "reads"}, ValueError, "reads"),
        ({"target": "state", "metric": "gauss_newton"}, ValueError, "metric"),
        ({"training_token": 5}, ValueError, "training_token: expected a field .*nearest: training_tokens"),
        ({"sae": {"loss_wight": 1}}, ValueError, "loss_wight: expected a field .*nearest: loss_weight"),
    ],
)
def test_a_config_that_the_model_cannot_have_is_refused(embedded, changes, error, match):
    with pytest.raises(error, match=match):
        training_config(embedded, **({"layer": LAYER, "head": HEAD} | changes))


def test_swapped_sizes_are_refused_before_training(embedded, dataset, tmp_path):
    """K x V of the head and not V x K, by every runner that has the model or a collection."""
    swapped = {"d_k": 32, "d_v": 64, "k": 4}
    cfg = small_config(embedded, sae=swapped)
    many = MultiSAETrainingRunnerConfig(
        saes={"a": cfg.sae},
        hook_names=cfg.hook_name,
        model_name="embedded",
        model_class_name=MODEL_CLASS_NAME,
        **{name: value for name, value in SMALL.items() if name != "verbose"},
    )
    collection = collect(embedded, dataset, [LAYER], [HEAD], tmp_path, n_tokens=256, context_size=16, progress=False)
    for run in (
        lambda: train(cfg, (embedded, dataset)),
        lambda: LanguageModelSAETrainingRunner(cfg, override_model=embedded, override_dataset=dataset).run(),
        lambda: MultiSAETrainingRunner(many, override_model=embedded, override_dataset=dataset).run(),
        lambda: train(small_config(collection, sae=swapped, context_size=16)),
    ):
        with pytest.raises(ValueError, match=r"d_k, d_v, d_in: expected \(64, 32, 2048\), .* got \(32, 64, 2048\)"):
            run()


def test_a_file_of_text_is_read(tmp_path):
    (tmp_path / "corpus.md").write_text("Line of text.\n" * 300, encoding="utf-8")
    for file in (tmp_path / "corpus.md", f"{tmp_path}/corpus.md"):
        assert "".join(text_dataset(file)["text"]) == "Line of text.\n" * 300
    with pytest.raises(FileNotFoundError, match=r"nosuch\.txt"):
        text_dataset("nosuch.txt")
    assert [*text_dataset("One line.")["text"]] == ["One line."]


@pytest.mark.parametrize(("steps", "warm_up"), [(8, 0), (60, 6), (500, 20)])
def test_a_short_run_warms_up_for_a_tenth_of_it(embedded, steps, warm_up):
    cfg = small_config(embedded, training_tokens=64 * steps)
    assert cfg.lr_warm_up_steps == warm_up
    assert small_config(embedded, training_tokens=64 * steps, lr_warm_up_steps=0).lr_warm_up_steps == 0


def test_text_dataset_keeps_the_text():
    text = "one\n" * 3 + "two\n"
    assert [*text_dataset(text, min_characters=5)["text"]] == ["one\none\n", "one\ntwo\n"]
    assert [*text_dataset("one\n" * 3 + "\n", min_characters=9)["text"]] == ["one\none\none\n"]
