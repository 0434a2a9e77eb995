"""What benchmarks say of the study: what a substitution launches on a GPU."""

from __future__ import annotations

import sys
from pathlib import Path

import device
import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import launches


@pytest.mark.nightly
def test_a_substitution_stays_below_its_ceilings() -> None:
    with device.pretended() as seen:
        costs = launches.of_substitution(seen)
    assert costs["launch"] <= 60_000 and costs["sync"] <= 200
