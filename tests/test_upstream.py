"""The patches of docs/upstream apply to the installed versions and do what their texts say."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sae_lens

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
