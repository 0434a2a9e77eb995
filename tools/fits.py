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

from hookpoints import Cost, HookedRecurrent, UnsupportedModelError, cost
from hookpoints.memory.caches import tensors_of
from hookpoints.model.cost import held, kinds
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

PREFIX = "blocks.{l}."
WRITES = PREFIX + "mixer.hook_write"
WRITE = PREFIX + "mixer.heads.{h}.hook_write"
ATOMS = 4096
TRAINED = 16
"""Bytes of a parameter in training: weight, gradient and Adam's two moments, in float32."""
TEXT = """# What fits on my GPU

How much memory do hooks, states, memories, collections and dictionaries take? The tables count bytes at the shapes of
four published models. For any other model, `writesae models --cost NAME --tokens T` prints the same, and
`hookpoints.cost(model, tokens=T)` returns it.

## Limits

* The tables are of models as they load, with frozen parameters. With `trainable=True`, runs in grad mode also hold the
  graph of the pass; `torch.no_grad()` avoids that.
* The tables count what is *held*. A pass takes more while it runs: logits, the MLP, and what the kernels of the
  layers need. That depends on the kernels and is not counted: run a batch and look at
  `torch.cuda.max_memory_allocated()`.
* An edit of a matrix hook (`hook_write`, `hook_state`) builds the matrix twice more while its layer runs.
* No GPU was used. Bytes are counted in a pass over shapes alone; `tests/test_cost.py` compares them
  with real runs of tiny models of every family that loads, to the byte.
* Weights are in bfloat16. Factors, writes, states and patterns of recurrent layers are float32 whatever the weights
  are.
* All numbers are of one sequence. B sequences take B times as many.

## The answer

Tokens that fit on the GPU with the weights, if nothing else were there:

{fits}
`names_filter` decides. One head's writes are a matrix for each token, and those of all heads fill a GPU within a few
thousand tokens. Without a filter, `run_with_cache` keeps every hook but matrices and patterns.

## Bytes

{overview}
States do not grow with the text. A pattern takes a number for each pair of tokens: at 4,096 tokens, one layer of
Qwen3.5-0.8B takes {pattern} in float32.

## Each hook

Bytes a token, of one hook (one layer, and one head where it is a head's). Patterns: bytes for each pair of tokens.

{hooks}
## A collection on disk

`collect` stores the factors of writes in two-byte dtypes, not matrices, and 4 bytes for each token's id. For one
head:

{collection}
## A dictionary in training

{atoms:,} atoms of rank 1 on the writes of one head, with the gradient and Adam's two moments, in float32. The batch
comes on top.

{training}
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
    fits, overview, collection, training = [], [], [], []
    by_hook: dict[str, dict[str, str]] = {}
    for model, found in costs.items():
        T = found.T
        sizes = {hook.name: hook.bytes / T for hook in found.hooks}
        writes = next(hook for hook in found.hooks if hook.name == WRITES)
        *_, K, V = writes.shape
        memory = ((found.memory or 0) - found.state) / T
        held = [found.cached / T, sizes[WRITE], writes.n * sizes[WRITES], memory]
        for room in (24e9, 80e9):
            rest = room - found.weights
            fits.append([model, digits(room), *(f"{rest / size:,.0f}" for size in held)])
        overview.append([model, digits(found.weights), digits(found.state), *map(digits, held)])
        write = write_bytes(K, V)
        collection.append([model, f"{K} × {V}", write, digits(1e6 * write), digits(4e6 * K * V)])
        training.append([model, *(digits(TRAINED * n) for n in parameters(K, V))])
        for name, size in sizes.items():
            each = size / T if name.endswith("pattern") else size
            by_hook.setdefault(name.removeprefix(PREFIX), {})[model] = f"{each:,.0f}"
    what = ["cached run, no filter", "one head's writes", "all writes", "memory"]
    pattern = float(by_hook["mixer.hook_pattern"]["Qwen3.5-0.8B"])
    rows = [[f"`{name}`", *(sizes.get(model, "") for model in costs)] for name, sizes in by_hook.items()]
    return TEXT.format(
        fits=table(["model", "GPU", *what], fits),
        overview=table(["model", "weights", "all states", *(f"{name}, a token" for name in what)], overview),
        pattern=digits(4096**2 * pattern),
        hooks=table(["hook", *costs], rows),
        collection=table(["model", "head", "bytes a write", "a million writes", "as float32 matrices"], collection),
        training=table(["model", "`writesae_topk`, factors", "SAELens' TopK, matrices"], training),
        atoms=ATOMS,
    )


@torch.no_grad()
def of_a_run(model: HookedRecurrent, tokens: int) -> Cost:
    """What `cost` says of a model, from what a run with weights holds."""
    ids = torch.randint(2, model.cfg.d_vocab, (1, tokens))
    _, every = model.run_with_cache(ids, names_filter=lambda name: True)
    _, plain = model.run_with_cache(ids)
    by_name = dict(every.items())
    try:
        memory = model.memory(ids)
        size = held([*memory.kept.named().values(), *tensors_of(memory.cache).values()])
    except UnsupportedModelError:
        size = None
    return Cost(
        model_name=model.cfg.model_name,
        T=tokens,
        dtype=model.cfg.dtype,
        weights=held([*model.hf_model.parameters(), *model.hf_model.buffers()]),
        hooks=tuple(kinds(by_name)),
        cached=held(plain.values()),
        state=sum(held([every[f"blocks.{layer}.mixer.hook_state"][:, 0].clone()]) for layer in model.cfg.layers),
        memory=size,
    )


def counted(model: str) -> Cost:
    """The costs of a model."""
    return cost(str(ROOT / "tools" / "shapes" / MODELS[model]), tokens=T, dtype=torch.bfloat16)


if __name__ == "__main__":
    PAGE.write_text(page({model: counted(model) for model in MODELS}), encoding="utf-8")
