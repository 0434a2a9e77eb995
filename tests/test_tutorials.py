"""The tutorials run from a clean start; they are committed with outputs, and with no trace of the machine."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "tutorials").glob("*.ipynb"))
INSTALL = """\
import importlib.util

if importlib.util.find_spec("hookpoints") is None:  # a fresh machine, in the folder tutorials/ of a clone
    %pip install -q "..[study]"
"""
"""The first code cell. Not `-e`: a kernel that runs does not see an editable installation until it is restarted."""
PUBLIC = ("hookpoints", "sae_lens_writesae", "writesae", "writesae.page.atoms")
STRAY = re.compile(r"\*\*[A-Z]+\*\*|[.!?][A-Z]{2,}\b|\bPROSE_\w+|<<<<<<<|>>>>>>>")
"""What a template leaves where a placeholder was not, or was only partly, replaced."""
MACHINE_PATH = re.compile(r"/(?:home|root|tmp|work|Users|mnt|opt|usr|var)/|[A-Z]:\\\\|site-packages")


def faults(notebook: nbformat.NotebookNode) -> list[str]:
    """Paragraphs that occur twice, and stray markup."""
    cells = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    paragraphs = [part.strip() for cell in cells for part in re.split(r"\n\s*\n", re.sub(r"`[^`]*`", "code", cell))]
    starts = [paragraph[:60] for paragraph in paragraphs]
    found = [start for start in dict.fromkeys(starts) if starts.count(start) > 1]
    return found + [text for text in paragraphs if STRAY.search(text) or text.count("**") % 2]


def ids(path: Path) -> str:
    return path.stem


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=ids)
def test_runs(path, tmp_path, monkeypatch):
    """A cell that raises fails the test; the notebook finds nothing but the package, in an empty folder."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])))
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=900, kernel_name="python3", resources=resources).execute()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=ids)
def test_text_is_whole_and_code_installs_from_a_clone_and_imports_public_names(path):
    """What `..` is to the folder of the notebooks has a pyproject.toml."""
    notebook = nbformat.read(path, as_version=4)
    assert faults(notebook) == [] and (path.parents[1] / "pyproject.toml").is_file()
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    modules = re.findall(r"^(?:from|import) ((?:hookpoints|sae_lens_writesae|writesae)\S*)", "\n".join(code), re.M)
    assert code[0] == INSTALL.rstrip() and {*modules} <= {*PUBLIC}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=ids)
def test_is_committed_with_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "not run in one go, in order"
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert any("image/png" in output.get("data", {}) for output in outputs), "no figure was saved"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=ids)
def test_holds_nothing_of_the_machine(path):
    """No paths in text or metadata, and no times of execution. Images are left out: base64 holds anything."""
    text = path.read_text(encoding="utf-8")
    found = MACHINE_PATH.findall(re.sub(r'"image/png": *("[^"]*"|\[[^]]*\])', "", text))
    assert not found, found
    notebook = json.loads(text)
    assert set(notebook["metadata"]) <= {"kernelspec", "language_info"}
    assert not [cell for cell in notebook["cells"] if cell["metadata"]]
