"""Which dictionaries one run of an evaluation takes, and many evaluations of many dictionaries in one go."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

from sae_lens import SAE

from hookpoints import HookedRecurrent
from sae_lens_writesae.sae.target import HeadHook
from writesae.experiment.controls import Control, as_control, control_dictionaries
from writesae.experiment.evaluation import Evaluation, Result, Scope
from writesae.experiment.lab import Lab, Text
from writesae.experiment.quality import DictionaryQuality, qualities
from writesae.experiment.traits import objective, variant
from writesae.files import Json


def evaluate_all(
    evaluations: Sequence[Evaluation],
    model: HookedRecurrent,
    saes: Mapping[str, SAE],
    tokens: Text,
    out: Path,
    *,
    controls: Text | None = None,
    single: bool = False,
    resume: bool = False,
    progress: bool = True,
    say: Callable[[str], object] = print,
) -> list[Result]:
    """Run evaluations on dictionaries, and save each result in `out/<kind>/<label>` as soon as it is there.

    An evaluation runs once for each group of dictionaries that it is for (`groups`). One that has nothing to measure
    does not stop the others; its result says why. The quality of each dictionary is measured once, and is in the `info`
    of all its results.

    Args:
        tokens: as in `Evaluation.run`.
        controls: [M,S] tokens apart from those that are tested, or a collection of such text. Control dictionaries are
            made from them, and evaluated beside the trained ones as "<label>, untrained" and "<label>, native writes":
            three times the work. Baselines are fitted on the same tokens (the `reference` of `Evaluation.run`). None:
            there are no control dictionaries, and baselines are fitted on the other half of `tokens`.
        single: one evaluation was asked for by name: it raises where it has nothing to measure, or cannot compare
            these dictionaries.
        resume: results that are saved with the same settings are taken as they are. The caller answers for them being
            of the same dictionaries, text and `controls`.

    Raises:
        NothingToMeasureError, ValueError: see `single`; sequences of `controls` are tested.
    """
    beside = {} if controls is None else control_dictionaries(model, saes, controls)
    everything = dict(saes) | {f"{n}, {control}": sae for control, own in beside.items() for n, sae in own.items()}
    quality = quality_of_heads(model, everything, tokens)
    results: list[Result] = []

    def one(
        evaluation: Evaluation,
        group: Mapping[str, SAE],
        labels: Iterable[str],
        control: Control = "untrained",
        of: Result | None = None,
    ) -> Result:
        """Run an evaluation, unless its result is there; `of`: the trained result that a control stands beside."""
        result = _saved(evaluation, out) if resume else None
        if result is None:
            run = evaluation.run if single and of is None else evaluation.run_or_skip
            result = run(model, group, tokens, reference=controls, progress=progress)
            result = with_quality(result if of is None else as_control(result, control, of), quality, labels)
            result.save(_folder(out, result.kind, result.label))
            how = result.pace if result.skipped is None else f"skipped: {result.skipped}"
            say(f"{result.kind}: {result.label} ({how})")
        results.append(result)
        return result

    for evaluation in evaluations:
        for label, group in groups(evaluation.scope, saes, single=single):
            trained = one(with_label(evaluation, label), group, group)
            for control, own in beside.items() if evaluation.scope is not Scope.HEAD else ():
                if trained.skipped is None and group.keys() <= own.keys():
                    other = replace(evaluation, label=f"{trained.label}, {control}")
                    one(other, {n: own[n] for n in group}, [f"{n}, {control}" for n in group], control, trained)
    return results


def _folder(out: Path, kind: str, label: str) -> Path:
    name = label.replace("/", "-").replace(" ", "-").replace(",", "")
    if name in (".", ".."):  # what is saved there would take the place of the folder above
        raise ValueError(f"{label!r} cannot be a label: results are saved in folders of their labels")
    return out / kind / name


def _saved(evaluation: Evaluation, out: Path) -> Result | None:
    folder = _folder(out, evaluation.kind, evaluation.label)
    there = evaluation.label and folder.exists()
    result = Result.load(folder, {evaluation.kind: type(evaluation)}) if there else None
    return result if result is not None and result.evaluation == evaluation else None


def quality_of_heads(model: HookedRecurrent, saes: Mapping[str, SAE], tokens: Text) -> Callable[[str], Json]:
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
    hooks = [HeadHook.of(sae) for sae in saes.values()]
    one_layer = len({hook.cell for hook in hooks}) == len(hooks) > 1 and len({hook.layer for hook in hooks}) == 1
    if scope is Scope.EACH or (scope is Scope.LAYER and not one_layer):
        yield from ((label, {label: sae}) for label, sae in saes.items())
        return
    if scope is Scope.LAYER:
        yield f"L{HeadHook.of(next(iter(saes.values()))).layer}", dict(saes)
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
        elif len(group := comparable(scope, of_head)) > 1:
            yield cell, group


def comparable(scope: Scope, saes: Mapping[str, SAE]) -> dict[str, SAE]:
    """Those dictionaries of one head that a comparison takes: the first, and those that differ from it in what the
    comparison is about and in nothing else; the first alone where there is none. Dictionaries that differ in nothing
    are seeds, which a comparison of variants joins, and of which one of targets takes the first."""

    def traits(sae: SAE) -> dict[Scope, object]:
        return {Scope.TARGETS: objective(sae), Scope.VARIANTS: (variant(sae), int(sae.cfg.d_sae))}

    known = {label: traits(sae) for label, sae in saes.items()}
    first = next(iter(known.values()))
    alike = [label for label, own in known.items() if all(own[s] == first[s] for s in first if s is not scope)]
    one_of_each: dict[object, str] = {}
    for label in alike:
        one_of_each.setdefault(label if scope is Scope.SEEDS else known[label][scope], label)
    labels = alike if scope is Scope.VARIANTS and len(one_of_each) > 1 else one_of_each.values()
    return {label: saes[label] for label in labels}
