"""What a run costs, said before it begins: counts of operations and bytes, over a rate that is measured now.

A pass of a model takes two operations a weight and token. A row of a dictionary takes six a number of its factors (or
matrices, where it is trained on these), for scores and their gradients. docs/benchmarks.md measures `SHARE`.
"""

from __future__ import annotations

import time
import timeit
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from sae_lens_writesae.choices import VARIANTS
from writesae.choices import DictionaryName
from writesae.evaluations import EVALUATIONS
from writesae.experiment.tokens import EDITED
from writesae.reproduce.config import ReproduceConfig

if TYPE_CHECKING:
    from hookpoints import HookedRecurrent

SHARE = {"collect": 0.5, "train": 0.2, "evaluate": 0.4}
"""Of the rate of large matrix products that each stage reaches, in the model's dtype and, for training, in float32."""
RANKS = {n: int(v["rank"]) for n, v in VARIANTS.items() if (v["encoder"], v["decoder"]) == ("bilinear", "rank")}
"""Of variants that train on factors (`sae.fast.shape_of`)."""


Cost = tuple[float, float, float]
"""Of a stage: operations, bytes of memory, bytes of disk."""


def matrix_rate(
    dtype: torch.dtype, device: str, size: int = 1024, timer: Callable[[], float] = time.perf_counter
) -> float:
    """Operations a second of products of large matrices, the best of three. Takes a second or two."""
    x = torch.ones(size, size, dtype=dtype, device=device)
    return 2 * size**3 / min(timeit.repeat(lambda: (x @ x)[0, 0].item(), timer=timer, number=1, repeat=4)[1:])


def costs(config: ReproduceConfig, model: HookedRecurrent) -> dict[str, Cost]:
    """Of each stage, for a config with layers and heads of this model, whose weights need not be there."""
    cfg, tokens, each = model.cfg, config.training_tokens, getattr(torch, config.dtype).itemsize
    sizes = [cfg.layer(layer) for layer in config.layers for _ in config.heads]
    names = [DictionaryName.parse(name) for names in config.dictionaries().values() for name in names]
    ranks = [  # 0: on matrices
        RANKS.get(name.variant, 0) if config.architecture == "writesae_topk" and name.on_factors else 0
        for name in names
    ]
    row = sum(config.d_sae * (rank * (s.K + s.V) or s.K * s.V) for s in sizes for rank in ranks)
    kept = 4 + 2 * sum(2 * s.K + s.V + 4 if "state" in config.targets else s.K + s.V for s in sizes)  # a token
    blocks = sum(p.numel() for p in model.hf_model.parameters() if p.shape[:1] != (cfg.d_vocab,))
    weights = blocks + cfg.d_vocab * cfg.d_model
    read = config.eval_sequences * config.context_size + config.n_atoms * config.firings_per_atom * EDITED
    runs = len(sizes) * len(config.targets) * len(config.evaluations or EVALUATIONS)
    share = (max(config.layers) + 1) / cfg.n_layers
    return {
        "collect": (2 * tokens * blocks * share, each * weights + 1e9, tokens * kept),
        "train": (6 * tokens * row, tokens * kept / len(sizes) + 1e9, 8 * row),
        "evaluate": (2 * runs * read * weights, each * weights + 1e9, 0),
    }


def estimate(config: ReproduceConfig, model: HookedRecurrent) -> str:
    """The costs in words: hours, memory and disk of each stage on this machine."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rates = dict.fromkeys(SHARE, matrix_rate(getattr(torch, config.dtype), device))
    rates["train"] = matrix_rate(torch.float32, device)
    rows = (
        f"{name:8} {n:12.1e} {n / SHARE[name] / rates[name] / 3600:8.2f} {memory / 1e9:7.1f} GB {disk / 1e9:7.2f} GB"
        for name, (n, memory, disk) in costs(config, model).items()
    )
    return "\n".join(
        ["stage      operations    hours     memory       disk (hours at the speed of this moment)", *rows]
    )
