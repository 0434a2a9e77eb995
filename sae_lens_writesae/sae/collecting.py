"""The pass over a text that makes a collection (`factors`): it writes shards, and resumes where it was stopped.

A shard that is there is whole; `SHA256SUMS` is written when all are. What there is of the next one is written to
`.shard-00001.safetensors` every minute, and taken up again. The text becomes tokens once, which lie in `.tokens` until
the end. Any number of processes may collect into one folder: each takes the next shard that no other one has locked.
"""

from __future__ import annotations

import json
import shutil
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import chain, islice, product
from pathlib import Path
from typing import Literal, NoReturn, TypeVar, get_args

import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.hook_points import HookPoint

from hookpoints import HookedRecurrent, Recurrence
from hookpoints.errors import ChecksumError
from hookpoints.files import (
    CHECKSUMS,
    aside_of,
    atomic_text,
    atomic_write,
    content_hash,
    file_hash,
    plain_file,
    read_json,
    set_aside,
    write_checksums,
)
from sae_lens_writesae.errors import DiskTooSmallError
from sae_lens_writesae.files import SAVE_SECONDS, in_turn, size_text
from sae_lens_writesae.sae.factors import (
    FORMAT,
    INDEX,
    Collection,
    CollectionError,
    CollectionIndex,
    FactorDtype,
    check_same,
    faded,
    model_hash,
    sequence_bytes,
    shard_spans,
)
from sae_lens_writesae.sae.target import Target, head_target
from sae_lens_writesae.sae.texts import Text, mapped_tokens, token_rows, write_tokens

T = TypeVar("T")

SHARD_BYTES = 64e6
"""Size of a shard at most, about; what is held in memory."""
BATCH_BYTES = {"cpu": 200e6, "cuda": 2e9}
"""Memory that a batch may take by itself, counted as in `_COPIES`, which is more than most take. At the sizes of
Qwen3.5-0.8B more tokens are no faster on a core: 280 a second in batches of 512, 210 in batches of 4096."""
_COPIES = 18
"""So many float32 copies of all keys and values of a layer are held at once, and two for each layer that is collected.
Measured with two such layers: 16 to 20 in Qwen3.5, 17 to 24 in Qwen3-Next, 13 to 26 in Mamba-2; in Mamba-1, whose
writes are dense, 66 to 83."""
_HEADROOM = 16
"""A first batch must leave this much of a dtype's range, since later ones may be larger."""
_ROUNDING: dict[FactorDtype, float] = {"float16": 1e-3, "bfloat16": 1e-2}
"""Largest relative error (Frobenius) with which a dtype may store a factor of the first batch."""
_TOKENS = ".tokens"
"""Token ids of all sequences, int32, of a collection that is not sealed."""
_LOCK = ".lock"
"""What processes lock to look at a folder or to seal it; a suffix of what they lock to collect a shard."""


