"""What is published is what was loaded: no code, no link, no place on this machine."""

from __future__ import annotations

import ast
import hashlib
import json
import re
import shutil
import threading
from base64 import b64decode
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml
from huggingface_hub import constants
from sae_lens import SAE, StandardSAE, StandardSAEConfig
from sae_lens.saes.sae import SAEMetadata
from saes import make_sae
from sealing import reseal

from hookpoints import HookedRecurrent
from sae_lens_writesae.sae.load import CheckpointError, load_sae
from writesae.cli import main
from writesae.flags import Push
from writesae.push import card, run_push, saved_anew


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


class Hub(BaseHTTPRequestHandler):
    """The hub's part of a push and of a download, over HTTP. All files go up inside the commit (no LFS, no Xet)."""

    files: ClassVar[dict[str, bytes]] = {}
    """What was committed, as OWNER/NAME/PATH."""
    commit = "0" * 40

    def do_POST(self) -> None:
        asked, *lines = map(json.loads, self.rfile.read(int(self.headers["Content-Length"])).splitlines())
        repo = "/".join(self.path.split("/")[3:5]) if lines else f"{asked.get('organization')}/{asked.get('name')}"
        self.files.update({f"{repo}/{one['value']['path']}": b64decode(one["value"]["content"]) for one in lines})
        modes = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
        url, files = f"{constants.ENDPOINT}/{repo}", [{"path": file["path"]} | modes for file in asked.get("files", ())]
        commit = {"commitUrl": f"{url}/commit/{self.commit}", "commitOid": self.commit}
        self.answer(200, json.dumps({"url": url, "files": files} | commit).encode())

    def do_GET(self) -> None:
        content = self.files.get(re.sub("/resolve/[^/]+/", "/", self.path[1:]))
        self.answer(404 if content is None else 200, content or b"")

    do_HEAD = do_GET

    def answer(self, status: int, content: bytes) -> None:
        self.send_response(status)
        headers = {
            "Content-Length": len(content),
            "ETag": hashlib.sha1(content).hexdigest(),
            "X-Repo-Commit": self.commit,
        }
        for key, value in (headers | ({"X-Error-Code": "EntryNotFound"} if status == 404 else {})).items():
            self.send_header(key, str(value))
        self.end_headers()
        self.wfile.write(content * (self.command != "HEAD"))

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, bytes]]:
    """The files of a hub that runs on this machine."""
    monkeypatch.setattr(Hub, "files", {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever).start()
    address = f"http://127.0.0.1:{server.server_port}"
    template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    given = {"ENDPOINT": address, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_CACHE": str(tmp_path / "cache")}
    for name, value in (given | {"HF_HUB_OFFLINE": False}).items():
        monkeypatch.setattr(constants, name, value)
    yield Hub.files
    server.shutdown()
    server.server_close()


def test_what_is_pushed_loads_by_the_lines_of_its_card(folder: Path, hub: dict[str, bytes], tmp_path: Path) -> None:
    """SAELens and this package download it again. The checksums hold."""
    names = ["L2H0/write-seed0", "L2H1/write-seed0"]
    assert run_push(Push(folder, "me/saes")).endswith(f"/me/saes/commit/{Hub.commit}")
    found: dict[str, Any] = {}
    for block in re.findall("```python\n(.*?)```", hub["me/saes/README.md"].decode(), re.DOTALL):
        exec(block, found)
    assert found["acts"].shape[2] == 16 and found["acts"].count_nonzero() > 0
    for path, content in hub.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(content)
    for name in names:
        ours = load_sae(folder / name / "sae")
        for theirs in (SAE.from_pretrained("me/saes", name), load_sae(tmp_path / "me/saes" / name)):
            assert all((one == other).all() for one, other in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert hub.keys() == {"me/saes/README.md"} | {
        f"me/saes/{name}/{file}" for name in names for file in ("cfg.json", "sae_weights.safetensors", "SHA256SUMS")
    }
    assert b"PRIVATE KEY" not in b"".join(hub.values())


def test_a_dry_run_shows_the_files_and_the_card(folder: Path) -> None:
    found = run_push(Push(folder, "me/saes", dry_run=True))
    assert "| `L2H0/write-seed0` | `blocks.2.mixer.heads.0.hook_write_vec` | 64 x 32 | 16 |" in found
    assert "L2H0/write-seed0/cfg.json\n" in found and "runner_cfg" not in found
    alone = run_push(Push(folder / "L2H1/write-seed0/sae", "me/saes", dry_run=True))
    assert "SAE.from_pretrained('me/saes', 'write-seed0')" in alone


def test_a_dictionary_of_saelens_gets_checksums(tmp_path: Path) -> None:
    """Its own folders have none."""
    config = StandardSAEConfig(
        d_in=2048, d_sae=4, metadata=SAEMetadata(hook_name="blocks.2.mixer.heads.0.hook_write_vec")
    )
    StandardSAE(config).save_model(tmp_path / "plain")
    saved_anew(tmp_path / "plain", tmp_path / "fresh")
    weights = tmp_path / "fresh/plain/sae_weights.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="sae_weights"):
        load_sae(weights.parent)


@pytest.fixture
def foreign(folder: Path, tmp_path: Path) -> Path:
    """A dictionary that someone else made."""
    return Path(shutil.copytree(folder / "L2H0/write-seed0/sae", tmp_path / "foreign"))


def describe(foreign: Path, **metadata: object) -> None:
    """Give the dictionary other metadata."""
    config = json.loads((foreign / "cfg.json").read_text())
    (foreign / "cfg.json").write_text(json.dumps(config | {"metadata": config["metadata"] | metadata}))
    reseal(foreign)


def published(foreign: Path, **metadata: object) -> tuple[dict[str, Any], str]:
    """Of a dictionary with that metadata: what is uploaded of it, and the text of all that is, the card among it."""
    describe(foreign, **metadata)
    fresh = foreign.parent / "fresh"
    shown = card("me/saes", saved_anew(foreign, fresh))
    (settings,) = [file.read_text() for file in fresh.rglob("cfg.json") if not file.is_symlink()]
    shutil.rmtree(fresh)
    return json.loads(settings)["metadata"], shown + settings


@pytest.mark.parametrize(
    "text", ['x")\nimport os\nos.system("true") #', "me/model\n---\nlicense: mit", "me/model: [", "a | b", "`x`"]
)
@pytest.mark.parametrize("field", ["model_name", "dataset_path", "training_architecture", "context_size"])
def test_metadata_is_no_code_and_no_front_matter(foreign: Path, field: str, text: str) -> None:
    kept, _ = published(foreign, **{field: text})
    shown = run_push(Push(foreign, "me/saes", dry_run=True))
    assert text not in shown and "os.system" not in shown and "license" not in shown and text not in str(kept)
    _, front, body = shown.split("---\n", 2)
    assert yaml.safe_load(front).keys() <= {"library_name", "tags", "base_model"}
    for block in re.findall("```python\n(.*?)```", body, re.DOTALL):
        names = {node.func.attr for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Call)}  # type: ignore[attr-defined]
        assert names <= {"from_pretrained", "run_with_cache_with_saes"}


@pytest.mark.parametrize("place", ["/home/secret", "~/secret", "C:\\me\\secret", "a /home/secret", "file:secret"])
def test_no_place_on_this_machine_is_published(foreign: Path, place: str) -> None:
    told = {"dataset_path": "me/text", "training_architecture": "writesae_topk", "seqpos_slice": [None, -1], "l0": 1.5}
    kept, text = published(foreign, model_name=place, given={"cache": [place]}, **{f"at {place}": 1}, **told)
    assert told.items() <= kept.items() and "secret" not in text and "me/text" in text
    _, text = published(foreign, model_name="me/model", given="none")
    assert "base_model: me/model" in text and "HookedSAERecurrent.from_pretrained('me/model')" in text


@pytest.mark.filterwarnings(r"ignore:\s*This SAE has non-empty model_from_pretrained_kwargs:UserWarning")
@pytest.mark.parametrize(
    "metadata",
    [
        {"model_from_pretrained_kwargs": {"token": "hf_secret", "revision": "main", "cache_dir": "secret"}},
        {"model_from_pretrained_kwargs": {"revision": "https://me:secret@example.com"}},
        {"model_from_pretrained_kwargs": "secret"},
        {"api_key": "sk-secret"},
        {"dataset_path": "https://me:secret@example.com/text"},
        {"dataset_path": "s3://secret/text"},
        {"note": {"nested": ["secret"]}},
        {"training_architecture_details": {"api_key": "secret", "b_dec_init": "mean", "metadata": {"a": "secret"}}},
        {"requires": "pip install secret"},
        {"l0": "secret", "loss": "/secret"},
    ],
    ids=str,
)
def test_no_credential_is_published(foreign: Path, metadata: dict[str, object]) -> None:
    """Fields that nobody named stay here, and so do named ones whose value has another form."""
    kept, text = published(foreign, training_architecture="writesae_topk", **metadata)
    assert "secret" not in text
    assert kept["model_from_pretrained_kwargs"] in ({}, {"revision": "main"}) and kept["hook_name"]
    if "training_architecture_details" in metadata:
        assert kept["training_architecture_details"] == {"b_dec_init": "mean"}


def test_a_local_folder_is_no_name_on_the_hub(foreign: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "alice-private/model-v3").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    _, text = published(foreign, model_name="alice-private/model-v3", dataset_path="alice-private")
    assert "alice" not in text and "a local model" in text


@pytest.mark.parametrize("file", ["cfg.json", "sae_weights.safetensors"])
def test_a_seal_is_checked_before_a_push(foreign: Path, file: str) -> None:
    """One bit of a weight, one space of the settings: files that load."""
    content = bytearray((foreign / file).read_bytes())
    content[-1:] = content[-1:] + b" " if file == "cfg.json" else bytes([content[-1] ^ 1])
    (foreign / file).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{file}.*SHA-256"):
        run_push(Push(foreign, "me/saes", dry_run=True))


def test_a_name_that_no_path_has_is_refused(foreign: Path) -> None:
    with pytest.raises(ValueError, match="rename"):
        run_push(Push(foreign.rename(foreign.parent / 'x"); y'), "me/saes", dry_run=True))


@pytest.mark.parametrize("repo", ["no spaces", "a/b/c"])
def test_what_cannot_be_pushed_is_said_before_any_upload(folder: Path, tmp_path: Path, repo: str) -> None:
    with pytest.raises(ValueError, match=repo):
        run_push(Push(folder, repo))
    with pytest.raises(ValueError, match="no dictionary"):
        run_push(Push(tmp_path, "me/saes"))
    (tmp_path / "cfg.json").write_text('{"architecture": "writesae_topk", "d_in": 4, "d_sae": 2, "d_k": 2, "k": 1}')
    with pytest.raises(CheckpointError):
        run_push(Push(tmp_path, "me/saes"))


def test_a_hub_that_is_not_there_is_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """These tests run offline."""
    with pytest.raises(SystemExit) as ended:
        main(["push", str(folder), "me/saes"])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1
