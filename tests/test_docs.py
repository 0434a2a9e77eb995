"""The documentation covers every hook, evaluation and error, and what its pages show in Python runs."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import os
import pkgutil
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "scripts"))

import pictures  # noqa: E402
import results_page  # noqa: E402
from docs_site import error_pages, evaluation_pages, hook_pages, texts  # noqa: E402

import hookpoints  # noqa: E402
import sae_lens_writesae  # noqa: E402
from hookpoints.hooks.table import HOOKS  # noqa: E402
from writesae import (  # noqa: E402
    EVALUATIONS,
    Evaluation,
    Result,
    Substitution,
)

WRITTEN = sorted(path for path in (ROOT / "docs").rglob("*.md") if "```python" in path.read_text())
COMPARED = {"bilinear": {}, "flat": {"decoder": "flat"}}


def page_names(folder: str) -> list[str]:
    return sorted(path.stem for path in (texts.FOLDER / folder).glob("*.md"))


def test_every_hook_has_a_text_and_every_text_a_hook():
    assert page_names("hooks") == sorted(f"{row.scope}.{row.name}" for row in HOOKS)


@pytest.mark.parametrize("kind", EVALUATIONS)
def test_every_evaluation_has_a_page(kind):
    evaluation = EVALUATIONS[kind]
    page = evaluation_pages.page(evaluation)
    assert all(f"\n## {part}" in page for part in ("Definition", "Formula", "How to run it", "Settings", "Tables"))
    assert all(f"| `{field.name}` |" in page for field in dataclasses.fields(evaluation))
    assert all(f"| `{column}` |" in page for columns in evaluation.columns.values() for column in columns)


def exceptions(package) -> set[str]:
    """Public exception classes that a package's modules define, found by importing them."""
    names = set()
    for info in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        module = importlib.import_module(info.name)
        for name, value in inspect.getmembers(module, inspect.isclass):
            is_own = value.__module__ == info.name and issubclass(value, Exception) and not name.startswith("_")
            if is_own and name != "StopForward":  # ends a pass inside the package; nobody else sees it
                names.add(name)
    return names


def test_every_error_has_a_text_and_every_text_an_error():
    assert page_names("errors") == sorted(exceptions(hookpoints) | exceptions(sae_lens_writesae))
    assert sorted(error_pages.errors()) == page_names("errors")


def test_messages_come_from_the_source():
    classes = error_pages.errors()
    messages = classes["EditError"].messages
    assert "head ‹head› is out of range: layer ‹layer› has heads 0 to ‹…›" in messages
    assert len(messages) == len(set(messages)) > 10
    assert any(
        "TransformerBridge (‹versions›)" in message for message in error_pages.errors()["BridgeWarning"].messages
    )


def test_a_text_without_its_formula_is_refused(tmp_path, monkeypatch):
    write(tmp_path, monkeypatch, "evaluations/new.md", "example: n=1\n\n## Definition\n")
    with pytest.raises(texts.MissingTextError, match=r"evaluations/new\.md .*'## Formula'"):
        evaluation_pages.read("new")


def test_something_new_without_a_text_fails_the_build_and_names_the_file(tmp_path, monkeypatch):
    write(tmp_path, monkeypatch, "hooks/model.hook_embed.md", "text")
    with pytest.raises(texts.MissingTextError, match=r"texts/hooks/model\.hook_embed\.md .*'## Definition'"):
        hook_pages.pages()
    with pytest.raises(texts.MissingTextError, match=r"texts/evaluations/substitution\.md"):
        evaluation_pages.page(Substitution)


def test_a_text_of_nothing_fails_the_build(tmp_path, monkeypatch):
    write(tmp_path, monkeypatch, "errors/OldError.md", "text")
    with pytest.raises(texts.MissingTextError, match="OldError"):
        error_pages.pages()


def test_an_evaluation_without_a_docstring_fails_the_build():
    bare = type("Bare", (Substitution,), {"kind": "substitution"})
    assert Evaluation.__doc__ and bare.__doc__ is None
    with pytest.raises(texts.MissingTextError, match="Bare"):
        evaluation_pages.page(bare)


