"""A run that is killed goes on to the weights of one that was not: on factors, and in SAELens' trainer on writes and on
rows that are mixed."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import pytest
import torch
from saes import Steps
from sealing import damaged, reseal
from test_fast import F, K, V, config, writes
from test_training_loss import config as of_collection

from hookpoints import HookedRecurrent
from hookpoints.errors import DamageWarning
from hookpoints.files import CHECKSUMS
from sae_lens_writesae import collect, train
from sae_lens_writesae.sae import TRAINING
from sae_lens_writesae.sae import rows as rows_
from sae_lens_writesae.sae.metric import Metric

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
N_STEPS = 12


class Run(NamedTuple):
    """Twelve steps, in which atoms are dead and replaced, and another input of the same kind."""

    configs: list[Any]
    data: list[Any]
    other: list[Any]

    def weights(self, checkpoint: Path | None = None) -> dict[str, torch.Tensor]:
        saes = train(self.configs, self.data, checkpoint=checkpoint)
        return {f"{n}.{name}": x for n, sae in enumerate(saes) for name, x in sae.state_dict().items()}


def side_by_side(collections: list[Any]) -> Run:
    rows = [writes(0), writes(1)]
    return Run([config(seed, N_STEPS) for seed in (0, 1)], rows, rows[::-1])


def on_writes(collections: list[Any], name: str) -> Run:
    of_name = {
        "writesae_batchtopk": {"k": 2},
        "writesae_matryoshka": {"k": 2, "matryoshka_widths": [8, F]},
        "writesae_jumprelu": {"dtype": "float32"},  # SAELens' gradients of thresholds are
        "writesae_matching_pursuit": {"unit_norm_every": 0},
    }
    cfg = config(0, N_STEPS, name, loss="write", **of_name.get(name, {}))  # a loss with which all of them train on rows
    dtype = getattr(torch, cfg.sae.dtype)
    return Run([cfg], [writes(0, dtype)], [writes(1, dtype)])


def on_states(collections: list[Any]) -> Run:
    """Of which a few sequences are mixed at a time."""
    upkeep = {"k": 2, "resample_every": 5, "unit_norm_every": 7, "normalize_activations": "expected_average_only_in"}
    cfg = of_collection(
        collections[0],
        target="state",
        sae=upkeep,
        training_tokens=N_STEPS * 32,
        train_batch_size_tokens=32,
        n_batches_in_buffer=4,
        n_batches_for_norm_estimate=2,
        dead_feature_window=3,
    )
    return Run([cfg], *([each] for each in collections))


RUNS: dict[str, Callable[[list[Any]], Run]] = {"factors": side_by_side, "states": on_states}


@pytest.fixture(scope="module")
def collections(hf: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    ids = torch.randint(1, 64, (40, 32), generator=torch.Generator().manual_seed(0))
    model = HookedRecurrent.from_hf(hf)
    collections_of_texts = [
        collect(model, text, [1], [2], tmp_path_factory.mktemp("collection"), targets=("write", "state"))
        for text in (ids, ids.flip(0))
    ]
    model.attachment.detach()
    return collections_of_texts


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    monkeypatch.setattr(rows_, "SAVE_SECONDS", -1.0)
    return Steps(monkeypatch)


@pytest.fixture(params=RUNS)
def run(request: pytest.FixtureRequest, collections: list[Any]) -> Run:
    return RUNS[request.param](collections)


def kill(run: Run, steps: Steps, at: int, checkpoint: Path) -> None:
    steps.taken, steps.stop = 0, at
    with pytest.raises(InterruptedError):
        run.weights(checkpoint)


@pytest.mark.parametrize("kind", ["factors", "states", *TRAINING])
def test_a_killed_run_ends_with_the_same_weights(
    kind: str, collections: list[Any], steps: Steps, tmp_path: Path
) -> None:
    run = RUNS[kind](collections) if kind in RUNS else on_writes(collections, kind)
    for cfg in run.configs:
        cfg.lr_scheduler_name = "cosineannealing"
    never_killed = run.weights()
    kill(run, steps, 7, tmp_path / "run")
    resumed = run.weights(tmp_path / "run")
    assert steps.taken == N_STEPS and not (tmp_path / "run").exists()
    torch.testing.assert_close(resumed, never_killed, rtol=0, atol=0)


def test_a_checkpoint_of_other_settings_or_rows_is_refused(run: Run, steps: Steps, tmp_path: Path) -> None:
    kill(run, steps, 5, tmp_path / "run")
    others = [run._replace(configs=[replace(cfg, **new) for cfg in run.configs]) for new in ({"lr": 0.9}, {"seed": 7})]
    others += [run._replace(configs=run.configs[::-1])] * (len(run.configs) > 1)
    for word, other in [*(("settings", each) for each in others), ("inputs", run._replace(data=run.other))]:
        with pytest.raises(ValueError, match=f"run: expected a checkpoint of these settings.* got one of other {word}"):
            other.weights(tmp_path / "run")


@pytest.mark.parametrize("name", ["writesae_topk", "writesae_standard"])
def test_a_checkpoint_belongs_to_its_metric(name: str, steps: Steps, tmp_path: Path) -> None:
    cfg, steps.stop = config(0, N_STEPS, name, metric="gauss_newton"), 9
    for size, error in ((1, InterruptedError), (2, ValueError)):
        metric = Metric.of(torch.eye(K) * size, torch.eye(V), 1.0, 0.1, 8)
        with pytest.raises(error):
            train(cfg, writes(), metric=metric, checkpoint=tmp_path / "run")


def test_a_checkpoint_that_is_damaged_is_set_aside(steps: Steps, tmp_path: Path) -> None:
    """A bit of a file is flipped, or its end cut off. The run then begins anew."""
    run = side_by_side([])
    never_killed, folder = run.weights(), tmp_path / "run"
    kill(run, steps, 11, folder)
    kept = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert kept.keys() >= {"state.pt", "made_with.json", CHECKSUMS}
    draw = random.Random(0)
    for name in ("state.pt", "made_with.json"):
        data = damaged(kept[name], draw)
        folder.mkdir(exist_ok=True)
        for each, content in (kept | {name: data}).items():
            (folder / each).write_bytes(content)
        with pytest.warns(DamageWarning, match=r"run is damaged.* it is run\.damaged now"):
            resumed = run.weights(folder)
        torch.testing.assert_close(resumed, never_killed, rtol=0, atol=0)
        assert (tmp_path / "run.damaged" / name).read_bytes() == data and not folder.exists()
        shutil.rmtree(tmp_path / "run.damaged")


class Touch:
    """Makes a file as it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.file,)


def test_a_strangers_checkpoint_runs_no_code(steps: Steps, tmp_path: Path) -> None:
    run = side_by_side([])
    kill(run, steps, 5, tmp_path / "run")
    torch.save({"step": Touch(tmp_path / "mark")}, tmp_path / "run" / "state.pt")
    reseal(tmp_path / "run")
    with pytest.raises(UnpicklingError):
        run.weights(tmp_path / "run")
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("name", ["run", "run/thesis.txt"])
def test_what_others_wrote_is_no_checkpoint(name: str, tmp_path: Path) -> None:
    theirs = tmp_path / name
    theirs.parent.mkdir(exist_ok=True)
    theirs.write_text("the user's")
    with pytest.raises(OSError, match=f"{theirs.name}.*not written by it"):
        side_by_side([]).weights(tmp_path / "run")
    assert theirs.read_text() == "the user's"
