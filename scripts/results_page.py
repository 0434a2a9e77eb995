"""Write docs/results.md: what became of every claim on the models that were evaluated.

    python scripts/results_run.py runs/results
    python scripts/results_page.py runs/results

Reads every result that `results_run.py`, or `writesae reproduce`, `eval` or `demo`, saved in or below the folders. All
numbers of the page come from there. Settings are on the page only for runs of `reproduce`, which leaves a
`config.json`. The tables that the page in docs/ was made from are not in the repository.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from docs_site.texts import table

from writesae import Result
from writesae.page.report import claim_rows, find_results, in_order
from writesae.reproduce.config import ReproduceConfig
from writesae.verdict.paper import PAPER_CLAIMS

PAGE = Path(__file__).parents[1] / "docs" / "results.md"

HEAD = """# Results on the models of the package

What was evaluated, with the verdict that [one ladder of rules](verdicts.md) gives; a dash says that nothing here
answers the claim. No control dictionaries were run: a claim that holds here may hold for an untrained dictionary too.
The models have 2.3 to 2.4 M parameters, and the dictionaries are small and trained for a minute at most. A claim that
fails here may hold on the models of the paper: this page shows what the tests measure and that claims can fail
them, and not that the paper is wrong.
`writesae reproduce` runs the same on a real model.
`scripts/results_page.py` makes the page from its results."""


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="folders in or below which results were saved")
    parser.add_argument("--out", type=Path, default=PAGE, help="page to write")
    options = parser.parse_args()
    text = page(find_results(options.folders)) + settings(options.folders)
    options.out.write_text(text, encoding="utf-8")


def settings(folders: Sequence[Path]) -> str:
    """How each run was made: what departs from the defaults of `writesae reproduce`."""
    defaults = json.loads(json.dumps(asdict(ReproduceConfig())))
    lines = []
    for file in (folder / "config.json" for folder in folders if (folder / "config.json").exists()):
        config = json.loads(file.read_text(encoding="utf-8"))
        own = {name: value for name, value in config.items() if value != defaults.get(name, value)}
        flags = [f"{name} {' '.join(map(str, v)) if isinstance(v, list) else v}" for name, v in own.items()]
        lines.append(f"* {'; '.join(flags)}")
    return "\n## How these runs were made\n\n" + "\n".join(lines) + "\n" if lines else ""


def page(results: Sequence[Result]) -> str:
    """The page: verdicts by model, then every answer in one table that filters and sorts."""
    models: dict[str, list[Result]] = {}
    for result in in_order(results):
        models.setdefault(str(result.info["model"]), []).append(result)
    return "\n\n".join([HEAD, verdicts(models), answers(models)]) + "\n"


def verdicts(models: dict[str, list[Result]]) -> str:
    """How often each claim of the paper had which verdict, by model."""
    counts = {
        model: Counter((row.claim.number, row.claim.outcome) for row in claim_rows(results))
        for model, results in models.items()
    }
    rows = []
    for number, claim in PAPER_CLAIMS.items():
        cells = [
            ", ".join(f"{n} {outcome}" for (of_claim, outcome), n in count.most_common() if of_claim == number)
            for count in counts.values()
        ]
        rows.append((number, claim.claim, *cells))
    head = ("", "claim", *(f"`{model}`" for model in models))
    return f"## Verdicts\n\nHow many answers had which verdict.\n\n{table(head, rows).rstrip()}"


def answers(models: Mapping[str, Sequence[Result]]) -> str:
    """Every answer, with what it rests on."""
    rows = []
    for model, results in models.items():
        for row in claim_rows(results):
            claim = row.claim
            facts = [f"n: {claim.n:,} {claim.unit}", f"controls: {claim.controls}" if claim.controls else ""]
            why = " ".join([claim.sentence, *(f"{fact}." for fact in facts if fact)])
            rows.append((claim.number or "", claim.claim, f"{model} {row.label}", claim.measured, claim.outcome, why))
    rows.sort(key=lambda row: (row[0] == "", row[0]))
    head = ("", "claim", "dictionary", "value here", "verdict", "why")
    return f"""## All answers

Click a heading to sort. The box filters: `embedded holds` keeps the rows that contain both words.

<div class="sorted" markdown="1">

{table(head, rows)}
</div>"""


if __name__ == "__main__":
    main()
