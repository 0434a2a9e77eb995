"""docs/benchmarks.md is what the records of benchmarks say, and the runner keeps the record of one that fails."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import frame  # noqa: E402
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
    said = "embeddings {:.2f}, MLPs {:.2f}, softmax heads {:.2f}, writes {:.2f}"
    assert said.format(*(deleted[kind]["r"] for kind in kinds)) in " ".join(page.split())


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


def test_the_run_on_a_gpu_says_what_it_lacks_and_writes_nothing(tmp_path):
    """The environment has a PyTorch that sees no GPU."""
    for file, script in (("nvidia-smi", "echo GPU 0: A GPU"), ("bin/python", "exit 1")):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / file).chmod(0o755)
    before = {file: file.read_bytes() for file in run.DOCS.glob("benchmarks/*")}
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    said = subprocess.check_output([ROOT / ".ci" / "gpu", tmp_path], env=environment, text=True)
    assert "skipped: " in said and "no CUDA device" in said
    assert {file: file.read_bytes() for file in before} == before


def test_figures_of_a_gpu_have_their_date_and_device_and_a_failed_stage_stops_no_other(tmp_path, monkeypatch):
    import gpu

    (tmp_path / "nvidia-smi").write_text("#!/bin/bash\necho A GPU, 580.1\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    bad = ("-c 'raise SystemExit(\"a reason\")'", "-c 'print(1)'")
    good = ('-c \'import os; print("a step |  | 3 ms"); print(os.environ["HOOKPOINTS_DEVICE"])\'',)
    monkeypatch.setattr(gpu, "STAGES", {"This fails.": bad, "This runs.": good})
    (tmp_path / "benchmarks").mkdir()
    frame.main(gpu, ["--json", str(tmp_path / "benchmarks" / "gpu.json")])
    page = run.page(tmp_path / "benchmarks")
    assert "| This fails. | FAILED | 0 | `a reason` |" in page and "| This runs. | passed | 0 | `cuda` |" in page
    assert (
        "| a step | – | 3 ms |" in page
        and "A GPU, 580.1" in page
        and frame.machine()["date"] in page
        and "1.00, missed" in page
    )
