"""Write docs/coverage.md: which command answers each claim, table and figure of the paper, or why none does.

    python scripts/coverage_page.py

Claims come from `verdict.paper` and from the `answers` of the evaluations. Tables and figures are listed here; a test
parses every command. The numbers of tables and figures are those of version 4 of the paper.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

from docs_site.texts import table

from writesae import EVALUATIONS
from writesae.experiment.evaluation import Scope
from writesae.verdict.paper import OTHER_MODELS, PAPER_CLAIMS

PAGE = Path(__file__).parents[1] / "docs" / "coverage.md"

SAES = {
    Scope.EACH: "my-sae",
    Scope.LAYER: "head-0 head-1 head-2",
    Scope.HEAD: "my-sae",
    Scope.SEEDS: "seed-0 seed-1 seed-2",
    Scope.TARGETS: "write state",
    Scope.VARIANTS: "bilinear flat",
}
"""Folders of dictionaries in the commands."""

SIZES = {
    18: "--atoms-per-token 10 --factors 0 2 5 10 --headline 5 --prompts 40 --new-tokens 400",
    22: "--n-atoms 500 --firings-per-atom 10 --sequences 1000",
    23: "--n-atoms 500 --firings-per-atom 10 --sequences 1000",
    24: "--test-firings 150 --injected 1 2 4",
}
"""Settings that give a claim the paper's size, where the defaults are smaller in kind."""

REMARKS = {
    5: "dictionaries of all heads of the layer; the report joins them",
    14: "an atom of states; `--loss write` of `writesae train` is what its authors name as missing",
    18: "a dictionary for each head of the layer: their atoms are scaled together",
    20: "seeds of one dictionary, one folder each",
    27: "the report joins results of models of several update rules",
}


class Part(NamedTuple):
    """One table or figure of the paper."""

    name: str
    content: str
    command: str
    """What makes it here; empty: left out."""
    where: str
    """Where in the result it stands, or why it is left out."""


