"""What hooks, memories and weights cost is what real runs hold, to the byte; docs/fits.md says it."""
# pyright: reportMissingImports=false

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from conftest import make_hf

from hookpoints import HookedRecurrent, UnsupportedModelError, cost

sys.path.append(str(Path(__file__).parents[1] / "scripts"))

import fits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_costs_are_those_of_a_real_run(hooked: HookedRecurrent, dtype: torch.dtype) -> None:
    model_type = hooked.cfg.model_type.removesuffix("_text")
    model = HookedRecurrent.from_hf(make_hf(model_type).to(dtype=dtype), self_check=False)
    if model_type in ("glm5_next", "qwen4_exp"):  # their attention picks tokens by what it computes
        with pytest.raises(UnsupportedModelError):
            cost(model, tokens=64)
    else:
        assert cost(model, tokens=64) == fits.of_a_run(model, 64)


def test_a_filter_costs_the_hooks_that_it_names(model: HookedRecurrent) -> None:
    one = "blocks.1.mixer.heads.0.hook_write"
    shape = model.cfg.layer(1)
    assert cost(model, tokens=9, names_filter=one).cached == 9 * shape.K * shape.V * 4


def test_the_page_has_what_is_counted_today() -> None:
    """Of the smallest model, which is counted in a few seconds."""
    name = "Qwen3.5-0.8B"
    written = fits.PAGE.read_text(encoding="utf-8")
    for line in fits.page({name: fits.counted(name)}).splitlines():
        assert line.removesuffix(" |") in written or line.startswith("|---")
