"""The whole way at the size of a published model: load, collect, train, substitute, report.

    python benchmarks/real_size.py [--tokens 4096 --training-tokens 65536 --out docs]
    python benchmarks/real_size.py --device cuda --tokens 1000000 --training-tokens 5000000 --firings-per-atom 10

The model has the shape of Qwen3.5-0.8B (24 layers, three of four recurrent, 16 heads of 128 x 128, vocabulary 248,320,
width 1024, tied embeddings, bf16) and random weights; it is made here and saved as a checkpoint, with the tokenizer of
the embedded model. Each stage runs in a process of its own, so that its peak memory is its own. ``--out`` gets the
page, real_size.md, and its numbers, real_size.json.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from substitution import qwen

from hookpoints import HookedRecurrent, embedded
from sae_lens_writesae import Collection, collect, load_sae, text_dataset, train_on_writes, training_config
from sae_lens_writesae.files import atomic_text
from writesae import Substitution, write_report
from writesae.page.report import find_results

PUBLISHED: dict[str, Any] = {
    "layers": 24,
    "width": 1024,
    "heads": 16,
    "dim": 128,
    "vocab_size": 248_320,
    "intermediate_size": 3584,
    "num_attention_heads": 8,
    "head_dim": 256,
    "tie_word_embeddings": True,
}
"""Qwen3.5-0.8B, in the arguments of ``substitution.qwen``: 752 M parameters."""
GOAL = 614
"""Bytes a token and head that a collection of writes may cost: 0.6 KB."""

Row = dict[str, float]


def make(options: argparse.Namespace) -> Row:
    """The checkpoint: weights of 0.02 times normal numbers, in bf16."""
    torch.set_default_dtype(torch.bfloat16)
    model: Any = qwen(**PUBLISHED)
    model.save_pretrained(options.folder / "model")
    transformers.AutoTokenizer.from_pretrained(embedded.path()).save_pretrained(options.folder / "model")
    return {"parameters": sum(p.numel() for p in model.parameters()), "disk": size(options.folder / "model")}


def load(options: argparse.Namespace) -> HookedRecurrent:
    return HookedRecurrent.from_pretrained(str(options.folder / "model"), device=options.device, dtype=torch.bfloat16)


def loading(options: argparse.Namespace) -> Row:
    """Read the checkpoint and hook it, with the self-check that this makes."""
    load(options)
    return {}


def collecting(options: argparse.Namespace) -> Row:
    """One pass over the text: the writes of every head of two layers."""
    model, text = load(options), text_dataset(embedded.text("train"))
    folder = options.folder / "writes"
    with timed() as work:
        made = collect(model, text, options.layers, None, folder, n_tokens=options.tokens, context_size=options.T)
    disk = size(folder)
    heads = sum(map(len, made.heads.values()))
    tokens = made.n_sequences * made.context_size
    return {"tokens": tokens, **work, "disk": disk, "heads": heads, "bytes": disk / tokens / heads}


def training(options: argparse.Namespace) -> Row:
    """One dictionary of one head, from the collection and without the language model."""
    collection = Collection.open(options.folder / "writes")
    layer = options.layers[-1]
    cfg = training_config(
        collection,
        layer,
        options.head,
        architecture="writesae_topk",
        d_sae=options.F,
        sae={"k": options.k, "rank": 1},
        training_tokens=options.training_tokens,
        train_batch_size_tokens=options.batch,
        device=options.device,
    )
    writes = collection.factors(layer, options.head)
    with timed() as work:
        sae = train_on_writes(cfg, writes.keys[:], writes.values[:])
    sae.save_inference_model(str(options.folder / "sae"))
    return {"tokens": options.training_tokens, **work, "disk": size(options.folder / "sae")}


def substituting(options: argparse.Namespace) -> Row:
    """The substitution test of a few firings against a few controls. Its tokens are those of all edited runs."""
    model, sae = load(options), load_sae(options.folder / "sae", device=options.device)
    ids = model.to_tokens(
        embedded.text("test")[: 8 * options.sequences * options.T], prepend_bos=False, truncate=False
    )[0]
    test = Substitution(
        n_atoms=options.atoms,
        firings_per_atom=options.firings_per_atom,
        atom_choice=("dominant",),
        scales=("coefficient",),
        controls=("shuffled", "random", "head_mean"),
        mean_write_sequences=2,
    )
    with timed() as work:
        result = test.run(model, sae, ids[: options.sequences * options.T].view(-1, options.T), progress=False)
    result.save(options.folder / "results")
    runs = len(result.tables["firings"])
    return {"tokens": runs * (test.horizon + 1), **work, "runs": runs}


def reporting(options: argparse.Namespace) -> Row:
    """The page over the saved result, without the language model."""
    write_report(find_results([options.folder / "results"]), options.folder / "report" / "report.html")
    return {"disk": size(options.folder / "report")}


STAGES: dict[str, Callable[[argparse.Namespace], Row]] = {
    "make": make,
    "load": loading,
    "collect": collecting,
    "train": training,
    "substitution": substituting,
    "report": reporting,
}


def size(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


@contextmanager
def timed() -> Iterator[Row]:
    """Seconds of this scope, and those of CPU."""
    row: Row = {}
    begin, cpu = time.perf_counter(), time.process_time()
    yield row
    row |= {"work": time.perf_counter() - begin, "work_cpu": time.process_time() - cpu}


def peak_memory() -> int:
    """Bytes of this process's largest resident set so far."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def stage(name: str, options: argparse.Namespace) -> Row:
    """Run a stage in this process. Times are seconds without imports, memory is in bytes."""
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    imported = peak_memory()
    with timed() as whole:
        row = STAGES[name](options)
    row |= {"seconds": whole["work"], "cpu": whole["work_cpu"]}
    row |= {"memory": peak_memory(), "imported": imported}
    if options.device.startswith("cuda"):
        row["device_memory"] = torch.cuda.max_memory_allocated()
    if "tokens" in row:
        row |= {"rate": row["tokens"] / row["work"], "rate_cpu": row["tokens"] / row["work_cpu"]}
    return row


