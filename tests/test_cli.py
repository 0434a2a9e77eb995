"""The command line as a user meets it: help, misspelt names, wrong settings, folders that are not there."""

from __future__ import annotations

import importlib
import inspect
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import fields, replace
from itertools import cycle
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Literal, get_type_hints

import pytest
import torch
import transformers
from saes import make_sae
from sealing import reseal
from torch.utils.flop_counter import FlopCounterMode

from hookpoints import HookedRecurrent
from hookpoints import embedded as shipped
from sae_lens_writesae.sae.factors import Collection
from sae_lens_writesae.sae.load import load_sae
from writesae.cli import COMMANDS, main
from writesae.dictionary.quality import dictionary_quality
from writesae.experiment.tokens import sample_sequences
from writesae.files import run_folder, sae_folders
from writesae.models import summary
from writesae.page.template import share_text
from writesae.settings import settings_of
from writesae_study.evaluate import EvalAll, Subjects
from writesae_study.evaluations import ASKED, EVALUATIONS, load_result
from writesae_study.experiment.evaluation import Evaluation, Scope

COUNTS = ["--sequences", "6", "--context-size", "48"]


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> SimpleNamespace:
    """What a command printed, and the status it ended with."""
    status = 0
    try:
        main([str(each) for each in arguments])
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else 1
    said = capsys.readouterr()
    return SimpleNamespace(status=status, out=said.out, err=said.err)


