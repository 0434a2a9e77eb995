"""The steps of a run, each a folder that is there when it is done: what is trained, then what is evaluated."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sae_lens_writesae.evaluations import EVALUATIONS
from sae_lens_writesae.experiment.evaluation import Scope
from sae_lens_writesae.reproduce.config import Dictionary, ReproduceConfig

if TYPE_CHECKING:
    from sae_lens_writesae.reproduce.workspace import Workspace


@dataclass(frozen=True)
class Task:
    """One step. It leaves the folder `key` and is done when that exists, so a run goes on where it stopped."""

    key: str
    needs: tuple[str, ...]
    """Keys of the tasks whose folders it reads."""
    run: Callable[[Workspace], None]

    @property
    def kind(self) -> str:
        return self.key.rsplit("/", 1)[-1]


def dictionaries(config: ReproduceConfig) -> Iterator[Dictionary]:
    """Every SAE of a run, head by head: targets, losses of states, seeds of the first target, variants of it."""
    main, seed = config.targets[0], config.seeds[0]
    for layer in config.layers:
        for head in config.heads:
            for target in config.targets:
                yield Dictionary(layer, head, target, "", seed)
            for loss in config.losses if "state" in config.targets else ():
                yield Dictionary(layer, head, "state", "", seed, loss)
            for other in config.seeds[1:]:
                yield Dictionary(layer, head, main, "", other)
            for variant in config.variants:
                for each in config.seeds[: config.variant_seeds]:
                    yield Dictionary(layer, head, main, variant, each)


def make_tasks(config: ReproduceConfig) -> list[Task]:
    """All steps in an order in which each follows what it needs; the report is the last.

    Raises:
        ValueError: an evaluation that does not exist; names those that do.
    """
    chosen = list(EVALUATIONS) if config.evaluations is None else list(config.evaluations)
    if unknown := [name for name in chosen if name not in EVALUATIONS]:
        raise ValueError(f"there is no evaluation {', '.join(unknown)}; there are {', '.join(EVALUATIONS)}")
    all_saes = list(dictionaries(config))
    tasks = [Task(f"{sae.key}/sae", (), lambda work, sae=sae: work.train(sae)) for sae in all_saes]
    for cell in dict.fromkeys(sae.cell for sae in all_saes):
        own = [sae for sae in all_saes if sae.cell == cell]
        for name in chosen:
            tasks += _evaluations(name, own, config)
        if config.dashboards:
            first = own[0]
            needs = tuple(f"{first.key}/{name}" for name in ("sae", "substitution") if name == "sae" or name in chosen)
            tasks.append(Task(f"{first.key}/atoms", needs, lambda work, sae=first: work.show(sae)))
    for layer, name in itertools.product(config.layers if len(config.heads) > 1 else (), chosen):
        if EVALUATIONS[name].scope is Scope.LAYER:
            together = [
                sae for sae in _plain(all_saes, config) if (sae.layer, sae.target) == (layer, config.targets[0])
            ]
            tasks.append(_evaluation(name, f"L{layer}/{name}", together))
    done = tuple(task.key for task in tasks)
    return [*tasks, Task("report", done, lambda work: work.report())]


def _evaluations(name: str, saes: list[Dictionary], config: ReproduceConfig) -> list[Task]:
    """An evaluation of each dictionary that it is for, or of several together."""
    scope, plain = EVALUATIONS[name].scope, _plain(saes, config)
    if scope in (Scope.EACH, Scope.LAYER):
        return [_evaluation(name, f"{sae.key}/{name}", [sae]) for sae in plain]
    first = [sae for sae in saes if sae.target == config.targets[0] and sae.loss == "mse"]
    groups = {
        Scope.HEAD: plain[:1],
        Scope.SEEDS: [sae for sae in first if not sae.variant],
        Scope.TARGETS: [sae for sae in saes if not sae.variant and sae.seed == config.seeds[0]],
        Scope.VARIANTS: [sae for sae in first if sae.seed in config.seeds[: config.variant_seeds]],
    }
    group = groups[scope]
    if scope.compares and len(group) < 2:  # nothing to compare with
        return []
    return [_evaluation(name, f"{group[0].cell}/{name}", group)]


def _plain(saes: Iterable[Dictionary], config: ReproduceConfig) -> list[Dictionary]:
    """WriteSAEs of the first seed, trained by their reconstruction alone."""
    return [sae for sae in saes if not sae.variant and sae.seed == config.seeds[0] and sae.loss == "mse"]


def _evaluation(name: str, key: str, saes: list[Dictionary]) -> Task:
    needs = tuple(f"{sae.key}/sae" for sae in saes)
    return Task(key, needs, lambda work: work.evaluate(name, key, saes))


def is_done(folder: Path, task: Task) -> bool:
    """Whether a step's folder is there. Steps rename it into place when they are finished."""
    return (folder / task.key).exists()