PAGE = """# At real size

Made by `benchmarks/real_size.py`, not by hand, on {date}: {device}, {threads} thread(s), torch {torch}, transformers
{transformers}. A model in the shape of Qwen3.5-0.8B ({parameters:.0f} M parameters, bf16) with random weights goes the
whole way: every head of layers {layers} is collected, one dictionary (F = {F}, k = {k}, batch {batch}) is trained
on the collected writes of one head, and {runs} edited runs of the substitution test are reported. Sizes are small, so
that it runs anywhere; rates, memory and bytes a token are what carries over, verdicts of a random model do not.

| stage | seconds | of CPU | tokens | tokens a second | a second of CPU | peak memory, MB | disk, MB |
|---|---|---|---|---|---|---|---|
{table}

A collection of writes costs **{bytes:.0f} bytes a token and head** (goal: at most {goal}). Each stage is a process of
its own: memory is its peak resident set, {imported:.0f} MB of which are the libraries, and seconds begin after imports.
*Tokens a second* leave loading out. Those of `substitution` are t..t+16 of each edited run, and pay for the plain
passes, the search for firings and the fit of controls too. Other programs shared the machine: where seconds exceed
those of CPU, the stage waited.
"""


def markdown(results: dict[str, Any]) -> str:
    """The page."""
    lines = []
    for name, row in results["stages"].items():
        tokens = (
            [f"{row['tokens']:,.0f}", f"{row['rate']:,.0f}", f"{row['rate_cpu']:,.0f}"] if "tokens" in row else 3 * [""]
        )
        disk = f"{row['disk'] / 1e6:,.1f}" if "disk" in row else ""
        cells = [f"{row['seconds']:.1f}", f"{row['cpu']:.1f}", *tokens, f"{row['memory'] / 1e6:,.0f}", disk]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    stages, settings = results["stages"], results["settings"]
    named = {
        "table": "\n".join(lines),
        "parameters": stages["make"]["parameters"] / 1e6,
        "runs": stages["substitution"]["runs"],
        "bytes": stages["collect"]["bytes"],
        "imported": max(row["imported"] for row in stages.values()) / 1e6,
        "layers": " and ".join(map(str, settings["layers"])),
    }
    return PAGE.format(**settings | results | named)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--layers", type=int, nargs=2, default=[4, 12])
    parser.add_argument("--head", type=int, default=3, help="head of the second layer that a dictionary is trained on")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens that are collected")
    parser.add_argument("--T", type=int, default=128, help="tokens of a sequence")
    parser.add_argument("--F", type=int, default=2048)
    parser.add_argument("--k", type=int, default=2)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--training-tokens", type=int, default=65_536)
    parser.add_argument("--sequences", type=int, default=4, help="sequences of the substitution test")
    parser.add_argument("--atoms", type=int, default=4)
    parser.add_argument("--firings-per-atom", type=int, default=2)
    parser.add_argument("--out", type=Path, help="folder for the page and its numbers")
    options = parser.parse_args()
    rows: dict[str, Row] = {}
    with tempfile.TemporaryDirectory() as folder:
        options.folder = Path(folder)
        spawn = multiprocessing.get_context("spawn")
        for name in STAGES:
            with ProcessPoolExecutor(1, mp_context=spawn) as process:
                rows[name] = process.submit(stage, name, options).result()
            print(name, json.dumps(rows[name]), flush=True)
    settings = {name: value for name, value in vars(options).items() if name not in ("out", "folder")}
    kind = torch.cuda.get_device_name() if options.device.startswith("cuda") else f"CPU ({platform.machine()})"
    results: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "device": kind,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "settings": settings,
        "stages": rows,
        "goal": GOAL,
    }
    if options.out:
        atomic_text(options.out / "real_size.json", json.dumps(results, indent=1) + "\n")
        atomic_text(options.out / "real_size.md", markdown(results))
    print(markdown(results))


if __name__ == "__main__":
    main()
