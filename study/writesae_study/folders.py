"""Folders of the study's commands, and of the runs that its dictionaries come from. Loads no torch."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

from writesae.files import check_ours, check_writable, sae_folders


def check_page(page: Path) -> None:
    """`check_writable` of the folder of a report, and `check_ours` of the page, its numbers and its tables."""
    check_writable(page.parent)
    check_ours(page, page.with_suffix(".json"), *sorted((page.parent / "tables").glob("*-*.parquet")))


def run_folder(sae: Path) -> Path | None:
    """The folder of the run that trained a dictionary; None where no run did.

    A run saves the settings of each dictionary in `RUN/L2H0/NAME/config.json`. Other folders above a dictionary are
    nobody's business.
    """
    place = sae.resolve()
    if place.name != "sae" or not (place.parent / "config.json").is_file():
        return None
    return place.parents[min(2, len(place.parents) - 1)]


def check_saes(arguments: Sequence[str]) -> None:
    """Raise ValueError where a command line begins with a folder that holds no SAE, before what lists its flags loads
    torch."""
    for word in itertools.takewhile(lambda word: not word.startswith("-"), arguments):
        sae_folders(Path(word))
