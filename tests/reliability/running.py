"""Interrupts, threads, and what runs leave behind."""

from __future__ import annotations

import contextlib
import gc
import inspect
import random
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import torch
from tiny_models import make_hf

from hookpoints import attach
from hookpoints.hooks.points import scopes_of
from hookpoints.layer import context, intercept
from reliability import runs
from reliability.checks import Comparison, check
from reliability.runs import PROBES, RUNS, WRITE, fresh, outputs, some_tokens


class _Calls:
    """Notes the places where a call that hookpoints makes or gets returns; raises KeyboardInterrupt at one of them.

    Python looks for signals after calls. Raised at any line, an interrupt would also come where none can: between a
    call and the ``finally`` or the exit that closes it, or as a generator yields.
    """

    def __init__(self, at: object = None):
        self.at, self.places = at, {}

    def __call__(self, frame, event, arg):
        code = frame.f_code
        if event == "return" and (code.co_flags & inspect.CO_GENERATOR or code.co_name in ("__enter__", "__exit__")):
            return
        if event in ("return", "c_return") and ("/hookpoints/" in code.co_filename or "contextlib" in code.co_filename):
            self.places[place := (code.co_filename, frame.f_lineno, event, getattr(arg, "__name__", ""))] = True
            if place == self.at:
                raise KeyboardInterrupt

    def run(self, function, *args):
        before = sys.getprofile()
        sys.setprofile(self)
        try:
            return function(*args)
        finally:
            sys.setprofile(before)


@check(few=1, many=20)
@torch.no_grad()
def interrupts(work, rounds):
    """KeyboardInterrupt as a call of the package returns, at another place each time. The tracebacks stay alive, as in
    a notebook. Then the modes of torch, and the outputs of some kinds of run, are compared with those of a fresh model.
    """
    tokens, expected = some_tokens(), outputs(fresh(), some_tokens(), PROBES) | _modes()
    met = set()  # entries of scopes: of one that several runs have, one is interrupted
    for run in RUNS:
        model, calls, kept = fresh(), _Calls(), []
        run(model, tokens)  # the first run fills caches
        calls.run(run, model, tokens)
        places = list(calls.places)
        scopes = [place for place in places if place[3] == "next" and place not in met]
        met.update(scopes)
        for place in [*scopes, *random.Random(0).sample(places, min(rounds, len(places)))]:
            try:
                _Calls(place).run(run, model, tokens)
            except KeyboardInterrupt as error:
                kept.append(error)
                left = _modes()
                yield Comparison(f"{run.__name__}, {place}", expected, outputs(model, tokens, PROBES) | left)


PAIRS = [
    (runs.nested, runs.native),
    (runs.nested, runs.partial),
    (runs.session, runs.native),
    (runs.session, runs.session),
    (runs.hooked, runs.nested),
    (runs.generated, runs.hooked),
    (runs.attribute, runs.native),
    (runs.attribute, runs.remembered),
    (runs.write_attribution, runs.told),
]


@check(few=2, many=20)
def threads(work, rounds):
    """Four threads run one model, two of one kind of run and two of another. Each result is compared with that of the
    run alone."""
    model, tokens = fresh(), some_tokens()
    alone = outputs(model, tokens)
    for jobs in PAIRS:
        barrier = threading.Barrier(4)

        def work_of(run, barrier=barrier):
            barrier.wait(timeout=60)
            with torch.no_grad():  # of this thread
                return [run(model, tokens) for _ in range(rounds)]

        with ThreadPoolExecutor(4) as pool:
            for run, results in zip(jobs * 2, pool.map(work_of, jobs * 2)):
                for result in results:
                    yield Comparison(f"{run.__name__} of {[job.__name__ for job in jobs]}", alone[run.__name__], result)


def _modes() -> dict[str, object]:
    """Modes of torch in this thread."""
    modes = {"function modes": torch._C._len_torch_function_stack(), "gradients": torch.is_grad_enabled()}
    return modes | {"inference": torch.is_inference_mode_enabled(), "autocast": torch.is_autocast_enabled("cpu")}


def _left(model) -> dict[str, object]:
    """What a run could leave."""
    gc.collect()
    points = list(model.hook_dict.values())
    return {
        "hooks": sum(len(point.fwd_hooks) + len(point.bwd_hooks) + len(point._forward_hooks) for point in points),
        "scopes of hooks": sum(len(scopes_of(point)) for point in points),
        "scopes": len(context._SCOPES.get()),
        "open layers": len(intercept._RUNNING.get()),
        "trained weights": sum(weight.requires_grad for weight in model.parameters()),
        "threads": threading.active_count(),
        "tensors": sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects()),
        **_modes(),
    }


def _wrapped(hf) -> int:
    return sum("forward" in vars(module) for module in hf.modules()) + len(intercept._USES)


@check(few=1, many=5)
@torch.no_grad()
def nothing_left(work, rounds):
    """Hooks, scopes, open layers, threads and tensors are counted before and after each kind of run, also after one
    that raises in a hook. Wrapped modules and ops are counted before a model is attached to and after it is detached.
    """
    model, tokens = fresh(), some_tokens()
    outputs(model, tokens)
    gc.collect()
    gc.freeze()  # the collector passes over what was there before, of which there is much
    try:
        before = _left(model)
        for run in RUNS * rounds:
            run(model, tokens)
            yield Comparison(run.__name__, before, _left(model))
        for _ in range(rounds):
            with contextlib.suppress(ZeroDivisionError):
                model.run_with_hooks(tokens, fwd_hooks=[(WRITE, lambda write, hook: 1 / 0)])
            yield Comparison("a hook that raises", before, _left(model))
            plain = _wrapped(hf := make_hf())
            with attach(hf) as hooked_model:
                hooked_model.run_with_cache(tokens, names_filter=WRITE)
            yield Comparison("detach", plain, _wrapped(hf))
            del hf, hooked_model  # whose tensors the next round must not count
    finally:
        gc.unfreeze()
