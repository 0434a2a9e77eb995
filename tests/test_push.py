"""Publishing to a hub on this machine. It keeps repositories in memory and speaks as much of the hub's protocol as is
needed; huggingface_hub and SAELens are the real ones."""

from __future__ import annotations

import ast
import base64
import hashlib
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import yaml
from sae_lens.saes.sae import SAEMetadata
from sealing import reseal

from sae_lens_writesae.sae import WriteTopKSAE, WriteTopKSAEConfig
from sae_lens_writesae.sae.load import CheckpointError
from writesae.cli import main
from writesae.push import Push, card, saved_anew

SHA = "0" * 40


class Hub(BaseHTTPRequestHandler):
    """Repositories by name, each its files by path."""

    repositories: ClassVar[dict[str, dict[str, bytes]]] = {}

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = "/".join(part for part in (asked.get("organization"), asked["name"]) if part)
            self.repositories.setdefault(name, {})
            self.reply({"url": f"http://{self.headers['Host']}/{name}"})
        elif self.path == "/api/validate-yaml":
            self.reply({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            self.reply({"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]})
        else:
            name = re.fullmatch("/api/models/(.+)/commit/main", self.path)[1]  # type: ignore[index]
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.repositories[name][line["value"]["path"]] = content
            url = f"http://{self.headers['Host']}/{name}/commit/{SHA}"
            self.reply({"commitUrl": url, "commitOid": SHA, "hookOutput": ""})

    def do_GET(self) -> None:
        file = re.fullmatch("/(.+)/resolve/[^/]+/(.+)", self.path)
        self.reply(self.repositories.get(file[1], {}).get(file[2]) if file else None, "EntryNotFound")

    do_HEAD = do_GET

    def reply(self, content: Any, error: str = "") -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(404 if content is None else 200)
        for key, value in {
            "Content-Length": str(len(body)),
            "ETag": hashlib.sha256(body).hexdigest(),
            "X-Repo-Commit": SHA,
            **({"X-Error-Code": error} if content is None else {}),
        }.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def endpoint() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dictionaries of two heads as `writesae train` leaves them."""
    root = tmp_path_factory.mktemp("trained")
    for head in (0, 1):
        hook = f"blocks.2.mixer.heads.{head}.hook_write_vec"
        metadata = SAEMetadata(hook_name=hook, model_name="embedded", context_size=32)
        torch.manual_seed(head)
        sae = WriteTopKSAE(WriteTopKSAEConfig(d_in=64 * 32, d_k=64, d_sae=16, k=2, metadata=metadata))
        sae.save_model(root / f"L2H{head}/write-seed0/sae")
        (root / f"L2H{head}/write-seed0/sae/runner_cfg.json").write_text("{}")
    (root / "private").write_text("PRIVATE KEY")
    (root / "L2H1/write-seed0/sae/sparsity.safetensors").symlink_to(root / "private")
    return root


@pytest.mark.slow
def test_what_is_pushed_loads_by_the_lines_of_its_card(endpoint: str, folder: Path, tmp_path: Path) -> None:
    """In a process of its own, because huggingface_hub reads its address when it is imported."""
    code = f"""
import re
from urllib.request import urlopen
from writesae.cli import main
main(["push", {str(folder)!r}, "me/saes"])
card = urlopen("{endpoint}/me/saes/resolve/main/README.md").read().decode()
for block in re.findall("```python\\n(.*?)```", card, re.DOTALL):
    exec(block)
assert acts.shape[2] == 16 and acts.count_nonzero() > 0
from sae_lens import SAE
from sae_lens_writesae import load_sae
for name in ("L2H0/write-seed0", "L2H1/write-seed0"):
    ours, theirs = load_sae(f"{folder}/{{name}}/sae"), SAE.from_pretrained("me/saes", name)
    assert all((one == other).all() for one, other in zip(ours.parameters(), theirs.parameters()))
"""
    env = os.environ | {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path), "HF_TOKEN": "hf_test"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"/me/saes/commit/{SHA}" in done.stdout
    names = {
        f"L2H{head}/write-seed0/{file}"
        for head in (0, 1)
        for file in ("cfg.json", "sae_weights.safetensors", "SHA256SUMS")
    }
    assert set(Hub.repositories["me/saes"]) == names | {"README.md"}
    assert b"PRIVATE KEY" not in b"".join(Hub.repositories["me/saes"].values())


def test_the_card_has_the_measured_quality(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = folder / "L2H1/write-seed0/sae"
    text = ["--sequences", "6", "--context-size", "48", "--no-control-dictionaries"]
    main(["eval", "partition", str(one), "--out", str(tmp_path), *text])
    found = Push(folder, "me/saes", results=(tmp_path,), dry_run=True).run()
    row = next(line for line in found.splitlines() if line.startswith("| `L2H1/write-seed0` | 288 |"))
    quality = json.loads((tmp_path / "report.json").read_text())["quality"][0]
    assert f"| {quality['l0']:.3g} |" in row
    assert "| `L2H0/write-seed0` | `blocks.2.mixer.heads.0.hook_write_vec` | 64 x 32 | 16 |" in found
    assert "No measured quality was saved for `L2H0/write-seed0`." in found
    assert "L2H0/write-seed0/cfg.json\n" in found and "runner_cfg" not in found
    alone = Push(one, "me/saes", dry_run=True).run()
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
    return files, card("me/saes", saes, {})


@pytest.mark.parametrize("kind", ["link", "pickle"])
def test_what_is_beside_a_dictionary_is_not_published(foreign: Path, tmp_path: Path, kind: str) -> None:
    """A link to a private key, and code, under a name that SAELens uploads."""
    key = tmp_path / "id_ed25519"
    key.write_text("PRIVATE KEY")
    other = foreign / "sparsity.safetensors"
    if kind == "link":
        other.symlink_to(key)
    else:
        other.write_bytes(pickle.dumps(os.system))
    assert "sparsity" not in Push(foreign, "me/saes", dry_run=True).run()
    files, _ = published(foreign, tmp_path / "fresh")
    assert files.keys() == {"cfg.json", "sae_weights.safetensors", "SHA256SUMS"}
    assert b"PRIVATE KEY" not in b"".join(files.values())
    (foreign / "cfg.json").unlink()
    (foreign / "cfg.json").symlink_to(key)
    with pytest.raises(CheckpointError, match=r"cfg\.json"):
        Push(foreign, "me/saes", dry_run=True).run()


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
