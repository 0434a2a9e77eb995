"""What the paper claims, as data, and which question of the study answers each claim. Loads no torch.

Source: WriteSAE, arXiv 2605.12770 (v4). The values are the paper's; its models are larger than those that ship here,
so sizes need not agree, but signs and orders should.
"""

from typing import Literal, NamedTuple

Outcome = Literal["holds", "fails", "confounded", "undecided", "inconclusive", "below the floor", "not tested"]
"""What became of a claim; `verdict.judge` has the rules. "confounded": a control that has none of the atom's
information does as well. "undecided": the effect is not distinguishable from a control. "inconclusive": too little
data."""


class PaperClaim(NamedTuple):
    """One row of the paper's claims."""

    claim: str
    cell: str  # model, layer and head
    n: str  # sample size
    value: str


PAPER_CLAIMS: dict[int, PaperClaim] = {
    1: PaperClaim(
        "an atom is nearer to the native write than deletion", "Qwen3.5-0.8B L1/L9/L17 H4", "4,851 firings", "92.4%"
    ),
    2: PaperClaim("strict chain atom < delete < random", "Qwen3.5-0.8B L1/L9/L17 H4", "4,851 firings", "89.5%"),
    3: PaperClaim("median KL of atom / delete / random", "Qwen3.5-0.8B L9", "1,851 firings", "0.40 / 1.09 / 2.02 nats"),
    4: PaperClaim(
        "the population of atoms, register and bundle alike",
        "Qwen3.5-0.8B L9H4, 87 atoms",
        "2,426 firings",
        "89.8%; register 91.4, bundle 89.0 (p = 0.24)",
    ),
    5: PaperClaim("all heads of a layer", "Qwen3.5-0.8B L9, 15 heads", "8,889 firings", "89.3 ± 2.6%"),
    6: PaperClaim(
        "atoms part into registers and bundles",
        "Qwen3.5-0.8B L9H4, 2,048 atoms",
        "",
        "222 register / 94 bundle / 1,732 dead; register median cosine 0.262",
    ),
    7: PaperClaim(
        "a formula predicts the logit change", "Qwen3.5-0.8B L9H4", "200 cells", "median R² 0.98; Mamba-2 -0.07"
    ),
    8: PaperClaim("erasing an atom lowers its token", "Qwen3.5-0.8B L9H4, one atom", "150 firings", "-0.116 nats"),
    9: PaperClaim("the sign of a write is the sign of its effect", "Qwen3.5-0.8B L9H4", "2,000 writes", "84.6%"),
    10: PaperClaim(
        "three installed writes put a token into the continuation",
        "Qwen3.5-0.8B L9H4, ranks 100-1000",
        "300 continuations",
        "33.3 to 100%",
    ),
    11: PaperClaim("substitution on Mamba-2", "Mamba-2-370M L24H0", "2,500 firings", "88.1%; 0.97 / 1.62 / 2.32 nats"),
    12: PaperClaim("substitution on RWKV-7", "RWKV-7-1.5B L12H0", "6,591 firings", "45.3% (at the floor)"),
    13: PaperClaim("substitution on DeltaNet", "DeltaNet-1.3B L12H8", "395 firings", "48.3% (fails)"),
    14: PaperClaim("substitution on a larger model", "Qwen3.5-4B L12H8", "600 firings", "48% (fails)"),
    15: PaperClaim(
        "flat SAE with a top-1 SVD against WriteSAE", "GDN / Mamba-2 / RWKV-7", "", "-0.11 / +6.55 / -2.52 points"
    ),
    16: PaperClaim("rank-2 atoms cost no more", "Qwen3.5-0.8B L9, 16 heads", "24,600", "perplexity +0.82% vs +0.76%"),
    17: PaperClaim("the bilinear encoder leaves fewer atoms dead", "Qwen3.5-0.8B L9", "", "32% vs 80% (flat SAE)"),
    18: PaperClaim(
        "amplifying an atom moves its token in generation",
        "Qwen3.5-4B-Base L9",
        "40 prompts",
        "16.8 to 11.2 newlines per 400 tokens",
    ),
    19: PaperClaim(
        "passages bear the deletion of registers, not of random writes",
        "Qwen3.5-0.8B L9H4",
        "20 passages",
        "+0.005 vs +0.226 bits per token",
    ),
    20: PaperClaim(
        "seeds find the same kinds, not the same atoms",
        "Qwen3.5-0.8B L9H4",
        "3 seeds",
        "counts vary 4-12%, < 1% of atoms match at cosine > 0.9",
    ),
    21: PaperClaim("one substitution leaves the state within 5% of its norm", "rebuttal", "10 tokens each", "below 5%"),
    22: PaperClaim("the formula holds on held-out positions", "rebuttal", "5,000 positions", "R² 0.97"),
    23: PaperClaim("a linear predictor of the logit change on Mamba-2", "rebuttal, Mamba-2", "", "R² 0.84"),
    24: PaperClaim(
        "an atom inserted where it is silent raises its token (I.4, table 19)",
        "Qwen3.5-0.8B L9H4, one atom",
        "150 positions",
        "+0.016 nats at 4 x, p = 0.15 (fails)",
    ),
    25: PaperClaim(
        "installed writes improve the rank of their token (table 20)",
        "Qwen3.5-0.8B L9H4, all strata",
        "1,200 trials",
        "77.4% of trials",
    ),
    26: PaperClaim(
        "registers point along their writes, the first principal component of writes does not (3.4)",
        "Qwen3.5-0.8B L9H4, three registers",
        "3 atoms",
        "component -0.216 / -0.045 / -0.075; registers 0.262 (median)",
    ),
    27: PaperClaim(
        "alignment of registers falls with the rank of the write rule (figure 4, tables 6, 11)",
        "GDN / RWKV-7 / Mamba-2",
        "ten cells",
        "median cosine 0.262 / 0.180 / 0.0575; KS p = 1.2e-10",
    ),
    28: PaperClaim(
        "an atom moves other tokens than a random direction of its norm (I.1, figures 9, 10)",
        "Qwen3.5-0.8B L1/L9/L17, 47 heads",
        "592 features",
        "selectivity 0.9953; orthogonal directions 0.998 (uninformative)",
    ),
}
"""Claims by the number that results and the report use. From 21 on they come from the appendix and the rebuttal."""


