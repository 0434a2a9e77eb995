"""Files and folders that commands write: whole or absent, never over others' work, and safe to open."""

from __future__ import annotations

from pathlib import Path

import pytest

from writesae.files import check_settings, check_writable, keep_settings


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
