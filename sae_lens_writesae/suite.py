"""Every evaluation by name: what `writesae eval` and `writesae reproduce` can run."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from sae_lens_writesae.evaluation import Evaluation


class Scope(Enum):
    """Which dictionaries of a head one evaluation takes."""

    EACH = "each dictionary by itself"
    HEAD = "any dictionary of a head, which says which head it is; the atoms are not used"
    SEEDS = "one target, several seeds"
    TARGETS = "one seed, several targets"
    VARIANTS = "one target and seed, several architectures"


@dataclass(frozen=True)
class Entry:
    """An evaluation, by the names of what implements it, so that listing them imports none."""

    module: str
    function: str
    """`function(model, sae, tokens, config, progress)`; for several dictionaries `sae` maps labels to them."""
    config: str
    result: str
    scope: Scope
    question: str
    """One line for help texts."""
    claims: tuple[int, ...] = ()
    """Rows of `claims.PAPER_CLAIMS` that it answers."""

    def _get(self, name: str) -> Any:
        return getattr(importlib.import_module(f"sae_lens_writesae.{self.module}"), name)

    @property
    def config_class(self) -> type[Any]:
        """The dataclass of its settings."""
        return self._get(self.config)

    @property
    def result_class(self) -> type[Evaluation]:
        """The class that loads what it saved."""
        return self._get(self.result)

    @property
    def run(self) -> Callable[..., Evaluation]:
        """The function itself."""
        return self._get(self.function)

    @property
    def compares(self) -> bool:
        """Whether it takes several dictionaries at once."""
        return self.scope not in (Scope.EACH, Scope.HEAD)

    def run_on(self, model: Any, saes: Mapping[str, Any], tokens: Any, config: Any, **more: Any) -> Evaluation:
        """`run` with dictionaries by label: with all of them where it compares, else with the only one."""
        given = saes if self.compares else next(iter(saes.values()))
        return self.run(model, given, tokens, config, **more)


EVALUATIONS: dict[str, Entry] = {
    "substitution": Entry(
        "substitution_evaluation",
        "evaluate_substitution",
        "SubstitutionConfig",
        "Substitution",
        Scope.EACH,
        "can an atom stand in for the write it replaces?",
        claims=(1, 2, 3, 5, 11, 12, 13, 14),
    ),
    "multistep": Entry(
        "multistep_evaluation",
        "evaluate_multistep",
        "MultistepConfig",
        "Multistep",
        Scope.EACH,
        "how far does one substitution lead the model astray?",
    ),
    "logit_change": Entry(
        "logit_change",
        "run_logit_change",
        "LogitChangeConfig",
        "LogitChange",
        Scope.EACH,
        "can a formula predict what an atom does to later logits?",
        claims=(7,),
    ),
    "erasure": Entry(
        "interventions.erasure",
        "run_erasure",
        "ErasureConfig",
        "Erasure",
        Scope.EACH,
        "does erasing an atom lower a token of its own?",
        claims=(8,),
    ),
    "sign": Entry(
        "interventions.sign",
        "run_sign",
        "SignConfig",
        "Sign",
        Scope.HEAD,
        "does the sign of a write set the sign of its effect?",
        claims=(9,),
    ),
    "install": Entry(
        "interventions.install",
        "run_install",
        "InstallConfig",
        "Install",
        Scope.HEAD,
        "do installed writes put a token into the continuation?",
        claims=(10,),
    ),
    "amplify": Entry(
        "interventions.amplify",
        "run_amplify",
        "AmplifyConfig",
        "Amplify",
        Scope.EACH,
        "does scaling an atom change how often its token is written?",
        claims=(18,),
    ),
    "passage": Entry(
        "interventions.passage",
        "run_passage",
        "PassageConfig",
        "Passage",
        Scope.EACH,
        "do passages bear the loss of a class of atoms?",
        claims=(19,),
    ),
    "readers": Entry(
        "interventions.readers",
        "run_readers",
        "ReadersConfig",
        "Readers",
        Scope.EACH,
        "which later heads read an atom's write?",
    ),
    "multi_atom": Entry(
        "multi_atom",
        "run_multi_atom",
        "MultiAtomConfig",
        "MultiAtom",
        Scope.EACH,
        "how many atoms does a write take?",
    ),
    "partition": Entry(
        "partition",
        "evaluate_partition",
        "PartitionConfig",
        "Partition",
        Scope.EACH,
        "do atoms point along the writes they fire on, and are there two kinds?",
        claims=(4, 6),
    ),
    "seeds": Entry(
        "seeds",
        "run_seeds",
        "SeedsConfig",
        "Seeds",
        Scope.SEEDS,
        "do seeds find the same atoms?",
        claims=(20,),
    ),
    "objectives": Entry(
        "objectives",
        "run_objectives",
        "ObjectivesConfig",
        "Objectives",
        Scope.TARGETS,
        "what should a dictionary be trained for?",
    ),
    "baselines": Entry(
        "baselines",
        "run_baselines",
        "BaselinesConfig",
        "Baselines",
        Scope.VARIANTS,
        "do rank-1 atoms do better than what is simpler?",
        claims=(15, 16, 17),
    ),
}
