"""What an evaluation leaves: its settings, tidy tables, what was measured on what; and how it is kept in a folder."""

from __future__ import annotations

import html
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeAlias, cast

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from hookpoints.files import SealedFolder, read_json, write_checksums
from sae_lens_writesae.files import named_errors, size_text
from writesae.verdict.paper import PAPER_CLAIMS, Outcome
from writesae.verdict.statistics import Estimate, estimate

if TYPE_CHECKING:
    from writesae.experiment.evaluation import Evaluation

_FORMAT = 3
"""Version of the files. Those of format 2 are not sealed, and are read still."""
_INFO = "info.json"
_LARGEST_TABLE = 2 * 10**9
"""Bytes. Tables of the paper's protocol have some megabytes."""
_COLOURS = (
    "--paper:#ffffff;--ink:#1b1f24;--muted:#5c6670;--grid:#dde1e6;--soft:#98a2ad;--atom:#1d5fd1;--rival:#c2410c;"
    "background:var(--paper);color:var(--ink);max-width:34rem;margin:0;padding:.5rem"
)
"""Those of a light page (`page/style.css`)."""

Json: TypeAlias = "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"


@dataclass(frozen=True)
class Claim:
    """One claim, what was measured of it here, and what became of it."""

    number: int | None
    """Row of `verdict.paper.PAPER_CLAIMS`; None for a claim of this project."""
    claim: str
    measured: str
    """The number with its interval, as a reader should see it."""
    n: int
    """Observations; `unit` names them: "firings in 40 sequences"."""
    unit: str
    controls: str
    """What could have refuted the claim, with its number. Empty: no control was run; `sentence` says why."""
    outcome: Outcome
    sentence: str
    """Why the outcome is what it is, by which rule."""

    @property
    def paper(self) -> str:
        """The paper's value, or a dash."""
        return PAPER_CLAIMS[self.number].value if self.number is not None else "–"


class Figure(NamedTuple):
    """One panel of the report: an inline SVG made by `verdict.figures`, which follows the page's colours."""

    title: str
    svg: str
    caption: str = ""

    def _repr_html_(self) -> str:
        """The panel as a notebook shows it, which has none of the page's colours."""
        caption = f"<p><small>{html.escape(self.caption)}</small></p>"
        return f'<figure style="{_COLOURS}"><b>{html.escape(self.title)}</b>{self.svg}{caption}</figure>'


