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
ROOT = TESTS.parents[1]
RECIPE = TESTS / "recipe" / "repeat.py"

USE = """
import json, sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

sys.path += ["tests", "study/tests"]
from saes import make_sae
from hookpoints import HookedRecurrent, embedded
from writesae import sample_sequences
from writesae_study import EVALUATIONS, load_result, write_report
from writesae_study.evaluate import run_eval

evaluation = EVALUATIONS["repeat"]
help = StringIO()
with redirect_stdout(help):
    try:
        run_eval(["repeat", "--help"])
    except SystemExit:
        pass
from tiny_models import make_hf
model = HookedRecurrent.from_hf(make_hf())
tokens = sample_sequences(HookedRecurrent.from_pretrained("embedded"), embedded.text("test"), 40, 8) % 64
result = evaluation(n_positions=48, horizon=4).run(model, make_sae(model), tokens, progress=False)
result.save("out/repeat")
page = write_report([load_result("out/repeat")], "out/report")
answer = {
    "file": sys.modules["writesae_study"].__file__,
    "help": help.getvalue(),
    "page": page.read_text(),
    "claims": [vars(claim) for claim in result.claims()],
}
print(json.dumps(answer), flush=True)

import pytest
options = ["-q", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning", "-k", "repeat"]
pytest.main([*options, "study/tests/evaluations/test_conformance.py"])
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packages, with one file more in that of the study."""
    folder = tmp_path_factory.mktemp("recipe")
    study = folder / "study"
    shutil.copytree(ROOT / "study" / "writesae_study", study / "writesae_study")
    shutil.copy(RECIPE, study / "writesae_study" / "evaluations")
    for name in ("hookpoints", "sae_lens_writesae", "writesae"):
        (folder / name).symlink_to(ROOT / name)
    names = ("tiny_models", "remembering", "saes", "device", "backend", "counted")
    support = [f"tests/{name}.py" for name in names]
    for name in ("pyproject.toml", "conftest.py", *support):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    tests = study / "tests"
    shutil.copytree(TESTS / "golden", tests / "golden", ignore=shutil.ignore_patterns("tables"))
    (tests / "evaluations").mkdir()
    shutil.copy(TESTS / "evaluations" / "test_conformance.py", tests / "evaluations")
    return folder


@pytest.fixture(scope="module")
def said(copy: Path) -> str:
    """What one process prints, in which the file is used and the conformance tests run on it."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (copy, copy / "study")))}
    command = [sys.executable, "-c", USE]
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.startswith("{"), done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_everything_finds_the_new_evaluation(copy: Path, said: str) -> None:
    answer = json.loads(said.splitlines()[0])
    assert Path(answer["file"]).is_relative_to(copy)
    assert "--n-positions" in answer["help"] and "--horizon" in answer["help"]
    assert "Does a repeated write disturb more than a missing one?" in answer["page"]
    (claim,) = answer["claims"]
    assert claim["n"] == 48 and claim["sentence"] in answer["page"]
    assert "<strong>Control.</strong>" in answer["page"]  # its docstring is its page


@pytest.mark.slow
def test_the_conformance_tests_run_on_it(said: str) -> None:
    assert " passed" in said and "failed" not in said.partition("\n")[2]


def test_the_recipe_is_short() -> None:
    assert len(RECIPE.read_text(encoding="utf-8").splitlines()) <= 115
