"""Costs on a GPU, counted on a pretended one (`tests/device.py`): launches, waits of the host, and copies. Counts are
exact, the same on every machine; no GPU has run them. An op of PyTorch counts as one launch."""

# ruff: noqa: E402

from __future__ import annotations

import copy
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path += [str(ROOT), str(ROOT / "tests"), str(ROOT / "tools")]

import device
import frame
import real_size
import torch
import transformers
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.training.sae_trainer import SAETrainer
from tables import table

from hookpoints import HookedRecurrent, WriteEdit, embedded
from sae_lens_writesae import LowRank, collect, steer, train, training_config
from writesae import sample_sequences

TITLE = "Costs on a GPU, counted"
QUICK = {"length": 32, "wide": False}
LAYER, HEAD = 4, 2
SUBSTITUTION = "substitution of 20 firings"
DEEP_LAYER = 9
DEEP = "substitution, a firing at layer 9 of 24"
COLLECTING = "a pass of collect over 1,024 tokens, up to layer 9 of 24"
NARROW = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "vocab_size": 2048,
    "head_dim": 16,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
"""Launches do not depend on widths."""
MICROSECONDS = {"launch": 5, "sync": 20, "to_device": 20, "to_host": 20, "bus": 1 / 25e3, "bytes": 1 / 2e6}
"""A plain model of an H100: 5 us a launch, 20 us a wait, 25 GB/s of the bus, 2 TB/s of memory."""
EXPLAINED = """No GPU ran this. PyTorch ran on a pretended device, and each operation that is no view counts as one
launch, of this package and of the model alike. *Native* is transformers without this package. The last column assumes
5 us a launch, 20 us a wait or copy, 25 GB/s between host and device, 2 TB/s of memory."""
Counts = dict[str, float]


