"""What comes from elsewhere: the patches of docs/upstream do what their texts say, and workflows name what they run."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sae_lens
import yaml

WORKFLOWS = Path(__file__).parents[1] / ".github" / "workflows"
PATCHES = sorted((Path(__file__).parents[1] / "docs" / "upstream").glob("*.patch"))
ENTRY_POINTS = """
import sys
from sae_lens.registry import get_sae_class
try:
    get_sae_class("nobody_has_it")
except KeyError as error:
    assert "topk" in str(error)
assert get_sae_class("found_by_name") == (int, float) and "declares" in sys.modules
"""
MIXING = """
import torch
from sae_lens.training.mixing_buffer import mixing_buffer

class Loader:
    def __init__(self, n=0):
        self.n = n
    def __iter__(self):
        return self
    def __next__(self):
        if self.n == 40:
            raise StopIteration
        self.n += 1
        return torch.arange(10 * self.n, 10 * self.n + 10.0)[:, None]

whole = list(mixing_buffer(40, 8, Loader(), generator=torch.Generator().manual_seed(3)))
loader = Loader()
buffer = mixing_buffer(40, 8, loader, generator=torch.Generator().manual_seed(3))
first = [next(buffer) for _ in range(7)]
resumed = mixing_buffer(40, 8, Loader(loader.n), generator=torch.Generator())
resumed.load_state_dict(buffer.state_dict())
assert torch.equal(torch.stack(first + list(resumed)), torch.stack(whole))
torch.manual_seed(0)
print(torch.stack(list(mixing_buffer(40, 8, Loader()))).flatten().tolist())
"""


def run(folder: Path, code: str) -> str:
    command = [sys.executable, "-c", f"import sys\nsys.path.insert(0, {str(folder)!r})\n{code}"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.mark.slow
@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.stem)
def test_a_patch_does_what_its_text_says(patch: Path, tmp_path: Path) -> None:
    shutil.copytree(Path(sae_lens.__file__).parent, tmp_path / "sae_lens")
    subprocess.run(["git", "apply", "--unsafe-paths", f"--directory={tmp_path}", patch], check=True, cwd=tmp_path)
    if "entry" in patch.name:
        (tmp_path / "declares.py").write_text(
            "from sae_lens.registry import register_sae_class\nregister_sae_class('found_by_name', int, float)"
        )
        info = tmp_path / "declares-1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Name: declares\nVersion: 1")
        (info / "entry_points.txt").write_text("[sae_lens.architectures]\nfound_by_name = declares\n")
        run(tmp_path, ENTRY_POINTS)
    else:
        plain = MIXING[: MIXING.index("whole")] + MIXING[MIXING.index("torch.manual_seed") :]
        assert run(tmp_path, MIXING) == run(tmp_path / "nothing", plain)


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
