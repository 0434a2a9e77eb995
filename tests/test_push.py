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
from huggingface_hub import constants, hf_api
from sae_lens import SAE
from saes import make_sae
from sealing import reseal

from hookpoints import HookedRecurrent
from sae_lens_writesae.sae.load import CheckpointError, load_sae
from writesae.cli import main
from writesae.flags import Push
from writesae.push import card, publishable_saes, run_push


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
        """Make a repository, say how a file is to be sent, or commit files: lines after the first."""
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
        if status == 404:
            headers["X-Error-Code"] = "RepoNotFound" if self.path.startswith("/api") else "EntryNotFound"
        for key, value in headers.items():
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
    settings = {"ENDPOINT": address, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_CACHE": str(tmp_path / "cache")}
    for name, value in (settings | {"HF_HUB_OFFLINE": False}).items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(hf_api.api, "endpoint", address)  # of `create_repo`, since its import
    yield Hub.files
    server.shutdown()
    server.server_close()


def test_what_is_pushed_loads_by_the_lines_of_its_card(folder: Path, hub: dict[str, bytes], tmp_path: Path) -> None:
    """SAELens and this package download it again."""
    names = ["L2H0/write-seed0", "L2H1/write-seed0"]
    assert run_push(Push(folder, "me/saes")).endswith(f"/me/saes/commit/{Hub.commit}")
    scope: dict[str, Any] = {}
    for block in python_blocks(hub["me/saes/README.md"].decode()):
        exec(block, scope)
    assert scope["acts"].shape[2] == 16 and scope["acts"].count_nonzero() > 0
    for path, content in hub.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(content)
    for name in names:
        ours = load_sae(folder / name / "sae")
        for theirs in (SAE.from_pretrained("me/saes", name), load_sae(tmp_path / "me/saes" / name)):
            assert all((one == other).all() for one, other in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert hub.keys() == {"me/saes/README.md"} | {
        f"me/saes/{name}/{file}" for name in names for file in ("cfg.json", "sae_weights.safetensors")
    }
    assert b"PRIVATE KEY" not in b"".join(hub.values())


def python_blocks(text: str) -> list[str]:
    return re.findall("```python\n(.*?)```", text, re.DOTALL)


def test_a_dry_run_shows_the_card(folder: Path) -> None:
    shown = run_push(Push(folder, "me/saes", dry_run=True))
    assert "| `L2H0/write-seed0` | `blocks.2.mixer.heads.0.hook_write_vec` | 64 x 32 | 16 |" in shown
    alone = run_push(Push(folder / "L2H1/write-seed0/sae", "me/saes", dry_run=True))
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


def published(foreign: Path, **metadata: object) -> tuple[dict[str, Any], str]:
    """Of a dictionary with that metadata: what is uploaded of it, and the card."""
    describe(foreign, **metadata)
    saes = publishable_saes(foreign)
    (sae,) = saes.values()
    return sae.cfg.metadata.to_dict(), card("me/saes", saes)


_DETAILS = {"api_key": "secret", "b_dec_init": "mean", "metadata": {"a": "secret"}}


@pytest.mark.filterwarnings(r"ignore:\s*This SAE has non-empty model_from_pretrained_kwargs:UserWarning")
@pytest.mark.parametrize(
    "metadata",
    [
        # Code, and front matter of the card.
        {"model_name": 'x")\nimport secret #', "training_architecture": "`secret`"},
        {"model_name": "me/model\n---\nlicense: secret", "context_size": "me/model: [secret"},
        {"dataset_path": "secret | b"},
        # Places on this machine.
        {"model_name": "/home/secret"},
        {"model_name": "C:\\me\\secret"},
        {"at /home/secret": 1, "cache": ["/home/secret"], "l0": "secret", "loss": "/secret"},
        # Credentials.
        {"model_from_pretrained_kwargs": {"token": "hf_secret", "revision": "main", "cache_dir": "secret"}},
        {"model_from_pretrained_kwargs": {"revision": "https://me:secret@example.com"}},
        {"model_from_pretrained_kwargs": "secret"},
        {"api_key": "sk-secret", "note": {"nested": ["secret"]}},
        {"dataset_path": "https://me:secret@example.com/text"},
        {"dataset_path": "s3://secret/text"},
        {"training_architecture_details": _DETAILS},
        {"requires": "pip install secret"},
    ],
    ids=str,
)
def test_nothing_private_and_no_code_is_published(foreign: Path, metadata: dict[str, object]) -> None:
    """Fields that no list names stay here, and so do named ones whose value has another form."""
    harmless = {"training_architecture": "writesae_topk", "seqpos_slice": [None, -1], "l0": 1.5}
    kept, shown = published(foreign, **(harmless | metadata))
    assert "secret" not in shown + str(kept)
    assert {name: harmless[name] for name in harmless.keys() - metadata.keys()}.items() <= kept.items()
    assert kept["model_from_pretrained_kwargs"] in ({}, {"revision": "main"}) and kept["hook_name"]
    if "training_architecture_details" in metadata:
        assert kept["training_architecture_details"] == {"b_dec_init": "mean"}
    _, front, body = shown.split("---\n", 2)
    assert yaml.safe_load(front).keys() <= {"library_name", "tags", "base_model"}
    assert all(ast.parse(block) for block in python_blocks(body))


def test_a_name_on_the_hub_is_published_and_a_folder_of_that_name_is_not(
    foreign: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, shown = published(foreign, model_name="me/model", dataset_path="me/text")
    assert "base_model: me/model" in shown and "from_pretrained('me/model')" in shown and "me/text" in shown
    (tmp_path / "me/model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    _, shown = published(foreign)
    assert "me/model" not in shown and "a local model" in shown


@pytest.mark.parametrize("file", ["cfg.json", "sae_weights.safetensors"])
def test_a_seal_is_checked_before_a_push(foreign: Path, file: str) -> None:
    """One bit of a weight, one space of the settings: files that load."""
    content = bytearray((foreign / file).read_bytes())
    content[-1:] = content[-1:] + b" " if file == "cfg.json" else bytes([content[-1] ^ 1])
    (foreign / file).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{file}.*SHA-256"):
        run_push(Push(foreign, "me/saes", dry_run=True))


@pytest.mark.parametrize("repo", ["no spaces", "a/b/c"])
def test_what_cannot_be_pushed_is_said_before_any_upload(foreign: Path, tmp_path: Path, repo: str) -> None:
    with pytest.raises(ValueError, match=repo):
        run_push(Push(foreign, repo))
    with pytest.raises(ValueError, match="rename"):
        run_push(Push(foreign.rename(foreign.parent / 'x"); y'), "me/saes"))
    (tmp_path / "cfg.json").write_text('{"architecture": "writesae_topk", "d_in": 4, "d_sae": 2, "d_k": 2, "k": 1}')
    with pytest.raises(CheckpointError):
        run_push(Push(tmp_path, "me/saes"))


@pytest.mark.parametrize("is_offline", [True, False], ids=["offline", "no answer"])
def test_a_hub_that_is_not_there_is_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, is_offline: bool
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", is_offline)
    for owner, name in ((constants, "ENDPOINT"), (hf_api.api, "endpoint")):
        monkeypatch.setattr(owner, name, "http://127.0.0.1:9")
    with pytest.raises(SystemExit) as ended:
        main(["push", str(folder), "me/saes"])
    shown = capsys.readouterr().err
    assert ended.value.code == 2 and shown.startswith("error: ") and shown.count("\n") == 1
