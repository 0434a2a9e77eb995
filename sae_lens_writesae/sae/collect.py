"""One pass of a language model over a text writes the factors of many heads to disk.

Killed at any moment, the next run goes on at the last whole shard, and the folder ends up with the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from datasets import Dataset
from filelock import FileLock, Timeout
from sae_lens.tokenization_and_batching import concat_and_batch_sequences
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from hookpoints import HookedRecurrent, Recurrence
from hookpoints.files import file_hash
from sae_lens_writesae.errors import DiskTooSmallError
from sae_lens_writesae.files import atomic_text, atomic_write, free_bytes, size_text
from sae_lens_writesae.sae.collection import (
    INDEX,
    Collection,
    CollectionError,
    Contents,
    Factor,
    FactorDtype,
    Layer,
    ShardFile,
    Source,
    check_same,
    check_shard,
    index_text,
    read_index,
    shard_name,
    tensor_hash,
)
from sae_lens_writesae.sae.target import Target, head_target

Say = Callable[[str], object]
Values = dict[str, Tensor]
"""Factors of one head [B,T,...], by name."""

SHARD_BYTES = 256e6
"""Size of a shard, about; what a kill can lose, and what is held in memory."""

_HEADROOM = 16
"""A first batch must leave this much of a dtype's range, since later ones may be larger."""
_ROUNDING = {"float16": 1e-3, "bfloat16": 1e-2}
"""Largest relative error (Frobenius) with which a dtype may store a factor of the first batch."""


@dataclass(frozen=True)
class Plan:
    """What is collected of which text: everything but the model's own numbers."""

    layers: tuple[int, ...]
    heads: tuple[int, ...] | None
    targets: tuple[Target, ...]
    dtype: FactorDtype | Literal["auto"]
    batch_size: int


def collect(
    model: HookedRecurrent,
    text: Tensor | Dataset,
    layers: Sequence[int],
    heads: Sequence[int] | None,
    folder: str | Path,
    *,
    n_tokens: int | None = None,
    context_size: int = 128,
    targets: Sequence[Target] = ("write",),
    dtype: FactorDtype | Literal["auto"] = "auto",
    batch_size: int | None = None,
    shard_bytes: float = SHARD_BYTES,
    say: Say = lambda line: None,
) -> Collection:
    """Run the model over a text once, and keep the factors of some heads.

    The same call goes on where an earlier one was stopped or killed: whole shards stay, nothing is computed twice, and
    the files are those of a run that was never stopped, bit for bit.

    Args:
        text: token ids [N,T], or a dataset with a column `text` (tokenized and joined, as SAELens does it), `tokens` or
            `input_ids`.
        heads: of every layer; None: all of them.
        n_tokens: rounded down to whole sequences; None: the whole text.
        context_size: T, where the text is a dataset.
        targets: what dictionaries will be trained on. States need reads, decays and erases beside the writes.
        dtype: of keys, values and other vectors. `auto` takes float16 or bfloat16, the first in which a first batch is
            kept with a small rounding error and room for larger numbers, else float32.
        batch_size: sequences of one forward pass; None: 4096 tokens. On it the last bits of results may depend.
        say: is told the size, and then each shard.

    Raises:
        DiskTooSmallError: the rest of the collection is larger than the room on the disk. Nothing was written.
        CollectionError: the folder cannot be written, is in use by another process, or holds another collection, or a
            value does not fit the dtype.
        UnsupportedModelError, UnknownHookError: a layer or head that does not exist.
        ValueError: too short a text, or a bad number.

    Cost: one forward up to the highest layer for each batch, and one pass over the weights for their hash. Memory: one
    shard, one batch of all recurrent layers' factors, and the token ids.
    """
    folder = Path(folder)
    plan = _plan(model, layers, heads, targets, dtype, batch_size, text, context_size)
    tokens = _sequences(model, text, context_size, n_tokens)
    with _alone_in(folder):
        run = _Run(model, tokens, plan, folder, shard_bytes)
        contents = run.contents()
        run.check_room(contents, say)
        run.write(contents, say)
    return Collection.open(folder)


