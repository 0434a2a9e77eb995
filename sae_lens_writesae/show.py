"""The commands `writesae show` and `writesae export`: pages of atoms, and atoms as other tools read them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import tyro
from sae_lens import SAE
from torch import Tensor

from hookpoints import HookedRecurrent, embedded
from sae_lens_writesae.errors import NothingToMeasureError
from sae_lens_writesae.evaluations import load_result
from sae_lens_writesae.experiment.lab import Lab
from sae_lens_writesae.experiment.tokens import sample_sequences
from sae_lens_writesae.files import atomic_text, check_writable, taken
from sae_lens_writesae.page.atoms.collect import AtomPages
from sae_lens_writesae.page.atoms.export import neuronpedia_batch, write_delphi
from sae_lens_writesae.page.atoms.pages import AtomPageFiles, write_atom_pages
from sae_lens_writesae.sae.load import load_sae


@dataclass(frozen=True, kw_only=True)
class OnText:
    """A dictionary, its model and a text."""

    sae: tyro.conf.Positional[Path]
    """Folder of a trained SAE (cfg.json, sae_weights.safetensors)."""
    model: str | None = None
    """Model; by default the one named in the SAE's metadata."""
    dtype: str = "float32"
    """The model's dtype."""
    text: Path | None = None
    """Text file; by default the held-out text of the package."""
    sequences: int = 200
    """Sequences to find firings in."""
    context_size: int = 128
    """Tokens per sequence."""

    def load(self) -> tuple[HookedRecurrent, SAE, Tensor]:
        """The model, the dictionary, and the text as tokens [sequences,context_size].

        Raises:
            ValueError: a folder does not hold what it should, or the text is too short.
        """
        sae = load_sae(self.sae)
        model = HookedRecurrent.from_pretrained(self.model or str(sae.cfg.metadata.model_name), dtype=self.dtype)
        text = embedded.text("test") if self.text is None else self.text.read_text(encoding="utf-8")
        return model, sae, sample_sequences(model, text, self.context_size, self.sequences)


@dataclass(frozen=True, kw_only=True)
class Show(OnText):
    """Make a page for each atom: where it fires, what it writes, what that does, how long it lasts.

    The pages are static HTML that needs no server and no network; the index sorts and filters. The same numbers lie
    beside them as JSON.
    """

    substitution: Path | None = None
    """Folder of a saved substitution test of this SAE; by default a small one is run."""
    readers: Path | None = None
    """Folder of a saved result of the evaluation `readers`; by default readers are measured here, without a control."""
    pages: tyro.conf.OmitArgPrefixes[AtomPages] = field(default_factory=AtomPages)
    out: Path = Path("writesae-out/atoms")
    """Folder for index.html, one page per atom, and data.json."""

    optional: bool = False
    """Where no atom can be shown, leave the reason in `out` and no error."""

    def run(self, progress: bool = True) -> AtomPageFiles | Path:
        """Load the SAE, look at its atoms on the text, and write the pages to `out`.

        Raises:
            ValueError: a folder does not hold what it should, the SAE does not fit the model, or no atom fires often
                enough.
        """
        check_writable(self.out)
        substitution, readers = (None if f is None else load_result(f) for f in (self.substitution, self.readers))
        loaded = self.load()
        with taken(self.out):
            try:
                data = self.pages.collect(*loaded, substitution=substitution, readers=readers, progress=progress)
            except NothingToMeasureError as error:
                if not self.optional:
                    raise
                return atomic_text(self.out / "nothing-to-show.txt", f"{error}\n")
            return write_atom_pages(data, self.out)


@dataclass(frozen=True, kw_only=True)
class Export(OnText):
    """Write the atoms of a dictionary as other tools read them.

    neuronpedia: batch-0.json, as SAEDashboard writes it, for Neuronpedia's converter. delphi: a cache of all firings,
    for explanations and their scores.
    """

    to: Literal["neuronpedia", "delphi"]
    """Which tool is to read it."""
    dataset: str = ""
    """What the text is called there."""
    splits: int = 5
    """delphi: files that the atoms are dealt to."""
    pages: tyro.conf.OmitArgPrefixes[AtomPages] = field(default_factory=AtomPages)
    out: Path = Path("writesae-out/export")
    """Folder for what is written."""

    def run(self, progress: bool = True) -> Path:
        """Load the SAE, find where its atoms fire on the text, and write to `out`: the file, or for delphi the folder.

        Raises:
            ValueError: a folder does not hold what it should, the SAE does not fit the model, no atom fires often
                enough, or `splits` is not between 1 and the number of atoms.
        """
        check_writable(self.out)
        model, sae, tokens = self.load()
        if self.to == "neuronpedia":
            pages = replace(self.pages, substitution_firings=0)  # has no place there
            batch = neuronpedia_batch(pages.collect(model, sae, tokens, progress=progress), self.dataset)
            return atomic_text(self.out / "batch-0.json", json.dumps(batch, allow_nan=False))
        lab = Lab(model, {"": sae}, tokens, progress=progress)
        return write_delphi(lab, self.out, n_splits=self.splits, dataset=self.dataset)
