"""What an optimizer step costs: matrix atoms in SAELens' own step, and on factors (`sae.fast`), against SAELens' TopK.

    python benchmarks/sae_step.py [--d-k 128 --d-v 128 --d-sae 2048 --k 32 --batch 256 --dead 0.0 --only NAME --out DIR]
    python benchmarks/sae_step.py --goals    # the settings whose ratios are to stay low, on factors against SAELens
    python benchmarks/sae_step.py --loop    # tokens per second of training on writes of the embedded model
    python benchmarks/sae_step.py --stack 16    # so many dictionaries in one step, against one after another

Each contender runs SAELens' own SAETrainer.step (forward, losses, backward, clipping, Adam) in its own process, so
that its peak memory is its own; the processes take turns, one step each, so that a busy machine slows both. Time is
that of the CPU, and a ratio the median of those of single turns. Memory is the peak of the resident set, and what of it
was added after the imports.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

CONTENDERS = {
    "SAELens topk": None,
    "writesae_topk": {"encoder": "bilinear", "decoder": "rank", "rank": 1},
    "writesae_topk rank 2": {"encoder": "bilinear", "decoder": "rank", "rank": 2},
    "writesae_topk tied": {"encoder": "tied", "decoder": "rank", "rank": 1},
    "writesae_topk dense encoder": {"encoder": "dense", "decoder": "rank", "rank": 1},
    "on factors": {"factors": True},
    "on factors, k 2": {"factors": True, "k": 2},
    "on factors, rank 2": {"factors": True, "rank": 2},
}
"""Fields of the config; None is SAELens' own TopK. On factors the rows are writes, K + V numbers instead of K*V."""
BASELINE = "SAELens topk"
GOALS = {
    "K x V 64 x 32, F 4096, k 32": {"d_k": 64, "d_v": 32, "d_sae": 4096, "k": 32, "batch": 4096, "steps": 5},
    "K x V 128 x 128, F 16384, k 32": {"d_k": 128, "d_v": 128, "d_sae": 16384, "k": 32, "batch": 512, "steps": 1},
    "K x V 32 x 32, F 4096, k 1, nine of ten atoms dead": {
        "d_k": 32, "d_v": 32, "d_sae": 4096, "k": 1, "batch": 128, "steps": 15, "dead": 0.9
    },
}  # fmt: skip
"""The second needs 12 GB for SAELens, at any number of rows; more rows only make its step longer."""


