"""The command `writesae show`: pages of a dictionary's atoms, from its folder."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import tyro

from hookpoints import HookedRecurrent, embedded
from sae_lens_writesae.errors import NothingToMeasureError
from sae_lens_writesae.evaluations import load_result
from sae_lens_writesae.experiment.tokens import sample_sequences
from sae_lens_writesae.files import atomic_text, check_writable, taken
from sae_lens_writesae.page.atoms.collect import AtomPages
from sae_lens_writesae.page.atoms.pages import AtomPageFiles, write_atom_pages
from sae_lens_writesae.sae.load import load_sae


@dataclass(frozen=True, kw_only=True)
class Show:
    """Make a page for each atom: where it fires, what it writes, what that does, how long it lasts.

    The pages are static HTML that needs no server and no network; the index sorts and filters. The same numbers lie
    beside them as JSON.
    """

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
        sae = load_sae(self.sae)
        substitution, readers = (None if f is None else load_result(f) for f in (self.substitution, self.readers))
        model = HookedRecurrent.from_pretrained(self.model or str(sae.cfg.metadata.model_name), dtype=self.dtype)
        text = embedded.text("test") if self.text is None else self.text.read_text(encoding="utf-8")
        tokens = sample_sequences(model, text, self.context_size, self.sequences)
        with taken(self.out):
            try:
                data = self.pages.collect(
                    model, sae, tokens, substitution=substitution, readers=readers, progress=progress
                )
            except NothingToMeasureError as error:
                if not self.optional:
                    raise
                return atomic_text(self.out / "nothing-to-show.txt", f"{error}\n")
            return write_atom_pages(data, self.out)
