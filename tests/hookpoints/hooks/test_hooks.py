"""Every row of the hook table fires as it says, and an edit does what it says."""

from __future__ import annotations

import pytest
import torch
from recurrences import normal, random_recurrence
from tiny_models import make_hf
from torch.testing import assert_close
from transformer_lens import ActivationCache

from hookpoints import HOOKS, HookedRecurrent, attach
from hookpoints.errors import HookDidNotFireError
from hookpoints.hooks.points import HookSet, through_hook
from hookpoints.hooks.table import HookRow, is_matrix, time_axis
from hookpoints.model.inputs import cache_of
from hookpoints.recurrence.reference import scan

LAYER, HEAD, ATTENTION = 1, 2, 3
SIZES = {"B": 2, "T": 70, "H": 4, "K": 8, "V": 6, "D": 32}
OF_ATTENTION = [f"blocks.{ATTENTION}.attn.hook_{part}" for part in ("q", "k", "v", "pattern")]


def name_of(row: HookRow) -> str:
    return row.full_name(ATTENTION if row.scope == "attn" else LAYER, HEAD)


def shape_of(axes: str, **sizes: int) -> tuple[int, ...]:
    sizes = {**SIZES, "S": SIZES["T"], **sizes}
    flat = axes.replace("(KV)", "F").split(" or ")[0]
    return tuple(sizes["K"] * sizes["V"] if axis == "F" else sizes[axis] for axis in flat)


@pytest.mark.parametrize("row", HOOKS, ids=lambda row: f"{row.scope}-{row.name}")
@torch.no_grad()
def test_each_row_fires_in_prefill_and_decode_with_its_shape(model, tokens, row):
    name, seen = name_of(row), []
    with model.hooks([(name, lambda x, hook: seen.append((tuple(x.shape), hook.name)))]):
        model(tokens)
        model.generate(tokens, max_new_tokens=3, do_sample=False)
    attention = {"H": 2, "G": 1, "K": 16, "V": 16} if row.scope == "attn" else {}
    prefill = (shape_of(row.axes, **attention), name)
    steps = [(shape_of(row.axes, **attention, T=1, S=SIZES["T"] + n), name) for n in (1, 2)]
    assert seen == [prefill, prefill, *steps]  # forward; generate: prompt, then two steps make three tokens


def test_factors_of_tokens_that_take_two_steps_have_the_axes_of_the_table():
    r = random_recurrence("gated_deltaproduct", T=5)
    assert r.R == 2
    of_names = {"hook_write_key": r.k, "hook_write_value": r.u}
    of_factors = {"q": r.q, "k": r.k, "v": r.u, "beta": r.beta, "log_decay": r.log_decay, "a": r.a, "b": r.b}
    for row in HOOKS:
        factor = of_names.get(row.name, of_factors.get(row.factor or ""))
        if row.scope == "mixer" and factor is not None:
            sizes = {"B": r.B, "T": r.T, "H": r.H, "R": r.R, "K": r.K, "V": r.V}
            assert factor.shape == shape_of(row.axes_of(r.R), **sizes), row.name


def test_the_table_is_the_model(model):
    per_scope = {"model": [()], "block": [(layer,) for layer in range(4)], "attn": [(ATTENTION,)]}
    per_scope["mixer"] = [(layer,) for layer in range(3)]
    per_scope["head"] = [(layer, head) for layer in range(3) for head in range(4)]
    names = {row.full_name(*at) for row in HOOKS for at in per_scope[row.scope]}
    names -= {"blocks.3.hook_mixer_out"}  # an attention block
    assert names == set(model.hook_dict)


@torch.no_grad()
def test_execution_order_is_table_order(model, tokens):
    order = []
    with model.hooks([(lambda name: True, lambda x, hook: order.append(hook.name))]):
        model(tokens)
    for layer in (LAYER, ATTENTION):
        wanted = [name for row in HOOKS if (name := row.full_name(layer, HEAD)) in model.hook_dict]
        assert [name for name in order if name in wanted] == wanted


