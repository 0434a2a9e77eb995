"""Factors of recurrences: one pass of a language model over a text writes them to disk, and they are read ever after.

A folder holds `index.json`, which says what was collected, and shards `shard-00000.safetensors`, each of the same
number of sequences. A shard that is there is whole; `SHA256SUMS` is written when all are. A shard has `tokens` [S,T]
int32 and for each head and factor a tensor `{layer}.{head}.{factor}` [S,T,...]: `k` and `u` for writes; for states also
`q`, `log_decay`, and `beta` or `a` and `b` for what is erased. An erase that follows from the key, the delta rules'
a = -beta k and b = alpha k, is stored as `beta` alone. Vectors are in the collection's dtype, numbers (one log-decay or
beta a head) in float32.

At K = V = 128 a write costs 512 bytes in two-byte dtypes, where the dense matrix has 64 KB in float32.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, partial
from itertools import accumulate, islice, product
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, cast, get_args

import torch
from datasets import Dataset
from filelock import FileLock
from sae_lens.tokenization_and_batching import concat_and_batch_sequences
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from hookpoints import HookedRecurrent, Recurrence
from hookpoints.files import CHECKSUMS, SealedFolder, read_json, write_checksums
from sae_lens_writesae.atom.low_rank import LowRank
from sae_lens_writesae.errors import DiskTooSmallError
from sae_lens_writesae.files import atomic_text, atomic_write, free_bytes, size_text
from sae_lens_writesae.sae.target import HeadTarget, Target, head_target

INDEX = "index.json"
FORMAT = 2
"""Version of the files."""
SHARD_BYTES = 128e6
"""Size of a shard at most, about; what is held in memory."""
MINUTE = 3e12
"""Floating-point operations of about a minute on two cores, which is what a kill may lose; on a GPU a hundred times as
many. Not measured, because then shards would differ from run to run."""

FactorDtype = Literal["float16", "bfloat16", "float32"]
Sequences = slice | Sequence[int] | Tensor
"""Which sequences."""
Index = dict[str, Any]
"""What `index.json` holds: what was asked for, and then what a first batch showed (`_describe`)."""

_HEADROOM = 16
"""A first batch must leave this much of a dtype's range, since later ones may be larger."""
_ROUNDING: dict[FactorDtype, float] = {"float16": 1e-3, "bfloat16": 1e-2}
"""Largest relative error (Frobenius) with which a dtype may store a factor of the first batch."""


class CollectionError(ValueError):
    """A folder does not hold the whole collection that was asked for; the message names the file."""


# ------------------------------------------------------------------------------------------------ reading


class Mapped:
    """Rows [N,...] that lie in several memory-mapped tensors, indexed as one tensor is. What is indexed is read."""

    def __init__(self, parts: Sequence[Tensor]):
        self.parts, self.dtype = list(parts), parts[0].dtype
        self.ends = list(accumulate(map(len, parts)))
        self.shape = torch.Size([self.ends[-1], *parts[0].shape[1:]])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Sequences) -> Tensor:
        rows = torch.arange(len(self))[index]
        out = torch.empty(*rows.shape, *self.shape[1:], dtype=self.dtype)
        for part, end in zip(self.parts, self.ends):
            here = (rows >= end - len(part)) & (rows < end)
            out[here] = part[rows[here] - (end - len(part))]
        return out


class Factors(NamedTuple):
    """Writes of one head: token n adds sum_r k_nr u_nr^T."""

    keys: Mapped
    """[N,R,K]"""
    values: Mapped
    """[N,R,V]"""


