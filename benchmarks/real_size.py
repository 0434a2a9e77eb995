"""The whole way at the size of a published model: load, collect, train, substitute; and the graph of a long text.

The model has the shape of Qwen3.5-0.8B (24 layers, three of four recurrent, 16 heads of 128 x 128, vocabulary 248,320,
width 1024, tied embeddings, bf16) and random weights; it is made here and saved as a checkpoint, with the tokenizer of
the embedded model. Each stage runs in a separate process, so that its peak memory is not that of others. On a GPU:
`--device cuda --tokens 1000000 --training-tokens 5000000`.
"""

from __future__ import annotations

import os
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

sys.path.append(str(Path(__file__).parents[1] / "tools"))

import torch
import transformers
from frame import Line, apart, main, peak_memory
from tables import table

from hookpoints import HookedRecurrent, attribute, embedded
from hookpoints.errors import PredictionWarning
from sae_lens_writesae import Collection, collect, load_sae, text_dataset, train, training_config
from sae_lens_writesae.atom.low_rank import LowRank
from sae_lens_writesae.sae.factors import INDEX, read_json
from writesae_study import Substitution
from writesae_study.reproduce.config import ReproduceConfig

TITLE = "The whole way at real size"
QUICK = {
    "tokens": 512,
    "context": 128,
    "training_tokens": 4096,
    "F": 256,
    "k": 4,
    "sequences": 2,
    "firings_per_atom": 1,
    "circuit_tokens": 16,
}
SHAPE: dict[str, Any] = {
    "num_hidden_layers": 24,
    "hidden_size": 1024,
    "intermediate_size": 3584,
    "vocab_size": 248_320,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 16,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "tie_word_embeddings": True,
}
"""Qwen3.5-0.8B: 752 M parameters."""
GOAL_BYTES, GOAL_MEMORY, GOAL_TIME = 614, 0.3e9, 1.2
"""Bytes a token and head of a collection; bytes above the model, and time over the plain pass, of collecting."""
GOAL_CIRCUIT = 4e9
"""Bytes above the model of a graph."""
Row = dict[str, float]


def make(options: dict[str, Any], folder: Path) -> Row:
    """The checkpoint: weights of 0.02 times normal numbers, in bf16."""
    torch.set_default_dtype(torch.bfloat16)
    torch.manual_seed(0)
    model = transformers.Qwen3_5ForCausalLM(transformers.Qwen3_5TextConfig(**SHAPE))
    model.save_pretrained(folder / "model")
    transformers.AutoTokenizer.from_pretrained(embedded.path()).save_pretrained(folder / "model")
    return {"parameters": sum(p.numel() for p in model.parameters()), "disk": size(folder / "model")}


def load(options: dict[str, Any], folder: Path) -> HookedRecurrent:
    """The model, with every page of its weights in memory: files are mapped, and nothing of them is read before."""
    model = HookedRecurrent.from_pretrained(str(folder / "model"), device=options["device"], dtype=torch.bfloat16)
    for p in model.hf_model.parameters():
        p.detach().view(torch.uint8).flatten()[::4096].sum()
    return model


def loading(options: dict[str, Any], folder: Path) -> Row:
    """Read the checkpoint and hook it, with the self-check that this makes."""
    load(options, folder)
    return {}


def collecting(options: dict[str, Any], folder: Path) -> Row:
    """One pass over the text, for the writes of every head of a layer; before and after it, plain passes of one
    sequence up to the layer. Its time has all that it does once, such as the hash of the weights."""
    model, layer = load(options, folder), options["layer"]
    text = text_dataset(embedded.text("train"))
    row = model.to_tokens(next(iter(text))["text"] * 9, prepend_bos=False, truncate=False)[:, : options["context"]]

    def plain() -> float:
        with timed() as work, torch.no_grad():
            model(row, return_type=None, stop_at_layer=layer + 1)
        return work["cpu"]

    before = [plain(), plain()]
    begin = peak_begins()
    with timed() as work:
        made = collect(
            model, text, [layer], None, folder / "writes", n_tokens=options["tokens"], context_size=options["context"]
        )
    above = peak_memory() - begin
    passes = sorted([*before, plain(), plain()])
    disk, heads, tokens = size(folder / "writes"), len(made.heads[layer]), made.tokens.numel()
    return {
        "tokens": tokens,
        **work,
        "disk": disk,
        "bytes": disk / tokens / heads,
        "above_model": above,
        "batch": read_json(folder / "writes" / INDEX)["batch_size"],
        "over_plain": work["cpu"] / tokens * row.numel() / ((passes[1] + passes[2]) / 2),
    }


