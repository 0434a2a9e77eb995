"""The commands `writesae show` and `export`: pages of atoms, and atoms for other tools."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from sae_lens import SAE
from torch import Tensor

from hookpoints import HookedRecurrent
from hookpoints.files import atomic_text
from sae_lens_writesae.errors import NothingToMeasureError
from sae_lens_writesae.sae.load import load_sae, model_of
from writesae.experiment.tokens import sample_sequences, say_time, text_of
from writesae.files import check_ours, check_writable, folder_labels, sae_folders, taken
from writesae.flags import Export, OnAtoms, Show
from writesae.page.atoms.collect import AtomPages
from writesae.page.atoms.export import neuronpedia_batch
from writesae.page.atoms.measure import AtomFacts
from writesae.page.atoms.pages import check_pages, write_atom_pages

F = TypeVar("F", bound=OnAtoms)


def run_show(flags: Show) -> str:
    """Write index.html, a page for each atom and data.json for each dictionary of a folder; returns the indices, a line
    each.

    Raises:
        ValueError: a folder does not hold what it should, the SAE does not fit the model, or no atom fires often
            enough.
    """
    return for_each_sae(flags, check_pages, shown_atoms)


def run_export(flags: Export) -> str:
    """Write batch-0.json for each dictionary of a folder; returns the files, a line each. Raises as `run_show`."""
    return for_each_sae(flags, lambda out: check_ours(out / "batch-0.json"), exported_atoms)


def for_each_sae(flags: F, check: Callable[[Path], object], work: Callable[[F], Path]) -> str:
    """What the work leaves of each dictionary in the folder that is named, a line each.

    Args:
        check: raises where the folder of the results has files that no command wrote. All folders are checked before
            the first dictionary, which may take an hour.
    """
    folders = sae_folders(flags.sae)
    outs = [flags.out / label for label in folder_labels(folders)] if len(folders) > 1 else [flags.out]
    for out in outs:
        check_writable(out)
        check(out)
    of_each = [dataclasses.replace(flags, sae=folder, out=out) for folder, out in zip(folders, outs)]
    return "\n".join(str(work(each)) for each in of_each)


def shown_atoms(flags: Show) -> Path:
    """The index of one dictionary, or where no atom can be shown and that is no error, the reason."""
    of_quality = 8 * min(1, 64 / flags.sequences) if flags.atoms.quality else 0  # of 64 sequences at most
    loaded = loaded_sae(flags, 3.4 + of_quality, 5.3)
    with taken(flags.out):
        try:
            data = AtomPages(**vars(flags.atoms)).collect(*loaded)
        except NothingToMeasureError as error:
            if not flags.optional:
                raise
            return atomic_text(flags.out / "nothing-to-show.txt", f"{error}\n")
        for page in flags.out.glob("atom-*.html"):  # those of another dictionary, which `check_pages` found to be ours
            page.unlink()
        return write_atom_pages(data, flags.out)


def exported_atoms(flags: Export) -> Path:
    """The file of one dictionary."""
    facts = AtomFacts(flags.atoms, *loaded_sae(flags, 1.7, 3.7))
    batch = neuronpedia_batch(facts, flags.dataset)
    return atomic_text(flags.out / "batch-0.json", json.dumps(batch, allow_nan=False))


def loaded_sae(flags: OnAtoms, a_sequence: float, an_atom: float) -> tuple[HookedRecurrent, SAE, Tensor]:
    """The model, the dictionary, and the text as tokens [sequences,context_size]. Says how long the work takes.

    Args:
        a_sequence, an_atom: what they take, in passes over a sequence.
    """
    print(f"loads {flags.sae} and its model", flush=True)
    text = text_of(flags.text)
    sae = load_sae(flags.sae)
    model = model_of([sae], flags.model, dtype=flags.dtype, other_model=flags.other_model)
    tokens = sample_sequences(model, text, flags.context_size, flags.sequences)
    atoms = flags.atoms
    n_atoms = len(atoms.atoms or range(min(atoms.n_atoms or sae.cfg.d_sae, sae.cfg.d_sae)))
    say_time(model, tokens, len(tokens) * a_sequence + n_atoms * an_atom, flags.out)
    return model, sae, tokens
