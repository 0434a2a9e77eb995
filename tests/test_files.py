"""Files and folders that commands write: whole or absent, never over others' work, and safe to open."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from reliability.folders import KINDS

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
