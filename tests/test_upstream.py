"""What comes from elsewhere: the patches of docs/upstream do what their texts say, and workflows name what they run."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
import sae_lens
import torch
import yaml
from sae_lens.training import mixing_buffer as installed

WORKFLOWS = Path(__file__).parents[1] / ".github" / "workflows"
PATCHES = sorted((Path(__file__).parents[1] / "docs" / "upstream").glob("*.patch"))
ENTRY_POINT = "[sae_lens.architectures]\nfound_by_name = declares\n"
DECLARES = "from sae_lens.registry import register_sae_class\nregister_sae_class('found_by_name', int, float)"


def patched(patch: Path, module: str, folder: Path) -> ModuleType:
    """A module of SAELens as a patch leaves it, beside the installed one."""
    shutil.copytree(Path(sae_lens.__file__).parent, folder / "sae_lens")
    subprocess.run(["git", "apply", "--unsafe-paths", f"--directory={folder}", patch], check=True, cwd=folder)
    spec = spec_from_file_location(module, folder.joinpath(*module.split(".")).with_suffix(".py"))
    assert spec is not None and spec.loader is not None
    made = module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def finds_entry_points(patch: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[object, object]:
    """The classes that are found by an entry point, and those that it declares."""
    registry = patched(patch, "sae_lens.registry", folder)
    monkeypatch.setitem(sys.modules, "sae_lens.registry", registry)
    registry.register_sae_class("topk", int, float)
    with pytest.raises(KeyError, match="topk"):
        registry.get_sae_class("nobody_has_it")
    (folder / "declares.py").write_text(DECLARES)
    info = folder / "declares-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Name: declares\nVersion: 1")
    (info / "entry_points.txt").write_text(ENTRY_POINT)
    monkeypatch.syspath_prepend(folder)
    found = registry.get_sae_class("found_by_name")
    monkeypatch.delitem(sys.modules, "declares")
    return found, (int, float)


class Loader:
    """Forty blocks of ten numbers, after `n` that were read before."""

    def __init__(self, n: int = 0) -> None:
        self.n = n

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> torch.Tensor:
        if self.n == 40:
            raise StopIteration
        self.n += 1
        return torch.arange(10 * self.n, 10 * self.n + 10.0)[:, None]


def resumes_mixing(patch: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[object, object]:
    """Batches of a buffer that was resumed, and of one that was not; then, without a generator, those of the patched
    module and of the installed one."""
    mixing_buffer = patched(patch, "sae_lens.training.mixing_buffer", folder).mixing_buffer
    whole = list(mixing_buffer(40, 8, Loader(), generator=torch.Generator().manual_seed(3)))
    loader = Loader()
    buffer = mixing_buffer(40, 8, loader, generator=torch.Generator().manual_seed(3))
    first = [next(buffer) for _ in range(7)]
    resumed = mixing_buffer(40, 8, Loader(loader.n), generator=torch.Generator())
    resumed.load_state_dict(buffer.state_dict())
    drawn = []
    for mix in (mixing_buffer, installed.mixing_buffer):
        torch.manual_seed(0)
        drawn.append(torch.stack(list(mix(40, 8, Loader()))).tolist())
    return [torch.stack(first + list(resumed)).tolist(), drawn[0]], [torch.stack(whole).tolist(), drawn[1]]


DOES = {"saelens-entry-points": finds_entry_points, "saelens-mixing-buffer": resumes_mixing}


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.stem)
def test_a_patch_does_what_its_text_says(patch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    got, wanted = DOES[patch.stem](patch, tmp_path, monkeypatch)
    assert got == wanted


@pytest.mark.parametrize("file", sorted(WORKFLOWS.glob("*.yml")), ids=lambda file: file.stem)
def test_workflows_run_actions_by_commit_and_keep_no_credentials(file: Path) -> None:
    """A tag can be moved to other code, and what a checkout leaves can be read by every later step."""
    workflow = yaml.safe_load(file.read_text())
    steps = [step for job in workflow["jobs"].values() for step in job["steps"] if "uses" in step]
    assert steps and workflow["permissions"] == {"contents": "read"}
    for step in steps:
        assert re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", step["uses"])
        if step["uses"].startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] is False
