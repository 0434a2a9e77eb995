"""SIGINT and SIGTERM while something is trained step by step: heard, but never within a step."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Interrupts:
    """Turns SIGINT and SIGTERM into one KeyboardInterrupt, between steps.

    A signal that comes within a step waits for its end: an optimizer goes through its parameters one by one, and what
    is saved in the midst of that has made the step with some of them only. Signals after the first do nothing, so that
    what is being saved gets saved.
    """

    def __init__(self) -> None:
        self._asked: str | None = None
        self._raised = self._in_step = False

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Handle the signals in this scope; the handlers of before are back afterwards. Does nothing outside the main
        thread, where signals do not arrive."""
        numbers = (signal.SIGINT, signal.SIGTERM)
        try:
            before = [signal.signal(number, self._hear) for number in numbers]
        except ValueError:
            yield
            return
        try:
            yield
        finally:
            for number, handler in zip(numbers, before):
                signal.signal(number, handler)

    def watch(self, trainer: Any) -> None:
        """Let the steps of SAELens' trainer be whole. Its `step` and `maybe_reset_sparsity` are the seams that it
        offers to those who run its loop: the latter begins each round, the former follows when a batch was taken."""
        step, begin = trainer.step, trainer.maybe_reset_sparsity

        def held(batch: Any) -> Any:
            self._in_step = True
            return step(batch)

        def between() -> Any:
            self._in_step = False
            self.check()
            return begin()

        trainer.step, trainer.maybe_reset_sparsity = held, between

    def check(self) -> None:
        """Raise the KeyboardInterrupt that waits, if one does."""
        if self._asked is not None and not self._raised:
            self._raised = True
            raise KeyboardInterrupt(self._asked)

    def _hear(self, number: int, frame: Any) -> None:
        self._asked = self._asked or signal.Signals(number).name
        if not self._in_step:
            self.check()