def training(options: dict[str, Any], folder: Path) -> Row:
    """Four dictionaries of one head at once, from the collection and without the language model."""
    collection, layer, head = Collection.open(folder / "writes"), options["layer"], options["head"]
    configs = [
        training_config(
            collection,
            layer,
            head,
            architecture=ReproduceConfig.architecture,
            d_sae=options["F"],
            sae={"k": options["k"], "rank": 1},
            training_tokens=options["training_tokens"],
            train_batch_size_tokens=options["batch"],
            device=options["device"],
            seed=seed,
            verbose=False,
        )
        for seed in range(options["dictionaries"])
    ]
    writes = LowRank(*(side[:] for side in collection.factors(layer, head)))
    with timed() as work:
        saes = train(configs, [writes] * len(configs))
    saes[0].save_inference_model(str(folder / "sae"))
    return {"tokens": options["training_tokens"] * len(configs), **work, "disk": size(folder / "sae")}


def substituting(options: dict[str, Any], folder: Path) -> Row:
    """The substitution test of a few firings against a few controls. Its tokens are those of all edited runs."""
    model, sae = load(options, folder), load_sae(folder / "sae", device=options["device"])
    n = options["sequences"] * 128
    ids = model.to_tokens(embedded.text("test")[: 8 * n], prepend_bos=False, truncate=False)[0, :n]
    test = Substitution(
        n_atoms=4,
        firings_per_atom=options["firings_per_atom"],
        atom_choice=("dominant",),
        scales=("coefficient",),
        controls=("shuffled", "random", "head_mean"),
        mean_write_sequences=2,
    )
    with timed() as work:
        result = test.run(model, sae, ids.view(options["sequences"], -1), progress=False)
    runs = len(result.tables["firings"])
    firings = len(result.tables["firings"].groupby(["sequence", "position", "atom"]))
    return {"tokens": runs * (test.horizon + 1), **work, "runs": runs, "firings": firings}


def explaining(options: dict[str, Any], folder: Path) -> Row:
    """The graph of a long text, with as few measurements as there can be: memory is that of the text."""
    model = load(options, folder)
    n = options["circuit_tokens"]
    ids = model.to_tokens(embedded.text("test")[: 8 * n], prepend_bos=False, truncate=False)[:, :n]
    begin = peak_begins()
    with timed() as work, warnings.catch_warnings():
        warnings.simplefilter("ignore", PredictionWarning)
        graph = attribute(ids, model, measure=1, targets=1)
    above = peak_memory() - begin
    runs = cast(float, graph.metadata["runs"])
    return {"tokens": n, **work, "above_model": above, "runs": runs, "edges": len(graph.edges)}


STAGES: dict[str, Callable[[dict[str, Any], Path], Row]] = {
    "make": make,
    "load": loading,
    "collect": collecting,
    "train": training,
    "substitution": substituting,
    "attribute": explaining,
}


