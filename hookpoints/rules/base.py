"""What a rule is: the translation between an upstream op's arguments and the canonical recurrence."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from hookpoints.recurrence.recurrence import Recurrence


@dataclass(frozen=True, eq=False)
class Factors:
    """The quantities of one op call, as its rule uses them: normalised, grouped heads expanded, key-first.

    A field that a rule lacks is None, and so has no hook.
    """

    q: Tensor
    """[B,T,H,K] read vector, unscaled."""
    k: Tensor
    """[B,T,H,K] key; [B,T,H,R,K] where a token takes R steps, and likewise below."""
    v: Tensor
    """[B,T,H,V] or [B,T,H,R,V] value."""
    beta: Tensor | None = None
    """[B,T,H] or [B,T,H,R] write strength."""
    log_decay: Tensor | None = None
    """[B,T,H] or [B,T,H,K] natural log-decay, <= 0."""
    back: Tensor | None = None
    """[B,T,H,K] key with which the erase reads the state, where it is neither k nor made of k. It has no hook."""
    initial_state: Tensor | None = None
    """[B,H,K,V] or None for zeros."""

    NAMES = ("q", "k", "v", "beta", "log_decay")

    def present(self) -> tuple[str, ...]:
        """Names of the factors that this call has, in order of execution."""
        return tuple(name for name in self.NAMES if getattr(self, name) is not None)

    def by_token(self) -> dict[str, Tensor]:
        """All that has a time axis."""
        return {name: x for name in (*self.NAMES, "back") if (x := getattr(self, name)) is not None}

    def with_(self, **changes: Tensor) -> Factors:
        """A copy with some factors exchanged."""
        return replace(self, **changes)


class OpResult(NamedTuple):
    """Outputs of an op in canonical layout."""

    outputs: Tensor
    """[B,T,H,V] reads, in the op's own dtype."""
    final_state: Tensor | None
    """[B,H,K,V], or None where the caller did not ask for it."""


class Rule(Protocol):
    """One update rule: which ops compute it and how their arguments map to the canonical form."""

    @property
    def name(self) -> str:
        """Name of the rule, as papers call it."""
        ...

    @property
    def ops(self) -> tuple[str, ...]:
        """Names of the upstream functions that compute it; a mixer that calls the first is of this rule."""
        ...

    @property
    def companions(self) -> tuple[str, ...]:
        """Other fast ops of the same layers (convolutions) that only need to be kept on the right device."""
        ...

    @property
    def fused(self) -> tuple[str, ...]:
        """Ops that would compute a whole layer in one kernel, past the recurrent op; a hooked mixer declines them."""
        ...

    @property
    def torch_only(self) -> frozenset[str]:
        """Factors that only the torch op can be fed apart from the others; fast kernels tie them together."""
        ...

    @property
    def factor_names(self) -> tuple[str, ...]:
        """Fields of Factors that the rule has."""
        ...

    def head_shape(self, mixer: torch.nn.Module) -> tuple[int, int, int]:
        """(H, K, V) of a mixer module."""
        ...

    @property
    def rank(self) -> int:
        """R, the number of steps that a token takes and so the rank of its write. Factors have an axis for them where
        there are several."""
        ...

    def for_mixer(self, mixer: torch.nn.Module) -> Rule:
        """The rule as this mixer uses it: itself, unless the mixer has a size that its op calls do not tell."""
        ...

    def runs(self, op: Callable[..., Any], arguments: Mapping[str, Any]) -> bool:
        """Whether upstream's op can compute this call where its tensors are; else hookpoints' own kernel does."""
        ...

    def factors(self, arguments: Mapping[str, Any]) -> Factors:
        """The canonical factors of an op call."""
        ...

    def arguments(self, arguments: Mapping[str, Any], factors: Factors, changed: Set[str]) -> dict[str, Any]:
        """Arguments with which the op returns reads of the state, and takes the factors named in ``changed``
        instead of its own. What a layer lets its op add on top (a skip, a gate) is left to ``write_result``."""
        ...

    def recurrence(self, factors: Factors, arguments: Mapping[str, Any]) -> Recurrence:
        """The canonical recurrence of an op call."""
        ...

    def output_dtype(self, arguments: Mapping[str, Any]) -> torch.dtype:
        """The dtype in which the torch op returns its outputs."""
        ...

    def wants_state(self, arguments: Mapping[str, Any]) -> bool:
        """Whether the caller asked for the final state."""
        ...

    def read_result(self, native: Any, arguments: Mapping[str, Any]) -> OpResult:
        """Canonical view of what the op returned for ``arguments``."""
        ...

    def write_result(self, result: OpResult, arguments: Mapping[str, Any]) -> Any:
        """What the layer, which gave ``arguments``, expects back from the op, holding ``result``."""
        ...


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """float64 stays; everything else is computed in float32, as the upstream ops do."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def l2_normalise(x: Tensor) -> Tensor:
    """x over its norm on the last axis, with upstream's epsilon of 1e-6 inside the root."""
    return x * torch.rsqrt((x * x).sum(dim=-1, keepdim=True) + 1e-6)


def expand_groups(tensor: Tensor, heads: int) -> Tensor:
    """Grouped value attention: [B,T,Hk,...] -> [B,T,heads,...], one key head serving consecutive value heads."""
    return tensor if tensor.shape[2] == heads else tensor.repeat_interleave(heads // tensor.shape[2], dim=2)
