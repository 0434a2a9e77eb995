"""Everyday calls of TransformerLens and SAELens, as their documents have them, on a recurrent model: each works, or
raises an error that says what to do. tests/everyday_calls.md says which.
"""

from __future__ import annotations

import copy
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE, TrainingSAE
from saes import make_sae
from transformer_lens import patching, utils

from hookpoints import HookedRecurrent
from sae_lens_writesae import HookedSAERecurrent, text_dataset, training_config

PAGE = Path(__file__).with_name("everyday_calls.md")
ROW = re.compile(r"^\| `(.+)` \| (?:works|error: (.+)) \|$", re.MULTILINE)
CALLS = dict(ROW.findall(PAGE.read_text(encoding="utf-8")))
"""Call -> what its error says; nothing: it works."""


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What calls name."""
    model = HookedSAERecurrent.from_pretrained("embedded")
    text = "The people of the United States"
    tokens = model.to_tokens(text)
    logits, cache = model.run_with_cache(tokens)
    sae = make_sae(model, hook="blocks.2.mixer.heads.1.hook_write_vec")
    folder = tmp_path_factory.mktemp("calls") / "sae"
    sae.save_model(folder)
    hook = sae.cfg.metadata.hook_name
    own = {"NAME": "embedded", "text": text, "tokens": tokens, "logits": logits, "cache": cache, "model": model}
    own |= {
        "sae": sae,
        "folder": folder,
        "hook": hook,
        "writes": model.run_with_cache(tokens, names_filter=hook)[1][hook],
    }
    own |= {"double": lambda x, hook: 2 * x, "metric": lambda logits: logits[0, -1, 5]}
    matrices = model.run_with_cache(tokens, names_filter="blocks.2.mixer.hook_write")[1]["write", 2][:, :, 1]
    own |= {"plain": HookedRecurrent.from_pretrained("embedded"), "matrices": matrices, "text_dataset": text_dataset}
    classes = {kind.__name__: kind for kind in (HookedRecurrent, Path, SAE, TrainingSAE)}
    functions = {"copy": copy, "partial": partial, "patching": patching, "torch": torch, "utils": utils}
    return classes | functions | own | {"training_config": training_config}


@pytest.mark.parametrize("call", CALLS)
def test_a_call_works_or_says_what_to_do(names: dict[str, Any], call: str) -> None:
    model, error = names["model"], CALLS[call]
    try:
        with torch.no_grad() if "bwd" not in call else torch.enable_grad():
            if error:
                with pytest.raises(Exception, match=re.escape(error)):
                    eval(call, names)
            else:
                eval(call, names)
    finally:
        model.reset_hooks()
        model.reset_saes()
