"""Damaged folders: one bit flipped or the end cut off, at a random place of a random file; and what loading says then.

Outcomes of loading a damaged folder:

* identical: outputs and tokens are those of the whole folder, bit for bit (the damage is where nothing reads);
* refused: an error of this project that names the damaged file;
* no tokenizer: the model is whole, and a warning that names the file says that it has no tokenizer;
* another number: what was flipped is still valid there (a weight, a setting, an entry of a vocabulary), and is taken as
  it stands. Nothing can tell, unless the folder has checksums: then this must not come;
* fault: anything else (an error of a lower library, one without the file's name, a hang, NaN). It must not come.
"""

from __future__ import annotations

import random
import shutil
import signal
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from hookpoints import HookedRecurrent
from hookpoints.errors import HookpointsError
from sae_lens_writesae.sae.load import CheckpointError, load_sae

PATIENCE = 60
"""Seconds after which loading counts as hanging."""
TEXT = "The state of the Union — 12 years, naïve"


class Hang(BaseException):
    """Loading took too long."""


@dataclass
class Outcomes:
    """How often each outcome came."""

    counts: Counter[str] = field(default_factory=Counter)
    changed: Counter[str] = field(default_factory=Counter)
    """Files in which a number was another one."""
    faults: list[str] = field(default_factory=list)
    """What was done, and what came of it."""


Loaded = dict[str, Tensor | str]
"""What is compared: outputs, and the tokenizer's words."""


def load_model(folder: Path) -> Loaded:
    """Logits of a few tokens, and what the tokenizer makes of a text."""
    model = HookedRecurrent.from_pretrained(str(folder), device="cpu")
    try:
        with torch.no_grad():
            found: Loaded = {"logits": model(torch.arange(1, 33)[None])}
        if model.tokenizer is not None:
            found |= {"text": str(model.to_str_tokens(TEXT)), "tokens": model.to_tokens(TEXT)}
        return found
    finally:
        model.attachment.detach()


def load_dictionary(folder: Path) -> Loaded:
    """Activations and reconstructions of a few matrices."""
    sae = load_sae(folder)
    x = torch.randn(8, sae.cfg.d_in, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        acts = sae.encode(x)
        return {"acts": acts, "out": sae.decode(acts)}


@contextmanager
def _patience() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(PATIENCE)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _equal(a: Loaded, b: Loaded) -> bool:
    return a.keys() == b.keys() and all(_same(value, b[name]) for name, value in a.items())


def _same(a: Tensor | str, b: Tensor | str) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b


def damaged(data: bytes, draw: random.Random) -> tuple[bytes, str]:
    """A copy with one bit flipped or its end cut off, and what was done."""
    at = draw.randrange(len(data))
    if draw.random() < 0.2:
        return data[:at], f"cut at {at}"
    flipped = bytearray(data)
    flipped[at] ^= 1 << draw.randrange(8)
    return bytes(flipped), f"bit of byte {at} flipped"


def throw(folder: Path, load: Callable[[Path], Loaded], work: Path, n: int, seed: int = 0) -> Outcomes:
    """Damage a copy of ``folder`` n times, each time anew, and load it. Each file is hit equally often; in a weights
    file half of the hits go to the header."""
    outcomes, draw = Outcomes(), random.Random(seed)
    copy = work / "damaged-folder"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    whole = {file: file.read_bytes() for file in sorted(copy.iterdir()) if file.suffix in (".json", ".safetensors", "")}
    expected = load(copy)
    for _ in range(n):
        file = draw.choice(sorted(whole))
        data, what = damaged(whole[file], draw)
        if file.suffix == ".safetensors" and draw.random() < 0.5:
            header = 8 + int.from_bytes(whole[file][:8], "little")
            head, what = damaged(whole[file][:header], draw)
            data = head + whole[file][header:] if len(head) == header else head
        file.write_bytes(data)
        try:
            outcome = _outcome(load, copy, file, expected)
        except (Exception, Hang) as error:
            outcome = f"fault: {type(error).__name__}: {error}"
        file.write_bytes(whole[file])
        if outcome == "another number":
            outcomes.changed[file.name] += 1
        elif outcome.startswith("fault"):
            outcomes.faults.append(f"{file.name}, {what}: {outcome[:300]}")
            outcome = "fault"
        outcomes.counts[outcome] += 1
    return outcomes


def _outcome(load: Callable[[Path], Loaded], folder: Path, file: Path, expected: Loaded) -> str:
    with warnings.catch_warnings(record=True) as said, _patience():
        warnings.simplefilter("always")
        try:
            found = load(folder)
        except (HookpointsError, CheckpointError) as error:
            return "refused" if file.name in str(error) else f"fault: the file is not named: {error}"
    if _equal(expected, found):
        return "identical"
    if not all(bool(torch.isfinite(x).all()) for x in found.values() if isinstance(x, Tensor)):
        return "fault: not finite"
    if "tokens" in expected and "tokens" not in found:
        named = any(file.name in str(each.message) for each in said)
        return "no tokenizer" if named and _equal(found, {"logits": expected["logits"]}) else "fault: without a word"
    return "another number"
