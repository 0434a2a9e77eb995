"""Several threads on one hooked model: each has its own hooks, edits and partial runs."""

from __future__ import annotations

import contextvars
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from conftest import make_hf

from hookpoints import HookedRecurrent, WriteEdit

WRITE = "blocks.1.mixer.hook_write"
ROUNDS = 15
"""Forwards of each thread in a test."""


def native(model, tokens):
    return model.hf_model(tokens).logits


def deleted(model, tokens):
    with model.edits(WriteEdit(1, 0, None, mode="delete")):
        return model(tokens)


def added(model, tokens):
    with model.edits(WriteEdit(0, 1, 4, torch.ones(8), torch.ones(6))):
        return model(tokens)


def stopped(model, tokens):
    return model(tokens, stop_at_layer=2)


def started(model, tokens):
    return model(model(tokens, stop_at_layer=1), start_at_layer=1)


def hooked(model, tokens):
    return model.run_with_hooks(tokens, fwd_hooks=[(WRITE, lambda write, hook: 2 * write)])


def cached(model, tokens):
    return model.run_with_cache(tokens, names_filter=WRITE)[1][WRITE]


def session(model, tokens):
    return model.run_with_edits(tokens[:1], [WriteEdit(1, head, 30, mode="delete") for head in range(4)]).logits


def generated(model, tokens):
    edit = WriteEdit(1, 0, 13, mode="delete")
    return model.generate(tokens[:, :12], edits=edit, max_new_tokens=4, do_sample=False)


PAIRS = [
    (native, native),
    (native, stopped),
    (native, session),
    (native, hooked),
    (deleted, added),
    (started, deleted),
    (hooked, cached),
    (session, session),
    (generated, hooked),
]


@pytest.fixture(scope="module")
def shared():
    return HookedRecurrent.from_hf(make_hf())


@pytest.mark.parametrize("jobs", PAIRS, ids=lambda jobs: "-".join(job.__name__ for job in jobs))
def test_two_kinds_of_run_at_once(shared, tokens, jobs):
    """Four threads, two of each kind, against the same runs alone; and the native output afterwards."""
    with torch.no_grad():
        plain = native(shared, tokens)
        expected = {job: job(shared, tokens) for job in jobs}
    threads = [job for job in jobs for _ in range(2)]
    barrier = Barrier(len(threads))

    def work(job):
        barrier.wait(timeout=60)
        with torch.no_grad():  # of this thread
            return [torch.equal(job(shared, tokens), expected[job]) for _ in range(ROUNDS)]

    with ThreadPoolExecutor(len(threads)) as pool:
        equal = [x for result in pool.map(work, threads) for x in result]
    assert len(equal) == 4 * ROUNDS and all(equal)
    with torch.no_grad():
        assert torch.equal(native(shared, tokens), plain)
    assert not any(point.fwd_hooks or point._forward_hooks for point in shared.hook_dict.values())


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


def test_gradients_of_several_threads(shared, tokens):
    def work(factor):
        seen = []
        with shared.hooks(bwd_hooks=[(WRITE, lambda gradient, hook: seen.append(gradient.clone()))]):
            (factor * shared(tokens, return_type="loss")).backward()
        return seen

    expected = [work(factor) for factor in (1.0, 2.0)]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(5):
            for found, alone in zip(pool.map(work, (1.0, 2.0)), expected, strict=True):
                assert len(found) == 1 and torch.equal(found[0], alone[0])
    shared.hf_model.zero_grad()
