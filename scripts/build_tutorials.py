"""Run the tutorials and save their outputs, without traces of the machine that ran them.

python scripts/build_tutorials.py [tutorials/1_hook_train_substitute.ipynb ...]
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def build(path: Path) -> None:
    """Execute one notebook in an empty folder and write it back; a cell that raises leaves the file as it was."""
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(
            notebook,
            timeout=900,
            kernel_name="python3",
            resources={"metadata": {"path": folder}},
            record_timing=False,
        ).execute()
    for number, cell in enumerate(notebook.cells):
        cell.update({"metadata": nbformat.from_dict({}), "id": f"cell-{number:02d}"})
    nbformat.write(nbformat.from_dict({**notebook, "metadata": METADATA}), path)


if __name__ == "__main__":
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    os.environ.pop("MPLBACKEND", None)  # figures must reach the notebook
    for file in sys.argv[1:] or sorted((ROOT / "tutorials").glob("*.ipynb")):
        build(Path(file).resolve())
