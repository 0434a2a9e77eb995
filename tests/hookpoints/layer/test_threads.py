"""Several threads on one hooked model: each has its own hooks and gradients. Every kind of run: ``reliability``."""

from __future__ import annotations

import contextvars
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import make_hf
from reliability.runs import WRITE, native

from hookpoints import HookedRecurrent


@pytest.fixture(scope="module")
def shared():
    return HookedRecurrent.from_hf(make_hf())


@torch.no_grad()
def test_a_scope_is_its_threads_own(shared, tokens):
    plain = native(shared, tokens)

    def other():
        with torch.no_grad():
            return native(shared, tokens)

    with ThreadPoolExecutor(1) as pool, shared.hooks([(WRITE, lambda write, hook: 0 * write)]):
        assert torch.equal(pool.submit(other).result(), plain)
        inside = contextvars.copy_context()
        edited = native(shared, tokens)
        assert not torch.equal(edited, plain)
        assert torch.equal(pool.submit(inside.run, other).result(), edited)
    with ThreadPoolExecutor(1) as pool:  # the scope has closed, also for contexts that were copied from it
        assert torch.equal(pool.submit(inside.run, other).result(), plain)
    shared.add_hook(WRITE, lambda write, hook: 0 * write)
    with ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(other).result(), edited)
    shared.reset_hooks()
