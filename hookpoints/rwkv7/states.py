"""State files of RWKV-7, as RWKV-PEFT trains them and RWKV-Runner loads them: the states with which a model begins.

A file of ``torch.save`` with ``blocks.{layer}.att.time_state`` [H,V,K] for each layer. States of RWKV-5 and RWKV-6 have
the same names and are [H,K,V].
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hookpoints.errors import InputError
from hookpoints.files import atomic_write, check_tensors
from hookpoints.rwkv7.official import stored_tensors

if TYPE_CHECKING:
    from hookpoints.model.recurrent import HookedRecurrent

_NAME = "blocks.{}.att.time_state"


def load_states(path: str | Path, model: HookedRecurrent) -> dict[int, Tensor]:
    """The states [1,H,K,V] of a file by layer, in float32 on the devices of the layers. No code from the file is run.

    ``memory.rewind(0).with_states(load_states(path, model))`` is the memory of a model that begins with them.

    Raises:
        InputError: the file is damaged, or its tensors are not states of this model, by name, dtype or shape, or not
            finite.
        FileNotFoundError: there is none.
    """
    # A file may have them in half precision.
    named = {name: x.to(torch.float32) if x.is_floating_point() else x for name, x in stored_tensors(path).items()}
    layers = model.cfg.layers
    kinds = {_NAME.format(layer): (torch.float32, [size.H, size.V, size.K]) for layer, size in layers.items()}
    check_tensors(path, named, kinds, finite=True)
    return {n: named[_NAME.format(n)].mT[None].to(model.hook_device(f"blocks.{n}.mixer")) for n in layers}


def save_states(path: str | Path, states: Mapping[int, Tensor]) -> None:
    """Write states [1,H,K,V] by layer in float32, aside and then renamed. A file has no token shifts: a model begins
    without any where it is loaded.

    Raises:
        InputError: states of several rows.
        OSError: it cannot be written, or ``path`` is a link, a folder or a device, which is not replaced.
    """
    if several := {layer: list(state.shape) for layer, state in states.items() if state.ndim != 4 or len(state) != 1}:
        raise InputError(f"states: expected one row [1,H,K,V] of each layer, got {several}")
    turned = {layer: state[0].mT.detach().to("cpu", torch.float32) for layer, state in states.items()}
    # Clones, as torch.save writes all of what a view is of.
    named = {_NAME.format(layer): x.clone(memory_format=torch.contiguous_format) for layer, x in turned.items()}
    atomic_write(Path(path), lambda file: torch.save(named, file))
