"""Files and folders that commands write: whole or absent, never over others' work, and safe to open."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from made_up import HOLDS, made_up
from reliability.folders import KINDS, make_collection, make_dictionary, make_result
from reliability.runs import fresh, some_tokens
from saes import make_sae

from hookpoints.files import CHECKSUMS, _clean, atomic_text, atomic_write, content_hash
from writesae.cli import main
from writesae.files import check_settings, check_writable, keep_settings
from writesae_study.evaluations import load_result
from writesae_study.page.report import find_results, write_report


def test_a_folder_that_takes_no_files_is_refused_and_no_other_is_changed(tmp_path: Path) -> None:
    check_writable(tmp_path / "new" / "below")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    for folder, word in (
        (tmp_path / "file", "is a file"),
        (tmp_path / "file" / "x", "is a file"),
        ("/proc/x", "/proc"),
    ):
        with pytest.raises(ValueError, match=word):
            check_writable(Path(folder))


def test_a_folder_keeps_the_settings_that_it_was_made_with(tmp_path: Path) -> None:
    check_settings(tmp_path, {"seed": 1})  # there are none yet
    keep_settings(tmp_path, {"seed": 0, "heads": (1, 2)})
    keep_settings(tmp_path, {"seed": 0, "heads": (1, 2)})
    with pytest.raises(ValueError, match="seed: 0, now 1"):
        check_settings(tmp_path, {"seed": 1})


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("dictionary", "cfg.json"),
        ("dictionary", "sae_weights.safetensors"),
        ("collection", "index.json"),
        ("model", "config.json"),
        ("model", "model.safetensors"),
        ("result", "info.json"),
        ("result", "firings.parquet"),
    ],
)
def test_a_link_in_a_strangers_folder_is_refused(tmp_path: Path, kind: str, name: str) -> None:
    """It may lead to a private file, whose content would then be published."""
    folder, private = tmp_path / kind, tmp_path / "private"
    KINDS[kind].make(folder)
    KINDS[kind].read(folder)
    shutil.move(folder / name, private)
    (folder / name).symlink_to(private)  # the same content, so that the seal holds
    with pytest.raises(ValueError, match=f"{name}: expected a"):
        KINDS[kind].read(folder)


# ------------------------------------------------------------------------------------------------ files of others


def entries(folder: Path) -> dict[str, object]:
    """Everything below a folder but locks: bytes and time of files, targets of links."""
    found: dict[str, object] = {}
    for path in folder.rglob("*"):
        name, about = str(path.relative_to(folder)), path.lstat()
        if path.is_symlink():
            found[name] = ("link", os.readlink(path), about.st_mtime_ns)
        elif path.is_dir():
            found[name] = "folder"
        elif path.name not in (".lock", ".taken"):
            found[name] = (path.read_bytes(), about.st_mtime_ns)
    return found


def users_folder(folder: Path) -> Path:
    """A project: hidden files, a subfolder, links, another run; no name that a command writes."""
    for name in (
        ".env.production",
        ".pre-commit-config.yaml",
        ".git/config",
        "src/thesis.txt",
        "L9H9/other/config.json",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("the user's")
    (folder / "link").symlink_to(folder / "src" / "thesis.txt")
    (folder / "link to nothing").symlink_to("nowhere")
    return folder


EMBEDDED = ["--model", "embedded", "--layers", "2", "--heads", "1"]
TINY = ["--d-sae", "8", "--training-tokens", "256", "--context-size", "64", "--no-summary"]
ATOMS = ["--sequences", "4", "--context-size", "48", "--n-atoms", "1", "--min-firings", "1"]
SIGN = ["--kinds", "sign", "--set", "n_positions=2", "--sequences", "6", "--context-size", "48"]
SIGN += ["--no-control-dictionaries"]
ZOO = ["--models", "recall", "--seeds", "1", "--sequences", "128", "--facts", "16", "--steps", "2", "--no-states"]
COMMANDS: dict[str, list[str]] = {
    "collect": ["collect", *EMBEDDED, "--n-tokens", "256", "--context-size", "64", "--out", "OUT"],
    "train": ["train", *EMBEDDED, *TINY, "--out", "OUT"],
    "demo": ["demo", "--out", "OUT"],
    "report": ["report", "RESULT", "--out", "OUT"],
    "eval": ["eval", "install", "SAE", "--sequences", "4", "--context-size", "48", "--out", "OUT"],
    "eval --resume": ["eval", "all", "SAE", *SIGN, "--resume", "--out", "OUT"],
    "show": ["show", "SAE", *ATOMS, "--out", "OUT"],
    "export": ["export", "SAE", *ATOMS, "--out", "OUT"],
    "zoo": ["zoo", *ZOO, "--out", "OUT"],
    "reproduce": ["reproduce", "--small", "--out", "OUT"],
}
METHODS: dict[str, Callable[[Path], object]] = {
    "Result.save": make_result,
    "save_model": make_dictionary,
    "Memory.save": lambda folder: fresh().memory(some_tokens()).save(folder / "memory"),
    "write_report": lambda folder: write_report([made_up(HOLDS, label="mine", n_sequences=6)], folder / "page.html"),
    "collect()": make_collection,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Path], int]:
    """Runs a command or a method on a folder; returns the status."""
    made = tmp_path_factory.mktemp("made")
    make_result(made / "result")
    make_sae(shipped_model(), d_sae=8, hook="blocks.2.mixer.heads.1.hook_write_vec").save_model(made / "mine")

    def act(name: str, folder: Path) -> int:
        places = {"OUT": folder, "RESULT": made / "result", "SAE": made / "mine"}
        try:
            if name in METHODS:
                METHODS[name](folder)
            else:
                main([str(places.get(word, word)) for word in COMMANDS[name]])
        except SystemExit as ended:
            return int(str(ended.code))
        except (OSError, ValueError):
            return 2
        return 0

    return act


def shipped_model():
    from hookpoints import HookedRecurrent

    return HookedRecurrent.from_pretrained("embedded")


STRICT = ("collect", "Result.save", "collect()")
"""These own a folder, and refuse one that holds anything else."""
LONG = ("demo", "reproduce", "eval")
"""Refusals alone are tested: a run takes a minute."""


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if name == "zoo" else name
        for name in (*COMMANDS, *METHODS)
        if name not in LONG
    ],
)
def test_what_others_wrote_is_the_same_afterwards(
    name: str, run: Callable[[str, Path], int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "zoo":
        monkeypatch.setattr("writesae_study.known.sides.GRID", (8,))  # sizes that are tried; six would take minutes
    folder = users_folder(tmp_path / "project")
    before = entries(folder)
    statuses = [run(name, folder), run(name, folder)]  # what it wrote itself is no obstacle
    after = entries(folder)
    assert statuses == [2 if name in STRICT else 0] * 2
    assert {path: after.get(path) for path in before} == before
    assert (after == before) == (name in STRICT)


TAKEN = {
    "collect": ["index.json", "shard-00000.safetensors", CHECKSUMS],
    "train": ["L2H1/write-seed0/sae/cfg.json", "L2H1/write-seed0/config.json"],
    "demo": ["config.json", "facts.json", "report.html", "report.json", "collection/notes"],
    "report": ["report.html", "report.json", "tables/substitution-firings.parquet"],
    "eval": ["report.html", "report.json", "tables/install-continuations.parquet", "install/L2H1/thesis.txt"],
    "show": ["index.html", "data.json", "atom-3.html"],
    "export": ["batch-0.json"],
    "zoo": ["index.html", "zoo.json", "zoo.md"],
    "reproduce": ["config.json", "texts/held-out.txt", "report/report.html"],
    "Result.save": ["info.json", "firings.parquet", ".DS_Store"],
    "save_model": [CHECKSUMS],
    "write_report": ["page.html", "page.json", "tables/substitution-firings.parquet"],
}
"""Names that a command writes."""


@pytest.mark.parametrize(("name", "file"), [(name, file) for name, files in TAKEN.items() for file in files])
@pytest.mark.parametrize("link", [False, True], ids=["file", "link"])
def test_a_name_that_others_took_is_refused_before_any_work(
    name: str, file: str, link: bool, run: Callable[[str, Path], int], tmp_path: Path
) -> None:
    folder, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    (folder / file).parent.mkdir(parents=True)
    text = f"{'0' * 64}  other.txt\n" if file == CHECKSUMS else "the user's"
    elsewhere.write_text(text)
    (folder / "other.txt").write_text("the user's")
    if link:
        (folder / file).symlink_to(elsewhere)
    else:
        (folder / file).write_text(text)
    before = entries(tmp_path)
    start = time.process_time()
    assert run(name, folder) == 2 and entries(tmp_path) == before
    assert time.process_time() - start < 10


@pytest.mark.parametrize("name", [*COMMANDS, *METHODS])
def test_nothing_is_written_through_a_folder_that_is_a_link(
    name: str, run: Callable[[str, Path], int], tmp_path: Path
) -> None:
    folder, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    elsewhere.mkdir()
    folder.symlink_to(elsewhere)
    assert run(name, folder) == 2 and not list(elsewhere.iterdir())


def test_a_folder_that_has_the_name_of_a_part_is_the_users(tmp_path: Path) -> None:
    """Of dictionaries that SAELens' trainer makes, checkpoints are written aside."""
    folder = tmp_path / "out"
    users = folder / "L2H1/write-reads-seed0/.checkpoint.part"
    users.mkdir(parents=True)
    (users / "thesis.txt").write_text("the user's")
    main(["train", *EMBEDDED, *TINY, "--loss", "reads", "--out", str(folder)])
    assert (users / "thesis.txt").read_text() == "the user's"
    names = {path.name for path in users.parent.iterdir()}
    assert names >= {"sae", "config.json"} and not [name for name in names if name.endswith(".aside")]