@pytest.mark.parametrize("row", [row for row in HOOKS], ids=lambda row: f"{row.scope}-{row.name}")
@torch.no_grad()
def test_each_hook_can_be_edited_and_only_the_future_moves(model, tokens, row):
    """Doubling the activation at t (attention norms sizes away, so there its negation) changes later logits and no
    earlier ones; in place or returned is the same. What is patched with itself stays bit by bit."""
    t, name, plain = 40, name_of(row), model(tokens)
    _, cache = model.run_with_cache(tokens, names_filter=name)
    assert torch.equal(model.run_with_hooks(tokens, fwd_hooks=[(name, lambda x, hook: cache[name].clone())]), plain)

    def returned(x, hook):
        x = x.clone()
        in_place(x, hook)
        return x

    def in_place(x, hook):
        x.select(time_axis(row.name), t).mul_(-1 if row.scope == "attn" else 2)

    edited = model.run_with_hooks(tokens, fwd_hooks=[(name, returned)])
    if row.factor in ("q", "k", "a", "b"):  # fed normalised vectors, or computed by another kernel: rounding differs
        assert_close(edited[:, :t], plain[:, :t], rtol=0, atol=1e-5)
    else:
        assert torch.equal(edited[:, :t], plain[:, :t])
    # Doubling the whole residual stream before the final norm changes nothing but rounding; elsewhere it must.
    assert not torch.allclose(edited[:, t], plain[:, t], rtol=0, atol=1e-6)
    assert_close(model.run_with_hooks(tokens, fwd_hooks=[(name, in_place)]), edited)
    # Beside hooks that only keep what they see, after which values are not compared.
    kept, saving, _ = model.get_caching_hooks(name)
    assert torch.equal(model.run_with_hooks(tokens, fwd_hooks=saving), plain) and [*kept] == [name]
    for both in ([*saving, (name, in_place)], [(name, in_place), *saving]):
        assert_close(model.run_with_hooks(tokens, fwd_hooks=both), edited)
    other = model.mod_dict[name].register_forward_pre_hook(lambda _, inputs: in_place(inputs[0], None))
    assert_close(model.run_with_hooks(tokens, fwd_hooks=saving), edited)
    other.remove()


@torch.no_grad()
def test_write_factors_and_dense_write_agree(model64, tokens):
    """Scaling the value side, the key side, or the matrix is the same edit; the state hook sees it."""
    layer = f"blocks.{LAYER}.mixer."

    def scaled(x, hook):
        x = x.clone()
        x[:, 30:33] *= 1.7
        return x

    runs = {}
    for hook in ("hook_write_key", "hook_write_value", "hook_write"):
        with model64.hooks([(layer + hook, scaled)]):
            runs[hook] = model64.run_with_cache(tokens, names_filter=[layer + "hook_state", layer + "hook_write"])
    for logits, cache in runs.values():
        assert_close(logits, runs["hook_write"][0], rtol=0, atol=1e-10)
        assert_close(cache[layer + "hook_state"], runs["hook_write"][1][layer + "hook_state"], rtol=0, atol=1e-10)


