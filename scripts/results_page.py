"""Write docs/results.md: what became of every claim on the models that were evaluated.

    writesae reproduce --model embedded --layers 4 --heads 1 --k 4 --d-sae 256 ... --out runs/gdn
    writesae reproduce --model embedded-mamba2 --layers 6 --heads 7 --k 4 --d-sae 256 ... --out runs/mamba2
    python scripts/results_page.py runs/gdn runs/mamba2

Reads every result that `writesae reproduce`, `eval` or `demo` saved in or below the folders. All numbers of the page
come from there, and the settings from the `config.json` that `reproduce` leaves.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from docs_site.texts import table

from sae_lens_writesae import Result
from sae_lens_writesae.page.report import Row, claim_rows, find_results, in_order
from sae_lens_writesae.reproduce.config import ReproduceConfig
from sae_lens_writesae.verdict.paper import PAPER_CLAIMS

PAGE = Path(__file__).parents[1] / "docs" / "results.md"

HEAD = """# Results on the models of the package

Every claim of the paper that small models can test, with the verdict that [rules fixed beforehand](verdicts.md)
give. The models have 2.3 to 2.4 M parameters, and the dictionaries are small and trained for a minute at most. A
claim that fails here may hold on the models of the paper: this page shows what the tests measure and that claims
can fail them, and not that the paper is wrong. `writesae reproduce` runs the same on a real model.
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
    """The page: verdicts by model, then for each model one table for each head."""
    models: dict[str, list[Result]] = {}
    for result in results:
        models.setdefault(str(result.info["model"]), []).append(result)
    sections = [section(model, of_model) for model, of_model in models.items()]
    return "\n\n".join([HEAD, verdicts(models), *sections]) + "\n"


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


def section(model: str, results: Sequence[Result]) -> str:
    """All answers of one model: one table for each head, then what concerns several heads."""
    heads: dict[str, list[Result]] = {}
    for result in sorted(
        in_order(results), key=lambda each: (int(str(each.info["layer"])), int(str(each.info["head"])))
    ):
        heads.setdefault(f"L{result.info['layer']}H{result.info['head']}", []).append(result)
    parts = [f"## {model}", f"Update rule: {results[0].info['rule']}."]
    of_heads: set[tuple[str, int | None, str]] = set()
    for head, of_head in heads.items():
        rows = claim_rows(of_head)
        of_heads |= {key(row) for row in rows}
        parts.append(answers(f"Head {head}", rows))
    together = [row for row in claim_rows(results) if key(row) not in of_heads]
    return "\n\n".join([*parts, *([answers("Several heads", together)] if together else [])])


def key(row: Row) -> tuple[str, int | None, str]:
    """What tells one answer from another."""
    return row.label, row.claim.number, row.claim.claim


def answers(heading: str, rows: Sequence[Row]) -> str:
    """One table with the values and verdicts, and below it what they rest on."""
    short = [(c.number or "", c.claim, label, c.measured, f"**{c.outcome}**") for label, c in rows]
    details = []
    for label, claim in rows:
        name = f"{claim.number}. {claim.claim}" if claim.number else claim.claim
        facts = [f"the paper: {claim.paper}" if claim.number else "", f"n: {claim.n:,} {claim.unit}"]
        facts += [f"controls: {claim.controls}" if claim.controls else "no control"]
        details.append(f"* **{name}** ({label}): {claim.sentence} *{'; '.join(filter(None, facts))}.*")
    lines = "\n".join(details).replace("<", "&lt;")
    return f"""### {heading}

{table(("", "claim", "dictionary", "value here", "verdict"), short)}
<details markdown="1"><summary>Reasons, sample sizes and controls</summary>

{lines}

</details>"""


if __name__ == "__main__":
    main()
