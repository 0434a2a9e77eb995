"""The main job end to end, small; and the command line as a user meets it."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from sae_lens_writesae.cli import app
from sae_lens_writesae.substitution_result import SubstitutionResult

SMALL = ["--training-tokens", "2048", "--layer", "1", "--head", "0"]


def run(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


@pytest.mark.slow
def test_demo_then_eval_then_report(tmp_path, monkeypatch):
    out = tmp_path / "out"
    done = run("demo", *SMALL, "--out", str(out))
    assert done.exit_code == 0, done.output
    assert "write-trained" in done.output and f"report   {out / 'report.html'}" in done.output.splitlines()
    page = (out / "report.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "") and 'src="http' not in page
    numbers = json.loads((out / "report.json").read_text())
    assert {test["name"] for test in numbers["tests"]} == {"write-trained", "state-trained"}
    result = SubstitutionResult.load(out / "write" / "substitution")
    floor = result.frame.query("condition == 'native'")["kl_window"].abs().max()
    assert floor < 1e-6
    again = run(
        "eval",
        "substitution",
        str(out / "write" / "sae"),
        "--sequences",
        "20",
        "--set",
        "n_atoms=5",
        "--set",
        "firings_per_atom=2",
        "--out",
        str(tmp_path / "eval"),
    )
    assert again.exit_code == 0, again.output
    page = run("report", str(out / "write" / "substitution.parquet"), "--out", str(tmp_path / "one.html"))
    assert page.exit_code == 0 and (tmp_path / "one.html").exists()
    joined = run("report", str(tmp_path / "eval"), "--out", str(tmp_path / "joined.html"))
    assert joined.exit_code == 0 and "92.4" in (tmp_path / "joined.html").read_text()


@pytest.mark.parametrize("command", ["demo", "eval", "report", "reproduce"])
def test_help_teaches(command):
    done = run(command, "--help")
    assert done.exit_code == 0 and len(done.output) > 600


def test_train_without_arguments_is_a_guide():
    done = run("train")
    assert "hook_write_vec" in done.output and "--architecture" in done.output


def test_errors_are_said_plainly(tmp_path):
    done = run("demo", "--layer", "0", "--out", str(tmp_path))
    assert done.exit_code == 2 and "recurrent" in done.output and "Traceback" not in done.output
    missing = run("eval", "substitution", str(tmp_path / "nothing"))
    assert missing.exit_code == 2 and "nothing" in missing.output.replace("\n", "")
