"""Collections: what is written is what the model computes, and a run that was stopped is resumed."""

from __future__ import annotations

import json
import os
import resource
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tiny_models import make_hf
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from hookpoints import HookedRecurrent, UnknownHookError, UnsupportedModelError
from hookpoints import embedded as shipped
from hookpoints.errors import DamageWarning
from hookpoints.files import CHECKSUMS, write_checksums
from sae_lens_writesae.atom.mapped import Mapped
from sae_lens_writesae.errors import DiskTooSmallError
from sae_lens_writesae.files import size_text
from sae_lens_writesae.sae import collecting as module
from sae_lens_writesae.sae.collecting import collect
from sae_lens_writesae.sae.factors import INDEX, Collection, CollectionError
from sae_lens_writesae.sae.rows import head_rows
from sae_lens_writesae.sae.target import HeadHook
from sae_lens_writesae.sae.texts import text_dataset

LAYERS, HEADS, T = (0, 2), (1, 3), 16
TOKENS = torch.randint(1, 64, (22, T), generator=torch.Generator().manual_seed(3))
SHARDS = [f"shard-{number:05d}.safetensors" for number in range(6)]


def small(model: HookedRecurrent, folder: Path, **changes: Any) -> Collection:
    """Eleven batches in six shards."""
    arguments: dict[str, Any] = {"text": TOKENS, "layers": LAYERS, "heads": HEADS, "targets": ("write", "state")}
    arguments |= {"context_size": T, "batch_size": 2, "shard_bytes": 27_000, "dtype": "float32"}
    return collect(model, folder=folder, **arguments | changes)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".lock" != path.name}


@pytest.fixture(scope="module")
def complete(hf, tmp_path_factory) -> Path:
    """A collection that nothing stopped."""
    model, folder = HookedRecurrent.from_hf(hf), tmp_path_factory.mktemp("complete")
    small(model, folder)
    model.attachment.detach()
    assert sorted(contents(folder)) == sorted([*SHARDS, INDEX, CHECKSUMS])
    return folder


@pytest.fixture
def copy(complete, tmp_path) -> Path:
    return Path(shutil.copytree(complete, tmp_path / "copy"))


def refused(name: str, act: Any, *args: Any, **named: Any) -> None:
    """With the name of what is wrong."""
    with pytest.raises(CollectionError, match=name):
        act(*args, **named)


# ------------------------------------------------------------------------------------------------ what is collected


@pytest.mark.parametrize("model_type", ["qwen3_5", "mamba2", "kimi_linear", "rwkv7"])
def test_what_is_read_is_what_the_model_computes(model_type, tmp_path):
    """To the last bit in float32, over shards, of one head of several: factors, writes, states and last states."""
    model, targets = HookedRecurrent.from_hf(make_hf(model_type)), ("write", "state", "last_state")
    layer, head = model.cfg.recurrent_layers[-1], model.cfg.layer(model.cfg.recurrent_layers[-1]).H - 1
    collection = small(model, tmp_path, layers=[layer], heads=[head], targets=targets, batch_size=4, shard_bytes=1)
    assert len(list(tmp_path.glob("shard-*"))) == 6 and torch.equal(collection.tokens, TOKENS)
    with torch.no_grad():
        batches = [model.recurrence(TOKENS[n : n + 4], layer) for n in range(0, 22, 4)]
    read = collection.recurrence(layer, head)
    for name in ("k", "u", "q", "log_decay", "a", "b"):
        value, own = getattr(read, name), [getattr(batch, name) for batch in batches]
        assert (value is None) == (own[0] is None)
        assert value is None or torch.equal(value, torch.cat([x[:, :, head : head + 1] for x in own])), name
    assert read.scale == batches[0].scale and read.read_before_write == batches[0].read_before_write
    keys, values = collection.factors(layer, head)
    assert keys.shape == (22 * T, read.R, read.K) and values.shape == (22 * T, read.R, read.V)
    assert torch.equal(keys[:].flatten(), read.k.flatten()) and torch.equal(values[:].flatten(), read.u.flatten())
    some = [9, 2, 21]
    for target in targets:
        place = collection.head_target(layer, head, target)
        positions, carried = slice(*place.seqpos_slice), HeadHook.parse(place.hook_name).target
        _, cache = model.run_with_cache(TOKENS[some], names_filter=place.hook_name)
        rows = head_rows(collection.recurrence(layer, head, some), carried, "mse", positions)
        torch.testing.assert_close(rows, cache[place.hook_name][:, positions], rtol=0, atol=2e-6)
    model.attachment.detach()


