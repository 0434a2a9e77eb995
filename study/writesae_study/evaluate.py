"""`writesae eval`: evaluations of dictionaries from folders, saved and joined on one page; and `writesae report`."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_type_hints

import tyro

from writesae.cli import choose, parse
from writesae.files import folder_labels, sae_folders, taken
from writesae.flags import OnText
from writesae_study.evaluations import EVALUATIONS
from writesae_study.folders import check_page, check_saes, run_folder
from writesae_study.verdict.paper import QUESTIONS

if TYPE_CHECKING:
    from hookpoints import HookedRecurrent
    from writesae_study.experiment.evaluation import Evaluation
    from writesae_study.experiment.terms import Terms

_REFERENCE = 64
"""Sequences from which control dictionaries are made, and on which baselines are fitted."""


@dataclass(frozen=True, kw_only=True)
class Subjects(OnText):
    """What is evaluated, on which text."""

    saes: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Folders of trained SAEs (cfg.json, sae_weights.safetensors) of one model, or folders that hold such folders, as
    `writesae train` and `demo` leave them."""
    out: Path = Path("writesae-out/eval")
    """Folder for results and report. The page shows all results that it has, those of earlier calls too."""
    replace: bool = False
    """Replace results that are there and are of other settings, dictionaries, weights or texts."""
    control_dictionaries: bool = True
    """Evaluate an untrained dictionary and one of native writes with each, by the same rules: three times the work.
    They are made from the text that baselines are fitted on."""
    collection: Path | None = None
    """The collection that the dictionaries were trained on, or a folder that holds it, to which baselines are then
    fitted; by default the one that is in a folder above them, as `writesae train` and `demo` leave it. Where there is
    none, baselines are fitted to 64 sequences of the training text of the package, and claims that need them cannot
    hold."""


@dataclass(frozen=True, kw_only=True)
class EvalAll:
    """Run every evaluation that fits the dictionaries, and write one report."""

    subjects: tyro.conf.OmitArgPrefixes[Subjects]
    seed: int = 0
    """Seed of all draws and controls."""
    kinds: tuple[str, ...] = ()
    """Which evaluations; by default all of them."""
    per: Literal["dictionary", "head", "layer"] | None = None
    """Only evaluations of single dictionaries, or only those that are done once per head: of the head itself, and
    comparisons of its dictionaries; or only those of dictionaries of several heads of a layer, which act together."""
    set: tuple[str, ...] | None = None
    """Settings as FIELD=VALUE, for every evaluation that has the field, or as KIND.FIELD=VALUE for one. `--set` alone
    lists the fields."""
    resume: bool = False
    """Take results that are in `out` already as they are, and run the evaluations that are missing, and those that
    another version of the package ran."""

    def evaluations(self) -> list[Evaluation]:
        """The evaluations, each with those settings that it has.

        Raises:
            ValueError: a kind or a setting that does not exist, or a value that an evaluation refuses.
        """
        from hookpoints.errors import nearest
        from writesae_study.experiment.evaluation import Scope

        if unknown := [kind for kind in self.kinds if kind not in EVALUATIONS]:
            raise ValueError(f"there is no evaluation {', '.join(unknown)}; there are {', '.join(EVALUATIONS)}")
        fields = {kind: [field.name for field in dataclasses.fields(each)] for kind, each in EVALUATIONS.items()}
        # Each pair goes to the evaluations that have the field.
        settings: dict[str, dict[str, object]] = {kind: {"seed": self.seed} for kind in EVALUATIONS}
        pairs = () if self.set is None else self.set or ("",)
        for pair in sorted(pairs, key=lambda pair: "." in pair.partition("=")[0]):  # those of one kind win
            name, equals, value = pair.partition("=")
            of_kind, _, field = name.rpartition(".")
            having = [kind for kind in EVALUATIONS if of_kind in ("", kind) and field in fields[kind]]
            if not (equals and having):
                having = [kind for kind in fields if of_kind in ("", kind)]
                # The fields that there are; or, where the kind is unknown, the kinds.
                known = list(dict.fromkeys([name for kind in having for name in fields[kind]] or fields))
                raise ValueError(
                    f"--set {pair}: expected FIELD=VALUE, FIELD of {', '.join(known)}{nearest(field, known)}"
                )
            for kind in having:
                settings[kind][field] = _setting_value(EVALUATIONS[kind], field, value)
        # Which evaluations are done once for each dictionary, head or layer.
        scopes = {
            None: tuple(Scope),
            "dictionary": (Scope.EACH, Scope.LAYER),
            "head": (Scope.HEAD, Scope.SEEDS, Scope.VARIANTS),
            "layer": (Scope.LAYER,),
        }[self.per]
        asked = [kind for kind in EVALUATIONS if kind in (self.kinds or fields) and EVALUATIONS[kind].scope in scopes]
        return [EVALUATIONS[kind].from_dict(settings[kind]) for kind in asked]


def _setting_value(evaluation: type[Evaluation], field: str, text: str) -> object:
    """A setting from JSON, or from a word where that is none."""
    from writesae_study.experiment.typed import checked_setting

    with contextlib.suppress(ValueError):
        return checked_setting(field, json.loads(text), get_type_hints(evaluation)[field])
    return text


