"""Each family's chunked scan: against the step-by-step reference, against upstream's torch op, and by length.

Run ``python benchmarks/families.py [--out docs]``. Ways of doing one thing are timed in turn, round after round, in one
process (``recurrence.timed``); ratios are medians over rounds, times minima. Before an upstream op is timed, its
outputs must be the chunked scan's. ``--out`` gets the page, benchmarks.md, and its numbers, benchmarks.json; then
``python scripts/pictures.py growth.png`` draws its picture.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from recurrence import Way, timed, upstream
from torch import Tensor, nn
from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

from hookpoints.recurrence import Recurrence

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from recurrences import random_recurrence

FAMILIES = {
    "Gated DeltaNet": "gdn",
    "DeltaNet": "deltanet",
    "Kimi delta attention": "kda",
    "GLA, HGRN2": "gla",
    "Mamba-2, SimpleGLA": "mamba2",
    "Lightning, RetNet": "lightning",
    "RWKV-6": "rwkv6",
    "RWKV-7": "rwkv7",
    "Comba": "comba",
    "Gated DeltaProduct, R = 2": "gated_deltaproduct",
}
"""Families by name; the forms are those of ``hookpoints.recurrence.examples``, and one with a constant decay."""
LENGTHS = [256 * 2**i for i in range(7)]
LAST = 4
"""Lengths that the slope is taken over: the shorter ones are mostly overhead."""


def recurrence_of(form: str, sizes: dict[str, int]) -> Recurrence:
    """A random recurrence of a family's form."""
    r = random_recurrence("mamba2" if form == "lightning" else form, **sizes)
    if form == "mamba2":
        return r.replace(scale=1.0)  # as upstream's op reads
    if form != "lightning":
        return r
    rate = _lightning(r).slope_rate[:, 0, 0]  # as MiniMax has it: one constant per head, and no scale on q
    return r.replace(log_decay=-rate.expand(r.B, r.T, r.H), scale=1.0)


def upstream_of(form: str, r: Recurrence) -> Way | None:
    """Upstream's torch code on the same factors, where there is some."""
    return _minimax(r) if form == "lightning" else upstream(form, r)


class _Gives(nn.Module):
    """Stands in for a projection and gives one tensor, whatever comes in."""

    def __init__(self, value: Tensor):
        super().__init__()
        self.value = value

    def forward(self, _x: Tensor) -> Tensor:
        return self.value


def _lightning(r: Recurrence) -> MiniMaxLightningAttention:
    types = ["linear_attention", "full_attention"]
    config = transformers.MiniMaxConfig(
        hidden_size=r.H * r.K, num_attention_heads=r.H, head_dim=r.K, num_hidden_layers=2, layer_types=types
    )
    return MiniMaxLightningAttention(config, layer_idx=0)


def _minimax(r: Recurrence) -> Way:
    """MiniMax writes its recurrence out inside the layer's forward: that forward, its projections taken out."""
    layer = _lightning(r)
    layer.qkv_proj = _Gives(torch.cat([r.q, r.k, r.u], -1).flatten(2))
    layer.act_fn, layer.norm, layer.out_proj = nn.Identity(), nn.Identity(), nn.Identity()
    layer.output_gate = _Gives(torch.tensor(torch.inf))
    hidden: Any = torch.empty(r.B, r.T, r.H * r.K)

    def run() -> tuple[Tensor, Any]:
        outputs, state = layer(hidden, None, None)
        return outputs.unflatten(-1, (r.H, r.V)), state

    return run


def operations(sizes: dict[str, int], rounds: int) -> dict[str, dict[str, dict[str, float]]]:
    """Outputs and final state of each family, chunked first."""
    rows = {}
    for family, form in FAMILIES.items():
        r = recurrence_of(form, sizes)
        ways: dict[str, Way] = {"chunked": r.scan, "step by step": lambda r=r: r.scan(method="reference")}
        if (op := upstream_of(form, r)) is not None:
            found, expected = op()[0], r.outputs()  # pyright: ignore[reportIndexIssue]
            off = float((found - expected).norm() / expected.norm())
            if not off < 1e-4:
                raise AssertionError(f"{family}: upstream's op gives other outputs (relative RMS {off:.1e})")
            ways["upstream"] = op
        rows[family] = timed(ways, rounds)
    return rows


def growth(sizes: dict[str, int], rounds: int) -> dict[str, dict[int, float]]:
    """Milliseconds of the chunked scan by length."""
    found = {}
    for family, form in FAMILIES.items():
        ways: dict[str, Way] = {str(T): recurrence_of(form, {**sizes, "T": T}).scan for T in LENGTHS}
        found[family] = {int(name): row["ms"] for name, row in timed(ways, rounds).items()}
    return found