def test_sizes_are_in_powers_of_ten() -> None:
    assert size_text(25e7) == "250 MB"


def test_progress_counts_tokens() -> None:
    """Of ten sequences five are there."""
    bar = module._token_bar(torch.zeros(10, 8), {"shard-1": range(5, 8), "shard-2": range(8, 10)}, progress=False)
    assert (bar.n, bar.total) == (40, 80)


def test_values_beyond_a_dtype_are_refused_by_name(tmp_path):
    """A Mamba-2 layer writes as large as its weights say."""
    hf = make_hf("mamba2")
    for mixer in (each for each in hf.modules() if hasattr(each, "dt_bias")):
        torch.nn.init.constant_(mixer.dt_bias, 1e5)
    model = HookedRecurrent.from_hf(hf)
    refused(r"1\.0\.u.*float16", collect, model, TOKENS, [1], None, tmp_path / "16", dtype="float16")
    assert collect(model, TOKENS, [1], None, tmp_path / "auto").dtype == "bfloat16"
    model.attachment.detach()


@pytest.mark.parametrize(
    ("numbers", "dtype"),
    [
        ([1.0, 2.0**11], "float16"),
        ([1.0, 2.0**12], "bfloat16"),  # 16 times as much is more than 65,504
        ([2.0**-20 + 2.0**-25], "bfloat16"),  # more than a thousandth of it is lost in float16
        ([2.0**125], "float32"),
    ],
)
def test_the_dtype_is_the_first_with_room_and_little_rounding(numbers, dtype):
    assert module._smallest_dtype([torch.tensor(numbers), torch.ones(3)]) == dtype


def test_the_size_is_said_and_a_small_disk_is_refused(model, complete, tmp_path, monkeypatch):
    lines: list[str] = []
    collection = Collection.open(complete)
    files = sum(file.stat().st_size for file in complete.glob("shard-*"))
    assert files - 6 * 4000 < collection.total_bytes < files  # without their headers
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=collection.total_bytes - 1))
    with pytest.raises(DiskTooSmallError, match=str(collection.total_bytes)):
        small(model, tmp_path, say=lines.append)
    assert len(lines) == 1 and f"{collection.total_bytes} bytes" in lines[0] and not contents(tmp_path)


def test_a_batch_is_what_its_memory_holds(model, tmp_path, monkeypatch):
    """A collection goes on with the batches that it began with."""
    sizes: list[int] = []
    for folder, limit in (("a", 4e5), ("b", 8e5), ("a", 8e5)):
        monkeypatch.setattr(module, "BATCH_BYTES", {"cpu": limit})
        small(model, tmp_path / folder, batch_size=None)
        sizes.append(json.loads((tmp_path / folder / INDEX).read_text())["batch_size"])
    assert sizes[0] == sizes[2] > 1 and sizes[1] - 2 * sizes[0] in (0, 1)


def test_a_pass_ends_at_the_op_of_the_last_layer_that_is_asked_for(model, tmp_path):
    fired: list[str | None] = []
    model.add_hook(lambda name: True, lambda _, hook: fired.append(hook.name))
    small(model, tmp_path, layers=[1])
    model.reset_hooks()
    assert "blocks.0.hook_resid_post" in fired and fired[-1] == "blocks.1.mixer.hook_read"


