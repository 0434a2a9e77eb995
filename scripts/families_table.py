"""Make docs/families.md and docs/families.json: what each family's memory is, and how far hookpoints is from oracles.

    python scripts/families_table.py [--out docs] [--kernels FOLDER] [--page]

Needs the extras ``test`` and ``fla``; no GPU, no triton. ``--kernels`` is what tests/oracles/fla_interpreted.py filled
with the logits of fla's own kernels; without it that column is empty. Takes about 20 s. ``--page`` measures nothing and
makes the page again from the errors in families.json (where, say, a model type is refused anew); it needs no fla.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from families_page import Facts, Family, markdown

from hookpoints.fla import import_fla

ROOT = Path(__file__).resolve().parents[1]


def load(path: Path) -> list[Family]:
    """The rows of a families.json."""
    rows = json.loads(path.read_text(encoding="utf-8"))
    return [Family(**{**row, "facts": Facts(**row["facts"])}) for row in rows]


def measured(kernels: Path | None) -> list[Family]:
    """Every family, run."""
    import_fla()  # says how to install it where it is missing
    sys.path.append(str(ROOT / "tests"))
    from families_measure import measure, model_types

    torch.set_num_threads(1)
    families = []
    for model_type in model_types():
        families.append(family := measure(model_type, kernels))
        print(f"{family.source} {family.model_type}: {family.op_error:.0e}, {family.logits_error:.0e}", flush=True)
    return families


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    parser.add_argument("--kernels", type=Path, help="folder that tests/oracles/fla_interpreted.py filled")
    parser.add_argument("--page", action="store_true", help="only the page, from families.json")
    options = parser.parse_args()
    data = options.out / "families.json"
    families = load(data) if options.page else measured(options.kernels)
    options.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps([asdict(family) for family in families], indent=1, ensure_ascii=False)
    data.write_text(text + "\n", encoding="utf-8")
    (options.out / "families.md").write_text(markdown(families), encoding="utf-8")


if __name__ == "__main__":
    main()
