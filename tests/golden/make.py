"""Runs the golden cases and keeps their tables: `PYTHONPATH=tests python -m golden.make [--check] [CASE ...]`.

Run it by hand, and only when numbers are meant to change. Each case runs twice, and nothing is written where the two
runs differ in one bit. `--check` writes nothing and prints a hash of every case, to compare two processes.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import time
import zipfile
from pathlib import Path

import pandas as pd
import torch

from writesae.evaluations import EVALUATIONS

from .cases import CASES, Case
from .dictionaries import load_model, make_dictionary, tokens_of

FOLDER = Path(__file__).parent / "tables"
DIGITS = 9
"""Significant digits of floats in the files."""


def tables_of(case: Case, **more: object) -> dict[str, pd.DataFrame]:
    """The tables of a case, with `more` settings. The only function here that knows how an evaluation is run."""
    saes = {label: make_dictionary(case.model, **recipe) for label, recipe in case.dictionaries.items()}  # type: ignore[arg-type]
    evaluation = EVALUATIONS[case.kind](**case.settings | more)  # type: ignore[arg-type]
    return evaluation.run(load_model(case.model), saes, tokens_of(case), progress=False).tables


def save(case: Case, tables: dict[str, pd.DataFrame]) -> Path:
    """Keep the tables as one zip archive of CSV files, the same bytes for the same tables."""
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{case.name}.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name, table in tables.items():
            entry = zipfile.ZipInfo(f"{name}.csv")  # dated 1980: the archive says nothing of when it was made
            text = table.to_csv(index=False, float_format=f"%.{DIGITS}g", lineterminator="\n")
            archive.writestr(entry, text, zipfile.ZIP_DEFLATED, 9)
    return path


def load(case: Case) -> dict[str, pd.DataFrame]:
    """The tables that `save` kept, every column as strings."""
    with zipfile.ZipFile(FOLDER / f"{case.name}.zip") as archive:
        return {
            Path(name).stem: pd.read_csv(
                io.BytesIO(archive.read(name)), dtype=str, keep_default_na=False, lineterminator="\n"
            )
            for name in archive.namelist()
        }


def digest(tables: dict[str, pd.DataFrame]) -> str:
    """A hash of every bit of the tables: names, columns, dtypes, order, values."""
    sha = hashlib.sha256()
    for name, table in tables.items():
        sha.update(f"{name} {[(c, str(table[c].dtype)) for c in table]} {len(table)}".encode())
        for column in table:
            values = table[column]
            exact = [x.hex() for x in values] if values.dtype.kind == "f" else [repr(x) for x in values.tolist()]
            sha.update("\0".join(exact).encode())
    return sha.hexdigest()[:16]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", help="names of cases; none: all")
    parser.add_argument("--check", action="store_true", help="write nothing, print hashes")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for case in CASES:
        if arguments.cases and case.name not in arguments.cases:
            continue
        begin = time.perf_counter()
        tables = tables_of(case)
        seconds, first = time.perf_counter() - begin, digest(tables)
        if digest(tables_of(case)) != first:
            raise SystemExit(f"{case.name} differs between two runs in one process")
        sizes = ", ".join(f"{name} {len(table)}" for name, table in tables.items())
        written = "" if arguments.check else f", {save(case, tables).stat().st_size:,} bytes"
        print(f"{case.name:34} {first} {seconds:5.2f} s{written}; rows: {sizes}", flush=True)


if __name__ == "__main__":
    main()