def test_a_dataset_of_text_gives_the_sequences_that_saelens_trains_on(embedded, tmp_path):
    text = text_dataset(shipped.text("train")[:20_000])
    collection = collect(embedded, text, [2], [1], tmp_path / "text", n_tokens=20 * 32 + 5, context_size=32)
    joined = torch.cat([embedded.to_tokens(each, prepend_bos=False, truncate=False)[0] for each in text["text"]])
    assert torch.equal(collection.tokens.flatten(), joined[: 20 * 32])
    file = tmp_path / "text.txt"
    file.write_text(shipped.text("train")[:20_000], encoding="utf-8")
    same_text = {
        "ids": Dataset.from_dict({"tokens": collection.tokens.tolist()}),
        "read once": (document for document in text["text"]),
        "file": str(file),
    }
    for name, each in same_text.items():
        collect(embedded, each, [2], [1], tmp_path / name, n_tokens=20 * 32 + 5, context_size=32)
        assert contents(tmp_path / name) == contents(tmp_path / "text"), name


def test_a_text_of_fewer_tokens_is_taken_whole_where_that_is_asked_for(model, tmp_path):
    assert small(model, tmp_path, n_tokens=10**6, or_fewer=True).n_sequences == 22


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"layers": [3]}, UnsupportedModelError),
        ({"heads": [9]}, UnknownHookError),
        ({"dtype": "int8"}, ValueError),
        ({"part": (2, 2)}, ValueError),
        ({"n_tokens": 10**6}, ValueError),
        ({"text": TOKENS.float()}, ValueError),
        ({"text": Dataset.from_dict({"words": ["a"]})}, ValueError),
    ],
)
def test_bad_input_is_refused_before_anything_is_made(model, tmp_path, changes, error):
    with pytest.raises(error):
        small(model, tmp_path / "new", **changes)
    assert not (tmp_path / "new").exists() or not contents(tmp_path / "new")


# ------------------------------------------------------------------------------------------------ stops


def test_what_kills_left_in_a_sealed_collection_goes(model, copy, complete):
    """Of a process that was killed after another one had sealed it."""
    left = [copy / ".tokens", copy / f".{SHARDS[0]}", *(copy / f".{name}.lock" for name in SHARDS)]
    for path in left:
        path.touch()
    small(model, copy)
    assert contents(copy) == contents(complete) and not any(path.exists() for path in left)


def test_a_full_disk_is_named_and_what_is_missing_is_collected_later(model, copy, complete):
    """A shard that was deleted, and what a kill left aside. The system refuses the write, as under a quota."""
    for name in (SHARDS[1], CHECKSUMS):
        (copy / name).unlink()
    (copy / f".{SHARDS[3]}").write_text("of a run that was killed after it finished the shard")
    aside = copy / f".{SHARDS[1]}.{'0' * 32}.aside"
    aside.mkdir()
    os.utime(aside, (0, 0))
    times = {path.name: path.stat().st_mtime_ns for path in copy.glob("shard-*")}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError, match="cannot be written") as error:
            small(model, copy)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.value.filename == str(copy / SHARDS[1])
    assert {*contents(copy)} == {INDEX, ".tokens", f".{SHARDS[3]}", *times}
    small(model, copy)
    assert contents(copy) == contents(complete)
    assert all((copy / name).stat().st_mtime_ns == was for name, was in times.items())


@pytest.mark.parametrize(("seconds", "saved"), [(-1.0, 6), (60.0, 4)])
def test_a_run_that_is_stopped_within_a_shard_goes_on_where_it_last_saved(model, tmp_path, monkeypatch, seconds, saved):
    """The same files, and no batch that was saved runs again. A first batch runs twice, to be described."""
    passes: list[int] = []
    complete, folder = tmp_path / "complete", tmp_path / "stopped"
    small(model, complete, shard_bytes=54_000)  # of four batches

    def stop(_: torch.Tensor, hook: HookPoint) -> None:
        passes.append(1)
        if len(passes) == 8:  # the seventh batch, which is the third of its shard
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "SAVE_SECONDS", seconds)
    model.add_hook("blocks.0.mixer.hook_k", stop)
    with pytest.raises(KeyboardInterrupt):
        small(model, folder, shard_bytes=54_000)
    small(model, folder, shard_bytes=54_000)
    model.reset_hooks()
    assert contents(folder) == contents(complete) and len(passes) - 8 == 11 - saved


