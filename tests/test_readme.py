"""The README's Python blocks run, in order, in a fresh process."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
sys.path.append(str(ROOT / "scripts"))

import readme_table  # noqa: E402

from sae_lens_writesae import EVALUATIONS  # noqa: E402


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
    from hookpoints.hooks.table import HOOKS

    text = README.read_text()
    assert all(row.name in text for row in HOOKS)


def test_the_table_of_evaluations_is_that_of_the_classes():
    """`python scripts/readme_table.py` writes it."""
    text = README.read_text()
    assert readme_table.with_table(text) == text
    assert all(f"| `{kind}` | {each.question} |" in text for kind, each in EVALUATIONS.items())


def test_runs_of_numbers_are_joined():
    assert readme_table.spans((1, 2, 3, 5, 11, 12)) == "1–3, 5, 11–12" and readme_table.spans(()) == ""


def test_the_readme_is_short():
    assert len(README.read_text().splitlines()) <= 180
