"""Of the tests of product and study. What they run on is in `tests/tiny_models.py`, which loads torch: ten seconds that
a process without tests does not need."""

from __future__ import annotations

import gc

import pytest


@pytest.hookimpl(optionalhook=True)  # xdist may not be loaded
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """One process where files are named: workers import torch again, which takes longer than few tests do."""
    return 0 if any(".py" in name for name in config.args) else None


def pytest_configure(config: pytest.Config) -> None:
    """Of the processes of xdist, the first one only deals tests out, unless it is to list them."""
    distributed = config.getoption("numprocesses", None) and not config.option.collectonly
    if not distributed or hasattr(config, "workerinput"):
        gc.disable()  # until all is imported, which leaves 800,000 objects and hardly any garbage
        config.pluginmanager.import_plugin("tiny_models")


def pytest_collection_finish() -> None:
    """The collector passes over what was imported: looking at it takes a twentieth of the time of tests."""
    gc.freeze()
    gc.enable()
