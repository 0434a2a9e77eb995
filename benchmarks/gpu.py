"""On a GPU: parity with the host, flash-linear-attention's compiled kernels, the demo, and the whole way at real size.

`.ci/gpu` calls it on a machine that has one; a run of all benchmarks leaves it out.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import frame
from frame import Line
from tables import table

Row = dict[str, Any]
STAGES = {
    "CUDA, fla, triton": (
        "-c 'import fla, torch, triton; print(torch.version.cuda, fla.__version__, triton.__version__)'",
    ),
    "Calls, edits, memories, training and commands give what they give on the host.": (
        "-m pytest -n0 -q -m 'not nightly' tests/test_on_device.py",
    ),
    "hookpoints gives what fla's compiled kernels give.": (
        "tools/oracles/fla_interpreted.py WORK/kernels",
        "-m pytest -n0 -q tools/oracles/test_fla_kernels.py",
    ),
    "`writesae demo` runs.": ("-m writesae demo --device cuda --out WORK/demo",),
    "The whole way in the shape of Qwen3.5-0.8B runs (`benchmarks/real_size.py`).": (
        "benchmarks/real_size.py --device cuda --tokens 1000000 --training-tokens 5000000",
    ),
}
"""What is tried, and arguments of Python, one line after the other, which all end well where it holds. WORK is a folder
of the run."""


def measure() -> Row:
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    device = subprocess.check_output(query, text=True).strip()
    with tempfile.TemporaryDirectory() as work:
        return {"device": device, "stages": {what: outcome(commands, work) for what, commands in STAGES.items()}}


def outcome(commands: tuple[str, ...], work: str) -> Row:
    """Whether a stage passed, its seconds, its last line, and what it printed as a benchmark does."""
    environment = os.environ | {"HOOKPOINTS_DEVICE": "cuda", "HOOKPOINTS_ORACLE": f"{work}/kernels"}
    begin = time.monotonic()
    for command in commands:
        words = [sys.executable, *shlex.split(command.replace("WORK", work))]
        done = subprocess.run(words, env=environment, cwd=Path(__file__).parents[1], capture_output=True, text=True)
        print(done.stdout, done.stderr, flush=True)
        if done.returncode:
            break
    printed = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
    row = {"passed": not done.returncode, "seconds": round(time.monotonic() - begin), "said": printed[-1].strip(" =")}
    return row | {"figures": [line.split(" | ") for line in printed if line.count(" | ") == 2]}


def lines(record: Row) -> list[Line]:
    return [Line("stages that failed", sum(not row["passed"] for row in record["stages"].values()), goal=0)]


def text(record: Row) -> str:
    rows, figures = [], []
    for what, row in record["stages"].items():
        rows.append((what, "passed" if row["passed"] else "FAILED", row["seconds"], f"`{row['said']}`"))
        figures += row["figures"]
    stages = table(("what", "", "seconds", "last line"), rows)
    return f"{record['device']}.\n\n{stages}\n{table(('what', 'goal', 'measured'), figures)}"


if __name__ == "__main__":
    frame.main(sys.modules[__name__])
