"""Steering as a scoped value: exact against edits by hand, in prefill and generation, and gone after its block."""

from typing import Any

import pytest
import torch
from saes import HEAD, HOOK, LAYER, K, V, make_sae, one_atom_a_position, tied_sae
from torch import Tensor

from hookpoints import UnknownHookError, WriteEdit
from sae_lens_writesae import LowRank, scale_atoms, steer
from sae_lens_writesae.steering import token_id, value_direction

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(1, 64, (1, 11), generator=torch.Generator().manual_seed(3))


def sae_of_head(model: Any, target: str = "write", rank: int = 1) -> Any:
    return make_sae(model, rank=rank, d_sae=12, hook=HOOK.replace("write", target)).double()


def edited(model: Any, tokens: Tensor, edits: list[WriteEdit]) -> tuple[Tensor, int]:
    """Logits [1,T-start,vocab] of a run with edits, and start."""
    run = model.run_with_edits(tokens, [edits])
    return run.logits, run.start


def firing(model: Any, tokens: Tensor, sae: Any) -> list[int]:
    """Where atom 4 fires: somewhere, and not everywhere."""
    writes = model.recurrence(tokens, LAYER).write(HEAD)[0, :, 0].flatten(1)
    tokens_of_atom = (sae.encode(writes)[:, 4] > 0).nonzero()[:, 0].tolist()
    assert 0 < len(tokens_of_atom) < tokens.shape[1]
    return tokens_of_atom


def test_strength_zero_and_a_closed_block_leave_no_trace(model64: Any, ids: Tensor) -> None:
    native = model64(ids)
    one = steer(model64, LAYER, HEAD, toward=5, strength=0)
    assert one.hooks == []
    with one:
        assert torch.equal(model64(ids), native)
    with pytest.raises(RuntimeError, match="stop"), steer(model64, LAYER, HEAD, toward=5, strength=3):
        assert not torch.equal(model64(ids), native)
        raise RuntimeError("stop")
    assert torch.equal(model64(ids), native)
    assert not any(point._forward_hooks for point in model64.hook_dict.values())


@pytest.mark.parametrize("strength", [2.0, -0.7])
def test_toward_a_token_writes_the_key_of_the_token_and_the_value_of_the_target(
    model64: Any, ids: Tensor, strength: float
) -> None:
    w = value_direction(model64, LAYER, HEAD, 5)
    torch.testing.assert_close(
        w, torch.nn.functional.normalize(model64.layer_W_O(LAYER)[HEAD] @ model64.W_U[:, 5], dim=0)
    )
    r = model64.recurrence(ids, LAYER)
    k, u = r.k[0, :, HEAD], r.u[0, :, HEAD]
    by_hand = [WriteEdit(LAYER, HEAD, t, k[t], strength * u[t].norm() * w) for t in range(ids.shape[1])]
    expected, start = edited(model64, ids, by_hand)
    one = steer(model64, LAYER, HEAD, toward=5, strength=strength)
    with one:
        live = model64(ids)
    torch.testing.assert_close(live[:, start:], expected, atol=1e-10, rtol=0)
    assert (live - model64(ids)).abs().max() > 1e-4
    with steer(model64, LAYER, HEAD, toward=3 * w, strength=strength):  # a direction has no size
        torch.testing.assert_close(model64(ids), live, atol=1e-10, rtol=0)


@pytest.mark.parametrize(("at", "rank"), [("every", 1), ("fires", 2)])
def test_an_atom_is_written_at_the_norm_asked_for(model64: Any, ids: Tensor, at: Any, rank: int) -> None:
    sae = sae_of_head(model64, rank=rank)
    writes = model64.recurrence(ids, LAYER).write(HEAD)[0, :, 0]
    dense = sae.v[4].mT @ sae.w[4]
    positions: Any = firing(model64, ids, sae) if at == "fires" else range(ids.shape[1])
    sizes = 1.5 * writes.norm(dim=(1, 2)) / dense.norm()
    expected = [WriteEdit(LAYER, HEAD, t, sae.v[4], sizes[t] * sae.w[4]) for t in positions]
    with steer(model64, sae=sae, atom=4, strength=1.5, at=at):
        live = model64(ids)
    by_hand, start = edited(model64, ids, expected)
    torch.testing.assert_close(live[:, start:], by_hand, atol=1e-5, rtol=0)  # decoder_atoms gives float32


def test_a_token_may_be_written_only_where_an_atom_fires(model64: Any, ids: Tensor) -> None:
    sae = sae_of_head(model64)
    r = model64.recurrence(ids, LAYER)
    k, u = r.k[0, :, HEAD], r.u[0, :, HEAD]
    w = value_direction(model64, LAYER, HEAD, 5) + value_direction(model64, LAYER, HEAD, 9)
    edits = [WriteEdit(LAYER, HEAD, t, k[t], 2 * u[t].norm() * w / w.norm()) for t in firing(model64, ids, sae)]
    with steer(model64, toward=[5, 9], sae=sae, atom=4, strength=2, at="fires"):
        live = model64(ids)
    expected, start = edited(model64, ids, edits)
    torch.testing.assert_close(live[:, start:], expected, atol=1e-10, rtol=0)


