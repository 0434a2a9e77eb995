"""What edited runs cost: the substitution test, beside a full forward for each condition.

Both ways write the same matrices at the same positions and measure the same KLs; the largest difference of KL is in the
record. They take turns, round after round.
"""

from __future__ import annotations

import statistics
import sys
import time
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from frame import Line, main
from hooks import qwen
from sae_lens.saes.sae import SAEMetadata

from hookpoints import HookedRecurrent, WriteEdit, embedded
from sae_lens_writesae.sae import WriteTopKSAE, WriteTopKSAEConfig
from writesae.experiment.lab import Site, Trial
from writesae.experiment.readout import divergences
from writesae_study.experiment.bench import Bench
from writesae_study.experiment.conditions import DIRECTIONS, Scale, conditions
from writesae_study.experiment.readout import kl_window

TITLE = "Edited runs"
QUICK = {"n_tokens": 64, "n_firings": 2, "n_full": 2, "rounds": 1}
HORIZON = 16
GOALS = {"T = 512": 30.0, "T = 128": 15.0}
"""The least gain."""


class Timing(NamedTuple):
    """Seconds of CPU time per condition, and how many times faster than a full forward; medians over rounds."""

    full: float
    window: float  # batched, each row run over t..t+16
    to_end: float  # batched, each row run to the last token
    window_gain: float
    to_end_gain: float
    largest_gap: float  # of KL between the full forward and the batched window, relative


def benches(n_tokens: int) -> dict[str, Bench]:
    """The embedded model on its own text, and a random model with 8 layers; an upper-middle layer of each."""
    small = HookedRecurrent.from_pretrained("embedded", device="cpu")
    text = small.to_tokens(embedded.text("test")[: 8 * n_tokens])[:, :n_tokens]
    large = HookedRecurrent.from_hf(qwen(8, 512, 8, 64))
    noise = torch.randint(0, 4096, (1, n_tokens), generator=torch.Generator().manual_seed(0))
    return {
        f"{label}, layer {layer} of {model.cfg.n_layers}, T = {n_tokens}": Bench(
            model, {"": no_dictionary(model, layer)}, tokens
        )
        for label, model, tokens, layer in (
            ("embedded", small, text, 2),
            ("Qwen3.5-shaped, 8 layers", large, noise, 4),
        )
    }


def no_dictionary(model: HookedRecurrent, layer: int) -> WriteTopKSAE:
    """A dictionary that only names head 1 of a layer; its atoms are not used."""
    shape = model.cfg.layer(layer)
    hook = SAEMetadata(hook_name=f"blocks.{layer}.mixer.heads.1.hook_write_vec")
    return WriteTopKSAE(WriteTopKSAEConfig(d_in=shape.K * shape.V, d_k=shape.K, d_sae=2, k=1, metadata=hook))


def edits_for(lab: Bench, site: Site, positions: list[int]) -> list[list[WriteEdit]]:
    """The 20 conditions of each firing. Atoms and controls are random directions, which take as much time."""
    native = site.at(positions)
    generator = torch.Generator().manual_seed(0)
    atom, *controls = (native.random_like(generator) for _ in range(1 + len(DIRECTIONS)))
    directions = dict(zip(DIRECTIONS, controls))
    listed = conditions(native, atom, directions, get_args(Scale))
    return [[lab.replace(t, each.written, n) for n, t in enumerate(positions)] for each in listed]


def batched(lab: Bench, positions: list[int], to_end: bool) -> np.ndarray:
    """KLs [C,N] (mean over the window) by the batched test, its plain pass included."""
    site = lab.site(0)
    edits = edits_for(lab, site, positions)
    trials = [Trial({}, position, edit) for of_condition in edits for position, edit in zip(positions, of_condition)]
    table = lab.read(site, trials, kl_window, None if to_end else HORIZON + 1)
    return table["kl"].to_numpy(float).reshape(len(edits), len(positions))


def one_by_one(lab: Bench, edits: list[WriteEdit]) -> list[float]:
    """The same KLs by a full forward each."""
    native = lab.model(lab.tokens)[0]
    values: list[float] = []
    for edit in edits:
        assert edit.position is not None
        with lab.model.edits(edit):
            patched = lab.model(lab.tokens)[0]
        window = torch.arange(edit.position, edit.position + HORIZON + 1)[None]
        values.append(float(divergences(native, window, patched[window]).forward.mean()))
    return values


def timing(lab: Bench, n_firings: int, n_full: int, rounds: int) -> Timing:
    """Time the three ways in turn, `rounds` times."""
    last = lab.tokens.shape[1] - 1 - HORIZON
    positions = torch.linspace(1, last, n_firings).long().tolist()
    edits = edits_for(lab, lab.site(0), positions)
    # The full forward is timed on some of the conditions and firings, spread evenly.
    rows = [(c, n) for c in range(len(edits)) for n in range(n_firings)]
    some = [rows[i] for i in torch.linspace(0, len(rows) - 1, n_full).long().tolist()]
    few = positions[:: max(1, n_firings // 4)]  # long runs: a few firings, over the whole sequence, tell enough
    seconds: dict[str, list[float]] = {"full": [], "window": [], "to_end": []}
    kl = full = np.zeros((0, 0))
    for _ in range(rounds):
        clock = time.process_time()
        full = np.array(one_by_one(lab, [edits[c][n] for c, n in some]))
        seconds["full"].append((time.process_time() - clock) / len(some))
        clock = time.process_time()
        kl = batched(lab, positions, to_end=False)
        seconds["window"].append((time.process_time() - clock) / len(rows))
        clock = time.process_time()
        batched(lab, few, to_end=True)
        seconds["to_end"].append((time.process_time() - clock) / (len(few) * len(edits)))
    same = np.array([kl[c, n] for c, n in some])
    moved = full > 1e-9
    gap = float(np.abs(same - full)[moved].max(initial=0) / full[moved].max(initial=1e-9))
    gains = [statistics.median(a / b for a, b in zip(seconds["full"], seconds[way])) for way in ("window", "to_end")]
    return Timing(*map(statistics.median, seconds.values()), *gains, gap)


@torch.no_grad()
def measure(n_tokens: int = 512, n_firings: int = 12, n_full: int = 6, rounds: int = 1) -> dict[str, Any]:
    """Fields of `Timing`, by model and length."""
    lengths = sorted({min(128, n_tokens), n_tokens})
    return {
        "substitution": {
            label: timing(lab, n_firings, n_full, rounds)._asdict()
            for length in lengths
            for label, lab in benches(length).items()
        }
    }


def lines(figures: dict[str, Any]) -> list[Line]:
    """Gains over full forwards."""
    return [
        Line(
            f"{label}: edited rows of the substitution test, times as fast as a full forward each",
            row["window_gain"],
            " ×",
            GOALS.get(label.rpartition(", ")[2]),
            least=True,
        )
        for label, row in figures["substitution"].items()
    ]


if __name__ == "__main__":
    main(sys.modules[__name__])