PARTS = (
    Part("table 1", "four atoms by hand", "writesae show my-sae", "a page for each atom; no atom is picked by hand"),
    Part("table 2, figure 3", "median KL by layer; chain", "writesae eval substitution my-sae", "claims 2 and 3"),
    Part("table 3, figure 5", "installs", "writesae eval install my-sae", "claims 10 and 25; a figure by stratum"),
    Part(
        "table 4, figure 6",
        "newlines by dose",
        "writesae eval amplify head-0 head-1 head-2 --atoms-per-token 10",
        "claim 18; no word length",
    ),
    Part(
        "table 5, figure 8",
        "partition by sparsity rule",
        "writesae eval partition batchtopk",
        "a dictionary of each rule from `writesae train --architecture`; claim 6",
    ),
    Part("table 6", "rank-1 atoms and flat SAEs", "writesae eval baselines bilinear flat", "claim 15"),
    Part(
        "table 7",
        "reconstruction by architecture, over seeds",
        "writesae train --model embedded --layer 2 --head 1 --k 32 "
        "--variants FlatSAE MatrixSAE WriteSAE BilinearFlatSAE TiedSAE --seeds 0 1 2",
        "metadata of each; `reproduce` trains the same variants with two seeds (table `variants`)",
    ),
    Part(
        "tables 8 to 10",
        "training settings",
        "writesae train --model embedded --layer 2 --head 1 --architecture writesae_batchtopk --k 32 --lr 3e-4",
        "settings: `PAPER_RUNNER`, `VARIANTS`",
    ),
    Part("table 11, figure 4", "register cosines by update rule", "writesae report results", "claim 27"),
    Part("table 12, figure 13", "all heads of a layer", "writesae report results", "claim 5"),
    Part(
        "table 13",
        "wins by cosine",
        "writesae eval substitution my-sae --n-atoms None --atom-choice own",
        "a figure of the result; claim 4 in `partition`",
    ),
    Part("table 14", "rank 1 and rank 2 by head", "writesae eval baselines bilinear rank-2", "claim 16"),
    Part(
        "table 15, thresholds",
        "registers by threshold and components",
        "writesae eval partition my-sae",
        "tables `sweep` and `mixtures`",
    ),
    Part(
        "table 15, k",
        "partition and substitution by k",
        "writesae train --model embedded --layer 2 --head 1 --k 16",
        "`reproduce/sweep.smk` runs a grid",
    ),
    Part("table 16", "seeds", "writesae eval seeds seed-0 seed-1 seed-2", "claim 20"),
    Part("table 17", "top-1 flips by class", "", "not built: a further readout of the substitution test"),
    Part("table 18", "erasure of one atom", "writesae eval erasure my-sae --atoms 412", "claim 8"),
    Part("table 19", "atoms put in where they are silent", "writesae eval erasure my-sae", "claim 24, table `doses`"),
    Part("tables 20, 21", "installs by size and stratum", "writesae eval install my-sae", "claims 10 and 25"),
    Part("figure 1", "how a write is replaced", "", "a drawing"),
    Part("figure 2", "KL of atom, deletion, random", "writesae eval substitution my-sae", "figures of the result"),
    Part("figure 7", "the formula", "writesae eval logit_change my-sae", "claim 7; figures of F0, F1, F2"),
    Part(
        "figures 9, 10",
        "selectivity of directions",
        "writesae eval baselines bilinear flat --top-tokens 32",
        "claim 28; it says little, as the paper says itself",
    ),
    Part("figure 11", "three atoms", "writesae show my-sae", "a page for each atom"),
    Part(
        "figure 12",
        "ladder of model sizes",
        "writesae train --model Qwen/Qwen3.5-4B --layer 12 --head 8 --k 32 --dataset my-texts",
        "once for each model, then `partition`; needs the models",
    ),
    Part("figure 14", "where deletion wins", "writesae eval substitution my-sae", "figure by quartile of the deletion"),
    Part("3.4", "first component of the writes", "writesae eval partition my-sae", "claim 26, column pca"),
    Part(
        "3.4",
        "linear probes",
        "",
        "left out: a probe reads a class off the state and writes nothing, so that it has no place in a test of "
        "writes; which token an atom's firings mark is measured by `amplify` and `baselines` (own tokens)",
    ),
    Part(
        "B",
        "gated SAE (fails)",
        "writesae train --model embedded --layer 2 --head 1 --architecture writesae_gated",
        "another gate: see its docs",
    ),
    Part("I.2", "readers", "writesae eval readers my-sae", "its own claim, for heads that can read the atom"),
    Part(
        "I.3",
        "residual-stream SAE",
        "",
        "left out: its atoms are vectors and cannot be written in the place of a write, as the paper says; its cosine "
        "is with what it was trained to reconstruct",
    ),
    Part("rebuttal", "state after one substitution", "writesae eval multistep my-sae", "claim 21"),
    Part("-", "crosscoders over heads", "", "not in the paper; not built"),
)

HEAD = """# Coverage of the paper

Which command answers each claim, table and figure of WriteSAE (arXiv 2605.12770, version 4, with its appendix and
rebuttal), or why none does. Commands take folders of dictionaries (`my-sae`); `writesae reproduce` trains and evaluates
all of them for a model. What came of the claims on the models of the package is on the page of [results](results.md);
[how a verdict is reached](verdicts.md) is the same for all. `scripts/coverage_page.py` writes this page.
"""


def claim_command(number: int) -> str:
    """The command that answers a claim."""
    kind = next(kind for kind, each in EVALUATIONS.items() if number in each.answers)
    return " ".join(["writesae eval", kind, SAES[EVALUATIONS[kind].scope], SIZES.get(number, "")]).strip()


def commands() -> list[str]:
    """Every command of the page."""
    return [claim_command(number) for number in PAPER_CLAIMS] + [part.command for part in PARTS if part.command]


def page() -> str:
    """The page."""
    claims = []
    for number, claim in PAPER_CLAIMS.items():
        needs = f"needs {OTHER_MODELS[number]}" if number in OTHER_MODELS else ""
        remark = "; ".join(filter(None, [needs, REMARKS.get(number, "")]))
        claims.append((number, claim.claim, claim.value, f"`{claim_command(number)}`", remark))
    parts = [(p.name, p.content, f"`{p.command}`" if p.command else "", p.where) for p in PARTS]
    return "\n".join(
        [
            HEAD,
            "## Claims\n\nNumbers 21 to 28 are rows of the appendix and of the rebuttal.\n",
            table(("", "claim", "the paper's value", "command", "remark"), claims),
            "## Tables, figures and sections\n",
            table(("in the paper", "what", "command", "where, or why not"), parts),
        ]
    )


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    PAGE.write_text(page(), encoding="utf-8")
