"""`writesae train`: names of dictionaries, one pass for all of them, nothing twice, and errors before any work."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from saes import Steps
from safetensors.torch import load_file

from hookpoints import HookedRecurrent
from sae_lens_writesae.choices import VARIANTS
from sae_lens_writesae.sae import rows
from sae_lens_writesae.sae.factors import Collection
from sae_lens_writesae.sae.load import load_sae
from sae_lens_writesae.sae.target import HeadHook
from sae_lens_writesae.sae.texts import text_dataset
from writesae.choices import MATCHED, DictionaryName
from writesae.collecting import collect_from
from writesae.flags import Collect, Train
from writesae.training import run_train

SIZES = {"d_sae": 16, "k": 2, "training_tokens": 1024, "train_batch_size_tokens": 128, "summary": False}
HEADS = {"layers": (2,), "heads": (0, 1)}


@pytest.mark.parametrize("variant", [*VARIANTS, MATCHED])
def test_a_name_says_what_a_dictionary_is(variant: str) -> None:
    plain = DictionaryName("write", variant=variant, seed=3)
    for name in (plain, replace(plain, target="state", loss="reads"), replace(plain, metric="gauss_newton")):
        assert DictionaryName.parse(str(name)) == name


@pytest.mark.parametrize("name", ["", "write-seed", "write-NoSAE-seed0", "../write-seed0"])
def test_a_name_of_none_is_refused(name: str) -> None:
    with pytest.raises(ValueError):
        DictionaryName.parse(name)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"model": None}, "one of the two"),
        ({"heads": ()}, "layers and heads"),
        ({"seeds": (1, 1)}, "seeds"),
        ({"training_tokens": -5}, "training_tokens"),
        ({"names": ("writ-seed0",)}, "writ-seed0"),
        ({"metric": "gauss_newton", "targets": ("state",)}, "state-gauss_newton"),
    ],
)
def test_wrong_arguments_are_said_before_any_work(changes: dict, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        Train(**{"model": "embedded", **HEADS, **changes})


@pytest.fixture(scope="module")
def collection(embedded: HookedRecurrent, tmp_path_factory: pytest.TempPathFactory) -> Collection:
    """Writes and states of two heads."""
    folder = tmp_path_factory.mktemp("train") / "collection"
    settings = Collect(
        model="embedded", **HEADS, targets=("write", "state"), out=folder, n_tokens=1024, context_size=32
    )
    collect_from(settings, embedded, text_dataset("We, the people of the United States. " * 400), lambda line: 0)
    return Collection.open(folder)


def test_a_model_runs_once_for_all_dictionaries_and_nothing_is_trained_twice(
    embedded: HookedRecurrent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []

    def load(name: str, **how: object) -> HookedRecurrent:
        if how.get("device") != "meta":  # without weights
            loaded.append(name)
        return embedded

    monkeypatch.setattr(HookedRecurrent, "from_pretrained", load)
    train = Train(model="embedded", **HEADS, seeds=(0, 1), context_size=32, out=tmp_path / "saes", **SIZES)
    lines: list[str] = []
    run_train(train, lines.append)
    names = [f"L2H{head}/write-seed{seed}" for head in (0, 1) for seed in (0, 1)]
    folders = [train.out / name / "sae" for name in names]
    assert lines[-1].startswith(", ".join(names)) and loaded == ["embedded"]
    weights = [load_file(folder / "sae_weights.safetensors")["v"] for folder in folders]
    assert not weights[0].equal(weights[1])  # a seed of its own
    for changes, word in (({"d_sae": 8}, "d_sae: 16, now 8"), ({"model": "embedded-rwkv7"}, "embedded-rwkv7")):
        with pytest.raises(ValueError, match=word):
            run_train(replace(train, **changes), lines.append)
    times = [(folder / "cfg.json").stat().st_mtime_ns for folder in folders[:3]]
    folders[3].rename(tmp_path / "elsewhere")
    run_train(train, lines.append)
    assert loaded == ["embedded"] * 2  # to compare weights and text
    assert lines[-2].endswith("3 of them trained already")
    assert [(folder / "cfg.json").stat().st_mtime_ns for folder in folders[:3]] == times
    assert load_file(folders[3] / "sae_weights.safetensors")["v"].equal(weights[3])  # the seed decides


@pytest.mark.parametrize(
    ("changes", "word"), [({"context_size": 64}, "first_sequence"), ({"dtype": "bfloat16"}, "model")]
)
def test_a_finished_folder_of_another_input_is_refused_by_name(
    changes: dict[str, Any], word: str, finished: Train
) -> None:
    before = {path: path.read_bytes() for path in finished.out.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=f"index.json: .*got one of another {word}"):
        run_train(replace(finished, **changes), str)
    run_train(finished, str)
    assert {path: path.read_bytes() for path in before} == before


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Train:
    """A training that is finished."""
    out = tmp_path_factory.mktemp("finished") / "out"
    train = Train(model="embedded", layers=(2,), heads=(0,), context_size=32, out=out, **SIZES)
    run_train(train, str)
    return train


def test_a_metric_is_fitted_to_the_model_and_makes_another_dictionary(
    embedded: HookedRecurrent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HookedRecurrent, "from_pretrained", lambda name, **_: embedded)
    monkeypatch.setattr("writesae.training._METRIC_TOKENS", 512)
    names = ("write-seed0", "write-gauss_newton-seed0")
    run_train(
        Train(model="embedded", layers=(2,), heads=(0,), names=names, context_size=32, out=tmp_path, **SIZES),
        lambda line: None,
    )
    plain, fitted = (load_sae(tmp_path / "L2H0" / name / "sae").atoms().dense() for name in names)
    assert not plain.equal(fitted) and plain.shape == fitted.shape


def test_every_kind_trains_from_a_collection(collection: Collection, tmp_path: Path) -> None:
    names = ("write-seed0", "write-MatrixSAE-seed0", f"write-{MATCHED}-seed0", "state-seed0", "state-reads-seed1")
    run_train(Train(collection=collection.folder, heads=(1,), names=names, out=tmp_path, **SIZES), lambda line: None)
    saes = [load_sae(tmp_path / "L2H1" / name / "sae") for name in names]
    trained_for = [(HeadHook.of(sae).target, sae.cfg.metadata.loss) for sae in saes]
    assert trained_for == [("write", "mse")] * 3 + [("state", "mse"), ("state", "reads")]
    built = [{"encoder": sae.cfg.encoder, "decoder": sae.cfg.decoder, "rank": sae.cfg.rank} for sae in saes]
    assert built == [VARIANTS[name] for name in ("WriteSAE", "MatrixSAE", "FlatSAE", "WriteSAE", "WriteSAE")]
    assert all(sae.cfg.metadata.model_name == "embedded" for sae in saes)
    assert not list(tmp_path.rglob("checkpoint"))


def test_a_head_that_is_not_there_is_said_first(collection: Collection, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="3"):
        run_train(Train(collection=collection.folder, heads=(0, 3), out=tmp_path / "out", **SIZES), lambda line: None)
    assert not list(tmp_path.iterdir())


def train_as_one_of(train: Train, rank: int, threads: int, stop: int, lines: Path) -> None:
    """What a process does that trains as one of two, by torchrun's environment; its exit code is the number of steps.
    At the step `stop` it stands still."""
    patch = pytest.MonkeyPatch()
    steps = Steps(patch)
    step = torch.optim.Adam.step

    def stand_still(*arguments: object) -> object:
        if steps.taken == stop:
            time.sleep(600)
        return step(*arguments)

    torch.set_num_threads(threads)  # results are bitwise the same for one number of threads
    patch.setattr(rows, "SAVE_SECONDS", -1.0)
    patch.setattr(torch.optim.Adam, "step", stand_still)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    run_train(train, lines.write_text)
    sys.exit(steps.taken)


def started(*arguments: object) -> BaseProcess:
    """A process of another one: autograd does not work in one that was forked after a backward pass on a device. The
    other one imports what it needs once."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["writesae.training"])
    process = context.Process(target=train_as_one_of, args=arguments)
    process.start()
    return process


