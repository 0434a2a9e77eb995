"""Memories against runs that really read, or did not read, the tokens; for each kind of cache in float64."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import cast

import pytest
import torch
from remembering import drawn_ids
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import MAKERS, VOCAB, KeepFloat64, hooked_in_float64, make_hf
from torch.testing import assert_close
from transformers import DynamicCache

from hookpoints import HookedRecurrent, Memory, WriteEdit, zoo
from hookpoints.errors import InputError, UnsupportedModelError
from hookpoints.files import tensors_hash
from hookpoints.memory import sealing
from hookpoints.memory.caches import attention_of, reach, state_of
from hookpoints.memory.cuts import flagged_stretches, states_after
from hookpoints.model.inputs import cache_argument, cache_of
from hookpoints.zoo.tasks import Recall

T, START, STOP = 21, 7, 12
SPAN = (START, STOP)
TOLERANCE = {"rtol": 0, "atol": 1e-9}
"""Of logits of size 10, in float64. (Upstream's own continuation of Bailing and Kimi is 3e-10 off its whole run.)"""


def tokens(length: int, seed: int = 0) -> torch.Tensor:
    return drawn_ids(2, length, seed=seed)


TYPES = ("bailing_hybrid", "falcon_h1", "jamba", "mamba", "mamba2", "olmo_hybrid", "qwen3_5", "rwkv7", "zamba2")
"""One of each kind of cache: latent attention, attention beside and after a recurrence, none; token shifts."""
READ, AFTER = tokens(T), tokens(6, seed=1)


def states(memory: Memory) -> dict[int, torch.Tensor]:
    return {layer: memory.state(layer) for layer in memory.forms}


def same(memory: Memory, other: Memory, exact: bool = False) -> None:
    """Two memories are followed by the same logits, and hold the same states."""
    close = {"rtol": 0, "atol": 0} if exact else TOLERANCE
    assert_close(states(memory), states(other), **close)
    assert_close(memory.model.logits_after(memory, AFTER), memory.model.logits_after(other, AFTER), **close)


@pytest.fixture(scope="session", params=TYPES)
def _whole(request):
    with KeepFloat64():
        model = hooked_in_float64(request.param)
        return model, model.memory(READ)


@pytest.fixture
def whole(_whole):
    """A model of each type in float64, and its memory of READ."""
    with KeepFloat64():
        yield _whole


def test_a_memory_is_followed_by_what_follows_the_tokens(whole):
    model, memory = whole
    assert_close(model.logits_after(memory, AFTER), model(torch.cat([READ, AFTER], 1)).detach()[:, T:], **TOLERANCE)
    same(model.memory(READ[:, STOP:], memory=model.memory(READ[:, :STOP])), memory)


def test_terms_and_holdings_sum_to_the_state(whole):
    _, memory = whole
    for layer in memory.forms:
        keys, values = memory.terms(layer)
        dense = keys.unsqueeze(-1) * values.unsqueeze(-2)
        dense = dense.sum(3) if keys.ndim == 5 else dense
        if memory.forms[layer].rates is not None:
            dense = dense.transpose(2, 4)  # of Mamba-1, whose value channels are the heads of terms
        state = memory.state(layer)
        assert_close(dense.sum(1), state, rtol=0, atol=1e-10)
        shares = (dense * state[:, None]).sum((-1, -2)) / state.square().sum((-1, -2))[:, None]
        assert_close(memory.holdings(layer), shares, rtol=0, atol=1e-10)
        assert_close(memory.holdings(layer, head=0).sum(1), torch.ones(2).double(), rtol=0, atol=1e-10)


def test_rewind_is_the_memory_as_it_was(whole):
    model, memory = whole
    for position in (1, 3, STOP):
        same(memory.rewind(position), model.memory(READ[:, :position]))


def test_before_the_first_token_a_memory_is_that_of_a_model_that_begins(whole):
    model, memory = whole
    begin = memory.rewind(0)
    assert_close(model.logits_after(begin, READ), model(READ).detach(), **TOLERANCE)
    same(model.memory(READ, memory=begin), memory)
    same(begin.paste(memory, (0, T)), memory)
    same(memory.without((0, T)), begin, exact=True)
    assert begin.approximate is None and begin.T == 0 and memory.truncate(1).rewind(0).approximate is None
    for ask in (begin.terms, begin.holdings, begin.recurrence):
        with pytest.raises(InputError, match="has read none"):
            ask(0)


def test_a_span_that_was_read_last_is_cut_exactly_and_pasted_back(whole):
    model, memory = whole
    cut = memory.without(slice(START, None))
    same(cut, model.memory(READ[:, :START]))
    pasted = cut.paste(memory, (START, T))
    same(pasted, memory)
    assert cut.approximate is None and pasted.approximate is None


def test_a_span_from_the_middle_is_cut_exactly_where_all_after_it_is_read_again(whole):
    model, memory = whole
    for start, stop in (SPAN, (0, START)):
        never = torch.cat([READ[:, :start], READ[:, stop:]], 1)
        again = memory.without((start, stop))
        same(again, model.memory(never))
        assert again.approximate is None and torch.equal(again.tokens, never)


def test_a_cut_from_the_middle_follows_stored_factors_and_moves_attention_to_new_positions(whole):
    model, memory = whole
    cut = memory.without(SPAN, approximate=True)
    seeing = STOP + reach(memory.cache)  # tokens whose convolution or token shift sees the span are read again
    first = START + reach(memory.cache)
    assert cut.approximate is not None and f"tokens {first} to 15 were read" in cut.approximate
    before = model.memory(torch.cat([READ[:, :START], READ[:, STOP:seeing]], 1))
    for layer in memory.forms:
        r = memory.recurrence(layer).select(tokens=slice(seeing, T), initial_state=before.state(layer))
        assert_close(cut.state(layer), r.final_state(method="reference"), **TOLERANCE)
    unknown = "attention of layer 2 keeps" in cut.approximate
    assert unknown == (model.cfg.model_type == "bailing_hybrid")  # rotated in a way of its own
    if not unknown:  # of a pass at the new positions over the same streams
        streams = cut.kept.stream.items()
        with torch.no_grad(), model.hooks([(name, lambda value, hook, x=x: x) for name, x in streams]):
            out = model.hf_model(input_ids=cut.tokens, use_cache=True)
        fresh = attention_of(cache_of(out), cut.T)
        assert all(torch.allclose(cut.kept.attention[place], x, atol=1e-6) for place, x in fresh.items())


def test_beams_and_several_sequences_continue_a_memory_as_they_do_the_text(whole):
    model, memory = whole
    how = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 4, "do_sample": False}
    from_memory = model.generate(AFTER, memory=memory, **how)
    assert torch.equal(from_memory, model.generate(torch.cat([READ, AFTER], 1), **how)[:, T:])


