"""``writesae reproduce``: the paper's whole table for a model, resumable, over one or many processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

_LISTS = ("--layers", "--layer", "--heads", "--head", "--seeds", "--targets", "--losses", "--variants", "--evaluations")


def spread_lists(arguments: Sequence[str]) -> list[str]:
    """`--layers 1 9 17` as `--layers 1 --layers 9 --layers 17`, which is what the parser takes."""
    spread: list[str] = []
    name, values = "", 0
    for argument in arguments:
        if argument.startswith("-"):
            name, values = (argument, 0) if argument in _LISTS else ("", 0)
            spread.append(argument)
            continue
        if name and values:
            spread.append(name)
        values += 1
        spread.append(argument)
    return spread


def reproduce(
    model: Annotated[str, typer.Option(help="Model on the hub, a folder, or *embedded*.")] = "Qwen/Qwen3.5-0.8B",
    layers: Annotated[list[int] | None, typer.Option("--layers", "--layer", help="Recurrent layers.")] = None,
    heads: Annotated[list[int] | None, typer.Option("--heads", "--head", help="Heads of every layer.")] = None,
    targets: Annotated[list[str] | None, typer.Option(help="write, state, last_state.")] = None,
    losses: Annotated[list[str] | None, typer.Option(help="Of further dictionaries of states: reads, write.")] = None,
    seeds: Annotated[list[int] | None, typer.Option(help="Of the first target's dictionaries.")] = None,
    variants: Annotated[list[str] | None, typer.Option(help="Further architectures; see VARIANTS.")] = None,
    evaluations: Annotated[list[str] | None, typer.Option(help="Default: all.")] = None,
    dataset: Annotated[
        str | None, typer.Option(help="Dataset on the hub, or a folder of one, with a *text* column.")
    ] = None,
    small: Annotated[bool, typer.Option("--small", help="Small numbers, for a trial on a laptop.")] = False,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="A field of ReproduceConfig.")
    ] = None,
    estimate_only: Annotated[bool, typer.Option("--estimate", help="Say what it will cost, and stop.")] = False,
    out: Annotated[Path, typer.Option(help="Folder of the run; the same folder goes on where it stopped.")] = Path(
        "writesae-out/reproduce"
    ),
) -> None:
    """Run the paper's whole table: train every dictionary, evaluate each, write one report.

    Every step leaves a folder, so the same command goes on where it was stopped or killed. Started by `torchrun` or
    `accelerate launch`, processes share the steps through the folder, on one machine or on several that see it.
    """
    from sae_lens_writesae.cli import clear_errors, say_where
    from sae_lens_writesae.eval_cli import parse_settings
    from sae_lens_writesae.report import ReportFiles
    from sae_lens_writesae.reproduce import SMALL, Place, ReproduceConfig, Workspace, estimate, run_tasks

    with clear_errors():
        lists: dict[str, Any] = {"layers": layers, "heads": heads, "targets": targets, "losses": losses}
        lists |= {"seeds": seeds, "variants": variants}
        given: dict[str, Any] = {"model": model, "dataset": dataset, "evaluations": evaluations}
        given |= {name: tuple(values) for name, values in lists.items() if values}
        config = ReproduceConfig(**(SMALL if small else {}) | given)
        config = replace(config, **parse_settings(set_ or []))
        place = Place.from_environment()
        work = Workspace(config, out, place.device)
        work.check()
        if place.rank == 0:
            cost = estimate(config, out, work.model)
            typer.echo("\n".join(cost.lines()))
            cost.check()
        if estimate_only:
            return
        run_tasks(config, out, place=place, workspace=work, say=typer.echo)
    say_where(ReportFiles(out / "report" / "report.html", out / "report" / "report.json"))
