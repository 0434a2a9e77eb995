"""What is published is what was loaded: no code, no link, no place on this machine."""

from __future__ import annotations

import ast
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from huggingface_hub import HfApi
from huggingface_hub.errors import EntryNotFoundError
from sae_lens import SAE
from saes import make_sae
from sealing import reseal

from hookpoints import HookedRecurrent
from sae_lens_writesae.sae.load import CheckpointError, load_sae
from writesae.cli import main
from writesae.push import Push, card, saved_anew


@pytest.fixture(scope="module")
def folder(embedded: HookedRecurrent, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dictionaries of two heads as `writesae train` leaves them."""
    root = tmp_path_factory.mktemp("trained")
    for head in (0, 1):
        sae = make_sae(embedded, d_sae=16, hook=f"blocks.2.mixer.heads.{head}.hook_write_vec", seed=head)
        sae.cfg.metadata.context_size = 32
        sae.save_model(root / f"L2H{head}/write-seed0/sae")
        (root / f"L2H{head}/write-seed0/sae/runner_cfg.json").write_text("{}")
    (root / "private").write_text("PRIVATE KEY")
    (root / "L2H1/write-seed0/sae/sparsity.safetensors").symlink_to(root / "private")
    return root


def test_what_is_pushed_loads_by_the_lines_of_its_card(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub is a folder of this machine; SAELens downloads from it."""
    hub = tmp_path / "me/saes"

    def upload(api: HfApi, repo_id: str, folder_path: str, commit_message: str) -> SimpleNamespace:
        shutil.copytree(folder_path, tmp_path / repo_id)
        return SimpleNamespace(commit_url=f"{repo_id}: {commit_message}")

    def download(repo_id: str, filename: str, **how: object) -> str:
        if not (tmp_path / repo_id / filename).exists():
            raise EntryNotFoundError(filename)
        return str(tmp_path / repo_id / filename)

    monkeypatch.setattr(HfApi, "create_repo", lambda *_, **__: None)
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    monkeypatch.setattr("sae_lens.loading.pretrained_sae_loaders.hf_hub_download", download)
    names = ["L2H0/write-seed0", "L2H1/write-seed0"]
    assert Push(folder, "me/saes").run() == f"me/saes: Upload {', '.join(names)}"
    found: dict[str, Any] = {}
    for block in re.findall("```python\n(.*?)```", (hub / "README.md").read_text(), re.DOTALL):
        exec(block, found)
    assert found["acts"].shape[2] == 16 and found["acts"].count_nonzero() > 0
    for name in names:
        ours, theirs = load_sae(folder / name / "sae"), SAE.from_pretrained("me/saes", name)
        assert all((one == other).all() for one, other in zip(ours.parameters(), theirs.parameters(), strict=True))
    files = {str(file.relative_to(hub)): file.read_bytes() for file in hub.rglob("*") if file.is_file()}
    of_each = ("cfg.json", "sae_weights.safetensors", "SHA256SUMS")
    assert files.keys() == {"README.md", *(f"{name}/{file}" for name in names for file in of_each)}
    assert b"PRIVATE KEY" not in b"".join(files.values())


def test_a_dry_run_shows_the_files_and_the_card(folder: Path) -> None:
    found = Push(folder, "me/saes", dry_run=True).run()
    assert "| `L2H0/write-seed0` | `blocks.2.mixer.heads.0.hook_write_vec` | 64 x 32 | 16 |" in found
    assert "L2H0/write-seed0/cfg.json\n" in found and "runner_cfg" not in found
    alone = Push(folder / "L2H1/write-seed0/sae", "me/saes", dry_run=True).run()
    assert "SAE.from_pretrained('me/saes', 'write-seed0')" in alone


@pytest.fixture
def foreign(folder: Path, tmp_path: Path) -> Path:
    """A dictionary that someone else made."""
    return Path(shutil.copytree(folder / "L2H0/write-seed0/sae", tmp_path / "foreign"))


def describe(foreign: Path, **metadata: object) -> None:
    """Give the dictionary other metadata."""
    config = json.loads((foreign / "cfg.json").read_text())
    (foreign / "cfg.json").write_text(json.dumps(config | {"metadata": config["metadata"] | metadata}))
    reseal(foreign)


def published(foreign: Path, fresh: Path) -> tuple[dict[str, bytes], str]:
    """What would be uploaded: the files of the dictionary by name, and the card."""
    saes = saved_anew(foreign, fresh)
    files = {file.name: file.read_bytes() for file in fresh.rglob("*") if file.is_file() and not file.is_symlink()}
    return files, card("me/saes", saes)


@pytest.mark.parametrize(
    "text", ['x")\nimport os\nos.system("true") #', "me/model\n---\nlicense: mit", "me/model: [", "a | b", "`x`"]
)
@pytest.mark.parametrize("field", ["model_name", "dataset_path", "training_architecture", "context_size"])
def test_metadata_is_no_code_and_no_front_matter(foreign: Path, tmp_path: Path, field: str, text: str) -> None:
    describe(foreign, **{field: text})
    shown = Push(foreign, "me/saes", dry_run=True).run()
    assert text not in shown and "os.system" not in shown and "license" not in shown
    _, front, body = shown.split("---\n", 2)
    assert yaml.safe_load(front).keys() <= {"library_name", "tags", "base_model"}
    for block in re.findall("```python\n(.*?)```", body, re.DOTALL):
        names = {node.func.attr for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Call)}  # type: ignore[attr-defined]
        assert names <= {"from_pretrained", "run_with_cache_with_saes"}
    files, _ = published(foreign, tmp_path / "fresh")
    assert text not in str(json.loads(files["cfg.json"])["metadata"].get(field))


