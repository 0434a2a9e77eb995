"""What hooks, memories and weights cost is what real runs hold, to the byte; docs/fits.md says it."""
# pyright: reportMissingImports=false

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import EACH_LAYOUT, fast_of, make_hf

from hookpoints import Cost, HookedRecurrent, UnknownHookError, UnknownModelError, UnsupportedModelError, cost
from hookpoints.errors import InputError
from hookpoints.memory.caches import tensors_of
from hookpoints.model.cost import held, kinds
from sae_lens_writesae import collect

sys.path.append(str(Path(__file__).parents[1] / "tools"))

import fits


@pytest.mark.parametrize("model_type", fast_of(EACH_LAYOUT))
def test_costs_are_those_of_a_real_run(model_type: str) -> None:
    assert_costs(model_type, torch.float32)


@pytest.mark.parametrize("model_type", ["qwen3_5", "rwkv7"])
def test_costs_in_half_precision_are_those_of_a_real_run(model_type: str) -> None:
    assert_costs(model_type, torch.bfloat16)


def of_a_run(model: HookedRecurrent, tokens: int) -> Cost:
    """What `cost` says of a model, from what a run with weights holds."""
    ids = torch.randint(2, model.cfg.d_vocab, (1, tokens))
    with torch.no_grad():
        by_name = dict(model.run_with_cache(ids, names_filter=lambda name: True)[1].items())
        plain = model.run_with_cache(ids)[1]
    try:
        memory = model.memory(ids)
        size = held([*memory.kept.named().values(), *tensors_of(memory.cache).values()])
    except UnsupportedModelError:
        size = None
    return Cost(
        model_name=model.cfg.model_name,
        T=tokens,
        dtype=model.cfg.dtype,
        weights=held([*model.hf_model.parameters(), *model.hf_model.buffers()]),
        hooks=tuple(kinds(by_name)),
        cached=held(plain.values()),
        state=sum(held([by_name[f"blocks.{layer}.mixer.hook_state"][:, 0].clone()]) for layer in model.cfg.layers),
        memory=size,
    )


def assert_costs(model_type: str, dtype: torch.dtype) -> None:
    model = HookedRecurrent.from_hf(make_hf(model_type).to(dtype=dtype), self_check=False)
    assert cost(model, tokens=64) == of_a_run(model, 64)


@pytest.mark.parametrize("name", ["facts", "composition"])
def test_a_model_whose_layers_are_all_recurrent_costs_what_a_run_holds(name: str) -> None:
    """Its class asks the cache for a length, which upstream's cache does not have there."""
    assert cost(name, tokens=32) == of_a_run(HookedRecurrent.from_pretrained(name), 32)


def test_a_filter_costs_the_hooks_that_it_names(model: HookedRecurrent) -> None:
    one = "blocks.1.mixer.heads.0.hook_write"
    shape = model.cfg.layer(1)
    assert cost(model, tokens=9, names_filter=one).cached == 9 * shape.K * shape.V * 4


@pytest.mark.slow
def test_the_page_has_what_is_counted_today() -> None:
    """Of the smallest model."""
    name = "Qwen3.5-0.8B"
    written = fits.PAGE.read_text(encoding="utf-8")
    for line in fits.page({name: fits.counted(name)}).splitlines():
        assert line.removesuffix(" |") in written or line.startswith("|---")


@pytest.mark.parametrize(
    ("model", "asked", "error", "words"),
    [
        ("embedded", {"tokens": 0}, InputError, "tokens: expected 1 or more, got 0"),
        ("embeded", {"tokens": 8}, UnknownModelError, "embedded"),
        ("embedded", {"tokens": 8, "names_filter": "blocks.1.mixer.hook_rite"}, UnknownHookError, "hook_write"),
    ],
)
def test_what_cannot_be_counted_says_why(model: str, asked: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        cost(model, **asked)


@pytest.mark.parametrize("heads", [[0], [0, 1]], ids=str)
def test_a_collection_takes_what_the_page_says(embedded: HookedRecurrent, heads: list[int], tmp_path: Path) -> None:
    """On disk: the factors of each head's writes, and the ids of tokens once."""
    tokens = torch.arange(2, 66).reshape(4, 16)
    collect(embedded, tokens, [2], heads, tmp_path / "text", targets=("write",), progress=False)
    shards = [load_file(file) for file in sorted((tmp_path / "text").glob("*.safetensors"))]
    held = sum(x.nbytes for shard in shards for x in shard.values())
    shape = embedded.cfg.layer(2)
    assert held == tokens.numel() * (len(heads) * fits.write_bytes(shape.K, shape.V) + 4)
