"""docs/your_model.md: its block that needs fla, marked ``py``, runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import fla_models

PAGE = Path(__file__).parents[2] / "docs" / "your_model.md"


def test_the_blocks_about_fla_run(tmp_path):
    blocks = re.findall(r"^```py\n(.*?)^```", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
    script = tmp_path / "page.py"
    script.write_text("\n".join(["import fla_cpu", "fla_cpu.import_fla()", *blocks]))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(fla_models.__file__).parent), *sys.path])}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == "torch.Size([2, 20, 2, 16, 32])\ntorch.Size([2, 24])\n"
