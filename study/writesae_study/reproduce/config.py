"""What a full run of the protocol covers. Every field is in the run's `config.json`, which the workflow reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from writesae.choices import MATCHED, DictionaryName, Dtype, Target, at_least, once_each
from writesae.files import keep_settings

WRITTEN = ("texts", "collection", "logs", "report", ".snakemake")
"""What a run writes to its folder besides `config.json` and a folder for each head."""


@dataclass(frozen=True)
class ReproduceConfig:
    """A run over `layers` x `heads` of one model; the other defaults are the paper's sizes (Qwen3.5-0.8B)."""

    model: str = "embedded"
    """Model on the hub, a folder, or one that ships with the package."""
    layers: tuple[int, ...] = ()
    """Recurrent layers. By default `n_layers` at the depths of the paper's (9, 1 and 17 of 24)."""
    n_layers: Literal[1, 2, 3] = 3
    """How many layers, where none is named."""
    heads: tuple[int, ...] = ()
    """Heads of every layer. By default one, the paper's in proportion (4 of 16)."""
    targets: tuple[Target, ...] = ("write", "state")
    """What dictionaries are trained on, side by side. The first one is looked at most closely."""
    losses: tuple[Literal["reads", "write"], ...] = ("reads", "write")
    """Further dictionaries of states, whose loss mixes in what queries read, or atoms' alignment with writes. None is
    trained where states are no target."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the first target's dictionaries; other targets take the first seed."""
    variants: tuple[str, ...] = (
        "FlatSAE",
        MATCHED,
        "MatrixSAE",
        "BilinearFlatSAE",
        "TiedSAE",
        "WriteSAE-rank2",
        "WriteSAE-rank4",
    )
    """Further dictionaries of the first target, for the baselines: of `sae_lens_writesae.VARIANTS`, and
    FlatSAE-matched, a flat SAE with as many parameters as the WriteSAE has."""
    variant_seeds: int = 2
    """Seeds of each variant, the first of `seeds`: the paper's comparison of architectures (table 7) is over seeds."""
    evaluations: tuple[str, ...] = ()
    """Kinds of evaluations; by default all of them."""
    control_dictionaries: bool = False
    """Evaluate an untrained dictionary and one of native writes with each: three times the work."""
    set: tuple[str, ...] = ()
    """Settings of evaluations, as FIELD=VALUE or KIND.FIELD=VALUE."""
    architecture: str = "writesae_batchtopk"
    """Architecture of the dictionaries, as SAELens names it."""
    decoder_init: Literal["native", "random"] = "random"
    """Directions of the atoms before training: rows of the first batches, or random (the paper's)."""
    d_sae: int = 2048
    """Atoms of a dictionary."""
    k: int = 32
    """Active atoms per token."""
    training_tokens: int = 5_000_000
    """Tokens that each dictionary is trained on."""
    train_batch_size_tokens: int = 4096
    """Rows of an optimizer step."""
    lr: float = 3e-4
    """Learning rate of Adam."""
    context_size: int = 1024
    """Tokens per sequence."""
    dataset: str | None = None
    """Dataset on the hub with a `text` column, or a folder of one; by default the held-out text of this package, which
    is enough for the models that ship with it."""
    eval_sequences: int = 200
    """Sequences of `context_size` tokens that no dictionary is trained on."""
    n_atoms: int = 100
    """Atoms that an evaluation draws."""
    firings_per_atom: int = 10
    """Firings of each."""
    dtype: Dtype = "float32"
    """The model's dtype."""
    dashboards: int = 50
    """Atoms of the first dictionary of each head that get a page; 0: none."""

    def __post_init__(self) -> None:
        once_each(self, ("layers", "heads", "losses", "variants"), ("targets", "seeds"))
        sizes = ("d_sae", "k", "training_tokens", "train_batch_size_tokens", "context_size", "eval_sequences")
        bounds = dict.fromkeys((*sizes, "variant_seeds", "n_atoms", "firings_per_atom"), 1)
        at_least(self, bounds | {"dashboards": 0, "seeds": 0})
        self.dictionaries()

    def dictionaries(self) -> dict[str, list[str]]:
        """Names of the dictionaries of a head, by target. The first of each target is the plain one."""
        main, seed = self.targets[0], self.seeds[0]
        names = {target: [DictionaryName(target, seed=seed)] for target in self.targets}
        names[main] += [
            *(DictionaryName(main, seed=other) for other in self.seeds[1:]),
            *(
                DictionaryName(main, variant=variant, seed=each)
                for variant in self.variants
                for each in self.seeds[: self.variant_seeds]
            ),
        ]
        if "state" in self.targets:
            names["state"] += [DictionaryName("state", loss, seed=seed) for loss in self.losses]
        return {target: [str(DictionaryName.parse(str(name))) for name in each] for target, each in names.items()}

    def keep_in(self, folder: Path) -> None:
        """Write `config.json`, or compare with the one that is there.

        Raises:
            ValueError: the folder holds a run with other settings; names them. Nothing is overwritten.
        """
        keep_settings(folder, self.settings(), WRITTEN)

    def settings(self) -> Mapping[str, object]:
        """What `config.json` has."""
        return asdict(self) | {"dictionaries": self.dictionaries()}


def training_jobs(names: Sequence[str]) -> list[list[str]]:
    """Dictionaries of a head by the job that trains them, each in the order of the names."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(DictionaryName.parse(name).company, []).append(name)
    return list(groups.values())


SMALL = ReproduceConfig(
    n_layers=1,
    variant_seeds=1,
    d_sae=256,
    k=16,
    training_tokens=40_000,
    context_size=64,
    eval_sequences=32,
    n_atoms=24,
    firings_per_atom=3,
    train_batch_size_tokens=256,
)
"""Numbers for a trial on a laptop: minutes instead of a day."""
