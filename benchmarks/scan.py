"""Each family's chunked scan: against the step-by-step reference, against upstream's torch op, and by length.

Before an upstream op is timed, its outputs must be the chunked scan's.
"""

from __future__ import annotations

import inspect
import math
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from frame import Line, Way, main, timed
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
TITLE = "Chunked scan by family"
QUICK = {"tokens": 128, "widths": (16,), "rounds": 2, "doublings": 4}
WAYS = {"step by step": "step by step", "upstream": "transformers"}
"""What the chunked scan is compared with, as the table has it."""
LAST = 4
"""Lengths that the slope is taken over: the shorter ones are mostly overhead."""


TEXT = """Outputs and final state of {tokens} tokens, float32, four heads: time of the package's chunked scan in plain
PyTorch, over the step-by-step reference and over the torch op of transformers, whose outputs are the same to 1e-4.
*Slope* is the exponent of time in length over the four longest lengths. No Triton kernel was timed.
"""


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
    """transformers' torch code on the same factors, where there is some."""
    models = transformers.models
    if form == "lightning":
        return _minimax(r)
    if form in ("gdn", "kda"):
        op = models.qwen3_5.modeling_qwen3_5.torch_chunk_gated_delta_rule
        if form == "kda":
            op = models.kimi_linear.modeling_kimi_linear.chunk_kimi_delta_attention
        assert r.beta is not None
        value = r.u / r.beta[..., None]
        return lambda: inspect.unwrap(op)(r.q, r.k, value, r.log_decay, r.beta, output_final_state=True)
    if form == "mamba2":
        op = inspect.unwrap(models.mamba2.modeling_mamba2.mamba2_chunk_scan)
        assert r.log_decay is not None
        dt = -r.log_decay  # with A = -1
        value, rate = r.u / dt[..., None], -torch.ones(r.H)
        return lambda: op(value, dt, rate, r.k, r.q, chunk_size=64, return_final_states=True)
    return None


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
    """MiniMax writes its recurrence out inside the layer's forward: that forward, without its projections."""
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
            figures, expected = op()[0], r.outputs()  # pyright: ignore[reportIndexIssue]
            off = float((figures - expected).norm() / expected.norm())
            if not off < 1e-4:
                raise AssertionError(f"{family}: upstream's op gives other outputs (relative RMS {off:.1e})")
            ways["upstream"] = op
        rows[family] = timed(ways, rounds)
    return rows


def growth(sizes: dict[str, int], lengths: list[int], rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of the chunked scan by length."""
    figures = {}
    for family, form in FAMILIES.items():
        ways: dict[str, Way] = {str(T): recurrence_of(form, {**sizes, "T": T}).scan for T in lengths}
        figures[family] = {name: row["ms"] for name, row in timed(ways, rounds).items()}
    return figures


def slope(line: dict[str, float]) -> float:
    """Exponent of time in length over the longest lengths: 1 is linear."""
    (short, fast), *_, (long, slow) = list(line.items())[-LAST:]
    return math.log(slow / fast) / math.log(int(long) / int(short))


@torch.no_grad()
def measure(
    tokens: int = 1024, widths: tuple[int, ...] = (64, 128), rounds: int = 9, doublings: int = 6
) -> dict[str, Any]:
    """Ratios of each family at each size, and milliseconds by length at the first."""
    transformers.logging.set_verbosity_error()
    sizes = [{"T": tokens, "H": 4, "K": width, "V": width} for width in widths]
    at = {f"{each['K']} × {each['V']}": operations(each, rounds) for each in sizes}
    return {
        "tokens": tokens,
        "operations": at,
        "growth": growth(sizes[0], [256 * 2**i for i in range(doublings + 1)], max(2, rounds // 2)),
    }


def lines(figures: dict[str, Any]) -> list[Line]:
    """Each family: the chunked scan over other ways, at each size; and the growth of its time."""
    page_lines: list[Line] = []
    for size, families in figures["operations"].items():
        for family, row in families.items():
            page_lines += [
                Line(family, 1 / row[way]["ratio"], column=f"over {WAYS[way]}, {size}") for way in WAYS if way in row
            ]
    return page_lines + [Line(family, slope(times), column="slope") for family, times in figures["growth"].items()]


def text(figures: dict[str, Any]) -> str:
    """What was compared."""
    return TEXT.format(tokens=figures["tokens"])


if __name__ == "__main__":
    main(sys.modules[__name__])