class Collection:
    """A whole collection on disk. `collect` makes one, `Collection.open` reads one. Nothing is read before it is asked
    for, and files are mapped, not copied. When something is first asked for, each shard is read once and its hash
    compared; CollectionError names one that was changed, is missing or is a link."""

    def __init__(self, sealed: SealedFolder, index: Index):
        self.folder, self._sealed, self._index = sealed.folder, sealed, index
        self.n_sequences, self.context_size = cast("list[int]", index["shape"])
        self.dtype: FactorDtype = index["dtype"]
        self.model_name: str = index["model_name"]
        self.heads: dict[int, list[int]] = {int(layer): heads for layer, heads in index["heads"].items()}
        self.total_bytes = self.n_sequences * _sequence_bytes(index)
        self._mapped: dict[str, Mapped] = {}

    @classmethod
    def open(cls, folder: str | Path, *, model: HookedRecurrent | None = None) -> Self:
        """Open a collection. Hashes of shards are compared when they are first mapped.

        Args:
            model: refuse a collection of other weights. Cost: a pass over the weights.

        Raises:
            CollectionError: a file is missing, the index was changed, the collection is not finished, of an earlier
                format, or not of `model`.
        """
        sealed = SealedFolder(Path(folder), CollectionError)
        sealed.require()
        index = read_json(sealed.file(INDEX))
        _check_same(sealed.folder, index, {"format": FORMAT} | ({} if model is None else {"model": _hash(model)}))
        return cls(sealed, index)

    @cached_property
    def tokens(self) -> Tensor:
        """[n_sequences,T] token ids, int64."""
        return self._map("tokens")[:].long()

    def head_target(self, layer: int, head: int, target: Target = "write") -> HeadTarget:
        """The hook of a head that was collected, and the sizes that an SAE on it needs.

        Raises:
            CollectionError: the layer, the head or what the target needs was not collected; says what was.
        """
        if head not in self.heads.get(layer, ()):
            raise CollectionError(f"{self.folder}: head {head} of layer {layer} was not collected, only {self.heads}")
        shapes = {name: shape for name, (_, shape) in self._index["layers"][str(layer)]["factors"].items()}
        if target != "write" and "q" not in shapes:
            raise CollectionError(f"{self.folder}: {target} needs decays and erases, and only writes were collected")
        return HeadTarget.of_head(layer, head, shapes["k"][-1], shapes["u"][-1], target)

    def factors(self, layer: int, head: int) -> Factors:
        """All writes of a head, [N,R,K] and [N,R,V] with N = n_sequences * T, mapped."""
        self.head_target(layer, head)
        k, u = (self._map(f"{layer}.{head}.{name}").parts for name in ("k", "u"))
        terms = k[0].shape[2] if k[0].ndim == 4 else 1
        return Factors(*(Mapped([part.reshape(-1, terms, part.shape[-1]) for part in side]) for side in (k, u)))

    def recurrence(self, layer: int, head: int, sequences: Sequences = slice(None)) -> Recurrence:
        """The recurrence of a head (H = 1) on some sequences, from which `states()` and the rest are computed.

        Raises:
            CollectionError: only writes were collected.
        """
        self.head_target(layer, head, "state")
        described: Index = self._index["layers"][str(layer)]
        stored: dict[str, Any] = {
            name: self._map(f"{layer}.{head}.{name}")[sequences].unsqueeze(2) for name in described["factors"]
        }
        if "beta" in stored:
            stored["b"] = _faded(stored["k"].float(), stored.get("log_decay"))
        return Recurrence(**stored, scale=described["scale"], read_before_write=described["read_before_write"])

    def rows(self, layer: int, head: int, target: Target = "write", sequences: Sequences = slice(None)) -> Tensor:
        """[N,K*V] float32, what the hook of a head carries: its writes or states token by token, or with `last_state`
        the state at the end of each sequence. Memory is the result's: name few sequences at a time."""
        if target == "write":
            keys, values = self.factors(layer, head)
            tokens = torch.arange(len(keys)).view(self.n_sequences, -1)[sequences].flatten()
            return LowRank(keys[tokens], values[tokens]).to(torch.float32).dense().flatten(1)
        at = -1 if target == "last_state" else None
        return self.recurrence(layer, head, sequences).states(positions=at).flatten(0, 2).flatten(1)

    def _map(self, name: str) -> Mapped:
        if name not in self._mapped:
            parts: list[Tensor] = []
            for shard in _spans(self._index):
                with safe_open(self._sealed.file(shard), framework="pt") as file:
                    parts.append(file.get_tensor(name))
            self._mapped[name] = Mapped(parts)
        return self._mapped[name]


