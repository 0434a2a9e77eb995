"""Plain American English in documents, docstrings, messages and other strings, pages and tutorials.

A failure lists every hit as `file:line: phrase`.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PHRASES = {
    "recovers": "(take|taking|took|taken|give|giving|gave|given)s? back",
    "is replaced by, instead of": "(give|gives|gave|given) way to|(is|are|was|were) exchanged for|in (the )?place of",
    "compared with, and": r"beside|next to|(hold|holding|held)s?( \w+){0,3} against",
    "resumes": "(go|goes|went|going) on",
    "is saved, requires": "(is|are|was|were|be|been) (kept|had with)",
    "is ablated, inserted": "(is|are|was|were|be|been) (taken out|put in)",
    "makes it worse, is harmless": "(does|do|did|is) (no )?harm",
    "with no hooks attached": r"(nobody|no one) listen\w*",
    "ships with the package": "(come|comes|came) along",
    "its own": "of (its|their|our|your) own",
    "is above, exceeds": "(lies|lie|lay|lying) (beyond|above|below|outside)",
    "distinguishes": r"(tell|tells|told|telling)( \w+){1,4} from|(tell|tells|told)( \w+)? apart",
    "is unaffected by removing, diverges after": r"bears? the loss|(leads?|led)( \w+){0,3} astray",
    "got": r"what was found|[^\s,]*, found ([{\[]|\d+)",
    "55%": r"\d*[\d}] %(?!})",
    "American spelling": r"\w*(quanti|normali|generali|initiali|regulari|standardi|summari|recogni|minimi|maximi"
    r"|factori|vectori|randomi|parameteri|categori|visuali|emphasi|utili|speciali|locali|penali|optimi|organi|reali)s"
    r"(e[drs]?|es|ing|ations?)|\w*(behavio|colo|neighbo|favo|hono)ur\w*|centre[ds]?|analys(ed?|ing)"
    r"|\w*(label|model|cancel)l(ed|ing)|grey|artefacts?|licence|catalogue|whilst|judgement|fulfil|sceptic\w*",
}
"""What to write, and the phrases that it replaces."""
PATTERNS = {
    plain: re.compile(r"(?<!\w)(" + phrase.replace(" ", r"\s+") + r")(?!\w)", re.I) for plain, phrase in PHRASES.items()
}
RECORDS = ("docs/families.md",)
"""Pages whose phrases are those of the packages."""
AREAS = {
    "front": ("*.md",),
    "docs": ("docs/*.md", "docs/[!b]*/*.md"),
    "records": RECORDS,
    "study docs": ("study/docs/*.md", "study/docs/evaluations/*.md"),
    "hookpoints": ("hookpoints/**/*.py",),
    "sae_lens_writesae": ("sae_lens_writesae/**/*.py",),
    "writesae": ("writesae/**/*.py",),
    "study": ("study/writesae_study/**/*.py",),
    "pages": ("writesae/**/*.html", "study/writesae_study/**/*.html"),
    "tutorials": ("tutorials/*.ipynb", "study/tutorials/*.ipynb"),
}
ALLOWED = {
    ("*", "quantised"): "the name of a condition, which saved tables have",
    ("docs/benchmarks.md", "of our own"): "a speech, which was read back",
}
"""Hits that stay: the file and what they begin with, and the reason."""


def prose(path: Path) -> Iterator[tuple[int, str]]:
    """Stretches of a file that are English, each with the line (in a notebook the cell) that it begins at."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        yield from ((n, "".join(cell["source"])) for n, cell in enumerate(cells) if cell["cell_type"] == "markdown")
    elif path.suffix == ".py":
        nodes = list(ast.walk(ast.parse(text)))
        joined = [node for node in nodes if isinstance(node, ast.JoinedStr)]
        parts = {id(part) for node in joined for part in node.values}
        for node in joined:
            yield (
                node.lineno,
                "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values),
            )
        for node in nodes:
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts:
                yield node.lineno, node.value
    else:
        yield 1, text


@pytest.mark.parametrize("area", AREAS)
def test_prose_is_plain(area):
    other = {path for g in RECORDS if area != "records" for path in ROOT.glob(g)}
    hits = [
        f"{path.relative_to(ROOT)}:{start + text.count(chr(10), 0, hit.start())}: {' '.join(hit[0].split())} ({plain})"
        for path in sorted({path for g in AREAS[area] for path in ROOT.glob(g)} - other)
        for start, text in prose(path)
        for plain, pattern in PATTERNS.items()
        for hit in pattern.finditer(text)
        if not any(path.match(file) and hit[0].startswith(words) for file, words in ALLOWED)
    ]
    assert not hits, f"{len(hits)} phrases to write plainly:\n" + "\n".join(hits)
