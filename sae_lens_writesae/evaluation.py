"""What every evaluation gives: tidy tables, figures, and claims with a verdict; and how it is kept in a folder."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
import pandas as pd

from sae_lens_writesae.firings import HeadHook
from sae_lens_writesae.verdict.paper import PAPER_CLAIMS, Outcome

_FORMAT = 1
_INFO = "info.json"


@dataclass(frozen=True)
class Claim:
    """One claim, what was measured of it here, and what became of it."""

    number: int | None
    """Row of `claims.PAPER_CLAIMS`; None for a claim of this project."""
    claim: str
    measured: str
    """The number with its interval, as a reader should see it."""
    n: int
    """Independent units, `unit` names them: "firings in 40 sequences", "prompt x target pairs"."""
    unit: str
    controls: str
    """What could have refuted it, with its number. Empty: none was run (say why in `sentence`)."""
    outcome: Outcome
    sentence: str
    """Why this outcome, by which rule."""

    @property
    def paper(self) -> str:
        """The paper's value, or a dash."""
        return PAPER_CLAIMS[self.number].value if self.number is not None else "–"


class Figure(NamedTuple):
    """One panel: inline SVG made by `plots`, which follows the page's colours."""

    title: str
    svg: str
    caption: str = ""


@dataclass(frozen=True)
class Evaluation(ABC):
    """Result of one evaluation of one dictionary (or of several, where the evaluation compares them).

    Subclasses set `kind` and `title`, document their tables in `COLUMNS`, and make claims and figures from the tables
    alone, so that a loaded result gives the same page as a fresh one.
    """

    info: dict[str, Any]
    """What was evaluated, on what, by which settings: plain JSON values; `describe` gives the common part. `seconds` is
    the time taken, `conditions` the number of edited runs."""
    tables: dict[str, pd.DataFrame]
    """Tidy tables by name. No NaN stands for a failure: rows that could not be measured are left out, and counted in
    `info["omitted"]`, a dict from the reason to the number."""

    kind: ClassVar[str]
    """Name of the folder and of the subcommand of `writesae eval`."""
    title: ClassVar[str]
    """Heading in the report: the question that is asked."""
    COLUMNS: ClassVar[dict[str, dict[str, str]]]
    """For each table, what its columns are."""

    @abstractmethod
    def claims(self) -> list[Claim]:
        """The claims that this evaluation answers, with verdicts by fixed rules."""

    @abstractmethod
    def figures(self) -> list[Figure]:
        """Panels for the report."""

    def notes(self) -> list[str]:
        """Sentences that a reader needs beside the numbers: definitions, limits, what was omitted and why."""
        return [f"Left out: {n:,} ({why})." for why, n in self.info.get("omitted", {}).items() if n]

    @property
    def label(self) -> str:
        """Name in reports."""
        return str(self.info.get("label") or self.info.get("hook_name", self.kind))

    @property
    def pace(self) -> str:
        """Time taken; where edits were run, how many and how fast (a condition is one edited run of one text)."""
        seconds, conditions = float(self.info.get("seconds", 0)), int(self.info.get("conditions", 0))
        each = f", {conditions:,} conditions, {conditions / seconds:.0f} a second" if seconds and conditions else ""
        return f"{seconds:.0f} s{each}"

    def __post_init__(self) -> None:
        for name, columns in self.COLUMNS.items():
            if name not in self.tables:
                raise ValueError(f"{self.kind} needs the table {name!r}, found {', '.join(self.tables) or 'none'}")
            missing = [column for column in columns if column not in self.tables[name]]
            if missing:
                raise ValueError(f"table {name!r} of {self.kind} needs the columns {', '.join(missing)}")

    def save(self, folder: str | Path) -> Path:
        """Write a folder with info.json and one parquet file a table; written aside, then renamed."""
        target = Path(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
        try:
            head = {"format": _FORMAT, "kind": self.kind, "tables": list(self.tables), "info": self.info}
            (aside / _INFO).write_text(json.dumps(head, indent=1, default=_plain, allow_nan=False), encoding="utf-8")
            for name, table in self.tables.items():
                table.to_parquet(aside / f"{name}.parquet", index=False)
            aside.chmod(0o755)
            if target.exists():
                shutil.rmtree(target)
            os.replace(aside, target)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        return target

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read what `save` wrote; ValueError for anything else, or for another kind of evaluation."""
        source = Path(folder)
        head = saved_head(source)
        if head["kind"] != cls.kind:
            raise ValueError(f"{source} holds {head['kind']}, not {cls.kind}")
        return cls(head["info"], {name: pd.read_parquet(source / f"{name}.parquet") for name in head["tables"]})


def saved_head(folder: Path) -> dict[str, Any]:
    """info.json of a saved evaluation: format, kind, tables, info. ValueError where there is none."""
    file = folder / _INFO
    try:
        head = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"no evaluation was saved in {folder}: it has no {_INFO}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is no JSON, or is cut short: {error}") from error
    if head.get("format") != _FORMAT:
        raise ValueError(f"{file} has format {head.get('format')}, this version reads format {_FORMAT}")
    return head


def describe(model: Any, sae: Any, *, label: str = "", **more: Any) -> dict[str, Any]:
    """The part of `info` that all evaluations of one dictionary share: model, layer, head, sizes, SAE."""
    hook = HeadHook.of(sae)
    shape = model.cfg.layer(hook.layer)
    architecture = getattr(sae.cfg, "architecture", None)
    return {
        "label": label or f"{hook.cell} {hook.target}-trained",
        "model": str(model.cfg.model_name),
        "model_type": str(model.cfg.model_type),
        "dtype": str(model.cfg.dtype).removeprefix("torch."),
        "rule": str(shape.rule),
        "layer": hook.layer,
        "head": hook.head,
        "K": shape.K,
        "V": shape.V,
        "hook_name": hook.name,
        "target": hook.target,
        "architecture": str(architecture() if callable(architecture) else type(sae).__name__),
        "d_sae": int(sae.cfg.d_sae),
    } | more


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} is no JSON value")