@pytest.mark.parametrize("damaged", [False, True])
def test_a_run_that_goes_on_takes_the_tokens_that_are_there(model, tmp_path, complete, damaged):
    """It reads the first sequence of the text, to compare it, and all of it where the tokens were damaged."""
    read: list[int] = []
    passes: list[int] = []

    def stream(n: int) -> Iterator[dict[str, Tensor]]:
        for row in TOKENS[:n]:
            read.append(1)
            yield {"tokens": row}

    def stop(_: Tensor, hook: HookPoint) -> None:
        passes.append(1)
        if len(passes) == 4:
            raise KeyboardInterrupt

    with pytest.raises(ValueError, match="expected 22 sequences or more, got 21 and the end of the text"):
        small(model, tmp_path, text=stream(21), n_tokens=22 * T)
    assert not contents(tmp_path) and not passes
    model.add_hook("blocks.0.mixer.hook_k", stop)
    with pytest.raises(KeyboardInterrupt):
        small(model, tmp_path, text=stream(22))
    model.reset_hooks()
    if damaged:
        (tmp_path / ".tokens").write_bytes(b"")
    refused("first_sequence", small, model, tmp_path, text=TOKENS.flip(0))
    read.clear()
    small(model, tmp_path, text=stream(22))
    assert contents(tmp_path) == contents(complete) and len(read) == (22 if damaged else 1)


@pytest.mark.parametrize(
    ("state", "damage"), [("sealed", "flipped"), ("unsealed", "cut"), ("part", "empty"), ("part", "flipped")]
)
def test_a_damaged_shard_is_named_set_aside_and_collected_again(model, copy, complete, state, damage):
    """Of a complete collection, of one that a kill left before it was sealed, and of what there is of a shard."""
    name = SHARDS[1]
    if state != "sealed":
        (copy / CHECKSUMS).unlink()
    if state == "part":
        (copy / name).rename(copy / f".{name}")
        name = f".{name}"
    data = bytearray((copy / name).read_bytes())
    data[-7] ^= 1
    damaged = {"flipped": bytes(data), "cut": bytes(data[:-100]), "empty": b""}[damage]
    (copy / name).write_bytes(damaged)
    times = {path.name: path.stat().st_mtime_ns for path in copy.glob("shard-*") if path.name != name}
    with pytest.warns(DamageWarning, match=f"{name} is damaged.*it is {name}.damaged now"):
        small(model, copy)
    assert contents(copy) == contents(complete) | {f"{name}.damaged": damaged}
    assert all((copy / name).stat().st_mtime_ns == was for name, was in times.items())


def test_a_batch_for_which_memory_runs_out_is_run_in_halves(model, tmp_path, complete):
    def few(value, hook):
        if len(value) > 1:
            raise torch.OutOfMemoryError

    model.add_hook("hook_embed", few)
    with pytest.warns(UserWarning, match="no memory for .* so they run in halves"):
        small(model, tmp_path)
    assert contents(tmp_path) == contents(complete)


# ------------------------------------------------------------------------------------------------ several processes


def forked(model: HookedRecurrent, folder: Path, rank: int, world: int) -> int:
    """A process that collects as one of several; its exit code is the number of passes."""
    if process := os.fork():
        return process
    passes: list[int] = []
    try:
        model.add_hook("hook_embed", lambda *_, **__: passes.append(1) or time.sleep(0.1))
        small(model, folder, text=({"tokens": row} for row in TOKENS), part=(rank, world), progress=False)
    except BaseException:
        os._exit(255)
    os._exit(len(passes))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_four_processes_share_the_shards_and_leave_the_files_of_one(model, tmp_path, complete):
    """No batch runs twice but the first, which the index describes."""
    started = [forked(model, tmp_path / "new", rank, 4) for rank in range(4)]
    passes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in started]
    assert min(passes) >= 1 and sum(passes) == 11 + 1, passes
    assert contents(tmp_path / "new") == contents(complete)


