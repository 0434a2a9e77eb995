"""The model from a layer on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Self, TypeAlias

from torch import Tensor

from hookpoints import HookedRecurrent, Recurrence

HookOfName: TypeAlias = tuple[str | Callable[..., bool], Callable[..., Tensor]]
"""As `run_with_hooks` of TransformerLens takes them: a name, and what returns another value than it is given."""


class UpperModel(NamedTuple):
    """The model from a layer on, over sequences, as a function of what is replaced there."""

    model: HookedRecurrent
    layer: int
    tokens: Tensor
    """[B,T]; B = 1 unless a method says otherwise."""
    stream: Tensor
    """[B,T,D], what enters the layer."""
    recurrence: Recurrence
    """Of all heads of the layer."""

    @classmethod
    def of(cls, model: HookedRecurrent, layers: Sequence[int], tokens: Tensor) -> dict[int, Self]:
        """For each of some layers, on tokens [B,T]. Cost: one forward up to the last of them."""
        names = {layer: f"blocks.{layer}.hook_resid_pre" for layer in layers}
        with model.recording(layers) as record:
            _, cache = model.run_with_cache(tokens, names_filter=[*names.values()], stop_at_layer=max(layers) + 1)
        return {n: cls(model, n, tokens, cache[name], record[n].recurrence) for n, name in names.items()}

    def __call__(self, head: int = 0, target: str = "write", matrices: Tensor | None = None) -> Tensor:
        """Logits [B T,vocab]. Cost: a forward from the layer on.

        Args:
            target: "write" or "state". A replaced write goes into the state and is read from then on. A replaced state
                is what its own reads see, while the recurrence resumes from the native one.
            matrices: [B T,K,V] that replace all of the head's; None: nothing is replaced.
        """
        hooks: list[HookOfName] = []
        if matrices is not None:
            name = f"blocks.{self.layer}.mixer.heads.{head}.hook_{target}_vec"
            hooks.append((name, lambda x, hook: matrices.flatten(1).view_as(x).to(x)))
        return self._hooked_logits(len(self.tokens), hooks).flatten(0, 1)

    def without(self, heads: Sequence[int]) -> Tensor:
        """Logits [1+n,T,vocab]: of nothing replaced, and of all writes of each of n heads deleted, which is a head that
        reads zeros. Cost: a forward from the layer on, of 1 + n rows."""
        mask = self.stream.new_ones(1 + len(heads), 1, self.recurrence.H, 1)
        mask[range(1, len(mask)), 0, list(heads)] = 0  # row 0 keeps all heads
        name = f"blocks.{self.layer}.mixer.hook_read"
        return self._hooked_logits(len(mask), [(name, lambda read, hook: read * mask.to(read))])

    def _hooked_logits(self, rows: int, hooks: list[HookOfName]) -> Tensor:
        stream = self.stream.expand(rows, *self.stream.shape[1:])
        tokens = self.tokens.expand(rows, *self.tokens.shape[1:])
        return self.model.run_with_hooks(stream, fwd_hooks=hooks, start_at_layer=self.layer, tokens=tokens)
