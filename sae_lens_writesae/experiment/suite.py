"""Which dictionaries one run of an evaluation takes, and many evaluations of many dictionaries in one go."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from sae_lens import SAE
from torch import Tensor

from hookpoints import HookedRecurrent
from sae_lens_writesae.experiment.evaluation import Evaluation, Scope
from sae_lens_writesae.experiment.result import Result
from sae_lens_writesae.sae.kinds import objective, variant
from sae_lens_writesae.sae.target import HeadHook


def evaluate_all(
    evaluations: Sequence[Evaluation],
    model: HookedRecurrent,
    saes: Mapping[str, SAE],
    tokens: Tensor,
    out: Path,
    *,
    single: bool = False,
    resume: bool = False,
    progress: bool = True,
    say: Callable[[str], object] = print,
) -> list[Result]:
    """Run evaluations on dictionaries, and save each result in `out/<kind>/<label>` as soon as it is there.

    An evaluation runs once for each group of dictionaries that it is for (`groups`). One that has nothing to measure
    does not stop the others; its result says why.

    Args:
        single: one evaluation was asked for by name: it raises where it has nothing to measure, or cannot compare
            these dictionaries.
        resume: results that are saved with the same settings are taken as they are. The caller answers for them being
            of the same dictionaries and text.

    Raises:
        NothingToMeasureError, ValueError: see `single`.
    """
    results = []
    for evaluation in evaluations:
        for label, group in groups(evaluation.scope, saes, single=single):
            named = with_label(evaluation, label)
            if resume and (saved := _saved(named, out)) is not None:
                results.append(saved)
                continue
            run = named.run if single else named.run_or_skip
            result = run(model, group, tokens, progress=progress)
            result.save(_folder(out, result.kind, result.label))
            how = result.pace if result.skipped is None else f"skipped: {result.skipped}"
            say(f"{result.kind}: {result.label} ({how})")
            results.append(result)
    return results


def _folder(out: Path, kind: str, label: str) -> Path:
    return out / kind / label.replace("/", "-").replace(" ", "-")


def _saved(evaluation: Evaluation, out: Path) -> Result | None:
    folder = _folder(out, evaluation.kind, evaluation.label)
    result = Result.load(folder, {evaluation.kind: type(evaluation)}) if folder.exists() else None
    return result if result is not None and result.evaluation == evaluation else None


def with_label(evaluation: Evaluation, label: str) -> Evaluation:
    """The same evaluation under a label, unless it has one."""
    return evaluation if evaluation.label else replace(evaluation, label=label)


def groups(scope: Scope, saes: Mapping[str, SAE], *, single: bool = False) -> Iterator[tuple[str, dict[str, SAE]]]:
    """The dictionaries of each run of an evaluation, with the label of that run.

    Args:
        single: the evaluation was asked for by name, so that dictionaries which it cannot compare are its problem to
            report; otherwise they are passed over.
    """
    if scope is Scope.EACH:
        yield from ((label, {label: sae}) for label, sae in saes.items())
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
    """Those dictionaries of one head that a comparison takes: the first, and one of each further kind that differs from
    it in what the comparison is about and in nothing else. Dictionaries that differ in nothing are seeds."""

    def traits(sae: SAE) -> dict[Scope, object]:
        return {Scope.TARGETS: objective(sae), Scope.VARIANTS: (variant(sae), int(sae.cfg.d_sae))}

    known = {label: traits(sae) for label, sae in saes.items()}
    first = next(iter(known.values()))
    alike = [label for label, own in known.items() if all(own[s] == first[s] for s in first if s is not scope)]
    one_of_each: dict[object, str] = {}
    for label in alike:
        one_of_each.setdefault(label if scope is Scope.SEEDS else known[label][scope], label)
    return {label: saes[label] for label in one_of_each.values()}
