"""What the house promises: rooms that know only the rooms below them, and no import circles."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
HOOKS = "hookpoints/pyproject.toml"
PRODUCT = "pyproject.toml"
STUDY = "study/pyproject.toml"
PACKAGES = ("hookpoints", "sae_lens_writesae", "writesae", "writesae_study")
"""Each knows only those before it."""
HOMES = {"writesae_study": ROOT / "study"}
"""Folder of a package that is not in the root."""
CEILINGS = {
    "hookpoints": 52_800,
    "sae_lens_writesae": 15_500,
    "writesae": 14_500,
    "study/writesae_study": 29_000,
    "tests": 76_400,
    "study/tests": 16_700,
    "tools + benchmarks + study/tools": 22_100,
}
"""Expression nodes of folders, 3% above what there was. A smoke alarm and no target: a commit that needs more says what
a reader gains."""
OFFENDERS = {
    "hookpoints + sae_lens_writesae + writesae + study/writesae_study": {"statement": 3, "joined": 0, "function": 1},
    "tests + study/tests": {"statement": 24, "joined": 108, "function": 2},
    "tools + benchmarks + study/tools": {"statement": 18, "joined": 6, "function": 0},
}
"""How many places of each kind folders have. A ratchet: only ever fewer."""
ONE_WORD = 0
"""Private helpers of one word (`_read`), which say what is done; a noun says what comes back. Only ever fewer."""
STATEMENT = 30
"""Nodes of one statement; where it is a display or a call with keywords, of its largest entry."""
JOINED = 12
"""Nodes on the right side of `a, b = x, y`, where it is no swap: longer ones are several statements."""
FUNCTION = 350
"""Nodes of one function with those inside of it."""


def modules() -> dict[str, Path]:
    found = {}
    for package in PACKAGES:
        home = HOMES.get(package, ROOT)
        for file in (home / package).rglob("*.py"):
            parts = file.relative_to(home).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


MODULES = modules()


@cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


@cache
def imports(name: str) -> frozenset[str]:
    """Modules of this project that a module imports: inside functions and for type checkers too."""
    targets: set[str] = set()
    for node in ast.walk(tree(MODULES[name])):
        if isinstance(node, ast.Import):
            targets |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = name.split(".") if MODULES[name].name == "__init__.py" else name.split(".")[:-1]
            prefix = base[: len(base) - node.level + 1] if node.level else []
            module = ".".join([*prefix, *([node.module] if node.module else [])])
            for alias in node.names:
                targets.add(f"{module}.{alias.name}" if f"{module}.{alias.name}" in MODULES else module)
    return frozenset(targets & MODULES.keys() - {name})


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_have_no_circle(package: str):
    """The package itself, whose names are imported when they are asked for, is apart."""
    graph = {name: imports(name) - {package} for name in MODULES if name.split(".")[0] == package}
    list(TopologicalSorter(graph).static_order())


OPERATORS = (ast.expr_context, ast.operator, ast.cmpop, ast.unaryop, ast.boolop)
BLOCKS = ("body", "orelse", "finalbody", "handlers", "cases", "decorator_list")
HEADS = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def nodes(tree: ast.AST) -> int:
    """Names, attributes, calls, constants: what a reader reads. Joining or splitting lines changes none."""
    return sum(not isinstance(node, OPERATORS) for node in ast.walk(tree))


def statements(tree: ast.AST) -> Iterator[ast.stmt]:
    """All statements inside a tree, without imports, docstrings and heads of functions and classes."""
    for node in ast.walk(tree):
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if isinstance(node, ast.stmt) and not isinstance(node, HEADS) and not docstring:
            yield node


def expressions(statement: ast.stmt) -> Iterator[ast.AST]:
    """Expressions of a statement itself, not of the statements inside it."""
    for name, value in ast.iter_fields(statement):
        if name not in BLOCKS:
            values = value if isinstance(value, list) else [value]
            yield from (each for each in values if isinstance(each, ast.AST))


def read_at_once(expression: ast.AST) -> int:
    """Nodes of an expression; entries of displays, and of calls with three keywords or more, are read one by one."""
    if isinstance(expression, ast.Dict):
        entries = [*filter(None, expression.keys), *expression.values]
    elif isinstance(expression, (ast.List, ast.Tuple, ast.Set)):
        entries = expression.elts
    elif isinstance(expression, ast.Call) and len(expression.keywords) >= 3:
        entries = [*expression.args, *(keyword.value for keyword in expression.keywords)]
    else:
        return nodes(expression)
    return max(map(read_at_once, entries), default=1)


def is_joined(statement: ast.stmt) -> bool:
    """Whether a statement is `a, b = x, y` that could be two lines: no swap, and long."""
    if not isinstance(statement, ast.Assign):
        return False
    target, value = statement.targets[0], statement.value
    if not isinstance(target, ast.Tuple) or not isinstance(value, ast.Tuple):
        return False
    names = [{node.id for node in ast.walk(side) if isinstance(node, ast.Name)} for side in (target, value)]
    return not names[0] & names[1] and nodes(value) > JOINED


def offences(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Kind and line of what holds too much for one look."""
    for statement in statements(tree):
        if sum(map(read_at_once, expressions(statement))) > STATEMENT:
            yield "statement", statement.lineno
        if is_joined(statement):
            yield "joined", statement.lineno
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and size(node) > FUNCTION:
            yield "function", node.lineno


