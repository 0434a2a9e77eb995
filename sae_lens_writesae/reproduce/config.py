"""What a full run of the protocol covers. Every field is in the run's `config.json`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from sae_lens_writesae.sae.base import VARIANTS
from sae_lens_writesae.sae.losses import Loss
from sae_lens_writesae.sae.target import Target

MATCHED = "FlatSAE-matched"


@dataclass(frozen=True)
class Dictionary:
    """One SAE of a run."""

    layer: int
    head: int
    target: Target
    variant: str
    """Of `VARIANTS`; "" is the WriteSAE itself."""
    seed: int
    loss: Loss = "mse"

    @property
    def cell(self) -> str:
        return f"L{self.layer}H{self.head}"

    @property
    def label(self) -> str:
        """Name within its head, and of its folder."""
        loss = "" if self.loss == "mse" else self.loss
        return "-".join([self.target, *filter(None, [loss, self.variant]), f"seed{self.seed}"])

    @property
    def key(self) -> str:
        """Its folder in the run."""
        return f"{self.cell}/{self.label}"


@dataclass(frozen=True)
class ReproduceConfig:
    """A run over `layers` x `heads` of one model; the defaults are the paper's sizes (Qwen3.5-0.8B)."""

    model: str = "Qwen/Qwen3.5-0.8B"
    """Model on the hub, a folder, or one that ships with the package."""
    layers: tuple[int, ...] = (1, 9, 17)
    """Recurrent layers."""
    heads: tuple[int, ...] = (4,)
    """Heads of every layer."""
    targets: tuple[Target, ...] = ("write", "state")
    """What dictionaries are trained on, side by side. The first one is looked at most closely."""
    losses: tuple[Loss, ...] = ("reads", "write")
    """Further dictionaries of states, whose loss mixes in what queries read, or atoms' alignment with writes; for the
    comparison of objectives. None is trained where states are no target."""
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
    """Further dictionaries of the first target, for the baselines: of `sae_lens_writesae.VARIANTS`, and `MATCHED`, a
    flat SAE with as many parameters as the WriteSAE has."""
    variant_seeds: int = 2
    """Seeds of each variant, the first of `seeds`: the paper's comparison of architectures (table 7) is over seeds."""
    evaluations: tuple[str, ...] | None = None
    """Kinds of evaluations; None: all of them."""
    architecture: str = "writesae_batchtopk"
    """Architecture of the dictionaries, as SAELens names it."""
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
    """Dataset on the hub with a `text` column, or a folder of one; None: the held-out text of this package, which is
    enough for the models that ship with it."""
    eval_sequences: int = 200
    """Sequences of `context_size` tokens that no dictionary is trained on."""
    n_atoms: int = 100
    """Atoms that an evaluation draws."""
    firings_per_atom: int = 10
    """Firings of each."""
    dtype: str = "float32"
    """The model's dtype."""
    dashboards: int = 50
    """Atoms of the first dictionary of each head that get a page; 0: none."""
    settings: Annotated[dict[str, dict[str, object]], tyro.conf.Suppress] = field(default_factory=dict)
    """Settings of an evaluation by its kind, where they should not be its defaults."""

    def __post_init__(self) -> None:
        for name in ("layers", "heads", "targets", "losses", "seeds", "variants"):
            values = tuple(getattr(self, name))
            object.__setattr__(self, name, values)
            if len(set(values)) != len(values):
                raise ValueError(f"{name} are named once each, found {list(values)}")
            if not values and name not in ("losses", "variants"):
                raise ValueError(f"{name} must name at least one, found none")
        if unknown := [name for name in self.variants if name not in (*VARIANTS, MATCHED)]:
            raise ValueError(f"there is no variant {', '.join(unknown)}; there are {', '.join((*VARIANTS, MATCHED))}")
        if unknown := [name for name in self.losses if name not in ("reads", "write")]:
            raise ValueError(f"losses beside mse are reads and write, found {', '.join(unknown)}")
        if self.evaluations is not None:
            object.__setattr__(self, "evaluations", tuple(self.evaluations))
        for name in (
            "variant_seeds",
            "d_sae",
            "k",
            "training_tokens",
            "context_size",
            "eval_sequences",
            "n_atoms",
            "firings_per_atom",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, found {getattr(self, name)}")

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON, lists for tuples; `ReproduceConfig(**d)` gives it back."""
        return json.loads(json.dumps(asdict(self)))

    def keep_in(self, folder: Path) -> None:
        """Write `config.json`, or compare with the one that is there.

        Raises:
            ValueError: the folder holds a run with other settings; names them. Nothing is overwritten.
        """
        file = folder / "config.json"
        folder.mkdir(parents=True, exist_ok=True)
        own = self.to_dict()
        try:
            with file.open("x", encoding="utf-8") as new:  # "x": of several processes, one writes
                json.dump(own, new, indent=1)
            return
        except FileExistsError:
            there = json.loads(file.read_text(encoding="utf-8"))
        differing = [
            f"{key}: {there.get(key)!r}, now {value!r}" for key, value in own.items() if there.get(key) != value
        ]
        if differing:
            raise ValueError(
                f"{folder} holds a run with other settings ({'; '.join(differing)}); give another --out, or the same "
                "settings to go on with it"
            )


SMALL = ReproduceConfig(
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
