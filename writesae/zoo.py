"""The command `writesae zoo`: what dictionaries find in models whose mechanism is known, as one page."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from writesae.choices import at_least
from writesae.files import GENERATOR, check_absent, check_ours, check_writable


@dataclass(frozen=True, kw_only=True)
class Zoo:
    """Measure what dictionaries, quantizers and attributions find in small models whose mechanism is known.

    Every method is fitted, without labels, to the same writes of the heads that hold a fact. Then its atoms write facts
    into the memory, and the model is asked.
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
    out: Path = Path("writesae-out/zoo")
    """Folder for index.html, zoo.json and zoo.md."""

    def __post_init__(self) -> None:
        at_least(self, {"seeds": 1, "sequences": 128, "facts": 16, "steps": 2})

    def run(self) -> Path:
        """Measure, write zoo.json, zoo.md and index.html, and return the page.

        Raises:
            ValueError: a name that is not in the zoo, or a folder that cannot be written.
        """
        from hookpoints.files import atomic_text
        from writesae.dictionaries import quiet
        from writesae.experiment.known import board
        from writesae.page.template import environment

        check_writable(self.out)
        check_ours(self.out / "index.html", self.out / "zoo.json")
        if not (self.out / "zoo.json").exists():  # which is written first
            check_absent([self.out / "zoo.md"])
        with quiet():
            boards = [board(name, self.seeds, self.sequences, self.facts, self.steps) for name in self.models]
        content = GENERATOR | {
            "settings": {name: value for name, value in asdict(self).items() if name != "out"},
            "boards": boards,
        }
        atomic_text(self.out / "zoo.json", json.dumps(content, indent=1, allow_nan=False))
        atomic_text(self.out / "zoo.md", environment().get_template("zoo_table.html").render(content))
        return atomic_text(self.out / "index.html", environment().get_template("zoo.html").render(content))