def test_generation_is_steered_as_prefill_is(model64: Any, ids: Tensor) -> None:
    """Greedy continuation under steering = argmax of steered full passes."""
    with steer(model64, LAYER, HEAD, toward=5, strength=4):
        out = model64.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
        logits = model64(out[:, :14])
    assert torch.equal(logits[0, 10:].argmax(-1), out[0, 11:15])


def test_an_inner_scope_acts_on_what_the_outer_one_left(model64: Any, ids: Tensor) -> None:
    name, sae, seen = HOOK.removesuffix("_vec"), sae_of_head(model64), []
    with steer(model64, sae=sae, atom=4), model64.hooks([(name, lambda x, hook: seen.append(x.clone()))]):
        model64(ids)
    assert not torch.allclose(seen[0][0], model64.recurrence(ids, LAYER).write(HEAD)[0, :, 0])


def test_of_a_scope_that_is_open_twice_the_inner_one_ends_first(model64: Any, ids: Tensor) -> None:
    one, other = (steer(model64, LAYER, HEAD, toward=token) for token in (5, 6))
    with one, other:
        expected = model64(ids)
    with one, other:
        with one:
            pass
        torch.testing.assert_close(model64(ids), expected, atol=0, rtol=0)


def test_suppressing_the_exact_write_is_deleting_it(model64: Any, ids: Tensor) -> None:
    """An atom that is the write at t, and fires there alone; factor 1 is bit-identical."""
    sae = one_atom_a_position(model64, ids)
    with scale_atoms(model64, sae, [6], 1.0):
        assert torch.equal(model64(ids), model64.hf_model(ids).logits)
    with scale_atoms(model64, sae, [6], 0.0):
        live = model64(ids)
    expected, start = edited(model64, ids, [WriteEdit(LAYER, HEAD, 6, mode="delete")])
    torch.testing.assert_close(live[:, start:], expected, atol=1e-6, rtol=0)
    assert (live - model64(ids)).abs().max() > 1e-4


def test_states_are_scaled_at_the_last_token_of_a_pass_as_a_write_would_be(model64: Any, ids: Tensor) -> None:
    sae = sae_of_head(model64, "state")
    state = model64.recurrence(ids, LAYER).states(HEAD, -1)[0, 0, 0]
    activations = sae.encode(state.flatten()[None])[0]
    atom = int(activations.argmax())
    with scale_atoms(model64, sae, [atom], 4.0):
        live = model64(ids)
    edit = WriteEdit(LAYER, HEAD, 10, 3 * activations[atom] * sae.v[atom], sae.w[atom])
    torch.testing.assert_close(live[:, 10:], edited(model64, ids, [edit])[0], atol=1e-6, rtol=0)


def test_a_control_takes_the_place_of_the_atoms(model64: Any, ids: Tensor) -> None:
    sae = sae_of_head(model64)
    like = LowRank.rank_one(torch.ones(1, K), torch.ones(1, V))
    write = model64.recurrence(ids, LAYER).write(HEAD)[:, :, 0].flatten(2)
    scale: Any = scale_atoms(model64, sae, [4], 3.0, like=like).hooks[0][1]
    torch.testing.assert_close(scale(write, None) - write, 2 * sae.encode(write)[..., 4:5] * torch.ones(1, K * V))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"layer": 1, "head": 2}, ValueError, "direction"),
        ({"layer": 1, "head": 2, "toward": 64}, ValueError, "got 64"),
        ({"layer": 1, "head": 2, "toward": 5, "at": (3,)}, ValueError, r"at=\(3,\)"),
        ({"layer": 1, "head": 2, "toward": 5, "at": "fires"}, ValueError, "at="),
        ({"sae": "write", "atom": 1, "head": 1}, ValueError, "layer, head"),
        ({"sae": "write", "atom": 1, "toward": 5}, ValueError, "'every'"),
        ({"sae": "state", "atom": 1, "at": "fires"}, ValueError, "states"),
        ({"layer": 1, "head": 9, "toward": 5}, UnknownHookError, "head 9"),
        ({"sae": "other", "atom": 1}, ValueError, "sae=: d_k, d_v, d_in"),  # of a head of other sizes
    ],
)
def test_bad_input_is_named(model64: Any, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    if arguments.get("sae") == "other":
        arguments = arguments | {"sae": tied_sae(torch.ones(12, 3), torch.ones(12, 4), k=1).double()}
    elif "sae" in arguments:
        arguments = arguments | {"sae": sae_of_head(model64, arguments["sae"])}
    with pytest.raises(error, match=message):
        steer(model64, **arguments)


def test_strings_of_several_tokens_are_taken_apart(embedded: Any) -> None:
    assert token_id(embedded, " the") == embedded.to_single_token(" the")
    with pytest.raises(ValueError, match="2 tokens"):
        steer(embedded, 2, 0, toward=" the war")
