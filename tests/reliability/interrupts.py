"""Interrupts at random moments of every kind of run, by real signals or as random calls of hookpoints return."""

from __future__ import annotations

import inspect
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import datasets
import torch
from conftest import make_hf
from small_saes import planted

from hookpoints import HookedRecurrent, WriteEdit
from sae_lens_writesae.evaluations import EVALUATIONS
from sae_lens_writesae.sae.collect import collect
from sae_lens_writesae.sae.runner import train, training_config

WRITE = "blocks.1.mixer.hook_write"
EDITS = [WriteEdit(1, 0, 5, mode="delete"), WriteEdit(0, 2, None, torch.ones(8), torch.ones(6))]


def doubled(write, hook):
    return 2 * write


def short(tokens):
    return tokens[:, :12]


def plain(model, tokens):
    model.hf_model(tokens)


def gradients(model, tokens):
    with torch.enable_grad():
        model(tokens, return_type="loss").backward()
    model.hf_model.zero_grad()


def cached(model, tokens):
    model.run_with_cache(tokens, names_filter=[WRITE, "blocks.0.hook_resid_pre"])


def hooked(model, tokens):
    model.run_with_hooks(tokens, fwd_hooks=[(WRITE, doubled), ("blocks.0.mixer.hook_k", doubled)])


def generated(model, tokens):
    model.generate(short(tokens), edits=EDITS, max_new_tokens=4, do_sample=False)


def nested(model, tokens):
    with model.edits(EDITS[0]), model.hooks([(WRITE, doubled)]), model.edits(EDITS[1]):
        model(tokens)


def partial(model, tokens):
    model(model(tokens, stop_at_layer=1), start_at_layer=1, stop_at_layer=3)


def session(model, tokens):
    model.run_with_edits(tokens[:1], EDITS)


RUNS = [plain, gradients, cached, hooked, generated, nested, partial, session]


def trained(model, tokens):
    """Ten steps of a dictionary, checkpoints included."""
    rows = datasets.Dataset.from_dict({"tokens": tokens[:, :64].reshape(-1, 32).repeat(10, 1).tolist()})
    sizes = {"training_tokens": 640, "train_batch_size_tokens": 64, "context_size": 32, "n_batches_in_buffer": 4}
    sizes |= {"store_batch_size_prompts": 4, "lr_warm_up_steps": 2, "n_checkpoints": 3}
    with tempfile.TemporaryDirectory() as folder, torch.enable_grad():
        how = {"checkpoint_path": folder, "is_dataset_tokenized": True, "verbose": False}
        sae = {"k": 4, "resample_every": 3}
        cfg = training_config(model, 1, 2, architecture="writesae_topk", d_sae=24, sae=sae, **sizes, **how)
        train(cfg, model, rows)


def evaluated(model, tokens):
    """The paper's main claim on a dictionary of native writes."""
    rows = torch.cat([tokens.roll(n, 1) for n in range(3)])[:, :40]
    small = {"n_atoms": 4, "firings_per_atom": 2, "min_firings": 2, "horizon": 3}
    EVALUATIONS["substitution"](**small).run(model, {"": planted(model, rows)}, rows, progress=False)


def collected(model, tokens):
    """Writes and states of two layers, as shards."""
    with tempfile.TemporaryDirectory() as folder:
        collect(
            model, tokens[:, :32].repeat(4, 1), [0, 1], None, Path(folder), targets=("write", "state"), batch_size=2
        )


LONG_RUNS = [trained, evaluated, collected]
"""Runs of seconds."""


class Outputs:
    """What a model computes, natively and with hooks, edits and partial runs."""

    def __init__(self, model, tokens):
        with torch.no_grad():
            self.values = [
                model.hf_model(tokens).logits,
                model(tokens),
                model.run_with_hooks(tokens, fwd_hooks=[(WRITE, doubled)]),
                model.run_with_cache(tokens, names_filter=WRITE)[1][WRITE],
                model(tokens, stop_at_layer=2),
                model.run_with_edits(tokens[:1], EDITS).logits,
            ]
            with model.edits(EDITS):
                self.values.append(model(tokens))

    def equal(self, other) -> bool:
        return all(torch.equal(a, b) for a, b in zip(self.values, other.values, strict=True))


def fresh():
    return HookedRecurrent.from_hf(make_hf())


def interrupt(*_, **__):
    raise KeyboardInterrupt


class Terminated(BaseException):
    """What a program's own handler of SIGTERM raises here."""


def terminate(*_):
    raise Terminated


def throw(run: Callable[[], object], moments: int, seed: object) -> Counter[str]:
    """Send SIGINT or SIGTERM at random moments of ``run``, until so many of them have ended it; returns how often each
    did. Their handlers raise, wherever Python is then."""
    draw, ended, sent = random.Random(seed), Counter[str](), []
    start = time.perf_counter()
    run()
    lasts = time.perf_counter() - start

    def send(*_):
        sent.append(draw.choice([signal.SIGINT, signal.SIGTERM]))
        signal.raise_signal(sent[-1])

    handlers = {signal.SIGALRM: send, signal.SIGINT: signal.default_int_handler, signal.SIGTERM: terminate}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        for _ in range(20 * moments):  # on a busy machine, many moments come after the end of a run
            if ended.total() == moments:
                break
            try:
                try:
                    signal.setitimer(signal.ITIMER_REAL, max(draw.uniform(0, 0.95) * lasts, 1e-5))
                    run()
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
            except (KeyboardInterrupt, Terminated):
                ended[sent[-1].name] += 1
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return ended


class Profiler:
    """Counts the calls that hookpoints makes or gets, and raises KeyboardInterrupt as one of them returns.

    Python looks for signals after calls. Raised at any line, an interrupt would also come where none can: between a
    call and the ``finally`` or the exit that closes it, or as a generator yields.
    """

    def __init__(self, at: int | None = None):
        self.at, self.calls = at, 0

    def __call__(self, frame, event, arg):
        code = frame.f_code
        if event == "return" and (code.co_flags & inspect.CO_GENERATOR or code.co_name in ("__enter__", "__exit__")):
            return
        if event in ("return", "c_return") and ("/hookpoints/" in code.co_filename or "contextlib" in code.co_filename):
            self.calls += 1
            if self.calls == self.at:
                raise KeyboardInterrupt

    def run(self, function, *args):
        before = sys.getprofile()
        sys.setprofile(self)
        try:
            function(*args)
        finally:
            sys.setprofile(before)


def at_calls(run, model, tokens, moments: int) -> list[KeyboardInterrupt]:
    """Raise KeyboardInterrupt at random calls of hookpoints during ``run``; returns those that ended it.

    While they are kept, so are their tracebacks, as in a notebook: nothing that was left open is closed by the garbage
    collector.
    """
    draw, all_calls, ended = random.Random(run.__name__), Profiler(), []
    with torch.no_grad():
        run(model, tokens)  # the first run fills caches
        all_calls.run(run, model, tokens)
        for _ in range(moments):
            try:
                Profiler(draw.randrange(1, all_calls.calls)).run(run, model, tokens)
            except KeyboardInterrupt as error:
                ended.append(error)
    return ended
