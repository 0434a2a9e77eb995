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
STRAY = re.compile(r"\*\*[A-Z]+\*\*|[.!?][A-Z]{2,}\b|\bPROSE_\w+|<<<<<<<|>>>>>>>")
"""What a template leaves where a placeholder was not, or was only partly, replaced."""
MACHINE_PATH = re.compile(r"/(?:home|root|tmp|work|Users|mnt|opt|usr|var)/|[A-Z]:\\\\|site-packages")


def faults(notebook: nbformat.NotebookNode) -> list[str]:
    """What is wrong with the text of a notebook: paragraphs that occur twice, stray markup, another install cell."""
    cells = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    paragraphs = [part.strip() for cell in cells for part in re.split(r"\n\s*\n", re.sub(r"`[^`]*`", "code", cell))]
    starts = [paragraph[:60] for paragraph in paragraphs]
    found = [f"paragraph occurs twice: {start!r}" for start in dict.fromkeys(starts) if starts.count(start) > 1]
    found += [f"stray markup: {paragraph[-60:]!r}" for paragraph in paragraphs if STRAY.search(paragraph)]
    found += [f"** is opened and not closed: {p[:60]!r}" for p in paragraphs if p.count("**") % 2]
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return found + ([] if code[0] == INSTALL.rstrip() else ["the first code cell is not INSTALL"])


def ids(path: Path) -> str:
    return path.stem


def test_there_are_tutorials():
    assert NOTEBOOKS


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
def test_imports_public_names_only(path):
    """The two packages, or the pages of atoms; nothing from inside."""
    allowed = r"hookpoints|sae_lens_writesae(\.page\.atoms)?"
    code = "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code")
    modules = re.findall(r"^(?:from|import) ((?:hookpoints|sae_lens_writesae)\S*)", code, flags=re.MULTILINE)
    assert modules and not [module for module in modules if not re.fullmatch(allowed, module)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=ids)
def test_text_is_whole_and_installs_from_a_clone(path):
    """What `..` is to the folder of the notebooks has a pyproject.toml."""
    assert faults(nbformat.read(path, as_version=4)) == []
    assert '%pip install -q "..[study]"\n' in INSTALL and (path.parents[1] / "pyproject.toml").is_file()


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("The effect lasts for twenty tokens.\n\nThe effect lasts for twenty tokens.", "paragraph occurs twice"),
        ("Which head to steer depends on how long it should last.OMS", "stray markup"),
        ("how long it should last.**OMS**", "stray markup"),
        ("PROSE_AT", "stray markup"),
        ("A **register fires on one token.", "opened and not closed"),
    ],
)
def test_a_garbled_text_is_found(text, fault):
    cells = [nbformat.v4.new_code_cell(INSTALL.rstrip()), nbformat.v4.new_markdown_cell(text)]
    (found,) = faults(nbformat.v4.new_notebook(cells=cells))
    assert fault in found


def test_another_install_cell_is_found():
    cells = [nbformat.v4.new_code_cell("%pip install -q sae-lens-writesae")]
    assert faults(nbformat.v4.new_notebook(cells=cells)) == ["the first code cell is not INSTALL"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=ids)
def test_names_a_larger_model(path):
    cells = nbformat.read(path, as_version=4).cells
    assert any("Qwen/Qwen3.5-0.8B" in cell.source for cell in cells if cell.cell_type == "markdown")


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
    notebook = json.loads(path.read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []):
            output.get("data", {}).pop("image/png", None)
    found = MACHINE_PATH.findall(json.dumps(notebook))
    assert not found, found
    assert set(notebook["metadata"]) <= {"kernelspec", "language_info"}
    assert not [cell for cell in notebook["cells"] if cell["metadata"]]
