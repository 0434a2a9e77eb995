"""Runs the golden cases and keeps their tables: `PYTHONPATH=tests python -m golden.make [CASE ...]`.

Run it by hand, and only when numbers are meant to change.
"""

from __future__ import annotations

import io
import sys
import zipfile
from functools import cache
from pathlib import Path

import pandas as pd

from hookpoints import HookedRecurrent
from writesae_study.evaluations import EVALUATIONS
from writesae_study.experiment.evaluation import Result

from .cases import CASES, QUICK, WRITE, Case
from .dictionaries import load_model, make_dictionary, sequences

FOLDER = Path(__file__).parent / "tables"
FIRST = {case.kind: case.name for case in reversed(CASES)}
"""One case of each evaluation, which runs with the fast tests, and whose result other tests look at as well."""


@cache
def result_of(name: str, *, on_device: bool = False) -> Result:
    """The result of a case, measured once, on the host or on the pretended device; of an evaluation without one, by its
    kind, with its own settings."""
    found = [case for case in CASES if case.name == name]
    case = found[0] if found else Case(name, name, "embedded", QUICK.get(name, {}), {"sae": WRITE})
    saes = {label: make_dictionary(case.model, **recipe) for label, recipe in case.dictionaries.items()}  # type: ignore[arg-type]
    n, length = case.shape
    tokens = sequences(case.model, length)[:n]
    evaluation = EVALUATIONS[case.kind].from_dict(case.settings)
    if not on_device:
        return evaluation.run(load_model(case.model), saes, tokens, progress=False)
    import device  # which an old torch does not have

    with device.pretended():
        model = HookedRecurrent.from_pretrained(case.model, device="npu", self_check=False)
        there = {label: sae.to("npu") for label, sae in saes.items()}
        return evaluation.run(model, there, tokens, progress=False)


def save(name: str) -> None:
    """Keep the tables of a case as one zip archive of CSV files, the same bytes for the same tables."""
    with zipfile.ZipFile(FOLDER / f"{name}.zip", "w") as archive:
        for table, rows in result_of(name).tables.items():
            entry = zipfile.ZipInfo(f"{table}.csv")  # dated 1980: the archive says nothing of when it was made
            text = rows.to_csv(index=False, float_format="%.9g", lineterminator="\n")
            archive.writestr(entry, text, zipfile.ZIP_DEFLATED, 9)


def load(name: str) -> dict[str, pd.DataFrame]:
    """The tables that `save` kept, every column as strings."""
    with zipfile.ZipFile(FOLDER / f"{name}.zip") as archive:
        files = {Path(file).stem: io.BytesIO(archive.read(file)) for file in archive.namelist()}
    return {table: pd.read_csv(file, dtype=str, keep_default_na=False) for table, file in files.items()}


if __name__ == "__main__":
    for each in sys.argv[1:] or [case.name for case in CASES]:
        save(each)
