"""Which dictionaries one run of an evaluation takes, and many evaluations of many dictionaries in one go."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from sae_lens import SAE
from torch import Tensor

from hookpoints import HookedRecurrent
from hookpoints.files import check_folder, content_hash, set_aside, versions
from sae_lens_writesae.sae.factors import model_hash
from sae_lens_writesae.sae.target import HeadHook
from writesae.dictionary.quality import quality_of_heads
from writesae.files import Json
from writesae_study.dictionary.controls import ControlKind, control_dictionaries
from writesae_study.dictionary.traits import objective, variant
from writesae_study.experiment.evaluation import Evaluation, Result, Scope, result_files
from writesae_study.experiment.terms import Terms


def evaluate_all(
    evaluations: Sequence[Evaluation],
    model: HookedRecurrent,
    saes: Mapping[str, SAE],
    tokens: Tensor,
    out: Path,
    *,
    terms: Terms,
    controls: bool = False,
    single: bool = False,
    resume: bool = False,
    replaced: bool = False,
) -> tuple[list[Result], list[Exception]]:
    """Run evaluations on dictionaries, and save each result in `out/<kind>/<label>` as soon as it is there.

    An evaluation runs once for each group of dictionaries that it is for (`groups`). One that fails, or has nothing to
    measure, does not stop the others. The quality of each dictionary is measured once, and is in the `info` of all its
    results.

    Args:
        saes: dictionaries by label.
        tokens: as in `Evaluation.run`.
        terms: text apart from what is tested, on which baselines are fitted.
        controls: make control dictionaries from that text. These are evaluated after the trained ones as "<label>,
            untrained" and "<label>, native writes": thrice the work.
        single: one evaluation was asked for by name: it raises where it fails, has nothing to measure, or cannot
            compare these dictionaries.
        resume: results that are saved with the same settings, and are of the same weights, dictionaries, texts,
            baselines and version of this package (`inputs` in their info), are taken as they are. One of another
            version is measured again. One that is damaged is renamed, with a DamageWarning, and measured again.
        replaced: results of other settings, weights, dictionaries, texts or baselines are replaced.

    Returns: the results, and the errors of evaluations that failed.

    Raises:
        OSError: the folder of a result holds something that no result has; before any work.
        ValueError: it holds a result of other settings or inputs, and `replaced` is False; before any work.
        NothingToMeasureError, ValueError: see `single`; sequences of `terms` are tested.
    """
    texts = {
        "model": model_hash(model),
        "tokens": content_hash(tokens),
        "reference": terms.collection.sha256 if terms.collection else content_hash(terms.tokens),
        "version": versions().get("sae-lens-writesae", "unknown"),
    }
    runs = []
    for evaluation in evaluations:
        for label, group in groups(evaluation.scope, saes, single=single):
            runs.append((replace(evaluation, label=evaluation.label or label), group))
    # Refuse before any work what would be lost.
    for evaluation, group in runs:
        folder = _result_folder(out, evaluation)
        check_folder(folder, result_files)
        _saved_result(folder, evaluation, _input_hashes(texts, group), replaced)
    # Control dictionaries, and the quality of all, once for all evaluations.
    by_control = control_dictionaries(model, saes, terms) if controls else {}
    everything = dict(saes)
    for control, made in by_control.items():
        everything |= {f"{label}, {control}": sae for label, sae in made.items()}
    quality = quality_of_heads(model, everything, tokens)
    suite = _Suite(model, tokens, out, terms, quality, texts, single, resume, replaced)
    results: list[Result] = []
    failures: list[Exception] = []
    for evaluation, group in runs:
        try:
            trained = suite.run(evaluation, group)
            results.append(trained)
            # Where trained dictionaries give nothing to measure, no control has to be compared with them.
            if evaluation.scope is Scope.HEAD or trained.skipped is not None:
                continue
            for control, made in by_control.items():
                if set(group) <= made.keys():
                    of_control = {label: made[label] for label in saes if label in group}
                    named = replace(evaluation, label=f"{trained.label}, {control}")
                    results.append(suite.run(named, of_control, control, trained.label))
        except Exception as error:
            if single:
                raise
            failures.append(error)
            print(f"{evaluation.kind}: {evaluation.label} failed: {error}")
    return results, failures


@dataclass(frozen=True)
class _Suite:
    """What all runs of `evaluate_all` share; fields are its arguments."""

    model: HookedRecurrent
    tokens: Tensor
    out: Path
    terms: Terms
    quality: Callable[[str], Json]
    """That of a dictionary, by its label."""
    texts: Mapping[str, str]
    """Hashes of the model, and of what is tested and fitted on; the version of this package."""
    single: bool
    resume: bool
    replaced: bool

    def run(
        self,
        evaluation: Evaluation,
        group: dict[str, SAE],
        control: ControlKind | None = None,
        control_of: str = "",
    ) -> Result:
        """Run an evaluation, unless its result is there; `control_of`: the label of the result that has this
        control."""
        inputs = _input_hashes(self.texts, group)
        folder = _result_folder(self.out, evaluation)
        saved, differing = _saved_result(folder, evaluation, inputs, self.replaced)
        if differing:
            print(f"{evaluation.kind}: {evaluation.label} is measured again: other {', '.join(differing)}")
        elif self.resume and saved is not None:
            return saved
        # Only a single question about trained dictionaries raises where there is nothing to measure.
        or_skip = not self.single or control is not None
        result = evaluation.run(self.model, group, self.tokens, reference=self.terms, or_skip=or_skip)
        labels = list(group)
        info: dict[str, Json] = {**result.info, "inputs": inputs}
        if control is not None:
            info |= {"control": control, "control_of": control_of}
            labels = [f"{label}, {control}" for label in labels]
        info["quality"] = {label: self.quality(label) for label in labels}
        result = replace(result, info=info)
        result.save(folder)
        how = result.pace if result.skipped is None else f"skipped: {result.skipped}"
        print(f"{result.kind}: {result.label} ({how})")
        return result


def _saved_result(
    folder: Path, evaluation: Evaluation, inputs: Mapping[str, str], replaced: bool
) -> tuple[Result | None, list[str]]:
    """The result that a folder has, and what it was measured with that is not that of today. One that is damaged is set
    aside. Costs a reading of the result.

    Raises:
        ValueError: a result of other settings or inputs would be lost. The same of another version of the package would
            be none.
    """
    if not folder.exists():
        return None, []
    try:
        saved = Result.load(folder, {evaluation.kind: type(evaluation)})
    except ValueError as error:
        set_aside(folder, str(error))
        return None, []
    known = cast("Mapping[str, Json]", saved.info.get("inputs") or {})
    differing = ["settings"] * (saved.evaluation != evaluation)
    differing += [name for name in inputs if known.get(name) != inputs[name]]
    if not (replaced or {*differing} <= {"version"}):
        raise ValueError(
            f"{folder}: expected no result, or one of the same settings and inputs, got one of other "
            f"{', '.join(differing)}; name another --out, or replace it (--replace)"
        )
    return saved, differing


def _input_hashes(texts: Mapping[str, str], group: dict[str, SAE]) -> dict[str, str]:
    """What a result depends on besides its settings, as hashes."""
    weights = {label: [sae.cfg.to_dict(), sae.state_dict()] for label, sae in group.items()}
    return {**texts, "dictionaries": content_hash(weights)}


def _result_folder(out: Path, evaluation: Evaluation) -> Path:
    name = evaluation.label.replace("/", "-").replace(" ", "-").replace(",", "")
    if name in (".", ".."):  # what is saved there would replace the folder above
        raise ValueError(f"{evaluation.label!r} cannot be a label: results are saved in folders of their labels")
    return out / evaluation.kind / name


def groups(scope: Scope, saes: Mapping[str, SAE], *, single: bool = False) -> Iterator[tuple[str, dict[str, SAE]]]:
    """The dictionaries of each run of an evaluation, with the label of that run.

    Args:
        single: the evaluation was asked for by name, so that dictionaries which it cannot compare are its problem to
            report; otherwise they are passed over.
    """
    heads: dict[str, dict[str, SAE]] = {}
    for label, sae in saes.items():
        heads.setdefault(HeadHook.of(sae).cell, {})[label] = sae
    layers = {HeadHook.of(sae).layer for sae in saes.values()}
    if scope is Scope.LAYER and len(heads) == len(saes) > len(layers) == 1:
        yield f"L{layers.pop()}", dict(saes)
    elif scope in (Scope.EACH, Scope.LAYER):
        yield from ((label, {label: sae}) for label, sae in saes.items())
    elif scope.compares and single:
        yield next(iter(heads)), dict(saes)
    elif scope is Scope.HEAD:
        for cell, of_head in heads.items():
            yield cell, dict(list(of_head.items())[:1])  # any dictionary says which head is meant
    else:
        for cell, of_head in heads.items():
            group = comparable(scope, of_head)
            if len(group) > 1:
                yield cell, group


def comparable(scope: Scope, saes: Mapping[str, SAE]) -> dict[str, SAE]:
    """Those dictionaries of one head that a comparison takes: the first, and those that differ from it in what the
    comparison is about and in nothing else; the first alone where there is none. Dictionaries that differ in nothing
    are seeds, which a comparison of variants joins."""
    sizes = {label: (variant(sae), int(sae.cfg.d_sae)) for label, sae in saes.items()}
    first = next(iter(saes))
    alike = [label for label, sae in saes.items() if objective(sae) == objective(saes[first])]
    if scope is Scope.SEEDS:
        alike = [label for label in alike if sizes[label] == sizes[first]]
    elif len({sizes[label] for label in alike}) == 1:
        alike = [first]
    return {label: saes[label] for label in alike}
