"""What importing loads: modules are counted, which are the same on every machine, and no time is taken."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import hookpoints
import writesae

LIBRARIES = ("torch", "transformers", "transformer_lens", "sae_lens")


def loaded_by(*steps: str) -> list[tuple[int, set[str]]]:
    """How many modules each line of a fresh program loads, and which of `LIBRARIES` are there after it."""
    program = f"""
import sys
for step in {steps!r}:
    before = len(sys.modules)
    exec(step)
    print(len(sys.modules) - before, *(name for name in {LIBRARIES!r} if name in sys.modules))
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    counts = [line.split() for line in run.stdout.splitlines()]
    return [(int(n), set(names)) for n, *names in counts]


def test_the_package_loads_no_library_and_a_name_only_what_it_needs() -> None:
    package, tables, values = loaded_by(
        "import hookpoints",
        "from hookpoints import HOOKS, EditError, embedded, errors",
        "from hookpoints import RULES, Recurrence, WriteEdit, zoo",
    )
    assert package[0] <= 60 and tables[0] <= 60
    assert not package[1] and not tables[1]
    assert values[1] == {"torch"}


def test_both_packages_load_little_beside_the_libraries_that_they_extend() -> None:
    _, hooks, _, plugin = loaded_by(
        "import hookpoints, transformer_lens",
        "from hookpoints import HookedRecurrent, Memory, attach",
        "import sae_lens",
        "import sae_lens_writesae",
    )
    assert hooks[0] <= 120
    assert plugin[0] <= 60


@pytest.mark.parametrize("package", [hookpoints, writesae], ids=lambda package: package.__name__)
def test_type_checkers_see_the_names_that_are_imported_when_asked_for(package: ModuleType) -> None:
    """From the same modules, and no others."""
    tree = ast.parse(Path(str(package.__file__)).read_text(encoding="utf-8"))
    seen = next(node for node in tree.body if isinstance(node, ast.If))
    typed: dict[str, str] = {}
    for statement in seen.body:
        assert isinstance(statement, ast.ImportFrom)
        typed |= {alias.name: str(statement.module) for alias in statement.names}
    assert sorted(typed) == sorted(package.__all__)
    for name, module in typed.items():
        value = getattr(package, name)
        assert value is getattr(sys.modules[module], name)
        assert name in dir(package)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'hookpoints' has no attribute 'HookedTransformer'"):
        _ = hookpoints.HookedTransformer  # pyright: ignore[reportAttributeAccessIssue]
