"""``writesae eval NAME SAE...``: one command for each evaluation of ``suite.EVALUATIONS``, and ``all``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import Tensor

from hookpoints import HookedRecurrent, embedded
from sae_lens_writesae.evaluate import check_fits, folder_label, spread
from sae_lens_writesae.evaluation import Evaluation
from sae_lens_writesae.firings import HeadHook
from sae_lens_writesae.joined_report import write_joined_report
from sae_lens_writesae.left_out import LeftOut, evaluate_or_leave_out
from sae_lens_writesae.report import ReportFiles
from sae_lens_writesae.sae.load import load_sae
from sae_lens_writesae.suite import EVALUATIONS, Scope

eval_app = typer.Typer(
    no_args_is_help=True,
    help="Evaluate trained SAEs of one model: each command is one evaluation, *all* is every one that fits.",
)

Saes = Annotated[list[Path], typer.Argument(help="Folders of trained SAEs (cfg.json, sae_weights.safetensors).")]
Model = Annotated[str | None, typer.Option(help="Model; default: the one named in the SAE's metadata.")]
Text = Annotated[Path | None, typer.Option(help="Text file to test on; default: the package's held-out text.")]
Sequences = Annotated[int, typer.Option(help="Sequences to find firings in.")]
Context = Annotated[int, typer.Option(help="Tokens per sequence.")]
Seed = Annotated[int, typer.Option(help="Seed of draws and controls.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="A setting of the evaluation; repeat for more.")
]
Out = Annotated[Path, typer.Option(help="Folder for results and report.")]


def run_evaluations(
    names: Sequence[str],
    folders: Sequence[Path],
    out: Path,
    *,
    model: str | None = None,
    text: Path | None = None,
    sequences: int = 100,
    context_size: int = 128,
    settings: Mapping[str, Any] | None = None,
    say: Callable[[str], object] = print,
) -> ReportFiles:
    """Run evaluations by name on SAEs from folders; save each result below `out`, and a page over all.

    Evaluations that compare dictionaries take all the SAEs together; of several names, all those of a head, or are
    passed over where these are not for the comparison (`comparable`). There, too, what has nothing to measure does not
    stop the rest: the page says why (`LeftOut`).

    Raises:
        ValueError: SAEs of different models, an SAE that does not fit the model, too little text, an unknown setting.
        NothingToMeasureError: the only evaluation asked for has nothing to measure.
    """
    saes = {folder_label(folder): load_sae(folder) for folder in folders}
    if len(saes) < len(folders):
        raise ValueError(f"two of the SAEs' folders have the same name: {', '.join(map(str, folders))}")
    models = {model or str(sae.cfg.metadata.model_name) for sae in saes.values()}
    if len(models) > 1:
        raise ValueError(
            f"the SAEs were trained on different models ({', '.join(sorted(models))}); evaluate them apart"
        )
    hooked = HookedRecurrent.from_pretrained(models.pop())
    for folder, sae in zip(folders, saes.values()):
        check_fits(hooked, sae, folder)
    tokens = spread(hooked, embedded.text("test") if text is None else text.read_text(), context_size, sequences)
    results = []
    for name in names:
        for result in _run(name, hooked, saes, tokens, dict(settings or {}), len(names) > 1):
            result.save(out / name / result.label.replace("/", "-").replace(" ", "-"))
            left_out = isinstance(result, LeftOut)
            took = f"left out: {result.info['reason']}" if left_out else result.pace
            say(f"{name}: {result.label} ({took})")
            results.append(result)
    return write_joined_report(results, out / "report.html")


def _run(
    name: str, model: HookedRecurrent, saes: dict[str, Any], tokens: Tensor, settings: dict[str, Any], many: bool
) -> Iterator[Evaluation]:
    """One evaluation of each SAE, of each head, or of all together. Of many, what does not fit is passed over."""
    entry = EVALUATIONS[name]
    known = {field.name for field in dataclasses.fields(entry.config_class)}
    if not many and (unknown := sorted(settings.keys() - known)):
        raise ValueError(f"{name} has no setting {', '.join(unknown)}; it has {', '.join(sorted(known - {'label'}))}")
    own = {key: value for key, value in settings.items() if key in known}
    for label, group in _groups(name, saes, many).items():
        named = {"label": label} if "label" in known and not entry.compares else {}
        config = entry.config_class(**own, **named)
        if many:
            yield evaluate_or_leave_out(name, model, group, tokens, config, label)
        else:
            yield entry.run_on(model, group, tokens, config)


def _groups(name: str, saes: dict[str, Any], many: bool) -> dict[str, dict[str, Any]]:
    """The dictionaries of each run of an evaluation, by what the run is called."""
    scope = EVALUATIONS[name].scope
    if scope is Scope.EACH:
        return {label: {label: sae} for label, sae in saes.items()}
    heads: dict[str, dict[str, Any]] = {}
    for label, sae in saes.items():
        heads.setdefault(HeadHook.of(sae).cell, {})[label] = sae
    if scope is Scope.HEAD:
        return heads
    if many:
        return {cell: own for cell, own in heads.items() if len(own) > 1 and comparable(scope, own.values())}
    if len(saes) < 2:
        raise ValueError(f"{name} compares dictionaries ({scope.value}); give at least two SAEs, found one")
    return {"all": saes}


def comparable(scope: Scope, saes: Iterable[Any]) -> bool:
    """Whether SAEs differ in what a comparison is about, and in nothing that it takes to be the same."""
    from sae_lens_writesae.baselines import variant
    from sae_lens_writesae.objectives import objective

    found = list(saes)
    heads = {HeadHook.of(sae)[1:3] for sae in found}
    trained_for = {objective(sae) for sae in found}
    built = {(variant(sae), int(sae.cfg.d_sae)) for sae in found}
    differ = {Scope.TARGETS: trained_for, Scope.VARIANTS: built}
    if len(heads) > 1 or any(len(kinds) > 1 for other, kinds in differ.items() if other is not scope):
        return False
    return scope not in differ or len(differ[scope]) > 1


def parse_settings(pairs: Sequence[str]) -> dict[str, Any]:
    """`["n_atoms=40", "write=corrected"]` as a dict; values are JSON where they can be, else text."""
    settings: dict[str, Any] = {}
    for pair in pairs:
        name, found, value = pair.partition("=")
        if not found:
            raise ValueError(f"--set takes FIELD=VALUE, found {pair!r}")
        try:
            settings[name] = json.loads(value)
        except json.JSONDecodeError:
            settings[name] = value
    return settings


def _command(name: str, names: Sequence[str]) -> Callable[..., None]:
    def command(
        sae: Saes,
        model: Model = None,
        text: Text = None,
        sequences: Sequences = 100,
        context_size: Context = 128,
        seed: Seed = 0,
        set_: Set = None,
        out: Out = Path("writesae-out") / name,
    ) -> None:
        from sae_lens_writesae.cli import clear_errors, say_where

        with clear_errors():
            settings = {"seed": seed} | parse_settings(set_ or [])
            files = run_evaluations(
                names,
                sae,
                out,
                model=model,
                text=text,
                sequences=sequences,
                context_size=context_size,
                settings=settings,
                say=typer.echo,
            )
        say_where(files)

    return command


for _name, _entry in EVALUATIONS.items():
    eval_app.command(_name, help=f"{_entry.question[0].upper()}{_entry.question[1:]} ({_entry.scope.value})")(
        _command(_name, [_name])
    )
eval_app.command("all", help="Every evaluation, on one page.")(_command("all", list(EVALUATIONS)))
