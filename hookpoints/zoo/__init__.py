"""Small models whose mechanism is known, with the interventions that show it.

    >>> from hookpoints import HookedRecurrent, zoo
    >>> model = HookedRecurrent.from_pretrained("recall")
    >>> min(zoo.accuracy(model, "recall")) > 0.98
    True
    >>> holder = zoo.truth("recall").holders[0]  # which write holds which symbol

Every folder that `path` returns is an ordinary Hugging Face checkpoint with a tokenizer of whole words ("Ada Paris"), a
truth table and a card. The models of `english` speak, and remember facts told between sentences of speeches.
Each card names the script that trained a model and measured its truth, and the script's commit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import torch
from torch import Tensor

from hookpoints.errors import nearest
from hookpoints.files import read_json
from hookpoints.zoo import english
from hookpoints.zoo.circuits import Induction, Parity
from hookpoints.zoo.tasks import Batch, Composition, Facts, Recall

__all__ = ["Batch", "Holder", "Task", "Truth", "accuracy", "english", "names", "path", "task", "truth"]

Task = Recall | Composition | Facts | Induction | Parity
"""``vocabulary``: names of the token ids, the first is "<bos>". ``batch(n, generator, **size)``: n fresh sequences,
with ``queries`` for Q questions in each; ``sizes``: all that a model learns, equally frequent in training.
``spell(symbols)``: the sequences that symbols spell. ``others(values, generator)``: for each value another one, whose
answers are all different."""
_HERE = Path(__file__).parent
_TASKS: dict[str, Task] = {
    "recall": Recall(),
    "recall-mamba2": Recall(),
    "recall-rwkv7": Recall(),
    "composition": Composition(),
    "facts": Facts(),
    "facts-mamba2": Facts(),
    "induction": Induction(),
    "parity": Parity(),
}
"""What each model was trained on, but those of `english`. A model lies in the folder of its name."""


@dataclass(frozen=True)
class Holder:
    """One fact about a mechanism: the write of these heads, ``offset`` tokens after a symbol, holds that symbol."""

    layer: int
    heads: Sequence[int]
    offset: int
    """Tokens after the symbol's own token."""
    holds: str
    """Kind of the symbol: a name in `Batch.symbols` and `Batch.places`."""
    side: str
    """"key" or "value": the factor of the write that says which symbol it is."""
    evidence: Mapping[str, float]
    """Rates of answers in [0,1], by intervention."""


@dataclass(frozen=True)
class Truth:
    """What interventions found in a model; by the script that its card names."""

    accuracy: Mapping[str, float]
    """By size of the task."""
    holders: Sequence[Holder]
    """The smallest sets of writes that decide the answer."""
    table: Sequence[Mapping[str, float]]
    """Every layer, head and offset (tokens after the first symbol of a pair), also those that do nothing."""
    facts: Mapping[str, float]
    """Further measurements of this model."""
    told: Mapping[str, object] = field(default_factory=dict[str, object])
    """Of models of `english`: names, relations with values and wordings, and what training never had."""


def names() -> list[str]:
    """Names of the models in this installation, "recall" (Gated DeltaNet) first."""
    return [name for name in (*_TASKS, *english.MODELS) if (_HERE / name / "model.safetensors").is_file()]


def path(name: str) -> Path:
    """Folder of a model: config.json, model.safetensors, tokenizer, truth.json, README.md (card)."""
    if name not in names():
        raise ValueError(f"no model of the zoo is called {name!r}; available: {', '.join(names()) or 'none'}")
    return _HERE / name


def task(name: str) -> Task:
    """What a model was trained on.

    Raises:
        ValueError: there is no such model, with the names of those that there are; or its texts are drawn by
            `english.draw`.
    """
    if name in english.MODELS:
        raise ValueError(f"expected a model of whole words, got {name!r}; zoo.english.draw draws its texts")
    if name not in _TASKS:
        raise ValueError(f"expected a model of the zoo ({', '.join(_TASKS)}), got {name!r}{nearest(name, _TASKS)}")
    return _TASKS[name]


def truth(name: str) -> Truth:
    """The truth table of a model."""
    saved = cast("dict[str, Any]", read_json(path(name) / "truth.json"))
    saved["holders"] = [Holder(**row) for row in saved["holders"]]
    return Truth(**saved)


@torch.no_grad()
def accuracy(model: Callable[[Tensor], Tensor], name: str, n: int = 64, seed: int = 1_000) -> list[float]:
    """Share of right answers in fresh sequences, n of each of ``task(name).sizes``, in their order; for the models of
    `english` in n documents of each of ``english.SIZES``.

    The model is called with token ids [B,T] and returns logits [B,T,vocab]; a `HookedRecurrent` does.
    """
    if name in english.MODELS:
        documents = (english.draw(n, facts, seed=seed) for facts in english.SIZES)
        return [fmean(right for _, right in english.answered(model, each)) for each in documents]
    generator = torch.Generator().manual_seed(seed)
    shares = list[float]()
    for size in task(name).sizes:
        batch = task(name).batch(n, generator, **size)
        answers = model(batch.tokens).argmax(dim=-1).cpu().gather(1, batch.positions)
        shares.append((answers == batch.answers).double().mean().item())
    return shares
