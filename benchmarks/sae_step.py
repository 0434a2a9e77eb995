"""What an optimizer step costs on factors of writes (`sae.fast`), beside a step of SAELens' TopK on matrices.

Each runs in its own process, so that its peak memory is its own; the processes take turns, one step each, so that a
busy machine slows both. A ratio is the median of those of single turns. Memory is the peak of the resident set, and
what of it was added after the imports.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from frame import Line, main, peak_memory

TITLE = "Training steps"
QUICK = {"steps": 1, "d_sae": 256}
SAELENS, FACTORS = "SAELens topk", "on factors"
SETTINGS: dict[str, dict[str, Any]] = {
    "K x V 64 x 32, F 4096, k 32": {"d_k": 64, "d_v": 32, "d_sae": 4096, "k": 32, "batch": 4096, "dead": 0.0},
    "K x V 32 x 32, F 4096, k 1, nine of ten atoms dead": {
        **{"d_k": 32, "d_v": 32, "d_sae": 4096, "k": 1, "batch": 128, "dead": 0.9}
    },
}
"""Dictionaries and rows of a step; `dead` is the share of atoms that the auxiliary loss takes for dead."""


def on_matrices(setting: dict[str, Any], batch: Any) -> Any:
    """SAELens' trainer around its TopK."""
    from sae_lens import SAETrainer, TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig

    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=batch.shape[1], d_sae=setting["d_sae"], k=setting["k"]))
    cfg = SAETrainerConfig(total_training_samples=10**9, train_batch_size_samples=len(batch), lr_end=3e-5)
    return SAETrainer(cfg, sae, iter(()))


def on_factors(setting: dict[str, Any], batch: Any) -> Any:
    """The loop of `sae.fast` around one dictionary."""
    from sae_lens import LanguageModelSAERunnerConfig, LoggingConfig

    from sae_lens_writesae.sae import WriteTopKTrainingSAEConfig
    from sae_lens_writesae.sae.fast import Stack

    sizes = {"d_in": setting["d_k"] * setting["d_v"], "d_k": setting["d_k"], "b_dec_rows": 0}
    cfg = LanguageModelSAERunnerConfig(
        sae=WriteTopKTrainingSAEConfig(**sizes, d_sae=setting["d_sae"], k=setting["k"]),
        training_tokens=10**6 * setting["batch"],
        train_batch_size_tokens=setting["batch"],
        logger=LoggingConfig(log_to_wandb=False),
        checkpoint_path=None,
        device="cpu",
    )
    return Stack([cfg], [batch], [None])


def work(way: str, setting: dict[str, Any]) -> None:
    """One step per line of standard input, its seconds on standard output; after "end", megabytes of memory."""
    import torch

    import sae_lens_writesae.sae.fast  # noqa: F401
    from sae_lens_writesae.atom.low_rank import LowRank

    torch.set_num_threads(1)
    imported = peak_memory()
    generator = torch.Generator().manual_seed(0)
    dead = slice(int(setting["dead"] * setting["d_sae"]))
    d_k, d_v, n = setting["d_k"], setting["d_v"], setting["batch"]
    if way == FACTORS:
        rows: Any = LowRank.rank_one(*(torch.randn(n, width, generator=generator) for width in (d_k, d_v)))
        trainer = on_factors(setting, rows)
    else:
        rows = torch.randn(n, d_k * d_v, generator=generator)
        trainer = on_matrices(setting, rows)
    for line in sys.stdin:
        if line.strip() == "end":
            break
        if way == FACTORS:
            trainer.silent[:, dead] = 10**6
        else:
            trainer.n_forward_passes_since_fired[dead] = float("inf")
        start = time.process_time()
        if way == FACTORS:
            trainer.take([rows])
        else:
            trainer.step(rows)
            trainer.n_training_steps += 1
        print(time.process_time() - start, flush=True)
    peak = peak_memory()
    print(json.dumps({"peak_mb": peak / 2**20, "added_mb": (peak - imported) / 2**20}), flush=True)


def answer(process: subprocess.Popen[str], line: str) -> Any:
    """Send one line to a worker, read one line of JSON."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(line + "\n")
    process.stdin.flush()
    reply = process.stdout.readline()
    if not reply:
        raise RuntimeError(f"expected a line from {process.args}, but the process ended; its error is above")
    return json.loads(reply)


def compared(setting: dict[str, Any], steps: int) -> dict[str, dict[str, float]]:
    """Seconds per step, ratio and megabytes of both ways."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    workers = {
        way: subprocess.Popen(
            [sys.executable, __file__, "--worker", way, json.dumps(setting)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for way in (SAELENS, FACTORS)
    }
    seconds: dict[str, list[float]] = {way: [] for way in workers}
    for step in range(steps + 1):
        for way, process in workers.items():
            elapsed = answer(process, "step")
            if step:  # the first one allocates
                seconds[way].append(elapsed)
    result: dict[str, dict[str, float]] = {}
    for way, process in workers.items():
        memory = answer(process, "end")
        process.wait()
        ratio = median(own / base for own, base in zip(seconds[way], seconds[SAELENS]))
        result[way] = {"seconds": median(seconds[way]), "ratio": ratio, **memory}
    return result


def measure(steps: int = 5, d_sae: int = 0) -> dict[str, Any]:
    """Both ways in each setting; `d_sae` replaces its number of atoms."""
    own = {"d_sae": d_sae} if d_sae else {}
    return {title: compared(setting | own, steps) for title, setting in SETTINGS.items()}


def lines(figures: dict[str, Any]) -> list[Line]:
    """A step on factors over one of SAELens' TopK."""
    page_lines: list[Line] = []
    for title, ways in figures.items():
        base, own = ways[SAELENS], ways[FACTORS]
        page_lines.append(Line(f"{title}: time on a CPU, over SAELens' TopK", own["ratio"], goal=0.045))
        added = own["added_mb"] / base["added_mb"]
        page_lines.append(Line(f"{title}: memory that it adds, over SAELens' TopK", added, goal=0.11))
    return page_lines


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(sys.argv[2], json.loads(sys.argv[3]))
    else:
        main(sys.modules[__name__])
