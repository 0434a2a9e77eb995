"""The result of a substitution test: one tidy table, and what one must know to read it."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from sae_lens_writesae.substitution_config import SubstitutionConfig
from sae_lens_writesae.writing import write_aside

#: What is measured on every row: KL in nats; "reverse" is KL(patched || native).
METRICS: tuple[str, ...] = (
    "kl_window",
    "kl_at",
    "kl_next",
    "kl_last",
    "reverse_kl_window",
    "reverse_kl_at",
    "reverse_kl_next",
    "reverse_kl_last",
)

#: One row per firing, condition and scale.
COLUMNS: dict[str, str] = {
    "firing": "number of the firing, 0..n-1; shared by all of its conditions",
    "sequence": "row of the evaluation tokens",
    "position": "token t that is edited",
    "atom": "atom whose firing was drawn",
    "written_atom": "atom that is written: under atom_choice='dominant' the strongest at the position",
    "activation": "activation of the written atom",
    "cosine": "signed cosine of the written atom and the native write",
    "write_norm": "Frobenius norm of the native write",
    "condition": "what is written at t, see conditions.DEFINITIONS",
    "scale": "how the atom is scaled; none for native and delete",
    "norm": "Frobenius norm of what is written",
    "kl_window": "mean over t..t+horizon of KL(native || patched)",
    "kl_at": "at t",
    "kl_next": "at t + 1",
    "kl_last": "at the last token (missing for firings that were not run to the end)",
    **{name: "the same for KL(patched || native)" for name in METRICS if name.startswith("reverse")},
}

_FORMAT = 1
_META_KEY = b"writesae_substitution"


@dataclass(frozen=True)
class SubstitutionInfo:
    """What was tested, on what, by which settings."""

    config: SubstitutionConfig
    hook_name: str
    layer: int
    head: int
    target: str
    """What the SAE was trained on: write or state."""
    rule: str
    """Update rule of the layer."""
    K: int
    V: int
    dtype: str
    """Floating dtype of the model, which sets the floor."""
    model: str
    architecture: str
    """Of the SAE."""
    d_sae: int
    n_alive: int
    """Atoms that fire on the first `alive_tokens` tokens."""
    alive_tokens: int
    """Tokens that were counted for this."""
    n_testable: int
    """Alive atoms with a firing that has room for the horizon; the draw is uniform over these."""
    n_sequences: int
    n_positions: int
    half_life: float
    """Tokens after which a write of this head has lost half of its norm: median over writes, decay and erase
    together. Equal to `half_life_limit` if longer."""
    half_life_limit: int
    mean_write_rank: int
    seconds: float

    @property
    def label(self) -> str:
        """The name in reports: the configured one, or what the SAE was trained on and what departs from the default."""
        if self.config.label:
            return self.config.label
        departures = {"own": "own atom", "silent": "silent positions", "corrected": "corrected write"}
        chosen = (self.config.atom_choice, self.config.positions, self.config.write)
        return ", ".join([f"{self.target}-trained", *(departures[x] for x in chosen if x in departures)])

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"config": self.config.to_dict()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "SubstitutionInfo":
        """The inverse of `to_dict`; missing fields raise ValueError."""
        missing = {f.name for f in fields(cls)} - set(values)
        if missing:
            raise ValueError(f"this is no description of a substitution test: {', '.join(sorted(missing))} missing")
        known: dict[str, Any] = {f.name: values[f.name] for f in fields(cls)}
        known["config"] = SubstitutionConfig(**values["config"])
        return cls(**known)


@dataclass(frozen=True)
class SubstitutionResult:
    """All rows of a test (`COLUMNS`), and its description."""

    frame: pd.DataFrame
    info: SubstitutionInfo

    def __post_init__(self) -> None:
        missing = [name for name in COLUMNS if name not in self.frame]
        if missing:
            raise ValueError(f"a substitution table needs the columns {', '.join(missing)}")
        if self.frame.empty:
            raise ValueError("the substitution table is empty: no firing was tested")
        if np.asarray(self.frame.duplicated(["firing", "condition", "scale"])).any():
            raise ValueError("a firing has two rows of one condition and scale")

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics that were measured."""
        return tuple(m for m in METRICS if bool(np.isfinite(self.frame[m].to_numpy()).any()))

    def wide(self, metric: str = "kl_window") -> pd.DataFrame:
        """One row per firing where `metric` was measured: its description, and one column per (condition, scale) as
        "atom/matched", "delete"."""
        if metric not in self.metrics:
            raise ValueError(f"metric must be one of {', '.join(self.metrics)}, found {metric!r}")
        firings = ["firing", "sequence", "position", "atom", "written_atom", "activation", "cosine", "write_norm"]
        names = self.frame["condition"] + "/" + self.frame["scale"]
        table = self.frame.assign(name=names.str.removesuffix("/none"))
        values = table.pivot(index="firing", columns="name", values=metric)
        described = self.frame[firings].groupby("firing").first()
        return described.join(values, how="inner").dropna(subset=["delete"]).reset_index()

    def summary(self, metric: str = "kl_window", cluster: str = "sequence", seed: int = 0):
        """Win rates, chains, medians, quartiles, the floor and a verdict: `summary.Summary`.

        `cluster` is "sequence" or "atom": what is resampled by the bootstrap.
        """
        from sae_lens_writesae.summary import summarise

        return summarise(self, metric, cluster=cluster, seed=seed)

    def save(self, path: str | Path) -> Path:
        """One parquet file with the table and, in its metadata, the description.

        Written aside, then renamed.
        """
        described = {"format": _FORMAT, "info": self.info.to_dict()}
        table = pa.Table.from_pandas(self.frame, preserve_index=False)
        table = table.replace_schema_metadata(
            {**(table.schema.metadata or {}), _META_KEY: json.dumps(described).encode()}
        )
        return write_aside(Path(path).with_suffix(".parquet"), lambda file: pq.write_table(table, file))

    @classmethod
    def load(cls, path: str | Path) -> "SubstitutionResult":
        """Read what `save` wrote. A file that is something else, or of a newer format, raises ValueError."""
        source = Path(path).with_suffix(".parquet")
        try:
            table = pq.read_table(source)
        except pa.ArrowInvalid as error:
            raise ValueError(f"{source} is no parquet file, or is cut short: {error}") from error
        meta = (table.schema.metadata or {}).get(_META_KEY)
        if meta is None:
            raise ValueError(f"{source} is a parquet file, but no substitution test was saved in it")
        described = json.loads(meta)
        if described["format"] != _FORMAT:
            raise ValueError(f"{source} has format {described['format']}, this version reads format {_FORMAT}")
        return cls(table.to_pandas(), SubstitutionInfo.from_dict(described["info"]))
