"""Bad input to fla's models: refused with the reason, or computed rightly."""

from __future__ import annotations

import itertools

import pytest
import torch
from fla_models import MODEL_TYPES, make_fla

from hookpoints import HookedRecurrent, attach
from hookpoints.errors import Float16OverflowError
from hookpoints.model.selfcheck import relative_error

LEFT, RIGHT, WHOLE, HOLE = [0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [1] * 5, [1, 0, 1, 1, 1]
IDS = torch.arange(1, 11).view(2, 5)
HYBRID = {"attn": {"layers": [1], "num_heads": 2}}


MASKS = {
    "pads row 0 on the left and row 1 on the right": [LEFT, RIGHT],
    "has a hole in row 1": [WHOLE, HOLE],
    "leaves no token in row 1": [LEFT, [0] * 5],
    r"must be \[2,5\], 1 for real tokens; found \[2, 1, 1, 5\]": [[[WHOLE]]] * 2,
}


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@torch.no_grad()
def test_an_attached_models_own_masks(model_type):
    """``attach`` leaves a model's arguments alone: rows padded on either side are as if alone, and so are their
    writes."""
    model, mask = make_fla(model_type), torch.tensor([LEFT, RIGHT])
    with attach(model) as hooked:
        name = f"blocks.{hooked.cfg.recurrent_layers[-1]}.mixer.hook_write"
        out, kept = hooked.run_with_cache(IDS, attention_mask=mask, names_filter=name)
        for row, real in enumerate(mask.bool()):
            alone, own = hooked.run_with_cache(IDS[row : row + 1, real], names_filter=name)
            torch.testing.assert_close(out.logits[row, real], alone.logits[0], rtol=0, atol=2e-5)
            torch.testing.assert_close(kept[name][row, real], own[name][0], rtol=1e-4, atol=1e-5)


