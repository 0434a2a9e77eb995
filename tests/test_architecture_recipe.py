"""The recipe "an evaluation is one file": `recipe/repeat.py` is put into a copy of the package, and everything else,
the command, the conformance tests and the report, finds it by itself."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
ROOT = TESTS.parent
RECIPE = TESTS / "recipe" / "repeat.py"

USE = """
import json, sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

sys.path += ["tests", "scripts"]
from saes import make_sae
from hookpoints import HookedRecurrent, embedded
from writesae import EVALUATIONS, load_result, sample_sequences, write_report
from writesae.cli import main

evaluation = EVALUATIONS["repeat"]
help = StringIO()
with redirect_stdout(help):
    try:
        main(["eval", "repeat", "--help"])
    except SystemExit:
        pass
from conftest import make_hf
model = HookedRecurrent.from_hf(make_hf())
tokens = sample_sequences(HookedRecurrent.from_pretrained("embedded"), embedded.text("test"), 40, 8) % 64
result = evaluation(n_positions=48, horizon=4).run(model, make_sae(model), tokens, progress=False)
result.save("out/repeat")
page = write_report([load_result("out/repeat")], "out/report")
answer = {
    "file": sys.modules["writesae"].__file__,
    "help": help.getvalue(),
    "page": page.read_text(),
    "claims": [vars(claim) for claim in result.claims()],
}
print(json.dumps(answer))
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both packages, with one file more."""
    folder = tmp_path_factory.mktemp("recipe")
    shutil.copytree(ROOT / "writesae", folder / "writesae")
    shutil.copy(RECIPE, folder / "writesae" / "evaluations")
    for name in ("hookpoints", "sae_lens_writesae"):
        (folder / name).symlink_to(ROOT / name)
    support = ("tests/conftest.py", "tests/fla_families.py", "tests/saes.py")
    for name in ("pyproject.toml", *support):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(TESTS / "golden", folder / "tests" / "golden", ignore=shutil.ignore_patterns("tables"))
    (folder / "tests" / "evaluations").mkdir()
    shutil.copy(TESTS / "evaluations" / "test_conformance.py", folder / "tests" / "evaluations")
    return folder


def run(folder: Path, *arguments: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(folder)}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_everything_finds_the_new_evaluation(copy: Path) -> None:
    answer = json.loads(run(copy, "-c", USE).splitlines()[-1])
    assert Path(answer["file"]).is_relative_to(copy)
    assert "--n-positions" in answer["help"] and "--horizon" in answer["help"]
    assert "Does a repeated write disturb more than a missing one?" in answer["page"]
    (claim,) = answer["claims"]
    assert claim["n"] == 48 and claim["sentence"] in answer["page"]
    assert "<strong>Control.</strong>" in answer["page"]  # its docstring is its page


@pytest.mark.slow
def test_the_conformance_tests_run_on_it(copy: Path) -> None:
    said = run(
        copy, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/evaluations/test_conformance.py", "-k", "repeat"
    )
    assert " passed" in said and "failed" not in said


def test_the_recipe_is_short() -> None:
    assert len(RECIPE.read_text(encoding="utf-8").splitlines()) <= 115
