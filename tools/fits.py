"""Write docs/fits.md: what hooks, memories, collections and dictionaries hold at the shapes of published models.

    python tools/fits.py

Bytes are counted by `hookpoints.cost` on shapes alone, in a minute on a CPU. `tools/shapes` has the models'
configurations, without weights; `writesae models --cost` takes the same folders.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from tables import table

from hookpoints import Cost, cost
from sae_lens_writesae.sae import WriteTopKTrainingSAE, WriteTopKTrainingSAEConfig

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "fits.md"
T = 256
"""A multiple of every chunk, so that nothing is padded. All but patterns is the same per token at any length."""
MODELS = {
    "Qwen3.5-0.8B": "qwen3.5-0.8b",
    "Qwen3.5-4B": "qwen3.5-4b",
    "Nemotron-H-8B": "nemotron-h-8b",
    "RWKV-7 1.5B": "rwkv7-1.5b",
}

WRITES = "blocks.{l}.mixer.hook_write"
WRITE = "blocks.{l}.mixer.heads.{h}.hook_write"
ATOMS = 4096
TRAINED = 16
"""Bytes of a parameter in training: weight, gradient and Adam's two moments, in float32."""
TEXT = """# What fits on my GPU

How much memory do hooks, states, memories and dictionaries take? The tables are of four published models in bfloat16,
one sequence, with frozen parameters. For any other model, `writesae models --cost NAME --tokens T` prints each hook,
and `hookpoints.cost(model, tokens=T)` returns it.

## Tokens that fit with the weights

{fits}
`names_filter` decides. One head's writes are a matrix for each token, and those of all heads fill a GPU within a few
thousand tokens. Without a filter, `run_with_cache` keeps every hook but matrices and patterns.

## Bytes

{overview}
States do not grow with the text. A pattern takes a number for each pair of tokens. A dictionary of {atoms:,} atoms of
rank 1 is counted with its gradient and Adam's two moments in float32, without the batch.

## Limits

* What is *held* is counted. A pass takes more while it runs: run a batch and look at
  `torch.cuda.max_memory_allocated()`.
* With `trainable=True`, runs in grad mode also hold the graph of the pass; `torch.no_grad()` avoids that.
* Factors, writes, states and patterns of recurrent layers are float32 whatever the weights are.
* No GPU was used. `tests/test_cost.py` compares the counts with real runs of tiny models, to the byte.

`python tools/fits.py` makes this page.
"""


def digits(n: float) -> str:
    """A number of bytes in three digits and a unit."""
    for unit in ("bytes", "KB", "MB"):
        if n < 1000:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:.3g} GB"


def write_bytes(K: int, V: int) -> int:
    """Of a write in a collection: key and value in a dtype of two bytes."""
    return 2 * (K + V)


def parameters(K: int, V: int) -> tuple[int, int]:
    """Those of `writesae_topk` and of SAELens' TopK with `ATOMS` atoms on the writes of a head, as they are made."""
    sizes = {"d_in": K * V, "d_sae": ATOMS, "k": 4, "device": "meta"}
    with torch.device("meta"):
        saes = (
            WriteTopKTrainingSAE(WriteTopKTrainingSAEConfig(**sizes, d_k=K, d_v=V)),
            TopKTrainingSAE(TopKTrainingSAEConfig(**sizes)),
        )
    factors, matrices = (sum(parameter.numel() for parameter in sae.parameters()) for sae in saes)
    return factors, matrices


def page(costs: Mapping[str, Cost]) -> str:
    """The page, from the costs of each model."""
    fits: list[list[str]] = []
    overview: list[list[str]] = []
    for model, found in costs.items():
        sizes = {hook.name: hook.bytes / found.T for hook in found.hooks}
        writes = next(hook for hook in found.hooks if hook.name == WRITES)
        *_, K, V = writes.shape
        memory = ((found.memory or 0) - found.state) / found.T
        held = [found.cached / found.T, sizes[WRITE], writes.n * sizes[WRITES], memory]
        for room in (24e9, 80e9):
            fits.append([model, digits(room), *(f"{(room - found.weights) / size:,.0f}" for size in held)])
        training = [digits(TRAINED * n) for n in parameters(K, V)]
        collection = digits(write_bytes(K, V))
        overview.append([model, *map(digits, (found.weights, found.state, *held)), collection, *training])
    what = ["cached run, no filter", "one head's writes", "all writes", "memory"]
    a_token = [f"{name}, a token" for name in what]
    disk = ["a head's writes on disk, a token", "`writesae_topk` in training", "SAELens' TopK in training"]
    return TEXT.format(
        fits=table(["model", "GPU", *what], fits),
        overview=table(["model", "weights", "all states", *a_token, *disk], overview),
        atoms=ATOMS,
    )


def counted(model: str) -> Cost:
    """The costs of a model."""
    return cost(str(ROOT / "tools" / "shapes" / MODELS[model]), tokens=T, dtype=torch.bfloat16)


if __name__ == "__main__":
    PAGE.write_text(page({model: counted(model) for model in MODELS}), encoding="utf-8")
