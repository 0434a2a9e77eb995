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
    from hookpoints.hooks.table import HOOKS

    text = README.read_text()
    assert all(row.name in text for row in HOOKS)


def test_the_evaluations_in_the_readme_are_those_of_the_suite():
    from sae_lens_writesae.suite import EVALUATIONS

    rows = re.findall(r"^\| `(\w+)` \| (.*\?) \| (.*?) ?\|$", README.read_text(), flags=re.MULTILINE)
    found = {name: (question, frozenset(_numbers(claims))) for name, question, claims in rows}
    assert found == {name: (entry.question, frozenset(entry.claims)) for name, entry in EVALUATIONS.items()}


def _numbers(text: str) -> list[int]:
    """The text 1–3, 5 as 1, 2, 3, 5."""
    spans = [span.split("–") for span in text.split(",") if span.strip()]
    return [number for span in spans for number in range(int(span[0]), int(span[-1]) + 1)]