def collect(
    model: HookedRecurrent,
    text: Text,
    layers: Sequence[int],
    heads: Sequence[int] | None,
    folder: str | Path,
    *,
    n_tokens: int | None = None,
    or_fewer: bool = False,
    context_size: int = 128,
    targets: Sequence[Target] = ("write",),
    dtype: FactorDtype | Literal["auto"] = "auto",
    batch_size: int | None = None,
    shard_bytes: float = SHARD_BYTES,
    part: tuple[int, int] = (0, 1),
    say: Callable[[str], object] = lambda line: None,
    progress: bool = True,
) -> Collection:
    """Run the model over a text once, and keep the factors of some heads.

    The same call resumes where an earlier one was stopped or killed, which loses a minute or a batch. The files are
    those of a run that was never stopped, bit for bit. A shard that was damaged since is renamed, with a DamageWarning,
    and collected again. A batch for which memory runs out is run in halves, with a warning.

    Several processes, on one machine or on some with a common folder, make one collection by the same call: each takes
    the next shard that no other one has. A process that has found none left waits for the last ones, and collects those
    of a process that died.

    Args:
        text: token ids [N,T]; a dataset, which may be streamed, with a column `text` (tokenized and joined, as SAELens
            does it), `tokens` or `input_ids`; a text file; or documents, one by one.
        heads: of every layer; None: all of them.
        n_tokens: rounded down to whole sequences; None: the whole text.
        or_fewer: take a text of fewer tokens than that whole, instead of refusing it.
        context_size: T, where the text is a dataset.
        targets: what dictionaries will be trained on. States need reads, decays and erases as well as writes.
        dtype: of keys, values and other vectors. `auto` takes float16 or bfloat16, the first in which a first batch is
            stored with a small rounding error and room for larger numbers, else float32.
        batch_size: sequences of one forward pass; None: what `BATCH_BYTES` holds by the sizes of the layers, and one
            at least. On it the last bits of results may depend.
        shard_bytes: size of a shard at most, about.
        part: (rank, world) of this process among several. It begins with its share of the shards that are missing, and
            checks its share of those that are there.
        say: is told the size, and of waiting for another process.
        progress: show a bar with tokens a second.

    Raises:
        DiskTooSmallError: the rest of the collection is larger than the room on the disk. Nothing was written.
        CollectionError: the folder holds another collection, or a value does not fit the dtype.
        OSError: the folder cannot be written. What is there stays, and the same call resumes.
        UnsupportedModelError, UnknownHookError: a layer or head that does not exist.
        ValueError: too short a text, or a bad setting.

    Cost: a forward pass of each batch up to the op of the highest layer (what follows does not run), a reading of the
    shards that are there, and in each process a pass over the weights for their hash. The first process makes the
    tokens of the text before any pass; if it is stopped meanwhile, it makes them again. The others, and a run that
    resumes, take these tokens and compare the first sequence. For a finished collection all are
    made again, to be compared.
    Memory: a shard, a document, and a batch of one layer's factors. The tokens take 4 bytes each on disk until the end.
    """
    folder = Path(folder)
    rank, world = part
    model.require_weights()
    if not layers or not targets or dtype not in ("auto", *get_args(FactorDtype)):
        raise ValueError(
            "layers, targets, dtype: expected one layer or more, one target or more, and auto, float16, bfloat16 or "
            f"float32, got {list(layers)}, {list(targets)} and {dtype!r}"
        )
    if not 0 <= rank < world:
        raise ValueError(f"part: expected a rank and the number of processes, which is larger, got {part}")
    chosen = _chosen_heads(model, layers, heads, targets)
    check_own(folder)
    # The text is a stream: its first sequence tells it from others before the rest is read.
    if isinstance(text, Tensor):
        context_size = text.shape[-1]
    rows = token_rows(model, text, context_size)
    first = list(islice(rows, 1))
    asked: CollectionIndex = {
        "format": FORMAT,
        "model": model_hash(model),
        "targets": sorted({*targets}),
        "heads": {str(layer): numbers for layer, numbers in chosen.items()},
        "n_tokens": n_tokens,
        "first_sequence": content_hash(first),
    }
    # What is left open is no part of what was asked: a resumed run takes what the first one chose.
    if batch_size is not None:
        asked["batch_size"] = max(1, batch_size)
    if dtype != "auto":
        asked["dtype"] = dtype
    lock = FileLock(folder / _LOCK)
    tokens = folder / _TOKENS
    # The first process makes the tokens and the index, and the others wait for it.
    with aside_of(tokens) as aside, lock:
        index: CollectionIndex = read_json(folder / INDEX) if (folder / INDEX).exists() else {}
        if not tokens.exists() or file_hash(tokens) != index.get("text"):
            tokens = aside / _TOKENS
            most = None if n_tokens is None else n_tokens // context_size
            least = 1 if or_fewer else most or 1
            n = write_tokens(chain(first, rows), tokens, least, most, progress)
            asked |= {"text": file_hash(tokens), "shape": [n, context_size]}
        check_same(folder, index or asked, asked)
        ids = mapped_tokens(tokens, context_size)
        index = index or _new_index(model, ids, asked, shard_bytes)
        shards = Shards(folder, index)
        # Before any work: what is there is checked, and the room for the rest.
        missing = shards.missing(part)
        shards.check_room(missing, say)
        # From here on the folder is that of this collection.
        atomic_text(folder / INDEX, json.dumps(index, indent=1))
        if missing:
            shards.seal.unlink(missing_ok=True)
            tokens.replace(folder / _TOKENS)
    # Each process takes shards that no other one has; whoever finds none missing seals the folder.
    with _token_bar(ids, missing, progress) as bar:
        while not shards.seal.exists():
            for name in shards.claimed(missing, part, say):
                shards.write(name, model, ids[missing[name]], bar)
            with lock:
                missing = shards.missing()  # another process may have come upon a damaged one
                if not missing:
                    shards.close()
    with lock:
        shards.remove_leftovers()
    return Collection.open(folder)


