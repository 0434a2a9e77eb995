"""The command line as a user meets it: help, misspelt names, wrong settings, folders that are not there."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import get_args

import pytest
import torch
import transformers
from saes import make_sae

from hookpoints import HookedRecurrent
from hookpoints import embedded as shipped
from sae_lens_writesae import choices as plugin
from sae_lens_writesae.sae.factors import Collection
from sae_lens_writesae.sae.load import load_sae
from writesae import choices
from writesae.cli import COMMANDS, commands, main
from writesae.dictionary.quality import dictionary_quality
from writesae.experiment.tokens import sample_sequences
from writesae.page.template import share_text
from writesae.processes import choose_device
from writesae.training import quality_table

COUNTS = ["--sequences", "6", "--context-size", "48"]


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> SimpleNamespace:
    """What a command printed, and the status it ended with."""
    status = 0
    try:
        main([str(each) for each in arguments])
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else 1
    shown = capsys.readouterr()
    return SimpleNamespace(status=status, out=shown.out, err=shown.err)


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


def assert_listed(capsys: pytest.CaptureFixture[str], arguments: list[str], names: Iterable[str]) -> None:
    """Help that lists names with what they do."""
    done = run(capsys, *arguments)
    assert done.status == 0 and all(f"  {name} " in done.out for name in names)
    assert run(capsys, *arguments[:-1]).status == 2  # nothing was asked for


def test_names_are_listed_with_what_they_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert_listed(capsys, ["--help"], COMMANDS)


def assert_no_torch(commands: Sequence[list[str]], *asked: list[str]) -> None:
    """In a process of its own, because these tests have loaded it."""
    asked += tuple([*command, "--help"] for command in commands)
    misspelt = [[*command, "--no-such-flag"] for command in commands]
    code = f"""
import sys
from writesae.__main__ import main
for status, lines in ((0, {asked!r}), (2, {misspelt!r})):
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


def test_help_and_wrong_flags_load_no_torch() -> None:
    assert_no_torch([[name] for name in COMMANDS], ["--help"], ["--version"])


def test_words_of_flags_are_those_of_the_plugin() -> None:
    assert tuple(plugin.VARIANTS) == choices.VARIANTS
    for name in ("Target", "Loss", "MetricName"):
        assert get_args(getattr(choices, name)) == get_args(getattr(plugin, name))


HEAD = ["--model", "embedded", "--layer", "2", "--head", "1"]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["dmo"], "Did you mean 'demo'"),
        (["collect", *HEAD, "--n-tokens", "0"], "n_tokens: expected at least 1, got 0"),
        (["collect", "--model", "embeded", "--layer", "2"], "nearest: embedded"),
        (["demo", "--model", "GPT2"], "recurrent op"),
        (["demo", "--out", "FILE/below"], "is a file"),
        (["hooks", "embedded", "--layer", "9"], "layer 9"),
        (["hooks", "a[/x]b[red]c"], "a[/x]b[red]c"),
        (["train", *HEAD, "--variants", "Wrong"], "Wrong"),
        (["train", *HEAD, "--architecture", "writesae_topkk"], "nearest: writesae_topk"),
        (["train", "--model", str(shipped.path("embedded")), *HEAD[2:]], "dataset: expected a text file"),
        (["train", *HEAD, "--dataset", "texts/no.jsonl"], "got 'texts/no.jsonl': there is no such file or folder"),
        (["show"], "Missing from writesae show: PATH"),
    ],
    ids=lambda words: "" if isinstance(words, str) else " ".join(words),
)
def test_what_is_typed_wrong_ends_before_any_work(
    capsys: pytest.CaptureFixture[str], sae_folder: Path, tmp_path: Path, arguments: list[str], word: str
) -> None:
    assert_one_error(capsys, sae_folder, tmp_path, arguments, word)


