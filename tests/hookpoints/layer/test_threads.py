"""Several threads on one hooked model: each has its own hooks and gradients. Every kind of run: ``reliability``."""

from __future__ import annotations

import contextvars
from concurrent.futures import ThreadPoolExecutor

import torch
from reliability.runs import WRITE, native


@torch.no_grad()
def test_a_scope_is_its_threads_own(model, tokens):
    plain = native(model, tokens)

    def other():
        with torch.no_grad():
            return native(model, tokens)

    with ThreadPoolExecutor(1) as pool, model.hooks([(WRITE, lambda write, hook: 0 * write)]):
        assert torch.equal(pool.submit(other).result(), plain)
        inside = contextvars.copy_context()
        edited = native(model, tokens)
        assert not torch.equal(edited, plain)
        assert torch.equal(pool.submit(inside.run, other).result(), edited)
    with ThreadPoolExecutor(1) as pool:  # the scope has closed, also for contexts that were copied from it
        assert torch.equal(pool.submit(inside.run, other).result(), plain)
        model.add_hook(WRITE, lambda write, hook: 0 * write)
        assert torch.equal(pool.submit(other).result(), edited)
    model.reset_hooks()
