"""The training loop of the embedded models: deterministic given a seed, and resumable to the bit.

Optimiser, measured on one CPU thread with the Gated DeltaNet model and 1 M tokens (held-out perplexity):
AdamW on everything, 8 windows a step, 55; Muon on the hidden matrices 50; the same with 4 windows a step 43.
Orthogonalising the updates costs 3 % of the time here.
"""

import math
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

import torch
from embedded_data import Windows
from embedded_family import Family
from embedded_memory import HeadMemory, head_memories, share_of_long_memory
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

# A matrix with fewer rows or columns than this is a set of vectors (one per head): AdamW, not Muon.
_SMALLEST_MUON_SIDE = 16


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result of a run, apart from the text."""

    family: str
    tokens: int
    """Training tokens; rounded down to whole steps."""
    seed: int = 0
    batch: int = 4
    """Windows per step."""
    length: int = 512
    """Tokens per window; long, so that memory over a distance is worth having."""
    learning_rate: float = 2e-3
    """Peak rate of AdamW: embedding, vectors, small matrices."""
    muon_factor: float = 2.0
    """Rate of the hidden matrices over `learning_rate` (updates scaled to AdamW's size)."""
    gate_factor: float = 0.1
    """Rate of the decay gates over `learning_rate`. At 1, mean decays fell to 0.26-0.91 in an earlier model."""
    weight_decay: float = 0.1
    """Matrices only."""
    warm_up: float = 0.03
    """Share of the steps; then a cosine down to `final_rate`."""
    final_rate: float = 0.05
    clip: float = 1.0

    @property
    def steps(self) -> int:
        return self.tokens // (self.batch * self.length)

    def rate(self, step: int) -> float:
        """Learning rate of `step`, as a share of the peak."""
        warm = max(1, round(self.warm_up * self.steps))
        if step < warm:
            return (step + 1) / warm
        progress = (step - warm) / max(1, self.steps - warm)
        return self.final_rate + (1 - self.final_rate) * (1 + math.cos(math.pi * progress)) / 2


def build_optimizers(model: nn.Module, family: Family, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """AdamW for embedding, vectors and gates; Muon for the hidden matrices (needs torch 2.9)."""
    gates, hidden, matrices, vectors = [], [], [], []
    for name, parameter in model.named_parameters():
        if name.endswith(family.gates):
            gates.append(parameter)
        elif parameter.ndim != 2:
            vectors.append(parameter)
        elif "embed" in name or min(parameter.shape) < _SMALLEST_MUON_SIDE:
            matrices.append(parameter)
        else:
            hidden.append(parameter)
    adamw = torch.optim.AdamW(
        [
            {"params": matrices, "factor": 1.0, "weight_decay": recipe.weight_decay},
            {"params": vectors, "factor": 1.0, "weight_decay": 0.0},
            {"params": gates, "factor": recipe.gate_factor, "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
        fused=True,
    )
    muon = torch.optim.Muon(hidden, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw")
    muon.param_groups[0]["factor"] = recipe.muon_factor
    return [adamw, muon]


class Run:
    """One training run, its checkpoint and its log. `folder` holds `checkpoint.pt` and `train.log`."""

    def __init__(self, recipe: Recipe, family: Family, model: PreTrainedModel, stream: Tensor, folder: Path) -> None:
        if recipe.steps < 1:
            raise ValueError(f"{recipe.tokens} tokens are less than one step of {recipe.batch} x {recipe.length}")
        folder.mkdir(parents=True, exist_ok=True)
        self.recipe, self.family, self.model, self.folder = recipe, family, model, folder
        self.windows = Windows(stream, recipe.length, recipe.seed)
        self.optimizers = build_optimizers(model, family, recipe)
        self.step = 0

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint.pt"

    def save(self) -> None:
        """Write the checkpoint aside, then rename: an interruption leaves the old one whole."""
        aside = self.checkpoint.with_suffix(".tmp")
        state = {
            "recipe": asdict(self.recipe),
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        torch.save(state, aside)
        os.replace(aside, self.checkpoint)

    def resume(self) -> bool:
        """Load the checkpoint if there is one; refuse one of another recipe."""
        if not self.checkpoint.exists():
            return False
        state = torch.load(self.checkpoint, weights_only=True)
        here = asdict(self.recipe)
        differing = [
            f"{key}: {state['recipe'].get(key)!r}, now {here[key]!r}"
            for key in here
            if state["recipe"].get(key) != here[key]
        ]
        if differing:
            raise ValueError(
                f"{self.checkpoint} belongs to another recipe ({'; '.join(differing)}); "
                "give another --run folder, or delete it"
            )
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step = state["step"]
        return True

    def train(self, until: int, probe: Tensor, log_every: int = 20, save_every: int = 200) -> None:
        """Train up to step `until`, logging loss, speed and (on `probe` [B, T]) the decays of every head."""
        with (self.folder / "train.log").open("a", encoding="utf-8") as log:
            for loss, speed in self._steps(until):
                last = self.step == until
                if self.step % log_every == 0 or last:
                    tokens = self.step * self.recipe.batch * self.recipe.length
                    _write(
                        log,
                        f"step {self.step}/{self.recipe.steps} tokens {tokens} loss {loss:.4f} tokens/s {speed:.0f}",
                    )
                if self.step % save_every == 0 or last:
                    _write(log, describe_memory(self.memory(probe)))
                    self.save()

    def memory(self, probe: Tensor) -> list[HeadMemory]:
        """Decay, write strength and half-life of every head on tokens [B, T]; horizon T / 2."""
        return head_memories(self.family.transitions(self.model, probe), probe.shape[1] // 2, stride=8)

    def _steps(self, until: int) -> Iterator[tuple[float, float]]:
        """Make steps; yields loss (nats per token) and tokens per second since the start."""
        began, first = time.monotonic(), self.step
        with self.family.training_recurrence():
            while self.step < until:
                loss = self._one_step()
                self.step += 1
                tokens = (self.step - first) * self.recipe.batch * self.recipe.length
                yield loss, tokens / (time.monotonic() - began)

    def _one_step(self) -> float:
        rate = self.recipe.learning_rate * self.recipe.rate(self.step)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * group["factor"]
        batch = self.windows.batch(self.step, self.recipe.batch)
        with torch.autocast("cpu", torch.bfloat16):
            logits = self.model(batch[:, :-1], use_cache=False).logits
        loss = cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.item()


def describe_memory(table: list[HeadMemory]) -> str:
    """One log line: decay / write strength / half-life of every head, layers separated by bars."""
    layers: dict[int, list[str]] = {}
    for row in table:
        layers.setdefault(row.layer, []).append(f"{row.decay:.3f}/{row.write:.2f}/{row.half_life:.0f}")
    heads = " | ".join(" ".join(row) for row in layers.values())
    return f"memory: {share_of_long_memory(table):.2f} of the heads at 16 tokens or more; {heads}"


def _write(log: TextIO, line: str) -> None:
    log.write(line + "\n")
    log.flush()
    print(line, flush=True)
