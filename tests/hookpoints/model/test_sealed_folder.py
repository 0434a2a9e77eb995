"""Folders that someone else may have written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hookpoints.errors import ChecksumError, DamageWarning
from hookpoints.files import SealedFolder, plain_file, set_aside, write_checksums


def test_only_regular_files_of_the_folder_are_plain(tmp_path: Path) -> None:
    folder, outside = tmp_path / "folder", tmp_path / "outside"
    for each in (folder, outside):
        each.mkdir()
        (each / "a").write_text("text")
    (tmp_path / "here").symlink_to(folder)  # the folder itself may be one: its reader named it
    assert plain_file(folder, "a").read_text() == plain_file(tmp_path / "here", "a").read_text() == "text"
    (folder / "link").symlink_to("a")
    (folder / "loop").symlink_to("loop")
    (folder / "nowhere").symlink_to("x")
    (folder / "linked").symlink_to(outside)
    (folder / "below").mkdir()
    os.mkfifo(folder / "pipe")
    wrong = ["link", "loop", "nowhere", "linked/a", "below", "below/../a", "pipe", "../outside/a", "", "x"]
    for name in (*wrong, str(outside / "a"), str(folder)):
        with pytest.raises(ChecksumError, match="regular file"):
            plain_file(folder, name)


def test_a_file_is_compared_once_and_then_taken_as_read(tmp_path: Path) -> None:
    """Reading it again would double the cost of a large one."""
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    write_checksums(tmp_path, ["a", "b"])
    sealed = SealedFolder(tmp_path)
    assert sealed.file("a").read_text() == "a"
    for name in ("a", "b"):
        (tmp_path / name).write_text("other")
    assert sealed.file("a") == tmp_path / "a"
    for read in (lambda: sealed.file("b"), sealed.check, lambda: SealedFolder(tmp_path).file("a")):
        with pytest.raises(ChecksumError, match="SHA-256"):
            read()


def test_a_file_that_the_seal_does_not_list_is_not_read(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    write_checksums(tmp_path, ["a"])
    with pytest.raises(ChecksumError, match="b: expected the SHA-256"):
        SealedFolder(tmp_path).file("b")


def test_what_is_set_aside_replaces_nothing(tmp_path: Path) -> None:
    for content in ("first", "second"):
        (tmp_path / "a").write_text(content)
        with pytest.warns(DamageWarning):
            set_aside(tmp_path / "a", "a test")
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {
        "a.damaged": "first",
        "a.damaged-1": "second",
    }


def test_a_folder_without_a_seal_is_refused_where_one_was_written(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a")
    sealed = SealedFolder(tmp_path, ValueError)
    assert sealed.file("a") == tmp_path / "a"
    with pytest.raises(ValueError, match="SHA256SUMS"):
        sealed.require()
