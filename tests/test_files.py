"""Files and folders that commands write: whole or absent, never over others' work, and safe to open."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from reliability.folders import KINDS, Kind, make_collection, make_dictionary
from reliability.runs import fresh, some_tokens
from saes import make_sae

from hookpoints.files import (
    CHECKSUMS,
    SealedFolder,
    _clean_asides,
    atomic_folder,
    atomic_text,
    atomic_write,
    content_hash,
)
from writesae.cli import main
from writesae.files import check_settings, keep_settings, taken


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
    ],
)
def test_a_link_in_a_strangers_folder_is_refused(tmp_path: Path, kind: str, name: str) -> None:
    assert_link_is_refused(tmp_path, KINDS[kind], name)


def assert_link_is_refused(place: Path, kind: Kind, name: str) -> None:
    """It may lead to a private file, whose content would then be published."""
    folder, private = place / "made", place / "private"
    kind.make(folder)
    kind.read(folder)
    shutil.move(folder / name, private)
    (folder / name).symlink_to(private)  # the same content, so that the seal holds
    with pytest.raises(ValueError, match=f"{name}: expected a"):
        kind.read(folder)


# ------------------------------------------------------------------------------------------------ files of others


def entries(folder: Path) -> dict[str, object]:
    """Everything below a folder but locks: bytes and time of files, targets of links."""
    contents: dict[str, object] = {}
    for path in folder.rglob("*"):
        name, about = str(path.relative_to(folder)), path.lstat()
        if path.is_symlink():
            contents[name] = ("link", os.readlink(path), about.st_mtime_ns)
        elif path.is_dir():
            contents[name] = "folder"
        elif path.name not in (".lock", ".taken"):
            contents[name] = (path.read_bytes(), about.st_mtime_ns)
    return contents


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
COMMANDS: dict[str, list[str]] = {
    "collect": ["collect", *EMBEDDED, "--n-tokens", "256", "--context-size", "64", "--out", "OUT"],
    "train": ["train", *EMBEDDED, *TINY, "--out", "OUT"],
    "demo": ["demo", "--out", "OUT"],
    "show": ["show", "SAE", *ATOMS, "--out", "OUT"],
    "export": ["export", "SAE", *ATOMS, "--out", "OUT"],
}
METHODS: dict[str, Callable[[Path], object]] = {
    "save_model": make_dictionary,
    "Memory.save": lambda folder: fresh().memory(some_tokens()).save(folder / "memory"),
    "collect()": make_collection,
}


Act = Callable[[str, Path], int]
"""Runs a command or a method on a folder; returns the status."""


def acting(commands: Mapping[str, list[str]], methods: Mapping[str, Callable[[Path], object]], **places: Path) -> Act:
    """Commands whose words may be places, and methods."""

    def act(name: str, folder: Path) -> int:
        named = places | {"OUT": folder}
        try:
            if name in methods:
                methods[name](folder)
            else:
                main([str(named.get(word, word)) for word in commands[name]])
        except SystemExit as ended:
            return int(str(ended.code))
        except (OSError, ValueError):
            return 2
        return 0

    return act


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Act:
    sae = tmp_path_factory.mktemp("made") / "mine"
    make_sae(shipped_model(), d_sae=8, hook="blocks.2.mixer.heads.1.hook_write_vec").save_model(sae)
    return acting(COMMANDS, METHODS, SAE=sae)


def shipped_model():
    from hookpoints import HookedRecurrent

    return HookedRecurrent.from_pretrained("embedded")


STRICT = ("collect", "collect()")
"""These own a folder, and refuse one that holds anything else."""


@pytest.mark.parametrize("name", ["collect", "train", "show", "save_model", "Memory.save"])
def test_what_others_wrote_is_the_same_afterwards(name: str, run: Act, tmp_path: Path) -> None:
    assert_others_stay(run, name, tmp_path, name in STRICT)


def assert_others_stay(run: Act, name: str, place: Path, strict: bool) -> None:
    """Files of others, in a folder that a command is given; a strict one refuses it."""
    folder = users_folder(place / "project")
    before = entries(folder)
    statuses = [run(name, folder), run(name, folder)]  # what it wrote itself is no obstacle
    after = entries(folder)
    assert statuses == [2 if strict else 0] * 2
    assert {path: after.get(path) for path in before} == before
    assert (after == before) == strict


TAKEN = {
    "collect": ["index.json"],
    "train": ["L2H1/write-seed0/sae/cfg.json"],
    "demo": ["demo.html"],
    "show": ["atom-3.html"],
    "export": ["batch-0.json"],
    "save_model": [CHECKSUMS],
}
"""Names that a command writes."""


def each_name(taken: Mapping[str, list[str]]) -> list[tuple[str, str]]:
    """Commands with each name that they write."""
    return [(name, file) for name, files in taken.items() for file in files]


@pytest.mark.parametrize(("name", "file"), each_name(TAKEN))
@pytest.mark.parametrize("link", [False, True], ids=["file", "link"])
def test_a_name_that_others_took_is_refused_before_any_work(
    name: str, file: str, link: bool, run: Act, tmp_path: Path
) -> None:
    assert_taken_name_is_refused(run, name, tmp_path, file, link)


def assert_taken_name_is_refused(run: Act, name: str, place: Path, file: str, link: bool) -> None:
    """A name that a command writes, as a file of others or a link; before any work."""
    folder, elsewhere = place / "project", place / "elsewhere"
    (folder / file).parent.mkdir(parents=True)
    text = f"{'0' * 64}  other.txt\n" if file == CHECKSUMS else "the user's"
    elsewhere.write_text(text)
    (folder / "other.txt").write_text("the user's")
    if link:
        (folder / file).symlink_to(elsewhere)
    else:
        (folder / file).write_text(text)
    before = entries(place)
    start = time.process_time()
    assert run(name, folder) == 2 and entries(place) == before
    assert time.process_time() - start < 10


@pytest.mark.parametrize("name", ["train", "show", *METHODS])
def test_nothing_is_written_through_a_folder_that_is_a_link(name: str, run: Act, tmp_path: Path) -> None:
    assert_link_to_a_folder_is_refused(run, name, tmp_path)


def assert_link_to_a_folder_is_refused(run: Act, name: str, place: Path) -> None:
    folder, elsewhere = place / "project", place / "elsewhere"
    elsewhere.mkdir()
    folder.symlink_to(elsewhere)
    assert run(name, folder) == 2 and not list(elsewhere.iterdir())


def test_an_earlier_collection_is_no_obstacle(run: Act, tmp_path: Path) -> None:
    assert [run("collect", tmp_path), run("collect", tmp_path)] == [0, 0]


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
    before = [*target.lstat()][:7]  # not the time of reading
    for write in (fresh().memory(some_tokens()).save, lambda file: atomic_text(file, "text")):
        with pytest.raises(OSError, match=f"got a {kind.split()[0]}.*target"):
            write(target)
    assert [*target.lstat()][:7] == before and (tmp_path / "other").read_text() == "the user's"
    assert len(list(tmp_path.iterdir())) == 2


def half_written(file: Path) -> None:
    file.write_text("a new")
    raise ZeroDivisionError


def test_a_write_that_fails_halfway_leaves_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("an earlier one")
    with pytest.raises(ZeroDivisionError):
        atomic_write(target, half_written)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["an earlier one"]


def test_a_folder_that_fails_halfway_leaves_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    atomic_folder(target, lambda folder: (folder / "file").write_text("an earlier one"), lambda folder: ["file"])
    with pytest.raises(ZeroDivisionError):
        atomic_folder(target, lambda folder: half_written(folder / "file"), lambda folder: ["file"])
    assert [path.read_text() for path in tmp_path.rglob("*") if path.is_file()] == ["an earlier one"]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("opened", ["read", "written beside"])
def test_a_kill_between_two_renames_loses_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opened: str
) -> None:
    """The earlier folder is aside already, and the new one not yet in its place."""
    folder, rename = tmp_path / "mine", Path.rename
    write = partial(atomic_folder, folder, names=lambda earlier: ["text"])
    write(lambda aside: (aside / "text").write_text("older"))

    def killed(self: Path, target: Path) -> Path:
        if target == folder:
            os.kill(os.getpid(), signal.SIGKILL)
        return rename(self, target)

    if (process := os.fork()) == 0:
        monkeypatch.setattr(Path, "rename", killed)
        write(lambda aside: (aside / "text").write_text("newer"))
    os.waitpid(process, 0)
    assert not folder.exists()
    if opened == "written beside":
        _clean_asides.cache_clear()  # once in a process, of which this is the second
        atomic_text(tmp_path / "new", "text")
        assert folder.exists()
    assert SealedFolder(folder).file("text").read_text() == "newer"


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


def test_who_waits_for_a_folder_says_so(tmp_path: Path) -> None:
    lock, lines = FileLock(tmp_path / ".taken"), list[str]()
    with ThreadPoolExecutor(1) as other:
        other.submit(lock.acquire).result()
        other.submit(lambda: time.sleep(0.2) or lock.release())
        with taken(tmp_path, lines.append):
            assert "another process" in lines[0]


def test_equal_values_have_equal_hashes_and_a_flipped_bit_another() -> None:
    value = {"a": torch.arange(4.0), "b": [1, {"c": torch.zeros(0, 3)}], 3: (True, None, "x")}
    value["d"] = torch.ones(2).bfloat16()  # numpy has no such numbers
    assert content_hash(value) == content_hash(dict(reversed(value.items())))
    flipped = (torch.arange(4.0).view(torch.int32) ^ 1).view(torch.float32)
    changes = [{"a": flipped}, {"a": torch.arange(4.0)[None]}, {"b": [1, {"c": torch.zeros(3, 0)}]}, {3: "x"}]
    assert len({content_hash(value | change) for change in ({}, *changes)}) == 1 + len(changes)
