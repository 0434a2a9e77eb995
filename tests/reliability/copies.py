"""Copies, files and moves of a hooked model: right, or refused by name."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import torch

from hookpoints import HookedRecurrent, attach
from hookpoints.errors import HookpointsError
from reliability.interrupts import EDITS, Outputs, fresh

COPIES: dict[str, Callable[[torch.nn.Module], object]] = {
    "copy.copy": copy.copy,
    "copy.deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": lambda model: torch.load(_saved(model), weights_only=False),
}


def _saved(model: torch.nn.Module) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return file


def throw(tokens: torch.Tensor) -> dict[str, str]:
    """What each copy and each move led to: "right", "refused by name", or what went wrong."""
    found = {}
    expected = Outputs(fresh(), tokens)
    for name, made in COPIES.items():
        model = fresh()
        for what, whole in (("HookedRecurrent", model), ("attach", attach(fresh().hf_model))):
            found[f"{name} of {what}"] = _outcome(lambda made=made, whole=whole: made(whole))
        if name != "copy.copy":  # a shallow copy shares its modules
            inner = made(model.hf_model)
            with torch.no_grad():
                is_plain = torch.equal(inner(tokens).logits, expected.values[0])
            hooked = Outputs(HookedRecurrent.from_hf(inner), tokens).equal(expected)
            found[f"{name} of the model inside"] = "right" if is_plain and hooked else "other outputs"
        found[f"the model after {name}"] = "right" if Outputs(model, tokens).equal(expected) else "other outputs"
    for name, dtype in (("half", torch.float16), ("bfloat16", torch.bfloat16), ("double", torch.float64)):
        moved = fresh()
        getattr(moved, name)()
        again = HookedRecurrent.from_hf(getattr(fresh().hf_model, name)())
        with torch.no_grad():
            runs = [each.run_with_edits(tokens[:1], EDITS).logits for each in (moved, again)]
        found[f".{name}()"] = "right" if moved.cfg.dtype == dtype and torch.equal(*runs) else "other outputs"
    return found


def _outcome(made: Callable[[], object]) -> str:
    try:
        made()
    except HookpointsError:
        return "refused by name"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "right"
