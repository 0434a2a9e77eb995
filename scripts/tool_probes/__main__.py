"""Run one tool's probes in this interpreter: ``python -m tool_probes MODULE SOLUTIONS ANSWERS``.

SOLUTIONS is the folder in which `tools_compared.py` laid what `truth.solve` gives; ANSWERS a JSON file to write.
"""

from __future__ import annotations

import importlib
import json
import logging
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from tool_probes import truth
from torch import Tensor, nn

ENOUGH = 1e-3
"""An answer is right if its largest error is below this share of the largest value, or of what the edit changes."""
EDITS = ("delete", "replace", "batch")
LONG = 512
"""Tokens when time is taken."""


def error_of(task: str, given: Tensor, solution: dict[str, Tensor]) -> float:
    """Largest error, relative; of generated tokens, the share that differs."""
    right = solution[task]
    if given.shape != right.shape:
        raise ValueError(f"shape {tuple(given.shape)} instead of {tuple(right.shape)}")
    if not right.is_floating_point():
        return (given != right).double().mean().item()
    scale = right - solution["plain"] if task in EDITS else right
    return ((given - right).abs().max() / scale.abs().max()).item()


def said(error: Exception) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def answer(make: Callable[[], Any], task: str, solution: dict[str, Tensor]) -> dict[str, Any] | None:
    """What came of a task: its grade, error and a note, and what came of it before work; None without a probe."""
    failure: dict[str, Any] | None = None
    for suffix, grade in (("", "yes"), ("_with_work", "with work")):
        try:
            probe = getattr(make(), task + suffix, None)
            if probe is None:
                continue
            given = probe(solution["tokens"])
            error = error_of(task, given, solution)
        except Exception as exception:  # whatever a tool raises is its answer
            failure = failure or {"grade": "no", "note": said(exception)}
            continue
        note = probe.__doc__ or ""
        if error < ENOUGH:
            return {"grade": grade, "error": error, "note": note, "plainly": failure}
        if task == "generate" and torch.equal(given, solution["unedited"]):
            note = "the tokens of the unedited model"
        failure = failure or {"grade": "no", "error": error, "note": note}
    return failure


def seconds(run: Callable[[], object]) -> float:
    """How long a call takes."""
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


def time_of(probes: Callable[[nn.Module], Any], family: str) -> dict[str, Any]:
    """What it takes to read the writes of a layer, in plain forwards and milliseconds: the shortest of eight runs, in
    turn with plain ones of another model."""
    model, tokens = truth.make_long(family), torch.arange(LONG)[None] % 50 + 1
    tool = probes(truth.make_long(family))
    read = getattr(tool, "write", None) or tool.write_with_work
    turns = [(seconds(lambda: model(tokens, use_cache=False)), seconds(lambda: read(tokens))) for _ in range(8)]
    plain, taken = map(min, zip(*turns, strict=True))
    return {"grade": "yes", "forwards": taken / plain, "ms": 1000 * taken}


@torch.no_grad()
def main(module: str, solutions: str, answers: str) -> None:
    """Run every probe of a module."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    results: dict[str, dict[str, Any]] = {}
    for family, probes in importlib.import_module(f"tool_probes.{module}").PROBES.items():
        solution = load_file(Path(solutions) / f"{family}.safetensors")
        weights = {name.removeprefix("weights."): x for name, x in solution.items() if name.startswith("weights.")}

        def make(family=family, probes=probes, weights=weights) -> object:
            model = truth.make_model(family)
            model.load_state_dict(weights)
            return probes(model)

        tasks = [task for task in solution if task not in ("tokens", "plain") and not task.startswith("weights.")]
        found = results[family] = {task: answer(make, task, solution) for task in tasks}
        if found["write"] and found["write"]["grade"] != "no" and family != "mamba":
            found["time"] = time_of(probes, family)
    Path(answers).write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