@pytest.mark.parametrize("place", ["/home/secret", "~/secret", "C:\\me\\secret", "a /home/secret", "file:secret"])
def test_no_place_on_this_machine_is_published(foreign: Path, tmp_path: Path, place: str) -> None:
    """Names on the hub are, and addresses."""
    told = {"dataset_path": "me/text", "from": "https://example.com/secret", "training_architecture": "writesae_topk"}
    describe(foreign, model_name=place, given={"cache": [place]}, **{f"at {place}": 1}, **told)
    files, text = published(foreign, tmp_path / "fresh")
    metadata = json.loads(files["cfg.json"])["metadata"]
    assert told.items() <= metadata.items()
    assert "secret" not in text and "secret" not in str({**metadata, "from": ""}) and "me/text" in text
    describe(foreign, model_name="me/model", given="none")
    _, text = published(foreign, tmp_path / "again")
    assert "base_model: me/model" in text and "HookedSAERecurrent.from_pretrained('me/model')" in text


def test_a_name_that_no_path_has_is_refused(foreign: Path) -> None:
    with pytest.raises(ValueError, match="rename"):
        Push(foreign.rename(foreign.parent / 'x"); y'), "me/saes", dry_run=True).run()


@pytest.mark.parametrize("repo", ["no spaces", "a/b/c"])
def test_what_cannot_be_pushed_is_said_before_any_upload(folder: Path, tmp_path: Path, repo: str) -> None:
    with pytest.raises(ValueError, match=repo):
        Push(folder, repo).run()
    with pytest.raises(ValueError, match="no dictionary"):
        Push(tmp_path, "me/saes").run()
    (tmp_path / "cfg.json").write_text('{"architecture": "writesae_topk", "d_in": 4, "d_sae": 2, "d_k": 2, "k": 1}')
    with pytest.raises(CheckpointError):
        Push(tmp_path, "me/saes").run()


def test_a_hub_that_is_not_there_is_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """These tests run offline."""
    with pytest.raises(SystemExit) as ended:
        main(["push", str(folder), "me/saes"])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1
