"""Write docs/results.md: what became of every claim of the paper on the models that come with the package.

    writesae reproduce --model embedded --layer 4 --heads 0 1 2 3 --small --set training_tokens=200000 --out runs/gdn
    writesae reproduce --model embedded-mamba2 --layer 6 --head 7 --small --out runs/mamba2
    writesae reproduce --model embedded-rwkv7 --layer 3 --head 0 --small --out runs/rwkv7
    python scripts/results_page.py runs/gdn runs/mamba2 runs/rwkv7

Reads the config.json and report/report.json of each run; every figure on the page comes from there.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from sae_lens_writesae.verdict.paper import PAPER_CLAIMS

PAGE = Path(__file__).parents[1] / "docs" / "results.md"


def main(folders: list[str]) -> None:
    runs = {}
    for folder in map(Path, folders):
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        runs[config["model"]] = (config, json.loads((folder / "report" / "report.json").read_text(encoding="utf-8")))
    PAGE.write_text("\n\n".join([HEAD, outcomes(runs), *(section(name, *run) for name, run in runs.items())]) + "\n")


HEAD = """# Results on the models of the package

Every claim of the paper that small models can test, with the verdict that [rules fixed beforehand](verdicts.md) give
it. The models have 2.3 M parameters, the dictionaries are small and trained for a minute at most; a claim that fails
here may hold on the models of the paper: this page says what the tests measure and that they can be failed, not that
the paper is wrong. `writesae reproduce` runs the same on a real model. Made by `scripts/results_page.py` from its
results."""


def outcomes(runs: dict[str, Any]) -> str:
    """Claim by model, how many answers had each outcome."""
    rows = []
    for number, paper in PAPER_CLAIMS.items():
        cells = []
        for _, report in runs.values():
            counts = Counter(claim["outcome"] for claim in report["claims"] if claim["number"] == number)
            cells.append(", ".join(f"{n} × {name}" for name, n in counts.most_common()) or "–")
        rows.append([str(number), paper.claim, *cells])
    return "## Verdicts\n\n" + table(["", "claim", *(f"`{name}`" for name in runs)], rows)


def section(name: str, config: dict[str, Any], report: dict[str, Any]) -> str:
    """All answers of one model."""
    claims = sorted(report["claims"], key=lambda claim: claim["number"] or len(PAPER_CLAIMS) + 1)
    rows = [
        [
            str(claim["number"] or "–"),
            claim["claim"],
            claim["label"],
            claim["paper"],
            claim["measured"],
            f"{claim['n']:,} {claim['unit']}",
            claim["controls"],
            f"**{claim['outcome']}**: {claim['sentence']}",
        ]
        for claim in claims
    ]
    heads = ", ".join(f"L{layer}H{head}" for layer in config["layers"] for head in config["heads"])
    intro = (
        f"Heads {heads}; dictionaries of {config['d_sae']} atoms, k = {config['k']}, {config['training_tokens']:,} "
        f"training tokens, seeds {', '.join(map(str, config['seeds']))}."
    )
    columns = ["", "claim", "dictionary", "paper", "measured", "n", "controls", "verdict"]
    return f"## {name}\n\n{intro}\n\n" + table(columns, rows)


def table(columns: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


if __name__ == "__main__":
    main(sys.argv[1:])