@pytest.mark.parametrize("name", STRICT)
def test_an_earlier_result_or_collection_is_no_obstacle(
    name: str, run: Callable[[str, Path], int], tmp_path: Path
) -> None:
    assert [run(name, tmp_path), run(name, tmp_path)] == [0, 0]


# ------------------------------------------------------------------------------------------------ one file


def test_threads_that_write_one_file_leave_a_whole_one(tmp_path: Path) -> None:
    model = fresh()
    memory = model.memory(some_tokens())
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda _: memory.save(tmp_path / "memory"), range(45)))
    assert [path.name for path in tmp_path.iterdir()] == ["memory"]
    memory.load(tmp_path / "memory", model)


@pytest.mark.parametrize("kind", ["link", "link to nothing", "folder", "device"])
def test_what_is_no_file_is_not_replaced(kind: str, tmp_path: Path) -> None:
    target = tmp_path / "target"
    (tmp_path / "other").write_text("the user's")
    if kind == "folder":
        target.mkdir()
    elif kind == "device":
        os.mkfifo(target)
    else:
        target.symlink_to(tmp_path / "other" if kind == "link" else "nowhere")
    before = target.lstat()
    for write in (fresh().memory(some_tokens()).save, lambda file: atomic_text(file, "text")):
        with pytest.raises(OSError, match=f"got a {kind.split()[0]}.*target"):
            write(target)
    assert target.lstat() == before and (tmp_path / "other").read_text() == "the user's"
    assert len(list(tmp_path.iterdir())) == 2


