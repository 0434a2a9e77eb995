"""`writesae reproduce`: checks and texts; then this process becomes Snakemake."""

from __future__ import annotations

import dataclasses
import fcntl
import importlib.util
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import tyro

from writesae.cli import parse
from writesae.files import check_settings, check_writable
from writesae_study.reproduce.config import SMALL, WRITTEN, ReproduceConfig

if TYPE_CHECKING:
    from hookpoints import HookedRecurrent

_HERE = Path(__file__).parent


def run_reproduce(arguments: Sequence[str]) -> None:
    """`writesae reproduce`, with what follows `--` for Snakemake."""
    Reproduce.from_arguments(arguments).run()


@dataclass(frozen=True, kw_only=True)
class Reproduce:
    """Run the paper's whole table: train every dictionary, evaluate each, write one report.

    Snakemake runs the steps. The same command resumes a run that was stopped or killed. What follows `--` is given to
    Snakemake: `-- --dry-run`, `-- --cores 8`."""

    config: tyro.conf.OmitArgPrefixes[ReproduceConfig] = field(default_factory=ReproduceConfig)
    out: Path = Path("writesae-out/reproduce")
    """Folder of the run; the same folder resumes where it stopped, while weights and files of text are the same."""
    device: str | None = None
    """cpu, cuda or cuda:N, for all steps; by default those of the profile."""
    small: bool = False
    """Small numbers, for a trial on a laptop. Flags that are given win over them."""
    profile: str | None = None
    """Where it runs: laptop, gpu, gpus (eight), slurm, or a folder with a profile of Snakemake. By default laptop or
    gpu, as this machine has one."""
    published: bool = False
    """Instead, do the runs behind study/docs/results that `out` lacks: seven hours of one core. No flag but `out` and
    `profile` is taken with it."""
    snakemake: tyro.conf.Suppress[tuple[str, ...]] = ()

    @classmethod
    def from_arguments(cls, arguments: Sequence[str]) -> Reproduce:
        """The command line as a value; with `--small`, small numbers are the defaults."""
        own = list(itertools.takewhile(lambda word: word != "--", arguments))
        command = parse(cls, "writesae reproduce", own, cls(config=SMALL) if "--small" in own else cls())
        return dataclasses.replace(command, snakemake=tuple(arguments[len(own) + 1 :]))

    def run(self) -> None:
        """Check, write the texts, and become Snakemake: this call does not return.

        Raises:
            ValueError: the run cannot be done, another process does it, the folder holds a run with other settings,
                weights or text, or Snakemake is not installed; before anything is written.
        """
        check_writable(self.out)
        from hookpoints import HookedRecurrent, default_device
        from hookpoints.files import atomic_text, read_json
        from sae_lens_writesae.sae.factors import model_hash
        from writesae.collecting import check_text
        from writesae.dictionary.traits import sparsity_fields
        from writesae_study.evaluate import EvalAll, Subjects
        from writesae_study.reproduce.texts import text_hash, write_texts

        profile = profile_folder(self.profile or ("laptop" if default_device() == "cpu" else "gpu"))
        if importlib.util.find_spec("snakemake") is None:
            raise ValueError(
                "the protocol runs on Snakemake: in the clone of the repository, "
                "pip install -e hookpoints -e . -e study"
            )
        if self.published:
            if self.small or self.config != ReproduceConfig():
                raise ValueError(
                    "published: expected no other flag but --out and --profile, its rows have all settings"
                )
            self.out.mkdir(parents=True, exist_ok=True)
            own_run(self.out)
            self._become_snakemake("published.smk", profile)
        # Everything that can be refused is, before the first file is written.
        EvalAll(subjects=Subjects(saes=()), kinds=self.config.evaluations, set=self.config.set or None).evaluations()
        check_text(self.config.model, self.config.dataset)
        sparsity_fields(self.config.architecture, self.config.k)  # raises where there is no such architecture
        model = HookedRecurrent.from_pretrained(self.config.model, dtype=self.config.dtype)
        config = for_model(self.config, model)
        check_settings(self.out, config.settings(), WRITTEN)
        # A folder is resumed only with the weights and the text that it was begun with.
        inputs = {"weights": model_hash(model), "text": text_hash(config.dataset)}
        known = self.out / "inputs.json"
        if known.exists() and read_json(known) != inputs:
            raise ValueError(
                f"{self.out}: expected a run of these weights and this text, got another; name another --out"
            )
        self.out.mkdir(parents=True, exist_ok=True)
        own_run(self.out)
        config.keep_in(self.out)
        atomic_text(known, json.dumps(inputs))
        write_texts(config, self.out / "texts", model)
        self._become_snakemake("Snakefile", profile)

    def _become_snakemake(self, file: str, profile: Path) -> NoReturn:
        """Of the run that this process owns."""
        engine = [sys.executable, "-m", "snakemake", f"--snakefile={_HERE / file}", f"--directory={self.out}"]
        if list((self.out / ".snakemake" / "locks").glob("*")):  # of a process that is dead
            subprocess.run([*engine, "--unlock"], check=True, capture_output=True)
        sys.stdout.flush()
        os.execv(sys.executable, [*engine, "--profile", str(profile), *self.snakemake])


def profile_folder(name: str) -> Path:
    """The folder of a profile. ValueError where there is none."""
    folder = next((each for each in (_HERE / "profiles" / name, Path(name)) if each.is_dir()), None)
    if folder is None:
        known = ", ".join(sorted(each.name for each in (_HERE / "profiles").iterdir()))
        raise ValueError(f"there is no profile {name!r}: it is one of {known}, or a folder with a config.yaml")
    return folder.resolve()


def for_model(config: ReproduceConfig, model: HookedRecurrent) -> ReproduceConfig:
    """The config with layers and heads of this model, and with paths that hold in any folder.

    Raises:
        UnsupportedModelError, UnknownHookError: a head that is not there.
    """
    from sae_lens_writesae.sae.target import head_target

    depths = sorted(depth / 24 * model.cfg.n_layers for depth in (9, 1, 17)[: config.n_layers])
    nearest = [min(model.cfg.recurrent_layers, key=lambda layer: abs(layer - depth)) for depth in depths]
    layers = config.layers or tuple(dict.fromkeys(nearest))
    heads = config.heads or (min(model.cfg.layer(layer).H for layer in layers) // 4,)
    for layer, head in itertools.product(layers, heads):
        head_target(model, layer, head)
    name = str(Path(config.model).resolve()) if Path(config.model).is_dir() else config.model
    return dataclasses.replace(config, model=name, layers=layers, heads=heads)


def own_run(folder: Path) -> None:
    """Make this process, and what it becomes, the owner of a run; the operating system frees a run whose owner dies.

    Raises:
        ValueError: its owner lives.
        OSError: `.owner` is a link, which could lead to a file of another folder, or cannot be written.
    """
    file = os.open(folder / ".owner", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        raise ValueError(f"{folder} is being worked on by another process") from None
    os.set_inheritable(file, True)