# -- a fact that is cut


@pytest.mark.parametrize("name", ["recall", "recall-mamba2", "recall-rwkv7"])
def test_a_fact_that_is_cut_is_not_known_and_the_others_stay(name):
    """The convolution (token shift) lets the tokens after a pair write it, so that these have to be read again."""
    model, pairs, cut = HookedRecurrent.from_pretrained(name), 10, 3
    task = cast(Recall, zoo.task(name))
    batch = task.batch(64, torch.Generator().manual_seed(0), pairs=pairs)
    memory = model.memory(batch.tokens[:, : 1 + 2 * pairs])

    def recalled(memory: Memory, pair: int) -> float:
        asked = task.spell({**batch.symbols, "asked": torch.full_like(batch.symbols["asked"], pair)})
        answers = model.logits_after(memory, asked.tokens[:, -2:-1])[:, -1].argmax(-1)
        return (answers == asked.answers[:, 0]).double().mean().item()

    span = (1 + 2 * cut, 3 + 2 * cut)
    assert recalled(memory, cut) > 0.95
    for without in (memory.without(span), memory.without(span, approximate=True)):
        assert recalled(without, cut) <= 0.1  # chance is 1 / 64
        assert min(recalled(without, pair) for pair in (0, 6, 9)) > 0.9
        assert torch.equal(without.tokens, torch.cat([memory.tokens[:, : span[0]], memory.tokens[:, span[1] :]], 1))


