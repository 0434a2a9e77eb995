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
from hookpoints.files import atomic_write

if TYPE_CHECKING:
    from hookpoints.model.recurrent import HookedRecurrent

_NAME = "blocks.{}.att.time_state"


def load_states(path: str | Path, model: HookedRecurrent) -> dict[int, Tensor]:
    """The states [1,H,K,V] of a file by layer, in float32 on the devices of the layers. No code from the file is run.

    ``memory.rewind(0).with_states(load_states(path, model))`` is the memory of a model that begins with them.

    Raises:
        InputError: the file is damaged, or its tensors are not states of this model, by name, dtype or shape.
        FileNotFoundError: there is none.
    """
    try:
        named = dict[object, object](torch.load(path, map_location="cpu", weights_only=True))
    except OSError:
        raise
    except Exception as error:  # those of the unpickler, the archive and storages have no narrower class
        raise InputError(f"{path}: expected tensors by name, as torch.save writes them, got {error}") from error
    wanted = {_NAME.format(layer): (layer, [size.H, size.V, size.K]) for layer, size in model.cfg.layers.items()}
    if differing := sorted(map(str, wanted.keys() ^ named.keys())):
        raise InputError(f"{path}: expected {_NAME} of {len(wanted)} layers, got others or fewer: {differing[:3]}")
    states: dict[int, Tensor] = {}
    for name, (layer, shape) in wanted.items():
        state = named[name]
        if not isinstance(state, Tensor) or not state.is_floating_point() or list(state.shape) != shape:
            got = f"{state.dtype} {list(state.shape)}" if isinstance(state, Tensor) else type(state).__name__
            raise InputError(f"{path}: expected {name} to be floats [H,V,K] {shape}, got {got}")
        states[layer] = state.mT[None].to(model.hook_device(f"blocks.{layer}.mixer"), torch.float32)
    return states


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
