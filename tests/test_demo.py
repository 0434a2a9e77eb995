"""The main job end to end, small, as a user runs it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from made_up import HOLDS, made_up

from hookpoints import HookedRecurrent
from writesae.demo import FACTS, RECIPES, Demo, read_facts
from writesae.dictionary.quality import head_effects
from writesae.evaluations import load_result
from writesae.page.report import write_report

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
    file.write_text(json.dumps([panel]))
    (opening,) = read_facts(file)
    page = write_report([made_up(HOLDS)], tmp_path / "report.html", opening=[opening]).read_text()
    assert evil not in page and "&lt;script&gt;alert(1)&lt;/script&gt;: 10% [0%, 20%]" in page
    for foreign in ([panel | {"rows": [[evil, evil, 0, 1]]}], [{"svg": evil}], {"svg": evil}, "not JSON"):
        file.write_text(json.dumps(foreign) if foreign != "not JSON" else foreign)
        with pytest.raises(ValueError, match=FACTS):
            read_facts(file)


@pytest.mark.slow
def test_the_demo_leaves_a_report_dictionaries_and_results(tmp_path: Path) -> None:
    said: list[str] = []
    demo = Demo(layer=4, head=0, training_tokens=64_000, train_sequences=160, out=tmp_path / "out")
    page = demo.run(say=lambda line: said.append(str(line)))
    screen = "\n".join(said)
    assert re.match(r"about \d+ s on this machine", said[0]) and "half-life" in screen
    atoms = dict(re.findall(r"`(\w+)`: changed (\d+)", screen))
    codes, others = (re.findall(rf"{each}: changed (\d+)", screen) for each in ("quantizers", "another pair's write"))
    assert int(atoms["recall"]) > 80 and int(atoms["composition"]) > 60 and max(map(int, others)) < 10
    assert int(codes[0]) > 80 and int(codes[1]) < 30 and "One atom writes a fact" in page.read_text()
    whole = {label: next((demo.out / label.replace(", ", "-")).rglob("*.safetensors")) for label in RECIPES}
    before = {label: file.stat().st_mtime_ns for label, file in whole.items()}
    assert demo.run(say=said.append) == page == tmp_path / "out" / "report.html" and "kept: write-trained" in said[-2]
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