@pytest.fixture(scope="module")
def sae_folder(embedded: HookedRecurrent, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained dictionary, as SAELens saves one."""
    folder = tmp_path_factory.mktemp("saes") / "mine"
    make_sae(embedded, d_sae=16, hook="blocks.2.mixer.heads.1.hook_write_vec").save_model(folder)
    return folder


@pytest.fixture(autouse=True)
def one_model(embedded: HookedRecurrent, monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedded model is loaded once for all tests."""
    load = HookedRecurrent.from_pretrained
    monkeypatch.setattr(
        HookedRecurrent, "from_pretrained", lambda name, **how: embedded if name == "embedded" else load(name, **how)
    )


@pytest.mark.parametrize("arguments", [["--help"], ["eval", "--help"]])
def test_names_are_listed_with_what_they_do(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    done = run(capsys, *arguments)
    names = COMMANDS if arguments == ["--help"] else EVALUATIONS
    assert done.status == 0 and all(f"  {name} " in done.out for name in names)
    assert run(capsys, *arguments[:-1]).status == 2  # nothing was asked for


EACH_COMMAND = [[name] for name in COMMANDS if name != "eval"] + [["eval", kind] for kind in (*ASKED, "all")]


def test_help_and_wrong_flags_load_no_torch() -> None:
    """In a process of its own, because these tests have loaded it."""
    asked = [["--help"], ["--version"], ["eval", "--help"], *([*command, "--help"] for command in EACH_COMMAND)]
    wrong = [[*command, "--no-such-flag"] for command in EACH_COMMAND]
    code = f"""
import sys
from writesae.__main__ import main
for status, lines in ((0, {asked!r}), (2, {wrong!r})):
    for arguments in lines:
        sys.argv = ["writesae", *arguments]
        try:
            main()
        except SystemExit as ended:
            assert (ended.code or 0) == status, arguments
        loaded = {{"torch", "numpy", "pandas", "sae_lens"}} & sys.modules.keys()
        assert not loaded, (arguments, loaded)
"""
    ascii_terminal = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ascii_terminal, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr.count("error: ") == len(wrong)


@pytest.mark.parametrize("command", EACH_COMMAND, ids=" ".join)
def test_help_has_lines_as_long_as_it_allows(capsys: pytest.CaptureFixture[str], command: list[str]) -> None:
    """No line ends where a line of the source does: the first word of the next one would not have fitted."""

    def short(lines: list[str], width: int) -> list[str]:
        pairs = [(line, following.split()) for line, following in itertools.pairwise(lines)]
        return [line for line, rest in pairs if line and rest and len(f"{line} {rest[0]}") <= width]

    done = run(capsys, *command, "--help")
    about, _, flags = done.out.partition("\n\nusage: ")
    plain = [line.replace("│", " ").rstrip() for line in flags.splitlines()]  # a terminal gets a frame
    texts = [line if line.startswith(" " * 6) else "" for line in plain]
    assert done.status == 0 and len(about) > 30 and sum(map(bool, texts)) > 1
    assert not short(about.splitlines(), 80) and not short(texts, 75)


CLASSES = [(f"writesae_study.evaluations.{kind}", asked.class_name) for kind, asked in ASKED.items()]


@pytest.mark.parametrize(("module", "name"), [*CLASSES, ("writesae.page.atoms.collect", "AtomPages")])
def test_settings_are_read_off_the_source_as_the_class_has_them(module: str, name: str) -> None:
    made, read = getattr(importlib.import_module(module), name), settings_of(module, name)
    assert list(vars(read()).items()) == list(vars(made()).items()) and read.__doc__ == inspect.getdoc(made)
    assert get_type_hints(read) == {field.name: get_type_hints(made)[field.name] for field in fields(made)}


def test_what_is_asked_is_read_off_the_source_as_the_classes_have_it() -> None:
    assert {kind: asked[1:] for kind, asked in ASKED.items()} == {
        kind: (each.question, each.answers, each.scope is not Scope.HEAD) for kind, each in EVALUATIONS.items()
    }
    assert "nothing" not in EVALUATIONS and len(EVALUATIONS) == len(ASKED)


HEAD = ["--model", "embedded", "--layer", "2", "--head", "1"]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["dmo"], "Did you mean 'demo'"),
        (["eval", "substition"], "Did you mean 'substitution'"),
        (["evl", "sign"], "Did you mean 'eval'"),
        (["collect", *HEAD, "--n-tokens", "0"], "n_tokens"),
        (["collect", "--model", "embeded", "--layer", "2"], "nearest: embedded"),
        (["demo", "--training-tokens", "-5"], "training_tokens"),
        (["demo", "--model", "embeded"], "nearest: embedded"),
        (["demo", "--model", "GPT2"], "recurrent op"),
        (["demo", "--out", "FILE/below"], "is a file"),
        (["demo", "--out", "/proc/below"], "/proc"),
        (["eval", "all", "[/nothing]"], "[/nothing]"),
        (["eval", "sign", "[/nothing]"], "[/nothing]"),
        (["eval", "sign"], "got none"),
        (["eval", "sign", "--layer", "2"], "no model and no head"),
        (["eval", "sign", "SAE", *HEAD], "folders of SAEs too"),
        (["eval", "sign", *HEAD[:-1], "9"], "head 9 is out of range"),
        (["eval", "substitution", *HEAD], "sign, install, bits need no dictionary"),
        (["eval", "all", "SAE", "--set", "n_atoms=abc"], "'abc'"),
        (["eval", "all", "SAE", "--set", "n_atms=5"], "nearest: n_atoms"),
        (["eval", "all", "SAE", "--set", "n_atoms"], "FIELD=VALUE"),
        (["eval", "all", "SAE", "--set", "foo=1"], "FIELD of seed, label, rows_per_run, n_atoms,"),
        (["eval", "all", "SAE", "--set"], "FIELD of seed, label, rows_per_run, n_atoms,"),
        (["eval", "all", "SAE", "--set", "sign.foo=1"], "n_positions"),
        (["eval", "all", "SAE", "--set", "sgn.n_positions=1"], "substitution, partition"),
        (["eval", "all", "SAE", "--set", "horizon=2.5"], "'2.5'"),
        (["eval", "sign", "SAE", "SAE"], "same name"),
        (["eval", "sign", "--saes", "SAE"], "saes has no flag, give the value alone"),
        (["demo", "--layer", "0", "--facts", "96"], "layer 0"),
        (["demo", "--layer", "2", "--head", "9"], "heads 0 to 3"),
        (["eval", "sign", "SAE", "--sequences", "-5"], "sequences"),
        (["eval", "sign", "SAE", "--text", "[/nothing]"], "[/nothing]"),
        (["eval", "substitution", "SAE", "--n-atoms", "0"], "n_atoms"),
        (["eval", "substitution", "SAE", "--n-atoms", "abc"], "abc"),
        (["eval", "substitution", "SAE", "--scales", "matched", "unit"], "unit"),
        (["eval", "substitution", "SAE", "--horizon", "0"], "horizon"),
        (["eval", "substitution", "SAE", "--horizn", "3"], "horizn"),
        (["hooks", "embedded", "--layer", "9"], "layer 9"),
        (["hooks", "a[/x]b[red]c"], "a[/x]b[red]c"),
        (["prompt", "--port", "99999"], "65535, got 99999"),
        (["prompt", "--port", "-1"], "65535, got -1"),
        (["report", "[/nothing]"], "[/nothing]"),
        (["reproduce", "--small", "--set", "foo=1"], "foo"),
        (["reproduce", "--small", "--profile", "nowhere"], "nowhere"),
        (["reproduce", "--model", "embedded", "--layers", "0", "--heads", "0"], "layer 0"),
        (["reproduce", "--model", "embedded", "--layers", "2", "--heads", "9"], "heads 0 to 3"),
        (["reproduce", "--model", "embedded", "--evaluations", "wrong"], "wrong"),
        (["reproduce", "--model", str(shipped.path("embedded"))], "dataset"),
        (["reproduce", "--small", "--architecture", "writesae_jumpreluu"], "nearest: writesae_jumprelu"),
        (["show", "SAE", "--n-atoms", "-1"], "n_atoms"),
        (["train", *HEAD, "--targets", "wrte"], "Expected one of ('write', 'state', 'last_state')"),
        (["train", *HEAD, "--d-sae"], "Missing value for argument '--d-sae'"),
        (["train", *HEAD, "--training-tokens", "-5"], "training_tokens"),
        (["train", *HEAD, "--variants", "Wrong"], "Wrong"),
        (["train", *HEAD, "--architecture", "writesae_topkk"], "nearest: writesae_topk"),
        (["train", *HEAD, "--architecture", "topk"], "got 'topk'; nearest: writesae_topk"),
        (
            ["train", *HEAD, "--architecture", "writesae_product"],
            "expected one with an encoder and a decoder",
        ),
        (["train", "--model", str(shipped.path("embedded")), *HEAD[2:]], "dataset: expected a text file"),
        (["zoo", "--models", "recall", "nosuch"], "got 'nosuch'"),
        (["collect", "--model", "embedded"], "Missing from writesae collect: --layer"),
        (["show"], "Missing from writesae show: PATH"),
        (["train", "--model", "embeded", *HEAD[2:]], "nearest: embedded"),
        (["train", "--modle", "embedded"], "nearest: --model"),
        (["train", *HEAD, "--layers", "two"], "two"),
        (["train", *HEAD, "--out", "FILE/below"], "is a file"),
        (["eval", "all"], "expected folders"),
    ],
    ids=lambda given: "" if isinstance(given, str) else " ".join(given),
)
def test_what_is_typed_wrong_ends_before_any_work(
    capsys: pytest.CaptureFixture[str], sae_folder: Path, tmp_path: Path, arguments: list[str], word: str
) -> None:
    (tmp_path / "file").touch()
    places = {"SAE": sae_folder, "GPT2": gpt2(tmp_path), "FILE/below": tmp_path / "file" / "below"}
    capsys.readouterr()  # the progress bar of saving a model
    out = [] if "--out" in arguments or arguments[0] in ("hooks", "prompt") else ["--out", tmp_path / "out"]
    done = run(capsys, *(places.get(each, each) for each in arguments), *out)
    said = [line for line in done.err.splitlines() if line and "%|" not in line]  # progress bars aside
    assert done.status == 2 and len(said) == 1 and word in said[0], done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["demo", "--layer", "0"],
        ["collect", *HEAD],
        ["train", *HEAD],
        ["eval", "install", "SAE"],
        ["eval", "all", "SAE"],
        ["show", "SAE"],
        ["push", "SAE", "a/b"],
        ["export", "SAE"],
        ["prompt"],
        ["report", "SAE"],
        ["reproduce", "--small"],
        ["zoo"],
        ["models"],
        ["hooks", "embedded"],
    ],
    ids=" ".join,
)
def test_an_interrupt_is_one_line_that_says_what_it_left(
    capsys: pytest.CaptureFixture[str], sae_folder: Path, tmp_path: Path, arguments: list[str]
) -> None:
    """The signal comes as the command calls the first function of its work."""

    def interrupt(frame: FrameType, event: str, arg: object) -> None:
        if (
            event == "call"
            and frame.f_code.co_name in ("run", "run_eval", "_run_on_each")
            and "writesae" in frame.f_code.co_filename
        ):
            sys.setprofile(None)
            signal.raise_signal(signal.SIGINT)

    assert arguments[0] in COMMANDS
    out = [] if arguments[0] in ("hooks", "models", "push", "prompt") else ["--out", tmp_path / "out"]
    capsys.readouterr()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    sys.setprofile(interrupt)
    try:
        done = run(capsys, *(sae_folder if word == "SAE" else word for word in arguments), *out)
    finally:
        sys.setprofile(None)
        signal.signal(signal.SIGINT, before)
    assert done.status == 130
    assert re.fullmatch(r"stopped; [^\n]+\n", done.err)
    assert ("the same command resumes" in done.err) == (arguments[0] in ("demo", "collect", "train", "reproduce"))


