"""States that a token finds, and erases: edits are exact and carried on, and a token can be made to do nothing."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recurrences import FORMS, random_recurrence
from remembering import drawn_ids
from torch import Tensor
from torch.testing import assert_close

from hookpoints.edits.edit import LowRankChange
from hookpoints.fla import is_fla
from hookpoints.layer.response import EditResponse
from hookpoints.model.inputs import cache_of, continuing
from hookpoints.recurrence.canonical import over_time
from hookpoints.recurrence.recurrence import Recurrence
from hookpoints.recurrence.reference import read_out, transition
from hookpoints.rules.base import OpResult

sys.path.append(str(Path(__file__).parents[1] / "model"))

from test_model_types import normal
from test_parity import VALUE_FIRST

EXACT = {"rtol": 0, "atol": 1e-10}
SEQUENCE = drawn_ids(2, 24, seed=3)


def by_steps(r: Recurrence, found: Tensor, writes: Tensor, seen: Tensor) -> list[Tensor]:
    """Reads, and states before and after each token: ``found`` [B,T,H,K,V] is added to the state that a token finds,
    ``writes`` are what it writes, and ``seen`` is added to the state after it for its readers alone."""
    after, shown, walked = r.starting_state(), r.starting_state(), []
    for t in range(r.T):
        before = after
        moved = transition(r, t, before + found[:, t])
        after = moved + writes[:, t]
        shown = shown + found[:, t] if r.read_before_write else after + seen[:, t]
        walked.append((read_out(r.q[:, t] * r.scale, shown), before, after))
        shown = after + seen[:, t]
    return [torch.stack(each, 1) for each in zip(*walked)]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    form=st.sampled_from(sorted(FORMS)),
    begins=st.booleans(),
    changes=st.lists(
        st.tuples(st.sampled_from(["found", "low rank", "dense", "seen"]), st.sets(st.integers(0, 39), min_size=1)),
        max_size=4,
    ),
)
def test_what_is_added_to_writes_and_states_is_carried_on(form, begins, changes):
    """Float64, against the walk by steps: of one of three heads, and of the others what it was without changes."""
    r = random_recurrence(form, B=2, T=40, H=3, dtype=torch.float64, initial_state=begins)
    response, head = EditResponse(r), slice(1, 2)
    added = {kind: torch.zeros_like(r.write()) for kind in ("found", "low rank", "dense", "seen")}
    for n, (kind, tokens) in enumerate(sorted(changes, key=lambda change: change[0])):  # in the order of the hooks
        keys, values = torch.zeros(2, 40, 2, r.K, dtype=torch.float64), normal(n, 2, 40, 2, r.V)
        keys[:, [*tokens], 1] = normal(n, 2, len(tokens), r.K)
        change = (keys.mT @ values).unsqueeze(2)
        added[kind][:, :, head] += change
        if kind == "low rank":
            response.add_low_rank(LowRankChange(1, keys, values))
        else:
            add = {"found": response.add_states_before, "dense": response.add_dense, "seen": response.add_states}[kind]
            add(head, change)
    reads, before, after = by_steps(r, added["found"], r.write() + added["low rank"] + added["dense"], added["seen"])
    expected = OpResult(reads, after[:, -1] + added["seen"][:, -1])
    assert_close(response.apply(OpResult(*r.scan())), expected, **EXACT)
    assert_close(response.states(slice(None)), after, **EXACT)
    assert_close(response.states_before(slice(0, 2)), before[:, :, :2], **EXACT)
    assert_close(response.writes(slice(0, 1)), r.write(heads=0), **EXACT)


def passes(model, layer, lengths, edit=None):
    """The sequence in passes of these lengths, each continuing the cache of the one before, which ``edit`` may change
    after the first: logits, and states and reads of ``layer``."""
    names, cache, seen = [f"blocks.{layer}.mixer.{name}" for name in ("hook_state", "hook_read")], None, [[], [], []]
    hooks = [(name, lambda x, hook, to=to: to.append(x.clone())) for name, to in zip(names, seen[1:])]
    for tokens, where in zip(SEQUENCE.split(lengths, 1), torch.arange(24).expand(2, -1).split(lengths, 1)):
        with model.hooks(hooks):
            out = model.hf_model(tokens, **continuing(model.hf_model, cache, int(where[0, 0]), tokens))
        if cache is None and edit is not None:
            edit(cache_of(out))
        cache = cache_of(out)
        seen[0].append(out.logits)
    return [torch.cat(each, 1) for each in seen]


def setting(model, t, value):
    """A hook that sets ``value`` at token t, in whatever pass that is."""

    def hook(x, hook):
        at = t - model.first_token()
        x[:, max(at, 0) : max(at + 1, 0)] = value

    return hook


@torch.no_grad()
def test_a_state_that_is_set_is_as_a_cache_that_is_set(ruled64):
    """In one pass over all tokens, while tokens are decoded, in generation, and by hand in the cache."""
    layer, t, of_fla = ruled64.cfg.recurrent_layers[-1], 20, is_fla(ruled64.hf_model)
    shape = ruled64.cfg.layer(layer)
    head = min(1, shape.H - 1)
    name = f"blocks.{layer}.mixer.heads.{head}.hook_state_in"
    state = normal(0, 2, 1, shape.K, shape.V)

    def by_hand(cache):
        native = cache[layer]["recurrent_state"] if of_fla else cache.layers[layer].recurrent_states[0]
        value_first = shape.rule in VALUE_FIRST[of_fla]
        sides = (shape.V, shape.K) if value_first else (shape.K, shape.V)
        native = native.view(-1, shape.H, *sides)  # Mamba-1's knows no heads, HGRN's no keys
        (native.mT if value_first else native)[:, head] = state[:, 0]

    expected = passes(ruled64, layer, [t, 1, 1, 1, 1], by_hand)
    assert not torch.allclose(expected[0][:, t:], passes(ruled64, layer, [24])[0][:, t:], rtol=0, atol=1e-3)
    # Upstream rounds otherwise in one pass; and logits are rounded by the layers above.
    for lengths, atol in (([t - 2, 1, 1, 1, 1, 1, 1], 1e-10), ([24], 1e-8)):
        with ruled64.hooks([(name, setting(ruled64, t, state))]):
            logits, *states_and_reads = passes(ruled64, layer, lengths)
        assert_close(logits, expected[0], rtol=0, atol=1e-8)
        assert_close(states_and_reads, expected[1:], rtol=0, atol=atol)
    with ruled64.hooks([(name, setting(ruled64, t + 1, 5 * state))]):
        out = ruled64.generate(SEQUENCE[:, :t], max_new_tokens=3, do_sample=False)
        assert_close(ruled64(out)[:, t - 1 : -1].argmax(-1), out[:, t:])


@torch.no_grad()
def test_a_token_without_write_decay_and_erase_is_as_if_it_were_not_there(ruled64):
    """The recurrence over the other tokens' factors alone, to the last digits: in a prompt, and among tokens that
    continue a cache. And an edited b is computed as the recurrence with that b."""
    layer, gone = ruled64.cfg.recurrent_layers[-1], (12, 22)
    mixer, others = f"blocks.{layer}.mixer.", torch.tensor([t for t in range(24) if t not in gone])
    r = ruled64.recurrence(SEQUENCE, layer)
    rest = r.replace(**{name: x[:, others] for name, x in over_time(r)})
    hooks = [mixer + name for name in ("hook_write_value", "hook_log_decay", "hook_erase_a")]
    hooks = [(name, setting(ruled64, t, 0)) for name in hooks if name in ruled64.hook_dict for t in gone]
    assert len(hooks) == 2 * (1 + (r.log_decay is not None) + (r.b is not None))
    with ruled64.hooks(hooks):
        for lengths in ([24], [20, 1, 1, 1, 1]):
            _, states, reads = passes(ruled64, layer, lengths)
            assert_close(reads[:, others], rest.outputs(method="reference"), **EXACT)
            assert_close(states[:, others], rest.states(method="reference"), **EXACT)
            assert_close(states[:, gone], states[:, [t - 1 for t in gone]], **EXACT)
    assert (mixer + "hook_erase_b" in ruled64.hook_dict) is (r.b is not None)
    if r.b is not None:
        b = r.b.index_copy(1, torch.tensor([9]), normal(0, *r.b[:, :1].shape) / r.K)
        with ruled64.hooks([(mixer + "hook_erase_b", setting(ruled64, 9, b[:, 9:10]))]):
            _, states, _ = passes(ruled64, layer, [24])
        assert_close(states, r.replace(b=b).states(method="reference"), **EXACT)
        assert not torch.allclose(states, r.states(), rtol=0, atol=1e-6)
