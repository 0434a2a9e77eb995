"""Memory over many runs, caches after generation, copies; ``scripts/reliability_page.py`` does the same for longer."""

from __future__ import annotations

import pytest

from reliability import copies, long


@pytest.mark.parametrize("run", [long.cached_runs, long.sessions], ids=lambda run: run.__name__)
def test_memory_stays(run):
    found = long.growth(run, 12)
    assert found.hooks == 0 and found.after - found.before < 64


def test_generation_leaves_its_cache_right():
    found = long.generation(24)
    assert found.same_tokens and found.fired == 24 and found.state_error < 1e-4


@pytest.mark.slow
def test_long_sequences_take_less_than_twice_the_memory():
    plain = long.peak("plain", 4_096)
    assert all(long.peak(kind, 4_096) < 2 * plain for kind in long.PEAKS[1:])


def test_copies_and_moves_are_right_or_refused(tokens):
    found = copies.throw(tokens)
    assert set(found.values()) == {"right", "refused by name"}, found
    assert all(
        (outcome == "refused by name") == (" of " in what and "inside" not in what) for what, outcome in found.items()
    )
