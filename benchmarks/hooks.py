"""What hooks cost: an attached model with no hooks, and hooks that read one head, against the plain model.

All ways are timed in turn, round after round, in one
process of one thread, by its own CPU time; a number is the median over rounds of the ratio in one round. The plain
model has the same weights, and outputs with no hooks attached must be the same to the bit. What collecting costs is in
`real_size.py`.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
import transformers
from frame import Line, main
from torch import Tensor

from hookpoints import attach, embedded
from hookpoints.hooks.cache import NamesFilter
from hookpoints.model import loading
from hookpoints.model.inputs import cache_argument, cache_of

HF = Any
"""A model of transformers, whose outputs depend on its class."""
Ratios = dict[str, float]
PROMPT, STEPS = 64, 12
TITLE = "Hooks: time over that of the plain model"
QUICK = {"tokens": 32, "rounds": 1}
GOALS = {"decode": 1.03, "generate": 1.03, "prefill": 1.05}
"""Of a model without hooks, over the plain one."""


def qwen(layers: int, width: int, heads: int, dim: int) -> HF:
    """A random Qwen3.5-shaped model."""
    config = transformers.Qwen3_5TextConfig(
        vocab_size=4096,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=width // 4,
        linear_num_key_heads=heads,
        linear_num_value_heads=heads,
        linear_key_head_dim=dim,
        linear_value_head_dim=dim,
    )
    torch.manual_seed(0)
    return transformers.Qwen3_5ForCausalLM(config).eval()


def models() -> Iterator[tuple[str, HF]]:
    """The models that ship with the package, whose steps are short, and a wider one."""
    for name in embedded.names():
        yield name, loading.load(name).model
    yield "Qwen3.5 shape, 8 layers of 768, 16 heads of 64 x 64", qwen(8, 768, 16, 64)


# -- no hooks attached


def twin(hf: HF) -> HF:
    """A plain model with the same weights, the very tensors. It calls the ops that hooked layers call, whose wrappers
    cost it half a microsecond each."""
    return copy.deepcopy(hf, {id(x): x for x in (*hf.parameters(), *hf.buffers())})


def decode(hf: HF, tokens: Tensor) -> Iterator[Tensor]:
    """Logits of a step at a time after a prompt [1,T], which is read before the first."""
    cache = {cache_argument(hf): cache_of(hf(tokens, use_cache=True))}
    yield hf(tokens[:, :1], use_cache=True, **cache).logits  # the first is another shape, and is not counted
    for t in range(STEPS):
        yield hf(tokens[:, t : t + 1], use_cache=True, **cache).logits


def generate(hf: HF, tokens: Tensor) -> Iterator[Tensor]:
    """Tokens of a call of ``generate`` at a time, from a short prompt."""
    short = tokens[:, :8]
    options = {"attention_mask": torch.ones_like(short), "pad_token_id": 0, "eos_token_id": None}
    while True:
        yield hf.generate(short, max_new_tokens=STEPS, do_sample=False, **options)


def prefill(hf: HF, tokens: Tensor) -> Iterator[Tensor]:
    """Logits of a forward of tokens [1,T] at a time."""
    while True:
        yield hf(tokens, use_cache=False).logits


KINDS = {"decode": decode, "generate": generate, "prefill": prefill}


def idle(hf: HF, tokens: Tensor, rounds: int) -> Ratios:
    """Attached without hooks over plain, each step right after the other, and the milliseconds of a plain step."""
    figures: dict[str, list[float]] = {kind: [] for kind in KINDS}
    plain, steps = twin(hf), []
    with attach(hf, self_check=False):
        for kind, run in KINDS.items():
            for n in range(rounds):
                ways = {False: run(plain, tokens), True: run(hf, tokens)}
                for way in ways.values():
                    next(way)
                for _ in range(STEPS if kind == "decode" else 1):
                    n += 1
                    seconds, results = {}, {}
                    for hooked in (n % 2 == 0, n % 2 == 1):
                        seconds[hooked], results[hooked] = clocked(partial(next, ways[hooked]))
                    if not torch.equal(results[True], results[False]):
                        raise AssertionError(f"{kind}: the attached model's outputs are not the plain model's")
                    figures[kind].append(seconds[True] / seconds[False])
                    if kind == "decode":
                        steps.append(1e3 * seconds[False])
    return {kind: statistics.median(ratios) for kind, ratios in figures.items()} | {"step_ms": statistics.median(steps)}


def clocked(way: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds that a call takes, and its result."""
    start = time.process_time()
    result = way()
    return time.process_time() - start, result


# -- hooks that read

HEAD = "blocks.1.mixer.heads.1."
READ: dict[str, NamesFilter] = {
    "all vector hooks": None,
    "writes of one head": HEAD + "hook_write_vec",
    "states of one head": HEAD + "hook_state_vec",
    "pattern of one layer": "blocks.1.mixer.hook_pattern",
    "all patterns": lambda name: name.endswith("hook_pattern"),
}


def reading(hf: HF, tokens: Tensor, rounds: int) -> Ratios:
    """A forward of tokens [1,T] that keeps activations over a plain one."""
    plain = twin(hf)
    with attach(hf, self_check=False) as hooked:
        ways = {
            name: partial(hooked.run_with_cache, tokens, use_cache=False, names_filter=names)
            for name, names in READ.items()
        }
        return ratios(partial(plain, tokens, use_cache=False), ways, rounds)


def ratios(plain: Callable[[], Any], others: Mapping[str, Callable[[], Any]], rounds: int) -> Ratios:
    """Each way over plain, all in turn: the median over rounds."""
    figures: dict[str, list[float]] = {name: [] for name in others}
    for way in (plain, *others.values()):
        way()
    for _ in range(rounds):
        base = clocked(plain)[0]
        for name, way in others.items():
            figures[name].append(clocked(way)[0] / base)
    return {name: statistics.median(each) for name, each in figures.items()}


@torch.no_grad()
def measure(tokens: int = 256, rounds: int = 7) -> dict[str, Ratios]:
    """Ratios of everything."""
    text = torch.randint(0, 512, (1, tokens), generator=torch.Generator().manual_seed(0))
    figures = {f"no hooks attached: {name}": idle(hf, text, rounds) for name, hf in models()}
    for name, hf in (
        ("4 layers, 4 heads 32 x 32", qwen(4, 160, 4, 32)),
        ("4 layers, 16 heads 128 x 128", qwen(4, 512, 16, 128)),
    ):
        figures[f"reading: {name}"] = reading(hf, text, rounds)
    return figures


def lines(figures: dict[str, Ratios]) -> list[Line]:
    """A row for each model, and a column for each way of running it, or for each thing that is read."""
    page_lines: list[Line] = []
    for label, row in figures.items():
        goals = GOALS if label.startswith("no hooks attached") else dict.fromkeys(READ)
        page_lines += [Line(f"{label}: {way}", row[way], goal=goal) for way, goal in goals.items() if way in row]
    return page_lines


if __name__ == "__main__":
    main(sys.modules[__name__])
