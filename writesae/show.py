"""The commands `writesae show`, `prompt` and `export`: pages of atoms and of a prompt, and atoms for other tools."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

import tyro

from writesae.choices import Dtype, at_least
from writesae.cli import parse_with
from writesae.files import check_writable, taken

if TYPE_CHECKING:
    from sae_lens import SAE
    from torch import Tensor

    from hookpoints import HookedRecurrent
    from writesae.page.atoms.collect import AtomPages
    from writesae.page.atoms.pages import AtomPageFiles
    from writesae.page.prompt import PromptServer

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class OnText:
    """A dictionary, its model and a text."""

    sae: tyro.conf.Positional[Path]
    """Folder of a trained SAE (cfg.json, sae_weights.safetensors). `show` also takes one that holds such folders, as
    `writesae train` and `demo` leave them: each then gets a folder in `out`."""
    model: str | None = None
    """Model; by default the one named in the SAE's metadata."""
    dtype: Dtype = "float32"
    """The model's dtype."""
    text: Path | None = None
    """Text file; by default the held-out text of the package."""
    sequences: int = 200
    """Sequences to find firings in."""
    context_size: int = 128
    """Tokens per sequence."""

    def __post_init__(self) -> None:
        at_least(self, {"sequences": 1, "context_size": 1})

    def load(self, pages: AtomPages) -> tuple[HookedRecurrent, SAE, Tensor]:
        """The model, the dictionary, and the text as tokens [sequences,context_size].

        Raises:
            ValueError: a folder does not hold what it should, the dictionary has no atom of a number that `pages`
                names (before the model is loaded), or the text is too short.
        """
        from hookpoints import HookedRecurrent
        from sae_lens_writesae.sae.load import load_sae
        from writesae.experiment.tokens import sample_sequences, text_of

        text = text_of(self.text)
        sae = load_sae(self.sae)
        pages.check(sae)
        model = HookedRecurrent.from_pretrained(self.model or str(sae.cfg.metadata.model_name), dtype=self.dtype)
        return model, sae, sample_sequences(model, text, self.context_size, self.sequences)


@dataclass(frozen=True, kw_only=True)
class Show(OnText):
    """Make a page for each atom: where it fires, what it writes, what that does, how long it lasts.

    The pages are static HTML that needs no server and no network; the index sorts and filters. The same numbers lie
    beside them as JSON.
    """

    substitution: Path | None = None
    """Folder of a saved substitution test of this SAE; by default the one that `demo` left beside it, or else a small
    one is run."""
    readers: Path | None = None
    """Folder of a saved result of the evaluation `readers`; by default readers are measured here, without a control."""
    out: Path = Path("writesae-out/atoms")
    """Folder for index.html, one page per atom, and data.json."""

    optional: bool = False
    """Where no atom can be shown, leave the reason in `out` and no error."""

    def run(self, pages: AtomPages | None = None, progress: bool = True) -> AtomPageFiles | Path:
        """Load the SAE, look at its atoms on the text, and write the pages to `out`.

        Raises:
            ValueError: a folder does not hold what it should, the SAE does not fit the model, or no atom fires often
                enough.
        """
        from sae_lens_writesae.errors import NothingToMeasureError
        from sae_lens_writesae.files import atomic_text
        from writesae.evaluations import load_result
        from writesae.page.atoms.collect import AtomPages
        from writesae.page.atoms.pages import write_atom_pages

        check_writable(self.out)
        beside = self.sae.parent / "substitution"
        tested = self.substitution or (beside if (beside / "info.json").is_file() else None)
        substitution, readers = (None if f is None else load_result(f) for f in (tested, self.readers))
        pages = pages or AtomPages()
        loaded = self.load(pages)
        with taken(self.out):
            try:
                data = pages.collect(*loaded, substitution=substitution, readers=readers, progress=progress)
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
    out: Path = Path("writesae-out/export")
    """Folder for what is written."""

    def run(self, pages: AtomPages | None = None, progress: bool = True) -> Path:
        """Load the SAE, find where its atoms fire on the text, and write to `out`: the file, or for delphi the folder.

        Raises:
            ValueError: a folder does not hold what it should, the SAE does not fit the model, no atom fires often
                enough, or `splits` is not between 1 and the number of atoms.
        """
        from sae_lens_writesae.files import atomic_text
        from writesae.experiment.lab import Lab
        from writesae.page.atoms.collect import AtomPages
        from writesae.page.atoms.export import neuronpedia_batch, write_delphi
        from writesae.page.atoms.measure import Facts

        check_writable(self.out)
        pages = pages or AtomPages()
        model, sae, tokens = self.load(pages)
        if self.to == "neuronpedia":
            batch = neuronpedia_batch(Facts(pages, model, sae, tokens, progress=progress), self.dataset)
            return atomic_text(self.out / "batch-0.json", json.dumps(batch, allow_nan=False))
        lab = Lab(model, {"": sae}, tokens, progress=progress)
        return write_delphi(lab, self.out, n_splits=self.splits, dataset=self.dataset)


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
        server = self.server()
        host, port = server.server_address[:2]
        print(f"open http://{host}:{port} in a browser; Ctrl-C ends", flush=True)
        with server:
            try:
                server.serve_forever()
            except KeyboardInterrupt:
                print()

    def server(self) -> PromptServer:
        """The server, bound to its port; raises what `PromptServer` raises."""
        from writesae.page.prompt import PromptServer

        return PromptServer(self.model, self.sae, self.dtype, self.port)


def run_show(arguments: Sequence[str]) -> str:
    """`writesae show SAE` with the settings of `AtomPages` as flags."""
    show, pages = _with_pages(Show, "writesae show", arguments)
    from sae_lens_writesae.sae.load import folder_labels, sae_folders

    folders = sae_folders(show.sae)
    outs = [show.out / label for label in folder_labels(folders)] if len(folders) > 1 else [show.out]
    each = [dataclasses.replace(show, sae=folder, out=out) for folder, out in zip(folders, outs)]
    return "\n".join(str(one.run(pages)) for one in each)


def run_export(arguments: Sequence[str]) -> Path:
    """`writesae export SAE` with the settings of `AtomPages` as flags."""
    export, pages = _with_pages(Export, "writesae export", arguments)
    return export.run(pages)


def _with_pages(command: type[T], program: str, arguments: Sequence[str]) -> tuple[T, AtomPages]:
    from writesae.page.atoms.collect import AtomPages

    return parse_with(command, AtomPages, program, arguments)
