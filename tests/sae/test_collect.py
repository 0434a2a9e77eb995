"""Collecting: what is written is what the model computes; kills, full disks and other processes harm nothing."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from filelock import FileLock

from hookpoints import HookedRecurrent, UnknownHookError, UnsupportedModelError
from hookpoints import embedded as shipped
from sae_lens_writesae.errors import DiskTooSmallError
from sae_lens_writesae.sae import collect as module
from sae_lens_writesae.sae.collect import collect
from sae_lens_writesae.sae.collection import INDEX, Collection, CollectionError, shard_name
from sae_lens_writesae.sae.runner import text_dataset
from tests.conftest import make_hf
from writesae.cli import main

LAYERS, HEADS, BATCH, T = (0, 2), (1, 3), 2, 16
TOKENS = torch.randint(1, 64, (22, T), generator=torch.Generator().manual_seed(3))
FACTORS = ("k", "u", "q", "log_decay", "a", "b", "beta")


def small(model, folder, **changes):
    """Eleven batches in six shards."""
    settings: dict[str, Any] = {"targets": ("write", "state"), "batch_size": BATCH, "shard_bytes": 27_000}
    settings |= {"dtype": "float32"}
    return collect(model, TOKENS, LAYERS, HEADS, folder, **settings | changes)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


@pytest.fixture(scope="module")
def whole(hf, tmp_path_factory):
    """The files of a collection that nothing stopped."""
    model = HookedRecurrent.from_hf(hf)
    folder = tmp_path_factory.mktemp("whole")
    small(model, folder)
    model.attachment.detach()
    found = contents(folder)
    assert len(found) == 7
    return found


@pytest.mark.parametrize("model_type", ["qwen3_5", "mamba2", "kimi_linear", "rwkv7"])
def test_what_is_read_is_what_the_model_computes(model_type, tmp_path):
    """To the last bit in float32, over shards: factors, writes, states and last states."""
    model = HookedRecurrent.from_hf(make_hf(model_type))
    layer, head = model.cfg.recurrent_layers[-1], model.cfg.layer(model.cfg.recurrent_layers[-1]).H - 1
    targets = ("write", "state", "last_state")
    found = collect(
        model, TOKENS, [layer], None, tmp_path, targets=targets, dtype="float32", batch_size=4, shard_bytes=1
    )
    assert len(found.shards) == 6 and torch.equal(found.tokens, TOKENS)
    with torch.no_grad():
        batches = [model.recurrence(TOKENS[n : n + 4], layer) for n in range(0, 22, 4)]
    read = found.recurrence(layer, head)
    for name in FACTORS:
        value = getattr(read, name)
        if value is None:
            assert name == "beta" or getattr(batches[0], name) is None
            continue
        own = torch.cat([getattr(batch, name)[:, :, head : head + 1] for batch in batches])
        assert torch.equal(value, own), name
    assert read.scale == batches[0].scale and read.read_before_write == batches[0].read_before_write
    keys, values = found.factors(layer, head)
    assert keys.shape == (22 * T, read.R, read.K) and values.shape == (22 * T, read.R, read.V)
    assert torch.equal(keys[:].flatten(), read.k.flatten())
    assert torch.equal(values[:].flatten(), read.u.flatten())
    some = [9, 2, 21]
    for target in ("write", "state", "last_state"):
        hook = found.head_target(layer, head, target).hook_name
        _, cache = model.run_with_cache(TOKENS[some], names_filter=hook)
        own = cache[hook][:, -1] if target == "last_state" else cache[hook].flatten(0, 1)
        torch.testing.assert_close(found.rows(layer, head, target, some), own, rtol=0, atol=2e-6)
    model.attachment.detach()


@pytest.mark.parametrize(("dtype", "error"), [("float16", 1e-3), ("bfloat16", 1e-2)])
def test_two_bytes_keep_writes_and_states_to_their_rounding(model, tmp_path, dtype, error):
    exact, short = small(model, tmp_path / "32"), small(model, tmp_path / "16", dtype=dtype)
    assert short.dtype == dtype and short.factors(0, 1).keys.dtype == getattr(torch, dtype)
    for target in ("write", "state"):
        rows, kept = (each.rows(2, 3, target) for each in (exact, short))
        assert kept.dtype == torch.float32
        assert 0 < (kept - rows).norm() / rows.norm() < error


def test_the_size_is_said_exactly_and_a_small_disk_is_refused(model, tmp_path, monkeypatch):
    said: list[str] = []
    found = small(model, tmp_path / "one", say=said.append)
    size = sum((tmp_path / "one" / shard.file).stat().st_size for shard in found.shards)
    assert size == found.contents.total_bytes and f"{size} bytes" in said[0]
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=size - 1))
    with pytest.raises(DiskTooSmallError, match=str(size)):
        small(model, tmp_path / "two")
    assert not list((tmp_path / "two").glob("[!.]*"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=size))
    small(model, tmp_path / "two")


def test_writes_at_the_papers_size_take_512_bytes_a_token_and_head(model, tmp_path):
    """From the sizes of Qwen3.5-0.8B: K = V = 128."""
    from dataclasses import replace

    plan = small(model, tmp_path, targets=("write",), dtype="float16").contents
    layer = plan.layers[0]
    large = {name: replace(factor, shape=(128,)) for name, factor in layer.factors.items()}
    layers = {9: replace(layer, heads=tuple(range(16)), K=128, V=128, factors=large)}
    plan = replace(plan, layers=layers, n_sequences=10_000, context_size=1024, sequences_per_shard=32)
    assert 512 < plan.total_bytes / (10_000 * 1024 * 16) < 513


class Stop(Exception):
    pass


def test_nothing_is_computed_twice(model, tmp_path, monkeypatch, whole):
    """Stopped after one batch, then after two more, three more ...: a whole shard is two batches."""
    computed: list[int] = []
    factors = module._Run.factors

    def counting(run, tokens):
        if len(computed) == limit:
            raise Stop
        computed.append(int((tokens[0] == TOKENS).all(1).nonzero()))
        return factors(run, tokens)

    monkeypatch.setattr(module._Run, "factors", counting)
    for more in range(1, 12):
        start = len(computed)
        limit = start + more
        first = 2 * BATCH * len(list(tmp_path.glob("shard-*")))
        try:
            small(model, tmp_path)
            break
        except Stop:
            assert computed[start:] == list(range(first, 22, BATCH))[:more]
    assert contents(tmp_path) == whole and more == 5  # 0 + 2 + 2 + 4 + 3 batches are kept
    limit = len(computed)
    small(model, tmp_path)  # finished: nothing is computed


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_twenty_kills_at_random_moments_leave_the_files_of_a_run_without(model, tmp_path, whole):
    begin = time.monotonic()
    small(model, tmp_path / "timing")
    length = time.monotonic() - begin
    draw, kills, folders, stopped_at = random.Random(0), 0, 0, set()
    while kills < 20:
        folder = tmp_path / str(folders)
        process = os.fork()
        if process == 0:
            try:
                small(model, folder)
            finally:
                os._exit(0)
        time.sleep(draw.uniform(0, length))
        os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        if os.WIFSIGNALED(status):
            kills += 1
            stopped_at.add(len(list(folder.glob("shard-*"))) if folder.exists() else None)
        else:
            assert contents(folder) == whole
            folders += 1
    small(model, folder)
    assert contents(folder) == whole
    assert len(stopped_at) > 2, stopped_at


@pytest.mark.parametrize("loss", ["index", "unlisted"])
def test_whole_shards_that_the_index_does_not_list_are_kept(model, tmp_path, whole, loss):
    for name, data in whole.items():
        (tmp_path / name).write_bytes(data)
    if loss == "index":
        (tmp_path / INDEX).unlink()
    else:
        index = json.loads(whole[INDEX])
        (tmp_path / INDEX).write_text(json.dumps(index | {"shards": index["shards"][:2]}))
    (tmp_path / f".{shard_name(3)}.abc").write_text("of a killed run")
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("shard-*")}
    small(model, tmp_path)
    assert contents(tmp_path) == whole
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("shard-*")} == times


def test_shards_that_were_deleted_are_collected_again_and_foreign_ones_refused(model, tmp_path, whole):
    for name, data in whole.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / shard_name(0)).unlink()
    (tmp_path / shard_name(3)).write_bytes(whole[shard_name(3)][:500])
    with pytest.raises(CollectionError, match=shard_name(3)):
        small(model, tmp_path)
    (tmp_path / shard_name(3)).unlink()
    small(model, tmp_path)
    assert contents(tmp_path) == whole
    (tmp_path / shard_name(6)).write_bytes(whole[shard_name(5)])
    with pytest.raises(CollectionError, match=shard_name(6)):
        small(model, tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "float16"},
        {"targets": ("write",)},
        {"batch_size": 4},
        {"n_tokens": 10 * T},
        {"layers": (0,)},
        {"heads": (1,)},
        {"text": TOKENS.flip(0)},
    ],
)
def test_a_folder_of_another_collection_is_not_touched(model, tmp_path, whole, changes):
    for name, data in whole.items():
        (tmp_path / name).write_bytes(data)
    given: dict[str, Any] = {"text": TOKENS, "layers": LAYERS, "heads": HEADS} | changes
    text, layers, heads = (given.pop(name) for name in ("text", "layers", "heads"))
    settings: dict[str, Any] = {"targets": ("write", "state"), "batch_size": BATCH, "dtype": "float32"} | given
    with pytest.raises(CollectionError, match=r"index\.json"):
        collect(model, text, layers, heads, tmp_path, **settings)
    assert contents(tmp_path) == whole


def test_another_models_folder_is_refused(tmp_path, whole):
    for name, data in whole.items():
        (tmp_path / name).write_bytes(data)
    other = HookedRecurrent.from_hf(make_hf(seed=1))
    with pytest.raises(CollectionError, match="weights"):
        small(other, tmp_path)
    with pytest.raises(CollectionError, match="weights"):
        Collection.open(tmp_path, model=other)
    other.attachment.detach()


def test_two_processes_do_not_collect_into_one_folder(model, tmp_path):
    with FileLock(tmp_path / ".lock"), pytest.raises(CollectionError, match=r"\.lock"):
        small(model, tmp_path)


def test_a_folder_that_cannot_be_written_is_said(model, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(CollectionError, match="cannot be written"):
        small(model, tmp_path / "file" / "below")
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    if not os.access(locked, os.W_OK):  # root may write anywhere
        with pytest.raises(CollectionError, match="cannot be written"):
            small(model, locked)


def test_a_disk_that_fills_up_keeps_whole_shards(model, tmp_path, monkeypatch, whole):
    save, calls = module.save_file, iter(range(100))

    def full(*args, **kwargs):
        if next(calls) == 3:
            raise OSError(28, "No space left on device")
        save(*args, **kwargs)

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(CollectionError, match="No space left"):
        small(model, tmp_path)
    assert sorted(contents(tmp_path)) == [INDEX, *(shard_name(n) for n in range(3))]
    small(model, tmp_path)
    assert contents(tmp_path) == whole


def test_values_beyond_a_dtype_are_refused_by_name(tmp_path):
    """A Mamba-2 layer writes as large as its weights say."""
    hf = make_hf("mamba2")
    with torch.no_grad():
        for mixer in hf.modules():
            if hasattr(mixer, "dt_bias"):
                mixer.dt_bias.fill_(1e5)  # pyright: ignore
    model = HookedRecurrent.from_hf(hf)
    size = model.recurrence(TOKENS, 1).u.abs().max()
    assert size > torch.finfo(torch.float16).max
    with pytest.raises(CollectionError, match=r"u of layer 1.*float16"):
        collect(model, TOKENS, [1], None, tmp_path / "16", dtype="float16")
    assert collect(model, TOKENS, [1], None, tmp_path / "auto").dtype == "bfloat16"
    model.attachment.detach()


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"layers": [1, 1]}, ValueError),
        ({"layers": []}, ValueError),
        ({"layers": [3]}, UnsupportedModelError),
        ({"layers": [77]}, UnsupportedModelError),
        ({"heads": [9]}, UnknownHookError),
        ({"heads": []}, ValueError),
        ({"targets": ("reads",)}, ValueError),
        ({"dtype": "float64"}, ValueError),
        ({"batch_size": 0}, ValueError),
        ({"n_tokens": 10**6}, ValueError),
        ({"n_tokens": 5}, ValueError),
        ({"text": TOKENS.float()}, ValueError),
        ({"text": TOKENS[0]}, ValueError),
        ({"text": Dataset.from_dict({"words": ["a"]})}, ValueError),
    ],
)
def test_bad_input_is_refused_before_anything_is_made(model, tmp_path, changes, error):
    given: dict[str, Any] = {"text": TOKENS, "layers": [0], "heads": [0]} | changes
    text, layers, heads = (given.pop(name) for name in ("text", "layers", "heads"))
    with pytest.raises(error):
        collect(model, text, layers, heads, tmp_path / "new", **given)
    assert not (tmp_path / "new").exists()


def test_a_dataset_of_text_gives_the_sequences_that_saelens_trains_on(embedded, tmp_path):
    text = text_dataset(shipped.text("train")[:20_000])
    found = collect(embedded, text, [2], [1], tmp_path, n_tokens=20 * 32 + 5, context_size=32)
    joined = torch.cat([embedded.to_tokens(each, prepend_bos=False, truncate=False)[0] for each in text["text"]])
    assert torch.equal(found.tokens.flatten(), joined[: 20 * 32])
    pretokenized = Dataset.from_dict({"tokens": found.tokens.tolist()})
    again = collect(embedded, pretokenized, [2], [1], tmp_path / "again", context_size=32)
    assert again.contents == found.contents


def test_the_command(capsys, tmp_path, monkeypatch, embedded):
    monkeypatch.setattr(HookedRecurrent, "from_pretrained", lambda name, **_: embedded)
    words = "collect --model embedded --layers 2 --heads 0 1 --n-tokens 2048 --context-size 64 --targets write state"
    main([*words.split(), "--out", str(tmp_path / "c")])
    said = capsys.readouterr().out.splitlines()
    found = Collection.open(tmp_path / "c", model=embedded)
    assert f"{found.contents.total_bytes} bytes" in said[0] and said[-1] == str(tmp_path / "c")
    assert found.dtype == "float16" and found.n_sequences == 32
    for wrong, status in ((["--layers", "0"], 2), (["--heads", "9"], 2), (["--n-tokens", "10"], 2)):
        with pytest.raises(SystemExit) as ended:
            main([*words.split(), *wrong, "--out", str(tmp_path / "d")])
        assert ended.value.code == status and len(capsys.readouterr().err.splitlines()) == 1
