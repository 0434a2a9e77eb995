"""``writesae show``: dashboards of a dictionary's atoms, from its folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from sae_lens_writesae.page.dashboards import DashboardConfig, DashboardFiles


def show_atoms(
    folder: Path,
    out: Path,
    config: DashboardConfig,
    *,
    model: str | None = None,
    text: Path | None = None,
    sequences: int = 200,
    context_size: int = 128,
    substitution: Path | None = None,
    readers: Path | None = None,
    progress: bool = True,
) -> DashboardFiles:
    """Load one SAE, look at its atoms on text, and write the pages to ``out``.

    Args:
        folder: of the SAE, in SAELens' format.
        model: name or path; None: the one in the SAE's metadata.
        text: a text file; None: the part of the package's held-out text that is kept for evaluation.
        substitution: a saved substitution test of this SAE: the folder that `writesae eval substitution` made, or a
            table of its own. None: a small one is run.
        readers: the folder that `writesae eval readers` made. None: readers are measured, without a control.

    Raises:
        ValueError: a file is not what it should be, the SAE does not fit the model, or no atom fires often enough.
    """
    from hookpoints import HookedRecurrent, embedded
    from sae_lens_writesae.evaluate import check_fits, spread
    from sae_lens_writesae.page.dashboards import atom_dashboards, write_dashboards
    from sae_lens_writesae.sae.load import load_sae

    sae = load_sae(folder)
    found = {
        "substitution": None if substitution is None else _tested(substitution),
        "readers": None if readers is None else _table(readers, "changes"),
    }
    hooked = HookedRecurrent.from_pretrained(model or str(sae.cfg.metadata.model_name))
    check_fits(hooked, sae, folder)
    content = embedded.text("test") if text is None else text.read_text(encoding="utf-8")
    tokens = spread(hooked, content, context_size, sequences)
    data = atom_dashboards(hooked, sae, tokens, config, **found, progress=progress)
    return write_dashboards(data, out)


def _tested(path: Path) -> Any:
    from sae_lens_writesae.substitution_evaluation import Substitution
    from sae_lens_writesae.substitution_result import SubstitutionResult

    return Substitution.load(path).result if path.is_dir() else SubstitutionResult.load(path)


def _table(folder: Path, name: str) -> Any:
    """A table of a saved evaluation."""
    import pandas as pd

    from sae_lens_writesae.evaluation import saved_head

    if name not in saved_head(folder)["tables"]:
        raise ValueError(f"{folder} holds {saved_head(folder)['kind']}, which has no table {name!r}")
    return pd.read_parquet(folder / f"{name}.parquet")


def show(
    sae: Annotated[Path, typer.Argument(help="Folder of a trained SAE (cfg.json, sae_weights.safetensors).")],
    atoms: Annotated[str | None, typer.Option(help="Atoms to show, as *3,17,42*; default: a draw.")] = None,
    n: Annotated[int, typer.Option(help="Atoms drawn uniformly from those that fire; 0: all of them.")] = 100,
    model: Annotated[str | None, typer.Option(help="Model; default: the one named in the SAE's metadata.")] = None,
    text: Annotated[Path | None, typer.Option(help="Text file; default: the package's held-out text.")] = None,
    sequences: Annotated[int, typer.Option(help="Sequences to find firings in.")] = 200,
    context_size: Annotated[int, typer.Option(help="Tokens per sequence.")] = 128,
    substitution: Annotated[
        Path | None, typer.Option(help="A saved substitution test; default: a small one is run.")
    ] = None,
    readers: Annotated[Path | None, typer.Option(help="A saved search for readers; default: measured here.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of all draws.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for index.html, one page per atom, and data.json.")] = Path(
        "writesae-out/atoms"
    ),
) -> None:
    """A page for each atom: where it fires, what it writes, what that does, how long it lasts.

    Static HTML that needs no server and no network; the index sorts and filters. The same numbers as JSON beside it.
    """
    from sae_lens_writesae.cli import clear_errors
    from sae_lens_writesae.page.dashboards import DashboardConfig

    with clear_errors():
        config = DashboardConfig(atoms=_numbers(atoms), n_atoms=n or None, seed=seed)
        files = show_atoms(
            sae,
            out,
            config,
            model=model,
            text=text,
            sequences=sequences,
            context_size=context_size,
            substitution=substitution,
            readers=readers,
        )
    # Not by rich, which would break long paths over lines.
    typer.echo(f"pages    {files.index} and {len(files.pages)} atoms\nnumbers  {files.data}")


def _numbers(atoms: str | None) -> tuple[int, ...] | None:
    if atoms is None:
        return None
    try:
        return tuple(int(part) for part in atoms.split(","))
    except ValueError:
        raise ValueError(f"--atoms takes numbers with commas between them, as 3,17,42; found {atoms!r}") from None