def test_a_reader_that_has_enough_is_no_error() -> None:
    """As of `writesae --help | head -1`: the other end of the pipe is closed."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", "writesae", "--help"], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize(
    "arguments",
    [
        ["eval", "sign", "nowhere"],
        ["show", "nowhere"],
        ["export", "nowhere"],
        ["push", "nowhere", "a/b"],
        ["prompt", "--sae", "nowhere"],
        ["report", "nowhere"],
        ["train", "--collection", "nowhere"],
    ],
    ids=" ".join,
)
def test_a_folder_that_is_missing_is_named_before_torch_is_loaded(arguments: list[str]) -> None:
    code = f"""
import sys
from writesae.cli import main
try:
    main({arguments!r})
except SystemExit as ended:
    assert ended.code == 2
    assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, check=True)
    assert "nowhere" in done.stderr and done.stderr.count("\n") == 1


def test_an_error_is_one_line_on_any_terminal() -> None:
    command = [sys.executable, "-m", "writesae", "show", "…"]
    done = subprocess.run(command, env=os.environ | {"PYTHONIOENCODING": "ascii"}, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "") and "error: ?" in done.stderr
    assert done.stderr.count("\n") == 1


def gpt2(folder: Path) -> Path:
    """A model without a recurrence."""
    config = transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=64, bos_token_id=1, eos_token_id=1)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder / "gpt2")
    return folder / "gpt2"


