"""What a run will cost in time, memory and disk, from a few measured pieces; refused where the disk is too small."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import TrainStepInput

from hookpoints import HookedRecurrent
from sae_lens_writesae.errors import DiskTooSmallError
from sae_lens_writesae.files import free_bytes, size_text
from sae_lens_writesae.sae import WriteTopKTrainingSAEConfig
from sae_lens_writesae.sae.fast import gradients
from writesae.choices import DictionaryName
from writesae.evaluations import EVALUATIONS
from writesae.experiment.evaluation import Scope
from writesae.experiment.traits import sparsity_fields
from writesae.reproduce.config import ReproduceConfig

_ROWS_PER_FIRING = 40
"""Edited rows of a firing in an evaluation: conditions, scales and choices of the atom."""
_TOKENS_PER_ROW = 26
"""Rows of a batch begin at its first edit, so that each is half as long again as its window of 17. A token of such a
row costs about what one of a forward costs."""
_TABLE_BYTES = 120
"""Per edited row in a table, compressed."""
_LOGIT_BYTES = 512e6
"""Float32 logits of one batch of edited rows, as `Lab` bounds them."""


@dataclass(frozen=True)
class Pieces:
    """Measured on this machine, seconds."""

    forward: float
    """One sequence of `context_size` tokens through the model."""
    factored_step: float
    """One optimizer step of a WriteSAE on `train_batch_size_tokens` writes, from their factors."""
    dense_step: float
    """The same on matrices, as states are."""


@dataclass(frozen=True)
class Estimate:
    """What is left of a run."""

    pieces: Pieces
    dictionaries: int
    """To be trained."""
    evaluations: int
    """To be done, of dictionaries and of heads."""
    seconds: float
    """Of one process; divide by the number of processes."""
    memory: float
    """Bytes of the largest step: model, one SAE with its optimizer, the activation buffer, logits of edited rows."""
    disk: float
    """Bytes that are still to be written, checkpoints included."""
    free: float
    """Bytes free where the run's folder is."""

    def check(self) -> None:
        """Raise DiskTooSmallError unless the disk has the room, with a tenth to spare."""
        if 1.1 * self.disk > self.free:
            raise DiskTooSmallError(
                f"the run will write about {size_text(self.disk)}, and {size_text(self.free)} are free; make room, "
                "name another --out, or take fewer layers, heads, seeds or variants"
            )

    def lines(self) -> list[str]:
        """For a person."""
        return [
            f"left    {self.dictionaries} dictionaries to train, {self.evaluations} evaluations",
            f"time    about {_duration(self.seconds)} for one process (measured: forward {self.pieces.forward:.2g} s, "
            f"step of training {self.pieces.factored_step:.2g} s on writes, {self.pieces.dense_step:.2g} s on states)",
            f"memory  about {size_text(self.memory)} a process",
            f"disk    about {size_text(self.disk)} to write, {size_text(self.free)} free",
        ]


def estimate(config: ReproduceConfig, folder: Path, model: HookedRecurrent, pieces: Pieces | None = None) -> Estimate:
    """Measure the pieces, unless they are given, and multiply. Cost: a few forwards and optimizer steps."""
    heads = [folder / f"L{layer}H{head}" for layer in config.layers for head in config.heads]
    names = [name for each in config.dictionaries().values() for name in each]
    to_train = [name for head in heads for name in names if not (head / name / "sae").exists()]
    evaluations = sum(_evaluations_left(config, head) for head in heads)
    together = [layer for layer in config.layers if not (folder / f"L{layer}" / "marks" / "together").exists()]
    evaluations += len(together) * _chosen(config).count(Scope.LAYER) if len(config.heads) > 1 else 0
    evaluations *= 3 if config.control_dictionaries else 1
    pieces = pieces or measure(config, model)
    sizes = {name: _sae_bytes(config, model, DictionaryName.parse(name).variant) for name in names}
    collected = (folder / "collection" / "collected").exists()
    one_pass = 0.0 if collected else config.training_tokens / config.context_size * pieces.forward
    step = {True: pieces.factored_step, False: pieces.dense_step}
    steps = config.training_tokens / config.train_batch_size_tokens
    training = steps * sum(step[DictionaryName.parse(name).on_factors] for name in to_train)
    rows = config.n_atoms * config.firings_per_atom * _ROWS_PER_FIRING
    evaluating = (2 * config.eval_sequences + rows * _TOKENS_PER_ROW / config.context_size) * pieces.forward
    checkpoints = 2 * 3 * max(sizes.values())  # the newest two, each with Adam's moments
    kept = sum(sizes[name] for name in to_train) + (0 if collected else _collection_bytes(config, model, len(heads)))
    written = evaluations * rows * _TABLE_BYTES + len(heads) * config.dashboards * 100_000
    return Estimate(
        pieces=pieces,
        dictionaries=len(to_train),
        evaluations=evaluations,
        seconds=one_pass + training + evaluations * evaluating,
        memory=_memory(config, model, max(sizes.values())),
        disk=kept + checkpoints + written + 5e6,
        free=free_bytes(folder),
    )


