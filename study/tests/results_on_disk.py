"""Results that are written and read, for tests of what happens to them on a disk."""

from __future__ import annotations

from pathlib import Path

from made_up import HOLDS, made_up
from reliability.folders import Contents, Kind

from writesae_study.evaluations import load_result


def make_result(folder: Path) -> None:
    made_up(HOLDS, label="mine", scales=("matched",), n_sequences=6).save(folder)


def read_result(folder: Path) -> Contents:
    result = load_result(folder)
    return {"evaluation": result.evaluation, "info": {**result.info, "seconds": 0}, **result.tables}


RESULT = Kind(make_result, read_result)
