"""The commands `writesae show`, `prompt` and `export`: pages of atoms and of a prompt, and atoms for other tools."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from writesae.choices import Dtype, OnText
from writesae.cli import parse_with
from writesae.files import check_writable, folder_labels, sae_folders, taken

if TYPE_CHECKING:
    from sae_lens import SAE
    from torch import Tensor

    from hookpoints import HookedRecurrent
    from writesae.page.atoms.collect import AtomPages
    from writesae.page.prompt import PromptServer


@dataclass(frozen=True, kw_only=True)
class OfOne(OnText):
    """A dictionary, its model and a text."""

    sae: tyro.conf.Positional[Path]
    """Folder of a trained SAE (cfg.json, sae_weights.safetensors). `show` also takes one that holds such folders, as
    `writesae train` and `demo` leave them: each then gets a folder in `out`."""
    sequences: int = 200
    """Sequences to find firings in."""
    out: Path = Path("writesae-out/atoms")
    """Folder for what is written."""

    def load(self) -> tuple[HookedRecurrent, SAE, Tensor]:
        """The model, the dictionary, and the text as tokens [sequences,context_size].

        Raises:
            ValueError: a folder does not hold what it should, or the text is too short.
        """
        from hookpoints import HookedRecurrent
        from sae_lens_writesae.sae.load import load_sae
        from writesae.experiment.tokens import sample_sequences, text_of

        check_writable(self.out)
        text, sae = text_of(self.text), load_sae(self.sae)
        model = HookedRecurrent.from_pretrained(self.model or str(sae.cfg.metadata.model_name), dtype=self.dtype)
        return model, sae, sample_sequences(model, text, self.context_size, self.sequences)


@dataclass(frozen=True, kw_only=True)
class Show(OfOne):
    """Make a page for each atom: where it fires, what it writes, what that does, how long it lasts.

    The pages are static HTML that needs no server and no network; the index sorts and filters. The same numbers lie
    beside them as JSON.
    """

    optional: bool = False
    """Where no atom can be shown, leave the reason in `out` and no error."""

    def run(self, pages: AtomPages, progress: bool = True) -> Path:
        """Load the SAE, look at its atoms on the text, and write index.html, a page for each atom and data.json to
        `out`; returns the index.

        Raises:
            ValueError: a folder does not hold what it should, the SAE does not fit the model, or no atom fires often
                enough.
        """
        from sae_lens_writesae.errors import NothingToMeasureError
        from sae_lens_writesae.files import atomic_text
        from writesae.page.atoms.pages import write_atom_pages

        loaded = self.load()
        with taken(self.out):
            try:
                return write_atom_pages(pages.collect(*loaded, progress=progress), self.out)
            except NothingToMeasureError as error:
                if not self.optional:
                    raise
                return atomic_text(self.out / "nothing-to-show.txt", f"{error}\n")


@dataclass(frozen=True, kw_only=True)
class Export(OfOne):
    """Write the atoms of a dictionary to batch-0.json, as SAEDashboard writes it, for Neuronpedia's converter."""

    to: Literal["neuronpedia"] = "neuronpedia"
    """Which tool is to read it."""
    dataset: str = ""
    """What the text is called there."""

    def run(self, pages: AtomPages, progress: bool = True) -> Path:
        """Load the SAE, find where its atoms fire on the text, and write the file to `out`.

        Raises:
            ValueError: a folder does not hold what it should, the SAE does not fit the model, or no atom fires often
                enough.
        """
        from sae_lens_writesae.files import atomic_text
        from writesae.page.atoms.export import neuronpedia_batch
        from writesae.page.atoms.measure import Facts

        model, sae, tokens = self.load()
        batch = neuronpedia_batch(Facts(pages, model, sae, tokens, progress=progress), self.dataset)
        return atomic_text(self.out / "batch-0.json", json.dumps(batch, allow_nan=False))


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """Open a page on this machine: type a text, and see what heads write and read, and which atoms fire.

    Needs no network. It answers to this machine alone, until it is interrupted.
    """

    model: tyro.conf.Positional[str | None] = None
    """Model; by default the one named in the SAE's metadata, or without an SAE the embedded one."""
    sae: Path | None = None
    """Folder of a dictionary, whose atoms are shown for its head."""
    dtype: Dtype = "float32"
    """The model's dtype."""
    port: int = 8765
    """Port of 127.0.0.1. 0: a free one."""

    def __post_init__(self) -> None:
        if not 0 <= self.port < 2**16:
            raise ValueError(f"port: expected 0 to {2**16 - 1}, got {self.port}")

    def run(self) -> None:
        """Serve until interrupted."""
        with self.server() as server, suppress(KeyboardInterrupt):
            print(f"open http://127.0.0.1:{server.server_port} in a browser; Ctrl-C ends", flush=True)
            server.serve_forever()

    def server(self) -> PromptServer:
        """The server, bound to its port; raises what `PromptServer` raises."""
        from writesae.page.prompt import PromptServer

        return PromptServer(self.model, self.sae, self.dtype, self.port)


def run_show(arguments: Sequence[str]) -> str:
    """`writesae show SAE` with the settings of `AtomPages` as flags."""
    from writesae.page.atoms.collect import AtomPages

    show, pages = parse_with(Show, AtomPages, "writesae show", arguments)
    folders = sae_folders(show.sae)
    outs = [show.out / label for label in folder_labels(folders)] if len(folders) > 1 else [show.out]
    each = [dataclasses.replace(show, sae=folder, out=out) for folder, out in zip(folders, outs)]
    return "\n".join(f"pages    {one.run(pages)}" for one in each)


def run_export(arguments: Sequence[str]) -> Path:
    """`writesae export SAE` with the settings of `AtomPages` as flags."""
    from writesae.page.atoms.collect import AtomPages

    export, pages = parse_with(Export, AtomPages, "writesae export", arguments)
    return export.run(pages)
