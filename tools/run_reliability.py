"""Run the checks of tests/reliability with all rounds: damaged files, interrupts, threads and kills.

    python tools/run_reliability.py [--rounds X] [--only CHECK ...]

The test suite runs the same checks with fewer rounds, and `tools/mutants/definitions.toml` has products that they must
catch. Some five minutes of CPU time; --rounds 10 takes ten times as many rounds.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import torch
import tyro

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from reliability import folders, running, writing  # noqa: E402, F401 (they have checks)
from reliability.checks import CHECKS  # noqa: E402

Name = Literal[tuple(check.name for check in CHECKS)]  # type: ignore[valid-type]


def main(only: Sequence[Name] = get_args(Name), rounds: float = 1.0) -> int:
    """Run the checks; 1 where a comparison failed.

    Args:
        only: these checks
        rounds: part or multiple of the rounds
    """
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    failures = 0
    for check in CHECKS:
        if check.name not in only:
            continue
        begin = time.process_time()
        with tempfile.TemporaryDirectory() as work:
            comparisons = list(check.run(Path(work, "whole"), max(round(check.many * rounds), 1)))
        broken = [each for each in comparisons if not each.holds()]
        seconds = time.process_time() - begin
        print(f"{check.name}: {len(comparisons):,} comparisons, {len(broken)} failed, {seconds:.0f} s", flush=True)
        for each in broken:
            print(f"    {each.what}: expected {each.expected}, got {each.got}"[:500], flush=True)
        failures += len(broken)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
