"""Throw at the packages what goes wrong in practice, count what comes back, and write docs/reliability.md.

    python scripts/reliability_page.py [--only SECTION ...] [--scale X] [--out FOLDER]

The throwers are those of ``tests/reliability``, which the test suite calls with fewer rounds. Numbers are kept in
reliability.json, section by section, so that one section can be run again; the page is made from them. Takes some five
minutes of CPU time. Sections on disks need the right to mount a file system; they are skipped without.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from reliability import copies, damage, disks, interrupts, intruders, long, threads  # noqa: E402
from small_saes import make_sae  # noqa: E402

from hookpoints import embedded  # noqa: E402
from hookpoints.files import write_checksums  # noqa: E402

VERSIONS = ("torch", "transformers", "transformer-lens", "sae-lens", "safetensors", "tokenizers")


class Row(NamedTuple):
    """One line of the page."""

    thrown: str
    n: int
    outcome: str
    good: bool


Section = Callable[[Path, float], list[Row]]


def times(n: int, scale: float) -> int:
    return max(round(n * scale), 2)


def said(counts: Counter[str], more: str = "") -> str:
    return ", ".join(f"{n:,} {what}" for what, n in counts.most_common()) + more


def damaged_files(work: Path, scale: float) -> list[Row]:
    rows = []
    for sums, rounds in ((False, 60), (True, 20)):
        counts, changed, faults = Counter[str](), Counter[str](), []
        for name in embedded.names():
            folder = shutil.copytree(embedded.path(name), work / f"{name}{sums}")
            if sums:
                readable = [file.name for file in folder.iterdir() if file.suffix in (".json", ".safetensors")]
                write_checksums(folder, sorted(readable))
            found = damage.throw(folder, damage.load_model, work, times(rounds, scale), seed=int(sums))
            counts, changed, faults = counts + found.counts, changed + found.changed, faults + found.faults
        where = ", ".join(f"{n} in {name}" for name, n in changed.most_common())
        title = (
            f"flips and cuts in model folders (weights, config, tokenizer), {'with' if sums else 'without'} checksums"
        )
        good = not faults and not (sums and changed)
        rows.append(Row(title, counts.total(), said(counts, f" ({where})" if where else ""), good))
    make_sae(interrupts.fresh()).save_model(work / "sae")
    found = damage.throw(work / "sae", damage.load_dictionary, work, times(260, scale))
    good = not found.faults and not found.changed
    rows.append(Row("flips and cuts in folders of dictionaries", found.counts.total(), said(found.counts), good))
    return rows


def interrupted(work: Path, scale: float) -> list[Row]:
    rows, tokens = [], _tokens()
    expected = interrupts.Outputs(interrupts.fresh(), tokens)
    for runs, moments in ((interrupts.RUNS, 25), (interrupts.LONG_RUNS, 8)):
        for run in runs:
            model = interrupts.fresh()
            with torch.no_grad():
                once = functools.partial(run, model, tokens)
                ended = interrupts.throw(once, times(moments, scale), run.__name__)
            model.hf_model.zero_grad()
            equal = interrupts.Outputs(model, tokens).equal(expected)
            outcome = "all outputs are those of a fresh model" if equal else "OTHER OUTPUTS"
            rows.append(
                Row(f"SIGINT or SIGTERM in a run: {run.__name__}", ended.total(), f"{outcome} ({said(ended)})", equal)
            )
    for run in interrupts.RUNS[2:]:
        model = interrupts.fresh()
        ended = interrupts.at_calls(run, model, tokens, n := times(300, scale))
        equal = interrupts.Outputs(model, tokens).equal(expected) and len(ended) == n
        outcome = "all outputs are those of a fresh model" if equal else "OTHER OUTPUTS"
        rows.append(Row(f"KeyboardInterrupt as a call of hookpoints returns: {run.__name__}", n, outcome, equal))
    return rows


def concurrent(work: Path, scale: float) -> list[Row]:
    rows, tokens, model = [], _tokens(), interrupts.fresh()
    for jobs in threads.PAIRS:
        equal = threads.at_once(model, tokens, jobs * 2, times(20, scale))
        title = f"four threads on one model: {' beside '.join(dict.fromkeys(job.__name__ for job in jobs))}"
        rows.append(Row(title, len(equal), f"{sum(equal):,} results are those of the run alone", all(equal)))
    equal = threads.as_tasks(model, tokens, times(20, scale))
    title = "five tasks of one event loop, each inside its own edits"
    return [*rows, Row(title, len(equal), f"{sum(equal):,} results are those of the run alone", all(equal))]


def copied(work: Path, scale: float) -> list[Row]:
    good = ("right", "refused by name")
    return [Row(what, 1, outcome, outcome in good) for what, outcome in copies.throw(_tokens()).items()]


def killed(work: Path, scale: float) -> list[Row]:
    rows = []
    for write in (disks.evaluation, disks.collection, disks.trainings):
        found = disks.kill(write, work / write.__name__, times(20, scale))
        whole = "no file half written" if not found.broken else f"BROKEN: {'; '.join(found.broken)}"
        result = "the result of a run without kills" if found.equal else "ANOTHER RESULT"
        rows.append(
            Row(f"kill -9: {write.__name__}", found.kills, f"{whole}; then {result}", found.equal and not found.broken)
        )
    return rows


def on_disks(work: Path, scale: float) -> list[Row]:
    rows = []
    for write in (disks.evaluation, disks.collection, disks.checkpoints):
        name, found = write.__name__, disks.full_disk(write, work / write.__name__)
        if found is None:
            rows.append(Row(f"full disk: {name}", 0, "skipped: no file system can be mounted here", True))
        else:
            good = found.equal and set(found.full) == {"named"}
            then = "with room, the whole result" if found.equal else "then ANOTHER RESULT"
            outcome = f"{Counter(found.full)['named']} errors name the file or folder; {then}"
            rows.append(Row(f"full disk: {name}", len(found.full), outcome, good))
            good = found.read_only == "named"
            rows.append(Row(f"read-only folder: {name}", 1, "an error names it" if good else found.read_only, good))
        equal = disks.two_processes(write, work / f"two-{name}")
        outcome = "the result of one alone" if equal else "ANOTHER RESULT"
        rows.append(Row(f"two processes in one folder: {name}", 2, outcome, bool(equal)))
    return rows


def from_strangers(work: Path, scale: float) -> list[Row]:
    rows = []
    for attack in intruders.ATTACKS:
        outcome = intruders.throw(attack, work / attack.__name__)
        what = (attack.__doc__ or "").strip().rstrip(".")
        rows.append(Row(what, 1, outcome, outcome in ("no effect", "refused by name")))
    return rows


def long_runs(work: Path, scale: float) -> list[Row]:
    rows = []
    for run, what in ((long.cached_runs, "runs with a cache"), (long.sessions, "edit sessions")):
        n = times(500, scale)
        found = long.growth(run, n)
        good = found.after < found.before + 64 and not found.hooks
        outcome = f"memory {found.before:.0f} MB before and {found.after:.0f} MB after, {found.hooks} hooks left"
        rows.append(Row(what, n, outcome, good))
    length = times(16_384, scale)
    peaks = {kind: long.peak(kind, length) for kind in long.PEAKS}
    for kind in long.PEAKS[1:]:
        ratio = peaks[kind] / peaks["plain"]
        outcome = (
            f"{peaks[kind]:.0f} MB at most; the model without hookpoints {peaks['plain']:.0f} MB: {ratio:.2f} times"
        )
        rows.append(Row(f"a pass over {length:,} tokens, {kind}", 1, outcome, ratio < 2))
    found = long.generation(times(2_000, scale))
    good = found.same_tokens and found.fired == found.tokens and found.state_error < 1e-4
    same = "the tokens that the model generates alone" if found.same_tokens else "OTHER TOKENS"
    outcome = (
        f"{same}; the hook fired {found.fired:,} times; states of the cache within {found.state_error:.0e} of one pass"
    )
    return [*rows, Row("tokens generated with a hook, then with an edit", found.tokens, outcome, good)]


SECTIONS: dict[str, tuple[str, Section]] = {
    "damage": ("Damaged files", damaged_files),
    "interrupts": ("Interrupts", interrupted),
    "threads": ("Threads and tasks", concurrent),
    "copies": ("Copies and moves", copied),
    "kills": ("Kills", killed),
    "disks": ("Disks and folders", on_disks),
    "strangers": ("Folders from strangers", from_strangers),
    "long": ("Long runs", long_runs),
}
NOTES = {
    "damage": "One bit is flipped, or the end cut off, at a random place of a random file (half of the hits in a "
    "weights file go to its header); then the folder is loaded. *identical*: outputs and tokens are bit for "
    "bit those of the whole folder; *refused*: an error names the damaged file; *no tokenizer*: the model is "
    "whole and a warning names the file; *another number*: what was flipped is still valid there (a weight, a "
    "setting, an entry of a vocabulary) and is taken as it stands. Only checksums can tell that: `SHA256SUMS` "
    "is written beside every dictionary and in every checkpoint; `sha256sum *.json *.safetensors > "
    "SHA256SUMS` makes one in a model's folder.",
    "interrupts": "Afterwards the native logits, hooked and edited ones, caches, partial runs and sessions are "
    "compared bit for bit with those of a fresh model.",
    "threads": "Results are compared bit for bit with those of the same run alone.",
    "copies": "A hooked model is refused with what to do instead; the model inside can be copied, and its copies carry "
    "no hook points.",
    "kills": "After each kill everything that is there under its own name is read; at the end the run is let finish. "
    "Twenty kills of a protocol are a test (`tests/test_reproduce.py`).",
    "disks": "A file system of 30, 60 and 90 % of the size that is needed, then with room, then read-only.",
    "strangers": "*no effect*: loading goes on without it; nothing was run, asked or written elsewhere. "
    "Markup in tokens, labels and names is opened in a browser by `tests/page`.",
    "long": "",
}


def _tokens() -> torch.Tensor:
    return torch.randint(1, 64, (2, 70), generator=torch.Generator().manual_seed(1))


def page(kept: dict[str, dict]) -> str:
    rows = [row for section in kept.values() for row in section["rows"]]
    bad, n = [row for row in rows if not row[3]], sum(row[1] for row in rows)
    used = ", ".join(f"{name} {number}" for name, number in next(iter(kept.values()))["versions"].items())
    dates = sorted({section["date"] for section in kept.values()})
    verdict = (
        "Every outcome is as it should be." if not bad else f"{len(bad)} line(s) are not as they should be: **bold**."
    )
    lines = [
        "# Reliability",
        "",
        f"Made by `scripts/reliability_page.py`, not by hand, on {' and '.join(dates)}: {used}; CPU.",
        f"It tried {n:,} times, in the {len(rows)} ways below, to break the packages. {verdict}",
        "The same code runs in the test suite with fewer rounds (`tests/reliability`).",
    ]
    for name, section in kept.items():
        lines += ["", f"## {SECTIONS[name][0]}", ""]
        lines += [NOTES[name], ""] if NOTES[name] else []
        lines += ["| what was thrown | how often | what came back |", "|---|---|---|"]
        for thrown, count, outcome, good in section["rows"]:
            text = outcome.replace("|", "\\|").replace("\n", " ")
            lines.append(f"| {thrown} | {count:,} | {text if good else f'**{text}**'} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--scale", type=float, default=1.0, help="part or multiple of the rounds")
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    arguments = parser.parse_args()
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    file = arguments.out / "reliability.json"
    kept = json.loads(file.read_text()) if file.is_file() else {}
    for name in arguments.only:
        begin = time.perf_counter()
        with tempfile.TemporaryDirectory() as work:
            rows = SECTIONS[name][1](Path(work), arguments.scale)
        seconds = time.perf_counter() - begin
        used = {package: version(package) for package in VERSIONS}
        kept[name] = {"date": str(date.today()), "versions": used, "seconds": round(seconds), "rows": rows}
        for row in rows:
            print(f"{'' if row.good else 'NOT GOOD '}{row.thrown}: {row.n:,}: {row.outcome}", flush=True)
        print(f"== {name}: {seconds:.0f} s", flush=True)
        kept = {known: kept[known] for known in SECTIONS if known in kept}
        arguments.out.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(kept, indent=1) + "\n")
        (arguments.out / "reliability.md").write_text(page(json.loads(file.read_text())), encoding="utf-8")
    return 0 if all(row[3] for section in kept.values() for row in section["rows"]) else 1


if __name__ == "__main__":
    sys.exit(main())
