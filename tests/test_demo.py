"""The main job end to end, small, as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from hookpoints import HookedRecurrent
from sae_lens_writesae.demo import Demo
from sae_lens_writesae.evaluations import load_result
from sae_lens_writesae.experiment.head import half_lives

TOKENS = torch.randint(1, 500, (2, 64), generator=torch.Generator().manual_seed(0))


def test_the_head_is_the_one_whose_writes_last_nearest_to_what_is_asked(embedded: HookedRecurrent) -> None:
    lives = {}
    for layer in embedded.cfg.recurrent_layers:
        with torch.no_grad():
            whole = embedded.recurrence(TOKENS, layer)
        for head in range(embedded.cfg.layer(layer).H):
            rows = [half_lives(whole.select(rows=slice(n, n + 1), heads=slice(head, head + 1))) for n in range(2)]
            lives[layer, head] = float(torch.cat(rows).median())
    for memory in (2.0, 12.0):
        choice = Demo(memory=memory).choose_head(embedded, TOKENS)
        assert choice.half_life == lives[choice.layer, choice.head]
        octaves = {place: abs(torch.tensor(life / memory).log2().item()) for place, life in lives.items()}
        assert octaves[choice.layer, choice.head] == pytest.approx(min(octaves.values()), abs=1e-5)
    named = Demo(layer=2, head=1).choose_head(embedded, TOKENS)
    assert (named.layer, named.head, named.half_life) == (2, 1, lives[2, 1])


def test_a_head_that_is_not_there_is_named(embedded: HookedRecurrent) -> None:
    with pytest.raises(ValueError, match="head 9"):
        Demo(layer=2, head=9).choose_head(embedded, TOKENS)


@pytest.mark.slow
def test_the_demo_leaves_a_report_dictionaries_and_results(tmp_path: Path) -> None:
    said: list[str] = []
    small = {"training_tokens": 2048, "eval_sequences": 16, "n_atoms": 8, "firings_per_atom": 2}
    demo = Demo(**small, last_position_firings=4, layer=1, head=0, out=tmp_path / "out")
    files = demo.run(say=lambda line: said.append(str(line)))
    assert files.html == tmp_path / "out" / "report.html" and any("half-life" in line for line in said)
    page = files.html.read_text()
    assert "http://" not in page.replace("http://www.w3.org", "") and 'src="http' not in page
    labels = {row["label"] for row in json.loads(files.json.read_text())["claims"]}
    assert labels == {"write-trained", "state-trained"}
    result = load_result(tmp_path / "out" / "write" / "substitution")
    assert result.tables["firings"].query("condition == 'native'")["kl_window"].abs().max() < 1e-6
    assert (tmp_path / "out" / "state" / "sae" / "cfg.json").exists()