def _chosen_heads(
    model: HookedRecurrent, layers: Sequence[int], heads: Sequence[int] | None, targets: Sequence[Target]
) -> dict[int, list[int]]:
    """Numbers of the heads of each layer; raises where one is not there, or has no such target."""
    chosen = {layer: sorted({*(heads or range(model.cfg.layer(layer).H))}) for layer in sorted({*layers})}
    for layer, numbers in chosen.items():
        for head, target in product(numbers, targets):
            head_target(model, layer, head, target)
    return chosen


def _token_bar(ids: Tensor, missing: Mapping[str, range], progress: bool) -> tqdm[NoReturn]:
    """Tokens a second, from those on that are there."""
    n_missing = sum(map(len, missing.values()))
    return tqdm(
        total=ids.numel(),
        initial=(len(ids) - n_missing) * ids.shape[1],
        desc="collect",
        unit=" tokens",
        unit_scale=True,
        disable=not progress,
    )


def _new_index(model: HookedRecurrent, ids: Tensor, asked: CollectionIndex, shard_bytes: float) -> CollectionIndex:
    """What was asked for, and what the first batch showed."""
    size = asked.get("batch_size") or _sequences_in_a_batch(model, len(asked["heads"]), ids.shape[1])
    described = next(_by_halves(partial(_described_batch, model, asked=asked), ids[:size]))
    index: CollectionIndex = {"batch_size": size} | asked | model.origin() | described
    # Whole batches, so that a batch is the same in every run.
    batches = int(shard_bytes / sequence_bytes(index) // size)
    index["sequences_per_shard"] = max(1, batches) * size
    return index


def _sequences_in_a_batch(model: HookedRecurrent, n_layers: int, n_tokens: int) -> int:
    """As many sequences of `n_tokens` as `BATCH_BYTES` holds. Bytes a token are those of the widest recurrent layer, of
    its MLP, and of what is stored of `n_layers`."""
    cfg = model.cfg
    # Layers run one after the other, so that the widest one alone counts.
    widest = max(shape.H * shape.R * (shape.K + shape.V) for shape in cfg.layers.values())
    factors = 4 * (_COPIES + 2 * n_layers) * widest
    mlp = cfg.dtype.itemsize * (4 * cfg.d_model + 3 * (cfg.d_mlp or 0))
    limit = BATCH_BYTES["cuda" if cfg.device.type == "cuda" else "cpu"]
    return max(1, int(limit // (n_tokens * (factors + mlp))))


def check_own(folder: Path) -> None:
    """Raise CollectionError unless a folder has the index of a collection, or nothing but locks and what a killed run
    left."""
    file = folder / INDEX
    if not folder.exists() or (file.is_file() and not file.is_symlink() and "format" in _read_index(file)):
        return
    if foreign := [path for path in folder.iterdir() if not path.name.endswith(".aside") and path.name != _LOCK]:
        raise CollectionError(
            f"{folder}: expected an empty folder or a collection, got {min(foreign).name}; name another folder"
        )


def _read_index(file: Path) -> CollectionIndex:
    """What the index of a folder says. Without it nothing tells how its shards are to be read, so it is not made again
    on its own."""
    try:
        return read_json(file)
    except ValueError as error:
        raise CollectionError(
            f"{file} is damaged ({error}), and nothing else says what its shards hold: move {file.parent} away, and "
            "the same command collects it again"
        ) from error


# ------------------------------------------------------------------------------------------------ shards


class Shards:
    """The shards of a collection in a folder. A process claims one after the other, writes each, and the one that finds
    none missing seals the folder."""

    def __init__(self, folder: Path, index: CollectionIndex) -> None:
        self.folder = folder
        self.index = index
        self.spans = shard_spans(index)
        """Numbers of the sequences in each shard, by its name."""
        self.seal = folder / CHECKSUMS

    def missing(self, part: tuple[int, int] = (-1, 1)) -> dict[str, range]:
        """Those that are not there. Shards of a `part` are there if they are as they were written, the others if there
        is a file. Costs a reading of the part."""
        rank, world = part
        return {
            name: span
            for n, (name, span) in enumerate(self.spans.items())
            if not (_is_whole if n % world == rank else Path.exists)(self.folder / name)
        }

    def check_room(self, missing: Mapping[str, range], say: Callable[[str], object]) -> None:
        """Say how large the collection is; raise DiskTooSmallError where the rest of it does not fit on the disk."""
        sequence = sequence_bytes(self.index)
        total = sequence * self.index["shape"][0]
        rest = sequence * sum(map(len, missing.values()))
        free = shutil.disk_usage(self.folder).free
        sizes = (
            f"{total} bytes ({size_text(total)}), {size_text(rest)} to write in {len(missing)} shards, "
            f"{size_text(free)} free"
        )
        say(sizes)
        if rest > free:
            raise DiskTooSmallError(f"{self.folder}: {sizes}; take fewer tokens, layers or heads")

    def claimed(self, names: Iterable[str], part: tuple[int, int], say: Callable[[str], object]) -> Iterator[str]:
        """Each of the shards while this process has its lock, those that another process makes last."""
        for name in in_turn({name: self.folder / f".{name}{_LOCK}" for name in names}, part, say):
            if not (self.folder / name).exists():  # made by another process
                yield name

    def write(self, name: str, model: HookedRecurrent, ids: Tensor, bar: tqdm[NoReturn]) -> None:
        """Collect a shard, from what a killed run has of it. Every minute what there is is written aside."""
        file = self.folder / name
        aside = self.folder / f".{name}"
        size = self.index["batch_size"]
        saved = time.monotonic()
        parts = [load_file(aside)] if _is_whole(aside) else []
        collected = sum(len(part["tokens"]) for part in parts)
        bar.update(collected * ids.shape[1])
        for start in range(collected, len(ids), size):
            batch = ids[start : start + size]
            parts += _by_halves(partial(_stored_batch, model, index=self.index), batch)
            bar.update(batch.numel())
            is_last = start + size >= len(ids)
            if is_last or time.monotonic() - saved > SAVE_SECONDS:
                # Popped, so that each factor is held twice only while it is joined.
                joined = {factor: torch.cat([part.pop(factor) for part in parts]) for factor in list(parts[0])}
                sealed = partial(save_file, joined, metadata={"sha256": content_hash(joined)})
                atomic_write(file if is_last else aside, sealed)
                parts = [joined]
                saved = time.monotonic()
        aside.unlink(missing_ok=True)

    def close(self) -> None:
        """Seal the folder, unless another process did."""
        if not self.seal.exists():
            write_checksums(self.folder, (INDEX, *self.spans))

    def remove_leftovers(self) -> None:
        """Of a sealed collection, locks of shards and tokens go, and what a run left that was killed after it finished
        a shard, or while it waited for another one."""
        (self.folder / _TOKENS).unlink(missing_ok=True)
        for left in self.folder.glob(".shard-*"):
            if left.suffix in (".safetensors", _LOCK):
                left.unlink(missing_ok=True)


def _is_whole(file: Path) -> bool:
    """Whether a shard, or what there is of one, is there as it was written. One that is damaged is set aside. Costs a
    reading."""
    if not file.exists():
        return False
    try:
        with safe_open(plain_file(file.parent, file.name), framework="pt") as opened:
            expected = (opened.metadata() or {}).get("sha256")
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (it is no mapping)
    except (SafetensorError, ChecksumError) as error:
        set_aside(file, str(error))
        return False
    if content_hash(tensors) != expected:
        set_aside(file, "its numbers are not those of its checksum")
        return False
    return True


def _by_halves(work: Callable[[Tensor], T], ids: Tensor) -> Iterator[T]:
    """What `work` makes of a batch, or of its parts where memory runs out; Python shows the warning once."""
    try:
        result = work(ids)
    except torch.OutOfMemoryError:
        if len(ids) == 1:
            raise
    else:
        yield result
        return
    # Out of the handler, whose traceback holds what the batch had in memory.
    half = len(ids) // 2
    warnings.warn(
        f"collect: no memory for {len(ids)} sequences at once, so they run in halves; batch_size={half} asks for that",
        stacklevel=2,
    )
    for part in (ids[:half], ids[half:]):
        yield from _by_halves(work, part)


def _stored_batch(model: HookedRecurrent, ids: Tensor, *, index: CollectionIndex) -> dict[str, Tensor]:
    """What a shard has of a batch."""
    stored = {"tokens": ids}
    for layer, recurrence in _recorded_factors(model, ids, index).items():
        factors: dict[str, tuple[str, list[int]]] = index["layers"][layer]["factors"]
        if "q" in factors:
            _check_states(layer, recurrence, "beta" in factors)
        for (factor, (dtype, _)), (n, head) in product(factors.items(), enumerate(index["heads"][layer])):
            name = f"{layer}.{head}.{factor}"
            value: Tensor = getattr(recurrence, factor)[:, :, n].cpu()
            stored[name] = _rounded_factor(name, value, dtype)
    return stored


def _check_states(layer: str, r: Recurrence, along_key: bool) -> None:
    """Raise CollectionError unless the factors that are stored give a layer's states; `along_key`: its erase is stored
    as `beta` alone."""
    starts_from_zero = r.initial_state is None
    if not starts_from_zero or r.rates is not None or (along_key and not _erases_along_key(r)):
        raise CollectionError(
            f"layer {layer}: expected a first state of zeros, one form of erase, and no decay for each entry "
            "of the state (Mamba-1's writes can be collected, not its states)"
        )


def _rounded_factor(name: str, value: Tensor, dtype: str) -> Tensor:
    """A factor in the dtype of its file; raises CollectionError where it has a NaN, or a number beyond that dtype."""
    rounded = value.to(getattr(torch, dtype)).contiguous()
    # In half precision a number that is too large becomes infinite without a word.
    overflows = not torch.equal(rounded.isfinite(), value.isfinite())
    if overflows or value.isnan().any():
        raise CollectionError(
            f"{name} (layer, head, factor): expected numbers in the range of {dtype}, got "
            f"NaN, or up to {float(value.abs().nan_to_num().max()):.3g}; collect with dtype bfloat16 or "
            "float32 into a new folder"
        )
    return rounded


# ------------------------------------------------------------------------------------------------ factors of a pass


class _Enough(Exception):
    """Ends a pass."""


def _recorded_factors(model: HookedRecurrent, ids: Tensor, asked: CollectionIndex) -> dict[str, Recurrence]:
    """Factors of every layer and head asked for, on [B,T] tokens. The pass ends at the op of the last layer."""
    heads = {int(layer): heads for layer, heads in asked["heads"].items()}
    recurrences: dict[str, Recurrence] = {}

    def leave(_: Tensor, hook: HookPoint) -> None:
        layer = hook.layer()
        # Taken out of the record, which holds more of the layer than was asked for.
        recurrences[str(layer)] = record.pop(layer).recurrence.select(heads=heads[layer])
        if len(recurrences) == len(heads):
            raise _Enough

    hooks = [(f"blocks.{layer}.mixer.hook_read", leave) for layer in heads]
    with suppress(_Enough), torch.no_grad(), model.recording(heads) as record, model.hooks(hooks):
        model(ids.long().to(model.cfg.device), return_type=None)
    return recurrences


def _described_batch(model: HookedRecurrent, ids: Tensor, *, asked: CollectionIndex) -> CollectionIndex:
    """What an index says besides what was asked for, from the factors of a first batch: the dtype, and for each layer
    the dtype and shape (of one token and head) of every factor, and what states need besides."""
    layers: dict[str, CollectionIndex] = {}
    for layer, r in _recorded_factors(model, ids, asked).items():
        names = ["k", "u"]
        if asked["targets"] != ["write"]:
            erase = ["beta"] if _erases_along_key(r) else ["a", "b"]
            names += ["q", "log_decay", *erase]
        factors = {name: x for name in names if (x := getattr(r, name)) is not None}
        layers[layer] = {"factors": factors, "scale": r.scale, "read_before_write": r.read_before_write}
    # One number a head costs little, and stays in float32.
    vectors = [x for described in layers.values() for x in described["factors"].values() if x.ndim > 3]
    dtype = asked.get("dtype") or _smallest_dtype(vectors)
    for described in layers.values():
        for name, x in described["factors"].items():
            is_number = name == "beta" or x.ndim == 3
            described["factors"][name] = ["float32" if is_number else dtype, list(x.shape[3:])]
    return {"dtype": dtype, "layers": layers}


def _erases_along_key(r: Recurrence) -> bool:
    """Whether the erase is the delta rules', a = -beta k and b = alpha k, exactly."""
    if r.beta is None or r.a is None or r.b is None:
        return False
    return torch.equal(r.b, faded(r.k, r.log_decay)) and torch.equal(r.a, -r.beta[..., None] * r.k)


def _smallest_dtype(factors: Sequence[Tensor]) -> FactorDtype:
    """The first of float16, bfloat16 and float32 that keeps these factors well, with room for larger ones."""
    finite = [x.float().nan_to_num(0, 0, 0) for x in factors]

    def fits(x: Tensor, dtype: torch.dtype, limit: float) -> bool:
        if _HEADROOM * x.abs().max() > torch.finfo(dtype).max:
            return False
        error = (x.to(dtype).float() - x).norm()
        return bool(error <= limit * x.norm())

    for name, limit in _ROUNDING.items():
        if all(fits(x, getattr(torch, name), limit) for x in finite):
            return name
    return "float32"
