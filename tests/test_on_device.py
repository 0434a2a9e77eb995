"""What runs on a host runs on a device as well, and gives the same.

Evaluations run on the device in `golden/test_golden.py`, `Bits` here. What is left out: families other than Gated
DeltaNet, whose forward passes are those of transformers; commands and the demo; two devices; half precision.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import device
import pandas as pd
import pytest
import torch
from conftest import make_hf
from saes import HEAD, LAYER, random_sae
from test_graphs import CALLS, DIFFERENTIABLE, World
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves

from hookpoints import HookedRecurrent
from sae_lens_writesae import HookedSAERecurrent, collect, fit_metrics
from writesae.evaluations.bits import Bits
from writesae.evaluations.substitution import Substitution
from writesae.experiment.terms import Terms
from writesae.known.board import board

TEXT = torch.randint(1, 64, (8, 24), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def host() -> HookedRecurrent:
    return HookedRecurrent.from_hf(make_hf())


@pytest.fixture(scope="module")
def there(host: HookedRecurrent) -> Iterator[HookedRecurrent]:
    """The same model on the device."""
    with device.pretended():
        yield HookedRecurrent.from_hf(copy.deepcopy(make_hf()).to("npu"))


def same(one: pd.DataFrame, other: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(one, other, rtol=1e-4, atol=1e-5)


def test_metrics_of_tokens_on_the_host(host: HookedRecurrent, there: HookedRecurrent) -> None:
    expected, metric = (fit_metrics(model, TEXT, [(LAYER, HEAD)])[LAYER, HEAD] for model in (host, there))
    for name in ("key_root", "value_root"):
        assert_close(getattr(metric, name).cpu(), getattr(expected, name), rtol=1e-4, atol=1e-5)


def test_terms_of_a_collection(host: HookedRecurrent, there: HookedRecurrent, tmp_path: Path) -> None:
    collection = collect(
        host, TEXT.flip(1), [LAYER], None, tmp_path / "c", targets=("write",), dtype="float32", progress=False
    )
    asked: Any = {"n_atoms": 2, "firings_per_atom": 1, "horizon": 3, "mean_write_sequences": 2}
    asked["controls"] = ("mean", "token_mean", "quantised", "pca")
    tables = []
    for model in (host, there):
        terms = Terms(model, collection)
        result = Substitution(**asked).run(model, random_sae(model), TEXT, reference=terms, progress=False)
        tables.append(result.tables["firings"])
    same(tables[1], tables[0])


def test_codes_at_equal_bits(host: HookedRecurrent, there: HookedRecurrent) -> None:
    few = Bits(budgets=(16,), steps=1, tune_steps=0)
    tables = [few.run(model, random_sae(model), TEXT, progress=False).tables["codes"] for model in (host, there)]
    # Adam's first step goes by the signs of gradients, those of rounding too.
    same(*(table[~table["code"].str.contains("WriteSAE TopK")] for table in tables))
    same(*(table.drop(columns="kl") for table in tables))


def test_the_board_of_known_models(monkeypatch: pytest.MonkeyPatch) -> None:
    with device.pretended():
        monkeypatch.setattr("hookpoints.model.loading.default_device", lambda: "npu")
        found = board("recall", 1, 64, 4, 5, brief=True)
    assert found["plain"]["kept"] == 1


PUBLIC = {name: call for name, call in {**CALLS, **DIFFERENTIABLE}.items() if "from_" not in name and name != "attach"}
"""Public calls on a model at hand."""


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> tuple[World, World]:
    """A model and a dictionary on the host, and the same on the device."""

    def world(place: str) -> World:
        model = HookedSAERecurrent.from_hf(make_hf().to(place))
        return World(model, random_sae(model).to(place), tmp_path_factory.mktemp(place))

    with device.pretended():
        return world("cpu"), world("npu")


def tensors(value: Any) -> list[torch.Tensor]:
    """Those of a value or of its fields, on the host."""
    plain = isinstance(value, torch.Tensor | torch.nn.Module) or not hasattr(value, "__dict__")
    found = tree_leaves(value if plain else vars(value))
    return [x.detach().cpu() for x in found if isinstance(x, torch.Tensor) and x.is_floating_point()]


@pytest.mark.parametrize("name", PUBLIC)
def test_public_calls(worlds: tuple[World, World], name: str) -> None:
    expected = tensors(PUBLIC[name](worlds[0]))
    with device.pretended():
        found = tensors(PUBLIC[name](worlds[1]))
    assert len(found) == len(expected)
    for one, other in zip(found, expected):
        assert_close(one, other, rtol=1e-4, atol=1e-5)
