"""The golden cases as data: which evaluation, with which settings, on which model, with which dictionaries.

Every case is small on purpose: all of them together run in well under a minute on one thread.
"""

from __future__ import annotations

from typing import NamedTuple

Recipe = dict[str, object]
"""A dictionary, as the arguments of `golden.dictionaries.make_dictionary`."""


class Case(NamedTuple):
    """One run of one evaluation, whose tables are kept."""

    name: str
    kind: str
    model: str
    settings: dict[str, object]
    dictionaries: dict[str, Recipe]
    """Label -> recipe. An evaluation that takes one dictionary gets the only one."""
    shape: tuple[int, int] = (8, 48)
    """N sequences of T tokens, the first ones of the held-out text."""


HEADS: dict[str, tuple[int, int]] = {"embedded": (2, 2), "embedded-mamba2": (5, 0), "embedded-rwkv7": (2, 0)}
"""Layer and head of every model. Writes there last (half-lives of 5, 11 and 32 tokens), later layers can read them, and
deleting one moves the logits far more than float32 rounding does."""

WRITE: Recipe = {"seed": 0}
OTHER_SEED: Recipe = {"seed": 1}
STATE: Recipe = {"seed": 0, "target": "state"}
RANK_2: Recipe = {"seed": 0, "rank": 2}
FLAT: Recipe = {"seed": 0, "rank": 2, "flat": True}
TIED: Recipe = {"seed": 0, "encoder": "tied"}
UNEQUAL: Recipe = {"seed": 0, "norms": (0.5, 2.0)}

ALL_SCALES = ("coefficient", "matched", "least_squares")
ALL_CONTROLS = ("random", "shuffled", "elsewhere", "state", "mean")

SUBSTITUTION: dict[str, object] = {
    "n_atoms": 6,
    "firings_per_atom": 2,
    "atom_choice": "own",
    "scales": ALL_SCALES,
    "controls": ALL_CONTROLS,
    "horizon": 8,
    "first_position": 1,
    "min_firings": 1,
    "mean_write_sequences": 4,
    "seed": 3,
}
LOGIT_CHANGE: dict[str, object] = {
    "n_atoms": 3,
    "firings_per_atom": 2,
    "horizons": (0, 1, 4),
    "ranks": ((1, 1), (2, 5), (50, 50)),
    "eps": (0.3, 1.0, 3.0),
    "unit": "write",
    "first_position": 1,
    "min_firings": 1,
    "seed": 3,
}
ERASURE: dict[str, object] = {
    "n_atoms": 4,
    "select_firings": 6,
    "test_firings": 8,
    "min_firings": 3,
    "horizon": 3,
    "first_position": 1,
    "seed": 3,
}
PARTITION: dict[str, object] = {
    "min_firings": 3,
    "threshold": 0.35,
    "components": 2,
    "restarts": 1,
    "min_atoms": 10,
    "tested_atoms": 3,
    "firings_per_atom": 2,
    "controls": ("random", "mean"),
    "seed": 3,
}
PASSAGE: dict[str, object] = {"passages": 4, "threshold": 0.35, "min_firings": 2, "seed": 3}


