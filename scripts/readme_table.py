"""Write README's table of evaluations from the classes: what each one asks, and which claims of the paper it answers.

python scripts/readme_table.py            writes the lines between the two markers
python scripts/readme_table.py --check    ends with status 1 where they differ, and writes nothing
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from writesae import EVALUATIONS

README = Path(__file__).resolve().parents[1] / "README.md"
BEGIN, END = "<!-- evaluations -->\n", "<!-- /evaluations -->"


def table() -> str:
    """One row per evaluation, in the order of the paper's claims."""
    rows = [f"| `{kind}` | {each.question} | {spans(each.answers)} |\n" for kind, each in EVALUATIONS.items()]
    return "| evaluation | question | claims of the paper |\n|---|---|---|\n" + "".join(rows)


def spans(numbers: Iterable[int]) -> str:
    """1, 2, 3, 5 as "1–3, 5"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)


def with_table(readme: str) -> str:
    """The text of README with the table as the classes have it."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{table()}{END}{after}"


def main(arguments: list[str]) -> int:
    """Write or check."""
    text = README.read_text(encoding="utf-8")
    new = with_table(text)
    if "--check" in arguments:
        return int(new != text)
    README.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