@dataclass(frozen=True)
class Report:
    """Write one page from saved results: claims, the paper's values, the values here, controls, verdicts."""

    results: tyro.conf.Positional[tuple[Path, ...]]
    """Folders in or below which `writesae eval`, `demo` or `reproduce` left results."""
    out: Path | None = None
    """Page to write, or a folder, which gets a report.html; by default the folder that is named, if it is one."""

    def run(self) -> Path:
        """Find the results and write the page.

        Raises:
            ValueError: there are no results, or the page cannot be written; the latter before any work.
        """
        missing = [path for path in self.results if not path.exists()]
        if missing:
            raise ValueError(f"results: expected folders with saved results, got {missing[0]}, which does not exist")
        folders = tuple(self.results)
        if self.out is None and len(folders) != 1:
            raise ValueError(f"out: expected a page for the results of {len(folders)} folders, got none; name --out")
        out = self.out or folders[0]
        if self.out is None and (out / "info.json").exists():
            out = out.parent  # a result is sealed, and has its own files alone
        page = out / "report.html" if out.is_dir() else out.with_suffix(".html")
        check_page(page)
        from writesae_study.page.report import find_results, write_report

        return write_report(find_results(self.results), page)


def run_eval(arguments: Sequence[str]) -> Path:
    """`writesae eval KIND SAE...` with the settings of that evaluation as flags; `all` runs every evaluation."""
    questions = {kind: asked.question for kind, asked in QUESTIONS.items()}
    kind = choose("writesae eval", arguments, questions | {"all": "Every evaluation that fits, on one page."})
    program = f"writesae eval {kind}"
    check_saes(arguments[1:])
    if kind == "all":
        everything = parse(EvalAll, program, arguments[1:])
        return evaluate(everything.subjects, everything.evaluations(), resume=everything.resume)
    # One parser for the flags of both, each of which may come anywhere.
    both = {"subjects": Subjects, "evaluation": EVALUATIONS[kind]}
    about = {"__doc__": "\n\n".join(str(inspect.getdoc(each)) for each in both.values())}
    parts = [(name, tyro.conf.OmitArgPrefixes[each]) for name, each in both.items()]
    parsed = parse(dataclasses.make_dataclass("Eval", parts, namespace=about), program, arguments[1:])
    return evaluate(parsed.subjects, [parsed.evaluation], single=True)


def evaluate(
    subjects: Subjects, evaluations: Sequence[Evaluation], *, single: bool = False, resume: bool = False
) -> Path:
    """Run evaluations on the SAEs of some folders; save each result, and a page over all.

    Args:
        single, resume: as in `evaluate_all`.

    Raises:
        ValueError: SAEs of different models, two folders of one name, a folder that cannot be written, or an evaluation
            that refuses the SAEs; a result of others that would be replaced.
    """
    from sae_lens_writesae.sae.load import load_sae, model_of
    from sae_lens_writesae.sae.target import HeadHook
    from writesae.experiment.tokens import sample_sequences, text_of
    from writesae_study.dictionary.suite import evaluate_all
    from writesae_study.page.report import find_results, write_report

    page = subjects.out / "report.html"
    check_page(page)
    folders = [folder for path in subjects.saes for folder in sae_folders(path)]
    # Dictionaries by label, which has the head.
    saes = {}
    for label, sae in zip(folder_labels(folders), map(load_sae, folders)):
        cell = HeadHook.of(sae).cell  # two heads may have dictionaries of one name
        saes[label if cell in label else f"{cell}/{label}"] = sae
    if len(saes) < len(folders):
        raise ValueError(f"two of the SAEs' folders have the same name: {', '.join(map(str, folders))}")
    if not saes:
        raise ValueError("saes: expected folders of dictionaries of one model, got none; writesae train makes some")
    # One model for all, the text that is tested, and the text that baselines are fitted to.
    models = {str(sae.cfg.metadata.model_name) for sae in saes.values()}
    if len(models) > 1 and not subjects.model:
        raise ValueError(f"saes: expected folders of dictionaries of one model, got {', '.join(sorted(models))}")
    held_out = text_of(subjects.text)
    model = model_of([*saes.values()], subjects.model, dtype=subjects.dtype, other_model=subjects.other_model)
    tokens = sample_sequences(model, held_out, subjects.context_size, subjects.sequences)
    terms = _training_text(subjects, folders, model)
    with taken(subjects.out):
        results, failures = evaluate_all(
            evaluations,
            model,
            saes,
            tokens,
            subjects.out,
            terms=terms,
            controls=subjects.control_dictionaries,
            single=single,
            resume=resume,
            replaced=subjects.replace,
        )
        if results or not failures:
            write_report(find_results([subjects.out]), page)
        if failures:  # after the report, which has what the other evaluations found
            raise failures[0]
        return page


def _training_text(subjects: Subjects, folders: Sequence[Path], model: HookedRecurrent) -> Terms:
    """Of the collection that dictionaries were trained on, or of the text of the package where there is none."""
    from hookpoints import embedded
    from sae_lens_writesae.sae.factors import INDEX, Collection
    from writesae.experiment.tokens import sample_sequences
    from writesae_study.experiment.terms import Terms

    runs = [subjects.collection] if subjects.collection else filter(None, map(run_folder, folders))
    collections = [run / "collection" for run in runs if (run / "collection" / INDEX).is_file()]
    collection = collections[0] if collections else subjects.collection
    if collection:
        return Terms(model, Collection.open(collection, model=model))
    return Terms(model, sample_sequences(model, embedded.text("train"), subjects.context_size, _REFERENCE))