def _plan(
    model: HookedRecurrent,
    layers: Sequence[int],
    heads: Sequence[int] | None,
    targets: Sequence[Target],
    dtype: FactorDtype | Literal["auto"],
    batch_size: int | None,
    text: Tensor | Dataset,
    context_size: int,
) -> Plan:
    """Check everything that can be checked without a forward pass."""
    for name, values in (("layers", layers), ("targets", targets), ("heads", [0] if heads is None else heads)):
        if not values or len(set(values)) < len(values):
            raise ValueError(f"{name} must be named once each and at least one, found {list(values)}")
    for layer in layers:
        for head in range(model.cfg.layer(layer).H) if heads is None else heads:
            for target in targets:
                head_target(model, layer, head, target)
    length = text.shape[-1] if isinstance(text, Tensor) else context_size
    if dtype not in ("auto", "float16", "bfloat16", "float32"):
        raise ValueError(f"dtype must be auto, float16, bfloat16 or float32, found {dtype!r}")
    size = max(1, 4096 // max(length, 1)) if batch_size is None else batch_size
    if size < 1 or length < 1:
        raise ValueError(f"batch_size and context_size must be at least 1, found {size} and {length}")
    chosen = None if heads is None else tuple(sorted(heads))
    return Plan(tuple(sorted(layers)), chosen, tuple(sorted(targets)), dtype, size)


def _sequences(model: HookedRecurrent, text: Tensor | Dataset, context_size: int, n_tokens: int | None) -> Tensor:
    """[N,T] int32 token ids."""
    if isinstance(text, Tensor):
        if text.ndim != 2 or text.is_floating_point():
            raise ValueError(f"token ids must be integers [N,T], found {text.dtype} {list(text.shape)}")
        found, context_size = text.cpu(), text.shape[1]
    else:
        wanted = None if n_tokens is None else n_tokens // context_size
        rows = [row.to(torch.int32) for _, row in zip(range(wanted or 2**62), _tokenized(model, text, context_size))]
        found = torch.stack(rows) if rows else torch.zeros(0, context_size)
    n = len(found) if n_tokens is None else n_tokens // context_size
    if n == 0 or n > len(found):
        raise ValueError(
            f"n_tokens {n_tokens} asks for {n} sequences of {context_size} tokens, and the text has {len(found)}; take "
            "a longer text, or fewer tokens (at least one sequence)"
        )
    return found[:n].to(torch.int32).contiguous()


def _tokenized(model: HookedRecurrent, text: Dataset, context_size: int) -> Iterator[Tensor]:
    """Sequences [T] of a dataset, in the way of SAELens' store with `prepend_bos=False` and no separator."""
    columns = text.column_names
    if ids := next((name for name in ("tokens", "input_ids") if name in columns), None):
        for row in text:
            yield torch.as_tensor(cast("Mapping[str, Any]", row)[ids])[:context_size]
        return
    if "text" not in columns:
        raise ValueError(f"a dataset needs a column text, tokens or input_ids, found {columns}")

    def documents() -> Iterator[Tensor]:
        for row in text:
            document = cast("Mapping[str, Any]", row)["text"]
            yield model.to_tokens(document, prepend_bos=False, truncate=False)[0].cpu()

    yield from concat_and_batch_sequences(documents(), context_size)


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Make the folder and hold it. The lock ends with the process, however that ends."""
    lock = folder / ".lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = FileLock(lock, timeout=0)
        held.acquire()
    except Timeout as error:
        raise CollectionError(f"{lock} is held: another process collects into {folder}; wait for it") from error
    except OSError as error:
        raise CollectionError(f"{folder} cannot be written ({error}); name another folder") from error
    try:
        yield
    finally:
        held.release()


class _Run:
    """One call of `collect`."""

    def __init__(self, model: HookedRecurrent, tokens: Tensor, plan: Plan, folder: Path, shard_bytes: float):
        self.model, self.tokens, self.plan, self.folder = model, tokens, plan, folder
        self.shard_bytes = shard_bytes
        self.first: dict[int, Recurrence] | None = None
        """Factors of the first batch, which were looked at to plan; they are not computed again."""
        self.shards: dict[int, ShardFile] = {}
        """Those that are whole, by number."""

    # -- before anything is written

    def contents(self) -> Contents:
        """What the folder will hold: as the index that is there says, or from a first batch."""
        source, text = Source.of(self.model), tensor_hash(self.tokens)
        if (self.folder / INDEX).exists():
            there, listed = read_index(self.folder)
            self._check_same(there, source, text)
            self.shards = self._whole(there, listed)
            return there
        self.first = self.factors(self.tokens[: self.plan.batch_size])
        dtype = self._dtype(self.first)
        layers = {number: self._layer(number, r, dtype) for number, r in self.first.items()}
        n, length = self.tokens.shape
        contents = Contents(source, text, n, length, self.plan.targets, layers, n, self.plan.batch_size)
        # Shards hold whole batches, so that a batch is the same in every run.
        per_batch = contents.total_bytes / n * self.plan.batch_size
        size = max(1, int(self.shard_bytes // per_batch)) * self.plan.batch_size
        self.shards = self._whole(contents := replace(contents, sequences_per_shard=min(size, n)))
        return contents

    def _check_same(self, there: Contents, source: Source, text: str) -> None:
        plan, file = self.plan, self.folder / INDEX
        there.source.check(file, source)
        asked: dict[str, object] = {
            "text": text,
            "n_sequences": len(self.tokens),
            "context_size": self.tokens.shape[1],
            "targets": plan.targets,
            "batch_size": plan.batch_size,
            "layers": plan.layers,
        }
        check_same(file, {**vars(there), "layers": tuple(sorted(there.layers))}, asked)
        for number, layer in there.layers.items():
            wanted = self._heads(number)
            check_same(file, {f"heads of layer {number}": layer.heads}, {f"heads of layer {number}": wanted})
            if plan.dtype != "auto":
                check_same(file, {"dtype": layer.factors["k"].dtype}, {"dtype": plan.dtype})

    def _whole(self, contents: Contents, listed: Sequence[ShardFile] = ()) -> dict[int, ShardFile]:
        """Shards that are there by number, the listed ones and those that a kill left unlisted. What is missing is
        collected."""
        by_name = {shard.file: shard for shard in listed}
        names = [shard_name(number) for number in range(contents.n_shards)]
        if foreign := sorted({file.name for file in self.folder.glob("shard-*")} - set(names)):
            raise CollectionError(f"{self.folder / foreign[0]} is no shard of this collection; delete it")
        found: dict[int, ShardFile] = {}
        for number, name in enumerate(names):
            file, known = self.folder / name, by_name.get(name)
            if file.exists():
                check_shard(self.folder, contents, number, known.bytes if known else None)
                found[number] = known or ShardFile(name, file.stat().st_size, file_hash(file))
        return found

    def _missing(self, contents: Contents) -> list[int]:
        return [number for number in range(contents.n_shards) if number not in self.shards]

    def check_room(self, contents: Contents, say: Say) -> None:
        """Say what will be written; raise DiskTooSmallError where the disk has no room for it."""
        left = sum(contents.shard_bytes(number) for number in self._missing(contents))
        free = free_bytes(self.folder)
        tokens = contents.n_sequences * contents.context_size
        say(
            f"{contents.total_bytes} bytes ({size_text(contents.total_bytes)}) in {contents.n_shards} shards, "
            f"{contents.total_bytes / tokens:.1f} bytes a token; {size_text(left)} to write, {size_text(free)} free"
        )
        if left > free:
            raise DiskTooSmallError(
                f"{self.folder} needs {left} bytes more ({size_text(left)}), and {size_text(free)} are free; make "
                "room, or take fewer tokens, layers or heads"
            )

    # -- one batch

    def factors(self, tokens: Tensor) -> dict[int, Recurrence]:
        """Factors of every layer asked for, on [B,T] tokens."""
        with torch.no_grad(), self.model.recording() as record:
            ids = tokens.long().to(self.model.cfg.device)
            self.model(ids, return_type=None, stop_at_layer=max(self.plan.layers) + 1)
        return {layer: record[layer].recurrence for layer in self.plan.layers}

    def _heads(self, layer: int) -> tuple[int, ...]:
        return tuple(range(self.model.cfg.layer(layer).H)) if self.plan.heads is None else self.plan.heads

    def _dtype(self, found: Mapping[int, Recurrence]) -> FactorDtype:
        """One for all layers."""
        if self.plan.dtype != "auto":
            return self.plan.dtype
        vectors: list[Tensor] = []
        for number, r in found.items():
            heads = r.select(heads=list(self._heads(number)))
            names = _stored_names(r, _erases_along_key(r), self.plan.targets)
            vectors += [x for name in names if (x := getattr(heads, name)).ndim > 3]
        return _smallest_dtype(vectors)

    def _layer(self, number: int, r: Recurrence, dtype: FactorDtype) -> Layer:
        if r.initial_state is not None:
            raise CollectionError(f"layer {number} begins with a state of its own, which a collection does not hold")
        along_key = _erases_along_key(r)
        factors = {}
        for name in _stored_names(r, along_key, self.plan.targets):
            shape = tuple(getattr(r, name).shape[3:])
            numbers = name == "beta" or (name == "log_decay" and not shape)
            factors[name] = Factor("float32" if numbers else dtype, shape)
        rule = self.model.cfg.layer(number).rule
        return Layer(rule, self._heads(number), r.K, r.V, r.R, r.scale, r.read_before_write, along_key, factors)

    # -- writing

    def write(self, contents: Contents, say: Say) -> None:
        """Write what is missing, shard by shard."""
        asides = (".shard-*", f".{INDEX}.*", ".tmp*")  # left by a kill; safetensors' own begin with .tmp
        for left in (file for pattern in asides for file in self.folder.glob(pattern)):
            left.unlink()
        with _written(self.folder / INDEX):
            self._write_index(contents)
        for number in self._missing(contents):
            tensors = self._shard(contents, number)
            file = self.folder / shard_name(number)
            save = partial(save_file, tensors, metadata=contents.metadata(number))
            with _written(file):
                atomic_write(file, lambda aside, save=save: save(filename=aside))
                self.shards[number] = ShardFile(file.name, file.stat().st_size, file_hash(file))
                self._write_index(contents)
            say(f"shard {number + 1} of {contents.n_shards}")

    def _write_index(self, contents: Contents) -> None:
        atomic_text(self.folder / INDEX, index_text(contents, [self.shards[number] for number in sorted(self.shards)]))

    def _shard(self, contents: Contents, number: int) -> dict[str, Tensor]:
        """The tensors of a shard, filled batch by batch."""
        tensors = {name: torch.empty(shape, dtype=dtype) for name, (dtype, shape) in contents.tensors(number).items()}
        sequences = contents.sequences(number)
        tensors["tokens"].copy_(self.tokens[sequences.start : sequences.stop])
        for begin in range(sequences.start, sequences.stop, contents.batch_size):
            end = min(begin + contents.batch_size, sequences.stop)
            at = slice(begin - sequences.start, end - sequences.start)
            found = self.first if begin == 0 and self.first is not None else self.factors(self.tokens[begin:end])
            self.first = None
            for layer, recurrence in found.items():
                self._fill(contents.layers[layer], layer, recurrence, tensors, at)
        return tensors

    def _fill(self, stored: Layer, layer: int, r: Recurrence, tensors: dict[str, Tensor], at: slice) -> None:
        if {"a", "beta"} & stored.factors.keys() and _erases_along_key(r) != stored.erases_along_key:
            raise CollectionError(f"the erase of layer {layer} lies along the key in some batches only; not supported")
        for name, factor in stored.factors.items():
            whole: Tensor = getattr(r, name).cpu()
            for head in stored.heads:
                value = whole[:, :, head]
                kept = tensors[f"{layer}.{head}.{name}"][at]
                kept.copy_(value)
                if bool((kept.isfinite() != value.isfinite()).any()) or bool(value.isnan().any()):
                    largest = float(value.abs().nan_to_num().max())
                    raise CollectionError(
                        f"{name} of layer {layer}, head {head} is not finite or leaves the range of {factor.dtype} "
                        f"(largest magnitude {largest:.3g}); collect with dtype bfloat16 or float32 into a new folder"
                    )


@contextmanager
def _written(file: Path) -> Iterator[None]:
    """Turn what a full disk raises into an error that names the file."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CollectionError(
            f"{file} could not be written ({error}); whole shards are kept: make room, and run the same command"
        ) from error


