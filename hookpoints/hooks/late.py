"""Bases of other packages, which classes get when a first object is made: importing TransformerLens takes seconds."""

from __future__ import annotations

from importlib import import_module

from torch import nn


def extend(made: type[nn.Module], module: str, name: str) -> None:
    """Make the class ``name`` of ``module`` the base of ``made`` instead of ``nn.Module``, unless it is one."""
    base = getattr(import_module(module), name)
    if not issubclass(made, base):
        made.__bases__ = (base,)