def size(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def peak_begins() -> int:
    """Begin the peak of memory anew, and return what is resident."""
    with suppress(OSError):  # where a system lets nobody begin anew, the peak is that of loading too
        Path("/proc/self/clear_refs").write_text("5")
    return resident()


def resident() -> int:
    """Bytes of this process's resident set now."""
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * resource.getpagesize()


@contextmanager
def timed() -> Iterator[Row]:
    """Seconds of this scope, and those of CPU."""
    row: Row = {}
    begin, cpu = time.perf_counter(), time.process_time()
    yield row
    row |= {"wall": time.perf_counter() - begin, "cpu": time.process_time() - cpu}


def stage(name: str, options: dict[str, Any], folder: Path) -> Row:
    """Run a stage in this process. Times are seconds without imports, memory is in bytes."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    transformers.logging.set_verbosity_error()
    imported = peak_memory()
    with timed() as whole:
        row = STAGES[name](options, folder)
    row |= {"seconds": whole["wall"], "seconds_cpu": whole["cpu"], "memory": peak_memory(), "imported": imported}
    if options["device"].startswith("cuda"):
        row["device_memory"] = torch.cuda.max_memory_allocated()
    return row


def measure(
    device: str = "cpu",
    layer: int = 9,
    head: int = 4,
    tokens: int = 20_480,
    context: int = 1024,
    F: int = 2048,
    k: int = 32,
    batch: int = 4096,
    dictionaries: int = 4,
    training_tokens: int = 32_768,
    sequences: int = 8,
    firings_per_atom: int = 5,
    circuit_tokens: int = 2048,
) -> dict[str, Any]:
    """Each stage, in this order."""
    options = dict(locals())
    rows: dict[str, Row] = {}
    with tempfile.TemporaryDirectory() as folder:
        for each in STAGES:
            # glibc keeps holes between tensors of some megabytes, which are no memory that the stage needs.
            with patch.dict(os.environ, {"MALLOC_MMAP_THRESHOLD_": "131072"} if each == "attribute" else {}):
                rows[each] = apart(stage, each, options, Path(folder))
            print(each, rows[each], flush=True)
    return {"options": options, "stages": rows}


def lines(figures: dict[str, Any]) -> list[Line]:
    """What has a goal."""
    row, layer = figures["stages"]["collect"], figures["options"]["layer"]
    circuit = figures["stages"]["attribute"]
    return [
        Line("collected writes, a token and head", row["bytes"], " bytes", GOAL_BYTES),
        Line(f"collecting all heads of layer {layer}, over the plain pass up to it", row["over_plain"], "", GOAL_TIME),
        Line("memory of collecting above the loaded model", row["above_model"] / 1e9, " GB", GOAL_MEMORY / 1e9),
        Line(
            f"memory of the graph of {circuit['tokens']:,.0f} tokens above the loaded model",
            circuit["above_model"] / 1e9,
            " GB",
            GOAL_CIRCUIT / 1e9,
        ),
    ]


TEXT = """{table}
A model in the shape of Qwen3.5-0.8B ({parameters:.0f} M parameters, bf16, random weights) on {device}: all heads of
layer {layer} are collected, {dictionaries} dictionaries (F = {F}, k = {k}) are trained at once on one head's writes,
{firings:.0f} firings are tested in {runs:.0f} edited runs, and one text is explained. Each stage is a separate process;
memory is its peak resident set, {imported:.0f} MB of which are the libraries."""


def text(figures: dict[str, Any]) -> str:
    """What each stage takes."""
    stages: dict[str, Row] = figures["stages"]
    cells: list[list[str]] = []
    for name in STAGES:
        row = stages[name]
        rate = f"{row['tokens'] / row['cpu']:,.0f}" if "tokens" in row else ""
        disk = f"{row['disk'] / 1e6:,.0f}" if "disk" in row else ""
        cells.append([name, f"{row['seconds_cpu']:.1f}", rate, f"{row['memory'] / 1e6:,.0f}", disk])
    return TEXT.format(
        **figures["options"],
        table=table(("stage", "CPU seconds", "tokens a second of CPU", "peak memory, MB", "disk, MB"), cells),
        parameters=stages["make"]["parameters"] / 1e6,
        firings=stages["substitution"]["firings"],
        runs=stages["substitution"]["runs"],
        imported=max(row["imported"] for row in stages.values()) / 1e6,
    )


if __name__ == "__main__":
    main(sys.modules[__name__])