CASES: tuple[Case, ...] = (
    Case("substitution", "substitution", "embedded", SUBSTITUTION, {"sae": WRITE}),
    Case(
        "substitution-dominant",
        "substitution",
        "embedded",
        SUBSTITUTION | {"atom_choice": "dominant", "scales": ("coefficient",), "controls": ("random", "mean")},
        {"sae": WRITE},
    ),
    Case(
        "substitution-state-trained",
        "substitution",
        "embedded",
        SUBSTITUTION | {"scales": ("coefficient", "matched"), "controls": ("random",)},
        {"sae": STATE},
    ),
    Case(
        "substitution-rank-2",
        "substitution",
        "embedded",
        SUBSTITUTION | {"scales": ("coefficient",), "controls": ("random", "shuffled")},
        {"sae": RANK_2},
    ),
    Case(
        "substitution-flat",
        "substitution",
        "embedded",
        SUBSTITUTION | {"scales": ("least_squares",), "controls": ("random",)},
        {"sae": FLAT},
    ),
    Case(
        "substitution-unequal-norms",
        "substitution",
        "embedded",
        SUBSTITUTION | {"scales": ("coefficient", "matched"), "controls": ("random",)},
        {"sae": UNEQUAL},
    ),
    Case(
        "multistep",
        "multistep",
        "embedded",
        {
            "n_steps": 6,
            "n_atoms": 5,
            "firings_per_atom": 2,
            "scale": "coefficient",
            "controls": ALL_CONTROLS,
            "seed": 3,
        },
        {"sae": WRITE},
    ),
    Case("logit_change", "logit_change", "embedded", LOGIT_CHANGE, {"sae": WRITE}),
    Case(
        "logit_change-coefficient-rank-2",
        "logit_change",
        "embedded",
        LOGIT_CHANGE | {"unit": "coefficient", "horizons": (0, 2)},
        {"sae": RANK_2},
    ),
    Case("erasure", "erasure", "embedded", ERASURE, {"sae": WRITE}, (16, 48)),
    Case(
        "sign",
        "sign",
        "embedded",
        {"n_positions": 10, "ranks": ((1, 10), (11, 100)), "sizes": (0.3, 3.0), "first_position": 8, "seed": 3},
        {"sae": WRITE},
    ),
    Case(
        "install",
        "install",
        "embedded",
        {
            "pairs": 3,
            "prompt_tokens": 16,
            "n_positions": 3,
            "sizes": (3.0, 100.0),
            "headline": 100.0,
            "semantic": (12, 260),
            "new_tokens": 8,
            "seed": 3,
        },
        {"sae": WRITE},
    ),
    Case(
        "amplify",
        "amplify",
        "embedded",
        {
            "n_tokens": 2,
            "min_count": 3,
            "min_firings": 2,
            "factors": (0.0, 20.0),
            "headline": 20.0,
            "prompts": 6,
            "prompt_tokens": 16,
            "new_tokens": 24,
            "seed": 3,
        },
        {"sae": WRITE},
    ),
    Case("passage", "passage", "embedded", PASSAGE, {"sae": WRITE}),
    Case("partition", "partition", "embedded", PARTITION, {"sae": WRITE}),
    Case("partition-state-trained", "partition", "embedded", PARTITION | {"threshold": 0.3}, {"sae": STATE}),
    Case(
        "seeds",
        "seeds",
        "embedded",
        {"min_firings": 3, "threshold": 0.35, "seed": 3},
        {"one": WRITE, "two": OTHER_SEED},
    ),
    Case(
        "objectives",
        "objectives",
        "embedded",
        {
            "reconstruction_sequences": 5,
            "n_atoms": 4,
            "firings_per_atom": 2,
            "scale": "coefficient",
            "controls": ("random", "mean"),
            "horizon": 6,
            "min_firings": 2,
            "seed": 3,
        },
        {"writes": WRITE, "states": STATE, "other": OTHER_SEED},
    ),
    Case(
        "baselines",
        "baselines",
        "embedded",
        {
            "test_sequences": 4,
            "positions_per_sequence": 2,
            "scale": "coefficient",
            "pca_ranks": (1, 4),
            "pca_writes": 96,
            "state_ranks": (1, 2),
            "replacement_sequences": 2,
            "horizon": 6,
            "first_position": 1,
            "seed": 3,
        },
        {"rank 1": WRITE, "rank 2": RANK_2, "flat": FLAT, "tied": TIED},
    ),
    Case(
        "baselines-of-states",
        "baselines",
        "embedded",
        {
            "test_sequences": 3,
            "positions_per_sequence": 2,
            "scale": "matched",
            "pca_ranks": (1, 2),
            "pca_writes": 64,
            "state_ranks": (1, 4),
            "replacement_sequences": 2,
            "horizon": 4,
            "first_position": 1,
            "seed": 3,
        },
        {"rank 1": STATE, "flat": STATE | FLAT},
    ),
    *(
        Case(f"{kind}-{model.removeprefix('embedded-')}", kind, model, settings, {"sae": WRITE})
        for model, threshold in (("embedded-mamba2", 0.2), ("embedded-rwkv7", 0.16))
        for kind, settings in {
            "substitution": SUBSTITUTION | {"n_atoms": 4, "scales": ("coefficient", "matched")},
            "erasure": ERASURE | {"n_atoms": 3},
            "logit_change": LOGIT_CHANGE | {"n_atoms": 2, "horizons": (0, 4), "eps": (1.0, 10.0)},
            "partition": PARTITION | {"threshold": threshold},
            "passage": PASSAGE | {"passages": 3, "threshold": threshold},
        }.items()
    ),
)

QUICK: dict[str, dict[str, object]] = {"bits": {"steps": 2, "tune_steps": 1}}
"""Settings of evaluations without a case: training goes other ways on another processor."""