def assert_one_error(
    capsys: pytest.CaptureFixture[str], sae_folder: Path, tmp_path: Path, arguments: list[str], word: str
) -> None:
    """Status 2 and a message with a word, before any work: a line of ours, or tyro's box."""
    (tmp_path / "file").touch()
    places = {"SAE": sae_folder, "GPT2": gpt2(tmp_path), "FILE/below": tmp_path / "file" / "below"}
    capsys.readouterr()  # the progress bar of saving a model
    out = [] if "--out" in arguments or arguments[0] in ("hooks", "prompt") else ["--out", tmp_path / "out"]
    done = run(capsys, *(places.get(each, each) for each in arguments), *out)
    message = [line for line in done.err.splitlines() if line and "%|" not in line]  # progress bars aside
    text = " ".join(re.sub("[│╭╮╰╯─]|-{5,}", " ", " ".join(message)).split())
    assert done.status == 2 and word in text and (len(message) == 1 or "full helptext" in text), done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["demo"],
        ["show", "SAE"],
    ],
    ids=" ".join,
)
def test_an_interrupt_is_one_line_that_says_what_it_left(
    capsys: pytest.CaptureFixture[str], sae_folder: Path, tmp_path: Path, arguments: list[str]
) -> None:
    resumes = arguments[0] in ("demo", "collect", "train")
    assert_interrupted(capsys, sae_folder, tmp_path, arguments, resumes)


def assert_interrupted(
    capsys: pytest.CaptureFixture[str], sae_folder: Path, tmp_path: Path, arguments: list[str], resumes: bool
) -> None:
    """The signal comes as the command calls the first function of its work."""

    names = [command.work.partition(":")[2] for command in commands().values()]

    def interrupt(frame: FrameType, event: str, arg: object) -> None:
        if event == "call" and frame.f_code.co_name in ("run", *names) and "writesae" in frame.f_code.co_filename:
            sys.setprofile(None)
            signal.raise_signal(signal.SIGINT)

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
    assert ("the same command resumes" in done.err) == resumes


def test_a_reader_that_has_enough_is_no_error() -> None:
    """As of `writesae --help | head -1`: the other end of the pipe is closed."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", "writesae", "--help"], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("arguments", [["show", "nowhere"], ["train", "--collection", "nowhere"]], ids=" ".join)
def test_a_folder_that_is_missing_is_named_before_torch_is_loaded(arguments: list[str]) -> None:
    assert_missing_is_named(*arguments)


def assert_missing_is_named(*arguments: str) -> None:
    """The folder `nowhere`, before torch is loaded."""
    code = f"""
