"""Texts and collections that are larger than memory, or on another machine."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import torch
from datasets import IterableDataset
from safetensors.torch import save_file

from hookpoints import HookedRecurrent
from hookpoints.files import CHECKSUMS, write_checksums
from sae_lens_writesae import files, train
from sae_lens_writesae.atom.low_rank import LowRank
from sae_lens_writesae.atom.mapped import CollectedWrites
from sae_lens_writesae.errors import DiskTooSmallError
from sae_lens_writesae.sae.collecting import collect
from sae_lens_writesae.sae.factors import FORMAT, INDEX, Collection, CollectionError
from sae_lens_writesae.sae.runner import source_of, training_config
from writesae.cli import main

WIDTH = 128


def collected(folder: Path, n_sequences: int, per_shard: int, tokens: int = 1024) -> Path:
    """A collection of random writes of one head."""
    g = torch.Generator().manual_seed(0)
    names = [f"shard-{n:05d}.safetensors" for n in range(n_sequences // per_shard)]
    index = {
        "format": FORMAT,
        "shape": [n_sequences, tokens],
        "sequences_per_shard": per_shard,
        "dtype": "float16",
        "model_name": "none",
        "heads": {"0": [0]},
        "layers": {"0": {"factors": {name: ["float16", [WIDTH]] for name in "ku"}}},
    }
    (folder / INDEX).write_text(json.dumps(index))
    for name in names:
        sides = {f"0.0.{side}": torch.randn(per_shard, tokens, WIDTH, generator=g).half() for side in "ku"}
        save_file({"tokens": torch.zeros(per_shard, tokens, dtype=torch.int32), **sides}, folder / name)
    write_checksums(folder, [INDEX, *names])
    return folder


def anonymous_bytes() -> int:
    """Memory of this process that no file backs."""
    line = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert line
    return 1024 * int(line[1])


needs_linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="counts memory as Linux tells it")


@needs_linux
def test_neither_a_text_nor_its_tokens_are_held(
    model: HookedRecurrent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All tokens are made before the disk is found too small."""
    n, length = 16_000, 512
    held: list[int] = []

    def stream() -> Iterator[dict[str, torch.Tensor]]:
        for _ in range(n):
            held.append(anonymous_bytes())
            yield {"input_ids": torch.randint(1, 64, (length,))}

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=0))
    text = IterableDataset.from_generator(stream)
    with pytest.raises(DiskTooSmallError):
        collect(model, text, [0], [0], tmp_path, context_size=length, batch_size=1, progress=False)
    assert len(held) == n and 8 * (max(held) - held[1]) < 4 * n * length


@needs_linux
def test_training_holds_no_more_than_a_quarter_of_the_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The dictionary is the one of writes in memory, to the last bit."""
    collection = Collection.open(collected(tmp_path, 320, 40))
    sizes = {"training_tokens": 128 * 200, "train_batch_size_tokens": 128, "verbose": False, "device": "cpu"}
    cfg = training_config(collection, 0, 0, d_sae=64, **sizes)
    held = [anonymous_bytes()]
    step = torch.optim.Adam.step

    def watched_step(*arguments: object) -> object:
        held.append(anonymous_bytes())
        return step(*arguments)

    monkeypatch.setattr(torch.optim.Adam, "step", watched_step)
    from_disk = train(cfg, collection)
    assert 4 * (max(held) - held[0]) < collection.total_bytes
    in_memory = train(cfg, LowRank(*(side[:] for side in collection.factors(0, 0))))
    assert all(torch.equal(x, y) for x, y in zip(from_disk.parameters(), in_memory.parameters(), strict=True))


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of a collection, whose files lie in the folder of the test as well."""
    monkeypatch.setattr(files, "COPIES", tmp_path / "copies")
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    for file in collected(tmp_path, 3, 1, tokens=64).iterdir():
        memory.pipe_file(f"/writes/{file.name}", file.read_bytes())
    return "memory://writes"


def test_an_address_is_copied_as_it_is_read_and_compared(elsewhere: str, tmp_path: Path) -> None:
    collection = Collection.open(elsewhere)
    assert not list((tmp_path / "copies").rglob("*.safetensors"))
    local = Collection.open(tmp_path)
    assert collection.sha256 == local.sha256 and torch.equal(collection.rows(0, 0), local.rows(0, 0))
    fsspec.filesystem("memory").rm("/writes/shard-00001.safetensors")
    assert torch.equal(Collection.open(elsewhere).rows(0, 0), local.rows(0, 0))  # of the copies
    copy = collection.folder / "shard-00001.safetensors"
    copy.write_bytes(copy.read_bytes()[:-1] + b"x")
    with pytest.raises(CollectionError, match=r"shard-00001.*expected the SHA-256"):
        Collection.open(elsewhere).rows(0, 0)
    with pytest.raises(CollectionError, match=r"memory://writes: expected .* shard-00001.* got FileNotFoundError"):
        Collection.open(elsewhere).rows(0, 0)
    with pytest.raises(CollectionError, match=r"nowhere: expected an address .* SHA256SUMS .* got FileNotFoundError"):
        Collection.open("memory://nowhere")
    with pytest.raises(CollectionError, match=r"^none://a: expected an address[^\n]*got ValueError: Protocol[^\n]*$"):
        Collection.open("none://a")


def test_copies_that_nobody_opened_for_a_month_are_removed(elsewhere: str) -> None:
    copies = [Collection.open(elsewhere).folder]
    for days in (29, 31):
        copies.append(files.COPIES / f"{days}")
        copies[-1].mkdir()
        (copies[-1] / CHECKSUMS).touch()
        os.utime(copies[-1] / CHECKSUMS, (0, time.time() - 86_400 * days))
    os.utime(copies[0] / CHECKSUMS, (0, 0))
    Collection.open(elsewhere)  # whose own date is that of today
    assert [copy.exists() for copy in copies] == [True, True, False]


@pytest.mark.nightly  # which installs both
def test_a_bucket_is_an_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a server that speaks as S3 does."""
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0)
    s3fs = pytest.importorskip("s3fs")
    monkeypatch.setattr(files, "COPIES", tmp_path / "copies")
    server.start()
    host, port = server.get_host_and_port()
    environment = {"ENDPOINT_URL": f"http://{host}:{port}", "ACCESS_KEY_ID": "any", "SECRET_ACCESS_KEY": "any"}
    for name, value in environment.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    bucket = s3fs.S3FileSystem()
    bucket.mkdir("writes")
    for file in collected(tmp_path, 3, 1, tokens=64).iterdir():
        bucket.put_file(str(file), f"writes/{file.name}")
    rows = Collection.open("s3://writes").rows(0, 0)
    server.stop()
    assert torch.equal(rows, Collection.open(tmp_path).rows(0, 0))


def test_the_command_trains_on_an_address(elsewhere: str, tmp_path: Path) -> None:
    """To the same bytes; a config names the address, so that it is opened again."""
    sizes = ["--d-sae", "8", "--training-tokens", "512", "--train-batch-size-tokens", "64", "--no-summary"]
    weights = []
    for name, collection in (("here", str(tmp_path)), ("there", elsewhere)):
        out = tmp_path / name
        main(["train", "--collection", collection, *sizes, "--out", str(out)])
        weights.append((out / "L0H0/write-seed0/sae/sae_weights.safetensors").read_bytes())
    assert weights[0] == weights[1]
    cfg = training_config(Collection.open(elsewhere), 0, 0, training_tokens=512, d_sae=8)
    assert cfg.cached_activations_path == elsewhere and isinstance(source_of(cfg, None), CollectedWrites)