@torch.no_grad()
def test_a_key_and_a_value_that_change_together_write_their_product(model64, tokens):
    """k' u'^T, cross term included, with the native erase: against the walk by steps."""
    r, layer = model64.recurrence(tokens, LAYER), f"blocks.{LAYER}.mixer."
    keys, values = r.k + normal(*r.k.shape), r.u + normal(*r.u.shape, seed=1)
    hooks = [(layer + "hook_write_key", lambda x, hook: keys), (layer + "hook_write_value", lambda x, hook: values)]
    with model64.hooks(hooks):
        _, cache = model64.run_with_cache(tokens, names_filter=[layer + "hook_write", layer + "hook_read"])
    writes = torch.einsum("bthk,bthv->bthkv", keys, values)
    assert_close(cache[layer + "hook_write"], writes, rtol=0, atol=1e-10)
    assert_close(cache[layer + "hook_read"], scan(r, writes).outputs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("scale", [0.25, 1.0])
def test_a_hook_sees_a_value_times_its_scale(scale):
    """A scale of the sum that the value enters; what the hook adds is added to that sum, also in place."""
    hooks, value, added = HookSet(["hook_mlp_out"]), normal(2, 3, 4), normal(2, 3, 4, seed=1)
    through, seen = through_hook(hooks, "hook_mlp_out", scale), []
    assert through(value) is value
    hooks.hook_mlp_out.add_hook(lambda x, hook: seen.append(x.clone()))
    assert torch.equal(through(value), value) and torch.equal(seen[0], scale * value)
    for edit in (lambda x, hook: x + added, lambda x, hook: x.add_(added)):
        hooks.hook_mlp_out.remove_hooks()
        hooks.hook_mlp_out.add_hook(edit)
        assert_close(scale * through(value.clone()), scale * value + added, rtol=0, atol=1e-14)


@torch.no_grad()
def test_state_edits_reach_generation(model, tokens):
    """A last state that is replaced in the prompt goes on into decoding."""
    name = f"blocks.{LAYER}.mixer.hook_state"
    zeroed = [(name, lambda x, hook: torch.zeros_like(x) if x.shape[1] > 1 else None)]
    with model.hooks(zeroed):
        out = model.hf_model(tokens, use_cache=True)
    assert cache_of(out).layers[LAYER].recurrent_states[0].abs().max() < 1e-6
    assert cache_of(model.hf_model(tokens, use_cache=True)).layers[LAYER].recurrent_states[0].abs().max() > 1e-3


@pytest.mark.parametrize("name", [f"blocks.{LAYER}.mixer.heads.{HEAD}.hook_write", *OF_ATTENTION])
def test_gradients_at_a_hook_match_finite_differences(model64, tokens, name):
    """The gradient at hook_write is the effect of a small write, in float64."""
    kept = []

    def objective(step=None):
        def hook(x, hook):
            kept.append(x)
            return None if step is None else x + step

        return model64.run_with_hooks(tokens[:1, :20], fwd_hooks=[(name, hook)])[0, -1, 5]

    (gradient,) = torch.autograd.grad(objective(), kept[0])
    with torch.no_grad():
        direction = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        eps = 1e-5
        measured = (objective(eps * direction) - objective(-eps * direction)) / (2 * eps)
    assert_close((gradient * direction).sum(), measured, rtol=1e-5, atol=1e-9)
    assert gradient.abs().max() > 0


def test_backward_hooks_and_parameter_gradients(tokens):
    """Listening does not disturb the gradients of parameters, and bwd hooks see theirs."""
    model = HookedRecurrent.from_hf(make_hf(), trainable=True)
    model(tokens, return_type="loss").backward()
    plain = {name: p.grad.clone() for name, p in model.hf_model.named_parameters() if p.grad is not None}
    model.zero_grad()
    _, cache = model.run_with_cache(
        tokens,
        return_type="loss",
        incl_bwd=True,
        names_filter=[f"blocks.{LAYER}.mixer.hook_write", "blocks.0.hook_resid_pre", *OF_ATTENTION],
    )
    assert cache[f"blocks.{LAYER}.mixer.hook_write_grad"].shape == shape_of("BTHKV")
    assert all(cache[f"{n}_grad"].abs().max() > 0 for n in (f"blocks.{LAYER}.mixer.hook_write", *OF_ATTENTION))
    for name, parameter in model.hf_model.named_parameters():
        if parameter.grad is not None:
            assert_close(parameter.grad, plain[name], rtol=1e-3, atol=1e-6, msg=name)


def test_a_frozen_model_holds_what_hooks_keep(tokens):
    """In grad mode a cached run keeps no graph, and backward hooks see the gradients of a model that is trained."""
    hf = make_hf()
    name = f"blocks.{LAYER}.mixer.hook_write"
    asked = {"return_type": "loss", "incl_bwd": True, "names_filter": [name]}
    _, trained = HookedRecurrent.from_hf(hf, trainable=True).run_with_cache(tokens, **asked)
    assert all(weight.requires_grad for weight in hf.parameters())
    frozen = HookedRecurrent.from_hf(hf)
    logits, kept = frozen.run_with_cache(tokens)
    assert not logits.requires_grad and not any(value.requires_grad for value in kept.values())
    _, cache = frozen.run_with_cache(tokens, **asked)
    assert_close(cache[f"{name}_grad"], trained[f"{name}_grad"], rtol=0, atol=0)
    assert not any(weight.requires_grad for weight in HookedRecurrent.from_pretrained("facts").parameters())
    with attach(make_hf()) as hooked:  # of a model that may be in training
        assert all(weight.requires_grad for weight in hooked.hf_model.parameters())


@torch.no_grad()
def test_run_with_cache_leaves_matrices_out_unless_named(model, tokens):
    _, cache = model.run_with_cache(tokens)
    assert isinstance(cache, ActivationCache) and not any(is_matrix(name) for name in cache)
    assert cache["resid_pre", 2].shape == shape_of("BTD")
    _, sliced = model.run_with_cache(tokens, names_filter=f"blocks.{LAYER}.mixer.hook_write", pos_slice=-1)
    assert sliced[f"blocks.{LAYER}.mixer.hook_write"].shape == (2, 1, 4, 8, 6)
    _, partial = model.run_with_cache(tokens, stop_at_layer=2)
    assert all(int(name.split(".")[1]) < 2 for name in partial if name.startswith("blocks."))


@torch.no_grad()
def test_a_hook_that_does_not_fire_is_an_error(model, tokens):
    late = [("blocks.3.hook_resid_post", lambda x, hook: None)]
    with pytest.raises(HookDidNotFireError, match=r"blocks\.3\.hook_resid_post"):
        model.run_with_hooks(tokens, fwd_hooks=late, stop_at_layer=2)
    with model.hooks(late):
        pass  # nothing ran, nothing is claimed
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


def test_a_backward_hook_is_missed_where_a_backward_pass_does_not_reach_it(tokens):
    kept = []
    model = HookedRecurrent.from_hf(make_hf(), trainable=True)
    low, high = (
        [(f"blocks.{layer}.mixer.hook_write", lambda gradient, hook: kept.append(gradient))] for layer in (0, 2)
    )
    with model.hooks(bwd_hooks=low):
        model(tokens, stop_at_layer=2).sum().backward()
    assert len(kept) == 1
    with pytest.raises(HookDidNotFireError, match=r"blocks\.2\.mixer"), model.hooks(bwd_hooks=high):
        model(tokens, stop_at_layer=2).sum().backward()
    with model.hooks(bwd_hooks=high):
        model(tokens)  # without a backward pass nothing is claimed


def test_the_configuration_follows_the_model(tokens):
    model = HookedRecurrent.from_hf(make_hf())
    assert model.cfg.dtype == torch.float32
    model.hf_model.to(torch.bfloat16)
    assert model.cfg.dtype == torch.bfloat16
    model.double()
    assert model.cfg.dtype == torch.float64 and model.cfg.device == model.W_E.device
    model.to("meta")
    assert model.cfg.device.type == "meta"
