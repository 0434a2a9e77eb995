"""Files and folders that commands write: whole or absent, never over others' work, and safe to open."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from made_up import HOLDS, made_up
from saes import exact_sae

from hookpoints import HookedRecurrent
from hookpoints import embedded as shipped
from sae_lens_writesae.sae.factors import Collection, collect
from sae_lens_writesae.sae.load import load_sae
from writesae.evaluations import load_result
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
    ("kind", "name", "load"),
    [
        ("sae", "cfg.json", load_sae),
        ("sae", "sae_weights.safetensors", load_sae),
        ("collection", "index.json", Collection.open),
        ("model", "config.json", HookedRecurrent.from_pretrained),
        ("model", "model.safetensors", HookedRecurrent.from_pretrained),
        ("result", "info.json", load_result),
        ("result", "firings.parquet", load_result),
    ],
)
def test_a_link_in_a_strangers_folder_is_refused(
    embedded: HookedRecurrent, tmp_path: Path, kind: str, name: str, load: Callable[[str], object]
) -> None:
    """It may lead to a private file, whose content would then be published."""
    folder, private = tmp_path / kind, tmp_path / "private"
    if kind == "sae":
        exact_sae().save_model(folder)
    elif kind == "collection":
        collect(embedded, torch.arange(64).reshape(2, 32), [1], [0], folder)
    elif kind == "model":
        shutil.copytree(shipped.path(), folder)
    else:
        made_up(HOLDS).save(folder)
    load(str(folder))
    shutil.move(folder / name, private)
    (folder / name).symlink_to(private)  # the same content, so that the seal holds
    with pytest.raises(ValueError, match=f"{name}: expected a"):
        load(str(folder))
