"""The command `writesae zoo`: what dictionaries find in models whose mechanism is known, as one page."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from writesae.choices import at_least
from writesae.files import GENERATOR, check_absent, check_ours, check_writable

HOW = ("models", "writes", "states", "only", "device", "out")
"""Fields that no number of a model depends on."""

Entries = dict[str, Any]
"""Of a JSON file of a zoo, or of a row of its tables."""


@dataclass(frozen=True, kw_only=True)
class Zoo:
    """Measure what dictionaries, quantizers and attributions find in small models whose mechanism is known.

    The first table: every method is fitted, without labels, to the same writes of the heads that hold a fact. Then its
    atoms write facts into the memory, and the model is asked. The second: every reader is fitted to the same states of
    these heads, and reads the facts that other texts have told.
    """

    models: tuple[str, ...] = ("recall", "composition")
    """Models of the zoo (`writesae models` lists them)."""
    seeds: int = 3
    """Fits of each method. Intervals are over facts and seeds."""
    sequences: int = 1024
    """Sequences whose writes are fitted, and give the codes of the facts that are written: 128 or more."""
    facts: int = 256
    """Facts that are written, and states that are read."""
    steps: int = 1500
    """Training steps of dictionaries."""
    writes: bool = True
    """Measure the first table."""
    states: bool = True
    """Measure the second table."""
    only: str | None = None
    """One quantizer, by its name on the page: its rows are put into the zoo.json that `out` has, whose settings must be
    these. None: every method."""
    device: str | None = None
    """cpu, cuda or cuda:N; by default a GPU, if there is one."""
    out: Path = Path("writesae-out/zoo")
    """Folder for index.html, zoo.json and zoo.md. Models that its zoo.json has with these settings, measured by this
    version of the package, are not measured again: a command that was stopped resumes."""

    def __post_init__(self) -> None:
        at_least(self, {"seeds": 1, "sequences": 128, "facts": 16, "steps": 2})
        if not (self.writes or self.states):
            raise ValueError("writes, states=False: must be True for one of the tables at least.")

    def run(self) -> Path:
        """Measure, write zoo.json, zoo.md and index.html, and return the page.

        Raises:
            ValueError: a name that is not in the zoo, a folder that cannot be written, or with `only` one that holds
                no zoo.json of these settings and this version.
        """
        from hookpoints import zoo
        from hookpoints.files import atomic_text, sealed_json, versions
        from writesae.page.template import environment
        from writesae.training import quiet
        from writesae_study.known.board import board, readings

        for name in self.models:
            zoo.task(name)  # raises where there is none, before any work
        check_writable(self.out)
        check_ours(self.out / "index.html", self.out / "zoo.json")
        if not (self.out / "zoo.json").exists():  # which is written first
            check_absent([self.out / "zoo.md"])
        settings = {name: value for name, value in asdict(self).items() if name not in HOW}
        settings["version"] = versions().get("sae-lens-writesae")
        boards, read = self._saved_boards(settings)
        sizes = (self.seeds, self.sequences, self.facts, self.steps)
        content: Entries = GENERATOR | {"settings": settings, "versions": versions()}
        with quiet():
            for name in self.models:
                if self.writes and (self.only or name not in boards):
                    new = board(name, *sizes, only=self.only)
                    old = boards.get(name, new)
                    boards[name] = new | old | {"rows": with_rows(old["rows"], new["rows"])}
                if self.states and not self.only and name not in read:
                    read[name] = readings(name, *sizes)
                content |= {"boards": [*boards.values()], "readings": [*read.values()]}
                atomic_text(self.out / "zoo.json", sealed_json(content, indent=1))
        templates = environment("writesae_study")
        tables = [templates.get_template(f"{name}_table.html").render(content) for name in ("zoo", "states")]
        atomic_text(self.out / "zoo.md", "".join(tables))
        return atomic_text(self.out / "index.html", templates.get_template("zoo.html").render(content))

    def _saved_boards(self, settings: Entries) -> tuple[Entries, Entries]:
        """The boards and the readings of the zoo.json that is there, by model, if it has the same settings.

        Raises:
            ValueError: it was damaged or edited, or has not what `only` needs.
        """
        from hookpoints.files import read_sealed_json

        file = self.out / "zoo.json"
        saved: Entries = read_sealed_json(file) if file.exists() else {}
        boards, read = ({}, {})
        if saved.get("settings") == settings:
            boards, read = ({each["model"]: each for each in saved[name]} for name in ("boards", "readings"))
        if self.only is not None and not boards.keys() >= set(self.models):
            raise ValueError(
                f"only: expected {file} of the models {self.models} with the settings {settings}, got "
                f"{saved.get('settings')} of {list(boards)}"
            )
        return boards, read


def with_rows(old: list[Entries], new: list[Entries]) -> list[Entries]:
    """Rows of a board with others: a method that is there is replaced, another one follows the second row."""
    there = {row["method"]: row for row in new}
    rows = [there.pop(row["method"], row) for row in old]
    return [*rows[:2], *there.values(), *rows[2:]]