def resident(field: str) -> float:
    """VmRSS (now) or VmHWM (peak) of this process in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def build(options: argparse.Namespace, variant: dict[str, Any] | None) -> Any:
    """SAELens' trainer around SAELens' TopK (variant None) or ours."""
    from sae_lens import SAETrainer, TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig

    from sae_lens_writesae.sae import WriteTopKTrainingSAE, WriteTopKTrainingSAEConfig

    sizes = {"d_in": options.d_k * options.d_v, "d_sae": options.d_sae, "k": options.k}
    if variant is None:
        sae: Any = TopKTrainingSAE(TopKTrainingSAEConfig(**sizes))
    else:
        cfg = WriteTopKTrainingSAEConfig(**sizes | variant, d_k=options.d_k, d_v=options.d_v)
        sae = WriteTopKTrainingSAE(cfg)
    cfg = SAETrainerConfig(total_training_samples=10**9, train_batch_size_samples=options.batch, lr_end=3e-5)
    return SAETrainer(cfg, sae, iter(()))


def on_factors(options: argparse.Namespace, variant: dict[str, Any], batch: Any) -> Any:
    """The loop of `sae.fast` around one dictionary."""
    from sae_lens_writesae.sae.fast import Stack

    changes = {name: value for name, value in variant.items() if name != "factors"}
    sizes = {"d_k": options.d_k, "d_v": options.d_v}
    cfg = embedded_config(options.batch, **{"k": options.k, "d_sae": options.d_sae, "steps": 10**6} | sizes | changes)
    return Stack([cfg], [batch], [None])


def work(options: argparse.Namespace) -> None:
    """A contender: one step per line of standard input, its seconds on standard output."""
    import torch

    import sae_lens_writesae.sae.fast  # noqa: F401
    from sae_lens_writesae.atom.low_rank import LowRank

    torch.set_num_threads(options.threads)
    imported = resident("VmRSS")
    variant, generator = CONTENDERS[options.worker], torch.Generator().manual_seed(0)
    factors, dead = bool(variant and variant.get("factors")), slice(int(options.dead * options.d_sae))
    width = options.d_k + options.d_v if factors else options.d_k * options.d_v
    batch = torch.randn(options.batch, width, generator=generator)
    if factors:
        batch = LowRank.rank_one(*batch.split([options.d_k, options.d_v], dim=1))
    trainer = on_factors(options, variant or {}, batch) if factors else build(options, variant)
    for line in sys.stdin:
        if line.strip() == "end":
            break
        if factors:
            trainer.silent[:, dead] = 10**6
        else:
            trainer.n_forward_passes_since_fired[dead] = float("inf")
        start = time.process_time()
        if factors:
            trainer.take([batch])
        else:
            trainer.step(batch)
            trainer.n_training_steps += 1
        print(time.process_time() - start, flush=True)
    sae = trainer.saes[0] if factors else trainer.sae
    parameters = sum(p.numel() for p in sae.parameters())
    print(json.dumps({"peak": resident("VmHWM"), "imported": imported, "parameters": parameters}), flush=True)


def stack(options: argparse.Namespace) -> None:
    """CPU time of dictionaries that train together, as a share of the time of one after another, and rows a second."""
    import torch

    from sae_lens_writesae import train
    from sae_lens_writesae.atom.low_rank import LowRank

    torch.set_num_threads(options.threads)
    generator = torch.Generator().manual_seed(0)
    rows = [
        LowRank.rank_one(*(torch.randn(8192, n, generator=generator) for n in (64, 32))) for _ in range(options.stack)
    ]
    print(f"{options.stack} dictionaries, K 64, V 32, {options.threads} threads; share of time, rows per second of CPU")
    for batch, d_sae, k in ((128, 256, 1), (128, 512, 1), (128, 512, 4), (512, 512, 1), (512, 512, 4), (2048, 512, 1)):
        configs = [embedded_config(batch, k, d_sae, steps=100, seed=seed) for seed in range(options.stack)]
        alone = together = 0.0
        for _ in range(2):  # in turns, so that a busy machine slows both
            start = time.process_time()
            for cfg, each in zip(configs, rows):
                train(cfg, each)
            middle = time.process_time()
            train(configs, rows)
            alone, together = alone + middle - start, together + time.process_time() - middle
        speed = 2 * options.stack * 100 * batch / together
        print(f"batch {batch:>4}, F {d_sae}, k {k}: {together / alone:.2f} {speed:>9.0f}", flush=True)


def embedded_config(
    batch: int, k: int, d_sae: int = 512, steps: int = 200, seed: int = 0, d_k: int = 64, d_v: int = 32, **sae: Any
) -> Any:
    """The config of a dictionary of a head, by default of 64 x 32."""
    from sae_lens import LanguageModelSAERunnerConfig, LoggingConfig

    from sae_lens_writesae.sae import WriteTopKTrainingSAEConfig

    return LanguageModelSAERunnerConfig(
        sae=WriteTopKTrainingSAEConfig(
            **{"d_in": d_k * d_v, "d_k": d_k, "d_sae": d_sae, "k": k, "b_dec_rows": 0} | sae
        ),
        training_tokens=steps * batch,
        train_batch_size_tokens=batch,
        logger=LoggingConfig(log_to_wandb=False),
        checkpoint_path=None,
        device="cpu",
        seed=seed,
    )


def loop(options: argparse.Namespace) -> None:
    """Tokens per second of training (K 64, V 32, F 512) on the writes of one head of the embedded model."""
    import torch

    from hookpoints import HookedRecurrent, embedded
    from sae_lens_writesae import LowRank, train

    torch.set_num_threads(options.threads)
    model = HookedRecurrent.from_pretrained("embedded")
    assert model.tokenizer is not None
    ids = torch.tensor(model.tokenizer(embedded.text("train")[:60_000])["input_ids"])
    tokens = ids[: len(ids) // 256 * 256].view(-1, 256)
    with torch.no_grad():
        writes = model.recurrence(tokens, 2).select(heads=1)
    keys, values = (side[:, :, 0].flatten(0, 1)[:, None] for side in (writes.k, writes.u))
    print(f"{len(keys)} writes, {options.threads} threads; tokens per second, and per second of CPU")
    for batch, k in ((128, 1), (128, 4), (512, 1), (512, 4), (2048, 1)):
        cfg = embedded_config(batch, k)
        start, cpu = time.perf_counter(), time.process_time()
        train(cfg, LowRank(keys, values))
        wall, cpu = time.perf_counter() - start, time.process_time() - cpu
        print(f"batch {batch:>4}, k {k}: {200 * batch / wall:>8.0f} {200 * batch / cpu:>8.0f}")


def measure(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Seconds per step, peak MB and parameters of every contender."""
    command = [sys.executable, __file__, *options.forward]
    environment = os.environ | {
        "OMP_NUM_THREADS": str(options.threads),
        "PYTHONPATH": str(Path(__file__).resolve().parents[1]),
    }
    workers = {
        name: subprocess.Popen(
            [*command, "--worker", name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        for name in (BASELINE, *(n for n in options.only or CONTENDERS if n != BASELINE))
    }
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    for step in range(options.steps + 1):
        for name, process in workers.items():
            elapsed = float(ask(process, "step"))
            if step:  # the first one allocates
                seconds[name].append(elapsed)
    result = {}
    for name, process in workers.items():
        memory = json.loads(ask(process, "end"))
        process.wait()
        result[name] = {
            "seconds": median(seconds[name]),
            "ratio": median(own / base for own, base in zip(seconds[name], seconds[BASELINE])),
            "peak_mb": memory["peak"],
            "added_mb": memory["peak"] - memory["imported"],
            "parameters": memory["parameters"],
        }
    return result


def ask(process: "subprocess.Popen[str]", line: str) -> str:
    """Send one line, read one line."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(line + "\n")
    process.stdin.flush()
    answer = process.stdout.readline()
    if not answer:
        raise RuntimeError(f"a contender died: {process.args}")
    return answer


def table(result: dict[str, dict[str, float]]) -> str:
    """The figures and their ratios to SAELens."""
    base = result[BASELINE]
    lines = [f"{'':<28} {'s/step':>8} {'x':>6} {'peak MB':>9} {'x':>6} {'added MB':>9} {'x':>6} {'parameters':>12}"]
    for name, row in result.items():
        ratios = {key: row[key] / base[key] for key, *_ in COLUMNS} | {"seconds": row["ratio"]}
        figures = [f"{row[key]:>{width}.{digits}f} {ratios[key]:>6.3f}" for key, width, digits in COLUMNS]
        lines.append(f"{name:<28} {' '.join(figures)} {row['parameters']:>12,.0f}")
    return "\n".join(lines)


COLUMNS = (("seconds", 8, 3), ("peak_mb", 9, 0), ("added_mb", 9, 0))


def save(result: dict[str, dict[str, float]], options: argparse.Namespace) -> None:
    """sae_step.json and sae_step.png."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    options.out.mkdir(parents=True, exist_ok=True)
    setting = {key: getattr(options, key) for key in ("d_k", "d_v", "d_sae", "k", "batch", "dead", "steps", "threads")}
    (options.out / "sae_step.json").write_text(json.dumps({"setting": setting, "result": result}, indent=1))
    figure, axes = plt.subplots(1, 2, figsize=(10, 3), sharey=True, layout="constrained")
    for axis, key, label in zip(axes, ("seconds", "added_mb"), ("seconds per step", "MB added after imports")):
        axis.barh(list(result), [row[key] for row in result.values()])
        axis.set_xlabel(label)
    axes[0].invert_yaxis()
    figure.savefig(options.out / "sae_step.png", dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("d-k", 128), ("d-v", 128), ("d-sae", 2048), ("k", 32), ("batch", 256), ("steps", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dead", type=float, default=0.0, help="share of atoms taken as dead (auxiliary loss)")
    parser.add_argument("--out", type=Path, help="folder for sae_step.json and sae_step.png")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, help="contenders beside SAELens")
    parser.add_argument("--loop", action="store_true", help="tokens per second of training instead")
    parser.add_argument("--stack", type=int, help="dictionaries that train together, against one after another")
    parser.add_argument("--worker", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--goals", action="store_true", help="the settings whose ratios are to stay low")
    options = parser.parse_args()
    options.forward = sys.argv[1:]
    if options.worker:
        work(options)
        return
    if options.loop:
        loop(options)
        return
    if options.stack:
        stack(options)
        return
    if options.goals:
        for title, setting in GOALS.items():
            given = argparse.Namespace(**vars(options) | setting | {"only": ["on factors"]})
            flags = [f"--{name.replace('_', '-')}={value}" for name, value in setting.items()]
            given.forward = [*flags, f"--threads={options.threads}"]
            print(f"{title}, {given.batch} rows\n{table(measure(given))}", flush=True)
        return
    result = measure(options)
    print(table(result))
    if options.out:
        save(result, options)


if __name__ == "__main__":
    main()
