"""States in chunks: rows, scores, losses and gradients are those of the dense step, for every rule that has states."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from saes import train_step
from test_fast import assert_same_step
from tiny_models import MAKERS, make_hf
from torch import Tensor, nn

from hookpoints import HookedRecurrent
from hookpoints.recurrence.canonical import tensors
from sae_lens_writesae.sae import chunks, fast, fused
from sae_lens_writesae.sae.chunks import StateStack, step_on_states
from sae_lens_writesae.sae.collecting import collect
from sae_lens_writesae.sae.rows import Batches, new_sae, row_orders, train_on_rows
from sae_lens_writesae.sae.runner import train, training_config

T, BATCH, F = 23, 24, 60
CLOSE: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-10}
FAMILIES = [name for name in ("qwen3_5", "mamba2", "kimi_linear", "rwkv7") if name in MAKERS]
CHANGES: list[dict[str, Any]] = [
    {},
    {"k": 1},
    {"rank": 2},
    {"apply_b_dec_to_input": False},
    {"rescale_acts_by_decoder_norm": False, "unit_norm_every": 0},
    {"architecture": "writesae_batchtopk", "k": 2.5},
]


@pytest.fixture(scope="module")
def collections(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A head of each family on seven sequences, whose tokens are three chunks of 8."""
    ids = torch.randint(1, 64, (7, T), generator=torch.Generator().manual_seed(0))
    found = {}
    for family in FAMILIES:
        model = HookedRecurrent.from_hf(make_hf(family))
        layer = model.cfg.recurrent_layers[-1]
        found[family] = collect(model, ids, [layer], [0], tmp_path_factory.mktemp(family), targets=("state",))
        model.attachment.detach()
    return found


