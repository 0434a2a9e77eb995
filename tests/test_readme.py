"""The README's Python blocks run, in order, in a fresh process."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


def blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", README.read_text(), flags=re.MULTILINE | re.DOTALL)


@pytest.mark.slow
def test_python_blocks_run(tmp_path):
    script = tmp_path / "readme.py"
    script.write_text("\n".join(blocks()))
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(blocks()) >= 4


def test_every_linked_file_exists():
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", README.read_text())
    assert links and all((README.parent / link).exists() for link in links)


def test_the_hook_table_in_the_readme_is_the_table():
    from hookpoints.hook_table import HOOKS

    text = README.read_text()
    assert all(row.name in text for row in HOOKS)