def test_a_write_that_fails_halfway_leaves_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("an earlier one")

    def half(file: Path) -> None:
        file.write_text("a new")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        atomic_write(target, half)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["an earlier one"]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("opened", ["read", "listed", "written beside"])
def test_a_kill_between_two_renames_loses_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opened: str
) -> None:
    """The earlier folder is aside already, and the new one not yet in its place."""
    folder, rename = tmp_path / "results", Path.rename
    make_result(folder)

    def killed(self: Path, target: Path) -> Path:
        if target == folder:
            os.kill(os.getpid(), signal.SIGKILL)
        return rename(self, target)

    whole = load_result(folder)
    newer = replace(whole, info=whole.info | {"label": "newer"})
    if (process := os.fork()) == 0:
        monkeypatch.setattr(Path, "rename", killed)
        newer.save(folder)
    os.waitpid(process, 0)
    assert not folder.exists()
    if opened == "listed":
        assert [result.label for result in find_results([tmp_path])] == ["newer"]
    if opened == "written beside":
        _clean.cache_clear()  # once in a process, of which this is the second
        atomic_text(tmp_path / "new", "text")
        assert folder.exists()
    assert load_result(folder).label == "newer"


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_what_a_killed_process_left_aside_is_removed_and_nothing_else(tmp_path: Path) -> None:
    """The aside of a process that lives is locked."""
    processes: dict[str, int] = {}

    def write(file: Path) -> None:
        file.write_text("half")
        time.sleep(600)

    for name in ("killed", "alive"):
        if (process := os.fork()) == 0:
            try:
                atomic_write(tmp_path / name, write)
            finally:
                os._exit(0)
        processes[name] = process
    try:
        while len(list(tmp_path.glob(".*.aside/[ka]*"))) < 2:
            time.sleep(0.05)
        os.kill(processes["killed"], signal.SIGKILL)
        os.waitpid(processes.pop("killed"), 0)
        asides = {path.name.split(".")[1]: path for path in tmp_path.iterdir()}
        for name in (".killed.0123456789abcdef.aside", ".cache.d41d8cd98f00b204e9800998ecf8427e", "x.aside"):
            (tmp_path / name).mkdir()
            os.utime(tmp_path / name, (0, 0))
        for aside in asides.values():
            os.utime(aside, (0, 0))
        users = {*tmp_path.iterdir()} - {*asides.values()}
        atomic_write(tmp_path / "new", lambda file: file.write_text("whole"))
        assert {*tmp_path.iterdir()} == {*users, asides["alive"], tmp_path / "new"}
    finally:
        for process in processes.values():
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)


def test_equal_values_have_equal_hashes_and_a_flipped_bit_another() -> None:
    value = {
        "a": torch.arange(4.0),
        "b": [1, {"c": torch.zeros(0, 3)}],
        3: (True, None, "x"),
        "d": torch.ones(2).bfloat16(),  # numpy has no such numbers
    }
    assert content_hash(value) == content_hash(dict(reversed(value.items())))
    flipped = torch.arange(4.0).view(torch.int32) ^ 1
    others = [
        value | {"a": flipped.view(torch.float32)},
        value | {"a": torch.arange(4.0).double()},
        value | {"a": torch.arange(4.0)[None]},
        value | {"b": [1, {"c": torch.zeros(3, 0)}]},
        value | {"b": [1, [{"c": torch.zeros(0, 3)}]]},
        {name: entry for name, entry in value.items() if name != 3},
    ]
    assert len({content_hash(each) for each in (value, *others)}) == 1 + len(others)
