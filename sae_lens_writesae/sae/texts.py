"""A text as sequences of tokens, made one by one as it is read: neither it nor they need to fit in memory."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from io import StringIO
from itertools import islice
from pathlib import Path

import torch
from datasets import Dataset, IterableDataset
from sae_lens.tokenization_and_batching import concat_and_batch_sequences
from torch import Tensor
from tqdm.auto import tqdm

from hookpoints import HookedRecurrent

Text = str | Path | Tensor | Dataset | IterableDataset | Iterable[str]
"""What `collect` takes: what `text_dataset` takes; token ids [N,T]; a dataset, streamed or not, with a column of
`_COLUMNS`; or documents, one by one."""
_COLUMNS = ("tokens", "input_ids", "text")
"""Where a dataset has its sequences or its documents; the first that is there."""


def text_dataset(text: str | Path, min_characters: int = 2000) -> IterableDataset:
    """Running text as a dataset with a column `text`: documents of whole lines with `min_characters` or more each.

    A path names a file (UTF-8), and so does a string that ends in `.txt` or that is the name of one. It is read line by
    line whenever the dataset is gone over.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: while it is read, where it is not in UTF-8.
    """
    if isinstance(text, Path) or os.path.isfile(text) or re.fullmatch(r".{,250}\.txt", text):
        text = Path(text).resolve(strict=True)
    return IterableDataset.from_generator(_documents_in, gen_kwargs={"text": text, "min_characters": min_characters})


def _documents_in(text: str | Path, min_characters: int) -> Iterator[dict[str, str]]:
    document = ""
    for line in StringIO(text) if isinstance(text, str) else lines_of(text):
        document += line
        if len(document) >= min_characters:
            yield {"text": document}
            document = ""
    if document.strip():
        yield {"text": document}


def lines_of(file: Path) -> Iterator[str]:
    """The lines of a text file.

    Raises:
        ValueError: it is not in UTF-8.
    """
    try:
        with file.open(encoding="utf-8") as opened:
            yield from opened
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: expected a text in UTF-8, got another encoding ({error}); convert it") from error


def token_rows(model: HookedRecurrent, text: Text, context_size: int) -> Iterator[Tensor]:
    """[T] int32 each. Texts become tokens and are joined in the way of SAELens' store with `prepend_bos=False` and no
    separator; of sequences of ids the first T are taken.

    Raises:
        ValueError: something else than texts, or sequences of T integers.
    """

    def ids_of(document: object) -> Tensor:
        if isinstance(document, Mapping):
            document = next((document[name] for name in _COLUMNS if name in document), ())
        if isinstance(document, str):
            return model.to_tokens(document, prepend_bos=False, truncate=False)[0].int().cpu()
        ids = torch.atleast_1d(torch.as_tensor(document))[:context_size]
        if ids.shape != (context_size,) or ids.is_floating_point():
            raise ValueError(
                f"text: expected texts or sequences of {context_size} integers, by themselves or in a column text, "
                f"tokens or input_ids, got {ids.dtype} {list(ids.shape)}"
            )
        return ids.int().cpu()

    documents = text_dataset(text) if isinstance(text, str | Path) else text
    return concat_and_batch_sequences(map(ids_of, documents), context_size)


def write_tokens(rows: Iterable[Tensor], file: Path, least: int, most: int | None, progress: bool) -> int:
    """Write sequences, so many at least and at most; returns how many.

    Raises:
        ValueError: too short a text.
    """
    n = 0
    with file.open("wb") as out:
        for row in tqdm(islice(rows, most), "tokens", unit=" sequences", disable=not progress):
            n += 1
            out.write(row.numpy().tobytes())
    if n < least:
        raise ValueError(
            f"text: expected {least} sequences or more, got {n} and the end of the text; take a longer text, or fewer "
            "tokens (n_tokens)"
        )
    return n


def mapped_tokens(file: Path, context_size: int) -> Tensor:
    """[N,T] int32 that `write_tokens` wrote, which stay on disk."""
    return torch.from_file(str(file), size=file.stat().st_size // 4, dtype=torch.int32).view(-1, context_size)