# -- one model, in float32


@pytest.fixture(scope="module", params=["embedded", "embedded-mamba2", "embedded-rwkv7"])
def small(request):
    """A model that ships with the package, and its memory of READ."""
    model = HookedRecurrent.from_pretrained(request.param, self_check=False)
    return model, model.memory(READ)


@pytest.fixture(scope="module")
def read():
    """A tiny model and its memory of READ; not to be changed by a test."""
    model = HookedRecurrent.from_hf(make_hf("qwen3_5"))
    return model, model.memory(READ)


def test_what_follows_is_bit_for_bit_what_upstream_makes_of_its_own_cache(small):
    model, memory = small
    how = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_scores": True}
    ours = model.generate(AFTER, memory=memory, **how)
    logits = model(AFTER, memory=memory)
    hf = model.hf_model
    with torch.no_grad():
        cache = cache_of(hf(input_ids=READ, use_cache=True))
        own = hf(input_ids=AFTER, use_cache=True, **{cache_argument(hf): copy.deepcopy(cache)}).logits
        mask = torch.ones(2, T + AFTER.shape[1], dtype=torch.long)
        theirs = hf.generate(AFTER, attention_mask=mask, **{cache_argument(hf): cache}, **how)
    assert torch.equal(logits, own)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert all(torch.equal(a, b) for a, b in zip(ours.scores, theirs.scores, strict=True))


def test_no_operation_changes_the_memory_that_it_begins_with(read):
    model, memory = read
    before, follows = states(memory), model.logits_after(memory, AFTER)
    model.generate(AFTER, memory=memory, max_new_tokens=2, do_sample=False)
    changed = memory.truncate(1) + {0: torch.ones_like(memory.state(0))}
    others = [memory.without(SPAN), memory.rewind(3), memory.lerp(memory.rewind(5), 0.5)]
    assert all(not torch.equal(model.logits_after(each, AFTER), follows) for each in (changed, *others))
    assert_close(states(memory), before, rtol=0, atol=0)
    assert torch.equal(model.logits_after(memory, AFTER), follows)


def test_arithmetic_on_states(read):
    _, memory = read
    other = memory.rewind(STOP)
    assert_close(states(memory + (other - memory)), states(other))
    assert_close(memory.lerp(other, 0.5).state(0), (memory.state(0) + other.state(0)) / 2)
    truncated, error = memory.truncate(2).state(0), torch.linalg.svdvals(memory.state(0))[..., 2:].square().sum(-1)
    assert int(torch.linalg.matrix_rank(truncated, rtol=1e-4).max()) <= 2
    assert_close((truncated - memory.state(0)).square().sum((-1, -2)), error, rtol=1e-3, atol=1e-6)
    assert_close(memory.truncate(99).state(0), memory.state(0))


def test_states_that_no_factors_explain_are_read_on_from_and_not_cut(read):
    model, memory = read
    with model.edits(WriteEdit(layer=0, position=3, head=1, mode="delete")):
        edited = model.memory(READ)
    assert edited.edited and model.memory(AFTER, memory=edited).edited and not memory.edited
    for each in (edited, memory.truncate(1)):
        with pytest.raises(InputError, match="by hand"):
            each.without(SPAN)
        with pytest.raises(InputError, match="by hand"):
            each.holdings(0)
        with pytest.raises(InputError, match="by hand"):
            each.rewind(1)


@pytest.mark.parametrize("span", ["ab", (0, 1, 2), (0.0, 2.0), 3], ids=repr)
def test_what_is_no_span_says_what_one_is(read, span):
    with pytest.raises(InputError, match=r"span: expected .*got "):
        read[1].without(span)


