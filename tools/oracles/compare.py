"""hookpoints against fla's own kernels: how far apart, by family.

    python tools/oracles/compare.py FOLDER

FOLDER is where ``fla_interpreted.py`` left what the kernels gave. Prints a JSON object, family -> schedule -> errors.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from fla_cpu import import_fla
from fla_families import FAMILIES, OPS, SCHEDULES, make, passes, simple_gla_call
from safetensors.torch import load_file
from torch import Tensor

from hookpoints import HookedRecurrent, Recurrence
from hookpoints.rules.tables import FLA_SIMPLE_GLA

ALL = (*FAMILIES, "simple_gla")


class Errors(NamedTuple):
    """Largest differences from fla in float32, over all passes and layers of one schedule."""

    outputs: float
    """Of the logits of real tokens, absolute; of the op's outputs where the family is an op only (SimpleGLA)."""
    states: float
    """Of the recurrent states, over the largest entry of the state."""


def errors_of(family: str, folder: Path) -> dict[str, Errors]:
    """Schedule -> errors of one family, from ``FOLDER/family.safetensors``.

    Raises:
        FileNotFoundError: the kernels of this family were not run.
    """
    saved = load_file(folder / f"{family}.safetensors")
    return _of_simple_gla(saved) if family == "simple_gla" else _of_model(family, saved)


@torch.no_grad()
def _of_model(family: str, saved: dict[str, Tensor]) -> dict[str, Errors]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what fla's layers advise about their settings
        model = make(import_fla().models, family)
    model.load_state_dict({name.removeprefix("weight."): x for name, x in saved.items() if name.startswith("weight.")})
    hooked = HookedRecurrent.from_hf(model)
    return {schedule: _of_schedule(hooked, schedule, saved) for schedule in SCHEDULES}


def _of_schedule(hooked: HookedRecurrent, schedule: str, saved: dict[str, Tensor]) -> Errors:
    cache, outputs, states = None, [], []
    for i, (tokens, mask) in enumerate(steps := passes(schedule)):
        out = hooked.hf_model(tokens, attention_mask=mask, use_cache=True, past_key_values=cache)
        cache, real = out.past_key_values, steps[i].real
        outputs.append(_largest(out.logits[real], saved[f"{schedule}.{i}.logits"][real]))
        for layer in hooked.cfg.recurrent_layers:
            states.append(relative(cache[layer]["recurrent_state"], saved[f"{schedule}.{i}.state.{layer}"]))
    return Errors(max(outputs), max(states))


def _of_simple_gla(saved: dict[str, Tensor]) -> dict[str, Errors]:
    rule, call = FLA_SIMPLE_GLA, simple_gla_call()
    found = Recurrence.of(rule.form(rule.factors(call), call)).scan()
    return {
        kind: Errors(
            _largest(found.outputs, saved[f"{kind}.outputs"]), relative(found.final_state, saved[f"{kind}.state"])
        )
        for kind in OPS
    }


def relative(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest entry of what is expected."""
    return _largest(found, expected) / float(expected.abs().max())


def _largest(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape, f"{list(found.shape)} against {list(expected.shape)}"
    return float((found - expected).abs().max())


if __name__ == "__main__":
    found = {family: errors_of(family, Path(sys.argv[1])) for family in ALL}
    table = {family: {schedule: errors._asdict() for schedule, errors in own.items()} for family, own in found.items()}
    print(json.dumps(table, indent=1))
