"""A few rounds of what ``scripts/reliability_page.py`` does by the hundred."""

from __future__ import annotations

import shutil

import pytest
from small_saes import make_sae

from hookpoints import embedded
from hookpoints.files import write_checksums
from reliability import damage


def readable(folder):
    return sorted(file.name for file in folder.iterdir() if file.suffix in (".json", ".safetensors"))


@pytest.mark.parametrize("name", embedded.names())
@pytest.mark.parametrize("with_checksums", [False, True])
def test_model_folders(tmp_path, name, with_checksums):
    shutil.copytree(embedded.path(name), tmp_path / "model")
    if with_checksums:
        write_checksums(tmp_path / "model", readable(tmp_path / "model"))
    found = damage.throw(tmp_path / "model", damage.load_model, tmp_path, 6, seed=int(with_checksums))
    assert not found.faults, found.faults
    assert found.counts.total() == 6
    assert not (with_checksums and found.changed), found.changed


def test_dictionaries(model, tmp_path):
    make_sae(model).save_model(tmp_path / "sae")
    found = damage.throw(tmp_path / "sae", damage.load_dictionary, tmp_path, 100)
    assert not found.faults, found.faults
    assert not found.changed, found.changed
    assert found.counts["refused"] > 50
