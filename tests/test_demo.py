"""The main job end to end, small, as a user runs it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pandas as pd
import pytest

from sae_lens_writesae.sae.factors import Collection
from writesae.demo import PAGE, ChosenHead, Recalled, page_of, recall, run_demo
from writesae.dictionary.quality import strongest_head
from writesae.files import sae_folders
from writesae.flags import Demo

NAMES = ("write-seed0", "write-gauss_newton-seed0")
HEAD = ChosenHead("embedded", "gated_delta", 2, 1, 20.0, 0.1)


def test_the_head_is_the_one_whose_writes_do_most_of_those_that_remember() -> None:
    effects = pd.DataFrame({"layer": [2, 4, 0], "head": [1, 3, 2], "half_life": [3.0, 16.0, 90.0], "nats": [9, 5, 1]})
    assert strongest_head(effects) == (4, 3, 16.0, 5)
    assert strongest_head(effects.assign(half_life=1.0)) == (2, 1, 1.0, 9)


@pytest.fixture(scope="module")
def recalled() -> Recalled:
    return recall()


@pytest.mark.slow
def test_a_memory_is_read_back_and_cut_and_the_answer_follows(recalled: Recalled) -> None:
    """The sentence that contradicts another one is cut: the memory is then as if that had never been read."""
    before, after = recalled.memories
    assert (before.answer, after.answer) == ("Vienna", "Paris") and min(before.share, after.share) > 0.9
    assert recalled.cut == "The home of Clara is Vienna."
    assert {sentence for sentence, (answer, _) in recalled.sentences.items() if answer == "Paris"} == {recalled.cut}
    assert recalled.scores["cut"] == pytest.approx(recalled.scores["never read"], abs=0.1)
    assert recalled.scores["read"] > recalled.scores["cut"] + 5
    assert "is gone: every layer equals" in recalled.certificate
    assert sum(phrase["span"] is not None for memory in recalled.memories for phrase in memory.phrases) >= 6
    page = page_of(recalled, HEAD, {})
    assert f"<mark>{recalled.cut}</mark>" in page and recalled.circuit in page and "Dictionaries" not in page
    ElementTree.fromstring(recalled.circuit)


@pytest.mark.slow
def test_the_demo_leaves_a_page_and_dictionaries(
    recalled: Recalled,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines: list[str] = []
    monkeypatch.setattr("writesae.demo.recall", lambda: recalled)  # ten seconds, the same each time
    sizes = {"training_tokens": 8_000, "eval_sequences": 8}
    flags = Demo(out=tmp_path / "out", **sizes)
    page = run_demo(flags, lambda line: lines.append(str(line)))
    screen = "\n".join(lines)
    assert re.search(r"^about \d+ s on this machine", screen, re.MULTILINE) and "half of a write is left" in screen
    assert re.search(r"Vienna \(9\d%\)\n.*\n.* Paris \(\d+%\)\n.*\n\nopen in a browser:$", lines[-1])
    text = page.read_text()
    assert page == tmp_path / "out" / PAGE and "<b>Paris</b>" in text and all(name in text for name in NAMES)
    # Other commands take what it leaves.
    assert Collection.open(flags.out / "collection").sha256
    weights = {folder.parent.name: folder / "sae_weights.safetensors" for folder in sae_folders(flags.out)}
    assert weights.keys() == {*NAMES}
    before = {label: file.stat().st_mtime_ns for label, file in weights.items()}
    assert run_demo(flags, lines.append) == page and page.read_text() == text
    assert before == {label: file.stat().st_mtime_ns for label, file in weights.items()}
    with pytest.raises(ValueError, match="d_sae: 256, now 8"):
        run_demo(replace(flags, d_sae=8))