@pytest.mark.parametrize(
    ("changes", "differs"),
    [
        ({"dtype": "float16"}, "dtype"),
        ({"batch_size": 4}, "batch_size"),
        ({"heads": (1,)}, "heads"),
        ({"text": TOKENS.flip(0)}, "text"),
    ],
)
def test_a_folder_of_another_collection_is_not_touched(model, copy, complete, changes, differs):
    refused(f"{INDEX}.* {differs}", small, model, copy, **changes)
    assert contents(copy) == contents(complete)


def test_another_models_collection_is_refused(hf, copy, complete):
    """By its weights and their dtype; not by its name."""
    moved = HookedRecurrent.from_hf(hf, name="the same in another folder")
    assert Collection.open(copy, model=moved).heads == small(moved, copy).heads
    moved.attachment.detach()
    for other in (make_hf(seed=1), make_hf().double()):
        model = HookedRecurrent.from_hf(other)
        refused(" model", small, model, copy)
        refused(" model", Collection.open, copy, model=model)
        model.attachment.detach()
    assert contents(copy) == contents(complete)


def test_folders_of_earlier_formats_and_without_an_index_are_refused(model, copy):
    (copy / INDEX).write_text(json.dumps({"contents": {"format": 1}, "shards": []}))
    refused("format", small, model, copy)
    write_checksums(copy, [INDEX])
    refused("format", Collection.open, copy)
    (copy / INDEX).write_bytes(b"{")  # damaged: nothing else says what the shards hold
    refused("is damaged .* the same command collects it again", small, model, copy)


@pytest.mark.parametrize(
    "changes",
    [
        {"shape": [10**9, T]},
        {"shape": [10**9, T], "sequences_per_shard": 10**9 // 6},
        {"shape": "many"},
        {"shape": [22, 2 * T]},
        {"sequences_per_shard": 0},
    ],
    ids=str,
)
def test_sizes_that_the_shards_do_not_have_are_refused(copy, changes):
    """A seal shows that a folder is as someone wrote it, not who."""
    (copy / INDEX).write_text(json.dumps(json.loads((copy / INDEX).read_text()) | changes))
    write_checksums(copy, [INDEX, *SHARDS])
    refused("collect again", lambda: Collection.open(copy).tokens)


# ------------------------------------------------------------------------------------------------ reading


def test_rows_over_files_index_like_one_tensor():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(23, 3, 2, generator=generator)
    mapped = Mapped(rows.split([5, 1, 10, 7]))
    assert len(mapped) == 23 and mapped.shape == rows.shape and mapped.dtype == rows.dtype
    lists: list[Any] = [[0, 22, 5, 5, -1], [], torch.randint(-23, 23, (50,), generator=generator)]
    for index in [slice(None), slice(-4, None), slice(1, 20, 3), *lists, torch.rand(23, generator=generator) > 0.5]:
        assert torch.equal(mapped[index], rows[index]), index
    assert torch.equal(mapped.to(mapped.device), rows) and mapped.nbytes == rows.nbytes
    with pytest.raises(IndexError):
        mapped[[23]]


def test_what_was_not_collected_is_said(model, complete, tmp_path):
    collection, writes = Collection.open(complete), small(model, tmp_path, targets=("write",))
    for layer, head in ((1, 1), (2, 0)):
        refused(f"head {head} of layer {layer}", collection.factors, layer, head)
    refused("only writes", writes.recurrence, 2, 1)
    refused("only writes", writes.head_target, 2, 1, "last_state")
