"""What edited runs cost: the substitution test, edits at many positions, and dense writes.

Run `python benchmarks/substitution.py`. All figures are ratios: the ways that are compared take turns, round after
round, and count the CPU time of one thread; the median of the ratios is printed.

The substitution test is compared with the plain way, one full forward per condition: hook the write, run the whole
sequence, compare. Both write the same matrices at the same positions and measure the same KLs; the largest difference
of KL is printed. Deletions at many positions are compared with one batch that begins at the first of them, and with
nnsight, where `--nnsight` names the Python of an environment that has it. Dense writes are compared with a loop over
tokens that adds a write as K terms of rank 1.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, get_args
from unittest.mock import patch

import numpy as np
import torch
import transformers
from matplotlib.figure import Figure
from sae_lens.saes.sae import SAEMetadata

from hookpoints import HookedRecurrent, Recurrence, WriteEdit, embedded
from hookpoints.edits import session as sessions
from hookpoints.recurrence import dense
from sae_lens_writesae.sae import WriteTopKSAE, WriteTopKSAEConfig
from writesae.experiment.lab import Site, Trial
from writesae.experiment.readout import divergences
from writesae_study.experiment.bench import Bench
from writesae_study.experiment.conditions import DIRECTIONS, Scale, conditions
from writesae_study.experiment.readout import kl_metrics

HORIZON = 16


class Case(NamedTuple):
    """A model and the head that is edited."""

    label: str
    lab: Bench
    """On one sequence of T tokens."""


class Timing(NamedTuple):
    """Seconds of CPU time per condition, and how many times faster than a full forward; medians over rounds."""

    full: float
    window: float  # batched, each row run over t..t+16
    to_end: float  # batched, each row run to the last token
    window_gain: float
    to_end_gain: float
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
        lab = Bench(model, {"": no_dictionary(model, layer)}, tokens)
        made.append(Case(f"{label}, layer {layer} of {model.cfg.n_layers}, T = {n_tokens}", lab))
    return made


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
    table = lab.read(site, trials, kl_metrics, None if to_end else HORIZON + 1)
    return table["kl_window"].to_numpy(float).reshape(len(edits), len(positions))


@torch.no_grad()
def one_by_one(lab: Bench, edits: list[WriteEdit]) -> list[float]:
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
def timing(lab: Bench, n_firings: int, n_full: int, rounds: int) -> Timing:
    """Time the three ways in turn, `rounds` times."""
    last = lab.tokens.shape[1] - 1 - HORIZON
    positions = torch.linspace(1, last, n_firings).long().tolist()
    table = edits_for(lab, lab.site(0), positions)
    rows = [(c, n) for c in range(len(table)) for n in range(n_firings)]
    some = [rows[i] for i in torch.linspace(0, len(rows) - 1, n_full).long().tolist()]
    seconds: dict[str, list[float]] = {"full": [], "window": [], "to_end": []}
    kl = full = np.zeros((0, 0))
    for _ in range(rounds):
        clock = time.process_time()
        full = np.array(one_by_one(lab, [table[c][n] for c, n in some]))
        seconds["full"].append((time.process_time() - clock) / len(some))
        clock = time.process_time()
        kl = batched(lab, positions, to_end=False)
        seconds["window"].append((time.process_time() - clock) / len(rows))
        few = positions[:: max(1, n_firings // 4)]  # long runs: a few firings, over the whole sequence, tell enough
        clock = time.process_time()
        batched(lab, few, to_end=True)
        seconds["to_end"].append((time.process_time() - clock) / (len(few) * len(table)))
    same = np.array([kl[c, n] for c, n in some])
    moved = full > 1e-9
    gap = float(np.abs(same - full)[moved].max(initial=0) / full[moved].max(initial=1e-9))
    median = {name: statistics.median(values) for name, values in seconds.items()}
    gains = {name: median_ratio(seconds["full"], seconds[name]) for name in ("window", "to_end")}
    return Timing(median["full"], median["window"], median["to_end"], gains["window"], gains["to_end"], gap)


def median_ratio(slow: list[float], fast: list[float]) -> float:
    """How many times faster, median over rounds."""
    return statistics.median(a / b for a, b in zip(slow, fast))


def in_turn(ways: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each way, round after round; the first round warms up and does not count."""
    return {
        name: list(of_way[1:])
        for name, of_way in zip(ways, zip(*[[way() for way in ways.values()] for _ in range(rounds + 1)]))
    }


