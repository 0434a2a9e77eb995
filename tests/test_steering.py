"""Steering as a scoped value: exact against edits by hand, in prefill and generation, and gone after its block."""

from typing import Any

import pytest
import torch
from sae_lens.saes.sae import SAEMetadata
from torch import Tensor

from hookpoints import UnknownHookError, UnsupportedModelError, WriteEdit
from sae_lens_writesae import LowRank, scale_atoms, steer
from sae_lens_writesae.sae import WriteTopKSAE, WriteTopKSAEConfig
from sae_lens_writesae.steering import token_id, value_direction

LAYER, HEAD, K, V = 1, 2, 8, 6


@pytest.fixture
def model(model64: Any) -> Any:
    return model64


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(1, 64, (1, 11), generator=torch.Generator().manual_seed(3))


def make_sae(target: str = "write", d_sae: int = 12, k: int = 3, rank: int = 1) -> Any:
    torch.manual_seed(0)
    hook = f"blocks.{LAYER}.mixer.heads.{HEAD}.hook_{target}_vec"
    sae = WriteTopKSAE(
        WriteTopKSAEConfig(d_in=K * V, d_sae=d_sae, k=k, d_k=K, rank=rank, metadata=SAEMetadata(hook_name=hook))
    )
    return sae.double()


def run(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(tokens)


@torch.no_grad()
def edited(model: Any, tokens: Tensor, edits: list[WriteEdit]) -> tuple[Tensor, int]:
    """Logits [1,T-start,vocab] of a run with edits, and start."""
    found = model.run_with_edits(tokens, [edits])
    return found.logits, found.start


def test_strength_zero_and_a_closed_block_leave_no_trace(model: Any, ids: Tensor) -> None:
    native = run(model, ids)
    one = steer(model, LAYER, HEAD, toward=5, strength=0)
    assert one.hooks == []
    with one:
        assert torch.equal(run(model, ids), native)
    with pytest.raises(RuntimeError, match="stop"), steer(model, LAYER, HEAD, toward=5, strength=3):
        assert not torch.equal(run(model, ids), native)
        raise RuntimeError("stop")
    assert torch.equal(run(model, ids), native)
    assert not any(point._forward_hooks for point in model.hook_dict.values())


@pytest.mark.parametrize("at", ["every", (2, 7)])
@pytest.mark.parametrize("strength", [2.0, -0.7])
def test_toward_a_token_writes_the_key_of_the_token_and_the_value_of_the_target(
    model: Any, ids: Tensor, at: Any, strength: float
) -> None:
    w = value_direction(model, LAYER, HEAD, 5)
    torch.testing.assert_close(w, torch.nn.functional.normalize(model.layer_W_O(LAYER)[HEAD] @ model.W_U[:, 5], dim=0))
    r = model.recurrence(ids, LAYER)
    positions = range(ids.shape[1]) if at == "every" else at
    by_hand = []
    for t in positions:
        k, u = r.k[0, t, HEAD].detach(), r.u[0, t, HEAD].detach()
        by_hand.append(WriteEdit(LAYER, HEAD, t, k, strength * u.norm() * w))
    expected, start = edited(model, ids, by_hand)
    one = steer(model, LAYER, HEAD, toward=5, strength=strength, at=at)
    with one:
        live = run(model, ids)
    torch.testing.assert_close(live[:, start:], expected, atol=1e-10, rtol=0)
    assert (live - run(model, ids)).abs().max() > 1e-4


@pytest.mark.parametrize("at", ["every", (0, 4), "fires"])
@pytest.mark.parametrize("rank", [1, 2])
def test_an_atom_is_written_at_the_norm_asked_for(model: Any, ids: Tensor, at: Any, rank: int) -> None:
    sae = make_sae(rank=rank)
    writes = model.recurrence(ids, LAYER).write(HEAD)[0, :, 0].detach()
    firing = (sae.encode(writes.flatten(1))[:, 4] > 0).nonzero()[:, 0].tolist()
    assert 0 < len(firing) < ids.shape[1]
    dense = (sae.v[4].mT @ sae.w[4]).detach()
    positions: Any = firing if at == "fires" else range(ids.shape[1]) if at == "every" else at
    sizes = 1.5 * writes.norm(dim=(1, 2)) / dense.norm()
    expected = [WriteEdit(LAYER, HEAD, t, sae.v[4], sizes[t] * sae.w[4]) for t in positions]
    with steer(model, sae=sae, atom=4, strength=1.5, at=at):
        live = run(model, ids)
    by_hand, start = edited(model, ids, expected)
    torch.testing.assert_close(live[:, start:], by_hand.detach(), atol=1e-5, rtol=0)  # atoms_of gives float32


def test_a_token_may_be_written_only_where_an_atom_fires(model: Any, ids: Tensor) -> None:
    sae = make_sae()
    writes = model.recurrence(ids, LAYER).write(HEAD)[0, :, 0].detach()
    positions = (sae.encode(writes.flatten(1))[:, 4] > 0).nonzero()[:, 0].tolist()
    assert 0 < len(positions) < ids.shape[1]
    with steer(model, toward=[5, 9], sae=sae, atom=4, strength=2, at="fires"):
        live = run(model, ids)
    with steer(model, LAYER, HEAD, toward=[5, 9], strength=2, at=positions):
        torch.testing.assert_close(run(model, ids), live, atol=1e-12, rtol=0)


def test_generation_is_steered_as_prefill_is(model: Any, ids: Tensor) -> None:
    """Greedy continuation under steering = argmax of steered full passes; positions are absolute in generation."""
    places: list[Any] = ["every", (3, 12, 13)]
    for at in places:
        with steer(model, LAYER, HEAD, toward=5, strength=4, at=at):
            out = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
            logits = run(model, out[:, :14])
        assert torch.equal(logits[0, 10:].argmax(-1), out[0, 11:15])


def test_scopes_nest_and_add_up(model: Any, ids: Tensor) -> None:
    one = steer(model, LAYER, HEAD, toward=5)
    with one, one:
        twice = run(model, ids)
    r, w = model.recurrence(ids, LAYER), value_direction(model, LAYER, HEAD, 5)
    u = r.u[0, :, HEAD].detach()
    once = u + u.norm(dim=-1, keepdim=True) * w
    added = once + once.norm(dim=-1, keepdim=True) * w - u  # the second sees the first's write, and adds in its norm
    edits = [WriteEdit(LAYER, HEAD, t, r.k[0, t, HEAD].detach(), added[t]) for t in range(11)]
    torch.testing.assert_close(twice, edited(model, ids, edits)[0], atol=1e-10, rtol=0)


def test_suppressing_the_exact_write_is_deleting_it(model: Any, ids: Tensor) -> None:
    """One atom equal to the write at t: factor 0 takes the projection on it away, factor 1 is bit-identical."""
    t = 6
    r = model.recurrence(ids, LAYER)
    sae = make_sae(d_sae=1, k=1)
    with torch.no_grad():
        key, value = r.k[0, t, HEAD], r.u[0, t, HEAD]
        size = key.norm() * value.norm()
        sae.v[:], sae.w[:] = key / key.norm(), value / value.norm()
        sae.v_enc[:], sae.w_enc[:] = sae.v, sae.w
        sae.b_enc[:], sae.b_dec[:] = 0, 0
    fires = sae.encode(r.write(HEAD)[0, :, 0].flatten(1))[:, 0]
    torch.testing.assert_close(fires[t], size, atol=1e-12, rtol=0)
    native = run(model, ids)
    with scale_atoms(model, sae, [0], 1.0):
        assert torch.equal(run(model, ids), native)

    with scale_atoms(model, sae, [0], 0.0):
        everywhere = run(model, ids)
    by_hand = [WriteEdit(LAYER, HEAD, s, -fires[s] * sae.v[0], sae.w[0]) for s in fires.nonzero()[:, 0].tolist()]
    expected, start = edited(model, ids, by_hand)
    torch.testing.assert_close(everywhere[:, start:], expected, atol=1e-6, rtol=0)


def test_states_are_scaled_at_the_last_token_of_a_pass_as_a_write_would_be(model: Any, ids: Tensor) -> None:
    sae = make_sae("state")
    state = model.recurrence(ids, LAYER).states(HEAD, -1)[0, 0, 0].detach()
    activations = sae.encode(state.flatten()[None])[0]
    atom = int(activations.argmax())
    with scale_atoms(model, sae, [atom], 4.0):
        live = run(model, ids)
    edit = WriteEdit(LAYER, HEAD, 10, 3 * activations[atom] * sae.v[atom], sae.w[atom])
    torch.testing.assert_close(live[:, 10:], edited(model, ids, [edit])[0].detach(), atol=1e-6, rtol=0)


def test_a_control_takes_the_place_of_the_atoms(model: Any, ids: Tensor) -> None:
    sae = make_sae()
    like = LowRank.rank_one(torch.ones(1, K), torch.ones(1, V))
    write = model.recurrence(ids, LAYER).write(HEAD)[:, :, 0].flatten(2).detach()
    scale: Any = scale_atoms(model, sae, [4], 3.0, like=like).hooks[0][1]
    torch.testing.assert_close(scale(write, None) - write, 2 * sae.encode(write)[..., 4:5] * torch.ones(1, K * V))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layer": 1, "head": 2}, "direction"),
        ({"toward": 5}, "layer"),
        ({"layer": 1, "head": 2, "toward": 64}, "got 64"),
        ({"layer": 1, "head": 2, "toward": 5, "at": "always"}, "always"),
        ({"layer": 1, "head": 2, "toward": 5, "at": (-1,)}, "-1"),
        ({"layer": 1, "head": 2, "toward": 5, "at": "fires"}, "at="),
        ({"sae": "write"}, "direction"),
        ({"sae": "write", "atom": 1, "head": 1}, "layer, head"),
        ({"sae": "write", "atom": 1, "toward": 5}, "'every'"),
        ({"sae": "state", "atom": 1, "at": "fires"}, "states"),
    ],
)
def test_bad_input_is_named(model: Any, arguments: dict[str, Any], message: str) -> None:
    if "sae" in arguments:
        arguments = arguments | {"sae": make_sae(arguments["sae"])}
    with pytest.raises(ValueError, match=message):
        steer(model, **arguments)


def test_what_the_model_or_the_dictionary_lacks_is_named(model: Any) -> None:
    with pytest.raises(UnsupportedModelError):  # an attention layer has no writes
        steer(model, 3, 0, toward=5)
    with pytest.raises(UnknownHookError, match="head 9"):
        steer(model, 1, 9, toward=5)
    with pytest.raises(IndexError):
        steer(model, sae=make_sae(), atom=12)


def test_strings_of_several_tokens_are_taken_apart(embedded: Any) -> None:
    assert token_id(embedded, " the") == embedded.to_single_token(" the")
    with pytest.raises(ValueError, match="2 tokens"):
        steer(embedded, 2, 0, toward=" the war")