@torch.no_grad()
def of_passes(seen: Any, length: int) -> dict[str, Counts]:
    """Passes of the embedded model, its memory, and edit sessions."""
    model = HookedRecurrent.from_pretrained("embedded", device="npu", self_check=False)
    native = copy.deepcopy(model.hf_model)
    for module in native.modules():  # without hooks
        vars(module).pop("forward", None)
    ids = torch.randint(0, 500, (1, length), generator=torch.Generator().manual_seed(0)).to("npu")
    place = f"blocks.{LAYER}.mixer.heads.{HEAD}"
    works: dict[str, Callable[[], object]] = {
        "native forward": lambda: native(input_ids=ids, use_cache=False),
        "idle hooks": lambda: model(ids),
        "a mixer's output read": lambda: model.run_with_cache(ids, names_filter=f"blocks.{LAYER}.hook_mixer_out"),
        "one head's writes read": lambda: model.run_with_cache(ids, names_filter=f"{place}.hook_write"),
        "one head's states read": lambda: model.run_with_cache(ids, names_filter=f"{place}.hook_state"),
        "one head's write edited": lambda: model.run_with_hooks(ids, fwd_hooks=[(f"{place}.hook_write", _cut)]),
        "all hooks": lambda: model.run_with_cache(ids),
        "memory": lambda: model.memory(ids),
    }
    costs = {name: seen.of(work) for name, work in works.items()}
    costs |= of_decoding(seen, model, native, ids)
    memory, span = model.memory(ids), (length // 4, length // 2)
    costs["memory without a span"] = seen.of(lambda: memory.without(span))
    costs["memory without it, approximate"] = seen.of(lambda: memory.without(span, approximate=True))
    r = model.recurrence(ids, layer=LAYER)
    alone = WriteEdit(LAYER, HEAD, length // 4, r.k[0, 0, 0], r.u[0, 5, 0], mode="replace")
    costs["one edit"] = seen.of(partial(model.run_with_edits, ids, alone))
    for name, step in (("64 positions", 1), ("one position", 0)):
        start = length // 4
        edits = [
            WriteEdit(
                LAYER, HEAD, start + step * n % (length // 2), r.k[0, n % length, 0], r.u[0, 5, 0], mode="replace"
            )
            for n in range(64)
        ]
        session = model.edit_session(ids)
        costs[f"session of 64 replaces, {name}"] = seen.of(partial(session.run, [[edit] for edit in edits]))
    return costs


def of_decoding(seen: Any, model: HookedRecurrent, native: Any, ids: torch.Tensor) -> dict[str, Counts]:
    """The pass of one token after those of ids."""
    costs = {}
    steering = steer(model, LAYER, HEAD, toward=5)
    decoding = {
        "native decode": (native, nullcontext()),
        "decode, attached": (model.hf_model, nullcontext()),
        "decode, steered toward a token": (model.hf_model, steering),
    }
    for name, (runs, scope) in decoding.items():
        with scope:
            past = runs(input_ids=ids, use_cache=True).past_key_values
            costs[name] = seen.of(partial(runs, input_ids=ids[:, :1], past_key_values=past, use_cache=True))
    return costs


def _cut(value: torch.Tensor, hook: object) -> torch.Tensor:
    value[:, 5] = 0
    return value


def of_steps(seen: Any, sizes: dict[str, tuple[int, int, dict[str, Any]]]) -> dict[str, Counts]:
    """A step of training on writes of the model's shape, by F, N and settings; and one of SAELens' own TopK."""
    model = HookedRecurrent.from_pretrained("embedded", device="meta")
    shape = model.cfg.layer(LAYER)
    g = torch.Generator().manual_seed(0)
    writes = LowRank.rank_one(*(torch.randn(8192, n, generator=g) for n in (shape.K, shape.V)))
    costs = {}
    for name, (n_atoms, batch, settings) in sizes.items():

        def config(steps: int, n_atoms: int = n_atoms, batch: int = batch, settings: Any = settings) -> Any:
            rows: dict[str, Any] = {"training_tokens": steps * batch, "train_batch_size_tokens": batch}
            fixed: dict[str, Any] = {"lr_warm_up_steps": 1, "device": "npu", "verbose": False, "sae": {"k": 32}}
            return training_config(model, LAYER, HEAD, d_sae=n_atoms, **fixed | rows | settings)

        costs[name] = per_step(seen, lambda steps, config=config: train(config(steps), writes))
    n_atoms, batch, settings = sizes["SAE step, F 1024, N 128, k 32"]
    costs["the same, SAELens' own TopK"] = per_step(
        seen, lambda steps: saelens(steps, n_atoms, batch, shape.K * shape.V)
    )
    return costs


def saelens(steps: int, n_atoms: int, batch: int, d_in: int) -> None:
    """SAELens' own TopK, trained by its own trainer on rows of the device."""
    from sae_lens import LanguageModelSAERunnerConfig, LoggingConfig

    sae = TopKTrainingSAEConfig(d_in=d_in, d_sae=n_atoms, k=32, device="npu")
    cfg = LanguageModelSAERunnerConfig(
        sae=sae,
        training_tokens=steps * batch,
        train_batch_size_tokens=batch,
        device="npu",
        logger=LoggingConfig(log_to_wandb=False),
        n_checkpoints=0,
        checkpoint_path=None,
        output_path=None,
        verbose=False,
    )
    rows = torch.randn(batch, d_in).to("npu")
    SAETrainer(cfg.to_sae_trainer_config(), TopKTrainingSAE(sae), iter(lambda: rows, None)).fit()


def per_step(seen: Any, run: Callable[[int], object], few: int = 24, many: int = 40) -> Counts:
    """Counts of a step once training is steady: the difference of two runs."""
    short, long = (Counter(seen.of(lambda steps=steps: run(steps))) for steps in (few, many))
    return {kind: (long[kind] - short[kind]) / (many - few) for kind in long}


def deep_model() -> HookedRecurrent:
    """24 layers, narrow and random: the same each time."""
    torch.manual_seed(0)
    config = transformers.Qwen3_5TextConfig(**real_size.SHAPE | NARROW)
    hf_model = transformers.Qwen3_5ForCausalLM(config).eval()
    return HookedRecurrent.from_hf(hf_model.to("npu"), name="random", self_check=False)


def of_collecting(seen: Any, few: int = 1, many: int = 3) -> Counts:
    """A pass over 1,024 tokens that collects the writes of a layer: the difference of two runs."""
    model = deep_model()
    ids = torch.randint(0, 500, (many, 1024), generator=torch.Generator().manual_seed(0))
    how: dict[str, Any] = {"targets": ("write",), "progress": False, "batch_size": 1, "dtype": "float32"}
    with tempfile.TemporaryDirectory() as folder:

        def counted(n: int) -> Counts:
            return seen.of(lambda: collect(model, ids[:n], [DEEP_LAYER], None, Path(folder) / str(n), **how))

        short = counted(few)
        long = counted(many)
    return {kind: (long[kind] - short[kind]) / (many - few) for kind in long}


def of_substitution(seen: Any, n_atoms: int = 10, deep: bool = False) -> Counts:
    """Of twenty firings of atoms of the embedded model's last layer; `deep`: a firing, the mean of those that there are
    at layer 9 of 24, narrow and random."""
    from writesae_study import Substitution

    layer = LAYER
    model = HookedRecurrent.from_pretrained("embedded", device="npu", self_check=False)
    tokens = sample_sequences(model, embedded.text("test"), context_size=48, n_sequences=24)
    if deep:
        layer = DEEP_LAYER
        model = deep_model()
    with tempfile.TemporaryDirectory() as folder:
        text = collect(model, tokens, [layer], None, Path(folder) / "text", targets=("write",), progress=False)
        sizes: dict[str, Any] = {"d_sae": 64, "training_tokens": 4096, "train_batch_size_tokens": 128}
        sae = train(training_config(text, layer, HEAD, device="npu", verbose=False, **sizes))
    question = Substitution(n_atoms=n_atoms, firings_per_atom=2)
    results = list[Any]()
    counts = seen.of(lambda: results.append(question.run(model, sae, tokens, progress=False)))
    if not deep:
        return counts
    firings = results[0].tables["firings"][["atom", "sequence", "position"]].drop_duplicates()
    return {kind: count / len(firings) for kind, count in counts.items()}


def measure(length: int = 128, wide: bool = True) -> dict[str, Any]:
    warnings.simplefilter("ignore")
    sizes: dict[str, tuple[int, int, dict[str, Any]]] = {"SAE step, F 1024, N 128, k 32": (1024, 128, {})}
    sizes["the same, with dead atoms"] = (1024, 128, {"dead_feature_window": 10})
    if wide:
        sizes["SAE step, F 4096, N 4096, k 32"] = (4096, 4096, {})
    with device.pretended() as seen:
        costs: dict[str, Any] = of_passes(seen, length) | of_steps(seen, sizes)
        if wide:
            costs[SUBSTITUTION] = of_substitution(seen)
            costs[DEEP] = of_substitution(seen, deep=True)
            costs[COLLECTING] = of_collecting(seen)
    return costs


def waits(costs: Counts) -> float:
    """Of the host for the device."""
    return costs["sync"] + costs["to_host"]


def microseconds(costs: Counts) -> float:
    return sum(weight * costs[kind] for kind, weight in MICROSECONDS.items())


def lines(figures: dict[str, Any]) -> list[frame.Line]:
    native, read = figures["native forward"], figures["one head's writes read"]
    memory, cut = figures["memory"]["launch"], figures["memory without a span"]["launch"]
    step = figures["SAE step, F 1024, N 128, k 32"]
    of_tests = []
    if test := figures.get(SUBSTITUTION):
        of_tests = [
            frame.Line(f"{SUBSTITUTION}, launches", test["launch"], goal=60_000),
            frame.Line(f"{SUBSTITUTION}, syncs", test["sync"], goal=200),
        ]
    return [
        frame.Line("idle hooks, launches more than native", figures["idle hooks"]["launch"] - native["launch"], goal=1),
        frame.Line("idle hooks, waits more than native", waits(figures["idle hooks"]) - waits(native), goal=1),
        frame.Line("one head's writes read, launches more than native", read["launch"] - native["launch"], goal=20),
        frame.Line("memory without a span, launches over a memory's", cut / memory, goal=2),
        frame.Line("session of 64 replaces, syncs", figures["session of 64 replaces, 64 positions"]["sync"], goal=1),
        frame.Line("SAE step at F 1024, launches", step["launch"], goal=110),
        *of_tests,
    ]


def text(figures: dict[str, Any]) -> str:
    """Counts of each work."""
    head = ("work", "launches", "waits", "MB read and written", "H100 model, ms")
    rows = [
        (
            name,
            f"{costs['launch']:,.0f}",
            f"{abs(waits(costs)):,.0f}",
            f"{costs['bytes'] / 1e6:,.0f}",
            f"{microseconds(costs) / 1e3:,.1f}",
        )
        for name, costs in figures.items()
    ]
    return f"{table(head, rows)}\n\n{EXPLAINED}"


if __name__ == "__main__":
    frame.main(sys.modules[__name__])