@dataclass(frozen=True)
class Result:
    """The result of one evaluation of one dictionary, of a head, or of several dictionaries that are compared.

    Claims and figures are made from the tables alone, so that a loaded result gives the same page as a fresh one.
    """

    evaluation: Evaluation
    """The evaluation with its settings."""
    info: dict[str, Json]
    """What was evaluated on what: model, head, dictionaries, text, `seconds`, `n_edited_runs`, and `n_skipped`, which
    maps a reason to the number of units that could not be measured."""
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    """Tidy tables by name, with the columns that the evaluation documents. No NaN stands for a failure: what could not
    be measured is left out and counted in `info["n_skipped"]`."""
    skipped: str | None = None
    """Why nothing could be measured, where that is so; then there are no tables, and each claim is "not tested"."""

    @property
    def kind(self) -> str:
        """Name of the evaluation."""
        return self.evaluation.kind

    @property
    def label(self) -> str:
        """Name of what was evaluated, for reports."""
        return str(self.info["label"])

    def fact(self, name: str) -> float:
        """A number of `info`; KeyError or ValueError where there is none."""
        return float(cast(float, self.info[name]))

    def claims(self) -> list[Claim]:
        """Every claim that the evaluation answers, with its verdict."""
        if self.skipped is None:
            return self.evaluation.claims(self)
        question, numbers = self.evaluation.question, self.evaluation.answers or (None,)
        return [Claim(number, question, "–", 0, "measured", "", "not tested", self.skipped) for number in numbers]

    def figures(self) -> list[Figure]:
        """Panels for the report; none where nothing was measured."""
        return [] if self.skipped is not None else self.evaluation.figures(self)

    def notes(self) -> list[str]:
        """Sentences that a reader needs beside the numbers."""
        if self.skipped is not None:
            return [self.skipped]
        counts = self.info.get("n_skipped")
        left_out = counts if isinstance(counts, Mapping) else {}
        return [*self.evaluation.notes(self), *(f"Left out: {n:,} ({why})." for why, n in left_out.items() if n)]

    def details(self) -> dict[str, pd.DataFrame]:
        """Tables that a page shows: those that were measured, and those that the evaluation makes from them."""
        return self.tables if self.skipped is not None else self.evaluation.summaries(self) | self.tables

    @property
    def pace(self) -> str:
        """Time taken; where edits were run, how many runs and how fast."""
        seconds, runs = self.fact("seconds"), int(self.fact("n_edited_runs"))
        speed = f", {runs:,} edited runs, {runs / seconds:.0f} a second" if seconds and runs else ""
        return f"{seconds:.0f} s{speed}"

    def wide(
        self, value: str, *, by: str = "condition", units: Sequence[str], table: str | None = None
    ) -> pd.DataFrame:
        """One row per unit (the columns `units`), one column per value of `by`, holding `value`.

        Args:
            table: name of the table; by default the first one.
        """
        rows = self.tables[table or next(iter(self.tables))]
        return rows.pivot(index=list(units), columns=by, values=value).reset_index()

    def contrast(
        self,
        value: str,
        a: str,
        b: str | None = None,
        *,
        units: Sequence[str],
        clusters: str = "sequence",
        by: str = "condition",
        table: str | None = None,
    ) -> Estimate:
        """Mean of `value` under condition `a`, or of the paired difference a - b, with its interval over `clusters`.

        Units without one of the two conditions are left out.
        """
        wide = self.wide(value, by=by, units=units, table=table).dropna(subset=[a] if b is None else [a, b])
        difference = wide[a] if b is None else wide[a] - wide[b]
        return estimate(difference, wide[clusters], seed=self.evaluation.seed)

    def save(self, folder: str | Path) -> Path:
        """Write a folder with info.json, one parquet file a table, and their checksums. The folder appears whole: it is
        written aside, then renamed, in the place of one that was there.

        Raises:
            OSError: it cannot be written; names the folder.
        """
        target = Path(folder)
        head = {
            "format": _FORMAT,
            "kind": self.kind,
            "settings": self.evaluation.to_dict(),
            "tables": list(self.tables),
            "skipped": self.skipped,
            "info": self.info,
        }
        text = json.dumps(head, indent=1, default=_plain, allow_nan=False)
        with named_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
            try:
                (aside / _INFO).write_text(text, encoding="utf-8")
                for name, table in self.tables.items():
                    table.to_parquet(aside / f"{name}.parquet", index=False)
                write_checksums(aside, sorted(file.name for file in aside.iterdir()))
                aside.chmod(0o755)
                if target.exists():
                    shutil.rmtree(target)
                aside.replace(target)
            except BaseException:
                shutil.rmtree(aside, ignore_errors=True)
                raise
        return target

    @classmethod
    def load(cls, folder: str | Path, known: Mapping[str, type[Evaluation]]) -> Result:
        """Read what `save` wrote.

        Args:
            known: evaluations by name; `evaluations.load_result` passes all of them.

        Raises:
            ValueError: the folder holds something else, is cut short, was changed, has links, or is of a kind or format
                that this version does not know; names the file.
        """
        sealed = SealedFolder(Path(folder), ValueError)
        head = _head(sealed)
        file = sealed.folder / _INFO
        if head["kind"] not in known:
            raise ValueError(f"{file} is of the kind {head['kind']!r}; known here: {', '.join(known)}")
        evaluation_class = known[head["kind"]]
        names = [] if head["skipped"] is not None else list(evaluation_class.columns)
        if head["skipped"] is None and sorted(head["tables"]) != sorted(names):
            # Names in files are data: only declared tables are read, so that no path leaves the folder.
            raise ValueError(f"{file} names the tables {head['tables']}, but {head['kind']} has {names}")
        try:
            tables = {name: _table(sealed.file(f"{name}.parquet")) for name in names}
            evaluation = evaluation_class.from_dict(head["settings"])
        except (OSError, TypeError, ValueError) as error:
            raise ValueError(f"{folder} cannot be read as {head['kind']}: {error}") from error
        result = cls(evaluation, head["info"], tables, head["skipped"])
        result.check()
        return result

    def check(self) -> None:
        """Raise ValueError unless the tables have the columns that the evaluation documents."""
        for name, columns in {} if self.skipped is not None else self.evaluation.columns.items():
            if name not in self.tables:
                raise ValueError(f"{self.kind} needs the table {name!r}, found {', '.join(self.tables) or 'none'}")
            missing = [column for column in columns if column not in self.tables[name]]
            if missing:
                raise ValueError(f"table {name!r} of {self.kind} needs the columns {', '.join(missing)}")


def _table(file: Path) -> pd.DataFrame:
    """Read a table, unless what it says of itself is too large: a file of a few kilobytes may unpack to many GB."""
    told = pq.read_metadata(file)
    unpacked = max(
        8 * told.num_rows * told.num_columns, sum(told.row_group(n).total_byte_size for n in range(told.num_row_groups))
    )
    if unpacked > _LARGEST_TABLE:
        raise ValueError(
            f"{file} unpacks to {size_text(unpacked)}, more than the {size_text(_LARGEST_TABLE)} that are read"
        )
    return pd.read_parquet(file)


def _head(folder: SealedFolder) -> dict:
    file = folder.file(_INFO)
    head = read_json(file)
    if head.get("format") not in (2, _FORMAT):
        raise ValueError(f"{file} has format {head.get('format')}; this version reads formats 2 and {_FORMAT}")
    if head["format"] == _FORMAT:
        folder.require()
    missing = {"kind", "settings", "tables", "skipped", "info"} - head.keys()
    if missing:
        raise ValueError(f"{file} lacks {', '.join(sorted(missing))}")
    return head


def _plain(value: object) -> object:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, frozenset | set):
        return sorted(value)
    raise TypeError(f"{type(value).__name__} is not a JSON value")