# ------------------------------------------------------------------------------------------------ collecting


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
    say: Callable[[str], object] = lambda line: None,
) -> Collection:
    """Run the model over a text once, and keep the factors of some heads.

    The same call resumes where an earlier one was stopped or killed: whole shards stay, and
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
        batch_size: sequences of one forward pass; None: 4096 tokens, fewer where these take a large model more than
            about a minute. On it the last bits of results may depend.
        shard_bytes: size of a shard at most, about. One that takes a large model about a minute is whole before that.
        say: is told the size, and then each shard.

    Raises:
        DiskTooSmallError: the rest of the collection is larger than the room on the disk. Nothing was written.
        CollectionError: the folder holds another collection, or a value does not fit the dtype.
        OSError: the folder cannot be written, or another process collects into it.
        UnsupportedModelError, UnknownHookError: a layer or head that does not exist.
        ValueError: too short a text, or a bad setting.

    Cost: one forward up to the highest layer for each batch, and one pass over the weights for their hash. Memory: one
    shard, one batch of the named layers' factors, and the token ids.
    """
    folder = Path(folder)
    if not layers or not targets or dtype not in ("auto", *get_args(FactorDtype)):
        raise ValueError(
            f"collect: expected layers, targets, and dtype auto, float16, bfloat16 or float32, got {list(layers)}, "
            f"{list(targets)} and {dtype!r}"
        )
    chosen = {layer: sorted({*(heads or range(model.cfg.layer(layer).H))}) for layer in sorted({*layers})}
    for layer, numbers in chosen.items():
        for head, target in product(numbers, targets):
            head_target(model, layer, head, target)
    ids = _sequences(model, text, context_size, n_tokens)
    operations = 2 * sum(x.numel() for x in model.hf_model.parameters()) * ids.shape[1]
    minute = MINUTE * (1 if model.cfg.device.type == "cpu" else 100) / operations
    asked: Index = {
        "format": FORMAT,
        "model": _hash(model),
        "text": hashlib.sha256(ids.numpy().data).hexdigest(),
        "shape": list(ids.shape),
        "targets": sorted({*targets}),
        "heads": {str(layer): numbers for layer, numbers in chosen.items()},
        "batch_size": max(1, int(batch_size or min(4096 // ids.shape[1], minute))),
        **({} if dtype == "auto" else {"dtype": dtype}),
    }
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock", timeout=0):
        for left in [each for each in folder.glob(".*") if each.name != ".lock"]:
            left.unlink()  # of a run that was killed
        if (folder / INDEX).exists():
            index: Index = read_json(folder / INDEX)
            _check_same(folder, index, asked)
        else:
            index = asked | {"model_name": model.cfg.model_name} | _describe(model, ids, asked)
            # Whole batches, so that a batch is the same in every run.
            n_batches = int(min(shard_bytes / _sequence_bytes(index), minute) // index["batch_size"])
            index["sequences_per_shard"] = max(1, n_batches) * index["batch_size"]
        missing = {name: span for name, span in _spans(index).items() if not (folder / name).exists()}
        sequence, free = _sequence_bytes(index), free_bytes(folder)
        left_bytes = sequence * sum(map(len, missing.values()))
        said = f"{sequence * len(ids)} bytes ({size_text(sequence * len(ids))}), {size_text(left_bytes)} to write"
        say(f"{said} in {len(missing)} shards, {size_text(free)} free")
        if left_bytes > free:
            raise DiskTooSmallError(f"{folder}: {said}, but {size_text(free)} free; take fewer tokens, layers or heads")
        atomic_text(folder / INDEX, json.dumps(index, indent=1))
        for n, (name, span) in enumerate(missing.items()):
            tensors = _shard(model, ids[span.start : span.stop], index)
            atomic_write(folder / name, partial(save_file, tensors))
            say(f"shard {n + 1} of {len(missing)}")
        if missing or not (folder / CHECKSUMS).exists():
            write_checksums(folder, [INDEX, *_spans(index)])
    return Collection.open(folder)


def _sequences(model: HookedRecurrent, text: Tensor | Dataset, context_size: int, n_tokens: int | None) -> Tensor:
    """[N,T] int32 token ids; of a text in the way of SAELens' store with `prepend_bos=False` and no separator."""
    rows: Iterable[Tensor]
    if isinstance(text, Tensor):
        rows, context_size = text, text.shape[-1]
    else:
        column = next((name for name in ("tokens", "input_ids") if name in text.column_names), "text")
        values = (cast("Mapping[str, Any]", row)[column] for row in text.select_columns(column))
        if column == "text":
            documents = (model.to_tokens(value, prepend_bos=False, truncate=False)[0].cpu() for value in values)
            rows = concat_and_batch_sequences(documents, context_size)
        else:
            rows = (torch.as_tensor(ids)[:context_size] for ids in values)
    wanted = None if n_tokens is None else n_tokens // context_size
    taken = list(islice(rows, wanted))
    if not taken or len(taken) < (wanted or 1) or taken[0].ndim != 1 or taken[0].is_floating_point():
        raise ValueError(
            f"text: expected {wanted or 'some'} sequences [{context_size}] of integers, got {len(taken)} of "
            f"{[(row.dtype, list(row.shape)) for row in taken[:1]]}; take a longer text, or fewer tokens (n_tokens)"
        )
    return torch.stack(taken).to("cpu", torch.int32)


def _shard(model: HookedRecurrent, ids: Tensor, index: Index) -> dict[str, Tensor]:
    """The tensors of a shard."""
    parts: dict[str, list[Tensor]] = defaultdict(list, tokens=[ids])
    for batch in ids.split(index["batch_size"]):
        for layer, r in _recorded(model, batch, index).items():
            factors = index["layers"][layer]["factors"]
            if "q" in factors and (
                r.initial_state is not None or r.rates is not None or ("beta" in factors and not _erases_along_key(r))
            ):
                raise CollectionError(
                    f"layer {layer}: expected a first state of zeros, one form of erase, and no decay for each entry "
                    "of the state (Mamba-1's writes can be collected, not its states)"
                )
            for (name, (dtype, _)), head in product(factors.items(), index["heads"][layer]):
                value: Tensor = getattr(r, name)[:, :, head].cpu()
                kept = value.to(getattr(torch, dtype)).contiguous()
                if not torch.equal(kept.isfinite(), value.isfinite()) or bool(value.isnan().any()):
                    raise CollectionError(
                        f"{layer}.{head}.{name} (layer, head, factor): expected numbers in the range of {dtype}, got "
                        f"NaN, or up to {float(value.abs().nan_to_num().max()):.3g}; collect with dtype bfloat16 or "
                        "float32 into a new folder"
                    )
                parts[f"{layer}.{head}.{name}"].append(kept)
    return {name: torch.cat(parts.pop(name)) for name in list(parts)}


def _recorded(model: HookedRecurrent, ids: Tensor, asked: Index) -> dict[str, Recurrence]:
    """Factors of every layer asked for, on [B,T] tokens."""
    layers = [int(layer) for layer in asked["heads"]]
    with torch.no_grad(), model.recording(layers) as record:
        model(ids.long().to(model.cfg.device), return_type=None, stop_at_layer=max(layers) + 1)
    return {str(layer): record[layer].recurrence for layer in layers}


def _describe(model: HookedRecurrent, ids: Tensor, asked: Index) -> Index:
    """What an index says besides what was asked for, from the factors of a first batch: the dtype, and for each layer
    the dtype and shape (of one token and head) of every factor, and what states need besides."""
    layers: dict[str, Index] = {}
    vectors: list[Tensor] = []
    for layer, r in _recorded(model, ids[: asked["batch_size"]], asked).items():
        states = ("q", "log_decay", *(["beta"] if _erases_along_key(r) else ["a", "b"]))
        names = ("k", "u", *(states if asked["targets"] != ["write"] else ()))
        factors = {name: x[:, :, asked["heads"][layer]] for name in names if (x := getattr(r, name)) is not None}
        vectors += [x for x in factors.values() if x.ndim > 3]
        layers[layer] = {"factors": factors, "scale": r.scale, "read_before_write": r.read_before_write}
    dtype = asked.get("dtype") or _smallest_dtype(vectors)
    for described in layers.values():
        described["factors"] = {
            name: ["float32" if name == "beta" or x.ndim == 3 else dtype, list(x.shape[3:])]
            for name, x in described["factors"].items()
        }
    return {"dtype": dtype, "layers": layers}


def _erases_along_key(r: Recurrence) -> bool:
    """Whether the erase is the delta rules', a = -beta k and b = alpha k, exactly."""
    return (
        (r.beta is not None and r.a is not None and r.b is not None)
        and torch.equal(r.b, _faded(r.k, r.log_decay))
        and torch.equal(r.a, -r.beta[..., None] * r.k)
    )


def _faded(k: Tensor, log_decay: Tensor | None) -> Tensor:
    """alpha k, like `k`."""
    return k if log_decay is None else log_decay.exp()[(..., *[None] * (k.ndim - log_decay.ndim))] * k


def _smallest_dtype(factors: Sequence[Tensor]) -> FactorDtype:
    """The first of float16, bfloat16 and float32 that keeps these factors well, with room for larger ones."""
    finite = [x.float().nan_to_num(0, 0, 0) for x in factors]
    for name, error in _ROUNDING.items():
        dtype: torch.dtype = getattr(torch, name)
        fits = (_HEADROOM * x.abs().max() <= torch.finfo(dtype).max for x in finite)
        if all(fits) and all((x.to(dtype).float() - x).norm() <= error * x.norm() for x in finite):
            return name
    return "float32"


# ------------------------------------------------------------------------------------------------ files


def _spans(index: Index) -> dict[str, range]:
    """Numbers of the sequences in each shard, by its name."""
    (n, _), size = index["shape"], index["sequences_per_shard"]
    return {f"shard-{number:05d}.safetensors": range(n)[number * size :][:size] for number in range(-(-n // size))}


def _sequence_bytes(index: Index) -> int:
    """Size of the numbers of one sequence. Headers of files add some thousandths."""
    factors = [(layer, *each) for layer, described in index["layers"].items() for each in described["factors"].values()]
    sizes = (len(index["heads"][layer]) * math.prod(x) * getattr(torch, dtype).itemsize for layer, dtype, x in factors)
    return index["shape"][1] * (4 + sum(sizes))


def _check_same(folder: Path, index: Mapping[str, object], asked: Index) -> None:
    """Raise CollectionError that names what differs."""
    if differing := [name for name, value in asked.items() if index.get(name) != value]:
        raise CollectionError(
            f"{folder / INDEX}: expected the collection that was asked for, got one of another {', '.join(differing)}; "
            "name another folder, or collect again where the format is another"
        )


def _hash(model: HookedRecurrent) -> str:
    """SHA-256 of every parameter and buffer. Cost: one pass over them."""
    digest = hashlib.sha256()
    for name, value in sorted(model.hf_model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