@pytest.mark.slow
def test_an_example_that_raises_something_else_fails_the_build(tmp_path, monkeypatch):
    text = "## When it is raised\n\n## How to mend it\n\n## Example\n\n```python\n1 / 0\n```\n"
    write(tmp_path, monkeypatch, "errors/EditError.md", text)
    with pytest.raises(RuntimeError, match="EditError raised ZeroDivisionError"):
        error_pages.page(error_pages.errors()["EditError"])


def write(folder: Path, monkeypatch, name: str, text: str) -> None:
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_text(text)
    monkeypatch.setattr(texts, "FOLDER", folder)


def test_what_blocks_print_stands_below_them():
    text = "a\n\n```python\nx = 2\nprint(x)\n```\n\nb\n\n```python\nprint(x + 1)\n1 / 0\n```\n"
    ran = texts.run(text, "here", may_raise=True)
    assert "```\n\n```text\n2\n```\n\nb" in ran.markdown and "```text\n3\n```" in ran.markdown
    assert isinstance(ran.raised, ZeroDivisionError)
    with pytest.raises(RuntimeError, match="an example of here raised ZeroDivisionError"):
        texts.run("```python\n1 / 0\n```\n\n```python\nprint(1)\n```\n", "here", may_raise=True)
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        texts.run("```python\n1 / 0\n```\n", "here")


def test_tables_and_docstrings_show_every_character():
    assert texts.escape("<k, q> and `a < b`") == "&lt;k, q> and `a < b`"
    assert texts.table(("a",), [("|cosine| < 1",), ("",)]).splitlines()[2:] == ["| \\|cosine\\| &lt; 1 |", "| – |"]


def test_links_between_written_pages_exist():
    """Pages that are generated are checked by `mkdocs build --strict`."""
    made = {
        "hooks",
        "evaluations",
        "errors",
        "tutorials",
        "claims.md",
        "decisions",
        "ARCHITECTURE.md",
        "CONTRIBUTING.md",
    }
    for page in (ROOT / "docs").glob("*.md"):
        for link in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text()):
            assert link.split("/")[0] in made or (page.parent / link).exists(), f"{page.name}: {link}"


def test_every_picture_is_made_by_the_script_and_shown():
    shown = {
        link.rpartition("/")[2]
        for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
        for link in re.findall(r"!\[[^\]]*\]\(([^)]*images/[^)]+)\)", page.read_text())
    }
    assert shown == set(pictures.PICTURES) == {path.name for path in pictures.IMAGES.glob("*.png")}


@pytest.mark.parametrize("name", pictures.PICTURES)
def test_a_picture_is_no_older_than_its_sources(name):
    """`python scripts/pictures.py NAME` makes it again."""
    assert json.loads(pictures.SOURCES.read_text())[name] == pictures.note(name)


def test_a_changed_source_is_told(tmp_path, monkeypatch):
    """By content: a copy of the same files has the same fingerprint, whatever its times."""
    picture = pictures.PICTURES["growth.png"]
    for name in picture.sources:
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    before = picture.fingerprint()
    monkeypatch.setattr(pictures, "ROOT", tmp_path)
    assert picture.fingerprint() == before
    with (tmp_path / "docs/benchmarks.json").open("a") as file:
        file.write(" ")
    assert picture.fingerprint() != before


def test_the_page_of_results_begins_as_its_script_writes_it():
    """Its tables are not in the repository, so that the script cannot make it here."""
    assert (ROOT / "docs/results.md").read_text().startswith(f"{results_page.HEAD}\n\n## Verdicts")


def test_no_page_needs_a_network():
    assert "font: false" in (ROOT / "mkdocs.yml").read_text()
    for file in [ROOT / "mkdocs.yml", *(ROOT / "docs").glob("*.css"), *(ROOT / "docs").glob("*.md")]:
        assert not re.search(r"(?:src|href)=\"https?:|url\(['\"]?https?:|<script", file.read_text()), file


