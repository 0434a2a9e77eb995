"""What importing loads: modules are counted, which are the same on every machine, and no time is taken."""

from __future__ import annotations

import ast
import inspect
import json
import subprocess
import sys

import pytest

import hookpoints

COUNT = """
import json, sys
for first, then in json.loads(sys.argv[1]):
    exec(first)
    before = set(sys.modules)
    exec(then)
    print(*(set(sys.modules) - before))
"""
FIRST_MODEL = """
class Mine(HookedRecurrent):
    pass

model = Mine.from_pretrained("embedded", self_check=False)
from transformer_lens import ActivationCache, HookedRootModule
from transformer_lens.hook_points import HookPoint
assert type(model) is Mine and isinstance(model, HookedRootModule) and issubclass(HookedRecurrent, HookedRootModule)
assert all(isinstance(point, HookPoint) for point in model.hook_points())
assert isinstance(model.run_with_cache("The")[1], ActivationCache)
"""
LIBRARIES = {"torch", "transformers", "transformer_lens", "sae_lens"}
STEPS = {
    ("", "import hookpoints; from hookpoints import HOOKS, EditError, embedded"): (100, set()),
    ("", "from hookpoints import RULES, Recurrence, WriteEdit, zoo"): (2_000, {"torch"}),
    ("", "from hookpoints import HookedRecurrent, Memory, MemoryReader, attach"): (700, {"transformers"}),
    ("", FIRST_MODEL): (9_000, {"transformer_lens"}),
    ("import transformer_lens", "from hookpoints import attribute, cost"): (80, set()),
    ("import sae_lens", "import sae_lens_writesae"): (60, set()),
}
"""What is imported first, and then: how many modules the second loads at most, and which libraries."""


def test_names_load_what_they_need() -> None:
    """In a process of its own, one step after the other: a library takes seconds to load."""
    command = [sys.executable, "-c", COUNT, json.dumps([*STEPS])]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    for (step, (most, libraries)), line in zip(STEPS.items(), lines, strict=True):
        loaded = line.split()
        assert len(loaded) <= most and LIBRARIES.intersection(loaded) == libraries, step


def test_names_for_type_checkers_are_those_that_are_imported_when_asked_for() -> None:
    """The package has its names in three lists: for type checkers, for `__getattr__`, and as `__all__`."""
    (checked,) = [node for node in ast.parse(inspect.getsource(hookpoints)).body if _is_for_checkers(node)]
    found = {
        node.module.removeprefix("hookpoints").lstrip("."): {alias.name for alias in node.names}
        for node in ast.walk(checked)
        if isinstance(node, ast.ImportFrom) and node.module
    }
    modules = found.pop("")
    assert found == {module: set(names) for module, names in hookpoints._HOMES.items()}
    assert modules == set(hookpoints._MODULES)
    assert sorted(hookpoints.__all__) == sorted(modules.union(*found.values()))
    for module, names in found.items():
        for name in names:
            assert getattr(hookpoints, name) is getattr(sys.modules[f"hookpoints.{module}"], name)
    assert all(inspect.ismodule(getattr(hookpoints, name)) for name in modules)
    with pytest.raises(AttributeError, match="no attribute 'write_edit'"):
        hookpoints.write_edit  # type: ignore[attr-defined]  # noqa: B018


def _is_for_checkers(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and any(map(_imports, node.body))


def _imports(node: ast.stmt) -> bool:
    return isinstance(node, ast.ImportFrom)
