"""The commands that the study adds, as a user meets them: help, misspelt names, wrong settings, missing folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Literal

import pytest
from saes import make_sae
from test_cli import (
    COUNTS,
    TINY,
    assert_interrupted,
    assert_listed,
    assert_missing_is_named,
    assert_no_torch,
    assert_one_error,
    run,
    sae_folder,
)

from hookpoints import HookedRecurrent
from hookpoints import embedded as shipped
from writesae.cli import COMMANDS as OF_THE_PRODUCT
from writesae.cli import main
from writesae.files import sae_folders
from writesae_study.commands import COMMANDS
from writesae_study.evaluate import EvalAll, Subjects
from writesae_study.evaluations import EVALUATIONS, load_result
from writesae_study.experiment.evaluation import Evaluation
from writesae_study.folders import run_folder
from writesae_study.verdict.paper import PAPER_CLAIMS, QUESTIONS

__all__ = ["sae_folder"]  # a fixture

EACH_COMMAND = [[name] for name in COMMANDS if name != "eval"] + [["eval", kind] for kind in (*EVALUATIONS, "all")]


def test_names_are_listed_with_the_products(capsys: pytest.CaptureFixture[str]) -> None:
    assert not COMMANDS.keys() & OF_THE_PRODUCT.keys()
    assert_listed(capsys, ["--help"], [*OF_THE_PRODUCT, *COMMANDS])
    assert_listed(capsys, ["eval", "--help"], EVALUATIONS)


def test_no_help_and_no_wrong_flag_loads_torch() -> None:
    """Except of one evaluation, whose settings are those of its class."""
    assert_no_torch([["eval", "all"], *EACH_COMMAND[: len(COMMANDS) - 1]], ["--help"], ["eval", "--help"])


def test_the_list_of_questions_is_that_of_the_classes() -> None:
    assert {n for asked in QUESTIONS.values() for n in asked.answers} == PAPER_CLAIMS.keys()


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["eval", "substition"], "Did you mean 'substitution'"),
        (["eval", "all", "SAE", "--device", "gpu"], "device: expected one of this machine"),
        (["eval", "sign"], "got none"),
        (["eval", "all", "SAE", "--set", "n_atoms=abc"], "got 'abc'"),
        (["eval", "all", "SAE", "--set", "n_atms=5"], "nearest: n_atoms"),
        (["eval", "all", "SAE", "--set", "sign.foo=1"], "n_positions"),
        (["eval", "all", "SAE", "--set", "sgn.n_positions=1"], "substitution, partition"),
        (["eval", "sign", "SAE", "SAE"], "same name"),
        (["eval", "substitution", "SAE", "--n-atoms", "0"], "n_atoms"),
        (["eval", "substitution", "SAE", "--horizn", "3"], "horizn"),
        (["reproduce", "--small", "--set", "foo=1"], "foo"),
        (["reproduce", "--small", "--profile", "nowhere"], "nowhere"),
        (["reproduce", "--model", "embedded", "--layers", "2", "--heads", "9"], "heads 0 to 3"),
        (["reproduce", "--model", str(shipped.path("embedded"))], "dataset"),
        (["eval", "all"], "expected folders"),
    ],
    ids=lambda given: "" if isinstance(given, str) else " ".join(given),
)
def test_a_wrong_word_ends_before_any_work(
    capsys: pytest.CaptureFixture[str], sae_folder: Path, tmp_path: Path, arguments: list[str], word: str
) -> None:
    assert_one_error(capsys, sae_folder, tmp_path, arguments, word)


@pytest.mark.parametrize(
    "arguments",
    [["eval", "install", "SAE"], ["eval", "all", "SAE"], ["report", "SAE"], ["reproduce", "--small"]],
    ids=" ".join,
)
def test_an_interrupt_says_what_it_left(
    capsys: pytest.CaptureFixture[str], sae_folder: Path, tmp_path: Path, arguments: list[str]
) -> None:
    assert_interrupted(capsys, sae_folder, tmp_path, arguments, resumes=arguments[0] == "reproduce")


@pytest.mark.parametrize("arguments", [["eval", "sign", "nowhere"], ["report", "nowhere"]], ids=" ".join)
def test_a_missing_folder_is_named_before_torch_is_loaded(arguments: list[str]) -> None:
    assert_missing_is_named(*arguments)


def test_results_of_two_heads_stand_side_by_side(
    capsys: pytest.CaptureFixture[str], embedded: HookedRecurrent, tmp_path: Path
) -> None:
    """Dictionaries of one name, in folders apart, evaluated one after the other into one folder."""
    out = tmp_path / "out"
    asked = ["eval", "multistep", *COUNTS, *ONE_FIRING, "--n-steps", "2", "--out", str(out)]
    for place, head, seed in (("A/L2H1", 1, 0), ("B/L2H3", 3, 0), ("C/L2H1", 1, 1)):
        hook = f"blocks.2.mixer.heads.{head}.hook_write_vec"
        make_sae(embedded, d_sae=16, hook=hook, seed=seed).save_model(tmp_path / place / "write-seed0")
    for folder in ("A/L2H1", "B/L2H3"):
        assert run(capsys, *asked, str(tmp_path / folder / "write-seed0")).status == 0
    claims = json.loads((out / "report.json").read_text())["claims"]
    assert {claim["label"] for claim in claims} == {"L2H1/write-seed0", "L2H3/write-seed0"}
    another = [*asked, str(tmp_path / "C/L2H1/write-seed0")]
    refused = run(capsys, *another)
    assert refused.status == 2 and "other dictionaries; name another --out, or replace it (--replace)" in refused.err
    assert run(capsys, *another, "--replace").status == 0


SIGN = ["--n-positions", "2", "--no-control-dictionaries"]
ONE_FIRING = ["--n-atoms", "1", "--firings-per-atom", "1", "--no-control-dictionaries", "--controls", "random"]


@pytest.fixture(scope="module")
def reproduced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `reproduce` writes at tiny sizes, by the commands of its workflow."""
    root = tmp_path_factory.mktemp("reproduced")
    collection = ["--model", "embedded", "--layer", "2", "--heads", "0", "1", "--n-tokens", "1024"]
    main(["collect", *collection, "--out", str(root / "collection")])
    main(["train", "--collection", str(root / "collection"), *TINY, "--no-summary", "--out", str(root)])
    main(["eval", "sign", str(root / "L2H0"), *COUNTS, *SIGN, "--out", str(root / "L2H0")])
    return root


