"""``writesae show``: dashboards of a dictionary's atoms, from its folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from sae_lens_writesae.dashboards import DashboardConfig, DashboardFiles


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
    progress: bool = True,
) -> DashboardFiles:
    """Load one SAE, look at its atoms on text, and write the pages to ``out``.

    Args:
        folder: of the SAE, in SAELens' format.
        model: name or path; None: the one in the SAE's metadata.
        text: a text file; None: the part of the package's held-out text that is kept for evaluation.
        substitution: a saved substitution test of this SAE.

    Raises:
        ValueError: a file is not what it should be, the SAE does not fit the model, or no atom fires often enough.
    """
    from hookpoints import HookedRecurrent, embedded
    from sae_lens_writesae.dashboards import atom_dashboards, write_dashboards
    from sae_lens_writesae.evaluate import check_fits, spread
    from sae_lens_writesae.loading import load_sae
    from sae_lens_writesae.substitution_result import SubstitutionResult

    sae = load_sae(folder)
    tested = None if substitution is None else SubstitutionResult.load(substitution)
    hooked = HookedRecurrent.from_pretrained(model or str(sae.cfg.metadata.model_name))
    check_fits(hooked, sae, folder)
    content = embedded.text("test") if text is None else text.read_text(encoding="utf-8")
    tokens = spread(hooked, content, context_size, sequences)
    data = atom_dashboards(hooked, sae, tokens, config, substitution=tested, progress=progress)
    return write_dashboards(data, out)


def show(
    sae: Annotated[Path, typer.Argument(help="Folder of a trained SAE (cfg.json, sae_weights.safetensors).")],
    atoms: Annotated[str | None, typer.Option(help="Atoms to show, as *3,17,42*; default: a draw.")] = None,
    n: Annotated[int, typer.Option(help="Atoms drawn uniformly from those that fire; 0: all of them.")] = 100,
    model: Annotated[str | None, typer.Option(help="Model; default: the one named in the SAE's metadata.")] = None,
    text: Annotated[Path | None, typer.Option(help="Text file; default: the package's held-out text.")] = None,
    sequences: Annotated[int, typer.Option(help="Sequences to find firings in.")] = 200,
    context_size: Annotated[int, typer.Option(help="Tokens per sequence.")] = 128,
    substitution: Annotated[Path | None, typer.Option(help="A saved substitution test, shown per atom.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of all draws.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for index.html, one page per atom, and data.json.")] = Path(
        "writesae-out/atoms"
    ),
) -> None:
    """A page for each atom: where it fires, what it writes, what that does, how long it lasts.

    Static HTML that needs no server and no network; the index sorts and filters. The same numbers as JSON beside it.
    """
    from sae_lens_writesae.cli import clear_errors
    from sae_lens_writesae.dashboards import DashboardConfig

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