class Asked(NamedTuple):
    """What an evaluation asks."""

    class_name: str
    """In `writesae_study.evaluations.<kind>`."""
    question: str
    """A heading."""
    answers: tuple[int, ...]
    """Rows of `PAPER_CLAIMS`."""


QUESTIONS: dict[str, Asked] = {
    "substitution": Asked(
        "Substitution",
        "Can an atom stand in for the write it replaces?",
        (1, 2, 3, 5, 11, 12, 13, 14),
    ),
    "partition": Asked(
        "Partition",
        "Do atoms point along the writes they fire on, and are there two kinds?",
        (4, 6, 26, 27),
    ),
    "logit_change": Asked("LogitChange", "Can a formula predict the change of a logit?", (7, 22, 23)),
    "erasure": Asked("Erasure", "Does erasing an atom lower its own token?", (8, 24)),
    "sign": Asked("Sign", "Does the sign of a write set the sign of its effect?", (9,)),
    "install": Asked(
        "Install",
        "Do installed writes put a token into the continuation?",
        (10, 25),
    ),
    "baselines": Asked("Baselines", "Do rank-1 atoms do better than what is simpler?", (15, 16, 17, 28)),
    "amplify": Asked("Amplify", "Does scaling an atom change how often its token is written?", (18,)),
    "passage": Asked("Passage", "How much does removing a class of atoms hurt the loss?", (19,)),
    "seeds": Asked("Seeds", "Do seeds find the same atoms?", (20,)),
    "multistep": Asked("Multistep", "How does the effect of one substitution grow over later tokens?", (21,)),
}
"""By the kind of the evaluation, in the order of the claims."""
