"""What the house promises: rooms that know only the rooms below them, and no import circles."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("hookpoints", "sae_lens_writesae", "writesae")
"""Each knows only those before it."""
BUDGETS = {"hookpoints": 4000, "sae_lens_writesae": 1540, "writesae": 4830, "tests": 9000, "scripts": 820}
"""Statements, imports and docstrings not counted. To raise a number, say in the commit what was removed elsewhere."""
MAX_DEPTH = 8
"""Longest chain of imports inside one package: a reader follows no more."""


def modules() -> dict[str, Path]:
    found = {}
    for package in PACKAGES:
        for file in (ROOT / package).rglob("*.py"):
            parts = file.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


MODULES = modules()


@cache
def imports(name: str, typing: bool = False) -> frozenset[str]:
    """Modules of this project that a module imports, inside functions too; those for type checkers only if asked."""
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    typing_only = {
        id(child)
        for node in ast.walk(tree)
        if not typing and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for child in ast.walk(node)
    }
    targets: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            targets |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = name.split(".") if MODULES[name].name == "__init__.py" else name.split(".")[:-1]
            prefix = base[: len(base) - node.level + 1] if node.level else []
            module = ".".join([*prefix, *([node.module] if node.module else [])])
            for alias in node.names:
                targets.add(f"{module}.{alias.name}" if f"{module}.{alias.name}" in MODULES else module)
    return frozenset(targets & MODULES.keys() - {name})


def longest_chain(name: str, above: tuple[str, ...] = ()) -> tuple[str, ...]:
    """The longest chain of imports from a module downwards, inside its package; a circle raises."""
    if name in above:
        raise AssertionError(f"import circle: {' > '.join((*above[above.index(name) :], name))}")
    return _chain(name, above)


_KNOWN: dict[str, tuple[str, ...]] = {}


def _chain(name: str, above: tuple[str, ...]) -> tuple[str, ...]:
    if name not in _KNOWN:
        package = name.split(".")[0]
        below = [each for each in imports(name) if each.split(".")[0] == package and each != package]
        chains = [longest_chain(each, (*above, name)) for each in below]
        _KNOWN[name] = (name, *max(chains, key=len, default=()))
    return _KNOWN[name]


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_are_shallow_and_without_circles(package: str):
    chains = [longest_chain(name) for name in MODULES if name.split(".")[0] == package]
    deepest = max(chains, key=len)
    assert len(deepest) <= MAX_DEPTH, " > ".join(deepest)


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_have_no_circle_for_type_checkers_either(package: str):
    graph = {name: [each for each in imports(name, True) if each != package] for name in MODULES}
    list(TopologicalSorter({name: graph[name] for name in MODULES if name.split(".")[0] == package}).static_order())


def statements(file: Path) -> int:
    """Statements of a file, imports and docstrings not counted."""

    def counts(node: ast.AST) -> bool:
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        return isinstance(node, ast.stmt) and not isinstance(node, (ast.Import, ast.ImportFrom)) and not docstring

    return sum(map(counts, ast.walk(ast.parse(file.read_text(encoding="utf-8")))))


@pytest.mark.parametrize(("folder", "most"), BUDGETS.items())
def test_a_folder_keeps_its_budget_of_statements(folder: str, most: int):
    found = sum(map(statements, (ROOT / folder).rglob("*.py")))
    assert found <= most, f"{folder}: at most {most} statements, found {found}"


def test_a_question_is_one_short_file():
    for file in (ROOT / "writesae" / "evaluations").glob("*.py"):
        assert len(file.read_text(encoding="utf-8").splitlines()) <= 400, file


def test_a_package_knows_only_those_below_it():
    for name in MODULES:
        above = PACKAGES[PACKAGES.index(name.split(".")[0]) + 1 :]
        assert not [target for target in imports(name) if target.split(".")[0] in above], name


def test_hookpoints_knows_nothing_of_saelens():
    for name in MODULES:
        if name.startswith("hookpoints"):
            assert "sae_lens" not in ast.dump(ast.parse(MODULES[name].read_text(encoding="utf-8"))), name


STUDY_ONLY = {"pyarrow", "sklearn", "scipy", "matplotlib", "jinja2", "markdown_it", "pydantic", "tyro", "snakemake"}
"""What only the study may import."""


def test_hooks_and_plugin_import_nothing_that_only_the_study_needs():
    for name in MODULES:
        if not name.startswith("writesae"):
            assert not set(outside(MODULES[name])) & STUDY_ONLY, name


def outside(file: Path) -> list[str]:
    """Top-level packages that a file imports."""
    found: list[str] = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name.split(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.append(node.module.split(".")[0])
    return found


def test_plugin_and_study_reach_models_through_public_names_only():
    allowed = {"hookpoints", *(f"hookpoints.{each}" for each in ("embedded", "errors", "files", "scopes", "zoo"))}
    for name in MODULES:
        if not name.startswith("hookpoints"):
            inside = {target for target in imports(name) if target.startswith("hookpoints")} - allowed
            assert not inside, f"{name} imports {sorted(inside)}"
            assert ".attachment" not in MODULES[name].read_text(encoding="utf-8"), name


def test_rules_know_nothing_of_hooks():
    for name in MODULES:
        if name.startswith("hookpoints.rules"):
            above = ("hookpoints.hooks", "hookpoints.layer", "hookpoints.model", "hookpoints.edits")
            assert not [target for target in imports(name) if target.startswith(above)], name


def test_each_room_knows_only_the_rooms_below():
    order = ["atom", "sae", "verdict", "experiment", "evaluations", "page"]
    for name in MODULES:
        parts = name.split(".")
        if parts[0] == "hookpoints" or len(parts) < 2 or parts[1] not in order:
            continue
        room = order.index(parts[1])
        for target in imports(name):
            other = target.split(".")
            if other[0] != "hookpoints" and len(other) > 1 and other[1] in order:
                assert order.index(other[1]) <= room, f"{name} imports {target}"


def test_every_package_that_is_imported_is_declared():
    said = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = said["optional-dependencies"]
    declared = {re.split(r"[^\w-]", each)[0] for each in (*said["dependencies"], *extras["fla"])}
    for_study = declared | {re.split(r"[^\w-]", each)[0] for each in extras["study"]}
    names = {"markdown_it": "markdown-it-py", "sklearn": "scikit-learn", "fla": "flash-linear-attention"}
    for name, file in MODULES.items():
        for top in {*outside(file)} - {*PACKAGES, *sys.stdlib_module_names}:
            known = for_study if name.startswith("writesae") else declared
            assert names.get(top, top.replace("_", "-")) in known, f"{file} imports {top}"


def test_few_untyped_places():
    total = sum(file.read_text(encoding="utf-8").split().count("Any") for file in MODULES.values())
    mentions = sum(
        sum(isinstance(node, ast.Name) and node.id == "Any" for node in ast.walk(ast.parse(file.read_text("utf-8"))))
        for file in MODULES.values()
    )
    assert max(total, mentions) < 150, f"{mentions} annotations say Any"


def test_no_folder_of_tests_hides_an_installed_package():
    """pytest puts the folder of a test file on the path; there `tests/hookpoints/fla` would be taken for fla."""
    for file in (ROOT / "tests").rglob("test_*.py"):
        hidden = {each.name for each in file.parent.iterdir() if each.is_dir()} & {"fla", "sae_lens", "transformers"}
        assert not hidden, f"{file}: move it into a folder of its own"
