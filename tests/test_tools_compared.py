"""The page on other tools has the rows that its script runs, and its probes are told right from wrong."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from conftest import VOCAB

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "scripts"))

from tool_probes.__main__ import answer  # noqa: E402
from tool_probes.ours import Hookpoints  # noqa: E402
from tool_probes.truth import make_model, solve  # noqa: E402
from tools_compared import FAMILIES, PAGE, TASKS, TOOLS, rows, source  # noqa: E402


def test_the_page_has_every_row_column_and_probe():
    page = PAGE.read_text()
    lines = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")]
    names = [tool.name for tool in TOOLS]
    assert names in lines and set(lines[0]) < set(names)
    assert [line[0] for line in lines[1:9]] == list(TASKS.values())[:-1]
    full = {line[0]: line[1:] for line in lines[-len(rows()) :]}
    assert list(full) == [f"{TASKS[task]}: {FAMILIES[family]}" for task, family in rows()]
    assert all(len(cells) == len(TOOLS) for cells in full.values())
    own = {cells[0] for row, cells in full.items() if "Mamba-1" not in row and not row.startswith(TASKS["time"])}
    assert all(cell.startswith("**yes**") for cell in own)
    assert all(source(tool) in page for tool in TOOLS)


@pytest.fixture(scope="module")
def solution():
    return solve("rwkv7")


def test_the_loop_is_the_model(solution):
    model = make_model("rwkv7")
    with torch.no_grad():
        assert torch.allclose(model(solution["tokens"]).logits, solution["plain"], atol=1e-5)
    assert solution["tokens"].max() < VOCAB


@torch.no_grad()
def test_probes_are_graded(solution):
    class Nothing:
        def __init__(self, model):
            self.model = model

        def delete(self, tokens):
            return self.model(tokens).logits

        def write(self, tokens):
            return solution["write"][:, :-1]

        def write_with_work(self, tokens):
            """by hand"""
            return solution["write"]

    ours = {task: answer(lambda: Hookpoints(make_model("rwkv7")), task, solution) for task in ("delete", "generate")}
    assert [found["grade"] for found in ours.values() if found] == ["yes", "yes"]
    idle = answer(lambda: Nothing(make_model("rwkv7")), "delete", solution)
    assert idle is not None and idle["grade"] == "no" and abs(idle["error"] - 1) < 1e-3
    by_hand = answer(lambda: Nothing(make_model("rwkv7")), "write", solution)
    assert by_hand is not None and by_hand["grade"] == "with work" and "shape" in by_hand["plainly"]["note"]
    assert answer(lambda: Nothing(make_model("rwkv7")), "state", solution) is None
