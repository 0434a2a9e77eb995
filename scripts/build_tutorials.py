"""Run the tutorials and save their outputs, without traces of the machine that ran them.

python scripts/build_tutorials.py [tutorials/1_hook_train_substitute.ipynb ...]
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
KEPT_METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
INSTALL = """\
import importlib.util

if importlib.util.find_spec("hookpoints") is None:  # a fresh machine, in the folder tutorials/ of a clone
    %pip install -q "..[study]"
"""
"""The first code cell. Not `-e`: a kernel that runs does not see an editable installation until it is restarted."""
STRAY = re.compile(r"\*\*[A-Z]+\*\*|[.!?][A-Z]{2,}\b|\bPROSE_\w+|<<<<<<<|>>>>>>>")
"""What a template leaves where a placeholder was not, or was only partly, replaced."""


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


def build(path: Path) -> None:
    """Execute one notebook in an empty folder and write it back; a cell that raises leaves the file as it was.

    Raises:
        ValueError: the notebook has `faults`; before anything runs.
    """
    notebook = nbformat.read(path, as_version=4)
    next(cell for cell in notebook.cells if cell.cell_type == "code").source = INSTALL.rstrip()
    if found := faults(notebook):
        raise ValueError(f"{path.name}: " + "; ".join(found))
    with tempfile.TemporaryDirectory() as folder:
        resources = {"metadata": {"path": folder}}
        NotebookClient(notebook, timeout=900, kernel_name="python3", resources=resources, record_timing=False).execute()
    notebook.metadata = nbformat.from_dict(KEPT_METADATA)
    for number, cell in enumerate(notebook.cells):
        cell.metadata = nbformat.from_dict({})
        cell.id = f"cell-{number:02d}"
    nbformat.write(notebook, path)


def main() -> None:
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    os.environ.pop("MPLBACKEND", None)  # figures must reach the notebook
    for path in [Path(name) for name in sys.argv[1:]] or sorted((ROOT / "tutorials").glob("*.ipynb")):
        build(path.resolve())
        print(path)


if __name__ == "__main__":
    main()