def test_a_saved_memory_is_the_same_bit_for_bit(small, tmp_path):
    model, memory = small
    cut = memory.without(SPAN, approximate=True)
    cut.save(tmp_path / "memory.safetensors")
    loaded = Memory.load(tmp_path / "memory.safetensors", model)
    same(loaded, cut, exact=True)
    same(loaded.rewind(5), cut.rewind(5), exact=True)
    assert loaded.approximate == cut.approximate and "to 15 were" in str(cut.approximate)
    assert [each.name for each in tmp_path.iterdir()] == ["memory.safetensors"]
    begin = cut.rewind(0) + {1: cut.state(1)}
    begin.save(tmp_path / "memory.safetensors")
    same(Memory.load(tmp_path / "memory.safetensors", model), begin, exact=True)
    assert Memory.load(tmp_path / "memory.safetensors", model).edited and not loaded.edited


def changed_file(memory: Memory, folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """The file of a memory, sealed again after a change of its tensors."""
    path = folder / "memory.safetensors"
    memory.save(path)
    with safe_open(path, "pt") as file:
        said = json.loads(file.metadata()["hookpoints"])
    named = load_file(path)
    change(named)
    del said["sha256"]
    said["sha256"] = tensors_hash(named, said)
    save_file(named, path, {"hookpoints": json.dumps(said)})
    return path


def test_a_file_of_many_rows_runs_no_model_on_them(small, tmp_path, monkeypatch):
    """One row tells the shapes that the file needs."""
    model, memory = small
    rows: list[int] = []
    path = changed_file(memory, tmp_path, lambda named: named.update(tokens=named["tokens"][:1].repeat(400, 1)))
    handle = model.hf_model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    with handle, pytest.raises(InputError, match=r"expected .*, got"):
        Memory.load(path, model)
    assert set(rows) == {1}


def test_a_memory_says_of_each_token_whether_it_is_exact(small):
    model, memory = small
    cut = memory.without(SPAN, approximate=True)
    seeing = reach(memory.cache)  # tokens after a cut that are read again
    first = START + seeing
    assert memory.approximate is None and cut.rewind(first).approximate is None  # the tokens that are not are gone
    assert model.memory(AFTER, memory=cut.rewind(first)).approximate is None
    later = model.memory(AFTER, memory=cut)  # read after such tokens
    assert later.approximate == f"tokens {first} to 21 were read with other tokens in view"
    for _ in range(4):
        cut = cut.without((2, 4), approximate=True)
    assert cut.T == 8 and cut.approximate == f"tokens {2 + seeing} to 7 were read with other tokens in view"
    assert (
        cut.rewind(3 + seeing).approximate == f"tokens {2 + seeing} to {2 + seeing} were read with other tokens in view"
    )
    joined = memory.rewind(9).paste(memory, (12, 14)).paste(memory, (9, 10))
    assert str(joined.approximate).startswith("tokens 9 to 11 ")
    pasted = memory.rewind(9).with_states({}).paste(memory, (9, 12))  # read after what no token wrote
    assert "tokens 9 to 11 were read" in str(pasted.approximate)
    for changed in (memory.truncate(1), memory.with_states({}), memory + {}):
        assert "by hand" in str(changed.approximate)


def test_tokens_are_named_that_are_approximate_in_any_row():
    flags = torch.tensor([[1, 1, 0, 0, 0], [0, 1, 0, 0, 1]]).bool()
    assert flagged_stretches(flags) == ["tokens 0 to 1", "tokens 4 to 4"]


def test_only_streams_that_are_read_are_kept(whole):
    """Of a block's input, and of what the mixer adds where a second token shift reads the sum."""
    model, memory = whole
    streams = memory.kept.stream
    for name in streams:
        if int(name.split(".")[1]) not in model.cfg.layers:
            continue  # attention keys are checked by it
        kept = memory.kept._replace(stream={**streams, name: torch.zeros_like(streams[name])})
        unread = replace(memory, kept=kept).rewind(9)
        first = name == "blocks.0.hook_resid_pre"
        assert first or not torch.equal(
            model.logits_after(unread, AFTER), model.logits_after(memory.rewind(9), AFTER)
        ), name
    assert any(name.endswith("hook_mixer_out") for name in streams) == (model.cfg.model_type == "rwkv7")


def test_transformers_own_crop_leaves_the_state(small):
    """As docs/errors.md says of it."""
    model, memory = small
    cache = DynamicCache(config=model.hf_model.config)
    cache.activate_past_recording()
    with torch.no_grad():
        model.hf_model(input_ids=READ, use_cache=True, **{cache_argument(model.hf_model): cache})
    cache.crop(STOP - T)
    for layer, form in memory.forms.items():
        left = state_of(cache, layer, form.value_first)
        assert_close(left, memory.state(layer))
        assert not torch.allclose(left, memory.rewind(STOP).state(layer), rtol=0.1)


def test_layers_of_one_shape_on_two_devices_are_scanned_apart(model, tokens):
    memory = model.memory(tokens)
    there = {name: x.to("meta") for name, x in memory.kept.factor[1].items()}
    states = states_after(memory.forms, memory.kept._replace(factor={**memory.kept.factor, 1: there}))
    assert states[1].is_meta > states[0].is_meta


def test_a_file_of_another_model_or_a_damaged_one_is_refused(read, tmp_path):
    _, memory = read
    file = tmp_path / "memory.safetensors"
    memory.save(file)
    for other in (make_hf("qwen3_5", seed=1), make_hf("qwen3_5").double(), make_hf("mamba2")):
        hooked = HookedRecurrent.from_hf(other, self_check=False)
        with pytest.raises(InputError, match="another model") as raised:
            Memory.load(file, hooked)
        # Both fingerprints are named, so that a reader sees which file belongs to which model.
        assert sealing.fingerprint(memory.model.hf_model) in str(raised.value)


def test_every_weight_counts(read, tmp_path):
    model, memory = read
    memory.save(tmp_path / "memory")
    for weight in model.hf_model.parameters():
        for place in (0, weight.numel() // 2 + 1, weight.numel() - 1):
            value = weight.data.view(-1)[place].clone()
            weight.data.view(-1)[place] += 1e-3
            with pytest.raises(InputError, match="another model"):
                Memory.load(tmp_path / "memory", model)
            weight.data.view(-1)[place] = value
    same(Memory.load(tmp_path / "memory", model), memory, exact=True)


def test_a_sum_of_bits_is_that_of_whole_numbers():
    """Saved memories name these sums, so that another way to mix would refuse all of them."""

    def signed(x: int) -> int:
        return (x + 2**63) % 2**64 - 2**63

    numbers = torch.randn(33, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    total = 0
    for place, word in enumerate(struct.unpack("<33q", numbers.numpy().tobytes()), 1):
        mixed = signed(word + place * sealing._ODD[0])
        mixed = signed((mixed ^ (mixed >> 32)) * sealing._ODD[1])
        total += mixed ^ (mixed >> 29)
    assert sealing.sum_of_bits(numbers) == signed(total)


def test_sums_of_bits_depend_on_each_place_and_not_on_the_layout(monkeypatch):
    x = torch.randn(7, 33, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.bool):
        y = (x > 0) if dtype == torch.bool else x.to(dtype)
        total = sealing.sum_of_bits(y)
        assert total == sealing.sum_of_bits(y.T.contiguous().T) and total != sealing.sum_of_bits(y.flip(0))
        assert total == sealing.sum_of_bits(torch.cat([y[:1], y])[1:])  # not aligned
        with monkeypatch.context() as patched:
            patched.setattr(sealing, "_WORDS", {"cpu": 5})
            assert total == sealing.sum_of_bits(y)
    assert sealing.sum_of_bits(x[:0]) == 0


def test_no_damage_loads_and_none_is_a_raw_error(read, tmp_path):
    model, memory = read
    memory.without(SPAN).save(tmp_path / "whole")
    whole, file, random = (tmp_path / "whole").read_bytes(), tmp_path / "damaged", Random(0)
    head = 8 + int.from_bytes(whole[:8], "little")
    for n in range(80):
        damaged = bytearray(whole)
        for _ in range(random.choice((1, 1, 3))):  # half of them in the header
            at = random.randrange(head if n % 2 else len(whole))
            damaged[at] ^= 1 << random.randrange(8)
        if n % 5 == 0:
            del damaged[random.randrange(len(damaged)) :]
        file.write_bytes(damaged)
        with pytest.raises(InputError):
            Memory.load(file, model)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda named: named.pop("tokens"), "tokens"),
        (lambda named: named.update(tokens=named["tokens"] + VOCAB), "vocabulary"),
        (lambda named: named.update(tokens=named["tokens"][:, 1:].contiguous()), "expected .*, got"),
        (lambda named: named.update(more=torch.zeros(1)), "more"),
        (lambda named: named.pop("cache/0/conv_states/0"), "conv_states"),
        (lambda named: named.update({"factor/0/k": named["factor/0/k"][..., 1:].contiguous()}), "factor/0/k"),
        (lambda named: named.update({"cache/3/keys/": named["cache/3/keys/"].double()}), "keys"),
    ],
)
def test_a_sealed_file_has_the_tensors_that_the_model_has(read, tmp_path, change, match):
    """Anyone can seal a file; its names and shapes are those of the model, not its own."""
    model, memory = read
    with pytest.raises(InputError, match=match):
        Memory.load(changed_file(memory, tmp_path, change), model)