import sys
from writesae.cli import main
try:
    main({[*arguments]!r})
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
    costs = run(capsys, "models", "--cost", "embedded", "--tokens", "64").out
    assert re.search(r"blocks\.\{l\}\.mixer\.hook_write +4 +32,768 +2 MB +8 MB$", costs, re.MULTILINE)
    everything = run(capsys, "hooks", "embedded").out
    assert "layer 0" in everything and "layers 1, 2, 3, 4" in everything


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
ONE_ATOM = ["--n-atoms", "1", "--min-firings", "1"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `train` writes at tiny sizes, and what `collect` and then `train` do."""
    root = tmp_path_factory.mktemp("folders")
    main(["train", *HEAD, *TINY, "--no-summary", "--out", str(root / "trained")])
    collection = ["--model", "embedded", "--layer", "2", "--heads", "0", "1", "--n-tokens", "1024"]
    main(["collect", *collection, "--out", str(root / "collected/collection")])
    own = ["--collection", str(root / "collected/collection"), "--out", str(root / "collected")]
    main(["train", *own, *TINY, "--no-summary"])
    return root


@pytest.mark.parametrize(
    ("folder", "arguments", "written"),
    [
        ("trained", ["show", "FOLDER", *COUNTS, *ONE_ATOM, "--no-quality"], "index.html"),
        ("trained", ["export", "FOLDER", *COUNTS, *ONE_ATOM], "batch-0.json"),
        ("trained", ["train", "--collection", "FOLDER", *TINY, "--no-summary"], "cfg.json"),
        ("collected", ["push", "FOLDER", "me/saes", "--dry-run"], None),
    ],
    ids=lambda words: words[0] if isinstance(words, list) else words or "",
)
def test_what_one_command_writes_another_takes(
    capsys: pytest.CaptureFixture[str],
    folders: Path,
    tmp_path: Path,
    folder: str,
    arguments: list[str],
    written: str | None,
) -> None:
    words = [str(folders / folder) if each == "FOLDER" else each for each in arguments]
    out = [] if written is None else ["--out", str(tmp_path)]
    done = run(capsys, *words, *out)
    assert done.status == 0, done.err
    # What may take minutes says first how many.
    assert arguments[0] not in ("show", "export") or re.search(r"about \d+ s on this machine", done.out)
    assert written is None or any(tmp_path.rglob(written))


def test_training_ends_with_what_each_dictionary_recovers(
    capsys: pytest.CaptureFixture[str], folders: Path, embedded: HookedRecurrent
) -> None:
    again = run(capsys, "train", "--collection", folders / "collected", *TINY, "--out", folders / "collected")
    tokens = sample_sequences(embedded, shipped.text("test"), 128, 8)
    header, *lines, _ = again.out.splitlines()[-4:]
    assert re.findall("explained|alive|recovered", header) == ["explained", "alive", "recovered"]
    for head, line in enumerate(lines):
        label = f"L2H{head}/write-seed0"
        quality = dictionary_quality(embedded, load_sae(folders / "collected" / label / "sae"), tokens)
        assert quality.explained is not None and quality.recovered is not None
        shares = (quality.explained, quality.alive, quality.recovered.mean)
        assert line.split()[:4] == [label, *map(share_text, shares)]


def test_the_text_files_of_a_folder_are_collected(
    capsys: pytest.CaptureFixture[str], embedded: HookedRecurrent, tmp_path: Path
) -> None:
    texts = {"a.txt": shipped.text("test")[:3000], "b.txt": shipped.text("test")[3000:5000]}
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    collect = ["collect", *HEAD, "--context-size", "16", "--dataset"]
    assert run(capsys, *collect, tmp_path, "--out", tmp_path / "both").status == 0
    tokens = [embedded.to_tokens(text, prepend_bos=False, truncate=False).numel() for text in texts.values()]
    assert 0.9 < Collection.open(tmp_path / "both").tokens.numel() / sum(tokens) <= 1
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    refused = run(capsys, *collect, tmp_path / "a.txt", "--out", tmp_path / "other")
    assert refused.status == 2 and "a.txt: expected a text in UTF-8" in refused.err


@pytest.mark.parametrize(
    ("visible", "rank", "name", "seen"),
    [
        (None, None, None, None),
        (None, None, "cuda", "0,1,2,3"),
        (None, None, "cpu", ""),
        ("6,7", None, "cuda:1", "7"),
        (None, "5", None, "1"),  # five processes and more than GPUs take turns
        ("6,7", None, "cuda:2", ValueError),
    ],
)
def test_a_process_sees_the_device_that_is_named(
    visible: str | None, rank: str | None, name: str | None, seen: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of four GPUs, or those of them that are visible."""
    for variable, value in {"CUDA_VISIBLE_DEVICES": visible, "LOCAL_RANK": rank}.items():
        monkeypatch.setenv(variable, value or "")
        if value is None:
            monkeypatch.delenv(variable)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len((visible or "0,1,2,3").split(",")))
    if seen is ValueError:
        with pytest.raises(ValueError, match=f"device: expected .*cpu, cuda, cuda:0.*, got '{name}'"):
            choose_device(name)
    else:
        choose_device(name)
        assert os.environ.get("CUDA_VISIBLE_DEVICES") == seen


def test_a_summary_warns_of_dictionaries_of_which_few_atoms_fire() -> None:
    table = quality_table({"few": {"alive": 0.09}, "enough": {"alive": 0.11}, "late": None})
    assert "fewer than 10% of atoms fire of few;" in table.splitlines()[-1]
    assert "warning" not in quality_table({"enough": {"alive": 0.1}})