def test_models_and_hooks_are_listed_with_their_shapes(
    capsys: pytest.CaptureFixture[str], embedded: HookedRecurrent
) -> None:
    models = run(capsys, "models")
    assert (
        models.status == 0
        and "RWKV-7, 6 heads of 32 x 32" in models.out
        and "Gated DeltaNet, 1 head of 64 x 32" in models.out
        and "gated_deltaproduct" in models.out
        and "qwen3_5_moe" in models.out
    )
    listed = run(capsys, "hooks", "embedded", "--layer", "2")
    assert listed.status == 0, listed.err
    _, cache = embedded.run_with_cache(torch.arange(1, 4)[None], names_filter=lambda name: True)
    shapes = dict(re.findall(r"^  (\S+) +(\[.*?\](?: or \[.*?\])?)", listed.out, flags=re.MULTILINE))
    for name, activation in cache.items():
        if name.startswith("blocks.2.") and ".heads." not in name:
            assert str(list(activation.shape)) in shapes[name].translate(str.maketrans("BTS", "133"))
    assert shapes["blocks.2.mixer.heads.{h}.hook_write_vec"] == "[B, T, 2048]"
    everything = run(capsys, "hooks", "embedded").out
    assert "layer 0" in everything and "layers 1, 2, 3, 4" in everything


def test_dictionaries_of_two_models_are_refused(
    capsys: pytest.CaptureFixture[str], sae_folder: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(sae_folder, tmp_path / "other"))
    (other / "cfg.json").write_text((other / "cfg.json").read_text().replace('"embedded"', '"another"'))
    reseal(other)
    apart = run(capsys, "eval", "sign", sae_folder, other)
    assert apart.status == 2 and "another, embedded" in apart.err


