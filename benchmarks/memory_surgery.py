"""Operations on memories: how long each takes.

What they recover is measured by `writesae.use.memory`, on docs/memory_surgery.md.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from frame import Line, Way, main, timed

from hookpoints import HookedRecurrent
from writesae.use.memory import AFTER, LATER, MODELS, STOP, sequences, ways_to_cut

sys.path.append(str(Path(__file__).parents[1] / "scripts"))
from tables import table

TITLE = "Operations on memories"
QUICK = {"rounds": 2}


def cut_costs(model: HookedRecurrent, m: int, rounds: int) -> dict[str, float]:
    """Time of each way to cut, m tokens after the span, over that of reading all of them again."""
    memory = model.memory(sequences(model, STOP + m + AFTER, 32)[:1, : STOP + m])
    exact_first: dict[str, Way] = {name: partial(way, memory) for name, way in reversed(ways_to_cut(m).items())}
    return {name: row["ratio"] for name, row in timed(exact_first, rounds).items()}


def speed(model: HookedRecurrent, rounds: int) -> dict[str, float]:
    """Seconds of operations on 512 tokens, as ratios to a pass with a cache in the same round."""
    tokens = torch.arange(512).mul(7919).remainder(model.cfg.d_vocab - 1).add(1)[None]
    memory, layer = model.memory(tokens), model.cfg.recurrent_layers[-1]
    r, start, stop = memory.recurrence(layer), 48, 64

    def forward() -> None:
        with torch.no_grad():
            model.hf_model(input_ids=tokens, use_cache=True)

    def states() -> None:
        before = r.select(tokens=slice(0, start)).states(positions=-1)[:, 0]
        r.select(tokens=slice(stop, 512), initial_state=before).states(positions=-1)

    ways: dict[str, Way] = {
        "forward": forward,
        "memory": lambda: model.memory(tokens),
        "states of one layer without 16 of 512 tokens": states,
        "holdings of one layer": lambda: memory.holdings(layer),
        "terms of one layer": lambda: memory.terms(layer),
        "rewind to token 48": lambda: memory.rewind(start),
        "without tokens 48 to 63": lambda: memory.without((start, stop), reread=0),
        "without tokens 48 to 63, reread 4": lambda: memory.without((start, stop), reread=4),
        "without tokens 48 to 63, reread 112 (a quarter)": lambda: memory.without((start, stop), reread=112),
        "without tokens 48 to 63, reread all 448 (exact)": lambda: memory.without((start, stop), reread=448),
    }
    return {name: row["ratio"] for name, row in timed(ways, rounds).items() if name != "forward"}


def larger() -> HookedRecurrent:
    """A random Qwen3.5-shaped model, large enough that arithmetic and not Python takes the time."""
    shape = {"vocab_size": 4096, "hidden_size": 768, "intermediate_size": 2304, "num_hidden_layers": 8, "head_dim": 96}
    shape |= {"num_attention_heads": 8, "num_key_value_heads": 2, "linear_num_key_heads": 8}
    shape |= {"linear_num_value_heads": 8, "linear_key_head_dim": 96, "linear_value_head_dim": 96}
    torch.manual_seed(0)
    return HookedRecurrent.from_hf(transformers.Qwen3_5ForCausalLM(transformers.Qwen3_5TextConfig(**shape)).eval())


def lines(found: dict[str, Any]) -> list[Line]:
    """What a memory costs in the largest model, where arithmetic takes the time."""
    model, row = list(found["speed"].items())[-1]
    exact = row["without tokens 48 to 63, reread all 448 (exact)"]
    said = [Line(f"{model}: `model.memory` / a pass over 512 tokens with a cache", row["memory"], goal=1.1)]
    for name, ratio in list(row.items())[-4:-1]:
        said.append(Line(f"{model}: {name} / reading the 448 tokens after them again", ratio / exact))
    return said


def text(found: dict[str, Any]) -> str:
    """Times of every model."""
    costs = {f"{name}, m = {m}": cost for name, of_later in found["cost"].items() for m, cost in of_later.items()}
    parts = {
        "time / a pass over 512 tokens with a cache": found["speed"],
        "time / reading the m tokens after the span again": costs,
    }
    tables = []
    for heading, columns in parts.items():
        ways = next(iter(columns.values()))
        rows = ([way, *(f"{column[way]:.2f}" for column in columns.values())] for way in ways)
        tables.append(table((heading, *columns), rows))
    return "\n".join([*tables, "[What these operations recover](memory_surgery.md)."])


def measure(rounds: int = 9) -> dict[str, Any]:
    """Times of every model."""
    found: dict[str, Any] = {"speed": {}, "cost": {}}
    for name in MODELS:
        model = HookedRecurrent.from_pretrained(name, device="cpu")
        found["cost"][name] = {str(m): cut_costs(model, m, rounds) for m in LATER}
        found["speed"][name] = speed(model, rounds)
    found["speed"]["random, 8 layers, 768 wide"] = speed(larger(), rounds)
    return found


if __name__ == "__main__":
    main(sys.modules[__name__])
