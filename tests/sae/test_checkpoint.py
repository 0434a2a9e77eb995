"""One seed gives one dictionary, bit for bit; a run that was stopped anywhere ends with that very dictionary."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from functools import cache
from pathlib import Path

import datasets
import pytest
import torch
from sae_lens.training.sae_trainer import SAETrainer

from hookpoints import HookedRecurrent
from hookpoints import embedded as shipped
from sae_lens_writesae.sae.checkpoint import RUN_STATE_FILENAME, RandomNumbers, check_checkpoint
from sae_lens_writesae.sae.load import CheckpointError, load_sae
from sae_lens_writesae.sae.runner import (
    WriteSAETrainingRunner,
    text_dataset,
    train,
    train_from_arguments,
    training_config,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
LAYER, HEAD, BATCH = 2, 1, 64
TOPK_WRITE, BATCHTOPK_STATE = ("writesae_topk", "write"), ("writesae_batchtopk", "state")
MORE = [("writesae_batchtopk", "write"), ("writesae_topk", "state")]
KINDS = [TOPK_WRITE, BATCHTOPK_STATE, *(pytest.param(kind, marks=pytest.mark.slow) for kind in MORE)]


@pytest.fixture(scope="module")
def dataset():
    """Less text than a run takes: it begins a second epoch."""
    return text_dataset(shipped.text("train")[:4_500])


def config(model, architecture="writesae_topk", target="write", **changes):
    """Thirty steps with everything that uses random numbers or a count of steps: resampling, upkeep, warm-up, an
    estimate of the norm, epochs."""
    fields = {"k": 4, "resample_every": 5, "unit_norm_every": 7, "normalize_activations": "expected_average_only_in"}
    runner = {
        "training_tokens": 30 * BATCH,
        "context_size": 32,
        "store_batch_size_prompts": 4,
        "n_batches_in_buffer": 8,
        "train_batch_size_tokens": BATCH,
        "n_batches_for_norm_estimate": 3,
        "dead_feature_window": 3,
        "lr": 1e-3,
        "lr_warm_up_steps": 10,
        "lr_scheduler_name": "cosineannealing",
        "feature_sampling_window": 11,
        "verbose": False,
    }
    return training_config(
        model, LAYER, HEAD, target=target, architecture=architecture, d_sae=24, sae=fields, **(runner | changes)
    )


def weights(sae):
    return {name: value.clone() for name, value in sae.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def uninterrupted(embedded, dataset):
    """Gives the dictionary of a kind that nothing stopped."""
    return cache(lambda kind: weights(train(config(embedded, *kind), embedded, dataset)))


@pytest.mark.parametrize("kind", KINDS)
def test_one_seed_gives_one_dictionary_and_another_seed_another(embedded, dataset, uninterrupted, kind):
    torch.manual_seed(77)  # what the program around a run does with random numbers has no part in it
    before = torch.get_rng_state()
    again = train(config(embedded, *kind), embedded, dataset)
    assert torch.equal(torch.get_rng_state(), before)
    other = train(config(embedded, *kind, seed=1), embedded, dataset)
    assert equal(weights(again), uninterrupted(kind))
    assert not torch.equal(other.v, again.v)


def test_one_seed_gives_one_dictionary_on_the_command_line(embedded, tmp_path, monkeypatch):
    monkeypatch.setattr(HookedRecurrent, "from_pretrained", lambda name, **_: embedded)
    words = f"""--architecture writesae_batchtopk --model_class_name HookedRecurrent --model_name embedded --d_sae 16
        --dataset_path embedded --is_dataset_tokenized false --streaming false --prepend_bos false --k 2 --verbose false
        --hook_name blocks.2.mixer.heads.1.hook_write_vec --d_in 2048 --d_k 64 --d_v 32 --training_tokens 512
        --train_batch_size_tokens 128 --context_size 32 --n_batches_in_buffer 8 --store_batch_size_prompts 4
        --log_to_wandb false --checkpoint_path {tmp_path}/checkpoints --output_path {tmp_path}/sae""".split()
    first = weights(train_from_arguments([*words, "--seed", "3"]))
    torch.manual_seed(8)
    assert equal(weights(train_from_arguments([*words, "--seed", "3"])), first)
    assert not equal(weights(train_from_arguments([*words, "--seed", "4"])), first)


class Stopped(WriteSAETrainingRunner):
    """Is interrupted in its n-th step: by an exception in the forward pass, or by a signal."""

    step, by_signal = 0, True

    def run_trainer_with_interruption_handling(self, trainer):
        forward, calls = self.sae.training_forward_pass, iter(range(10**6))

        def stopping(step_input):
            output = forward(step_input)
            if next(calls) + 1 == self.step:
                if not self.by_signal:
                    raise KeyboardInterrupt
                os.kill(os.getpid(), signal.SIGINT)
            return output

        self.sae.training_forward_pass = stopping
        return super().run_trainer_with_interruption_handling(trainer)


def newest(folder):
    found = [path.parent for path in Path(folder).rglob(RUN_STATE_FILENAME)]
    return max(found, key=lambda path: int(path.name))


@pytest.mark.parametrize("n_stops", [1, pytest.param(6, marks=pytest.mark.slow)])
@pytest.mark.parametrize("by_signal", [True, False], ids=["signal", "exception"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_stopped_at_any_step_ends_with_the_same_dictionary(
    embedded, dataset, uninterrupted, tmp_path, kind, by_signal, n_stops
):
    draw = random.Random(f"{kind}{by_signal}{n_stops}")
    for step in draw.sample(range(7, 30), n_stops):
        folder = tmp_path / str(step)
        cfg = config(embedded, *kind, checkpoint_path=str(folder), n_checkpoints=5)
        runner = Stopped(cfg, override_model=embedded, override_dataset=dataset)
        runner.step, runner.by_signal = step, by_signal
        with pytest.raises(KeyboardInterrupt):
            runner.run()
        checkpoint = newest(folder)
        samples = int(checkpoint.name)
        # After an exception within a step, what is left is the newest of the planned checkpoints.
        assert samples == step * BATCH if by_signal else 0 < samples < step * BATCH
        cfg = config(embedded, *kind, checkpoint_path=str(folder / "2"), n_checkpoints=5)
        cfg.resume_from_checkpoint = str(checkpoint)
        resumed = train(cfg, embedded, dataset)
        assert equal(weights(resumed), uninterrupted(kind))
        planned = {6, 11, 16, 21, 26}  # in steps; an interrupt adds its own
        after = {int(path.parent.name) // BATCH for path in (folder / "2").rglob(RUN_STATE_FILENAME)}
        assert after == {each for each in planned if each * BATCH > samples}


def test_a_run_stopped_twice_while_its_buffer_fills_ends_with_the_same_dictionary(
    embedded, dataset, uninterrupted, tmp_path
):
    """By one signal, and by two in one batch, of which the second does not wait for its end."""
    kind, checkpoint = BATCHTOPK_STATE, None
    for n, stop in enumerate([12, 2, None]):
        cfg = config(embedded, *kind, checkpoint_path=str(tmp_path / str(n)))
        cfg.resume_from_checkpoint = checkpoint
        runner = WriteSAETrainingRunner(cfg, override_model=embedded, override_dataset=dataset)
        source, draws = runner.activations_store, iter(range(10**6))

        def drawing(draw=source.draw, draws=draws, stop=stop, n=n):
            if next(draws) == stop:
                for _ in range(n + 1):
                    os.kill(os.getpid(), signal.SIGTERM)
                assert n == 0, "the second signal has raised"
            return draw()

        source.draw = drawing
        if stop is None:
            assert equal(weights(runner.run()), uninterrupted(kind))
            return
        with pytest.raises(KeyboardInterrupt):
            runner.run()
        checkpoint = str(newest(tmp_path / str(n)))


def test_a_stop_before_the_first_step_leaves_nothing_to_resume(embedded, dataset, tmp_path):
    runner = Stopped(config(embedded, checkpoint_path=str(tmp_path)), override_model=embedded, override_dataset=dataset)
    runner.step, runner.by_signal = 1, False
    with pytest.raises(KeyboardInterrupt):
        runner.run()
    assert not list(tmp_path.rglob("*"))


def test_a_kill_while_a_checkpoint_is_written_leaves_none(embedded, dataset, tmp_path, monkeypatch):
    def dying(trainer, name, base_path=None, **_):
        (Path(base_path) / name).mkdir()
        raise MemoryError

    monkeypatch.setattr(SAETrainer, "save_checkpoint", dying)
    cfg = config(embedded, checkpoint_path=str(tmp_path), n_checkpoints=2)
    with pytest.raises(MemoryError):
        train(cfg, embedded, dataset)
    assert not [path for path in Path(cfg.checkpoint_path).iterdir() if not path.name.startswith(".")]


@pytest.fixture(scope="module")
def checkpoint(embedded, dataset, tmp_path_factory):
    cfg = config(embedded, checkpoint_path=str(tmp_path_factory.mktemp("run")), n_checkpoints=1)
    train(cfg, embedded, dataset)
    return newest(cfg.checkpoint_path)


def test_a_cut_checkpoint_is_refused_by_the_name_of_its_file(embedded, dataset, checkpoint, tmp_path):
    names = sorted(path.name for path in checkpoint.iterdir() if path.name != "SHA256SUMS")
    assert len(names) >= 7
    for name in names:
        for size in (None, 0, 0.5, 0.98):
            folder = tmp_path / f"{name}-{size}"
            shutil.copytree(checkpoint, folder)
            data = (folder / name).read_bytes()
            (folder / name).unlink()
            if size is not None:
                (folder / name).write_bytes(data[: int(size * len(data))])
            cfg = config(embedded, resume_from_checkpoint=str(folder))
            with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
                WriteSAETrainingRunner(cfg, override_model=embedded, override_dataset=dataset)


def test_a_checkpoint_of_another_run_is_refused(embedded, checkpoint):
    check_checkpoint(checkpoint, config(embedded))
    check_checkpoint(checkpoint, config(embedded, training_tokens=10**6, n_checkpoints=9))
    for changes in ({"seed": 5}, {"context_size": 64}, {"train_batch_size_tokens": 32}, {"target": "state"}):
        with pytest.raises(CheckpointError, match=r"runner_cfg\.json"):
            check_checkpoint(checkpoint, config(embedded, **changes))
    other = json.loads((checkpoint / "runner_cfg.json").read_text())
    assert other["sae"]["k"] == load_sae(checkpoint, training=True).cfg.k == 4


def test_a_run_on_cached_activations_goes_on_where_it_stopped(embedded, dataset, tmp_path):
    """SAELens' own cache of activations, in a second epoch."""
    name = config(embedded).hook_name
    shape = datasets.Array2D((32, 2048), "float32")
    with torch.no_grad():
        tokens = embedded.to_tokens(shipped.text("train")[:4_000], prepend_bos=False, truncate=False)[0]
        _, cache = embedded.run_with_cache(tokens[: 20 * 32].view(20, 32), names_filter=name)
    features = datasets.Features({name: shape})
    datasets.Dataset.from_dict({name: cache[name].numpy()}, features=features).save_to_disk(tmp_path / "cache")
    cached = {"use_cached_activations": True, "cached_activations_path": str(tmp_path / "cache")}
    whole = weights(train(config(embedded, **cached), embedded, dataset))
    cfg = config(embedded, checkpoint_path=str(tmp_path / "run"), **cached)
    runner = Stopped(cfg, override_model=embedded, override_dataset=dataset)
    runner.step = 17
    with pytest.raises(KeyboardInterrupt):
        runner.run()
    cfg = config(embedded, resume_from_checkpoint=str(newest(tmp_path / "run")), **cached)
    assert equal(weights(train(cfg, embedded, dataset)), whole)


def test_prefetching_is_refused_beside_checkpoints(embedded, dataset, uninterrupted, tmp_path):
    cfg = config(embedded, checkpoint_path=str(tmp_path), prefetch_llm_batches=True)
    with pytest.raises(ValueError, match="prefetch_llm_batches"):
        WriteSAETrainingRunner(cfg, override_model=embedded, override_dataset=dataset)
    alone = train(config(embedded, prefetch_llm_batches=True), embedded, dataset)
    assert equal(weights(alone), uninterrupted(TOPK_WRITE))  # the thread that draws has random numbers of its own


def test_random_numbers_of_a_run_are_its_own():
    torch.manual_seed(1)
    expected = torch.rand(4)
    torch.manual_seed(1)
    own = RandomNumbers(3)
    drawn = []
    for _ in range(2):
        with own.scope():
            drawn.append(torch.rand(2))
        torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(torch.cat(drawn), torch.rand(4))
    torch.manual_seed(1)
    with RandomNumbers(5).scope():
        torch.rand(9)
    assert torch.equal(torch.rand(4), expected)