def test_the_extra_for_the_site_is_what_ci_installs():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    plugins = {"mkdocs-gen-files", "mkdocs-literate-nav", "mkdocstrings[python]", "mkdocs-material"}
    assert plugins <= {re.split("[>=<]", name)[0] for name in extras["docs"]}
    assert os.access(ROOT / ".ci" / "docs", os.X_OK)


def test_the_page_of_results_has_every_answer_in_one_table():
    info = {"model": "m", "layer": 2, "rule": "Mamba-2", "target": "write"}
    heads = [info | {"head": head, "label": f"L2H{head} write"} for head in (3, 1)]
    page = results_page.page([Result(Substitution(), each, {}, skipped="too short") for each in heads])
    for head in (1, 3):
        assert page.count(f"| m L2H{head} write | – | not tested | too short") == len(Substitution.answers)
    assert "2 not tested" in page


# -- slow: everything that is shown runs


def run_script(code: str, folder: Path) -> str:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "WANDB_MODE": "offline"}
    script = folder / "page.py"
    script.write_text(code)
    done = subprocess.run(
        [sys.executable, str(script)], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("page", WRITTEN, ids=lambda path: path.stem)
def test_written_pages_run(page, tmp_path):
    run_script("\n".join(texts.python_blocks(page.read_text())), tmp_path)


@pytest.mark.slow
def test_pages_of_hooks_and_errors_run():
    """Their examples run while the page is made, and must raise what they should."""
    pages = hook_pages.pages() | error_pages.pages()
    assert len(pages) == len(HOOKS) + len(error_pages.errors()) + 2
    assert not [path for path, text in pages.items() if str(ROOT) in text or re.search(r"\bnan\b", text)]


def dictionaries(folder: Path) -> None:
    """Tiny SAEs in the folders that the evaluations' examples name."""
    from hookpoints import HookedRecurrent, embedded
    from sae_lens_writesae import text_dataset, train, training_config
    from sae_lens_writesae.sae.runner import quiet

    model, dataset = HookedRecurrent.from_pretrained("embedded"), text_dataset(embedded.text("train"))
    wanted = {label: {} for labels in evaluation_pages.LABELS.values() for label in labels}
    wanted |= {"state": {"target": "state"}, "seed-1": {"seed": 1}} | {
        label: {"sae": {"k": 8} | fields} for label, fields in COMPARED.items()
    }
    for label, changes in wanted.items():
        options = {"target": "write", "sae": {"k": 8}, "seed": 0} | changes
        cfg = training_config(
            model,
            layer=2,
            head=1,
            d_sae=64,
            training_tokens=16_384,
            context_size=128,
            lr=2e-3,
            store_batch_size_prompts=8,
            n_batches_in_buffer=16,
            train_batch_size_tokens=512,
            verbose=False,
            **options,
        )
        with quiet():  # SAELens warns that so short a text is read more than once
            train(cfg, model, dataset).save_inference_model(str(folder / label))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saes")
    dictionaries(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", EVALUATIONS)
def test_examples_of_evaluations_run(name, trained):
    """They answer no claim that the class does not name."""
    code = evaluation_pages.example(EVALUATIONS[name], evaluation_pages.read(name)[0])
    code += "assert {claim.number for claim in result.claims()} <= {None, *result.evaluation.answers}\n"
    out = run_script(code, trained)
    assert len(out.splitlines()) >= 1 and all(" | " in line for line in out.splitlines())


def test_formulas_of_notebooks_become_mathml():
    mathml = pytest.importorskip("docs_site.mathml", reason="needs latex2mathml, of the extra docs")
    made = mathml.formulas("`$a$` costs $5.\n\n$$x_t = y$$\n\n$v w^\\top$")
    assert made.startswith("`$a$` costs $5.") and made.count("<math") == 2
    assert 'display="block"' in made and made.endswith("</math></span>")
