"""The main job end to end, small, as a user runs it."""

from __future__ import annotations

import io
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import get_args
from xml.etree import ElementTree

import pytest
import torch
from made_up import HOLDS, made_up
from tqdm.auto import tqdm

from hookpoints import HookedRecurrent
from hookpoints.files import sealed_json
from writesae.demo import CIRCUIT, FACTS, RECIPES, Demo, one_bar, read_facts, recall
from writesae.dictionary.quality import head_effects
from writesae_study.evaluations import load_result
from writesae_study.page.report import write_report
from writesae_study.verdict.paper import Outcome

TOKENS = torch.randint(1, 500, (2, 48), generator=torch.Generator().manual_seed(0))


def test_the_head_is_the_one_whose_writes_do_most_of_those_that_remember(embedded: HookedRecurrent) -> None:
    effects = head_effects(embedded, TOKENS)
    for memory in (0.0, 16.0):
        *_, half_life, nats = Demo(memory=memory).choose_head(embedded, TOKENS)
        lasting = effects[effects["half_life"] >= memory]
        assert half_life >= memory and nats == pytest.approx(lasting["nats"].max())
    assert Demo(memory=1e9).choose_head(embedded, TOKENS)[3] == pytest.approx(effects["nats"].max())
    assert Demo(layer=2, head=1).choose_head(embedded, TOKENS)[:2] == (2, 1)
    with pytest.raises(ValueError, match="head 9"):
        Demo(layer=2, head=9).choose_head(embedded, TOKENS)


def test_facts_of_a_stranger_are_numbers_and_text(tmp_path: Path) -> None:
    """Someone else may have written the folder: no markup of it reaches the page."""
    evil = "<script>alert(1)</script>"
    rows = [["an atom", 0.9, 0.8, 1.0], [evil, 0.1, 0.0, 0.2]]
    panel = {"title": evil, "example": evil, "sentence": evil, "axis": evil, "rows": rows}
    file = tmp_path / FACTS
    file.write_text(sealed_json({"panels": [panel]}))
    (opening,) = read_facts(file)
    page = write_report([made_up(HOLDS)], tmp_path / "report.html", opening=[opening]).read_text()
    assert evil not in page and "&lt;script&gt;alert(1)&lt;/script&gt;: 10% [0%, 20%]" in page
    edited = file.read_text().replace("0.9", "0.8")
    sealed = ([panel | {"rows": [[evil, evil, 0, 1]]}], [{"svg": evil}], {"svg": evil})
    for foreign in (edited, json.dumps([panel]), "not JSON", *(sealed_json({"panels": each}) for each in sealed)):
        file.write_text(foreign)
        with pytest.raises(ValueError, match=FACTS):
            read_facts(file)


def test_a_memory_is_read_one_fact_replaced_and_the_answer_follows(tmp_path: Path) -> None:
    recalled = recall()
    first, edited = recalled.memories
    assert (first.answer, edited.answer) == ("Rome", "Oslo") and min(first.share, edited.share) > 0.9
    facts, others = dict(first.facts), dict(edited.facts)
    changed = {"Ben lives in → Rome", "Ben lives in → Oslo"}
    assert facts.keys() ^ others.keys() == changed and len(facts) == len(others) == 4
    assert all(others[fact] == pytest.approx(facts[fact], abs=0.05) for fact in facts.keys() - changed)
    lines = recalled.told().splitlines()
    assert (
        len(lines) == 5 and "Ben lives in → Rome 0.48" in lines[1] and lines[4] == "answer    Ben lives in Oslo (99%)"
    )
    page = write_report([made_up(HOLDS)], tmp_path / "report.html", recalled=recalled).read_text()
    assert page.index("Ben lives in → Oslo") < page.index(ElementTree.fromstring(recalled.circuit)[-1].text or "-")
    assert page.index(recalled.circuit) < page.index('<h2 id="claims">')


class Terminal(io.StringIO):
    """Standard error of somebody who looks."""

    def isatty(self) -> bool:
        return True


def test_one_bar_says_the_stage_and_those_of_libraries_are_not_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    for terminal in (Terminal(), io.StringIO()):
        said: list[str] = []
        monkeypatch.setattr(sys, "stderr", terminal)
        with one_bar(("facts", "training"), said.append) as stages:
            stages.next()
            for _ in tqdm(range(3), desc="of a library"):
                for _ in tqdm(range(3), desc="of another"):
                    pass
            print("a warning", file=sys.stderr)
            stages.next()
            stages.say("a sentence")
        drawn = terminal.getvalue()
        assert sys.stderr is terminal and said == ["a sentence"] and "librar" not in drawn and "another" not in drawn
        if terminal.isatty():
            stages_drawn = list(dict.fromkeys(re.findall(r"stage \d of \d: \w+", drawn)))
            assert stages_drawn == ["stage 1 of 2: facts", "stage 2 of 2: training"] and "a warning\n" in drawn
        else:
            assert drawn == "a warning\n"


@pytest.mark.slow
def test_the_demo_leaves_a_report_dictionaries_and_results(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    said: list[str] = []
    demo = Demo(layer=4, head=0, training_tokens=64_000, train_sequences=160, out=tmp_path / "out")
    page = demo.run(say=lambda line: said.append(str(line)))
    screen = "\n".join(said)
    assert re.match(r"about \d+ s on this machine", said[0]) and "half of a write is left" in screen
    assert "%|" not in capfd.readouterr().err  # a bar of a library
    assert not [outcome for outcome in get_args(Outcome) if outcome in screen]
    assert "Ben lives in Oslo (99%)" in said[-1] and said[-1].endswith(f"{demo.out / CIRCUIT}\n\nopen in a browser:")
    ElementTree.parse(demo.out / CIRCUIT)
    recall_rows, composition_rows = ({row[0]: row[1] for row in panel.rows} for panel in read_facts(demo.out / FACTS))
    assert recall_rows["an atom"] > 0.8 and composition_rows["an atom"] > 0.6
    assert max(recall_rows["another pair's write"], composition_rows["another pair's write"]) < 0.1
    assert recall_rows["codes of two quantizers"] > 0.8 and composition_rows["codes of two quantizers"] < 0.3
    assert "One atom writes a fact" in page.read_text()
    whole = {label: next((demo.out / label.replace(", ", "-")).rglob("*.safetensors")) for label in RECIPES}
    before = {label: file.stat().st_mtime_ns for label, file in whole.items()}
    assert demo.run(say=said.append) == page == tmp_path / "out" / "report.html"
    assert before == {label: file.stat().st_mtime_ns for label, file in whole.items()}
    with pytest.raises(ValueError, match="seed: 0, now 1"):
        replace(demo, seed=1).run()
    recovered = json.loads(page.with_suffix(".json").read_text())["quality"]
    assert len(recovered) == 2 and min(each["recovered"]["low"] for each in recovered) > 0.3
    for label, file in whole.items():
        result = load_result(file.parents[1] / "substitution")
        assert result.label == label
        assert result.tables["firings"].query("condition == 'native'")["kl_window"].abs().max() < 1e-6
        shares = result.findings()[0].shown
        assert shares["atom"].low > 0.05 and shares["another atom"].mean < 0 < shares["vector quantizer"].mean