def test_results_of_two_heads_stand_side_by_side(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    embedded: HookedRecurrent,
    tmp_path: Path,
) -> None:
    """Dictionaries of one name, in folders apart, evaluated one after the other into the default folder."""
    monkeypatch.chdir(tmp_path)
    for place, head, seed in (("A/L2H1", 1, 0), ("B/L2H3", 3, 0), ("C/L2H1", 1, 1)):
        hook = f"blocks.2.mixer.heads.{head}.hook_write_vec"
        make_sae(embedded, d_sae=16, hook=hook, seed=seed).save_model(tmp_path / place / "write-seed0")
    few = [*COUNTS, "--n-atoms", "1", "--firings-per-atom", "1", "--n-steps", "2", "--no-control-dictionaries"]
    asked = ["eval", "multistep", *few]
    for folder in ("A/L2H1", "B/L2H3"):
        assert run(capsys, *asked, f"{folder}/write-seed0").status == 0
    out = tmp_path / "writesae-out" / "eval"
    labels = ["L2H1/write-seed0", "L2H3/write-seed0"]
    saved = [load_result(out / "multistep" / label.replace("/", "-")) for label in labels]
    assert [(result.label, result.info["head"]) for result in saved] == list(zip(labels, (1, 3)))
    claims = json.loads((out / "report.json").read_text())["claims"]
    assert {claim["label"] for claim in claims} == {*labels}
    another = [*asked, "C/L2H1/write-seed0"]
    refused = run(capsys, *another)
    assert refused.status == 2 and "eval/multistep/L2H1-write-seed0: expected no result" in refused.err
    assert "got one of other dictionaries; name another --out, or replace it (--replace)" in refused.err
    assert run(capsys, *another, "--replace").status == 0


def test_pages_of_another_dictionary_are_not_left_among_those_of_the_last(
    capsys: pytest.CaptureFixture[str], embedded: HookedRecurrent, tmp_path: Path
) -> None:
    make_sae(embedded, d_sae=16, hook="blocks.2.mixer.heads.1.hook_write_vec").save_model(tmp_path / "sae")
    few = ["--min-firings", "1", "--no-quality", "--out", tmp_path / "pages"]
    for atoms in (["--n-atoms", "3"], ["--n-atoms", "1"]):
        assert run(capsys, "show", tmp_path / "sae", *COUNTS, *few, *atoms).status == 0
    shown = json.loads((tmp_path / "pages" / "data.json").read_text())["atoms"]
    assert [page.name for page in (tmp_path / "pages").glob("atom-*")] == [f"atom-{shown[0]['atom']}.html"]


