"""Factors of recurrences, collected in one pass of a language model over a text, and read from disk ever after.

A folder holds `index.json` and shards `shard-00000.safetensors`, each of the same number of sequences. A shard has
`tokens` [S,T] int32 and for each head and factor a tensor `{layer}.{head}.{factor}` [S,T,...]: `k` and `u` for writes;
for states also `q`, `log_decay`, and `beta` or `a` and `b` for what is erased. An erase that follows from the key, the
delta rules' a = -beta k and b = alpha k, is stored as `beta` alone. Vectors are in the collection's dtype, numbers
(one log-decay or beta a head) in float32.

At K = V = 128 a write costs 512 bytes in two-byte dtypes, where the dense matrix has 64 KB in float32.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, get_args

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hookpoints import HookedRecurrent, Recurrence
from hookpoints.files import SealedFolder, plain_file, read_json
from sae_lens_writesae.sae.target import HeadTarget, Target

INDEX = "index.json"
FORMAT = 1
"""Version of the files."""

FactorDtype = Literal["float16", "bfloat16", "float32"]
_NAMES = {torch.float32: "F32", torch.int32: "I32", torch.bfloat16: "BF16", torch.float16: "F16"}
"""What safetensors calls dtypes, in the order in which it writes tensors of them."""

Sequences = int | slice | Sequence[int] | Tensor | None
"""Which sequences; None: all."""


class CollectionError(ValueError):
    """A folder does not hold the whole collection that was asked for; the message names the file."""


@dataclass(frozen=True)
class Source:
    """What a collection was made of."""

    model: str
    """Name or folder."""
    revision: str | None
    """Commit on the hub, where the model is from there."""
    weights: str
    """SHA-256 of every parameter and buffer."""
    model_dtype: str
    tokenizer: str | None
    """SHA-256 of the tokenizer; None where the model has none."""

    def check(self, file: Path, model: Self) -> None:
        """Raise CollectionError that names what differs, unless `model` is the same, under whatever name."""
        if asdict(self) | {"model": model.model} != asdict(model):
            check_same(file, asdict(self), asdict(model))

    @classmethod
    def of(cls, model: HookedRecurrent) -> Self:
        """Cost: one pass over the weights."""
        digest = hashlib.sha256()
        for name, value in sorted(model.hf_model.state_dict().items()):
            digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
            digest.update(_bytes(value))
        revision = getattr(model.hf_model.config, "_commit_hash", None)
        dtype = str(model.cfg.dtype).removeprefix("torch.")
        return cls(model.cfg.model_name, revision, digest.hexdigest(), dtype, _tokenizer_hash(model))


@dataclass(frozen=True)
class Factor:
    """How one factor of a layer is stored."""

    dtype: FactorDtype
    shape: tuple[int, ...]
    """Of one token and head: [K], [R,K] or []."""


@dataclass(frozen=True)
class Layer:
    """What was collected of a layer."""

    rule: str
    heads: tuple[int, ...]
    K: int
    V: int
    R: int
    scale: float
    """Factor on q at the read."""
    read_before_write: bool
    erases_along_key: bool
    """Whether a = -beta k and b = alpha k, so that only beta is stored."""
    factors: dict[str, Factor]

    def __post_init__(self) -> None:
        for name, size in (("k", self.K), ("u", self.V)):
            shape = self.factors[name].shape
            if ((1, *shape) if len(shape) == 1 else shape) != (self.R, size):
                raise ValueError(f"{name} has shape {shape} in a layer of K {self.K}, V {self.V}, R {self.R}")
        if wrong := {factor.dtype for factor in self.factors.values()} - set(get_args(FactorDtype)):
            raise ValueError(f"factors have dtypes {wrong}")
        if not isinstance(self.scale, int | float) or not all(isinstance(head, int) for head in self.heads):
            raise ValueError(f"scale is {self.scale!r} and heads are {self.heads!r:.40}")


@dataclass(frozen=True)
class Contents:
    """Everything that decides what is in the shards; its hash is in each of them."""

    source: Source
    text: str
    """SHA-256 of the token ids."""
    n_sequences: int
    context_size: int
    targets: tuple[Target, ...]
    layers: dict[int, Layer]
    sequences_per_shard: int
    batch_size: int
    """Sequences of one forward pass."""
    format: int = FORMAT

    def __post_init__(self) -> None:
        for name in ("n_sequences", "context_size", "sequences_per_shard", "batch_size"):
            if not isinstance(size := getattr(self, name), int) or size < 1:
                raise ValueError(f"{name} is {size!r}")
        if not set(self.targets) <= set(get_args(Target)):
            raise ValueError(f"targets are {self.targets}")

    @property
    def hash(self) -> str:
        """Of all fields."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    @classmethod
    def from_dict(cls, fields: Mapping[str, object]) -> Self:
        """From `dataclasses.asdict` by way of JSON."""
        d = json.loads(json.dumps(fields))
        layers = {}
        for number, layer in d.pop("layers").items():
            stored = {name: Factor(f["dtype"], tuple(f["shape"])) for name, f in layer.pop("factors").items()}
            layers[int(number)] = Layer(**layer | {"heads": tuple(layer["heads"]), "factors": stored})
        targets = tuple(d.pop("targets"))
        return cls(**d | {"source": Source(**d["source"]), "targets": targets, "layers": layers})

    # -- shards

    @property
    def n_shards(self) -> int:
        return -(-self.n_sequences // self.sequences_per_shard)

    def sequences(self, shard: int) -> range:
        """Numbers of the sequences in a shard."""
        first = shard * self.sequences_per_shard
        return range(first, min(first + self.sequences_per_shard, self.n_sequences))

    def tensors(self, shard: int) -> dict[str, tuple[torch.dtype, list[int]]]:
        """Dtype and shape of every tensor in a shard, by name."""
        size = [len(self.sequences(shard)), self.context_size]
        return {"tokens": (torch.int32, size)} | {
            f"{number}.{head}.{name}": (getattr(torch, factor.dtype), [*size, *factor.shape])
            for number, layer in self.layers.items()
            for head in layer.heads
            for name, factor in layer.factors.items()
        }

    @property
    def n_tensors(self) -> int:
        """Tensors in each shard."""
        return 1 + sum(len(layer.heads) * len(layer.factors) for layer in self.layers.values())

    def metadata(self, shard: int) -> dict[str, str]:
        """What a shard says of itself."""
        return {"collection": json.dumps({"contents": self.hash, "shard": shard})}

    def shard_bytes(self, shard: int) -> int:
        """Exact size of a shard's file: the header of safetensors, padded to eight bytes, and the numbers."""
        header: dict[str, object] = {"__metadata__": self.metadata(shard)}
        tensors, end = self.tensors(shard), 0
        for name in sorted(tensors, key=lambda name: (list(_NAMES).index(tensors[name][0]), name)):
            dtype, shape = tensors[name]
            begin, end = end, end + dtype.itemsize * math.prod(shape)
            header[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [begin, end]}
        length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
        return 8 + -(-length // 8) * 8 + end

    @property
    def total_bytes(self) -> int:
        """Size of all shards. All but the last are alike but for the digits of their numbers."""
        return sum(self.shard_bytes(shard) for shard in range(self.n_shards))


class ShardFile(NamedTuple):
    """What the index says of a shard."""

    file: str
    bytes: int
    sha256: str


def shard_name(shard: int) -> str:
    return f"shard-{shard:05d}.safetensors"


class Mapped:
    """Rows [N,...] that lie in several memory-mapped tensors. Slices and index tensors give torch tensors; `[:]` reads
    everything into memory. A slice within one shard is a view of the file."""

    def __init__(self, parts: Sequence[Tensor]):
        self.parts = list(parts)
        self.starts = torch.tensor([0, *(len(part) for part in self.parts)]).cumsum(0)
        self.shape = torch.Size([int(self.starts[-1]), *self.parts[0].shape[1:]])
        self.dtype, self.device = self.parts[0].dtype, self.parts[0].device
        self.ndim = len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Sequences) -> Tensor:
        if isinstance(index, slice) and index.indices(len(self))[2] == 1:
            begin, end, _ = index.indices(len(self))
            pieces = [p[max(begin - s, 0) : max(end - s, 0)] for s, p in zip(self.starts.tolist(), self.parts)]
            pieces = [piece for piece in pieces if len(piece)] or [self.parts[0][:0]]
            return pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        if isinstance(index, int):
            return self[range(len(self))[index] :][0]
        if index is None or isinstance(index, slice):
            return self[torch.arange(len(self))[index or slice(None)]]
        rows = torch.as_tensor(index).cpu()
        if rows.dtype == torch.bool:
            rows = rows.nonzero()[:, 0]
        if len(rows) and not -len(self) <= int(rows.min()) <= int(rows.max()) < len(self):
            raise IndexError(f"rows {int(rows.min())} to {int(rows.max())} are out of range for {len(self)}")
        rows = rows % len(self)
        out = torch.empty(len(rows), *self.shape[1:], dtype=self.dtype)
        part = torch.bucketize(rows, self.starts[1:], right=True)
        for number in part.unique().tolist():
            at = part == number
            out[at] = self.parts[number][rows[at] - self.starts[number]]
        return out


class Factors(NamedTuple):
    """Writes of one head: token n adds sum_r k_nr u_nr^T."""

    keys: Mapped
    """[N,R,K]"""
    values: Mapped
    """[N,R,V]"""


class Collection:
    """A whole collection on disk. `collect` (in `sae.collect`) makes one, `Collection.open` reads one. Nothing is read
    before it is asked for, and files are mapped, not copied. When something is first asked for, each shard is read
    once and its hash compared; CollectionError names one that was changed."""

    def __init__(self, folder: Path, contents: Contents, shards: Sequence[ShardFile]):
        self.folder, self.contents, self.shards = folder, contents, tuple(shards)
        self._sealed = SealedFolder(folder, CollectionError, {shard.file: shard.sha256 for shard in shards})
        self._mapped: dict[str, Mapped] = {}

    @classmethod
    def open(
        cls,
        folder: str | Path,
        *,
        model: HookedRecurrent | None = None,
        dtype: FactorDtype | None = None,
        verify: bool = False,
    ) -> Self:
        """Open a collection after a check of its files: names, sizes, and that each shard is of this collection. Hashes
        are compared when shards are first mapped.

        Args:
            model: refuse a collection of another model, revision, dtype or tokenizer. Cost: a pass over the weights.
            dtype: refuse a collection whose factors have another dtype.
            verify: compare the hashes now. Cost: one reading of every shard.

        Raises:
            CollectionError: a file is missing, cut, changed or foreign, the collection is not finished, or it is not
                what was asked for.
        """
        folder = Path(folder)
        contents, shards = read_index(folder)
        if len(shards) < contents.n_shards:
            raise CollectionError(
                f"{folder / INDEX} lists {len(shards)} of {contents.n_shards} shards: the collection is not finished. "
                "Run collect with the same settings to go on"
            )
        for number, shard in enumerate(shards):
            if shard.file != shard_name(number):  # names in files are data
                raise CollectionError(f"{folder / INDEX}: expected {shard_name(number)}, got {shard.file!r}")
            check_shard(folder, contents, number, shard.bytes)
        opened = cls(folder, contents, shards)
        if verify:
            opened._sealed.check()
        if model is not None:
            contents.source.check(folder / INDEX, Source.of(model))
        if dtype is not None:
            check_same(folder / INDEX, {"dtype": opened.dtype}, {"dtype": dtype})
        return opened

    def __repr__(self) -> str:
        heads = {number: list(layer.heads) for number, layer in self.contents.layers.items()}
        return (
            f"Collection({self.contents.source.model!r}, heads by layer {heads}, {self.n_sequences} sequences of "
            f"{self.context_size} tokens, targets {list(self.contents.targets)}, {self.dtype})"
        )

    @property
    def n_sequences(self) -> int:
        return self.contents.n_sequences

    @property
    def context_size(self) -> int:
        """Tokens per sequence, T."""
        return self.contents.context_size

    @property
    def dtype(self) -> FactorDtype:
        """Of the stored keys and values."""
        return next(iter(self.contents.layers.values())).factors["k"].dtype

    @property
    def model_name(self) -> str:
        return self.contents.source.model

    @cached_property
    def tokens(self) -> Tensor:
        """[n_sequences,T] token ids, int64."""
        return self._map("tokens")[:].long()

    def head_target(self, layer: int, head: int, target: Target = "write") -> HeadTarget:
        """The hook of a head that was collected, and the sizes that an SAE on it needs.

        Raises:
            CollectionError: the layer, the head or what the target needs was not collected; says what was.
        """
        found = self._layer(layer, head)
        if target not in get_args(Target):
            raise ValueError(f"target must be one of {', '.join(get_args(Target))}, found {target!r}")
        if target != "write" and "q" not in found.factors:
            raise self._lacks(f"{target} needs decays and erases, and only writes were collected; collect with targets")
        return HeadTarget.of_head(layer, head, found.K, found.V, target)

    # -- reading

    def factors(self, layer: int, head: int) -> Factors:
        """All writes of a head, [N,R,K] and [N,R,V] with N = n_sequences * T, mapped."""
        self._layer(layer, head)

        def flat(name: str) -> Mapped:
            parts = self._map(f"{layer}.{head}.{name}").parts
            return Mapped([part.flatten(0, 1).reshape(-1, self._layer(layer).R, part.shape[-1]) for part in parts])

        return Factors(flat("k"), flat("u"))

    def recurrence(self, layer: int, head: int, sequences: Sequences = None) -> Recurrence:
        """The recurrence of a head (H = 1) on some sequences, from which `states()` and the rest are computed.

        Raises:
            CollectionError: only writes were collected.
        """
        self.head_target(layer, head, "state")
        stored, found = self._stored(layer, head, sequences), self._layer(layer)
        if found.erases_along_key:
            decay, k = stored.get("log_decay"), stored["k"]
            alpha = 1.0 if decay is None else decay.exp().reshape(*decay.shape, *[1] * (k.ndim - decay.ndim))
            stored["b"] = alpha * k.float()
        return Recurrence(**stored, scale=found.scale, read_before_write=found.read_before_write)

    def writes(self, layer: int, head: int, sequences: Sequences = None) -> Recurrence:
        """The writes of a head on some sequences as a recurrence that forgets nothing and has no reads of its own: for
        `write()`, `k` and `u`."""
        self._layer(layer, head)
        stored = self._stored(layer, head, sequences, ("k", "u"))
        k = stored["k"]
        return Recurrence(q=torch.zeros_like(k if k.ndim == 4 else k[:, :, :, 0]), k=k, u=stored["u"])

    def rows(self, layer: int, head: int, target: Target = "write", sequences: Sequences = None) -> Tensor:
        """[N,K*V] float32, what the hook of a head carries: its writes or states token by token, or with `last_state`
        the state at the end of each sequence. Memory is the result's: name few sequences at a time."""
        self.head_target(layer, head, target)
        if target == "write":
            return self.writes(layer, head, sequences).write().flatten(0, 2).flatten(1)
        last = -1 if target == "last_state" else None
        return self.recurrence(layer, head, sequences).states(positions=last).flatten(0, 2).flatten(1)

    def _stored(
        self, layer: int, head: int, sequences: Sequences, names: Sequence[str] | None = None
    ) -> dict[str, Tensor]:
        """Factors [B,T,1,...] of a head as they are stored."""
        if isinstance(sequences, int):
            sequences = [sequences]
        at = slice(None) if sequences is None else sequences
        names = names or list(self._layer(layer).factors)
        return {name: self._map(f"{layer}.{head}.{name}")[at].unsqueeze(2) for name in names}

    def _map(self, name: str) -> Mapped:
        if name not in self._mapped:
            parts = []
            for shard in self.shards:
                with safe_open(self._sealed.file(shard.file), framework="pt") as file:
                    parts.append(file.get_tensor(name))
            self._mapped[name] = Mapped(parts)
        return self._mapped[name]

    def _layer(self, layer: int, head: int | None = None) -> Layer:
        found = self.contents.layers.get(layer)
        if found is None or (head is not None and head not in found.heads):
            raise self._lacks(f"head {head} of layer {layer} was not collected")
        return found

    def _lacks(self, what: str) -> CollectionError:
        heads = {number: list(layer.heads) for number, layer in self.contents.layers.items()}
        return CollectionError(
            f"{self.folder / INDEX}: {what}. It has targets {list(self.contents.targets)} of heads by layer {heads}"
        )


# ------------------------------------------------------------------------------------------------ files


def read_index(folder: Path) -> tuple[Contents, list[ShardFile]]:
    """What a folder says that it holds, finished or not.

    Raises:
        CollectionError: there is no index, or it is cut or of another version.
    """
    file = plain_file(folder, INDEX, CollectionError)
    try:
        index: Any = read_json(file)
        version = index["contents"]["format"]
        if version == FORMAT:
            return Contents.from_dict(index["contents"]), [ShardFile(**each) for each in index["shards"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CollectionError(f"{file} is cut short or not an index of a collection ({error!r})") from error
    raise CollectionError(f"{file} has format {version}, and this version reads format {FORMAT}; collect again")


def index_text(contents: Contents, shards: Sequence[ShardFile]) -> str:
    return json.dumps({"contents": asdict(contents), "shards": [each._asdict() for each in shards]}, indent=1)


def check_shard(folder: Path, contents: Contents, shard: int, size: int | None = None) -> None:
    """Raise CollectionError unless that shard of this collection is there and whole. Reads its header alone."""
    file = plain_file(folder, shard_name(shard), CollectionError)
    found = file.stat().st_size
    if size is not None and found != size:
        raise CollectionError(f"{file} has {found} bytes, and {size} were written: cut short; delete and collect it")
    try:
        with safe_open(file, framework="pt") as opened:
            said = (opened.metadata() or {}).get("collection")
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            there = {name: (x.get_dtype(), x.get_shape()) for name, x in slices.items()}
    except (SafetensorError, OSError) as error:
        raise CollectionError(f"{file} is cut short or broken ({error}); delete and collect it again") from error
    other = CollectionError(f"{file} has other tensors than its index says; delete and collect it again")
    if len(there) != contents.n_tensors:  # first, as an index that nobody wrote may claim millions
        raise other
    if said != contents.metadata(shard)["collection"]:
        raise CollectionError(
            f"{file} is of another collection or in another's place (it says {said}, and "
            f"{contents.metadata(shard)['collection']} is expected); delete it and collect it again"
        )
    if there != {name: (_NAMES[dtype], shape) for name, (dtype, shape) in contents.tensors(shard).items()}:
        raise other


def check_same(file: Path, there: Mapping[str, object], asked: Mapping[str, object]) -> None:
    """Raise CollectionError that names what differs."""
    if differing := [
        f"{name} {there[name]!r}, asked for {value!r}" for name, value in asked.items() if there[name] != value
    ]:
        raise CollectionError(f"{file} is of another collection ({'; '.join(differing)}); name another folder")


def tensor_hash(value: Tensor) -> str:
    return hashlib.sha256(_bytes(value)).hexdigest()


def _bytes(value: Tensor) -> memoryview:
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _tokenizer_hash(model: HookedRecurrent) -> str | None:
    if model.tokenizer is None:
        return None
    fast = getattr(model.tokenizer, "backend_tokenizer", None)
    said = json.loads(fast.to_str()) if fast is not None else sorted(model.tokenizer.get_vocab().items())
    if isinstance(said, dict):  # set anew by each call
        said |= {"padding": None, "truncation": None}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
