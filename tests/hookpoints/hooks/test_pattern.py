"""hook_pattern: reads are A u on every model, in prefill and decoding, and an edit of A moves them."""

from __future__ import annotations

from typing import cast

import torch
from tiny_models import continuing
from torch.testing import assert_close

from hookpoints import HookedRecurrent
from hookpoints.model.inputs import cache_of

PREFIX = "blocks.{}.mixer."


def weighted(pattern: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """A u, [B,T,H,V], for one term a token or several; in Mamba-1 for each value channel."""
    if pattern.shape[1] != values.shape[2]:
        return weighted(pattern, values.transpose(2, 3)).transpose(2, 3)
    return (pattern.flatten(3) @ values.transpose(1, 2).flatten(2, -2)).transpose(1, 2)


def listened(model: HookedRecurrent, layer: int, run) -> list[torch.Tensor]:
    """Patterns of a layer at each pass that ``run`` makes."""
    seen: list[torch.Tensor] = []
    with model.hooks([(PREFIX.format(layer) + "hook_pattern", lambda x, hook: seen.append(x))]):
        run()
    return seen


@torch.no_grad()
def test_weights_times_values_are_the_reads(hooked, tokens):
    """And an edit of the weights moves the reads by (A' - A) u: in the prompt and in decoding, where most of u comes
    from the cache."""
    layer = hooked.cfg.recurrent_layers[-1]
    names = [PREFIX.format(layer) + name for name in ("hook_pattern", "hook_write_value", "hook_read")]

    def edit(pattern, hook):
        pattern[..., 4:6] = 0.25
        return pattern

    prompt = tokens[:, :12]
    logits, cache = hooked.run_with_cache(prompt, names_filter=names)
    pattern, values, reads = (cache[name] for name in names)
    largest = float(reads.abs().max())
    assert_close(weighted(pattern, values), reads, rtol=1e-4, atol=2e-6 * largest)
    assert not pattern.movedim((2, 3), (-2, -1)).triu(1).any() and torch.equal(logits, hooked(prompt))
    assert cache["pattern", layer] is pattern
    moved = reads + weighted(edit(pattern.clone(), None) - pattern, values)
    with hooked.hooks([(names[0], edit)]):
        _, edited = hooked.run_with_cache(prompt, names_filter=names[2])
    assert_close(edited[names[2]], moved, rtol=1e-4, atol=1e-5 * largest)
    with hooked.hooks([(names[0], lambda x, hook: None)]):
        out = hooked.hf_model(prompt[:, :11], use_cache=True)
    onward = {**continuing(hooked.hf_model, out), "use_cache": True, "position_ids": torch.full((2, 1), 11)}
    with hooked.hooks([(names[0], edit)]):
        _, step = hooked.run_with_cache(prompt[:, 11:], names_filter=names[2], **onward)
    assert_close(step[names[2]], moved[:, 11:], rtol=1e-3, atol=1e-3 * largest)


@torch.no_grad()
def test_sources_follow_the_rows_of_a_cache(model, tokens):
    """Upstream repeats and reorders rows, as beams do at every step; S grows by one a token."""
    (whole,) = listened(model, 1, lambda: model(tokens[:, :14]))
    outs = []
    listened(model, 1, lambda: outs.append(model.hf_model(tokens[:, :12], use_cache=True)))
    order = cast(torch.LongTensor, torch.tensor([1, 0, 1]))
    for layer in cache_of(outs[0]).layers:
        layer.reorder_cache(order)
    onward = continuing(model.hf_model, outs[0])
    for t in (12, 13):
        (step,) = listened(model, 1, lambda t=t: model.hf_model(tokens[order, t : t + 1], **onward))
        assert_close(step, whole[order][:, :, t : t + 1, : t + 1], rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_tokens_that_nobody_listened_to_are_nan(model, tokens):
    """A cache that was filled without a listener, or that was given the state of another text: its columns are NaN,
    whose edit does nothing."""
    name, outs = PREFIX.format(1) + "hook_pattern", []
    fill = lambda rows: outs.append(model.hf_model(rows, use_cache=True))  # noqa: E731
    for _ in range(2):
        fill(tokens[:1, :12])
    for rows in tokens[:, None, :12]:
        listened(model, 1, lambda rows=rows: fill(rows))
    *_, ours, other = (cache_of(out).layers[1].recurrent_states for out in outs)
    ours[0].copy_(other[0])
    unedited, edited, replaced = (continuing(model.hf_model, out) for out in outs[:3])
    logits = model.hf_model(tokens[:1, 12:13], **unedited).logits
    hooks = [(name, lambda x, hook: x.nan_to_num(7.0))]
    assert torch.equal(model.run_with_hooks(tokens[:1, 12:13], fwd_hooks=hooks, **edited), logits)
    for cache, first in ((edited, 13), (replaced, 12)):
        (step,) = listened(model, 1, lambda c=cache, t=first: model.hf_model(tokens[:1, t : t + 2], **c))
        assert step.shape == (1, 4, 2, first + 2)
        assert bool(step[..., :12].isnan().all()) and not step[..., 12:].isnan().any()


@torch.no_grad()
def test_it_follows_hooks_on_factors_and_on_the_write(model64, tokens):
    """q moves A; write_key moves the writes that are read, and so A; write_value does not."""
    names = [PREFIX.format(1) + name for name in ("hook_pattern", "hook_write_value", "hook_read")]
    plain = listened(model64, 1, lambda: model64(tokens))[0]
    for factor, moves in (("hook_q", True), ("hook_write_key", True), ("hook_write_value", False)):
        with model64.hooks([(PREFIX.format(1) + factor, lambda x, hook: x.roll(1, -1))]):
            _, cache = model64.run_with_cache(tokens, names_filter=names)
        expected = weighted(cache[names[0]], cache[names[1]])
        assert_close(cache[names[2]], expected, rtol=0, atol=1e-10)
        assert torch.allclose(cache[names[0]], plain) is not moves
