"""The tutorials are short, run from a clean start, and are committed with outputs and no trace of the machine."""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import pytest
from examples import fresh_start, printed

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "tutorials").glob("*.ipynb"))
LONG = ("2", "5", "6", "7", "9")
"""What the names of those begin with that run at night."""
EACH = pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
INSTALL = """\
import importlib.util

if importlib.util.find_spec("hookpoints") is None:  # a fresh machine, in the folder tutorials/ of a clone
    %pip install -q ../hookpoints ..
"""
"""The first code cell. Not `-e`: a kernel that runs does not see an editable installation until it is restarted."""
PUBLIC = ("hookpoints", "sae_lens_writesae", "writesae", "writesae.page.atoms")
NUMBER = re.compile(r"(?<![\w.])([-+]?\d+(?:\.\d+)?(?:e-\d+)?)(%?)(?![\w.]\w)")
MACHINE_PATH = re.compile(r"/(?:home|root|tmp|work|Users|mnt|opt|usr|var)/|[A-Z]:\\\\|site-packages")


def same(printed_text: str, committed: str, trains: bool) -> None:
    """Lines and words are those that were committed, and numbers differ by 2% or by 2 of their last decimal at most,
    and percents by 1. Where a tutorial trains, a machine's rounding decides which atom is which, and lines are as many.
    """
    lines, expected = printed_text.splitlines(), committed.splitlines()
    assert len(lines) == len(expected) > 0
    for line, other in zip([] if trains else lines, expected):
        assert NUMBER.sub("#", line) == NUMBER.sub("#", other)
        for number, (text, unit) in zip(NUMBER.findall(line), NUMBER.findall(other)):
            decimals = len(text.partition(".")[2])
            margin = 2 * 10.0**-decimals if decimals else 1.0 if unit else 1e-5
            assert float(number[0]) == pytest.approx(float(text), rel=0.02, abs=margin), other


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=pytest.mark.nightly if path.stem.startswith(LONG) else pytest.mark.slow)
        for path in NOTEBOOKS
    ],
)
def test_runs(path, tmp_path):
    """A cell that raises fails the test; the notebook finds nothing but the package, in an empty folder. Cells print
    what was committed, as far as it does not hang on the machine (see `same`)."""
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"][1:]
    committed, now = "", ""
    namespace = {"__name__": "__main__"}
    with fresh_start(tmp_path):
        for number, cell in enumerate(cells, start=2):
            committed += "".join(output.text for output in cell.outputs if output.get("name") == "stdout")
            now += printed(cell.source, f"{path.name}, cell {number}", namespace)
    plt.close("all")
    same(now, committed, trains="train" in path.stem or "train(" in str(cells) or "train_on_" in str(cells))


@EACH
def test_installs_from_a_clone_and_imports_public_names(path):
    code = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    modules = re.findall(r"^(?:from|import) ((?:hookpoints|sae_lens_writesae|writesae)\S*)", "\n".join(code), re.M)
    assert code[0] == INSTALL.rstrip() and {*modules} <= {*PUBLIC}


@EACH
def test_is_short_whole_and_holds_nothing_of_the_machine(path):
    """Fewer than 60 lines, without the first cell. Images are left out: base64 holds anything."""
    text = path.read_text(encoding="utf-8")
    assert MACHINE_PATH.findall(re.sub(r'"image/png": *("[^"]*"|\[[^]]*\])', "", text)) == []
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert set(notebook.metadata) <= {"kernelspec", "language_info"}
    assert not [cell for cell in notebook.cells if cell.metadata]
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert sum(line.strip() != "" for cell in cells[1:] for line in cell.source.splitlines()) < 60
    assert all(words in notebook.cells[-1].source for words in ("Qwen3.5-0.8B", "not run"))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "not run in one go, in order"
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert "image/png" in outputs[-1].get("data", {}), "the last output is not a picture"


def test_all_are_listed():
    listed = re.findall(r"\((\w+)\.md\)", (ROOT / "docs/tutorials/index.md").read_text(encoding="utf-8"))
    assert listed == [path.stem for path in NOTEBOOKS]
