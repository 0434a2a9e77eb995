"""Small language models that ship with the package, and text that they have not seen.

    >>> from hookpoints import embedded
    >>> embedded.path("embedded").name
    'gdn'
    >>> len(embedded.text("test")) > 100_000
    True

Every folder that `path` returns is an ordinary Hugging Face checkpoint with its tokenizer and a model card.
The text is the part of the corpus that was held out from every model and tokenizer here: train an SAE on
`text("train")`, evaluate it on `text("test")`. Standard library only; nothing is downloaded.
"""

import lzma
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Literal, get_args

__all__ = ["Split", "divide", "mixed", "names", "path", "text"]

Split = Literal["train", "test", "all"]

_HERE = Path(__file__).parent
_FOLDERS = {"embedded": "gdn", "embedded-mamba2": "mamba2", "embedded-rwkv7": "rwkv7"}
# A form feed separates the held-out blocks in the file; tools/train_embedded.py writes it.
_SEPARATOR = "\f"
# Every 4th held-out block, from the first, is for evaluation.
_TEST_EVERY = 4


def names() -> list[str]:
    """Names of the models in this installation, "embedded" (Gated DeltaNet) first."""
    return [name for name, folder in _FOLDERS.items() if (_HERE / folder / "model.safetensors").is_file()]


def path(name: str = "embedded") -> Path:
    """Folder of a model: config.json, model.safetensors (bf16), tokenizer, metrics.json, README.md (card)."""
    if name not in names():
        raise ValueError(f"no embedded model is called {name!r}; available: {', '.join(names()) or 'none'}")
    return _HERE / _FOLDERS[name]


def text(split: Split = "all") -> str:
    """Held-out text: "train" (3/4, to train SAEs on), "test" (1/4, to evaluate on) or "all".

    The parts are whole blocks of 20,000 characters, taken in turn from all periods, so both hold old and new
    speech.
    """
    return "\n\n".join(divide(_text_blocks(), split))


def mixed() -> str:
    """Text of four kinds, 9,000 characters each: speeches of `text("train")`, Python code and documentation (both of
    an early version of this package), and licenses (Apache 2.0, MPL 2.0). A `MemoryReader` that is fitted to it reads
    other texts of these kinds better than one that is fitted to speeches alone."""
    return lzma.decompress((_HERE / "mixed.txt.xz").read_bytes()).decode("utf-8")


def divide(blocks: Sequence[str], split: Split) -> list[str]:
    """The blocks that belong to a part of the held-out text; the rule that `text` applies."""
    if split not in get_args(Split):
        raise ValueError(f"no split is called {split!r}; available: {', '.join(get_args(Split))}")
    if split == "all":
        return list(blocks)
    if split == "test":
        return list(blocks[::_TEST_EVERY])
    return [block for number, block in enumerate(blocks) if number % _TEST_EVERY]


@cache
def _text_blocks() -> tuple[str, ...]:
    return tuple(lzma.decompress((_HERE / "heldout.txt.xz").read_bytes()).decode("utf-8").split(_SEPARATOR))
