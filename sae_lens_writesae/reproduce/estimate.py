"""What a run will cost in time, memory and disk, from a few measured pieces; refused where the disk is too small."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import TrainStepInput

from hookpoints import HookedRecurrent, WriteEdit
from sae_lens_writesae.evaluations.substitution import Substitution
from sae_lens_writesae.reproduce.config import ReproduceConfig
from sae_lens_writesae.reproduce.tasks import Task, dictionaries, is_done, make_tasks
from sae_lens_writesae.sae.base import VARIANTS

_OTHER_EVALUATIONS = 1.0
"""Time of any other evaluation over that of the substitution test, roughly."""

_TABLE_BYTES = 120
"""Per firing and condition in the tables of the substitution test, compressed."""


_LOGIT_BYTES = 512e6
"""Float32 logits of one batch of edited rows, as `lab` bounds them."""


class DiskTooSmallError(ValueError):
    """The run needs more room than the disk has. Nothing was written."""


@dataclass(frozen=True)
class Pieces:
    """Measured on this machine, seconds."""

    forward: float
    """One sequence of `context_size` tokens through the model."""
    train_step: float
    """One optimizer step of one SAE on `train_batch_size_tokens` writes."""
    token: float
    """One token of one edited row."""


@dataclass(frozen=True)
class Estimate:
    """What is left of a run."""

    pieces: Pieces
    tasks: Counter[str]
    """Steps left, by kind."""
    seconds: float
    """Of one process; divide by the number of processes."""
    memory: float
    """Bytes for model, one SAE with its optimizer, the activation buffer and the edited rows' logits."""
    disk: float
    """Bytes that are still to be written, checkpoints included."""
    free: float
    """Bytes free where the run's folder is."""

    def check(self) -> None:
        """Raise DiskTooSmallError unless the disk has the room, with a tenth to spare."""
        if 1.1 * self.disk > self.free:
            raise DiskTooSmallError(
                f"the run will write about {_size(self.disk)}, and {_size(self.free)} are free; make room, name "
                "another --out, or take fewer layers, heads, seeds or variants"
            )

    def lines(self) -> list[str]:
        """For a person."""
        kinds = ", ".join(f"{n} {kind}" for kind, n in self.tasks.items())
        return [
            f"steps left  {sum(self.tasks.values())}: {kinds}",
            f"time        about {_duration(self.seconds)} for one process (measured: forward "
            f"{self.pieces.forward:.2g} s, optimizer step {self.pieces.train_step:.2g} s, edited row "
            f"{self.pieces.token:.2g} s a token)",
            f"memory      about {_size(self.memory)}",
            f"disk        about {_size(self.disk)} to write, {_size(self.free)} free",
        ]


def estimate(config: ReproduceConfig, folder: Path, model: HookedRecurrent, pieces: Pieces | None = None) -> Estimate:
    """Measure the pieces, unless they are given, and multiply. Cost: a few forwards and optimizer steps."""
    left = [task for task in make_tasks(config) if not is_done(folder, task)]
    kinds = Counter(task.kind for task in left)
    pieces = pieces or measure(config, model)
    size = _sae_bytes(config, model)
    return Estimate(
        pieces=pieces,
        tasks=kinds,
        seconds=sum(_seconds(task, config, pieces) for task in left),
        memory=_memory(config, model, max(size.values())),
        disk=_disk(left, config, size),
        free=shutil.disk_usage(_existing(folder)).free,
    )


def measure(config: ReproduceConfig, model: HookedRecurrent) -> Pieces:
    """Time one forward, one optimizer step and edited rows."""
    layer, head = config.layers[0], config.heads[0]
    shape = model.cfg.layer(layer)
    tokens = torch.randint(0, model.cfg.d_vocab, (1, config.context_size), device=model.cfg.device)
    session = model.edit_session(tokens)
    t = config.context_size // 2
    rows = [WriteEdit(layer, head, t, torch.ones(shape.K), torch.ones(shape.V)) for _ in range(32)]
    stop = min(t + 32, config.context_size)
    with torch.no_grad():
        forward = _timed(lambda: model(tokens), model)
        token = _timed(lambda: session.run(rows, stop=stop), model) / (len(rows) * (stop - t))
    return Pieces(forward, _timed(_optimizer_step(config, model), model), token)


