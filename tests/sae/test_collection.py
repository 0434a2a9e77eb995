"""Reading collections: damaged folders are refused by the name of the file, and dictionaries train from whole ones."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sealing import damages
from torch import Tensor

from hookpoints import HookedRecurrent
from sae_lens_writesae.sae.collect import collect
from sae_lens_writesae.sae.collection import INDEX, Collection, CollectionError, Contents, Mapped, Source, shard_name

LAYER, HEAD, T = 2, 1, 16
TOKENS = torch.randint(1, 64, (40, T), generator=torch.Generator().manual_seed(4))


def make(hf, folder: Path, **changes: Any) -> Collection:
    model = HookedRecurrent.from_hf(hf)
    settings: dict[str, Any] = {"targets": ("write", "state"), "dtype": "float32", "batch_size": 4, "shard_bytes": 1}
    try:
        return collect(model, TOKENS, [LAYER], [HEAD, 3], folder, **settings | changes)
    finally:
        model.attachment.detach()


@pytest.fixture(scope="module")
def folder(hf, tmp_path_factory):
    """Ten shards of four sequences."""
    folder = tmp_path_factory.mktemp("collection")
    assert len(make(hf, folder).shards) == 10
    return folder


@pytest.fixture
def copy(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / "copy"))


# ------------------------------------------------------------------------------------------------ rows over files


def test_rows_over_files_index_like_one_tensor():
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(23, 3, 2, generator=generator)
    mapped = Mapped(whole.split([5, 1, 10, 7]))
    assert len(mapped) == 23 and mapped.shape == whole.shape and mapped.dtype == whole.dtype and mapped.ndim == 3
    slices = [
        slice(None),
        slice(3, 17),
        slice(5, 6),
        slice(-4, None),
        slice(9, 2),
        slice(1, 20, 3),
        slice(None, None, -1),
    ]
    for index in slices[:-1]:
        assert torch.equal(mapped[index], whole[index])
    lists: list[Any] = [[0, 22, 5, 5, -1], [], torch.randint(-23, 23, (50,), generator=generator)]
    for index in [*lists, torch.rand(23, generator=generator) > 0.5]:
        assert torch.equal(mapped[index], whole[index])
    assert torch.equal(mapped[7], whole[7]) and torch.equal(mapped[-1], whole[-1])
    for wrong in ([23], [-24], torch.tensor([0, 99])):
        with pytest.raises(IndexError):
            mapped[wrong]


def test_a_slice_within_a_shard_is_a_view_of_the_file(folder):
    keys, _ = Collection.open(folder).factors(LAYER, HEAD)
    part = keys.parts[1]
    assert keys[4 * T : 8 * T].data_ptr() == part.data_ptr() and len(part) == 4 * T


# ------------------------------------------------------------------------------------------------ bad folders


def test_whole_collections_open(folder, hf):
    model = HookedRecurrent.from_hf(hf)
    found = Collection.open(folder, model=model, dtype="float32", verify=True)
    model.attachment.detach()
    moved = HookedRecurrent.from_hf(hf, name="the same in another folder")
    assert Collection.open(folder, model=moved).contents == found.contents
    moved.attachment.detach()
    assert torch.equal(found.tokens, TOKENS) and found.context_size == T and found.n_sequences == 40


def refused(folder: Path, name: str, **asked: Any) -> None:
    with pytest.raises(CollectionError) as raised:
        Collection.open(folder, **asked)
    assert str(folder / name) in str(raised.value)


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.999])
def test_a_cut_file_is_refused(copy, share):
    for name in (shard_name(3), INDEX):
        data = (copy / name).read_bytes()
        (copy / name).write_bytes(data[: int(share * len(data))])
        refused(copy, name)
        (copy / name).write_bytes(data)


def test_missing_files_are_refused(copy, tmp_path):
    (copy / shard_name(9)).unlink()
    refused(copy, shard_name(9))
    (copy / INDEX).unlink()
    refused(copy, INDEX)
    refused(tmp_path / "nowhere", INDEX)


def test_shards_in_each_others_place_are_refused(copy):
    first, second = (copy / shard_name(n) for n in (2, 5))
    one, other = first.read_bytes(), second.read_bytes()
    assert len(one) == len(other)
    first.write_bytes(other)
    refused(copy, shard_name(2))
    first.write_bytes(one)
    assert Collection.open(copy, verify=True)


def test_shards_of_another_collection_are_refused(copy, hf, tmp_path):
    """Of the same sizes: another text; and stale ones, of a run with other settings."""
    model = HookedRecurrent.from_hf(hf)
    settings: dict[str, Any] = {"targets": ("write", "state"), "dtype": "float32", "batch_size": 4, "shard_bytes": 1}
    other = collect(model, TOKENS.flip(0), [LAYER], [HEAD, 3], tmp_path / "other", **settings)
    model.attachment.detach()
    assert (other.folder / shard_name(4)).stat().st_size == (copy / shard_name(4)).stat().st_size
    shutil.copy(other.folder / shard_name(4), copy / shard_name(4))
    refused(copy, shard_name(4))


def test_a_changed_number_is_found_by_its_hash(copy):
    file = copy / shard_name(6)
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)
    refused(copy, shard_name(6), verify=True)
    opened = Collection.open(copy)
    for read in (lambda: opened.tokens, lambda: opened.rows(LAYER, HEAD), lambda: opened.factors(LAYER, 3)):
        with pytest.raises(CollectionError, match=file.name):
            read()


def read(folder: Path) -> list[Tensor]:
    """Everything that a collection gives."""
    found = Collection.open(folder)
    both = [found.recurrence(LAYER, head) for head in (HEAD, 3)]
    factors = [x for recurrence in both for x in vars(recurrence).values() if isinstance(x, Tensor)]
    return [found.tokens, *factors, *(recurrence.states() for recurrence in both)]


def test_a_damaged_collection_is_told(copy):
    """Or what it gives is the same: a number that differs by one bit is a valid number."""
    whole = read(copy)
    names = [*(shard_name(number) for number in range(10)), INDEX]
    silent, told = [], 0
    for what in damages(copy, names, 220):
        try:
            found = read(copy)
        except CollectionError as error:
            assert str(copy) in str(error)
            told += 1
        else:
            silent += [what] * (not all(map(torch.equal, found, whole)))
    assert not silent and told > 200
    assert all(map(torch.equal, read(copy), whole))


def test_no_shard_lies_elsewhere(copy):
    """Not by its name in the index, and not by a link."""
    shutil.copytree(copy, copy.parent / "elsewhere")
    index = json.loads((copy / INDEX).read_text())
    index["shards"][3]["file"] = f"../elsewhere/{shard_name(3)}"
    (copy / INDEX).write_text(json.dumps(index))
    refused(copy, INDEX)
    shutil.copy(copy.parent / "elsewhere" / INDEX, copy)
    for name in (shard_name(3), INDEX):
        (copy / name).unlink()
        (copy / name).symlink_to(copy.parent / "elsewhere" / name)
        refused(copy, name)
        (copy / name).unlink()
        shutil.copy(copy.parent / "elsewhere" / name, copy)
    assert Collection.open(copy, verify=True)


def test_other_versions_and_other_files_are_refused(copy):
    index = json.loads((copy / INDEX).read_text())
    for wrong in ({**index, "contents": {**index["contents"], "format": 99}}, {}, [], {"contents": 3}, 7):
        (copy / INDEX).write_text(json.dumps(wrong))
        refused(copy, INDEX)
    (copy / INDEX).write_text("[" * 100_000)
    refused(copy, INDEX)


def changed(folder: Path, **changes: Any) -> dict[str, Any]:
    """An index with other contents, written; fields of the layer, of its factors, or of the whole."""
    index = json.loads((folder / INDEX).read_text())
    contents = index["contents"]
    (layer,) = contents["layers"].values()
    for name, value in changes.items():
        place = layer["factors"] if name in layer["factors"] else layer if name in layer else contents
        place[name] = place[name] | value if isinstance(value, dict) else value
    (folder / INDEX).write_text(json.dumps(index))
    return contents


@pytest.mark.parametrize(
    "changes",
    [
        {"n_sequences": 0},
        {"n_sequences": "40"},
        {"sequences_per_shard": 0},
        {"targets": ["other"]},
        {"K": 10**9},
        {"R": 7},
        {"heads": "ab"},
        {"scale": "1"},
        {"k": {"dtype": "nn"}},
        {"u": {"shape": [10**9]}},
    ],
    ids=str,
)
def test_an_index_that_cannot_be_is_refused(copy, changes):
    changed(copy, **changes)
    refused(copy, INDEX)


@pytest.mark.parametrize(
    "changes", [{"context_size": 10**12}, {"heads": list(range(10**5))}, {"k": {"dtype": "float16"}}], ids=lambda _: ""
)
def test_an_index_that_claims_more_than_its_shards_have_is_refused(copy, changes):
    """Though each shard says that it is of this collection, as those of a stranger may."""
    contents = Contents.from_dict(changed(copy, **changes))
    file = copy / shard_name(0)
    save_file(load_file(file), file, metadata=contents.metadata(0))
    index = json.loads((copy / INDEX).read_text())
    index["shards"][0]["bytes"] = file.stat().st_size
    (copy / INDEX).write_text(json.dumps(index))
    refused(copy, f"{shard_name(0)} has other tensors")


def test_an_unfinished_collection_is_refused(copy):
    index = json.loads((copy / INDEX).read_text())
    (copy / INDEX).write_text(json.dumps({**index, "shards": index["shards"][:4]}))
    refused(copy, INDEX)


@pytest.mark.parametrize("change", ["model_dtype", "tokenizer", "weights", "revision"])
def test_a_collection_of_another_model_is_refused(folder, hf, change):
    model = HookedRecurrent.from_hf(hf)
    own = Source.of(model)
    model.attachment.detach()
    there = Collection.open(folder).contents.source
    there.check(folder / INDEX, own)
    with pytest.raises(CollectionError, match=change):
        there.check(folder / INDEX, replace(own, **{change: "another"}))


def test_another_dtype_and_a_changed_index_are_refused(copy):
    refused(copy, INDEX, dtype="float16")
    index = json.loads((copy / INDEX).read_text())
    index["contents"]["source"]["weights"] = "another"
    (copy / INDEX).write_text(json.dumps(index))
    refused(copy, shard_name(0))  # which says what it is of


def test_hashes_tell_weights_dtypes_and_tokenizers_apart(hf, embedded):
    model = HookedRecurrent.from_hf(hf)
    own = Source.of(model)
    weight = next(hf.parameters())
    before = weight.data[3, 2].clone()
    weight.data[3, 2] += 1e-3
    assert Source.of(model).weights != own.weights
    weight.data[3, 2] = before
    assert Source.of(model) == own and own.tokenizer is None
    model.attachment.detach()
    shipped = Source.of(embedded)
    embedded.to_tokens(["one", "two words"], padding_side="left")  # sets padding in the tokenizer
    assert Source.of(embedded) == shipped and shipped.tokenizer is not None


def test_what_was_not_collected_is_said(folder, hf, tmp_path):
    found = Collection.open(folder)
    for layer, head in ((0, HEAD), (LAYER, 0)):
        with pytest.raises(CollectionError, match=f"head {head} of layer {layer}"):
            found.factors(layer, head)
    writes = make(hf, tmp_path, targets=("write",))
    assert set(writes.contents.layers[LAYER].factors) == {"k", "u"}
    assert torch.equal(writes.rows(LAYER, HEAD), found.rows(LAYER, HEAD))
    for read in (
        lambda: writes.recurrence(LAYER, HEAD),
        lambda: writes.rows(LAYER, HEAD, "state"),
        lambda: writes.head_target(LAYER, HEAD, "last_state"),
    ):
        with pytest.raises(CollectionError, match="only writes"):
            read()


# ------------------------------------------------------------------------------------------------ training
