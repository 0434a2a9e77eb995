"""Every row of the hook table fires as it says, and an edit does what it says."""

from __future__ import annotations

import pytest
import torch
from recurrences import normal
from tiny_models import make_hf
from torch.testing import assert_close
from transformer_lens import ActivationCache

from hookpoints import HOOKS, HookedRecurrent, attach
from hookpoints.errors import HookDidNotFireError
from hookpoints.hooks.points import HookSet, through_hook
from hookpoints.hooks.table import HookRow, is_matrix, time_axis
from hookpoints.recurrence.reference import scan, steps

LAYER, HEAD, ATTENTION = 1, 2, 3
OF_ATTENTION = [f"blocks.{ATTENTION}.attn.hook_{part}" for part in ("q", "k", "v", "pattern")]


def name_of(row: HookRow) -> str:
    return row.full_name(ATTENTION if row.scope == "attn" else LAYER, HEAD)


@torch.no_grad()
def test_execution_order_is_table_order(model, tokens):
    """Every hook of the table fires, in its order, and the model has no hooks besides."""
    order = []
    with model.hooks([(lambda name: True, lambda x, hook: order.append(hook.name))]):
        model(tokens)
    assert set(order) == set(model.hook_dict)
    for layer in range(4):
        scopes = ("model", "block", "attn") if layer == ATTENTION else ("model", "block", "mixer", "head")
        table = [row.full_name(layer, HEAD) for row in HOOKS if row.scope in scopes]
        if layer == ATTENTION:
            table.remove(f"blocks.{layer}.hook_mixer_out")
        at_layer = [name for name in order if not name.startswith("blocks.") or f".{layer}." in name[:9]]
        assert [name for name in at_layer if "heads" not in name or f"heads.{HEAD}." in name] == table


@pytest.mark.parametrize("row", HOOKS, ids=lambda row: f"{row.scope}-{row.name}")
@torch.no_grad()
def test_each_hook_can_be_edited_and_only_the_future_moves(model, tokens, row):
    """Doubling the activation at t (attention norms sizes away, so there its negation) changes later logits and no
    earlier ones; in place, by numpy (of which PyTorch takes no note), or returned is the same. What is patched with
    itself stays bit by bit."""
    t, name, plain = 40, name_of(row), model(tokens)
    _, cache = model.run_with_cache(tokens, names_filter=name)
    assert torch.equal(model.run_with_hooks(tokens, fwd_hooks=[(name, lambda x, hook: cache[name].clone())]), plain)

    def in_place(x, hook):
        x.select(time_axis(row.name), t).mul_(-1 if row.scope == "attn" else 2)

    def by_numpy(x, hook):
        in_place(torch.from_numpy(x.numpy()), hook)

    def returned(x, hook):
        x = x.clone()
        in_place(x, hook)
        return x

    edited = model.run_with_hooks(tokens, fwd_hooks=[(name, returned)])
    if row.factor in ("q", "k", "a", "b"):  # fed normalised vectors, or computed by another kernel: rounding differs
        assert_close(edited[:, :t], plain[:, :t], rtol=0, atol=1e-5)
    else:
        assert torch.equal(edited[:, :t], plain[:, :t])
    # Doubling the whole residual stream before the final norm changes nothing but rounding; elsewhere it must.
    assert not torch.allclose(edited[:, t], plain[:, t], rtol=0, atol=1e-6)
    _, saving, _ = model.get_caching_hooks(name)
    for hooks in ([in_place], [by_numpy], [saving[0][1], in_place], [in_place, saving[0][1]]):
        assert_close(model.run_with_hooks(tokens, fwd_hooks=[(name, hook) for hook in hooks]), edited)


@torch.no_grad()
def test_write_factors_and_dense_write_agree(model64, tokens):
    """Edits of the key, the value, both (k' u'^T, cross term included) or the matrix, with the native erase: against
    the walk by steps."""
    r, layer = model64.recurrence(tokens, LAYER), f"blocks.{LAYER}.mixer."
    keys, values = r.k.clone(), r.u.clone()
    keys[:, 30:33] += normal(2, 3, 4, 8)
    values[:, 30:33] += normal(2, 3, 4, 6, seed=1)
    for k, u, names in (
        (keys, r.u, ["hook_write_key"]),
        (r.k, values, ["hook_write_value"]),
        (keys, values, ["hook_write_key", "hook_write_value"]),
        (keys, values, ["hook_write"]),
    ):
        writes = torch.einsum("bthk,bthv->bthkv", k, u)
        edited = {"hook_write_key": k, "hook_write_value": u, "hook_write": writes}
        with model64.hooks([(layer + name, lambda x, hook, new=edited[name]: new) for name in names]):
            _, cache = model64.run_with_cache(tokens, names_filter=lambda name: name.startswith(layer))
        assert_close(cache[layer + "hook_write"], writes, rtol=0, atol=1e-10)
        states = torch.stack([after for _, after in steps(r, writes)], 1)
        assert_close(cache[layer + "hook_state"], states, rtol=0, atol=1e-10)
        assert_close(cache[layer + "hook_read"], scan(r, writes).outputs, rtol=0, atol=1e-10)


