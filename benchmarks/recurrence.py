"""Speed, memory and accuracy of the recurrence: chunked against step by step and against transformers' torch ops.

Run ``python benchmarks/recurrence.py [--quick] [--out folder]``. All ways of doing one thing are timed in turn,
round after round, in one process; times are each way's best, ratios the median over rounds. With one thread the clock
is the process's own CPU time, which other programs on the machine disturb least; with more it is the wall's. Memory is
the growth of the peak resident size of a separate process, read from Linux's /proc, since Python cannot see torch's
allocations.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from recurrences import FORMS, random_recurrence
from scan import upstream_of

Way = Callable[[], object]
GROWTH = ("gdn", "kda", "rwkv7")


def timed(ways: dict[str, Way], rounds: int) -> dict[str, dict[str, float]]:
    """Best milliseconds of each way, and its median ratio to the first."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way()
    for _ in range(rounds):
        for name, way in ways.items():
            start = clock()
            way()
            times[name].append(1e3 * (clock() - start))
    first = times[next(iter(ways))]
    return {
        name: {"ms": min(own), "ratio": statistics.median(a / b for a, b in zip(own, first))}
        for name, own in times.items()
    }


def operations(sizes: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Outputs and final state of each form."""
    rows = {}
    for form in FORMS:
        r = random_recurrence(form, **sizes)
        ways: dict[str, Way] = {"chunked": r.scan, "step by step": lambda r=r: r.scan(method="reference")}
        if (op := upstream_of(form, r)) is not None:
            ways["transformers"] = op
        rows[form] = timed(ways, rounds)
    return rows


def training(sizes: dict[str, Any], rounds: int) -> dict[str, Any]:
    """The same with the backward pass, where transformers has an op."""
    rows = {}
    for form in ("gdn", "mamba2"):
        r = random_recurrence(form, **sizes)
        r = r.replace(q=r.q.requires_grad_(), u=r.u.requires_grad_())
        op = upstream_of(form, r)
        assert op is not None

        def backward(way: Way) -> Way:
            return lambda: way()[0].sum().backward(retain_graph=True)  # pyright: ignore[reportIndexIssue]

        with torch.enable_grad():
            rows[form] = timed({"chunked": backward(r.scan), "transformers": backward(op)}, rounds)
    return rows


def states(sizes: dict[str, Any], rounds: int) -> dict[str, Any]:
    """All states of one head over the first touch of their memory, and the response to 16 edits at its first token."""
    rows = {}
    for form in ("gdn", "kda", "rwkv7"):
        r = random_recurrence(form, **sizes)
        # As many tokens as fill 64 MB: the allocator keeps what is much smaller, and its second touch is no first one.
        long = random_recurrence(form, **{**sizes, "T": 2**24 // (r.K * r.V)})
        out = torch.empty(long.B, long.T, 1, long.K, long.V)
        x = torch.randn(16, r.K)
        rows[form] = timed(
            {
                "touching the memory of 64 MB of states": lambda out=out: torch.empty_like(out).fill_(1.0),
                "states of one head, 64 MB": lambda long=long: long.states(0),
                "states of one head": lambda r=r: r.states(0),
                "states, one head step by step": lambda r=r: r.states(0, method="reference"),
                "states, all heads step by step": lambda r=r: r.states(method="reference"),
                "states at 8 positions": lambda r=r: r.states(0, range(r.T // 8 - 1, r.T, r.T // 8)),
                "16 edits propagated": lambda r=r, x=x: r.propagate(x, 0, 0),
                "16 edits step by step": lambda r=r, x=x: r.propagate(x, 0, 0, method="reference"),
            },
            max(rounds // 3, 2),
        )
    return rows


def growth(sizes: dict[str, Any], rounds: int) -> dict[str, dict[int, float]]:
    """Milliseconds of the chunked scan by length."""
    lengths = [sizes["T"] * 2**i for i in range(int(math.log2(16384 / sizes["T"])) + 1)]
    found: dict[str, dict[int, float]] = {}
    for form in GROWTH:
        ways: dict[str, Way] = {
            str(length): random_recurrence(form, **{**sizes, "T": length}).scan for length in lengths
        }
        found[form] = {int(name): row["ms"] for name, row in timed(ways, max(rounds // 5, 2)).items()}
    return found


def accuracy(sizes: dict[str, Any]) -> dict[str, float]:
    """Relative root-mean-square error of the float32 outputs against the float64 reference."""
    found = {}
    for form in FORMS:
        r = random_recurrence(form, **sizes, most_beta=2.0)
        exact = r.replace(q=r.q.double()).outputs(method="reference")
        found[form] = float((r.outputs() - exact).norm() / exact.norm())
    return found


def memory_here(form: str, length: int) -> float:
    """Growth of this process's peak by all states of one head, over the size of the states."""
    torch.set_num_threads(1)
    r = random_recurrence(form, T=length, H=4, K=128, V=128)
    r.states(0, 9)
    r.outputs()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = _kilobytes("VmRSS")
    result = r.states(0)
    return 1024 * (_kilobytes("VmHWM") - before) / (result.numel() * result.element_size())


def _kilobytes(field: str) -> int:
    found = re.search(field + r":\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found.group(1))


def memory(length: int) -> dict[str, float]:
    """Peak over result for all states of one head of 128 x 128, each form in its own process."""
    found = {}
    for form in ("gdn", "kda", "rwkv7"):
        command = [sys.executable, __file__, "--memory-of", form, "--T", str(length)]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found[form] = float(printed.splitlines()[-1])
    return found


def show(title: str, rows: dict[str, dict[str, dict[str, float]]]) -> None:
    """Print milliseconds and, in brackets, the ratio to the first way."""
    print(f"\n{title}")
    for form, row in rows.items():
        for name, value in row.items():
            print(f"  {form:10s} {name:32s} {value['ms']:9.2f} ms   x {value['ratio']:.2f}")


def plot(results: dict[str, Any], path: Path) -> None:
    """Time per form and way, and growth with length."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    sizes, rows = next(iter(results["operations"].items()))
    for i, way in enumerate(("chunked", "transformers", "step by step")):
        places = [j + 0.27 * (i - 1) for j, row in enumerate(rows.values()) if way in row]
        left.bar(places, [row[way]["ms"] for row in rows.values() if way in row], 0.25, label=way)
    left.set(yscale="log", ylabel="ms", title=f"outputs and final state, {sizes}")
    left.set_xticks(range(len(rows)), list(rows))
    left.legend()
    for form, line in results["growth"].items():
        right.loglog(list(line), list(line.values()), "o-", label=form)
    right.set(xlabel="tokens", ylabel="ms", title="chunked, by length")
    right.legend()
    figure.savefig(path, dpi=150)


def measure(T: int, widths: list[int], rounds: int) -> dict[str, Any]:
    """Everything, for heads of each width and one sequence of four heads."""
    results: dict[str, Any] = {"T": T, "threads": torch.get_num_threads(), "torch": torch.__version__}
    for part in ("operations", "training", "states"):
        results[part] = {}
    for width in widths:
        sizes: dict[str, Any] = {"T": T, "H": 4, "K": width, "V": width}
        label = f"T = {T}, 4 heads {width} x {width}"
        for part, function in (("operations", operations), ("training", training), ("states", states)):
            results[part][label] = function(sizes, rounds)
            show(f"{part}: {label}", results[part][label])
    sizes: dict[str, Any] = {"T": T, "H": 4, "K": widths[-1], "V": widths[-1]}
    results["growth"] = growth(sizes, rounds)
    results["accuracy"] = accuracy(sizes)
    results["memory"] = memory(T)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--T", type=int, default=1024)
    parser.add_argument("--quick", action="store_true", help="heads of 64 x 64 only, few rounds")
    parser.add_argument("--out", type=Path, help="folder for recurrence.json and recurrence.png")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        print(memory_here(options.memory_of, options.T))
        return
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    with torch.no_grad():
        results = measure(options.T, [64] if options.quick else [64, 128], 4 if options.quick else 15)
    print("\nmilliseconds of the chunked scan by length")
    for form, line in results["growth"].items():
        print(f"  {form:10s} " + "  ".join(f"{length}: {ms:.1f}" for length, ms in line.items()))
    print("\nfloat32 outputs, relative rms error against the float64 reference")
    print("  " + "  ".join(f"{form} {error:.1e}" for form, error in results["accuracy"].items()))
    print("\npeak memory of all states of one head of 128 x 128, over the result's size")
    print("  " + "  ".join(f"{form} {ratio:.3f}" for form, ratio in results["memory"].items()))
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "recurrence.json").write_text(json.dumps(results, indent=2))
        plot(results, options.out / "recurrence.png")


if __name__ == "__main__":
    main()
