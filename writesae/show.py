"""The commands `writesae show`, `prompt` and `export`: pages of atoms and of a prompt, and atoms for other tools."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from writesae.choices import Dtype, OnText, expect
from writesae.cli import parse_with
from writesae.files import check_ours, check_saes, check_writable, folder_labels, sae_folders, taken
from writesae.settings import settings_of

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
    """Folder of a trained SAE (cfg.json, sae_weights.safetensors), or one that holds such folders, as `writesae train`
    and `demo` leave them: each SAE then gets a folder in `out`."""
    sequences: int = 200
    """Sequences to find firings in."""
    out: Path = Path("writesae-out/atoms")
    """Folder for what is written."""

    def check_out(self) -> None:
        """Raise ValueError where `out` cannot be written, or has files of these names that no command wrote."""
        check_writable(self.out)

    def load(self, pages: AtomPages, a_sequence: float, an_atom: float) -> tuple[HookedRecurrent, SAE, Tensor]:
        """The model, the dictionary, and the text as tokens [sequences,context_size]. Says how long the work takes.

        Args:
            a_sequence, an_atom: what they take, in passes over a sequence.

        Raises:
            ValueError: a folder does not hold what it should, or the text is too short.
        """
        from sae_lens_writesae.sae.load import load_sae, model_of
        from writesae.experiment.tokens import sample_sequences, say_time, text_of

        self.check_out()
        text = text_of(self.text)
        sae = load_sae(self.sae)
        model = model_of([sae], self.model, dtype=self.dtype, other_model=self.other_model)
        tokens = sample_sequences(model, text, self.context_size, self.sequences)
        n_atoms = len(pages.atoms or range(min(pages.n_atoms or sae.cfg.d_sae, sae.cfg.d_sae)))
        say_time(model, tokens, len(tokens) * a_sequence + n_atoms * an_atom, self.out)
        return model, sae, tokens


@dataclass(frozen=True, kw_only=True)
class Show(OfOne):
    """Make a page for each atom: where it fires, what it writes, what that does, how long it lasts.

    The pages are static HTML that needs no server and no network; the index sorts and filters. The same numbers
    are saved as JSON.
    """

    optional: bool = False
    """Where no atom can be shown, leave the reason in `out` and no error."""

    def check_out(self) -> None:
        from writesae.page.atoms.pages import check_pages

        super().check_out()
        check_pages(self.out)

    def run(self, pages: AtomPages, progress: bool = True) -> Path:
        """Load the SAE, look at its atoms on the text, and write index.html, a page for each atom and data.json to
        `out`; returns the index.

        Raises:
            ValueError: a folder does not hold what it should, the SAE does not fit the model, or no atom fires often
                enough.
        """
        from hookpoints.files import atomic_text
        from sae_lens_writesae.errors import NothingToMeasureError
        from writesae.page.atoms.pages import write_atom_pages

        of_quality = 8 * min(1, 64 / self.sequences) if pages.quality else 0  # of 64 sequences at most
        loaded = self.load(pages, 3.4 + of_quality, 5.3)
        with taken(self.out):
            try:
                data = pages.collect(*loaded, progress=progress)
            except NothingToMeasureError as error:
                if not self.optional:
                    raise
                return atomic_text(self.out / "nothing-to-show.txt", f"{error}\n")
            for page in self.out.glob("atom-*.html"):  # those of another dictionary, which `check_out` found to be ours
                page.unlink()
            return write_atom_pages(data, self.out)


@dataclass(frozen=True, kw_only=True)
class Export(OfOne):
    """Write the atoms of a dictionary to batch-0.json, as SAEDashboard writes it, for Neuronpedia's converter."""

    to: Literal["neuronpedia"] = "neuronpedia"
    """Which tool is to read it."""
    dataset: str = ""
    """What the text is called there."""

    def check_out(self) -> None:
        super().check_out()
        check_ours(self.out / "batch-0.json")

    def run(self, pages: AtomPages, progress: bool = True) -> Path:
        """Load the SAE, find where its atoms fire on the text, and write the file to `out`.

        Raises:
            ValueError: a folder does not hold what it should, the SAE does not fit the model, or no atom fires often
                enough.
        """
        from hookpoints.files import atomic_text
        from writesae.page.atoms.export import neuronpedia_batch
        from writesae.page.atoms.measure import AtomFacts

        facts = AtomFacts(pages, *self.load(pages, 1.7, 3.7), progress=progress)
        return atomic_text(
            self.out / "batch-0.json", json.dumps(neuronpedia_batch(facts, self.dataset), allow_nan=False)
        )


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """Open a page on this machine: type a text, and see what heads write and read, and which atoms fire.

    Needs no network. It answers to this machine alone, until it is interrupted.
    """

    model: tyro.conf.Positional[str | None] = None
    """Model; by default the one named in the SAE's metadata, or without an SAE the embedded one."""
    sae: Path | None = None
    """Folder of a dictionary, or one that holds such folders; the atoms of the first of each head are shown."""
    other_model: bool = False
    """Take dictionaries of other weights than the model's: of the model that it was fine-tuned from, say."""
    dtype: Dtype = "float32"
    """The model's dtype."""
    port: int = 8765
    """Port of 127.0.0.1. 0: a free one."""

    def __post_init__(self) -> None:
        expect(self, {"port": (0 <= self.port < 2**16, f"0 to {2**16 - 1}")})

    def run(self) -> None:
        """Serve until interrupted."""
        if self.sae is not None:
            sae_folders(self.sae)
        with self.server() as server, suppress(KeyboardInterrupt):
            print(f"open http://127.0.0.1:{server.server_port} in a browser; Ctrl-C ends", flush=True)
            server.serve_forever()

    def server(self) -> PromptServer:
        """The server, bound to its port; raises what `PromptServer` raises."""
        from writesae.page.prompt import PromptServer

        return PromptServer(self.model, self.sae, self.dtype, self.port, self.other_model)


def _run(command: type[Show] | type[Export], program: str, arguments: Sequence[str]) -> str:
    """A command on each dictionary of the folder that it names, with the settings of `AtomPages` as flags."""
    check_saes(arguments)
    flags = settings_of("writesae.page.atoms.collect", "AtomPages")
    of_all, settings = parse_with(command, flags, program, arguments)
    from writesae.page.atoms.collect import AtomPages

    pages = AtomPages(**vars(settings))
    folders = sae_folders(of_all.sae)
    outs = [of_all.out]
    if len(folders) > 1:
        outs = [of_all.out / label for label in folder_labels(folders)]
    commands = [dataclasses.replace(of_all, sae=folder, out=out) for folder, out in zip(folders, outs)]
    for command_of_one in commands:  # all of them before the first, which may take an hour
        command_of_one.check_out()
    return "\n".join(str(command_of_one.run(pages)) for command_of_one in commands)


run_show = partial(_run, Show, "writesae show")
run_export = partial(_run, Export, "writesae export")
