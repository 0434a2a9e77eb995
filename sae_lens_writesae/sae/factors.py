"""Factors of recurrences: one pass of a language model over a text (`collecting`) writes them to disk, and they are
read ever after.

A folder holds `index.json`, which says what was collected, shards `shard-00000.safetensors`, each of the same number of
sequences, and `SHA256SUMS`. A shard has `tokens` [S,T] int32 and for each head and factor a tensor
`{layer}.{head}.{factor}` [S,T,...]: `k` and `u` for writes; for states also `q`, `log_decay`, and `beta` or `a` and `b`
for what is erased. An erase that follows from the key, the delta rules' a = -beta k and b = alpha k, is stored as
`beta` alone. Vectors are in the collection's dtype, numbers (one log-decay or beta a head) in float32.

At K = V = 128 a write costs 512 bytes in two-byte dtypes, where the dense matrix has 64 KB in float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Self, cast

import torch
from safetensors import safe_open
from torch import Tensor

from hookpoints import HookedRecurrent, Recurrence
from hookpoints.files import CHECKSUMS, SealedFolder, content_hash, file_hash, read_json, tensors_hash
from sae_lens_writesae.atom.mapped import Mapped, RowIndex
from sae_lens_writesae.sae.target import HeadTarget, Target
from sae_lens_writesae.sae.texts import Text, token_rows

INDEX = "index.json"
FORMAT = 2
"""Version of the files."""
FactorDtype = Literal["float16", "bfloat16", "float32"]
CollectionIndex = dict[str, Any]
"""What `index.json` holds: what was asked for, and then what a first batch showed."""


class CollectionError(ValueError):
    """A folder does not hold the whole collection that was asked for; the message names the file."""


class Collection:
    """A whole collection on disk. `collect` makes one, `Collection.open` reads one. Nothing is read before it is asked
    for, and files are mapped, not copied. When something is first asked for, each shard is read once and its hash
    compared; CollectionError names one that was changed, is missing or is a link."""

    def __init__(self, sealed: SealedFolder, index: CollectionIndex):
        self.folder = sealed.folder
        self._sealed = sealed
        self._index = index
        self.n_sequences, self.context_size = cast("list[int]", index["shape"])
        self.dtype: FactorDtype = index["dtype"]
        self.model_name: str = index["model_name"]
        self.heads: dict[int, list[int]] = {int(layer): heads for layer, heads in index["heads"].items()}
        self.total_bytes = self.n_sequences * sequence_bytes(index)
        self._mapped: dict[str, Mapped] = {}

    @classmethod
    def open(
        cls,
        folder: str | Path,
        *,
        model: HookedRecurrent | None = None,
        text: Text | None = None,
        context_size: int = 128,
    ) -> Self:
        """Open a collection. Hashes of shards are compared when they are first mapped.

        Args:
            model: refuse a collection of other weights. Cost: a pass over the weights.
            text, context_size: with `model`, refuse a collection of a text whose first sequence is another.

        Raises:
            CollectionError: a file is missing, the index was changed, the collection is not finished, of an earlier
                format, or not of `model` or `text`.
        """
        sealed = SealedFolder(Path(folder), CollectionError)
        sealed.require()
        index = read_json(sealed.file(INDEX))
        expected: CollectionIndex = {"format": FORMAT}
        if model is not None:
            expected["model"] = model_hash(model)
        if model is not None and text is not None:
            expected["first_sequence"] = content_hash(list(islice(token_rows(model, text, context_size), 1)))
        check_same(sealed.folder, index, expected)
        _check_sizes(sealed, index)
        return cls(sealed, index)

    @cached_property
    def sha256(self) -> str:
        """Names the collection: the hash of the checksums of all its files."""
        return file_hash(self.folder / CHECKSUMS)

    @cached_property
    def tokens(self) -> Tensor:
        """[n_sequences,T] token ids, int64."""
        return self._mapped_rows("tokens")[:].long()

    def origin(self) -> dict[str, str | None]:
        """`HookedRecurrent.origin` of the model that was run."""
        return {name: self._index.get(name) for name in ("model_name", "revision", "fingerprint")}

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

    def factors(self, layer: int, head: int) -> tuple[Mapped, Mapped]:
        """Keys [N,R,K] and values [N,R,V] of all writes of a head, N = n_sequences * T, mapped: token n adds
        sum_r k_nr u_nr^T."""
        self.head_target(layer, head)
        keys = self._mapped_rows(f"{layer}.{head}.k")
        values = self._mapped_rows(f"{layer}.{head}.u")
        R = keys.shape[2] if len(keys.shape) == 4 else 1

        def by_token(side: Mapped) -> Mapped:
            return Mapped([part.reshape(-1, R, part.shape[-1]) for part in side.parts])

        return by_token(keys), by_token(values)

    def recurrence(self, layer: int, head: int, sequences: RowIndex = slice(None)) -> Recurrence:
        """The recurrence of a head (H = 1) on some sequences, from which `states()` and the rest are computed.

        Raises:
            CollectionError: only writes were collected.
        """
        self.head_target(layer, head, "state")
        described: CollectionIndex = self._index["layers"][str(layer)]
        stored: dict[str, Any] = {
            name: self._mapped_rows(f"{layer}.{head}.{name}")[sequences].unsqueeze(2) for name in described["factors"]
        }
        if "beta" in stored:  # b = alpha k is made again; a = -beta k follows from beta in `Recurrence`
            stored["b"] = faded(stored["k"].float(), stored.get("log_decay"))
        return Recurrence(**stored, scale=described["scale"], read_before_write=described["read_before_write"])

    def _mapped_rows(self, name: str) -> Mapped:
        if name not in self._mapped:
            # Each file is opened after its hash was compared, and stays mapped.
            files = (safe_open(self._sealed.file(shard), framework="pt") for shard in shard_spans(self._index))
            mapped = Mapped([file.get_tensor(name) for file in files])
            if mapped.shape[:2] != (self.n_sequences, self.context_size):
                raise CollectionError(
                    f"{self.folder}: expected {name} of {self.n_sequences} sequences of {self.context_size} tokens, as "
                    f"{INDEX} says, got {mapped.shape[:2]}; collect again"
                )
            self._mapped[name] = mapped
        return self._mapped[name]


# ------------------------------------------------------------------------------------------------ what files say


def faded(k: Tensor, log_decay: Tensor | None) -> Tensor:
    """alpha k, like `k`."""
    if log_decay is None:
        return k
    missing_axes = k.ndim - log_decay.ndim
    return log_decay.exp()[(..., *[None] * missing_axes)] * k


def shard_spans(index: CollectionIndex) -> dict[str, range]:
    """Numbers of the sequences in each shard, by its name."""
    n = index["shape"][0]
    size = index["sequences_per_shard"]
    starts = range(0, n, size)
    return {f"shard-{i:05d}.safetensors": range(start, min(start + size, n)) for i, start in enumerate(starts)}


def sequence_bytes(index: CollectionIndex) -> int:
    """Size of the numbers of one sequence. Headers of files add some thousandths."""
    token = 4  # its id
    for layer, described in index["layers"].items():
        for dtype, shape in described["factors"].values():
            token += len(index["heads"][layer]) * math.prod(shape) * getattr(torch, dtype).itemsize
    return index["shape"][1] * token


def check_same(folder: Path, index: Mapping[str, object], asked: CollectionIndex) -> None:
    """Raise CollectionError that names what differs."""
    if differing := [name for name, value in asked.items() if index.get(name) != value]:
        raise CollectionError(
            f"{folder / INDEX}: expected the collection that was asked for, got one of another {', '.join(differing)}; "
            "name another folder, or collect again where the format is another"
        )


def _check_sizes(sealed: SealedFolder, index: CollectionIndex) -> None:
    """Raise CollectionError unless the sizes in the index are whole numbers that give the shards of the seal. Costs
    nothing that grows with these sizes, which are someone else's."""
    shape, per_shard = index.get("shape"), index.get("sequences_per_shard")
    n_sealed = sum(name.startswith("shard-") for name in sealed.sums or ())
    match [shape, per_shard]:
        case [[int(n), int(length)], int(size)] if min(n, length, size) > 0 and -(-n // size) == n_sealed:
            return
    raise CollectionError(
        f"{sealed.folder / INDEX}: expected a shape and sequences_per_shard of {n_sealed} shards, as {CHECKSUMS} has, "
        f"got {shape} and {per_shard}; collect again"
    )


def model_hash(model: HookedRecurrent) -> str:
    """SHA-256 of every parameter and buffer. Cost: one pass over them."""
    return tensors_hash(model.hf_model.state_dict())
