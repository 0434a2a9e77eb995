"""The whole way at the size of a published model: load, collect, train, substitute, report; and the graph of a long
text.

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
import timeit
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import torch
import transformers
from frame import Line, apart, main, number, peak_memory

from hookpoints import HookedRecurrent, attribute, embedded
from hookpoints.errors import PredictionWarning
from sae_lens_writesae import VARIANTS, Collection, collect, load_sae, text_dataset, train, training_config
from sae_lens_writesae.atom.low_rank import LowRank
from sae_lens_writesae.sae.factors import INDEX, read_json
from writesae.choices import MATCHED, DictionaryName
from writesae_study import Substitution, write_report
from writesae_study.page.report import find_results
from writesae_study.reproduce.config import ReproduceConfig

TITLE = "Collect, and the whole way at real size"
QUICK = {
    "tokens": 512,
    "context": 128,
    "training_tokens": 4096,
    "F": 256,
    "k": 4,
    "sequences": 1,
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
N, D, H, K, V = 24, 1024, 16, 128, 128
GOAL_BYTES, GOAL_MEMORY, GOAL_TIME = 614, 0.3e9, 1.2
"""Bytes a token and head of a collection; bytes above the model, and time over the plain pass, of collecting."""
GOAL_CIRCUIT = 4e9
"""Bytes above the model of a graph."""
PAPER = {"tokens": 5_000_000, "tested": 11, "firings": 1000}
"""The paper's table, for each head: tokens that each dictionary is trained on, dictionaries whose writes are replaced,
and firings of each."""
TABLE_LAYERS = (1, 9, 17)
"""Its heads: one of each of these layers."""
H100 = {"bfloat16": 989e12, "float32": 67e12, "bytes": 3.35e12, "share": 0.4}
"""Dense bf16, float32 and HBM3 of the data sheet, a second, and the share that is assumed. Nothing was run on one."""

ON_MATRICES, ON_FACTORS = "train, on matrices", "train, on factors"
LAUNCHES = {"collect": 2012 / 5120, ON_MATRICES: 110 / 4096, ON_FACTORS: 215 / 4096, "substitution": 5894}
"""Per token, token and firing: of a pass over the five sequences that `collect` takes at once on a GPU, of a step of
4,096 writes, and of a test at layer 9. `launches.py` counts them."""
LAUNCH = 5e-6
"""Seconds."""

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
    result.save(folder / "results")
    runs = len(result.tables["firings"])
    firings = len(result.tables["firings"].groupby(["sequence", "position", "atom"]))
    return {"tokens": runs * (test.horizon + 1), **work, "runs": runs, "firings": firings}


def reporting(options: dict[str, Any], folder: Path) -> Row:
    """The page over the saved result, without the language model."""
    write_report(find_results([folder / "results"]), folder / "report" / "report.html")
    return {"disk": size(folder / "report")}


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
    "report": reporting,
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


def matrix_rate(dtype: torch.dtype, device: str, size: int, timer: Callable[[], float]) -> float:
    """Operations a second of products of large matrices, the best of three."""
    x = torch.ones(size, size, dtype=dtype, device=device)
    seconds = timeit.repeat(lambda: (x @ x)[0, 0].item(), timer=timer, number=1, repeat=4)
    return 2 * size**3 / min(seconds[1:])


def rates(device: str, folder: Path) -> Row:
    """What this machine does in a second: operations of matrix products in bf16 and float32, bytes of copies in memory,
    counted once read and once written, and bytes written to disk. On a CPU by the clock of this process, but the disk.
    """
    gpu = device.startswith("cuda")
    clock, edge = ("wall", 4096) if gpu else ("cpu", 1024)
    x = torch.ones(2**24, device=device)
    y, copies, writes = x.clone(), [], []
    for _ in range(5):
        with timed() as copy:
            y.copy_(x)[0].item()
        with timed() as write, (folder / "bytes").open("wb") as file:
            file.write(bytes(2**26))
            os.fsync(file.fileno())
        copies.append(copy[clock])
        writes.append(write["wall"])
    timer = time.perf_counter if gpu else time.process_time
    products = {name: matrix_rate(getattr(torch, name), device, edge, timer) for name in ("bfloat16", "float32")}
    return products | {"copy": 2 * 2**26 / min(copies), "disk": 2**26 / min(writes)}


# ------------------------------------------------------------------------------------------------ what it must cost


def counts(options: dict[str, Any], batch: float) -> dict[str, Row]:
    """Operations, bytes of memory and bytes of disk for each token of a stage (each row of one dictionary), that the
    method cannot do without."""
    layers, F, k = options["layer"] + 1, options["F"], options["k"]
    weights = 752.4e6 - SHAPE["vocab_size"] * D  # of all blocks
    chunk = 64
    scan = H * (6 * K * V + 2 * chunk * (3 * K + 2 * V))  # a layer, chunked, without the intra-chunk inverse
    below = layers / N
    tokens = batch * options["context"]
    each = 40 * H * (K + V) * 4  # twenty float32 copies of keys and values, written and read, a layer
    above = weights * (1 - (layers - 1) / N) + SHAPE["vocab_size"] * D
    return {
        "collect": {
            "operations": below * (2 * weights + 0.75 * N * scan),
            "bytes": below * (2 * weights / tokens + N * each),
            "disk": H * (K + V) * 2,
        },
        "train": {
            "operations": 2 * F * (K + V) + 6 * k * k * (K + V) + 12 * k * (K + V),
            "bytes": 4 * (3 * F + 8 * k * (K + V)) + 4 * 7 * 2 * F * (K + V) / options["batch"],
            "disk": 0,
        },
        "substitution": {"operations": 2 * above, "bytes": 2 * above / 17 + (N - layers) * each, "disk": 0},
    }


def dtype_of(stage: str) -> str:
    """In which it computes."""
    return "float32" if stage.startswith("train") else "bfloat16"


def bound(count: Row, rate: Row, dtype: str) -> dict[str, float]:
    """Seconds a token that arithmetic, memory and disk take at least."""
    return {
        "arithmetic": count["operations"] / rate[dtype],
        "memory": count["bytes"] / rate["copy"],
        "disk": count["disk"] / rate["disk"],
    }


def trained() -> dict[str, int]:
    """Dictionaries of a head that `writesae reproduce` trains: all, those on factors of writes, those on matrices, and
    those of these that have as few parameters on matrices as a WriteSAE has."""
    config = ReproduceConfig()
    names = [DictionaryName.parse(name) for each in config.dictionaries().values() for name in each]
    on_factors = [name for name in names if (name.target, name.loss) == ("write", "mse") and _has_factors(name)]
    on_matrices = [name for name in names if name not in on_factors]
    few = [name for name in on_matrices if name.variant == MATCHED]
    return {
        "all": len(names),
        "on_factors": len(on_factors),
        "on_matrices": len(on_matrices),
        "few": len(few),
    }


def _has_factors(name: DictionaryName) -> bool:
    """Whether encoder and decoder are made of factors."""
    sides = VARIANTS.get(name.variant, VARIANTS["FlatSAE"])
    return sides.get("encoder") != "dense" and sides.get("decoder", "rank") == "rank"


def paper(stages: dict[str, Row], options: dict[str, Any], rate: Row) -> dict[str, Row]:
    """Hours of the paper's table for one head and for all, on this machine by its own rates, and on an H100 by
    counts; and bytes on disk. What training on matrices takes is counted."""
    count = counts(options, 16)
    count[ON_FACTORS] = count.pop("train")
    count[ON_MATRICES] = {"operations": 10 * options["F"] * K * V, "bytes": 0}
    on_h100 = {
        name: max(each["operations"] / H100[dtype_of(name)], each["bytes"] / H100["bytes"]) / H100["share"]
        for name, each in count.items()
    }
    units = paper_units()
    per = {
        "collect": stages["collect"]["cpu"] / stages["collect"]["tokens"],
        ON_MATRICES: count[ON_MATRICES]["operations"] / rate["float32"],
        ON_FACTORS: stages["train"]["cpu"] / stages["train"]["tokens"],
        "substitution": stages["substitution"]["cpu"] / stages["substitution"]["firings"],
    }
    of_firing = stages["substitution"]["tokens"] / stages["substitution"]["firings"]
    found: dict[str, Row] = {}
    for name, unit in units.items():
        deepest = (max(TABLE_LAYERS) + 1) / (options["layer"] + 1)  # one pass serves all heads
        times = deepest if name == "collect" else len(TABLE_LAYERS)
        core = per[name] * unit / 3600
        gpu = on_h100[name] * unit * (of_firing if name == "substitution" else 1) / 3600
        found[name] = {"core": core, "h100": gpu, "core_all": times * core, "h100_all": times * gpu}
    found["disk"] = {"one": PAPER["tokens"] * 2 * (K + V), "all": PAPER["tokens"] * 2 * (K + V) * len(TABLE_LAYERS)}
    return found


def paper_units() -> dict[str, int]:
    """Tokens, tokens of all dictionaries, or firings, of each stage for one head."""
    large = trained()["on_matrices"] - trained()["few"]
    tokens = PAPER["tokens"]
    firings = PAPER["tested"] * PAPER["firings"]
    on_factors = trained()["on_factors"]
    return {"collect": tokens, ON_MATRICES: tokens * large, ON_FACTORS: tokens * on_factors, "substitution": firings}


def with_launches(stage: str, hours: Row) -> Row:
    """Hours of a stage, with those of its launches on an H100."""
    launches = paper_units()[stage] * LAUNCHES[stage] * LAUNCH / 3600
    times = hours["h100_all"] / hours["h100"]
    return hours | {"h100": hours["h100"] + launches, "h100_all": hours["h100_all"] + times * launches}


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
    """Each stage, the rates of this machine, and what bounds it."""
    options = dict(locals())
    rows: dict[str, Row] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        machine = rates(device, folder)
        for each in STAGES:
            # glibc keeps holes between tensors of some megabytes, which are no memory that the stage needs.
            with patch.dict(os.environ, {"MALLOC_MMAP_THRESHOLD_": "131072"} if each == "attribute" else {}):
                rows[each] = apart(stage, each, options, folder)
            print(each, rows[each], flush=True)
        again = rates(device, folder)
    machine = {each: max(value, again[each]) for each, value in machine.items()}
    return {"options": options, "rates": machine, "stages": rows} | computed(options, machine, rows)


def computed(options: dict[str, Any], machine: Row, rows: dict[str, Row]) -> dict[str, Any]:
    """What follows from rates and stages: what bounds each stage."""
    bounds = {}
    for each, count in counts(options, rows["collect"]["batch"]).items():
        bounds[each] = bound(count, machine, dtype_of(each))
        bounds[each]["measured"] = rows[each]["cpu"] / rows[each]["tokens"]
    return {"bounds": bounds}


def lines(found: dict[str, Any]) -> list[Line]:
    """What has a goal."""
    row, layer = found["stages"]["collect"], found["options"]["layer"]
    circuit = found["stages"]["attribute"]
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


TEXT = """\
Made by `benchmarks/real_size.py`, not by hand. A model in the shape of Qwen3.5-0.8B ({parameters:.0f} M parameters,
bf16) with random weights goes the whole way on {device}: all heads of layer {layer} are collected, {dictionaries}
dictionaries (F = {F}, k = {k}, batch {batch}) are trained at once on the writes of one head, and {firings} firings of
the substitution test are reported ({runs} edited runs). What carries over is rates, memory and bytes; verdicts of a
random model do not.