def slope(line: dict[int, float]) -> float:
    """Exponent of time in length over the longest lengths: 1 is linear."""
    long = sorted(line)[-LAST:]
    return math.log(line[long[-1]] / line[long[0]]) / math.log(long[-1] / long[0])


def plot(lines: dict[str, dict[int, float]], sizes: dict[str, int], path: Path) -> None:
    """Time against length, both logarithmic, with a line of slope 1."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    styles = ["o-", "s-", "^-", "D-", "v-", "o--", "s--", "^--", "D--", "v--"]
    for (family, line), style in zip(lines.items(), styles, strict=True):
        axes.loglog(list(line), list(line.values()), style, label=family, markersize=4, linewidth=1.2)
    longest = max(LENGTHS)
    low = 0.6 * min(line[longest] for line in lines.values())
    axes.loglog(LENGTHS, [low * T / longest for T in LENGTHS], color="0.5", linestyle=":", label="slope 1")
    axes.set_xticks(LENGTHS, [str(T) for T in LENGTHS])
    axes.minorticks_off()
    axes.set(
        xlabel="tokens",
        ylabel="milliseconds",
        title="chunked scan, {H} heads of {K} × {V}, one sequence, one CPU thread".format(**sizes),
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", ncols=2)
    figure.savefig(path, dpi=150)


PAGE = """# Benchmarks

Made by `benchmarks/families.py`, not by hand. One run on a CPU: {threads} thread, torch {torch}, transformers
{transformers}, float32, one sequence of {T} tokens, four heads of {sizes}; outputs and final state. Ways
are timed in turn, round after round, by the process's own clock; each number is the median over {rounds} rounds of the
ratio in one round. Other programs shared the machine, so take the second digit lightly, and times more lightly
than ratios.

{table}

*Chunked* is hookpoints' own kernel, plain PyTorch; *step by step* the reference that the tests hold it to; *upstream's
torch op* that of transformers on the same factors, whose outputs were first found to be the same to 1e-4. (For
Lightning it is MiniMax's layer without its projections. fla has Triton kernels alone, which need a GPU; nothing here
was timed on one.) *Slope* is the exponent of time in length over the four longest lengths of the plot: 1 is linear.

![Milliseconds of the chunked scan against tokens, both logarithmic, for ten families: all run parallel to a line of
slope 1 up to {longest} tokens](images/growth.png)

Milliseconds at {longest} tokens, four heads of {growth_size}, the least of the rounds: {milliseconds}.

Other benchmarks, of hooks, edits, training steps and memory, are in the folder `benchmarks/`.
"""


def markdown(results: dict[str, Any]) -> str:
    """The page: ratios of each family at each size, and the slopes."""
    sizes, longest = list(results["operations"]), max(LENGTHS)
    head = [f"chunked / {way}, {size}" for way in ("step by step", "upstream's torch op") for size in sizes]
    lines = [f"| family | {' | '.join(head)} | slope |", "|---" * (len(head) + 2) + "|"]
    for family in FAMILIES:
        cells = []
        for way in ("step by step", "upstream"):
            rows = (results["operations"][size][family].get(way) for size in sizes)
            cells += ["" if row is None else f"{1 / row['ratio']:.2f}" for row in rows]
        lines.append(f"| {family} | {' | '.join(cells)} | {slope(results['growth'][family]):.2f} |")
    times = "; ".join(f"{family}: {line[longest]:.0f}" for family, line in results["growth"].items())
    named = {"table": "\n".join(lines), "sizes": " and ".join(sizes), "growth_size": sizes[0]}
    return PAGE.format(**results, **named, longest=longest, milliseconds=times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--T", type=int, default=1024)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, help="folder for the page and its numbers")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    results: dict[str, Any] = {"T": options.T, "threads": options.threads, "rounds": options.rounds, **versions}
    with torch.no_grad():
        shapes = {f"{w} × {w}": {"T": options.T, "H": 4, "K": w, "V": w} for w in options.widths}
        results["operations"] = {name: operations(sizes, options.rounds) for name, sizes in shapes.items()}
        sizes = {"H": 4, "K": options.widths[0], "V": options.widths[0]}
        results["growth"] = growth(sizes, max(options.rounds // 3, 2))
    print(markdown(results))
    if options.out:
        (options.out / "benchmarks.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        (options.out / "benchmarks.md").write_text(markdown(results), encoding="utf-8")


if __name__ == "__main__":
    main()
