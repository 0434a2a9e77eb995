"""Interrupts of long runs; those of single passes are in ``tests/hookpoints/layer/test_interrupts.py``."""

from __future__ import annotations

import pytest
import torch

from reliability.interrupts import LONG_RUNS, Outputs, fresh, throw


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # a signal may come in a __del__
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("run", LONG_RUNS, ids=lambda run: run.__name__)
def test_a_model_is_as_before_after_an_interrupt_of(run, tokens):
    expected, model = Outputs(fresh(), tokens), fresh()
    with torch.no_grad():
        assert throw(lambda: run(model, tokens), 3, run.__name__).total() == 3
    assert Outputs(model, tokens).equal(expected)