def _evaluations_left(config: ReproduceConfig, head: Path) -> int:
    of_each = sum(not (head / "marks" / f"{target}.evaluated").exists() for target in config.targets)
    of_head = not (head / "marks" / "compared").exists()
    return sum(of_each if scope in (Scope.EACH, Scope.LAYER) else of_head for scope in _chosen(config))


def _chosen(config: ReproduceConfig) -> list[Scope]:
    """The scope of each evaluation that is asked for."""
    return [each.scope for kind, each in EVALUATIONS.items() if kind in (config.evaluations or EVALUATIONS)]


def measure(config: ReproduceConfig, model: HookedRecurrent) -> Pieces:
    """Time a forward and optimizer steps."""
    tokens = torch.randint(0, model.cfg.d_vocab, (1, config.context_size), device=model.cfg.device)
    with torch.no_grad():
        forward = _timed(lambda: model(tokens), model)
    on_writes, on_states = (_optimizer_step(config, model, on_factors=each) for each in (True, False))
    return Pieces(forward, _timed(on_writes, model), _timed(on_states, model))


def _optimizer_step(config: ReproduceConfig, model: HookedRecurrent, *, on_factors: bool) -> Callable[[], object]:
    """A step on the factors of writes, where the architecture can, or on matrices."""
    shape = model.cfg.layer(config.layers[0])
    fields = {"d_in": shape.K * shape.V, "d_k": shape.K, "d_v": shape.V, "d_sae": config.d_sae}
    fields |= sparsity_fields(config.architecture, config.k)
    sae_class, config_class = get_sae_training_class(config.architecture)
    sae = sae_class(config_class.from_dict(fields | {"device": str(model.cfg.device)}))
    stacked = {name: torch.nn.Parameter(x.data[None]) for name, x in sae.named_parameters()}
    as_factors = on_factors and config.architecture == "writesae_topk"
    optimizer = torch.optim.Adam(list(stacked.values()) if as_factors else sae.parameters(), lr=config.lr)
    rows = 1, config.train_batch_size_tokens, 1
    keys, values = (torch.randn(*rows, size, device=model.cfg.device) for size in (shape.K, shape.V))
    batch = (keys[0].mT @ values[0]).flatten(1)

    def on_pairs() -> None:
        gradients(stacked, keys, values, [config.k], cast(WriteTopKTrainingSAEConfig, sae.cfg))
        optimizer.step()

    def step() -> None:
        coefficients = dict.fromkeys(sae.get_coefficients(), 1.0)
        inputs = TrainStepInput(batch, coefficients, None, n_training_steps=0, is_logging_step=False)
        sae.training_forward_pass(inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return on_pairs if as_factors else step


def _timed(run: Callable[[], object], model: HookedRecurrent) -> float:
    """The shorter of two runs after a first one: another job on the machine can stretch either."""
    run()
    found = []
    for _ in range(2):
        begin = time.perf_counter()
        run()
        if model.cfg.device.type == "cuda":
            torch.cuda.synchronize(model.cfg.device)
        found.append(time.perf_counter() - begin)
    return min(found)


def _sae_bytes(config: ReproduceConfig, model: HookedRecurrent, variant: str) -> int:
    """Bytes of an SAE's float32 weights. One with as many parameters as the WriteSAE has as many bytes."""
    from sae_lens_writesae.choices import VARIANTS

    shape = model.cfg.layer(config.layers[0])
    fields = VARIANTS.get(variant, VARIANTS["WriteSAE"])
    factored = fields["rank"] * (shape.K + shape.V)
    encoder = shape.K * shape.V if fields["encoder"] == "dense" else factored
    decoder = shape.K * shape.V if fields["decoder"] == "flat" else factored
    return 4 * (config.d_sae * (encoder + decoder + 1) + shape.K * shape.V)


def _collection_bytes(config: ReproduceConfig, model: HookedRecurrent, n_heads: int) -> float:
    """Factors in a dtype of two bytes: those of writes, and for states queries, decays and erases."""
    shape = model.cfg.layer(config.layers[0])
    vectors = shape.K + shape.V + (0 if set(config.targets) == {"write"} else 3 * shape.K)
    return config.training_tokens * n_heads * 2 * vectors


def _memory(config: ReproduceConfig, model: HookedRecurrent, sae: int) -> float:
    weights = sum(p.numel() * p.element_size() for p in model.hf_model.parameters())
    shape = model.cfg.layer(config.layers[0])
    buffered = 10 * config.train_batch_size_tokens * shape.K * shape.V * 4
    logits = _LOGIT_BYTES + 4 * config.context_size * model.cfg.d_vocab * 2
    return weights + max(4 * sae + buffered, logits)  # weights, gradient, two moments of Adam


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
