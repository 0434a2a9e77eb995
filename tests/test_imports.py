"""What importing loads: modules are counted, which are the same on every machine, and no time is taken."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys

import pytest

import hookpoints

COUNT = """
import sys
before = set(sys.modules)
exec(sys.argv[1])
before |= set(sys.modules)
exec(sys.argv[2])
new = set(sys.modules) - before
print(len(new), *(name for name in ("torch", "transformers", "transformer_lens", "sae_lens") if name in new))
"""


@pytest.mark.parametrize(
    ("first", "then", "most", "libraries"),
    [
        ("", "import hookpoints; from hookpoints import HOOKS, EditError, embedded", 80, []),
        ("", "from hookpoints import RULES, Recurrence, WriteEdit, zoo", 2_000, ["torch"]),
        ("import transformer_lens", "from hookpoints import HookedRecurrent, Memory, attach, cost", 120, []),
        ("import sae_lens; from hookpoints import HookedRecurrent", "import sae_lens_writesae", 60, []),
    ],
)
def test_a_name_loads_what_it_needs(first: str, then: str, most: int, libraries: list[str]) -> None:
    """``then``, in a fresh program, after ``first``."""
    run = subprocess.run([sys.executable, "-c", COUNT, first, then], capture_output=True, text=True, check=True)
    n, *loaded = run.stdout.split()
    assert int(n) <= most and loaded == libraries


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
