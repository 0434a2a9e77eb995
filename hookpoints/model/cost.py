"""What hooks, memories and states hold, in bytes: counted in a pass over shapes alone, on PyTorch's device "meta"."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental import _config as of_shapes
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig

from hookpoints.errors import HookpointsError, InputError, UnsupportedModelError
from hookpoints.hooks.cache import NamesFilter
from hookpoints.hooks.guard import find_hooks
from hookpoints.memory.caches import tensors_of
from hookpoints.memory.memory import read
from hookpoints.model import loading
from hookpoints.model.recurrent import HookedRecurrent
from hookpoints.model.selfcheck import choose_cache


@dataclass(frozen=True)
class HookCost:
    """Hooks that differ in layer and head alone."""

    name: str
    """``blocks.{l}.mixer.heads.{h}.hook_write``."""
    n: int
    """So many hooks of the model have this name and size."""
    shape: tuple[int, ...]
    """Of the activation of one sequence, [1,T,...]."""
    dtype: torch.dtype
    bytes: int
    """Of one of them, for one sequence."""


@dataclass(frozen=True)
class Cost:
    """Bytes of one sequence of T tokens; B sequences take B times as many, and the weights are there once."""

    model_name: str
    T: int
    dtype: torch.dtype
    """Of the weights. Factors, writes, states and patterns are float32 also where these are narrower."""
    weights: int
    hooks: tuple[HookCost, ...]
    """All that the model has, in order of execution."""
    cached: int
    """What ``run_with_cache`` keeps of the hooks that were asked for. Those that show one tensor (``hook_resid_post``
    and the next ``hook_resid_pre``) count once."""
    state: int
    """The states of all recurrent layers. It does not depend on T."""
    memory: int | None
    """``model.memory``: states, caches, and what it stores of each token. None: the model has no memories."""


def cost(
    model: HookedRecurrent | PreTrainedConfig | str,
    *,
    tokens: int,
    dtype: torch.dtype | None = None,
    names_filter: NamesFilter = None,
) -> Cost:
    """What hooks of a model hold for a sequence of T = ``tokens`` tokens. No weights are read or made.

        >>> from hookpoints import cost
        >>> write = "blocks.1.mixer.heads.0.hook_write"
        >>> cost("embedded", tokens=128, names_filter=write).cached == 128 * 32 * 64 * 4
        True

    The pass itself is not in it: layers take memory for a while, which depends on the kernels that run them.

    Args:
        model: a name or folder as for ``from_pretrained``, a configuration of transformers, or a hooked model.
        dtype: of the weights; None: that of the hooked model, and float32 for a name or configuration.
        names_filter: as for ``run_with_cache``; None: every hook but matrices and patterns.

    Cost: a pass without numbers and one of a memory, some seconds at the sizes of published models. A filter takes
    another pass.

    Raises:
        InputError: no tokens.
        UnknownModelError, UnsupportedModelError: no such model, or one that cannot be hooked or run without numbers.
        UnknownHookError: ``names_filter`` names a hook that is not there.
    """
    if tokens < 1:
        raise InputError(f"tokens: expected 1 or more, got {tokens}")
    empty = _empty_copy(model, dtype)
    ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
    # Attention that picks tokens by their scores (GLM-5-Next, Qwen4) is taken to pick all: hooks hold the same.
    picks_all = of_shapes.patch(meta_nonzero_assume_all_nonzero=True)  # pyright: ignore[reportAttributeAccessIssue]
    with torch.no_grad(), _NoNumbers(), picks_all:
        try:
            every = _kept_tensors(empty, ids, lambda name: True)
        except (NotImplementedError, RuntimeError) as error:
            raise UnsupportedModelError(
                f"the cost of {empty.cfg.model_name} cannot be counted: a layer of it needs numbers to run ({error})"
            ) from error
        if names_filter is None:  # no matrix, and none that shares its storage with one
            chosen = {name: every[name] for name, _ in empty.get_caching_hooks()[1]}
        else:
            chosen = _kept_tensors(empty, ids, names_filter)
        memory = _memory_bytes(empty, ids)
    states = [value[:, 0] for name, value in every.items() if name.endswith("mixer.hook_state")]
    return Cost(
        model_name=empty.cfg.model_name,
        T=tokens,
        dtype=empty.cfg.dtype,
        weights=held([*empty.hf_model.parameters(), *empty.hf_model.buffers()]),
        hooks=tuple(kinds(every)),
        cached=held(chosen.values()),
        state=sum(state.numel() * state.element_size() for state in states),
        memory=memory,
    )


def held(tensors: Iterable[Tensor]) -> int:
    """Bytes that tensors keep: of each storage once, and whole, also where a tensor shows a part of it."""
    storages = {storage._cdata: storage.nbytes() for storage in (x.untyped_storage() for x in tensors)}
    return sum(storages.values())


class _NoNumbers(TorchFunctionMode):
    """Answers what a pass asks of numbers, where there are none: tensors are equal, no condition holds, and what is
    copied to the host is 0."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.equal:
            return True
        if func is Tensor.cpu:
            return torch.zeros_like(args[0], device="cpu")
        if func in (Tensor.__bool__, Tensor.item):
            return False
        return func(*args, **(kwargs or {}))


def _empty_copy(model: HookedRecurrent | PreTrainedConfig | str, dtype: torch.dtype | None) -> HookedRecurrent:
    """A copy of the model on the device "meta"."""
    name = None
    if isinstance(model, str):
        name = model
        hf_model = loading.load(model, device="meta").model
    elif isinstance(model, HookedRecurrent):
        name = model.cfg.model_name
        dtype = dtype or model.cfg.dtype
        hf_model = loading.empty(model.hf_model.config)
    else:
        hf_model = loading.empty(model)
    if (set_experts := getattr(hf_model, "set_experts_implementation", None)) is not None:
        set_experts("batched_mm")  # the others look at which expert a token goes to
    return HookedRecurrent.from_hf(hf_model.to(dtype or torch.float32), name=name, self_check=False)


def _kept_tensors(model: HookedRecurrent, ids: Tensor, names_filter: NamesFilter) -> dict[str, Tensor]:
    """What ``run_with_cache`` keeps, by hook."""
    if names_filter is not None and not callable(names_filter):
        asked = [names_filter] if isinstance(names_filter, str) else names_filter
        names_filter = [name for one in asked for name in find_hooks(model, one)]
    cache, keeping, _ = model.get_caching_hooks(names_filter)
    with model.hooks(fwd_hooks=keeping):
        model.hf_model(input_ids=ids, use_cache=False)
    return cache


def _memory_bytes(model: HookedRecurrent, ids: Tensor) -> int | None:
    choose_cache(model)
    try:
        memory = read(model, ids)
    except HookpointsError:
        return None
    return held([*memory.kept.named().values(), *tensors_of(memory.cache).values()])


def kinds(cache: Mapping[str, Tensor]) -> Iterable[HookCost]:
    """The hooks of a cache, those that are alike together."""
    counts: Counter[tuple[str, tuple[int, ...], torch.dtype]] = Counter()
    for name, value in cache.items():
        kind = re.sub(r"heads\.\d+", "heads.{h}", re.sub(r"blocks\.\d+", "blocks.{l}", name))
        counts[kind, tuple(value.shape), value.dtype] += 1
    for (kind, shape, dtype), n in counts.items():
        size = torch.Size(shape).numel() * dtype.itemsize
        yield HookCost(name=kind, n=n, shape=shape, dtype=dtype, bytes=size)