def size(tree: ast.AST) -> int:
    """Expression nodes of all statements of a tree."""
    return sum(nodes(part) for statement in statements(tree) for part in expressions(statement))


def trees(*folders: str) -> dict[Path, ast.Module]:
    files = [file for folder in folders for file in (ROOT / folder).rglob("*.py")]
    return {file: tree(file) for file in files}


@pytest.mark.parametrize(("folders", "most"), CEILINGS.items())
def test_a_folder_stays_below_its_ceiling(folders: str, most: int):
    total = sum(map(size, trees(*folders.split(" + ")).values()))
    assert total <= most, f"{folders}: at most {most} expression nodes, got {total}"


@pytest.mark.parametrize("folders", OFFENDERS)
def test_fewer_places_hold_too_much_for_one_look(folders: str):
    offenders: dict[str, list[str]] = {kind: [] for kind in OFFENDERS[folders]}
    for file, tree in trees(*folders.split(" + ")).items():
        for kind, line in offences(tree):
            offenders[kind].append(f"{file.relative_to(ROOT)}:{line}")
    for kind, most in OFFENDERS[folders].items():
        assert len(offenders[kind]) <= most, f"{kind}: at most {most}, got {len(offenders[kind])}: {offenders[kind]}"


def test_fewer_private_helpers_are_one_word():
    found = [
        f"{name}.{node.name}"
        for name, file in MODULES.items()
        for node in ast.walk(tree(file))
        if isinstance(node, ast.FunctionDef) and re.fullmatch("_[a-z]+", node.name)
    ]
    assert len(found) <= ONE_WORD, found


def test_a_package_knows_only_those_below_it():
    for name in MODULES:
        above = PACKAGES[PACKAGES.index(name.split(".")[0]) + 1 :]
        assert not [target for target in imports(name) if target.split(".")[0] in above], name


def test_hookpoints_knows_nothing_of_saelens():
    for name in MODULES:
        if name.startswith("hookpoints"):
            assert "sae_lens" not in ast.dump(tree(MODULES[name])), name


OF_COMMANDS = {"scipy", "matplotlib", "markdown_it", "tyro"}
"""What hooks and plugin may not import: commands and pages do."""
OF_STUDY = {"sklearn", "pyarrow", "snakemake"}
"""What the product may not import."""


def test_a_package_imports_nothing_that_only_those_above_it_need():
    for name in MODULES:
        package = name.split(".")[0]
        of_others = {"writesae_study": set(), "writesae": OF_STUDY}.get(package, OF_STUDY | OF_COMMANDS)
        assert not set(outside(MODULES[name])) & of_others, name