def test_a_hook_sees_a_value_times_its_scale():
    """A scale of the sum that the value enters; what the hook adds is added to that sum, also in place."""
    hooks, value, added = HookSet(["hook_mlp_out"]), normal(2, 3, 4), normal(2, 3, 4, seed=1)
    through, seen = through_hook(hooks, "hook_mlp_out", 0.25), []
    assert through(value) is value
    for edit in (lambda x, hook: x + added, lambda x, hook: x.add_(added)):
        hooks.hook_mlp_out.remove_hooks()
        hooks.hook_mlp_out.add_hook(lambda x, hook: seen.append(x.clone()))
        hooks.hook_mlp_out.add_hook(edit)
        assert_close(0.25 * through(value.clone()), 0.25 * value + added, rtol=0, atol=1e-14)
        assert torch.equal(seen[-1], 0.25 * value)


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
    """Listening does not disturb the gradients of parameters. A model that is not trained keeps no graph, and its
    backward hooks see the same gradients."""
    names = [f"blocks.{LAYER}.mixer.hook_write", "blocks.0.hook_resid_pre", *OF_ATTENTION]
    how = {"return_type": "loss", "incl_bwd": True, "names_filter": names}
    model = HookedRecurrent.from_hf(make_hf(), trainable=True)
    model(tokens, return_type="loss").backward()
    plain = {name: p.grad.clone() for name, p in model.hf_model.named_parameters() if p.grad is not None}
    model.zero_grad()
    _, cache = model.run_with_cache(tokens, **how)
    assert all(cache[f"{name}_grad"].abs().max() > 0 for name in names)
    for name, parameter in model.hf_model.named_parameters():
        if parameter.grad is not None:
            assert_close(parameter.grad, plain[name], rtol=1e-3, atol=1e-6, msg=name)
    frozen = HookedRecurrent.from_hf(make_hf())
    logits, kept = frozen.run_with_cache(tokens)
    assert not logits.requires_grad and not any(value.requires_grad for value in kept.values())
    _, of_frozen = frozen.run_with_cache(tokens, **how)
    assert all(torch.equal(of_frozen[f"{name}_grad"], cache[f"{name}_grad"]) for name in names)
    with attach(make_hf()) as hooked:  # of a model that may be in training
        assert all(weight.requires_grad for weight in hooked.hf_model.parameters())


@torch.no_grad()
def test_run_with_cache_leaves_matrices_out_unless_named(model, tokens):
    _, cache = model.run_with_cache(tokens)
    assert isinstance(cache, ActivationCache) and not any(is_matrix(name) for name in cache)
    assert cache["resid_pre", 2] is cache["blocks.2.hook_resid_pre"]
    _, sliced = model.run_with_cache(tokens, names_filter=f"blocks.{LAYER}.mixer.hook_write", pos_slice=-1)
    assert sliced[f"blocks.{LAYER}.mixer.hook_write"].shape == (2, 1, 4, 8, 6)
    _, partial = model.run_with_cache(tokens, stop_at_layer=2)
    assert all(int(name.split(".")[1]) < 2 for name in partial if name.startswith("blocks."))


def test_a_hook_that_does_not_fire_is_an_error(tokens):
    """Forward where the pass stops before it, backward where the backward pass does not reach it. Where nothing ran,
    nothing is claimed."""
    model = HookedRecurrent.from_hf(make_hf(), trainable=True)
    late, fired = [("blocks.2.mixer.hook_write", lambda x, hook: None)], []
    with pytest.raises(HookDidNotFireError, match=r"blocks\.2\.mixer"):
        model.run_with_hooks(tokens, fwd_hooks=late, stop_at_layer=2)
    with pytest.raises(HookDidNotFireError, match=r"blocks\.2\.mixer"), model.hooks(bwd_hooks=late):
        model(tokens, stop_at_layer=2).sum().backward()
    with model.hooks(bwd_hooks=[("blocks.0.mixer.hook_write", lambda gradient, hook: fired.append(gradient))]):
        model(tokens, stop_at_layer=2).sum().backward()
    assert len(fired) == 1
    with model.hooks(late):
        pass
    with model.hooks(bwd_hooks=late):
        model(tokens)
    assert not any(point.fwd_hooks or point.bwd_hooks for point in model.hook_dict.values())
