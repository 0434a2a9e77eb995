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
def test_a_silent_head_changes_the_text(printed):
    _, native, silent = printed["Quickstart"].splitlines()
    assert native != silent


@pytest.mark.slow
def test_an_atom_writes_a_fact(printed):
    (native, before), (edited, after) = (line.split() for line in printed["Write a fact"].splitlines())
    assert (native, edited) == ("Rome", "Tokyo") and min(float(before), float(after)) > 0.9


@pytest.mark.slow
def test_one_write_restores_a_word(printed):
    assert numbers(r"restores (\d+)%", printed["Find a write"])[0] > 40


@pytest.mark.slow
def test_a_memory_without_a_span_is_as_if_it_was_never_read(printed):
    whole, cut, never = numbers(r"= (\S+)", printed["Cut a memory"])
    assert whole - never > 0.3 and abs(cut - never) < 0.1 * (whole - never)


@pytest.mark.slow
def test_the_dictionary_recovers_a_part_of_what_deletion_costs(printed):
    section = printed["Train a sparse autoencoder"]
    (nats,), (share, low, high) = (numbers(p, section) for p in (r"(\S+) nats", r"(-?\d+)%"))
    assert nats > 0.05 and 10 < low < share < high < 100


def test_every_linked_file_exists():
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", README.read_text())
    assert links and all((README.parent / link).exists() for link in links)
