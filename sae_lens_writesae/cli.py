"""The ``writesae`` command: demo, train, eval, show, report, reproduce."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from hookpoints import HookpointsError
from sae_lens_writesae.eval_cli import eval_app
from sae_lens_writesae.report import ReportFiles
from sae_lens_writesae.reproduce_cli import reproduce, spread_lists
from sae_lens_writesae.show_cli import show

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Matrix-atom sparse autoencoders on the memory of recurrent language models, and what their atoms do.",
)
console = Console()
app.command()(show)


@app.command()
def demo(
    model: Annotated[str, typer.Option(help="Model to look into; *embedded* ships with the package.")] = "embedded",
    layer: Annotated[int | None, typer.Option(help="Recurrent layer; default: one whose head has memory.")] = None,
    head: Annotated[int | None, typer.Option(help="Head of that layer.")] = None,
    training_tokens: Annotated[int, typer.Option(help="Tokens each SAE is trained on.")] = 150_000,
    seed: Annotated[int, typer.Option(help="Seed of training, sampling and controls.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for report.html, report.json, the SAEs and the tables.")] = Path(
        "writesae-out"
    ),
) -> None:
    """The main job in a few minutes, offline, on a CPU.

    Trains two sparse autoencoders on one head with memory, one on its **writes** and one on its **states**, with
    SAELens' own runner. Then, where an atom fires, the model's own write is exchanged for the atom, and for controls
    (nothing, random, another atom, another position's write, the state's top direction), and the change of the
    next-token distribution is measured. The report puts both side by side.
    """
    from sae_lens_writesae.demo import DemoConfig, run_demo

    with clear_errors():
        config = DemoConfig(model=model, layer=layer, head=head, training_tokens=training_tokens, seed=seed)
        done = run_demo(config, out, say=console.print)
    _show(done.results)
    say_where(done.report)
    typer.echo(f"tables and SAEs  {done.folder}")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def train(context: typer.Context) -> None:
    """Train with SAELens' own command line, with our architectures and recurrent models.

    Every flag is SAELens' (`writesae train --architecture writesae_batchtopk --help` lists them).
    """
    from sae_lens_writesae.sae.runner import train_from_arguments

    with clear_errors():
        train_from_arguments(context.args)


app.add_typer(eval_app, name="eval")
app.command()(reproduce)


@app.command()
def report(
    results: Annotated[list[Path], typer.Argument(help="Folders of results, or tables of the substitution test.")],
    out: Annotated[Path, typer.Option(help="Page to write.")] = Path("report.html"),
    scale: Annotated[str, typer.Option(help="Headline scale: coefficient, matched or least_squares.")] = "coefficient",
    metric: Annotated[str, typer.Option(help="Headline metric.")] = "kl_window",
) -> None:
    """One page from saved results.

    From **folders** that `writesae eval` or `writesae reproduce` left: claims, the paper's values, those measured,
    controls, verdicts. From **tables** (.parquet) of the substitution test: that test in full, side by side.
    """
    from sae_lens_writesae.joined_report import find_results, write_joined_report
    from sae_lens_writesae.report import write_report
    from sae_lens_writesae.substitution_result import SubstitutionResult

    with clear_errors():
        if all(path.is_dir() for path in results):
            files = write_joined_report(find_results(results), out)
        else:
            files = write_report([SubstitutionResult.load(path) for path in results], out, scale=scale, metric=metric)
    say_where(files)


def main() -> None:
    """Entry point of the console script."""
    app(spread_lists(sys.argv[1:]))


@contextmanager
def clear_errors() -> Iterator[None]:
    """Errors that say what was asked and how to mend it are printed as they are; others keep their traceback."""
    try:
        yield
    except (HookpointsError, ValueError, FileNotFoundError) as error:
        console.print(f"[red]error[/red] {error}", highlight=False)
        raise typer.Exit(2) from error


def say_where(files: ReportFiles) -> None:
    """The files of a report, not by rich, which would break long paths over lines."""
    typer.echo(f"report   {files.html}\nnumbers  {files.json}")


def _show(results: Any) -> None:
    """The finding in a few lines: how often each condition beats deletion, and the verdict."""
    title = "closer to the native model than deleting the write, at the SAE's own coefficient"
    table = Table("condition", *(result.info.label or result.info.hook_name for result in results), title=title)
    summaries = [result.summary() for result in results]
    scale = "coefficient"
    rows = summaries[0].comparisons.query("scale == @scale and b == 'delete'")["a"]
    for name in rows:
        rates = [summary.rate(name, "delete", scale) for summary in summaries]
        cells = (f"{r['rate']:.1%}  [{r['boot_low']:.1%}, {r['boot_high']:.1%}]" for r in rates)
        table.add_row(name, *cells)
    console.print(table)
    console.print("[dim]95 % intervals by bootstrap over sequences[/dim]")
    for result, summary in zip(results, summaries):
        verdict = summary.verdicts[scale]
        console.print(f"[bold]{result.info.label}[/bold]: {verdict.outcome}. {verdict.sentence}", highlight=False)


if __name__ == "__main__":
    main()
