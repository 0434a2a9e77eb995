"""Speed, memory and accuracy of the recurrence: chunked against step by step and against transformers' torch ops.

All ways of doing one thing are timed in turn, round after round, in one process. Memory is
the growth of the peak resident size of a separate process, read from Linux's /proc, since Python cannot see torch's
allocations.
"""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path
from typing import Any

import torch
from frame import Line, Way, apart, main, rest, timed

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from recurrences import FORMS, random_recurrence
from scan import upstream_of

TITLE = "States of a recurrence"
QUICK = {"tokens": 128, "widths": (64,), "rounds": 3}
GROWTH = ("gdn", "kda", "rwkv7")


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
    return {form: apart(memory_here, form, length) for form in GROWTH}


@torch.no_grad()
def measure(tokens: int = 1024, widths: tuple[int, ...] = (64, 128), rounds: int = 15) -> dict[str, Any]:
    """Everything, for heads of each width and one sequence of four heads."""
    T = tokens
    results: dict[str, Any] = {"T": T, "threads": torch.get_num_threads(), "torch": torch.__version__}
    for part in ("operations", "training", "states"):
        results[part] = {}
    for width in widths:
        sizes: dict[str, Any] = {"T": T, "H": 4, "K": width, "V": width}
        label = f"T = {T}, 4 heads {width} x {width}"
        for part, function in (("operations", operations), ("training", training), ("states", states)):
            results[part][label] = function(sizes, rounds)
    sizes: dict[str, Any] = {"T": T, "H": 4, "K": widths[-1], "V": widths[-1]}
    results["growth"] = growth(sizes, rounds)
    results["accuracy"] = accuracy(sizes)
    results["memory"] = memory(T)
    return results


def lines(found: dict[str, Any]) -> list[Line]:
    """States of one head over the first touch of their memory, and numbers without a goal."""
    name = "states of one head, 64 MB"
    said = [
        Line(f"{size}, {form}: {name} / the first touch of their memory", row[name]["ratio"], goal=1.5)
        for size, forms in found["states"].items()
        for form, row in forms.items()
        if name in row
    ]
    names = {"training": "with the backward pass, time of", "accuracy": "relative error of outputs"}
    names |= {"memory": "peak memory of all states of one head / their size"}
    return said + [line for part, what in names.items() for line in rest({what: found[part]})]


if __name__ == "__main__":
    main(sys.modules[__name__])
