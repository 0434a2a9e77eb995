"""What the threads of torch cost where other programs run: training steps and edited rows with the default settings, as
a ratio to one thread, alone and with two processes that compute without end.

Each setting has its own process, and the processes take turns. *torch first* has loaded torch before
hookpoints, as a notebook may have. Ratios are medians over the rounds.
"""

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

from frame import Line, main
from sae_step import ask, embedded_config

SETTINGS = {
    "one thread": {"OMP_NUM_THREADS": "1"},
    "default": {},
    "torch first": {},
}
"""Environment variables, in an environment without any other about threads."""
BASELINE = "one thread"
PARTS = ("training steps", "edited rows")
TITLE = "Beside busy processes"
QUICK = {"steps": 2, "rows": 2, "rounds": 1}


def work(setting: str) -> None:
    """One setting: for every line of standard input, seconds of so many training steps and so many edited rows."""
    if setting == "torch first":
        importlib.import_module("torch")
    from hookpoints import EditSession, HookedRecurrent, WriteEdit, embedded
    from sae_lens_writesae import LowRank, train

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
        train(embedded_config(512, 4, steps=steps), LowRank(keys, values))
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


def measure(steps: int = 60, rows: int = 120, rounds: int = 3) -> dict[str, dict[str, dict[str, float]]]:
    """Ratios to one thread, by what else runs and by setting; for one thread, seconds."""
    workers = {setting: start(setting) for setting in SETTINGS}
    amounts = f"{steps} {rows}"
    found: dict[str, dict[str, dict[str, float]]] = {}
    try:
        for label, others in (("alone", 0), ("beside two busy processes", 2)):
            with beside(others):
                taken = [{s: json.loads(ask(worker, amounts)) for s, worker in workers.items()} for _ in range(rounds)]
            found[label] = {s: {part: ratio(taken, s, part) for part in PARTS} for s in SETTINGS}
    finally:
        for worker in workers.values():
            worker.kill()
            worker.wait()
    return found


def lines(found: dict[str, dict[str, dict[str, float]]]) -> list[Line]:
    """Ratios."""
    return [
        Line(f"{others}: {part}, {setting} / {BASELINE}", value, goal=2.0)
        for others, rows in found.items()
        for setting, row in rows.items()
        for part, value in row.items()
        if setting != BASELINE
    ]


if __name__ == "__main__":
    work(sys.argv[2]) if sys.argv[1:2] == ["--worker"] else main(sys.modules[__name__])