def _optimizer_step(config: ReproduceConfig, model: HookedRecurrent) -> Callable[[], object]:
    shape = model.cfg.layer(config.layers[0])
    sae_class, config_class = get_sae_training_class(config.architecture)
    fields = {"d_in": shape.K * shape.V, "d_k": shape.K, "d_v": shape.V, "d_sae": config.d_sae, "k": config.k}
    sae = sae_class(config_class.from_dict(fields | {"device": str(model.cfg.device)}))
    optimizer = torch.optim.Adam(sae.parameters(), lr=config.lr)
    batch = torch.randn(config.train_batch_size_tokens, sae.cfg.d_in, device=model.cfg.device)

    def step() -> None:
        inputs = TrainStepInput(batch, {}, None, n_training_steps=0, is_logging_step=False)
        sae.training_forward_pass(inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _timed(run: Callable[[], object], model: HookedRecurrent) -> float:
    """The shortest of three runs after a first one: another job on the machine can stretch any of them."""
    run()
    found = []
    for _ in range(3):
        begin = time.perf_counter()
        run()
        if model.cfg.device.type == "cuda":
            torch.cuda.synchronize(model.cfg.device)
        found.append(time.perf_counter() - begin)
    return min(found)


def _seconds(task: Task, config: ReproduceConfig, pieces: Pieces) -> float:
    if task.kind == "sae":
        sequences = config.training_tokens / config.context_size
        return sequences * pieces.forward + config.training_tokens / config.train_batch_size_tokens * pieces.train_step
    if task.kind in ("report", "atoms"):
        return config.eval_sequences * pieces.forward
    settings = Substitution()
    conditions = sum(len(settings.written(choice)) for choice in settings.atom_choice)
    one = config.eval_sequences * 2 * pieces.forward + conditions * _row_tokens(config, settings) * pieces.token
    return one if task.kind == "substitution" else _OTHER_EVALUATIONS * one


def _row_tokens(config: ReproduceConfig, settings: Substitution) -> float:
    """Tokens that are run for one condition of the substitution test: rows of a batch begin at its first edit, so each
    is up to twice its window, and those that are run to the end begin a third into the sequence."""
    firings = config.n_atoms * config.firings_per_atom
    to_end = min(firings, firings if settings.last_position_firings is None else settings.last_position_firings)
    return (firings - to_end) * 1.5 * (settings.horizon + 1) + to_end * config.context_size * 2 / 3


def _sae_bytes(config: ReproduceConfig, model: HookedRecurrent) -> dict[str, int]:
    """Bytes of an SAE's float32 weights, by variant."""
    shape = model.cfg.layer(config.layers[0])
    sizes = {}
    for variant in {d.variant for d in dictionaries(config)}:
        fields = VARIANTS.get(variant, VARIANTS["WriteSAE"])
        factored = fields["rank"] * (shape.K + shape.V)
        encoder = shape.K * shape.V if fields["encoder"] == "dense" else factored
        decoder = shape.K * shape.V if fields["decoder"] == "flat" else factored
        sizes[variant] = 4 * (config.d_sae * (encoder + decoder + 1) + shape.K * shape.V)
    return sizes


def _memory(config: ReproduceConfig, model: HookedRecurrent, sae: int) -> float:
    weights = sum(p.numel() * p.element_size() for p in model.hf_model.parameters())
    shape = model.cfg.layer(config.layers[0])
    buffered = 10 * config.train_batch_size_tokens * shape.K * shape.V * 4
    logits = _LOGIT_BYTES + 4 * config.context_size * model.cfg.d_vocab * 2
    return weights + max(4 * sae + buffered, logits)  # weights, gradient, two moments of Adam


def _disk(left: list[Task], config: ReproduceConfig, size: dict[str, int]) -> float:
    by_key = {f"{d.key}/sae": size[d.variant] for d in dictionaries(config)}
    kept = sum(by_key.get(task.key, 0) for task in left)
    checkpoints = 2 * 3 * max(size.values())  # the newest two, each with Adam's moments
    conditions = sum(len(Substitution().written(choice)) for choice in Substitution().atom_choice)
    tables = sum(config.n_atoms * config.firings_per_atom * conditions * _TABLE_BYTES for t in left if t.kind != "sae")
    pages = config.dashboards * 100_000 * sum(task.kind == "atoms" for task in left)
    return kept + checkpoints + tables + pages + 5e6


def _existing(folder: Path) -> Path:
    return next(path for path in (folder.resolve(), *folder.resolve().parents) if path.exists())


def _size(n: float) -> str:
    return f"{n / 1e9:.1f} GB" if n >= 1e9 else f"{n / 1e6:.0f} MB"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