def timed(work: Callable[[], object]) -> Callable[[], float]:
    def run() -> float:
        clock = time.process_time()
        work()
        return time.process_time() - clock

    return run


_NNSIGHT = """
import sys, time, torch, nnsight
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(1)
folder, layer, head, file = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
traced = nnsight.TransformersModel(model, task="text-generation", tokenizer=tokenizer)
tokens, positions = torch.load(file)
rows = torch.arange(len(positions))
for line in sys.stdin:
    clock = time.process_time()
    with torch.no_grad(), traced.trace(tokens.expand(len(rows), -1), use_cache=False):
        op = traced.get(f"model.layers.{layer}.linear_attn").source.torch_chunk_gated_delta_rule_0
        op.inputs[0][2][rows, positions, head] = 0
        logits = traced.output.logits.save()
    print(time.process_time() - clock, flush=True)
    torch.save(logits[:, positions[0] :], file + ".logits")
"""
"""What nnsight takes for deletions at many positions, one row each: seconds for every line that it is given."""


@contextmanager
def nnsight(python: str, tokens: torch.Tensor, positions: list[int], folder: Path) -> Iterator[Callable[[], float]]:
    """The seconds of one run of nnsight in another interpreter, which takes turns with this one."""
    file = folder / "nnsight.pt"
    torch.save((tokens, torch.tensor(positions)), file)
    command = [python, "-c", _NNSIGHT, str(embedded.path()), "2", "1", str(file)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None

        def run() -> float:
            process.stdin.write("\n")  # type: ignore[union-attr]
            process.stdin.flush()  # type: ignore[union-attr]
            return float(process.stdout.readline())  # type: ignore[union-attr]

        yield run
        process.stdin.close()


@torch.no_grad()
def many_positions(n_tokens: int, n: int, rounds: int, python: str | None, folder: Path) -> dict[str, float]:
    """Deletions at ``n`` positions of the embedded model's text, one row each, to the end of the text: how many times
    faster than from the first position, and than nnsight; and the largest difference of logits from each."""
    model = HookedRecurrent.from_pretrained("embedded", device="cpu")
    tokens = model.to_tokens(embedded.text("test")[: 8 * n_tokens])[:, :n_tokens]
    positions = torch.linspace(1, n_tokens - 1, n).long().tolist()
    rows = [WriteEdit(2, 1, position, mode="delete") for position in positions]
    found: dict[str, torch.Tensor] = {}

    def parted() -> None:
        found["parted"] = model.run_with_edits(tokens, rows).logits

    def together() -> None:
        with patch.object(sessions, "_CALL", {"cpu": 2**62}), patch.object(sessions, "_ROOM", {}):
            found["together"] = model.run_with_edits(tokens, rows).logits

    ways = {"parted": timed(parted), "together": timed(together)}
    if python is None:
        seconds = in_turn(ways, rounds)
    else:
        with nnsight(python, tokens, positions, folder) as run:
            seconds = in_turn({**ways, "nnsight": run}, rounds)
        found["nnsight"] = torch.load(folder / "nnsight.pt.logits")
    result = {"seconds": statistics.median(seconds["parted"])}
    for other in seconds.keys() - {"parted"}:
        result[f"share_of_{other}"] = 1 / median_ratio(seconds[other], seconds["parted"])
        result[f"gap_{other}"] = float((found[other] - found["parted"]).abs().max())
    return result


def by_terms(r: Recurrence, writes: torch.Tensor) -> object:
    """Dense writes as a loop over tokens has them, K terms of rank 1 each."""
    rows = torch.eye(r.K).expand(*writes.shape[:3], -1, -1)
    return r.with_write(rows, writes).scan(method="reference")


@torch.no_grad()
def dense_writes(size: int, n_tokens: int, rounds: int) -> dict[str, float]:
    """How many times faster every write of one Gated DeltaNet head is replaced than in a loop over tokens: by any
    matrix, and by k atoms whose factors are given."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    k, beta = torch.nn.functional.normalize(normal(1, n_tokens, 1, size), dim=-1), normal(1, n_tokens, 1).sigmoid()
    log_decay = -0.1 * normal(1, n_tokens, 1).abs()
    r = Recurrence(normal(1, n_tokens, 1, size), k, normal(1, n_tokens, 1, size), log_decay, b=k, beta=beta)
    writes = normal(1, n_tokens, 1, size, size)
    ways = {
        "loop": timed(lambda: by_terms(r, writes)),
        "dense": timed(lambda: dense.scan_with(r, lambda *at: writes[at])),
    }
    for atoms in (4, 32):
        sides = normal(1, n_tokens, 1, atoms, size), normal(1, n_tokens, 1, atoms, size)
        ways[f"k {atoms}"] = timed(lambda sides=sides: r.with_write(*sides).scan())
    seconds = in_turn(ways, rounds)
    return {name: median_ratio(seconds["loop"], of_way) for name, of_way in seconds.items() if name != "loop"}


def measure(
    n_tokens: int = 512,
    n_firings: int = 24,
    n_full: int = 20,
    rounds: int = 3,
    n_positions: int = 64,
    nnsight_python: str | None = None,
    folder: Path = Path("."),
) -> dict[str, Any]:
    """All figures: `substitution` by model (fields of `Timing`), `positions`, `dense` by size and tokens."""
    lengths = sorted({min(128, n_tokens), n_tokens})
    timings = {case.label: timing(case.lab, n_firings, n_full, rounds)._asdict() for t in lengths for case in cases(t)}
    return {
        "substitution": timings,
        "positions": many_positions(n_tokens, n_positions, rounds, nnsight_python, folder),
        "dense": {f"{n}x{n}, T = {t}": dense_writes(n, t, rounds) for n in (32, 64, 128) for t in lengths},
    }


def draw(timings: dict[str, Timing], path: Path) -> None:
    """Conditions per second of the three ways."""
    figure = Figure(figsize=(8, 1.2 + 1.1 * len(timings)), layout="constrained")
    axes = figure.add_subplot()
    ways = {"one full forward each": "full", "batched, to the last token": "to_end", "batched, t..t+16": "window"}
    colors = ("#98a2ad", "#7fb0ff", "#1d5fd1")
    for i, timed in enumerate(timings.values()):
        for j, ((way, field), color) in enumerate(zip(ways.items(), colors)):
            rate, y = 1 / getattr(timed, field), i + 0.26 * (j - 1)
            axes.barh(y, rate, 0.24, color=color, label=way if i == 0 else None)
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
    parser.add_argument("--positions", type=int, default=64, help="deletions of one run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--nnsight", help="a Python that can import nnsight")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--out", type=Path, help="folder for substitution.json and substitution.png")
    options = parser.parse_args()
    if options.quick:
        options.tokens, options.firings, options.full, options.rounds, options.positions = 64, 2, 2, 1, 8
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    with TemporaryDirectory() as folder:
        found = measure(
            options.tokens,
            options.firings,
            options.full,
            options.rounds,
            options.positions,
            options.nnsight,
            Path(folder),
        )
    print(f"conditions per second of CPU time, {options.firings} firings of 20 conditions")
    print(f"{'':48s} {'full':>8s} {'to end':>8s} {'window':>8s} {'gain':>7s} {'KL gap':>9s}")
    timings = {label: Timing(**timed) for label, timed in found["substitution"].items()}
    for label, t in timings.items():
        rates = f"{1 / t.full:8.1f} {1 / t.to_end:8.1f} {1 / t.window:8.1f}"
        print(f"{label:48s} {rates} {t.window_gain:6.1f}x {t.largest_gap:9.1e}")
    print(f"deletions at {options.positions} positions:", found["positions"])
    print("every write replaced, times faster than a loop over tokens:")
    for label, gains in found["dense"].items():
        print(f"{label:20s}", {name: round(gain, 1) for name, gain in gains.items()})
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "substitution.json").write_text(json.dumps(found, indent=2))
        draw(timings, options.out / "substitution.png")


if __name__ == "__main__":
    main()
