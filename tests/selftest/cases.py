"""Every case of the self-test, as data: an evaluation, a world, dictionaries, settings, and what must become of claims.

Each evaluation has a world in which its main claim must hold, and worlds in which it must not: noise, a dictionary that
learned nothing, or an effect that a control explains.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Wanted = Literal["must hold", "must not hold", "must be confounded"]
"""What must become of a claim. One that is not tested fulfils none of them."""

HOLDS: Wanted = "must hold"
NOT: Wanted = "must not hold"
CONFOUNDED: Wanted = "must be confounded"


@dataclass(frozen=True)
class Case:
    """One run of one evaluation where the truth is known."""

    kind: str
    """Name of the evaluation."""
    world: str
    """One of `worlds.WORLDS`."""
    dictionary: str
    """One of `dictionaries.DICTIONARIES`."""
    claims: Mapping[str, Wanted]
    """By words of the claim; the first claim that has them is meant."""
    settings: Mapping[str, object] = field(default_factory=dict)
    """Settings besides those of `SETTINGS`."""

    @property
    def name(self) -> str:
        """Evaluation, world and dictionary."""
        return f"{self.kind}: {self.world}, {self.dictionary}"


SETTINGS: dict[str, dict[str, object]] = {
    "substitution": {
        "n_atoms": 32,
        "firings_per_atom": 3,
        "atom_choice": ("dominant",),
        "scales": ("coefficient", "matched"),
        "horizon": 6,
    },
    "partition": {"components": 3, "restarts": 1, "firings_per_atom": 3, "controls": ("random", "mean")},
    "logit_change": {
        "n_atoms": 12,
        "firings_per_atom": 2,
        "horizons": (0, 1),
        "ranks": ((1, 1), (2, 5)),
        "eps": (0.1, 1.0),
    },
    "erasure": {"n_atoms": 6, "select_firings": 8, "test_firings": 14, "min_firings": 4, "horizon": 2},
    "sign": {"n_positions": 48, "sizes": (0.3, 1.0)},
    "install": {"pairs": 20, "prompt_tokens": 16, "new_tokens": 5, "sizes": (3.0,)},
    "baselines": {
        "test_sequences": 14,
        "positions_per_sequence": 2,
        "pca_ranks": (1, 4),
        "pca_writes": 400,
        "state_ranks": (1,),
        "replacement_sequences": 8,
        "horizon": 6,
    },
    "amplify": {
        "min_count": 8,
        "min_firings": 5,
        "prompts": 22,
        "prompt_tokens": 16,
        "new_tokens": 16,
        "factors": (12.0,),
        "headline": 12.0,
    },
    "passage": {"min_firings": 2, "passages": 22},
    "seeds": {"min_firings": 3},
    "multi_atom": {"n_atoms": 24, "firings_per_atom": 2, "counts": (1, 2), "scales": ("coefficient",), "horizon": 6},
    "multistep": {"n_steps": 4, "n_atoms": 24, "firings_per_atom": 2, "controls": ("random", "state", "mean")},
    "objectives": {
        "reconstruction_sequences": 6,
        "n_atoms": 24,
        "firings_per_atom": 3,
        "horizon": 6,
        "min_firings": 3,
    },
    "readers": {"n_atoms": 12, "select_firings": 4, "test_firings": 4, "min_firings": 4, "horizon": 4},
}
"""Small settings of each evaluation."""

_ONE: dict[str, object] = {"n_atoms": 1, "firings_per_atom": 44}
"""Of a world with a single atom."""
_SUBSTITUTES = "an atom is nearer to the native write than deletion"
_CODE = "a write can be replaced by its sparse code"
_ASTRAY = "an atom moves the model less than deletion"
_INSTALL = "of stratum 100-1000"
_SIGN = "the sign of a write is the sign of its effect"
_ALIGNED = "atoms point along the writes they fire on"
_KINDS = "atoms part into registers and bundles"
_ALIKE = "register and bundle atoms substitute alike"
_PATHS = "all first-order paths predict it"
_ERASED, _SINGLE = "erasing an atom lowers its token", "single atoms have a token of their own"
_AMPLIFIED = "amplifying an atom moves its token"
_SPARED = "costs less than inserting random directions"
_READERS = "readers of its own"
_BETTER = "an atom of the WriteSAE substitutes better than the top-1 SVD"
_DEAD = "leaves fewer atoms dead"
_OBJECTIVE = "training on writes by mse"
_SAME_KINDS, _SHARED = "seeds find the same kinds", "seeds share atoms beyond chance"

CASES: tuple[Case, ...] = (
    # -- substitution
    Case(
        "substitution",
        "planted",
        "oracle",
        {_SUBSTITUTES: HOLDS, "strict chain": HOLDS, "median KL": HOLDS},
    ),
    Case(
        "substitution",
        "planted",
        "untrained",
        {_SUBSTITUTES: NOT, "strict chain": NOT, "median KL": NOT},
    ),
    Case(
        "substitution",
        "noise",
        "untrained",
        {_SUBSTITUTES: NOT, "strict chain": NOT, "median KL": NOT},
    ),
    Case(
        "substitution",
        "one write",
        "blurred",
        {_SUBSTITUTES: CONFOUNDED},
        settings={"firings_per_atom": 44, "scales": ("coefficient",), "controls": ("random", "state", "mean")},
    ),
    # -- partition
    Case("partition", "planted", "oracle", {_ALIGNED: HOLDS}, settings={"tested_atoms": 0}),
    Case("partition", "two kinds", "two kinds", {_KINDS: HOLDS, _ALIKE: HOLDS}),
    Case("partition", "planted", "untrained", {_KINDS: NOT, _ALIGNED: NOT}),
    Case("partition", "noise", "untrained", {_KINDS: NOT, _ALIGNED: NOT}, settings={"tested_atoms": 0}),
    # -- logit_change
    Case("logit_change", "linear", "oracle", {"F0": HOLDS, "F1": HOLDS, _PATHS: HOLDS}),
    Case("logit_change", "planted", "oracle", {"F0": NOT, "F1": NOT, _PATHS: HOLDS}),
    Case("logit_change", "planted", "untrained", {_PATHS: NOT}, settings={"eps": (30.0, 100.0)}),
    # -- erasure
    Case("erasure", "tokens", "oracle", {_ERASED: HOLDS, _SINGLE: HOLDS}),
    Case("erasure", "shared tokens", "oracle", {_ERASED: CONFOUNDED, _SINGLE: NOT}),
    Case("erasure", "tokens", "untrained", {_ERASED: NOT, _SINGLE: NOT}),
    Case("erasure", "noise", "untrained", {_ERASED: NOT, _SINGLE: NOT}),
    # -- sign and install: about a head, the dictionary says which
    Case("sign", "linear", "oracle", {_SIGN: HOLDS, "all first-order paths": HOLDS}),
    Case("sign", "same rows", "oracle", {_SIGN: CONFOUNDED}),
    Case("install", "readable", "untrained", {_INSTALL: HOLDS}),
    Case("install", "unread", "untrained", {_INSTALL: NOT}),
    # -- baselines
    Case("baselines", "planted", "oracle, flat untrained, rank 2", {_BETTER: HOLDS, _DEAD: HOLDS}),
    Case("baselines", "planted", "oracle, flat oracle, rank 2 untrained", {_BETTER: NOT, _DEAD: NOT}),
    # -- amplify
    Case("amplify", "tokens", "oracle", {_AMPLIFIED: HOLDS}),
    Case("amplify", "shared tokens", "oracle", {_AMPLIFIED: NOT}),
    Case("amplify", "tokens", "untrained", {_AMPLIFIED: NOT}),
    # -- passage
    Case("passage", "spared", "oracle", {_SPARED: HOLDS}),
    Case("passage", "spared", "untrained", {_SPARED: NOT}),
    Case("passage", "noise", "untrained", {_SPARED: NOT}),
    # -- seeds
    Case("seeds", "blurred", "seeds: the same atoms", {_SAME_KINDS: NOT, _SHARED: HOLDS}),
    Case("seeds", "blurred", "seeds: atoms alike", {_SAME_KINDS: HOLDS, _SHARED: HOLDS}),
    Case("seeds", "blurred", "seeds: untrained", {_SAME_KINDS: NOT, _SHARED: NOT}),
    Case("seeds", "planted", "seeds: the same atoms", {_SHARED: NOT}),
    # -- multi_atom
    Case("multi_atom", "sums", "oracle, k 3", {_CODE: HOLDS}),
    Case("multi_atom", "sums", "untrained, k 3", {_CODE: NOT}),
    Case("multi_atom", "noise", "untrained, k 3", {_CODE: NOT}),
    Case("multi_atom", "one write", "oracle", {_CODE: CONFOUNDED}, settings=_ONE),
    # -- multistep
    Case("multistep", "planted", "oracle", {_ASTRAY: HOLDS}),
    Case("multistep", "planted", "untrained", {_ASTRAY: NOT}),
    Case("multistep", "one write", "oracle", {_ASTRAY: CONFOUNDED}, settings=_ONE),
    Case("multistep", "unread", "untrained", {_ASTRAY: NOT}),
    # -- objectives
    Case("objectives", "planted", "oracle of writes, untrained on states", {_OBJECTIVE: HOLDS}),
    Case("objectives", "planted", "untrained on writes and states", {_OBJECTIVE: NOT}),
    # -- readers
    Case("readers", "readers", "oracle", {_READERS: HOLDS}),
    Case("readers", "readers", "untrained", {_READERS: NOT}),
    Case("readers", "planted", "oracle", {_READERS: NOT}),
)
"""The cases, evaluation by evaluation."""