@pytest.mark.parametrize(
    "ask",
    [
        lambda model, memory: memory.without((5, 5)),
        lambda model, memory: memory.without((9, 4)),
        lambda model, memory: memory.without((T, T + 1)),
        lambda model, memory: memory.without(slice(2, 8, 2)),
        lambda model, memory: memory.rewind(-1),
        lambda model, memory: memory.truncate(0),
        lambda model, memory: memory.lerp(memory, float("nan")),
        lambda model, memory: memory + {0: torch.zeros(1)},
        *(lambda model, memory, x=x: memory.with_states({0: memory.state(0) * x}) for x in (torch.nan, torch.inf)),
        lambda model, memory: memory.with_states({0: memory.state(0).to_sparse()}),
        lambda model, memory: memory.paste(model.memory(READ[:1]), SPAN),
        lambda model, memory: memory - HookedRecurrent.from_hf(make_hf("qwen3_5")).memory(READ),
        lambda model, memory: HookedRecurrent.from_hf(make_hf("qwen3_5"))(AFTER, memory=memory),
        lambda model, memory: model(AFTER[:1], memory=memory),
        lambda model, memory: model(AFTER, memory=replace(memory, dtype=torch.float64)),
        lambda model, memory: model.memory(torch.full((1, 3), VOCAB)),
    ],
)
def test_what_makes_no_sense_is_refused(read, ask):
    with pytest.raises(InputError):
        ask(*read)


def test_padding_and_models_that_cannot_continue_are_refused(embedded):
    texts, memory = ["one", "one two three"], embedded.memory(READ)
    for ask in (embedded.memory, embedded.forward, embedded.generate):
        with pytest.raises(InputError, match="padding"):
            ask(texts, memory=memory)
    assert torch.equal(embedded.memory(" of", memory=embedded.memory("one")).tokens, embedded.to_tokens("one of"))
    # A sliding window; an op that begins with zeros whatever the cache holds.
    for model_type in MAKERS.keys() & {"lara_mini"}:
        with pytest.raises(UnsupportedModelError, match="cache"):
            HookedRecurrent.from_hf(make_hf(model_type), self_check=False).memory(READ)
