"""A sweep: its grid, one row for each dictionary, nothing done twice."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from sae_lens_writesae.files import taken
from writesae.cli import parse
from writesae.dictionaries import Train
from writesae.reproduce.measures import MEASURE_NAMES, figure
from writesae.reproduce.sweep import Sweep

TINY: dict[str, Any] = {
    "layer": (2,),
    "head": (0,),
    "d_sae": (32,),
    "context_size": 64,
    "eval_sequences": 6,
    "n_atoms": 3,
    "firings_per_atom": 2,
    "training_tokens": 2048,
}


def tiny(out: Path, **changes: Any) -> Sweep:
    settings: dict[str, Any] = {**TINY, "k": (1, 4), "out": out, **changes}
    return Sweep(**settings)


def test_the_grid_is_the_product_of_its_axes() -> None:
    sweep = Sweep(k=(1, 4), d_sae=(32, 64), variant=("WriteSAE", "TiedSAE"), seed=(0, 1))
    points = list(sweep.points())
    assert len(points) == 16 and len({point.folder for point in points}) == 16
    train = sweep.train(points[-1], Path("collection"))
    assert (train.k, train.d_sae, train.names) == (4, 64, ("write-TiedSAE-seed1",))
    assert (train.layers, train.heads) == ((2,), (1,))
    ladder = Sweep(model=("embedded", "embedded-mamba2"), layer=(2, 6), head=(1, 7), k=(4,))
    assert [(p.model, p.layer, p.head) for p in ladder.points()] == [("embedded", 2, 1), ("embedded-mamba2", 6, 7)]


@pytest.mark.parametrize(
    "changes, word",
    [
        ({"variant": ("Wrong",)}, "Wrong"),
        ({"evaluation": ("wrong",)}, "wrong"),
        ({"model": ("a", "b", "c"), "layer": (1, 2)}, "layer"),
        ({"k": (1, 1)}, "once"),
        ({"seed": ()}, "at least one"),
    ],
)
def test_a_wrong_setting_is_said(changes: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        Sweep(**changes)


def test_what_compares_dictionaries_cannot_be_swept(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="baselines"):
        tiny(tmp_path / "out", evaluation=("baselines",)).run()
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_each_point_has_a_row_and_is_trained_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = tiny(tmp_path)
    files = sweep.run(say=lambda line: None)
    table = pd.read_csv(files.table)
    assert table["k"].tolist() == [1, 4] and (table["l0"] <= table["k"]).all() and table["l0"].is_monotonic_increasing
    assert (table["coverage"] > 0).all() and table["dead"].between(0, 1).all() and (table["explained"] < 1).all()
    assert table["recovered"].notna().all() and {"claim 1", "claim 6"} <= set(table)
    page = files.html.read_text()
    assert "Sweep over k" in page and page.count("<svg") == sum(name in table for name in MEASURE_NAMES)
    assert "k1-seed0" in files.report.read_text()
    monkeypatch.delattr(Train, "_train")
    said: list[object] = []
    with ThreadPoolExecutor() as pool:
        with taken(tmp_path):
            run = pool.submit(tiny(tmp_path).run, say=said.append)
            while not said and not run.done():
                time.sleep(0.01)
        again = run.result()
    assert "another process works" in str(said[0])
    pd.testing.assert_frame_equal(pd.read_csv(again.table), table)
    with pytest.raises(ValueError, match="training_tokens"):
        tiny(tmp_path, training_tokens=4096).run()


@pytest.mark.slow
def test_an_architecture_without_k_can_be_swept(tmp_path: Path) -> None:
    architectures = ("writesae_topk", "writesae_jumprelu")
    sweep = tiny(tmp_path, k=(4,), architecture=architectures, evaluation=("partition",))
    table = pd.read_csv(sweep.run(say=lambda line: None).table)
    assert table["architecture"].tolist() == list(architectures)
    assert table["l0"].iloc[0] <= 4 < table["l0"].iloc[1]


def test_seeds_are_joined_in_a_figure() -> None:
    rows = [
        {"target": "write", "k": k, "seed": seed, "wins": 0.5 + seed / 10, "wins_low": 0.4, "wins_high": 0.8}
        for k in (1, 4)
        for seed in (0, 1)
    ]
    table = pd.DataFrame(rows)
    lines, points = figure(table, "wins", ["k", "seed"]), figure(table[table["k"] == 1], "wins", ["seed"])
    assert lines.startswith("<svg") and points.startswith("<svg") and lines != points
    holes = table.assign(wins=np.where(table["k"] == 1, np.nan, table["wins"]))
    assert figure(holes, "wins", ["k", "seed"]).startswith("<svg")


def test_the_command_line_gives_the_grid() -> None:
    sweep = parse(Sweep, "writesae sweep", ["--k", "16", "32", "--architecture", "writesae_batchtopk"])
    assert (sweep.k, sweep.architecture, sweep.seed) == ((16, 32), ("writesae_batchtopk",), (0,))