KEYS: dict[tuple[str, str], tuple[str, ...]] = {
    ("substitution", "firings"): ("firing", "condition", "scale"),
    ("multistep", "steps"): ("firing", "condition", "scale", "step"),
    ("logit_change", "cells"): ("firing", "horizon", "rank", "token", "eps"),
    ("logit_change", "scores"): ("predictor", "horizon", "rank", "eps"),
    ("erasure", "atoms"): ("atom",),
    ("erasure", "firings"): ("atom", "sequence", "position"),
    ("sign", "writes"): ("sequence", "position", "token", "direction", "m"),
    ("install", "continuations"): ("pair", "condition", "m"),
    ("amplify", "atoms"): ("token",),
    ("amplify", "counts"): ("token", "prompt", "condition", "factor"),
    ("passage", "passages"): ("sequence", "class", "condition"),
    ("passage", "classes"): ("class", "atom"),
    ("partition", "atoms"): ("atom",),
    ("partition", "mixtures"): ("sample", "space", "components", "component"),
    ("partition", "substitution"): ("scale", "kind"),
    ("seeds", "counts"): ("sae",),
    ("seeds", "matches"): ("a", "b", "sample"),
    ("seeds", "pairs"): ("a", "b", "sample", "first"),
    ("objectives", "dictionaries"): ("sae",),
    ("objectives", "measures"): ("sae", "measure"),
    ("objectives", "contrasts"): ("measure", "a", "b"),
    ("objectives", "firings"): ("sae", "sequence", "position", "atom"),
    ("baselines", "dictionaries"): ("sae",),
    ("baselines", "writes"): ("sequence", "position", "sae", "condition"),
    ("baselines", "replacement"): ("sequence", "sae", "hook", "method"),
    ("baselines", "selectivity"): ("sae", "sequence", "position"),
}
"""(kind, table) -> the columns that name a row. Rows are compared in the order of these, not in that of the table."""

KL_ROUNDING = 1.2e-5
"""Float32 logits of about 10 are rounded by about 1e-6, and another batch size rounds differently. KL is quadratic in
the change of the logits, so that it moves by this times its square root (largest seen with batches of 3 rows, or with
two threads: 2.7e-6; when one batcher took the place of four: 5.5e-6; between those processors 8.7e-6)."""

LOGIT_ROUNDING = 3e-5
"""The same for a difference of logits or of log-probabilities, in nats (largest seen: 7e-6; on an Intel processor,
where the tables were made on an AMD one, 1.8e-5)."""

SIZE_ROUNDING = 1e-6
"""The same for cosines, norms and shares that float32 arithmetic makes, in units of the largest value of their column
(largest seen between those processors: 2.4e-7)."""

SCORE_ROUNDING = 0.02
"""The same for what is computed from a few such differences, some of them hardly above their rounding: the scores of
predictors, in units of max(1, |score|) (largest seen: 0.011). The cells that they come from are held closely."""

ROUNDED: dict[tuple[str, str], dict[str, str]] = {
    ("substitution", "firings"): {
        f"{direction}kl_{where}": "kl" for direction in ("", "reverse_") for where in ("window", "at", "next")
    },
    ("multistep", "steps"): {"state_gap": "logit", "residual_cosine": "logit"},
    ("logit_change", "cells"): dict.fromkeys(("measured", "F1", "F2", "shuffled"), "logit"),
    ("logit_change", "scores"): dict.fromkeys(("r2", "r2_low", "r2_high", "r2_global_scale"), "score"),
    ("erasure", "atoms"): dict.fromkeys(("selected", "effect", "elsewhere", "random", "wrong"), "logit"),
    ("erasure", "firings"): dict.fromkeys(("effect", "elsewhere", "random", "wrong"), "logit"),
    # f2 is a float32 gradient times a propagated key, which is summed in float64 since the sizes of writes are.
    ("sign", "writes"): {"measured": "logit", "f2": "logit"},
    ("install", "continuations"): {"log_prob_change": "logit"},
    ("passage", "passages"): {"bits": "logit", "native_bits": "logit"},
    ("objectives", "firings"): {"delete": "kl", "coefficient": "kl", "matched": "kl"},
    ("baselines", "writes"): {"kl": "kl"},
    ("baselines", "replacement"): {"nats": "logit", "native_nats": "logit"},
}
"""(kind, table) -> the columns that are read off float32 logits, and which rounding they have. All others must agree to
`RELATIVE` and `ABSOLUTE` of `test_golden`."""
