"""docs/benchmarks.md is what the records of benchmarks say, and the runner keeps the record of one that fails."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import run  # noqa: E402

TINY = """
import time

QUICK = {"n": 2}

def measure(n: int = 9):
    return {"rounds": n, "slow / fast": {"time": 0.5}}
"""


def test_the_pages_are_made_of_the_records(tmp_path):
    (tmp_path / "benchmarks").symlink_to(run.DOCS / "benchmarks")
    run.write(tmp_path)
    for page in tmp_path.glob("*.md"):
        assert page.read_text() == (run.DOCS / page.name).read_text(), page.name


def test_the_page_of_circuits_quotes_its_record():
    page = (run.DOCS / "circuits.md").read_text()
    deleted = json.loads((run.DOCS / "benchmarks" / "circuits.json").read_text())["found"]["models"]["embedded"][
        "deleted"
    ]
    kinds = ("embedding", "mlp", "attn", "write")
    sentence = "embeddings {:.2f}, MLPs {:.2f}, softmax heads {:.2f}, writes {:.2f}"
    assert sentence.format(*(deleted[kind]["r"] for kind in kinds)) in " ".join(page.split())


@pytest.mark.slow  # processes that import torch
def test_a_benchmark_leaves_a_record_and_a_failed_one_the_former(tmp_path, monkeypatch, capsys):
    (tmp_path / "tiny.py").write_text(TINY)
    monkeypatch.syspath_prepend(tmp_path)
    assert run.run(("tiny",), tmp_path, quick=True) == []
    file = tmp_path / "benchmarks" / "tiny.json"
    former = json.loads(file.read_text())
    assert former["found"] == {"rounds": 2, "slow / fast": {"time": 0.5}} and former["settings"] == {"n": 2}
    page = run.page(file.parent, ("tiny",))
    assert "| slow / fast, time | 0.50 |" in page
    (tmp_path / "tiny.py").write_text("raise SystemExit(3)")
    assert run.run(("tiny",), tmp_path, quick=True) == ["tiny"]
    assert json.loads(file.read_text()) == former and former["date"] in capsys.readouterr().out
