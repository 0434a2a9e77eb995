"""A dictionary that gives an evaluation nothing stops no run: the reason is kept, and stands in the report."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from sae_lens.saes.sae import SAEMetadata

from hookpoints import HookedRecurrent
from sae_lens_writesae.errors import NothingToMeasureError
from sae_lens_writesae.eval_cli import run_evaluations
from sae_lens_writesae.joined_report import find_results
from sae_lens_writesae.left_out import LeftOut
from sae_lens_writesae.sae import WriteTopKSAE, WriteTopKSAEConfig
from sae_lens_writesae.suite import EVALUATIONS, Scope


@pytest.fixture
def silent(embedded: HookedRecurrent, tmp_path: Path) -> Path:
    """A dictionary of which no atom ever fires."""
    shape = embedded.cfg.layer(2)
    meta = SAEMetadata(hook_name="blocks.2.mixer.heads.1.hook_write_vec", model_name="embedded")
    sae = WriteTopKSAE(WriteTopKSAEConfig(d_in=shape.K * shape.V, d_k=shape.K, d_sae=16, k=2, metadata=meta))
    with torch.no_grad():
        sae.b_enc.fill_(-1e6)
    sae.save_model(tmp_path / "silent")
    return tmp_path / "silent"


def test_a_dictionary_without_an_alive_atom_is_evaluated_as_far_as_it_goes(silent: Path, tmp_path: Path) -> None:
    names = [name for name, entry in EVALUATIONS.items() if not entry.compares]
    settings = {"n_positions": 4, "pairs": 2, "new_tokens": 2}
    said: list[str] = []
    run_evaluations(names, [silent], tmp_path, sequences=24, context_size=48, settings=settings, say=said.append)
    results = {result.info.get("evaluation", result.kind): result for result in find_results([tmp_path])}
    assert set(results) == set(names) and list(results)[:2] == ["sign", "install"]  # what was left out comes last
    left = {name for name, result in results.items() if isinstance(result, LeftOut)}
    assert left == {name for name in names if EVALUATIONS[name].scope is Scope.EACH} == set(names) - {"sign", "install"}
    assert all("atom" in results[name].info["reason"] for name in left)
    assert said[0] == f"substitution: substitution of silent (left out: {results['substitution'].info['reason']})"
    numbers, page = json.loads((tmp_path / "report.json").read_text()), (tmp_path / "report.html").read_text()
    rows = [row for row in numbers["claims"] if row["outcome"] == "not tested"]
    assert {row["number"] for row in rows} >= {1, 2, 3, 4, 6, 7, 8, 18, 19} and 11 not in {r["number"] for r in rows}
    assert all(row["sentence"] in page.replace("&#39;", "'") for row in rows)
    assert page.count(f">{LeftOut.title}</h2>") == 1
    sentences = pd.read_csv(tmp_path / "claims.csv")["sentence"]
    assert sentences.notna().to_numpy().all()


def test_a_single_evaluation_says_it_as_an_error(silent: Path, tmp_path: Path) -> None:
    with pytest.raises(NothingToMeasureError, match=r"no atom can be tested: 0 of 16 fire"):
        run_evaluations(["substitution"], [silent], tmp_path / "out", sequences=4, context_size=48)
    with pytest.raises(ValueError, match="n_atoms must be at least 1, found 0"):  # a wrong setting stops all of them
        run_evaluations(["substitution", "multistep"], [silent], tmp_path / "out", settings={"n_atoms": 0}, sequences=4)


def test_pages_of_atoms_are_left_out_with_the_reason(embedded: HookedRecurrent) -> None:
    meta = SAEMetadata(hook_name="blocks.2.mixer.heads.1.hook_write_vec", model_name="embedded")
    shape = embedded.cfg.layer(2)
    sae = WriteTopKSAE(WriteTopKSAEConfig(d_in=shape.K * shape.V, d_k=shape.K, d_sae=4, k=2, metadata=meta))
    made = LeftOut.of("atoms", embedded, sae, "L2H1 write-trained", NothingToMeasureError("no atom fires"))
    assert made.claims() == [] and made.notes() == ["no atom fires"] and made.label == "atoms of L2H1 write-trained"
