"""The golden cases, read from `cases.toml`, and how far their numbers may be from those that were kept."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, NamedTuple

Recipe = dict[str, Any]
"""A dictionary, as the arguments of `golden.dictionaries.make_dictionary`."""

_FILE: dict[str, Any] = tomllib.loads(Path(__file__).with_name("cases.toml").read_text(encoding="utf-8"))
HEADS: dict[str, tuple[int, int]] = {model: (layer, head) for model, (layer, head) in _FILE["heads"].items()}
WRITE: Recipe = _FILE["recipes"]["write"]
QUICK: dict[str, dict[str, object]] = _FILE["quick"]


class Case(NamedTuple):
    """One run of one evaluation, whose tables are kept."""

    name: str
    kind: str
    model: str
    settings: dict[str, object]
    dictionaries: dict[str, Recipe]
    """Label -> recipe. An evaluation that takes one dictionary gets the only one."""
    shape: tuple[int, int] = (8, 48)
    """N sequences of T tokens, the first ones of the held-out text."""


def _case(row: dict[str, Any]) -> Case:
    kind = row.get("kind", row["name"])
    settings = _FILE["settings"].get(kind, {}) | row.get("settings", {})
    recipes = row.get("dictionaries", {"sae": "write"})
    dictionaries = {label: _FILE["recipes"][recipe] for label, recipe in recipes.items()}
    case = Case(row["name"], kind, row.get("model", "embedded"), settings, dictionaries)
    return case._replace(shape=tuple(row["shape"])) if "shape" in row else case


CASES = tuple(_case(row) for row in _FILE["cases"])
KEYS: dict[tuple[str, str], list[str]] = {
    (kind, table): columns for kind, tables in _FILE["keys"].items() for table, columns in tables.items()
}
ROUNDED: dict[tuple[str, str], dict[str, str]] = {
    (kind, table): {column: rounding for rounding, columns in roundings.items() for column in columns}
    for kind, tables in _FILE["rounded"].items()
    for table, roundings in tables.items()
}

KL_ROUNDING = 1.2e-5
"""Float32 logits of about 10 are rounded by about 1e-6, and another batch size rounds differently. KL is quadratic in
the change of the logits, so that it moves by this times its square root (largest seen with batches of 3 rows, or with
two threads: 2.7e-6; when one batcher took the place of four: 5.5e-6; between those processors 8.7e-6)."""

LOGIT_ROUNDING = 3e-5
"""The same for a difference of logits or of log-probabilities, in nats (largest seen: 7e-6; on an Intel processor,
where the tables were made on an AMD one, 1.8e-5)."""

SIZE_ROUNDING = 1e-6
"""The same for cosines, norms and shares that float32 arithmetic makes, in units of the largest value of their column
(largest seen between those processors: 2.4e-7)."""

SCORE_ROUNDING = 0.02
"""The same for what is computed from a few such differences, some of them hardly above their rounding: the scores of
predictors, in units of max(1, |score|) (largest seen: 0.011). The cells that they come from are held closely."""
