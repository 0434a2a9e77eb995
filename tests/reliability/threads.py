"""Several threads or tasks on one hooked model, each with its own kind of run."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import torch

from hookpoints import WriteEdit

WRITE = "blocks.1.mixer.hook_write"


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


def at_once(model, tokens, jobs: Sequence[Callable], rounds: int) -> list[bool]:
    """Run each job in a thread of its own, again and again, and tell of each run whether its result is, bit for bit,
    what the job gives alone."""
    with torch.no_grad():
        expected = {job: job(model, tokens) for job in jobs}
    barrier = Barrier(len(jobs))

    def work(job: Callable) -> list[bool]:
        barrier.wait(timeout=60)
        with torch.no_grad():  # of this thread
            return [torch.equal(job(model, tokens), expected[job]) for _ in range(rounds)]

    with ThreadPoolExecutor(len(jobs)) as pool:
        return [equal for result in pool.map(work, jobs) for equal in result]


def as_tasks(model, tokens, rounds: int) -> list[bool]:
    """Tasks of one event loop, each with an edit of its own that stays open while the others run; and one without."""
    edits = [None, *(WriteEdit(1, head, 5, mode="delete") for head in range(4))]

    def alone(edit: WriteEdit | None) -> torch.Tensor:
        with model.edits([] if edit is None else edit):
            return model(tokens)

    async def work(edit: WriteEdit | None, expected: torch.Tensor) -> list[bool]:
        equal = []
        for _ in range(rounds):
            with model.edits([] if edit is None else edit):
                await asyncio.sleep(0)
                equal.append(torch.equal(model(tokens), expected))
                await asyncio.sleep(0)
        return equal

    async def everything() -> list[list[bool]]:
        return await asyncio.gather(*[work(edit, alone(edit)) for edit in edits])

    with torch.no_grad():
        return [equal for result in asyncio.run(everything()) for equal in result]
