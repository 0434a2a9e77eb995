"""Which dictionaries one run of an evaluation takes, and many evaluations of many dictionaries in one go."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

from sae_lens import SAE
from torch import Tensor

from hookpoints import HookedRecurrent
from sae_lens_writesae.experiment.controls import as_control, control_dictionaries
from sae_lens_writesae.experiment.evaluation import Evaluation, Scope
from sae_lens_writesae.experiment.lab import Lab
from sae_lens_writesae.experiment.quality import DictionaryQuality, qualities
from sae_lens_writesae.experiment.result import Json, Result
from sae_lens_writesae.sae.kinds import objective, variant
from sae_lens_writesae.sae.target import HeadHook


def evaluate_all(
    evaluations: Sequence[Evaluation],
    model: HookedRecurrent,
    saes: Mapping[str, SAE],
    tokens: Tensor,
    out: Path,
    *,
    controls: Tensor | None = None,
    progress: bool = True,
    say: Callable[[str], object] = print,
) -> list[Result]:
    """Run evaluations on dictionaries, and save each result in `out/<kind>/<label>` as soon as it is there.

    An evaluation runs once for each group of dictionaries that it is for (`groups`). One that has nothing to measure
    does not stop the others; its result says why. A single evaluation raises NothingToMeasureError instead. The quality
    of each dictionary is measured once, and is in the `info` of all its results.

    Args:
        controls: [M,S] tokens apart from those that are tested. Control dictionaries are made from them, and evaluated
            beside the trained ones as "<label>, untrained" and "<label>, native writes": three times the work.
            Baselines are fitted on the same tokens (the `reference` of `Evaluation.run`). None: there are no control
            dictionaries, and baselines are fitted on the other half of `tokens`.

    Raises:
        ValueError: the only evaluation asked for compares dictionaries, and these are not for the comparison; sequences
            of `controls` are tested.
    """
    beside = {} if controls is None else control_dictionaries(model, saes, controls)
    everything = dict(saes) | {f"{n}, {control}": sae for control, own in beside.items() for n, sae in own.items()}
    quality = quality_of_heads(model, everything, tokens)
    results: list[Result] = []

    def keep(result: Result, labels: Iterable[str]) -> None:
        result = with_quality(result, quality, labels)
        result.save(out / result.kind / result.label.replace("/", "-").replace(" ", "-").replace(",", ""))
        how = result.pace if result.skipped is None else f"skipped: {result.skipped}"
        say(f"{result.kind}: {result.label} ({how})")
        results.append(result)

    for evaluation in evaluations:
        for label, group in groups(evaluation.scope, saes, single=len(evaluations) == 1):
            named = with_label(evaluation, label)
            run = named.run if len(evaluations) == 1 else named.run_or_skip
            trained = run(model, group, tokens, reference=controls, progress=progress)
            keep(trained, group)
            for control, own in beside.items() if evaluation.scope is not Scope.HEAD else ():
                if trained.skipped is None and group.keys() <= own.keys():
                    other = replace(evaluation, label=f"{trained.label}, {control}")
                    of_group = {n: own[n] for n in group}
                    result = other.run_or_skip(model, of_group, tokens, reference=controls, progress=progress)
                    keep(as_control(result, control, trained), [f"{n}, {control}" for n in group])
    return results


def quality_of_heads(model: HookedRecurrent, saes: Mapping[str, SAE], tokens: Tensor) -> Callable[[str], Json]:
    """A function that gives the quality of a dictionary by its label, as `DictionaryQuality.to_dict` has it. All
    dictionaries of a head are measured together, when the first of them is asked for. None: `qualities` has none."""

    @cache
    def of_head(cell: str) -> dict[str, DictionaryQuality]:
        return qualities(Lab(model, {n: sae for n, sae in saes.items() if HeadHook.of(sae).cell == cell}, tokens))

    def of(label: str) -> Json:
        found = of_head(HeadHook.of(saes[label]).cell).get(label)
        return None if found is None else found.to_dict()

    return of


def with_quality(result: Result, quality: Callable[[str], Json], labels: Iterable[str]) -> Result:
    """The result with the quality of its dictionaries in its `info`, from `quality_of_heads`."""
    return replace(result, info=result.info | {"quality": {label: quality(label) for label in labels}})


def with_label(evaluation: Evaluation, label: str) -> Evaluation:
    """The same evaluation under a label, unless it has one."""
    return evaluation if evaluation.label else replace(evaluation, label=label)


def groups(scope: Scope, saes: Mapping[str, SAE], *, single: bool = False) -> Iterator[tuple[str, dict[str, SAE]]]:
    """The dictionaries of each run of an evaluation, with the label of that run.

    Args:
        single: the evaluation was asked for by name, so that dictionaries which it cannot compare are its problem to
            report; otherwise they are passed over.
    """
    if scope is Scope.EACH or (scope is Scope.LAYER and not _one_layer(saes)):
        yield from ((label, {label: sae}) for label, sae in saes.items())
        return
    if scope is Scope.LAYER:
        yield "", dict(saes)
        return
    if scope.compares and single:
        yield "", dict(saes)
        return
    heads: dict[str, dict[str, SAE]] = {}
    for label, sae in saes.items():
        heads.setdefault(HeadHook.of(sae).cell, {})[label] = sae
    for cell, of_head in heads.items():
        if scope is Scope.HEAD:
            yield cell, dict([next(iter(of_head.items()))])
        elif comparable(scope, list(of_head.values())):
            yield cell, of_head


def _one_layer(saes: Mapping[str, SAE]) -> bool:
    """Whether the dictionaries are of different heads of one layer."""
    hooks = [HeadHook.of(sae) for sae in saes.values()]
    return len({hook.cell for hook in hooks}) == len(hooks) > 1 and len({hook.layer for hook in hooks}) == 1


def comparable(scope: Scope, saes: Sequence[SAE]) -> bool:
    """Whether dictionaries of one head differ in what a comparison is about, and in nothing that it takes to be the
    same."""
    trained_for = {objective(sae) for sae in saes}
    built = {(variant(sae), int(sae.cfg.d_sae)) for sae in saes}
    differ: dict[Scope, set] = {Scope.TARGETS: trained_for, Scope.VARIANTS: built}
    if len(saes) < 2 or any(len(kinds) > 1 for other, kinds in differ.items() if other is not scope):
        return False
    return scope not in differ or len(differ[scope]) > 1
