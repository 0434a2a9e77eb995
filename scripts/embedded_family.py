"""What the training script must know about an architecture.

A family says how to build its model, which parameters are gates (they learn more slowly, see `Recipe.gate_factor`), how
to run its recurrence in fp32 under autocast, and how to read decays, keys and erase factors of every head.

Axes: B batch, T time, H head, K key, V value.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

TRAINING_CHUNK = 32

Op = Callable[..., object]


class Transition(NamedTuple):
    """What a recurrent layer does to its state's key side: p_t = alpha_t p_{t-1} + a_t <b_t, p_{t-1}>."""

    key: Tensor  # [B, T, H, K], the key of the write
    alpha: Tensor  # [B, T, H, 1] or [B, T, H, K], decay in (0, 1]
    write: Tensor  # [B, T, H], strength of the write: beta (Gated DeltaNet) or dt (Mamba-2)
    a: Tensor | None  # [B, T, H, K], erase: direction that is changed; None without an erase term
    b: Tensor | None  # [B, T, H, K], erase: direction that is read


@dataclass(frozen=True)
class Family:
    """One architecture: everything the training script needs to know about it."""

    title: str
    model_class: type[PreTrainedModel]
    build: Callable[[int, int], PreTrainedModel]  # (vocabulary, end-of-text id) -> initialised model
    gates: tuple[str, ...]  # parameter-name endings that train with the gate learning rate
    write_name: str  # what `Transition.write` is called in the literature
    architecture: str  # a sentence or two for the card
    recurrence_formula: str  # how p_t, the trace of a write, goes on; for the card
    module: ModuleType
    op: str  # name of the recurrence in `module`
    read: Callable[..., Transition]  # the op's arguments -> transition
    train: Callable[..., object]  # (original op, its arguments) -> its result, fast to train

    @contextmanager
    def recurrence(self, wrap: Callable[..., Any]) -> Iterator[None]:
        """Call `wrap(original_op, *args, **kwargs)` in place of the recurrence, until the block ends."""
        original = getattr(self.module, self.op)
        setattr(self.module, self.op, lambda *args, **kwargs: wrap(original, *args, **kwargs))
        try:
            yield
        finally:
            setattr(self.module, self.op, original)

    def training_recurrence(self) -> AbstractContextManager[None]:
        """The recurrence in fp32 whatever autocast says, in chunks of 32 (8 % faster here than 64)."""

        def wrap(original: Op, *args: Any, **kwargs: Any) -> object:
            with torch.autocast("cpu", enabled=False):
                return self.train(original, *args, **{**kwargs, "chunk_size": TRAINING_CHUNK})

        return self.recurrence(wrap)

    @torch.no_grad()
    def transitions(self, model: PreTrainedModel, tokens: Tensor) -> list[Transition]:
        """Transition of every recurrent layer, from the bottom up, on `tokens` [B, T]."""
        found: list[Transition] = []

        def wrap(original: Op, *args: Any, **kwargs: Any) -> object:
            found.append(self.read(*args, **kwargs))
            return original(*args, **kwargs)

        with self.recurrence(wrap):
            model(tokens, use_cache=False)
        if not found:
            raise RuntimeError(
                f"{self.op} was never called: this version of transformers names its recurrence otherwise"
            )
        return found
