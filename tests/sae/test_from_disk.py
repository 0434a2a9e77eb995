"""Texts and collections that are larger than memory."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from datasets import IterableDataset
from safetensors.torch import save_file

from hookpoints import HookedRecurrent
from hookpoints.files import write_checksums
from sae_lens_writesae import train
from sae_lens_writesae.atom.low_rank import LowRank
from sae_lens_writesae.errors import DiskTooSmallError
from sae_lens_writesae.sae.collecting import collect
from sae_lens_writesae.sae.factors import FORMAT, INDEX, Collection
from sae_lens_writesae.sae.runner import training_config

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