def test_tests_of_the_product_import_no_study():
    for file in (ROOT / "tests").rglob("*.py"):
        assert "writesae_study" not in outside(file), file


def outside(file: Path) -> list[str]:
    """Top-level packages that a file imports."""
    found: list[str] = []
    for node in ast.walk(tree(file)):
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
    order = ["atom", "sae", "verdict", "head", "experiment", "dictionary", "evaluations", "page"]
    for name in MODULES:
        parts = name.split(".")
        if parts[0] == "hookpoints" or len(parts) < 2 or parts[1] not in order:
            continue
        room = order.index(parts[1])
        for target in imports(name):
            other = target.split(".")
            if other[0] == parts[0] and len(other) > 1 and other[1] in order:
                assert order.index(other[1]) <= room, f"{name} imports {target}"


def project(file: str) -> dict[str, Any]:
    return tomllib.loads((ROOT / file).read_text("utf-8"))["project"]


def bounds(file: str, *extras: str) -> dict[str, str]:
    """What a distribution says that it needs, with some of its extras: package and version."""
    optional = project(file)["optional-dependencies"] if extras else {}
    needed = [*project(file)["dependencies"], *(each for extra in extras for each in optional[extra])]
    return {re.split(r"[^\w-]", each)[0]: re.split(r"[\w-]+(?:\[\w+\])?", each, maxsplit=1)[1] for each in needed}


def test_every_package_that_is_imported_is_declared():
    hooks, product = bounds(HOOKS, "fla"), bounds(PRODUCT)
    declared = {"hookpoints": hooks, "writesae_study": product | bounds(STUDY)}
    names = {"markdown_it": "markdown-it-py", "sklearn": "scikit-learn", "fla": "flash-linear-attention"}
    for name, file in MODULES.items():
        needed = declared.get(name.split(".")[0], product)
        for top in {*outside(file)} - {*PACKAGES, *sys.stdlib_module_names}:
            assert names.get(top, top.replace("_", "-")) in needed, f"{file} imports {top}"


def test_every_dependency_has_a_lower_bound():
    """But those of tests and pages, which are as new as the others allow."""
    distributions = (bounds(HOOKS, "fla"), bounds(PRODUCT, "fla"), bounds(STUDY))
    assert {name for needed in distributions for name in needed if ">=" not in needed[name]} == {"sae-lens-writesae"}


def test_the_distributions_agree():
    """TransformerLens alone may be newer where SAELens, which pins it, is not installed."""
    hooks, product = bounds(HOOKS), bounds(PRODUCT)
    product["transformer-lens"] = product["transformer-lens"].removesuffix(",<4")
    common = hooks.keys() & product.keys()
    assert {name: hooks[name] for name in common} == {name: product[name] for name in common}
    for field in ("version", "requires-python", "license", "authors"):
        assert project(HOOKS)[field] == project(PRODUCT)[field]
    assert (ROOT / "hookpoints/LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


def test_one_place_names_the_address_of_the_repository():
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    named = {
        name
        for name in filter(None, files.split("\0"))
        if (ROOT / name).is_file() and re.search(rb"github\.com/[\w-]+/sae-lens-writesae", (ROOT / name).read_bytes())
    }
    assert named == {"pyproject.toml"}


def test_few_untyped_places():
    total = sum(file.read_text(encoding="utf-8").split().count("Any") for file in MODULES.values())
    mentions = sum(
        sum(isinstance(node, ast.Name) and node.id == "Any" for node in ast.walk(tree(file)))
        for file in MODULES.values()
    )
    assert max(total, mentions) < 150, f"{mentions} annotations say Any"


def test_each_defined_mutant_changes_one_place_and_its_test_is_there():
    for row in tomllib.loads((ROOT / "tools/mutants/definitions.toml").read_text("utf-8"))["mutant"]:
        assert (ROOT / row["file"]).read_text("utf-8").count(row["code"]) == 1, row["definition"]
        file, _, test = row["test"].partition("::")
        name = test.partition("[")[0]
        assert f"def {name}(" in (ROOT / file).read_text("utf-8"), row["definition"]
