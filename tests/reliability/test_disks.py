"""Kills, disks and folders from strangers; ``scripts/reliability_page.py`` does the same with more rounds."""

from __future__ import annotations

import pytest

from reliability import disks, intruders
from sae_lens_writesae.experiment.suite import _folder

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
]
SLOW = ("table_outside", "label_outside", "large_table", "large_result")
"""They evaluate a dictionary first."""


@pytest.mark.slow
@pytest.mark.parametrize("write, kills", [(disks.evaluation, 4), (disks.trainings, 20)])
def test_kills(tmp_path, write, kills):
    found = disks.kill(write, tmp_path, kills)
    assert found.kills == kills and not found.broken and found.equal


@pytest.mark.parametrize(
    "write", [disks.collection, disks.checkpoints, pytest.param(disks.evaluation, marks=pytest.mark.slow)]
)
def test_a_full_disk_and_a_read_only_folder(tmp_path, write):
    found = disks.full_disk(write, tmp_path, (0.5,))
    if found is None:
        pytest.skip("no file system can be mounted here")
    assert found.full == ["named"] and found.read_only == "named" and found.equal


@pytest.mark.parametrize(
    "write", [disks.collection, disks.checkpoints, pytest.param(disks.evaluation, marks=pytest.mark.slow)]
)
def test_two_processes_in_one_folder(tmp_path, write):
    assert disks.two_processes(write, tmp_path)


@pytest.mark.parametrize(
    "attack",
    [pytest.param(each, marks=pytest.mark.slow if each.__name__ in SLOW else ()) for each in intruders.ATTACKS],
    ids=lambda attack: attack.__name__,
)
def test_folders_from_strangers(tmp_path, attack):
    expected = "no effect" if attack.__name__ in ("code_of_a_model", "code_of_a_tokenizer", "label_outside") else ""
    assert intruders.throw(attack, tmp_path / "work") == (expected or "refused by name")


def test_a_label_is_no_path(tmp_path):
    assert _folder(tmp_path, "substitution", "../../a").parent == tmp_path / "substitution"
    for label in (".", ".."):
        with pytest.raises(ValueError, match="label"):
            _folder(tmp_path, "substitution", label)
