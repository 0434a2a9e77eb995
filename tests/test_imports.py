"""What importing loads: modules are counted, which are the same on every machine, and no time is taken."""

from __future__ import annotations

import subprocess
import sys

import pytest

COUNT = """
import sys
before = set(sys.modules)
exec(sys.argv[1])
before |= set(sys.modules)
exec(sys.argv[2])
new = set(sys.modules) - before
print(len(new), *(name for name in ("torch", "transformers", "transformer_lens", "sae_lens") if name in new))
"""


@pytest.mark.parametrize(
    ("first", "then", "most", "libraries"),
    [
        ("", "import hookpoints; from hookpoints import HOOKS, EditError, embedded", 80, []),
        ("", "from hookpoints import RULES, Recurrence, WriteEdit, zoo", 2_000, ["torch"]),
        ("import transformer_lens", "from hookpoints import HookedRecurrent, Memory, attach, cost", 120, []),
        ("import sae_lens; from hookpoints import HookedRecurrent", "import sae_lens_writesae", 60, []),
    ],
)
def test_a_name_loads_what_it_needs(first: str, then: str, most: int, libraries: list[str]) -> None:
    """``then``, in a fresh program, after ``first``."""
    run = subprocess.run([sys.executable, "-c", COUNT, first, then], capture_output=True, text=True, check=True)
    n, *loaded = run.stdout.split()
    assert int(n) <= most and loaded == libraries