TINY = ["--d-sae", "16", "--k", "4", "--training-tokens", "512", "--context-size", "128"]
SIGN = ["--n-positions", "2", "--no-control-dictionaries"]
ONE_ATOM = ["--n-atoms", "1", "--min-firings", "1"]
ONE_FIRING = ["--n-atoms", "1", "--firings-per-atom", "1", "--no-control-dictionaries", "--controls", "random"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `train`, `demo` and `reproduce` write, at tiny sizes: the last as its workflow does, by commands."""
    root = tmp_path_factory.mktemp("folders")
    main(["train", *HEAD, *TINY, "--no-summary", "--out", str(root / "trained")])
    few = [*ONE_FIRING[:4], "--facts", "0", "--eval-sequences", "2"]
    main(["demo", *HEAD, *TINY[:2], *TINY[4:], "--train-sequences", "8", *few, "--out", str(root / "demo")])
    collection = ["--model", "embedded", "--layer", "2", "--heads", "0", "1", "--n-tokens", "1024"]
    main(["collect", *collection, "--out", str(root / "reproduced/collection")])
    own = ["--collection", str(root / "reproduced/collection"), "--out", str(root / "reproduced")]
    main(["train", *own, *TINY, "--no-summary"])
    main(["eval", "sign", str(root / "reproduced/L2H0"), *COUNTS, *SIGN, "--out", str(root / "reproduced/L2H0")])
    return root


@pytest.mark.parametrize("folder", ["trained", "demo", "reproduced"])
@pytest.mark.parametrize(
    ("arguments", "written"),
    [
        (["eval", "substitution", "FOLDER", "--collection", "FOLDER", *COUNTS, *ONE_FIRING], "report.html"),
        (["show", "FOLDER", *COUNTS, *ONE_ATOM, "--no-quality"], "index.html"),
        (["export", "FOLDER", *COUNTS, *ONE_ATOM], "batch-0.json"),
        (["report", "FOLDER"], "report.html"),
        (["train", "--collection", "FOLDER", *TINY, "--no-summary"], "cfg.json"),
        (["push", "FOLDER", "me/saes", "--dry-run"], None),
    ],
    ids=lambda given: given[0] if isinstance(given, list) else "",
)
def test_what_one_command_writes_another_takes(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    embedded: HookedRecurrent,
    folders: Path,
    tmp_path: Path,
    folder: str,
    arguments: list[str],
    written: str | None,
) -> None:
    """The time that is said is that of the work: by a clock of 1000 s a sequence, and in operations within a half and
    twice."""
    if (arguments[0], folder) == ("report", "trained"):
        pytest.skip("holds no results")
    monkeypatch.setattr("writesae.experiment.tokens.time", SimpleNamespace(perf_counter=cycle((0, 6000)).__next__))
    out = [] if written is None else ["--out", tmp_path / ("graph.json" if arguments[0] == "prompt" else "")]
    with FlopCounterMode(display=False) as sequence:
        embedded(torch.arange(1, 49)[None])
    with FlopCounterMode(display=False) as work:
        done = run(capsys, *(folders / folder if each == "FOLDER" else each for each in arguments), *out)
    assert done.status == 0 and (written is None or any(tmp_path.rglob(written))), done.err
    said = [int(seconds) for seconds in re.findall(r"about (\d+) s on this machine", done.out)]
    assert bool(said) == (arguments[0] in ("eval", "show", "export"))
    assert not said or 0.45 < 1000 * work.get_total_flops() / sequence.get_total_flops() / sum(said) < 2


def test_the_collection_of_a_dictionary_is_that_of_its_run(folders: Path, tmp_path: Path) -> None:
    """A folder further up that happens to have the name belongs to somebody else."""
    for run_of in ("trained", "demo", "reproduced"):
        saes = sae_folders(folders / run_of)
        assert saes and {run_folder(sae) for sae in saes} == {(folders / run_of).resolve()}
    (tmp_path / "collection").mkdir()
    (tmp_path / "collection/index.json").write_text("{}")
    alone = shutil.copytree(saes[0], tmp_path / "a/b/sae")
    assert run_folder(alone) is None
    evaluated = ["eval", "sign", str(alone), *COUNTS, *SIGN, "--out", str(tmp_path / "out")]
    main(evaluated)
    assert (tmp_path / "out/report.html").is_file()


def test_a_question_about_a_head_is_asked_without_a_dictionary(tmp_path: Path) -> None:
    main(["eval", "sign", *HEAD, *COUNTS, *SIGN, "--out", str(tmp_path / "one")])
    main(["eval", "all", *HEAD, *COUNTS, *SIGN[2:], "--kinds", "substitution", "sign", "--out", str(tmp_path / "all")])
    for folder in ("one", "all"):
        (file,) = (tmp_path / folder).rglob("info.json")
        assert file.parent == tmp_path / folder / "sign" / "L2H1" and load_result(file.parent).skipped is None
        assert "L2H1" in (tmp_path / folder / "report.html").read_text()


def test_a_demo_of_one_firing_is_inconclusive(folders: Path) -> None:
    claims = json.loads((folders / "demo" / "report.json").read_text())["claims"]
    assert {claim["outcome"] for claim in claims} == {"inconclusive"}


def test_settings_of_one_evaluation_are_flags(folders: Path) -> None:
    (file,) = (folders / "reproduced" / "L2H0" / "sign").glob("*/info.json")
    assert load_result(file.parent).evaluation.to_dict()["n_positions"] == 2


def test_training_ends_with_what_each_dictionary_recovers(
    capsys: pytest.CaptureFixture[str], folders: Path, embedded: HookedRecurrent
) -> None:
    again = run(capsys, "train", "--collection", folders / "reproduced", *TINY, "--out", folders / "reproduced")
    tokens = sample_sequences(embedded, shipped.text("test"), 128, 8)
    header, *lines, _ = again.out.splitlines()[-4:]
    assert re.findall("explained|alive|recovered", header) == ["explained", "alive", "recovered"]
    for head, line in enumerate(lines):
        label = f"L2H{head}/write-seed0"
        found = dictionary_quality(embedded, load_sae(folders / "reproduced" / label / "sae"), tokens)
        assert found.explained is not None and found.recovered is not None
        assert line.split()[:4] == [label, *map(share_text, (found.explained, found.alive, found.recovered.mean))]


def test_a_text_file_or_a_folder_of_them_is_trained_on(
    capsys: pytest.CaptureFixture[str], embedded: HookedRecurrent, tmp_path: Path
) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    texts = [shipped.text("test")[:3000], shipped.text("test")[3000:5000]]
    for name, text in zip("ab", texts):
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    of = {"file": (folder / "a.txt", texts[:1]), "folder": (folder, texts)}
    for name, (dataset, read) in of.items():
        done = run(capsys, "collect", *HEAD, "--dataset", dataset, "--context-size", "16", "--out", tmp_path / name)
        assert done.status == 0, done.err
        tokens = [embedded.to_tokens(text, prepend_bos=False, truncate=False) for text in read]
        collected = Collection.open(tmp_path / name).tokens.numel()
        assert 0.9 < collected / sum(each.numel() for each in tokens) <= 1
    (folder / "a.txt").write_bytes(b"\xff\xfe")
    done = run(capsys, "collect", *HEAD, "--dataset", folder, "--out", tmp_path / "other")
    assert done.status == 2 and "a.txt: expected a text in UTF-8" in done.err


def test_a_report_is_written_where_its_results_are(
    capsys: pytest.CaptureFixture[str], folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folders / "reproduced/L2H0", tmp_path / "results")
    (info,) = (tmp_path / "results/sign").glob("*/info.json")
    for named, page in (("results", "results/report.html"), (info.parent, "results/sign/report.html")):
        assert run(capsys, "report", named).status == 0
        assert (tmp_path / page).is_file()
    assert "out: expected a page" in run(capsys, "report", "results", "results").err
    assert [each.name for each in tmp_path.iterdir()] == ["results"] and load_result(info.parent)


def test_a_report_has_what_other_evaluations_found(
    capsys: pytest.CaptureFixture[str], sae_folder: Path, tmp_path: Path
) -> None:
    settings = ["--kinds", "sign", "multistep", "--set", "n_positions=2", "n_steps=99", "--no-control-dictionaries"]
    done = run(capsys, "eval", "all", sae_folder, *settings, *COUNTS, "--out", tmp_path)
    assert done.status == 2 and "multistep needs" in done.err
    assert "sign" in (tmp_path / "report.html").read_text() and not (tmp_path / "multistep").exists()


def test_a_single_evaluation_with_nothing_to_measure_is_an_error(
    capsys: pytest.CaptureFixture[str], sae_folder: Path, tmp_path: Path
) -> None:
    done = run(capsys, "eval", "substitution", sae_folder, "--out", tmp_path, *COUNTS, "--atoms", "999")
    assert done.status == 2 and "999" in done.err


def test_evaluations_are_chosen_by_what_they_are_done_for() -> None:
    def kinds(per: Literal["dictionary", "head", "layer"] | None) -> set[str]:
        return {each.kind for each in EvalAll(subjects=Subjects(saes=()), per=per).evaluations()}

    assert kinds("layer") == {"amplify"} and "amplify" in kinds("dictionary") - kinds("head")
    assert kinds("dictionary") | kinds("head") == kinds(None) == set(EVALUATIONS)


def test_settings_of_eval_all_reach_those_that_have_them() -> None:
    def made(*pairs: str) -> dict[str, Evaluation]:
        return {each.kind: each for each in EvalAll(subjects=Subjects(saes=()), seed=7, set=pairs).evaluations()}

    evaluations = made("n_atoms=5", "n_codes=7")
    assert list(evaluations) == list(EVALUATIONS)
    for kind, evaluation in evaluations.items():
        settings = evaluation.to_dict()
        assert settings["seed"] == 7
        assert settings.get("n_atoms", 5) == 5 and (kind != "substitution" or settings["n_codes"] == 7)


def test_no_hint_names_an_index_that_lacks_the_package() -> None:
    """The package is installed from a clone: `pip install "sae-lens-writesae[study]"` finds nothing."""
    root = Path(__file__).parents[1]
    files = [
        file for name in ("hookpoints", "sae_lens_writesae", "writesae", "docs") for file in (root / name).rglob("*")
    ]
    texts = {file: file.read_text("utf-8") for file in [*files, root / "README.md"] if file.suffix in (".py", ".md")}
    assert not [file for file, text in texts.items() if re.search("install [^\n]*sae-lens-writesae", text)]


def test_costs_of_a_model_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    listed = run(capsys, "models", "--cost", "embedded", "--tokens", "64").out
    assert "blocks.{l}.mixer.hook_write                     4         32,768       2 MB       8 MB" in listed


def test_a_summary_tells_layers_of_several_steps_apart(embedded: HookedRecurrent) -> None:
    first = min(embedded.cfg.layers)
    layers = {n: replace(layer, R=1 if n == first else 3) for n, layer in embedded.cfg.layers.items()}
    stepped = SimpleNamespace(cfg=replace(embedded.cfg, layers=layers))
    assert "rank" not in summary(embedded)
    alike, several, *_ = summary(stepped).split("; ")
    assert several == f"{alike}, rank 3"