def wait_for(is_so: Callable[[], bool], process: BaseProcess) -> None:
    while not is_so():
        assert process.is_alive(), process.exitcode
        time.sleep(0.02)


@pytest.mark.slow
def test_processes_train_the_next_group_that_nobody_trains_and_those_of_a_dead_one(
    collection: Collection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four groups of 8 steps each: of seeds, in one step, and three of dictionaries that train alone."""
    monkeypatch.setattr(rows, "SAVE_SECONDS", -1.0)
    names = ("write-seed0", "write-seed1", "write-MatrixSAE-seed0", "write-FlatSAE-seed0", "state-seed0")
    train = Train(collection=collection.folder, heads=(0,), names=names, out=tmp_path / "out", **SIZES)
    lines = [tmp_path / "first", tmp_path / "second"]

    def weights(out: Path) -> dict[str, bytes]:
        return {name: (out / f"L2H0/{name}/sae/sae_weights.safetensors").read_bytes() for name in names}

    run_train(replace(train, out=tmp_path / "never_killed"), str)
    first = started(train, 0, torch.get_num_threads(), 5, lines[0])
    try:
        wait_for(lambda: bool(list(train.out.rglob("checkpoint"))), first)
        with pytest.raises(ValueError, match="d_sae: 16, now 8"):
            run_train(replace(train, d_sae=8), str)
        second = started(train, 1, torch.get_num_threads(), -1, lines[1])
        wait_for(lambda: lines[1].exists() and "waiting" in lines[1].read_text(), second)
        assert len(list(train.out.glob("L2H0/*/sae"))) == 3 and second.is_alive()
        assert not (train.out / "L2H0/write-seed0/sae").exists()
    finally:
        first.kill()
        first.join()
    second.join()
    # Of the first group the three steps after its checkpoint.
    assert second.exitcode == 3 * 8 + 3
    assert weights(train.out) == weights(tmp_path / "never_killed")
