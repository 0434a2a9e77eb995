"""The README's Python blocks run, in order, in a fresh process, and show the effects that the text claims."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
END = "-- end of block"
PYTHON = os.environ.get("README_PYTHON", sys.executable)
sys.path.append(str(ROOT / "scripts"))

import tables  # noqa: E402


def blocks() -> dict[str, str]:
    """The Python block of each section, by heading."""
    sections = re.split(r"^## ", README.read_text(), flags=re.MULTILINE)
    found = {each.partition("\n")[0]: re.findall(r"^```python\n(.*?)^```", each, re.M | re.S) for each in sections}
    return {heading: "\n".join(codes) for heading, codes in found.items() if codes}


@pytest.fixture(scope="module")
def printed(tmp_path_factory) -> dict[str, str]:
    """What each block prints, all of them run in one fresh process, in order. `README_PYTHON` names its interpreter:
    .ci/run gives that of an environment that has the wheel alone."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "readme.py").write_text("\n".join(f"print({END!r})\n{code}" for code in blocks().values()))
    done = subprocess.run([PYTHON, "readme.py"], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(blocks(), done.stdout.split(END + "\n")[1:], strict=True))


def numbers(pattern: str, text: str) -> list[float]:
    return [float(number) for number in re.findall(pattern, text)]


@pytest.mark.slow
@pytest.mark.parametrize("heading", blocks())
def test_a_block_prints_what_its_comments_say(heading, printed):
    """Numbers and quoted words of a comment that stands beside a print, or in the line below it."""
    said = " ".join(re.findall(r"print\(.*\)(?:\s+# |\n# )(.*)$", blocks()[heading], flags=re.MULTILINE))
    number = re.compile(r"(?<![\w.])\d+(?:\.\d+)?\b")
    assert printed[heading].strip() and set(number.findall(said)) <= set(number.findall(printed[heading]))
    assert all(words in printed[heading] for words in re.findall(r'"(.+?)"', said))


@pytest.mark.slow
def test_the_blind_model_says_something_else(printed):
    native, blind = printed["Look into a memory"].splitlines()[-2:]
    (before,), (after,) = (numbers(r"= (\S+)", line) for line in (native, blind))
    assert native.split()[0] == "Treasury" != blind.split()[0] and after < before - 0.1


@pytest.mark.slow
def test_a_deleted_write_changes_the_text_and_its_like_restores_it(printed):
    native, silent, *probabilities = printed["Hooks"].splitlines()
    p, deleted, replaced = numbers(r"= (\S+)", "\n".join(probabilities))
    assert native != silent and deleted < p / 2 and replaced > p


@pytest.mark.slow
def test_the_dictionary_recovers_a_part_of_what_deletion_costs(printed):
    (nats,), (share, low, high) = (numbers(p, printed["Sparse autoencoders"]) for p in (r"(\S+) nats", r"(-?\d+)%"))
    assert nats > 0.05 and 10 < low < share < high < 100


@pytest.mark.slow
def test_steering_moves_the_probability_and_the_text(printed):
    rows = re.findall(r"P\(war\) = (\S+), (.*)", printed["What atoms do"])
    native, toward, away = (float(p) for p, _ in rows)
    assert toward > 5 * native and away < native / 2
    assert [" war" in text for _, text in rows] == [False, True, False]


def test_every_linked_file_exists():
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", README.read_text())
    assert links and all((README.parent / link).exists() for link in links)


def test_the_hook_table_in_the_readme_is_the_table():
    from hookpoints.hooks.table import HOOKS

    text = README.read_text()
    assert all(row.name in text for row in HOOKS)


def test_the_table_of_evaluations_is_that_of_the_classes():
    """`python scripts/tables.py` writes it."""
    text = README.read_text()
    assert tables.with_evaluations(text) == text