@pytest.fixture(scope="module")
def real_size(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A head of 128 x 128 on four sequences, whose tokens are two chunks of 64."""
    model = HookedRecurrent.from_hf(make_hf(linear_key_head_dim=128, linear_value_head_dim=128))
    ids = torch.randint(1, 64, (4, 128), generator=torch.Generator().manual_seed(0))
    layer = model.cfg.recurrent_layers[-1]
    return collect(model, ids, [layer], [0], tmp_path_factory.mktemp("real_size"), targets=("state",))


def test_tokens_of_a_unit_are_far_apart() -> None:
    """The last one fills up; neighbors are near copies of each other."""
    assert chunks._unit_tokens(torch.arange(10), 4).tolist() == [[0, 3, 6, 9], [1, 4, 7, 9], [2, 5, 8, 9]]


@pytest.fixture(autouse=True)
def small(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of few tokens and states of few entries, except in tests of real sizes."""
    if "real_size" in request.fixturenames:
        return
    monkeypatch.setattr(chunks, "SPAN", 8)
    monkeypatch.setattr(chunks, "TOKENS_APART", 2)
    monkeypatch.setattr(fast, "STATES_FROM", 1)


def config(collection: Any, **changes: Any) -> Any:
    """For its head; what a runner config has, and the rest for the SAE."""
    runner = {"target": "state", "d_sae": F, "train_batch_size_tokens": BATCH, "training_tokens": 6 * BATCH}
    runner |= {"dead_feature_window": 1, "lr": 1e-2, "verbose": False}
    runner |= {name: changes.pop(name) for name in ("architecture", "seqpos_slice", "seed", *runner) if name in changes}
    return training_config(collection, next(iter(collection.heads)), 0, sae={"k": 3} | changes, **runner)


def rows_of(collection: Any) -> Tensor:
    """The states of its head [S,T,K,V], token by token in float64."""
    r = collection.recurrence(next(iter(collection.heads)), 0)
    wide = {name: x.double() for name, x in tensors(r) if r.beta is None or name != "a"}
    return r.replace(**wide).states(method="reference")[:, :, 0]


@pytest.mark.parametrize("positions", [slice(None), slice(5, None), slice(-1, None)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_units_are_the_rows_of_the_recurrence(collections: Any, family: str, positions: slice) -> None:
    collection = collections[family]
    cfg, rows = config(collection, dtype="float64", seqpos_slice=(positions.start, positions.stop)), rows_of(collection)
    source = StateStack(cfg, collection)
    found = source.rows(0, torch.arange(len(source.writes[0]))).dense()
    wanted = rows[:, positions].flatten(0, 1)
    assert BATCH % source.together == 0 and len(found) == len(source.writes[0]) * source.together
    near = (found.flatten(1)[:, None] - wanted.flatten(1)).abs().amax(-1) < 1e-10 * wanted.abs().max()
    assert near.any(1).all() and near.any(0).all()
    source.scales = [3.0]
    torch.testing.assert_close(source.rows(0, torch.arange(len(source.writes[0]))).dense(), 3 * found, **CLOSE)


@pytest.mark.parametrize("changes", CHANGES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradients_are_those_of_the_dense_step(
    collections: Any, family: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "STATE_BLOCK", 2000)
    cfg = config(collections[family], dtype="float64", **changes)
    source = StateStack(cfg, collections[family])
    sae: Any = new_sae(cfg)
    g = torch.Generator().manual_seed(1)
    rows = source.rows(0, torch.randperm(len(source.writes[0]), generator=g)[: BATCH // source.together])
    for parameter in sae.parameters():
        parameter.data = torch.randn(parameter.shape, generator=g, dtype=parameter.dtype)
    x, dead = rows.dense().flatten(1), torch.arange(F) % 3 < (1 if changes.get("k") == 1 else 2)  # K V / 2 is between
    sae.b_dec.data *= x.std()
    p: dict[str, Any] = {name: nn.Parameter(x.data.clone()[None]) for name, x in sae.named_parameters()}
    done: Any = step_on_states(p, rows, sae.cfg, fused.Dead(dead[None], int(dead.sum())))
    assert_same_step(done, p, [sae], [train_step(sae, x, 1, dead)], 1e-10)


def test_a_batch_has_its_number_of_active_atoms_where_scores_tie(collections: Any) -> None:
    """Atoms come in equal pairs, and an odd number of them is active."""
    cfg = config(collections["qwen3_5"], dtype="float64", architecture="writesae_batchtopk", k=57 / BATCH)
    source, sae = StateStack(cfg, collections["qwen3_5"]), new_sae(cfg)
    with torch.no_grad():
        for side in (sae.v, sae.w, sae.v_enc, sae.w_enc):
            side[F // 2 :] = side[: F // 2]
    rows = source.rows(0, torch.arange(BATCH // source.together))
    p: dict[str, Any] = {name: nn.Parameter(x.data.clone()[None]) for name, x in sae.named_parameters()}
    done: Any = step_on_states(p, rows, cast(Any, sae.cfg))
    assert int((done.code > 0).sum()) == 57 == int((sae.encode(rows.dense().flatten(1)) > 0).sum())


@pytest.mark.parametrize("changes", [{}, {"architecture": "writesae_batchtopk", "k": 2.5}], ids=str)
def test_a_run_is_the_one_of_saelens_trainer(collections: Any, changes: dict[str, Any]) -> None:
    same_run(collections["qwen3_5"], changes)


def test_a_run_at_128_x_128_is_the_one_of_saelens_trainer(real_size: Any) -> None:
    stack = same_run(real_size, {})
    assert (stack.span, stack.together, stack.cfg.d_in) == (64, 4, 128 * 128)


def same_run(collection: Any, changes: dict[str, Any]) -> StateStack:
    """On the same rows from the same start; what is drawn, and the output bias, come from elsewhere."""
    upkeep = {"b_dec_rows": 0, "unit_norm_every": 3, "resample_every": 0, "decoder_init": "random"}
    cfg = config(collection, dtype="float64", **upkeep | changes)
    assert fast.shape_of(cfg) is not None
    sae, source = train(cfg), StateStack(cfg, collection)
    order = row_orders(len(source.writes[0]), BATCH // source.together, cfg.seed)

    class Dense(Batches):
        n_rows, inputs = 0, None

        def __next__(self) -> Tensor:
            return source.rows(0, next(order)).dense().flatten(1)

        state = resume = cast(Any, None)

    matrices = train_on_rows(cfg, Dense())
    names = {*dict(sae.named_parameters()), "topk_threshold"} & sae.state_dict().keys()
    for name in names:
        torch.testing.assert_close(sae.state_dict()[name], matrices.state_dict()[name], rtol=1e-7, atol=1e-9)
    return source


def test_inputs_are_scaled_to_their_mean_norm(collections: Any) -> None:
    cfg = config(collections["mamba2"], dtype="float64", normalize_activations="expected_average_only_in")
    stack = StateStack(cfg, collections["mamba2"])
    norms = stack.rows(0, torch.arange(len(stack.writes[0]))).dense().flatten(1).norm(dim=1)
    assert norms.mean() == pytest.approx(cfg.sae.d_in**0.5)
    assert train(cfg).cfg.normalize_activations == "none"


def test_small_states_are_trained_on_matrices(collections: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = config(collections["qwen3_5"])
    for least, in_chunks in ((cfg.sae.d_in, True), (cfg.sae.d_in + 1, False)):
        monkeypatch.setattr(fast, "STATES_FROM", least)
        assert (fast.shape_of(cfg) is not None) == in_chunks
    assert fast.shape_of(config(collections["qwen3_5"], encoder="tied")) is None