| stage | seconds | of CPU | tokens | tokens a second of CPU | peak memory, MB | disk, MB |
|---|---|---|---|---|---|---|
{table}

A collection of writes costs **{bytes:.0f} bytes a token and head**. Collecting takes **{over_plain:.2f}** times the
plain pass up to the layer, and **{above:.2f} GB** above the loaded model (batches of {batch_size} x {context} tokens).
Each stage has a separate process: memory is its peak resident set, {imported:.0f} MB of which are the libraries, and
seconds begin after imports. Tokens of `train` are rows of all dictionaries. Those of `substitution` are t..t+16 of each
edited run, and pay for the plain passes, the search for firings and the fit of controls too. Other programs shared the
machine: where seconds exceed those of CPU, the stage waited.

`attribute` explains what is said after {circuit_tokens:,} tokens: {circuit_runs:.0f} measured nodes and edges, the
fewest there can be, and {circuit_edges:.0f} edges. It takes **{circuit_above:.2f} GB** above the loaded model.
That is with MALLOC_MMAP_THRESHOLD_=131072, so that the allocator returns what is freed; by default glibc holds more.

### What bounds a stage

Microseconds a token, on one thread. *At least* are counts of what the method cannot do without, over rates that this
machine reached: matrix products {bf16:.0f} GFLOP/s in bf16 and {fp32:.0f} in float32, copies
{copy:.1f} GB/s, disk {disk:.2f} GB/s.