def test_what_training_left_is_asked(capsys: pytest.CaptureFixture[str], reproduced: Path, tmp_path: Path) -> None:
    asked = ["eval", "substitution", str(reproduced), "--collection", str(reproduced), *COUNTS, *ONE_FIRING]
    for words in (asked, ["report", str(tmp_path)]):
        assert run(capsys, *words, "--out", str(tmp_path)).status == 0
        assert (tmp_path / "report.html").is_file()


def test_the_collection_of_a_dictionary_is_that_of_its_run(reproduced: Path, tmp_path: Path) -> None:
    """A folder further up that happens to have the name belongs to somebody else."""
    saes = sae_folders(reproduced / "L2H0")
    assert saes and {run_folder(sae) for sae in saes} == {reproduced.resolve()}
    (tmp_path / "a/collection").mkdir(parents=True)
    (tmp_path / "a/collection/index.json").write_text("{}")
    alone = shutil.copytree(saes[0], tmp_path / "a/b/sae")
    assert run_folder(alone) is None


def test_settings_of_one_evaluation_are_flags(reproduced: Path) -> None:
    (file,) = (reproduced / "L2H0" / "sign").glob("*/info.json")
    assert load_result(file.parent).evaluation.to_dict()["n_positions"] == 2


def test_evaluations_are_chosen_by_what_they_are_done_for() -> None:
    def kinds(per: Literal["dictionary", "head", "layer"] | None) -> set[str]:
        return {each.kind for each in EvalAll(subjects=Subjects(saes=()), per=per).evaluations()}

    assert kinds("layer") == {"amplify"} and "amplify" in kinds("dictionary") - kinds("head")
    assert kinds("dictionary") | kinds("head") == kinds(None) == set(EVALUATIONS)


def test_settings_of_eval_all_reach_those_that_have_them() -> None:
    def made(*pairs: str) -> dict[str, Evaluation]:
        return {each.kind: each for each in EvalAll(subjects=Subjects(saes=()), seed=7, set=pairs).evaluations()}

    evaluations = made("n_atoms=5", "horizon=7")
    assert list(evaluations) == list(EVALUATIONS)
    for kind, evaluation in evaluations.items():
        settings = evaluation.to_dict()
        assert settings["seed"] == 7
        assert settings.get("n_atoms", 5) == 5 and (kind != "substitution" or settings["horizon"] == 7)
