"""An interrupt (Ctrl-C, "stop" in a notebook) at any moment of any run leaves nothing behind."""

from __future__ import annotations

import contextlib
import linecache
import os
import random
import signal
import sys
import time
import types

import pytest
import torch
import transformers.models.qwen3_5.modeling_qwen3_5 as upstream
from conftest import make_hf

from hookpoints import HookedRecurrent, WriteEdit, attach
from hookpoints.fla import scope as fla_scope

WRITE = "blocks.1.mixer.hook_write"
EDITS = [WriteEdit(1, 0, 5, mode="delete"), WriteEdit(0, 2, None, torch.ones(8), torch.ones(6))]
MOMENTS = 12
"""Random moments for each kind of run."""


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


@pytest.fixture(scope="module")
def expected():
    torch.manual_seed(1)
    tokens = torch.randint(1, 64, (2, 70))
    return tokens, Outputs(fresh(), tokens)


def test_from_a_hook(expected):
    tokens, outputs = expected
    model = fresh()
    for name in (WRITE, "blocks.2.hook_resid_pre", "blocks.3.attn.hook_z", "blocks.0.mixer.hook_q"):
        with pytest.raises(KeyboardInterrupt):
            model.run_with_hooks(tokens, fwd_hooks=[(name, interrupt)])
    with pytest.raises(KeyboardInterrupt), model.edits(EDITS), model.hooks([(WRITE, interrupt)]):
        model(tokens, stop_at_layer=2)
    assert Outputs(model, tokens).equal(outputs)


def test_from_the_op(expected, monkeypatch):
    tokens, outputs = expected
    for name in ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"):
        with monkeypatch.context() as patch:
            model = fresh()
            patch.setattr(upstream, name, interrupt)
            for run in (plain, generated):
                with contextlib.suppress(KeyboardInterrupt):
                    run(model, tokens)
        assert Outputs(model, tokens).equal(outputs)


def test_from_a_substitute_of_fla(monkeypatch):
    """A stand-in for fla, which need not be installed: kernels act as fla's own again after the interrupt."""
    kernels = types.ModuleType("fla.interrupted")
    kernels.double = lambda x: 2 * x
    monkeypatch.setitem(sys.modules, "fla.interrupted", kernels)
    monkeypatch.setattr(fla_scope, "SUBSTITUTES", {"fla.interrupted": {"double": interrupt}})

    class Model(torch.nn.Module):
        def forward(self, x):
            return kernels.double(x)

    model, x = Model(), torch.ones(2)
    opened = fla_scope.ModelScope(model)
    with pytest.raises(KeyboardInterrupt):
        model(x)
    assert torch.equal(kernels.double(x), 2 * x)
    opened.remove()
    assert torch.equal(model(x), 2 * x) and "forward" not in vars(model)


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.__name__)
def test_at_random_moments(expected, run):
    """A real signal, whose handler raises wherever Python is."""
    tokens, outputs = expected
    model, moments = fresh(), random.Random(run.__name__)
    context = torch.enable_grad() if run is gradients else torch.no_grad()
    with context:
        run(model, tokens)
        start = time.perf_counter()
        run(model, tokens)
        lasts = time.perf_counter() - start
        before, interrupted = signal.signal(signal.SIGALRM, interrupt), 0
        try:
            for _ in range(20 * MOMENTS):  # on a busy machine, many moments come after the end of a run
                if interrupted == MOMENTS:
                    break
                try:
                    signal.setitimer(signal.ITIMER_REAL, max(moments.uniform(0, 0.95) * lasts, 1e-5))
                    run(model, tokens)
                except KeyboardInterrupt:
                    interrupted += 1
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
        finally:
            signal.signal(signal.SIGALRM, before)
    model.hf_model.zero_grad()
    assert interrupted == MOMENTS
    assert Outputs(model, tokens).equal(outputs)


class Tracer:
    """Counts the lines of hookpoints that run, and raises KeyboardInterrupt at one of them.

    Not at a ``with``, whose line comes again before its exit: no signal can arrive there, since Python looks for
    signals after calls and the exit is the next call, so that no lock is left held.
    """

    def __init__(self, at: int | None = None):
        self.at, self.lines = at, 0

    def __call__(self, frame, event, arg):
        return self.line if f"{os.sep}hookpoints{os.sep}" in frame.f_code.co_filename else None

    def line(self, frame, event, arg):
        source = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
        if event == "line" and not source.lstrip().startswith("with"):
            self.lines += 1
            if self.lines == self.at:
                raise KeyboardInterrupt
        return self.line

    def run(self, function, *args):
        before = sys.gettrace()
        sys.settrace(self)
        try:
            function(*args)
        finally:
            sys.settrace(before)


@pytest.mark.parametrize("run", [cached, hooked, generated, nested, partial, session], ids=lambda run: run.__name__)
@torch.no_grad()
def test_at_random_lines_of_this_package(expected, run):
    """Signals mostly arrive inside of torch; here the interrupt comes where state changes hands."""
    tokens, outputs = expected
    model, moments, all_lines = fresh(), random.Random(run.__name__), Tracer()
    all_lines.run(run, model, tokens)
    for _ in range(MOMENTS):
        with pytest.raises(KeyboardInterrupt):
            Tracer(moments.randrange(1, all_lines.lines)).run(run, model, tokens)
    assert Outputs(model, tokens).equal(outputs)


def test_a_plain_model_of_the_same_type_is_not_changed(expected):
    tokens, outputs = expected
    hf = make_hf()
    with attach(hf) as hooked_model:
        with pytest.raises(KeyboardInterrupt):
            hooked_model.run_with_hooks(tokens, fwd_hooks=[(WRITE, interrupt)])
        with torch.no_grad():
            assert torch.equal(hf(tokens).logits, outputs.values[0])
            assert torch.equal(make_hf()(tokens).logits, outputs.values[0])