| stage | arithmetic, at least | memory, at least | disk, at least | measured | share of the bound | bound by |
|---|---|---|---|---|---|---|
{bounds}

### The paper's table

`writesae reproduce` trains {trained_all} dictionaries a head, `writesae_batchtopk`, on {paper_tokens:,} tokens each.
{trained_on_factors} of them train on factors of writes, each counted as one of rank 1, and {trained_on_matrices} on
matrices, {trained_few} of which are small and left out. The
substitution test is counted for {paper_tested} dictionaries and {paper_firings:,} firings of each.

Hours on one core follow from the rates above, with what a stage does once. Training on matrices was not run at this
size: its hours are those of 10 F K V operations a row at the rate of float32. Nothing was run on an H100. Its hours
come from counts: operations and bytes at {share:.0%} (assumed) of 989 TFLOP/s (bf16, dense), 67 TFLOP/s (float32, for
training) and 3.35 TB/s, and 5 us more for each launch that the first section counts, {launches:,} a firing of a
substitution test. The table has a
head of each of layers {table_layers}; one pass of the model serves all.

| stage | one head, one core | one head, H100 | all heads, one core | all heads, H100 |
|---|---|---|---|---|
{paper}

Disk: {disk_one:.2f} GB for one head, {disk_all:.2f} GB for all.
"""


def text(found: dict[str, Any]) -> str:
    """The stages, what bounds them, and the paper's table."""
    options, stages, rate = found["options"], found["stages"], found["rates"]
    table = paper(stages, options, rate)
    rows = []
    for name, row in stages.items():
        tokens = [f"{row['tokens']:,.0f}", f"{row['tokens'] / row['cpu']:,.0f}"] if "tokens" in row else ["", ""]
        disk = f"{row['disk'] / 1e6:,.1f}" if "disk" in row else ""
        times = [f"{row['seconds']:.1f}", f"{row['seconds_cpu']:.1f}"]
        memory = f"{row['memory'] / 1e6:,.0f}"
        rows.append(f"| {' | '.join([name, *times, *tokens, memory, disk])} |")
    bounds = []
    for name, row in found["bounds"].items():
        least = {each: row[each] for each in ("arithmetic", "memory", "disk")}
        most = max(least, key=lambda each: least[each])
        cells = [name, *(f"{1e6 * x:,.1f}" for x in (*least.values(), row["measured"]))]
        cells += [f"{least[most] / row['measured']:.0%}", most]
        bounds.append(f"| {' | '.join(cells)} |")
    columns = ("core", "h100", "core_all", "h100_all")
    hours = {name: with_launches(name, row) for name, row in table.items() if name != "disk"}
    parts = [*hours.values()]
    hours["together"] = {each: sum(row[each] for row in parts) for each in columns}
    named = {
        "table": "\n".join(rows),
        "bounds": "\n".join(bounds),
        "paper": "\n".join(
            f"| {n} | {' | '.join(number(row[each]) for each in columns)} |" for n, row in hours.items()
        ),
        "parameters": stages["make"]["parameters"] / 1e6,
        "runs": stages["substitution"]["runs"],
        "firings": stages["substitution"]["firings"],
        "bytes": stages["collect"]["bytes"],
        "over_plain": stages["collect"]["over_plain"],
        "above": stages["collect"]["above_model"] / 1e9,
        "batch_size": stages["collect"]["batch"],
        "circuit_runs": stages["attribute"]["runs"],
        "circuit_edges": stages["attribute"]["edges"],
        "circuit_above": stages["attribute"]["above_model"] / 1e9,
        "imported": max(row["imported"] for row in stages.values()) / 1e6,
        "bf16": rate["bfloat16"] / 1e9,
        "fp32": rate["float32"] / 1e9,
        "copy": rate["copy"] / 1e9,
        "disk": rate["disk"] / 1e9,
        "paper_tokens": PAPER["tokens"],
        "paper_tested": PAPER["tested"],
        **{f"trained_{name}": n for name, n in trained().items()},
        "paper_firings": PAPER["firings"],
        "share": H100["share"],
        "launches": LAUNCHES["substitution"],
        "table_layers": ", ".join(map(str, TABLE_LAYERS)),
        "disk_one": table["disk"]["one"] / 1e9,
        "disk_all": table["disk"]["all"] / 1e9,
    }
    return TEXT.format(**options | named)


if __name__ == "__main__":
    main(sys.modules[__name__])
