"""How much faster the batched substitution test is than one full forward per condition.

Run `python benchmarks/substitution.py`. Both ways write the same matrices at the same positions of the same sequence
and measure the same KLs, in turn within one process; the largest difference of KL between them is printed. The full
forward is the plain way: hook the write, run the whole sequence, compare, one condition after the other.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
import transformers
from matplotlib.figure import Figure
from sae_lens.saes.sae import SAEMetadata

from hookpoints import HookedRecurrent, WriteEdit, embedded
from sae_lens_writesae.sae import WriteTopKSAE, WriteTopKSAEConfig
from writesae.experiment.conditions import DIRECTIONS, Scale, conditions
from writesae.experiment.lab import Lab, Site, Trial
from writesae.experiment.readout import divergences, kl_metrics

HORIZON = 16


class Case(NamedTuple):
    """A model and the head that is edited."""

    label: str
    lab: Lab
    """On one sequence of T tokens."""


class Timing(NamedTuple):
    """Seconds per condition, median over rounds."""

    full: float
    window: float  # batched, each row run over t..t+16
    to_end: float  # batched, each row run to the last token
    largest_gap: float  # of KL between the full forward and the batched window, relative


def qwen(layers: int, width: int, heads: int, dim: int, **fields: Any) -> torch.nn.Module:
    """A random Qwen3.5-shaped model, three recurrent layers to one of attention, with further fields of its config."""
    shape: dict[str, Any] = {
        "vocab_size": 4096,
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": width // 4,
        "linear_num_key_heads": heads,
        "linear_num_value_heads": heads,
        "linear_key_head_dim": dim,
        "linear_value_head_dim": dim,
    }
    config = transformers.Qwen3_5TextConfig(**shape | fields)
    torch.manual_seed(0)
    return transformers.Qwen3_5ForCausalLM(config).eval()


def cases(n_tokens: int) -> list[Case]:
    """The embedded model on its own text, and a random model with 8 layers; an upper-middle layer of each."""
    small = HookedRecurrent.from_pretrained("embedded", device="cpu")
    text = small.to_tokens(embedded.text("test")[: 8 * n_tokens])[:, :n_tokens]
    large = HookedRecurrent.from_hf(qwen(8, 512, 8, 64))
    noise = torch.randint(0, 4096, (1, n_tokens), generator=torch.Generator().manual_seed(0))
    made = []
    for label, model, tokens, layer in (
        ("embedded", small, text, 2),
        ("Qwen3.5-shaped, 8 layers", large, noise, 4),
    ):
        lab = Lab(model, {"": no_dictionary(model, layer)}, tokens)
        made.append(Case(f"{label}, layer {layer} of {model.cfg.n_layers}, T = {n_tokens}", lab))
    return made


def no_dictionary(model: HookedRecurrent, layer: int) -> WriteTopKSAE:
    """A dictionary that only names head 1 of a layer; its atoms are not used."""
    shape = model.cfg.layer(layer)
    hook = SAEMetadata(hook_name=f"blocks.{layer}.mixer.heads.1.hook_write_vec")
    return WriteTopKSAE(WriteTopKSAEConfig(d_in=shape.K * shape.V, d_k=shape.K, d_sae=2, k=1, metadata=hook))


def edits_for(lab: Lab, site: Site, positions: list[int]) -> list[list[WriteEdit]]:
    """The 20 conditions of each firing. Atoms and controls are random directions, which take as much time."""
    native = site.at(positions)
    generator = torch.Generator().manual_seed(0)
    atom, *controls = (native.random_like(generator) for _ in range(1 + len(DIRECTIONS)))
    directions = dict(zip(DIRECTIONS, controls))
    listed = conditions(native, atom, directions, get_args(Scale))
    return [[lab.replace(t, each.written, n) for n, t in enumerate(positions)] for each in listed]


def batched(lab: Lab, positions: list[int], to_end: bool) -> np.ndarray:
    """KLs [C,N] (mean over the window) by the batched test, its plain pass included."""
    site = lab.site(0)
    edits = edits_for(lab, site, positions)
    trials = [Trial({}, position, edit) for of_condition in edits for position, edit in zip(positions, of_condition)]
    table = lab.read(site, trials, kl_metrics, None if to_end else HORIZON + 1)
    return table["kl_window"].to_numpy(float).reshape(len(edits), len(positions))


@torch.no_grad()
def one_by_one(lab: Lab, edits: list[WriteEdit]) -> list[float]:
    """The same KLs by a full forward each."""
    native = lab.model(lab.tokens)[0]
    values = []
    for edit in edits:
        assert edit.position is not None
        with lab.model.edits(edit):
            patched = lab.model(lab.tokens)[0]
        window = torch.arange(edit.position, edit.position + HORIZON + 1)[None]
        values.append(float(divergences(native, window, patched[window]).forward.mean()))
    return values


@torch.no_grad()
def timing(lab: Lab, n_firings: int, n_full: int, rounds: int) -> Timing:
    """Time the three ways in turn, `rounds` times."""
    last = lab.tokens.shape[1] - 1 - HORIZON
    positions = torch.linspace(1, last, n_firings).long().tolist()
    table = edits_for(lab, lab.site(0), positions)
    rows = [(c, n) for c in range(len(table)) for n in range(n_firings)]
    some = [rows[i] for i in torch.linspace(0, len(rows) - 1, n_full).long().tolist()]
    seconds: dict[str, list[float]] = {"full": [], "window": [], "to_end": []}
    kl = full = np.zeros((0, 0))
    for _ in range(rounds):
        clock = time.perf_counter()
        full = np.array(one_by_one(lab, [table[c][n] for c, n in some]))
        seconds["full"].append((time.perf_counter() - clock) / len(some))
        clock = time.perf_counter()
        kl = batched(lab, positions, to_end=False)
        seconds["window"].append((time.perf_counter() - clock) / len(rows))
        few = positions[:: max(1, n_firings // 4)]  # long runs: a few firings, over the whole sequence, tell enough
        clock = time.perf_counter()
        batched(lab, few, to_end=True)
        seconds["to_end"].append((time.perf_counter() - clock) / (len(few) * len(table)))
    same = np.array([kl[c, n] for c, n in some])
    moved = full > 1e-9
    gap = float(np.abs(same - full)[moved].max(initial=0) / full[moved].max(initial=1e-9))
    median = {name: statistics.median(values) for name, values in seconds.items()}
    return Timing(median["full"], median["window"], median["to_end"], gap)


def draw(timings: dict[str, Timing], path: Path) -> None:
    """Conditions per second of the three ways."""
    figure = Figure(figsize=(8, 1.2 + 1.1 * len(timings)), layout="constrained")
    axes = figure.add_subplot()
    ways = {"one full forward each": "full", "batched, to the last token": "to_end", "batched, t..t+16": "window"}
    colours = ("#98a2ad", "#7fb0ff", "#1d5fd1")
    for i, timed in enumerate(timings.values()):
        for j, ((way, field), colour) in enumerate(zip(ways.items(), colours)):
            rate, y = 1 / getattr(timed, field), i + 0.26 * (j - 1)
            axes.barh(y, rate, 0.24, color=colour, label=way if i == 0 else None)
            axes.text(rate * 1.05, y, f"{rate:.3g}", va="center", fontsize=8)
    axes.set_yticks(range(len(timings)), [label.replace(", ", "\n", 1) for label in timings], fontsize=9)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(0.5 / max(t.full for t in timings.values()), 3 / min(t.window for t in timings.values()))
    axes.set_xlabel("conditions per second (log scale)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--firings", type=int, default=24, help="firings in the sequence, 20 rows each")
    parser.add_argument("--full", type=int, default=20, help="full forwards that are timed per round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--out", type=Path, help="folder for substitution.json and substitution.png")
    options = parser.parse_args()
    if options.quick:
        options.tokens, options.firings, options.full, options.rounds = 64, 2, 2, 1
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    timings: dict[str, Timing] = {}
    for case in cases(options.tokens):
        timings[case.label] = timing(case.lab, options.firings, options.full, options.rounds)
    print(f"conditions per second, {options.firings} firings of 20 conditions, {options.threads} thread(s)")
    print(f"{'':44s} {'full':>8s} {'to end':>8s} {'window':>8s} {'gain':>7s} {'KL gap':>9s}")
    for label, t in timings.items():
        gain = f"{t.full / t.window:6.1f}x"
        print(f"{label:44s} {1 / t.full:8.1f} {1 / t.to_end:8.1f} {1 / t.window:8.1f} {gain:>7s} {t.largest_gap:9.1e}")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "substitution.json").write_text(
            json.dumps({k: t._asdict() for k, t in timings.items()}, indent=2)
        )
        draw(timings, options.out / "substitution.png")


if __name__ == "__main__":
    main()
