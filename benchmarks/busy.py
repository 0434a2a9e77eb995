"""What the threads of torch cost where other programs run: training steps and edited rows with the default settings, as
a ratio to one thread, alone and with two processes that compute without end.

    python benchmarks/busy.py [--steps 60 --rows 120 --rounds 3 --before --out DIR]

Each setting has its own process, and the processes take turns. *torch first* has loaded torch before
hookpoints, as a notebook may have. With --before there is also *spinning*: as many threads as cores, which
wait as OpenMP's do unless told otherwise. That takes minutes. Ratios are medians over the rounds.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from sae_step import ask, embedded_config

SETTINGS = {
    "one thread": {"OMP_NUM_THREADS": "1"},
    "default": {},
    "torch first": {},
    "spinning": {"OMP_NUM_THREADS": str(os.cpu_count()), "GOMP_SPINCOUNT": "300000"},
}
"""Environment variables, in an environment without any other about threads."""
BASELINE, BEFORE = "one thread", "spinning"
PARTS = ("training steps", "edited rows")


def work(setting: str) -> None:
    """One setting: for every line of standard input, seconds of so many training steps and so many edited rows."""
    if setting == "torch first":
        importlib.import_module("torch")
    from hookpoints import EditSession, HookedRecurrent, WriteEdit, embedded
    from sae_lens_writesae import train_on_writes

    torch = importlib.import_module("torch")
    model = HookedRecurrent.from_pretrained("embedded", device="cpu")
    assert model.tokenizer is not None
    tokens = torch.tensor([model.tokenizer(embedded.text("train")[:9000])["input_ids"][:1024]])
    with torch.no_grad():
        writes = model.recurrence(tokens, 2).select(heads=1)
    keys, values = (side[:, :, 0].flatten(0, 1)[:, None] for side in (writes.k, writes.u))
    session = EditSession(model, tokens[:, :128])

    def seconds(steps: int, rows: int) -> dict[str, float]:
        start = time.perf_counter()
        train_on_writes(embedded_config(512, 4, steps=steps), keys, values)
        middle = time.perf_counter()
        for row in range(rows):
            session.run([WriteEdit(2, 1, row % 100, mode="delete")], stop=row % 100 + 17)
        return dict(zip(PARTS, (middle - start, time.perf_counter() - middle)))

    seconds(2, 2)
    for line in sys.stdin:
        print(json.dumps(seconds(*map(int, line.split()))), flush=True)


@contextmanager
def beside(others: int) -> Iterator[None]:
    """So many busy processes in this scope."""
    started = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(others)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def start(setting: str) -> "subprocess.Popen[str]":
    threading = ("OMP_", "GOMP_", "KMP_", "MKL_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(threading)}
    environment |= SETTINGS[setting] | {"PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    command = [sys.executable, __file__, "--worker", setting]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    )


def ratio(taken: list[dict[str, dict[str, float]]], setting: str, part: str) -> float:
    """Median over rounds of the ratio to one thread; for one thread, of the seconds."""
    return median(each[setting][part] / (1 if setting == BASELINE else each[BASELINE][part]) for each in taken)


def measure(settings: list[str], rounds: int, amounts: str) -> dict[str, dict[str, dict[str, float]]]:
    """Ratios to one thread, by what else runs and by setting; for one thread, seconds."""
    workers = {setting: start(setting) for setting in settings}
    found: dict[str, dict[str, dict[str, float]]] = {}
    try:
        for label, others in (("alone", 0), ("beside two busy processes", 2)):
            with beside(others):
                taken = [{s: json.loads(ask(worker, amounts)) for s, worker in workers.items()} for _ in range(rounds)]
            found[label] = {s: {part: ratio(taken, s, part) for part in PARTS} for s in settings}
    finally:
        for worker in workers.values():
            worker.kill()
            worker.wait()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("steps", 60), ("rows", 120), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--before", action="store_true", help=f"also {BEFORE!r}, which takes minutes")
    parser.add_argument("--out", type=Path, help="folder for busy.json")
    parser.add_argument("--worker", choices=SETTINGS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker)
        return
    settings = [setting for setting in SETTINGS if setting != BEFORE or options.before]
    found = measure(settings, options.rounds, f"{options.steps} {options.rows}")
    print(f"{options.steps} training steps, {options.rows} edited rows: time / one thread; of one thread: seconds")
    print(f"median of {options.rounds}, {os.cpu_count()} cores")
    for label, rows in found.items():
        print(f"\n{label}")
        for setting, row in rows.items():
            print(f"  {setting:12s}" + "".join(f"  {part} {value:6.2f}" for part, value in row.items()))
    print("\n" + json.dumps(found))
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "busy.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