def _erases_along_key(r: Recurrence) -> bool:
    """Whether the erase is the delta rules', a = -beta k and b = alpha k, exactly."""
    if r.beta is None or r.a is None or r.b is None:
        return False
    alpha = 1.0 if r.log_decay is None else r.log_decay.exp()
    if isinstance(alpha, Tensor):
        alpha = alpha.reshape(*alpha.shape, *[1] * (r.k.ndim - alpha.ndim))
    return torch.equal(r.b, alpha * r.k) and torch.equal(r.a, -r.beta[..., None] * r.k)


def _stored_names(r: Recurrence, along_key: bool, targets: Sequence[Target]) -> list[str]:
    if tuple(targets) == ("write",):
        return ["k", "u"]
    erase = ["beta"] if along_key else ["a", "b"]
    return [name for name in ("k", "u", "q", "log_decay", *erase) if getattr(r, name) is not None]


def _smallest_dtype(factors: Sequence[Tensor]) -> FactorDtype:
    """The first of float16, bfloat16 and float32 that keeps these factors well, with room for larger ones."""
    for dtype, error in _ROUNDING.items():
        kind: torch.dtype = getattr(torch, dtype)
        largest = torch.finfo(kind).max / _HEADROOM
        if all(_keeps(x.float(), kind, largest, error) for x in factors):
            return cast(FactorDtype, dtype)
    return "float32"


def _keeps(x: Tensor, dtype: torch.dtype, largest: float, error: float) -> bool:
    finite = x[x.isfinite()]
    if not len(finite):
        return True
    rounded = (finite.to(dtype).float() - finite).norm()
    return float(finite.abs().max()) <= largest and float(rounded) <= error * float(finite.norm())
