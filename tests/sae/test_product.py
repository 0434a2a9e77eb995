"""Products of key atoms and value atoms: what they are as an autoencoder of pairs, how they are trained, and what they
find in writes whose keys and values are drawn from two small sets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE
from saes import normal, runner_config, train_step
from test_metric import made_up
from torch import Tensor
from torch.nn.functional import normalize
from torch.testing import assert_close

from sae_lens_writesae import load_sae, train
from sae_lens_writesae.atom.low_rank import LowRank
from sae_lens_writesae.sae import (
    WriteProductSAE,
    WriteProductSAEConfig,
    WriteProductTrainingSAE,
    WriteProductTrainingSAEConfig,
)
from sae_lens_writesae.sae.pairs import PairSumsSAE
from sae_lens_writesae.sae.product import distinct_rows
from sae_lens_writesae.sae.sides import SidesSAE, _oriented_writes, rank_one_rows
from writesae.dictionary.traits import matched_flat, n_parameters

K, V, N = 5, 7, 13
SHAPE: dict[str, Any] = {"d_in": K * V, "d_k": K, "d_v": V, "d_sae": 24, "f_key": 4, "f_value": 6, "dtype": "float64"}
SIDES: list[dict[str, Any]] = [{"k_key": i, "k_value": j} for i, j in ((1, 1), (2, 3), (4, 6))]
"""Numbers of active key atoms and value atoms."""
PURSUIT: dict[str, Any] = {"encoder": "pursuit", "n_pairs": 3}


def build(bias: float = 0.2, **fields: Any) -> Any:
    """Random atoms, of any norm, and of products of sides another encoder."""
    torch.manual_seed(0)
    sae = WriteProductTrainingSAE(WriteProductTrainingSAEConfig(**SHAPE | {"resample_every": 0} | fields))
    for parameter in sae.parameters():
        parameter.data.copy_(0.6 * torch.randn_like(parameter))
    sae.b_dec.data.mul_(bias)
    return sae


def writes() -> LowRank:
    return LowRank(normal(N, 1, K), normal(N, 1, V, seed=2))


def by_hand(sae: Any, k: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of both sides and the loss of one write, step by step."""
    found = []
    for sign in (1, -1):
        left, right = sign * sae.key_encoder @ k, sign * sae.value_encoder @ u
        codes = []
        for pre, active in ((left, sae.cfg.k_key), (right, sae.cfg.k_value)):
            code = torch.zeros_like(pre)
            for atom in pre.argsort(descending=True)[:active]:
                code[atom] = max(pre[atom], torch.zeros_like(pre[atom]))
            codes.append(code)
        key_error = (sign * k - codes[0] @ sae.key_atoms).square().sum()
        value_error = (sign * u - codes[1] @ sae.value_atoms).square().sum()
        loss = u.square().sum() * key_error + k.square().sum() * value_error
        found.append(((codes[0].max() * codes[1].max()).item(), *codes, loss))
    return max(found, key=lambda each: each[0])[1:]


# ---------------------------------------------------------------------------------------- an autoencoder of pairs


@pytest.mark.parametrize("sides", SIDES, ids=str)
def test_codes_are_those_of_the_sides(sides: dict[str, int]) -> None:
    sae, rows = build(**sides), writes()
    acts = sae.encode(rows.dense().flatten(1))
    for n in range(N):
        key, value, _ = by_hand(sae, rows.keys[n, 0], rows.values[n, 0])
        assert_close(acts[n], torch.outer(key, value).flatten(), rtol=1e-10, atol=1e-10)
    assert (acts >= 0).all() and (acts > 0).sum(1).max() <= sae.cfg.k


@pytest.mark.parametrize("sides", SIDES, ids=str)
def test_every_form_of_a_write_has_one_code(sides: dict[str, int]) -> None:
    sae, rows = build(**sides), writes()
    acts = sae.encode(rows.dense().flatten(1))
    for scale in (1.0, -1.0, -0.3):
        key, value = sae.code(LowRank(rows.keys * scale, rows.values / scale))
        assert_close((key.acts[:, :, None] * value.acts[:, None]).flatten(1), acts, rtol=1e-10, atol=1e-10)
    assert_close(train_step(sae, rows).feature_acts, acts, rtol=1e-10, atol=1e-10)
    assert_close(sae.encode(3 * rows.dense().flatten(1)), 3 * acts, rtol=1e-10, atol=1e-10)
    assert_close(sae.encode(torch.zeros(2, 3, K * V).double()), torch.zeros(2, 3, 24).double())


@pytest.mark.parametrize("fields", [*SIDES, PURSUIT], ids=str)
def test_pairs_are_ordinary_atoms(fields: dict[str, Any]) -> None:
    sae, x = build(**fields), normal(2, N, K * V)  # of full rank
    acts, scores = sae.encode_with_hidden_pre(x)
    sides = sae.directions if fields == PURSUIT else (sae.key_atoms, sae.value_atoms)
    pairs = torch.einsum("ik,jv->ijkv", *sides).reshape(24, K * V)
    assert_close(sae.W_dec, pairs)
    assert_close(sae.atoms().dense().flatten(1), pairs.data)
    assert_close(sae.atoms([3, 20]).dense().flatten(1), pairs.data[[3, 20]])
    assert_close(sae.decode(acts), acts @ pairs + sae.b_dec)
    assert_close(sae.decoder_norm(), pairs.norm(dim=1))
    assert_close(scores, x @ sae.W_enc)
    cut = sae.run_with_hooks(x, fwd_hooks=[("hook_sae_acts_post", lambda a, hook: a * 0)])
    assert_close(cut, sae.b_dec.expand_as(cut))
    if fields != PURSUIT:
        assert_close(sae.encoder_norm(), sae.W_enc.norm(dim=0))
        assert_close(acts[acts > 0], scores[acts > 0])
    tied = 1 if fields == PURSUIT else 2
    assert sum(p.numel() for p in sae.parameters()) == n_parameters(sae) == tied * (4 * K + 6 * V) + K * V
    assert matched_flat(sae)[0] == tied


def test_no_side_is_active_where_no_pair_is() -> None:
    sae, rows = build(k_key=2, k_value=2), writes()
    with torch.no_grad():
        sae.value_encoder[:] = sae.value_encoder[0]  # so that a value has one sign on all of them
        sae.key_encoder[:] = sae.key_encoder[0]
    silent = ~(sae.encode(rows.dense().flatten(1)) > 0).any(1)
    key, value = sae.code(rows)
    assert 0 < silent.sum() < N
    for side in (key, value):
        assert torch.equal((side.acts > 0).any(1), ~silent)
    sizes = rows.keys.square().sum((1, 2)) * rows.values.square().sum((1, 2))
    errors = [(side.rows - side.reconstruction).square().sum(1) for side in (value, key)]
    for of_side, other in zip(errors, (key, value)):
        assert_close((of_side * other.rows.square().sum(1))[silent], sizes[silent])


def test_gradients() -> None:
    sae, rows = build(k_key=2, k_value=2), writes()
    expected = torch.stack([by_hand(sae, k[0], u[0])[2] for k, u in zip(rows.keys, rows.values)]).mean()
    assert_gradients(sae, rows, expected, ["key_atoms", "value_atoms", "key_encoder", "value_encoder"])
    assert sae.b_dec.grad is None


def assert_gradients(sae: Any, rows: Tensor | LowRank, expected: Tensor, names: list[str]) -> None:
    """Those of a loss by hand; and the matrices that a step gives, as a function of the input."""
    out = train_step(sae, rows)
    assert_close(out.loss, expected, rtol=1e-10, atol=1e-10)
    wanted = torch.autograd.grad(expected, [getattr(sae, name) for name in names])
    out.loss.backward()
    for name, grad in zip(names, wanted):
        assert_close(getattr(sae, name).grad, grad, rtol=1e-8, atol=1e-10)
    assert_close(out.sae_out, (sae.encode(out.sae_in) @ sae.W_dec + sae.b_dec).detach(), rtol=1e-10, atol=1e-10)
    assert torch.autograd.gradcheck(lambda y: sae.decode(sae.encode(y)), (out.sae_in.detach().requires_grad_(),))


# ---------------------------------------------------------------------------------------- configs and files


@pytest.mark.parametrize(
    ("encoder", "fields", "name"),
    [
        ("topk", {"d_sae": 23}, "d_sae"),
        ("topk", {"k_key": 5}, "k_key"),
        ("topk", {"k_value": 0}, "k_value"),
        ("topk", {"encoder": "tied"}, "encoder"),
        ("topk", {"decoder": "flat"}, "decoder"),
        ("topk", {"rank": 2}, "rank"),
        ("topk", {"apply_b_dec_to_input": True}, "apply_b_dec_to_input"),
        ("topk", {"loss": "write"}, "loss"),
        ("topk", {"b_dec_init": "mean"}, "b_dec_init"),
        ("topk", {"unit_norm_every": 100}, "unit_norm_every"),
        ("pursuit", {"n_pairs": 0}, "n_pairs"),
        ("pursuit", {"n_pairs": 25}, "n_pairs"),
        ("pursuit", {"stop": 0.0}, "stop"),
        ("pursuit", {"stop": 1.0}, "stop"),
        ("pursuit", {"normalize_activations": "expected_average_only_in"}, "normalize_activations"),
        ("pursuit", {"metric": "gauss_newton"}, "metric"),
    ],
)
def test_what_products_cannot_be_is_refused(encoder: str, fields: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: expected "):
        WriteProductTrainingSAEConfig(**SHAPE | {"encoder": encoder} | fields)


def test_numbers_of_sides_follow_from_each_other() -> None:
    shape: dict[str, Any] = {"d_in": K * V, "d_k": K}
    for given, sides in (
        ({"d_sae": 36}, (6, 6)),
        ({"d_sae": 24, "f_key": 3}, (3, 8)),
        ({"d_sae": 6, "f_value": 3}, (2, 3)),
        ({"d_sae": 6, "f_value": 6}, (1, 6)),
        ({"d_sae": 6, "f_key": 6}, (6, 1)),
    ):
        fields: dict[str, Any] = shape | given
        cfg = WriteProductSAEConfig(**fields)
        assert (cfg.f_key, cfg.f_value, cfg.k) == (*sides, 1)


@pytest.mark.parametrize(("fields", "kind"), [(SIDES[1], SidesSAE), (PURSUIT, PairSumsSAE)], ids=["sides", "pursuit"])
def test_an_export_has_the_class_of_its_encoder(fields: dict[str, Any], kind: type, tmp_path: Path) -> None:
    sae, x = build(**fields), normal(N, K * V)
    sae.save_inference_model(tmp_path / "export")
    for loaded in (SAE.load_from_disk(tmp_path / "export"), load_sae(tmp_path / "export")):
        assert type(loaded) is kind and isinstance(loaded, WriteProductSAE)
        assert_close(loaded.encode(x), sae.encode(x))
        assert_close(loaded(x), sae(x))
        assert (loaded.cfg.f_key, loaded.cfg.f_value, loaded.cfg.k) == (4, 6, sae.cfg.k)


@pytest.mark.parametrize("fields", [SIDES[1], PURSUIT], ids=["sides", "pursuit"])
def test_norms_of_pairs_are_not_folded(fields: dict[str, Any]) -> None:
    sae = build(**fields)
    with pytest.raises(NotImplementedError):
        sae.fold_W_dec_norm()
    if fields == PURSUIT:
        with pytest.raises(NotImplementedError):
            sae.fold_activation_norm_scaling_factor(2.0)


def test_folds() -> None:
    sae, x = build(k_key=2, k_value=2), normal(N, K * V)
    acts, out = sae.encode(x), sae(x)
    folded = made_up(K, V).fold(sae)
    moved = made_up(K, V).apply_rows
    assert_close(folded.encode(x), sae.encode(moved(x)), rtol=1e-9, atol=1e-9)
    assert_close(moved(folded(x)), sae(moved(x)), rtol=1e-9, atol=1e-9)
    sae.fold_activation_norm_scaling_factor(3.0)
    assert_close(sae.encode(x / 3), acts, rtol=1e-10, atol=1e-10)
    assert_close(3 * sae(x / 3), out, rtol=1e-10, atol=1e-10)


# ---------------------------------------------------------------------------------------- training


def test_rows_of_a_higher_rank_are_refused() -> None:
    x = writes().dense().flatten(1)
    assert_close(rank_one_rows(build().cfg, x).dense().flatten(1), x, rtol=1e-10, atol=1e-10)
    assert not rank_one_rows(build().cfg, torch.zeros(2, K * V)).dense().any()
    mixed = torch.cat([writes().dense(), normal(1, K, V)]).flatten(1)
    with pytest.raises(ValueError, match="rank"):
        train_step(build(), mixed)
    assert train_step(build(), mixed[:-1].half().double()).loss.isfinite()
    with pytest.raises(ValueError, match="sae_in"):
        train_step(build(), mixed * torch.nan)


def world(n: int = 3000, n_keys: int = 6, n_values: int = 9) -> tuple[Tensor, Tensor, LowRank]:
    """Keys and values drawn independently from small sets, in an orientation that is drawn too."""
    g = torch.Generator().manual_seed(3)
    keys, values = (normalize(torch.randn(m, d, generator=g), dim=1) for m, d in ((n_keys, 8), (n_values, 10)))
    which = torch.randint(n_keys, (n,), generator=g), torch.randint(n_values, (n,), generator=g)
    sign = torch.randn(n, 1, generator=g).sign()
    size = 1 + torch.rand(n, 1, generator=g)
    return keys, values, LowRank.rank_one(sign * keys[which[0]], sign * size * values[which[1]])


def config(start: str, seed: int = 0, steps: int = 300, batch: int = 128, **fields: Any) -> Any:
    shape = {"d_in": 80, "d_k": 8, "d_v": 10, "d_sae": 160, "f_key": 8, "f_value": 20, "decoder_init": start}
    cfg = WriteProductTrainingSAEConfig(**shape | fields)
    return runner_config(cfg, steps, batch, seed=seed, dead_feature_window=40)


@pytest.mark.parametrize("start", ["random", "native"])
def test_both_sides_of_a_planted_world_are_found(start: str) -> None:
    keys, values, rows = world()
    sae: Any = train(config(start, resample_every=25), rows)
    found_keys, found_values = (normalize(side.detach(), dim=1) for side in (sae.key_atoms, sae.value_atoms))
    assert (keys @ found_keys.T).abs().amax(1).min() > 0.99
    assert (values @ found_values.T).abs().amax(1).min() > 0.99
    x = rows.dense().flatten(1)
    assert (sae(x) - x).square().sum() < 0.01 * x.square().sum()


@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.nightly) for n in (1, 2))])
def test_as_many_atoms_as_keys_and_values_find_all_of_them(seed: int) -> None:
    """Where a batch does not hold each of them."""
    g = torch.Generator().manual_seed(seed)
    planted = [normalize(torch.randn(24, 16, generator=g), dim=1) for _ in range(2)]
    keys, values = (side[torch.randint(24, (4000,), generator=g)] for side in planted)
    keys, values = (side + 0.05 * torch.randn(side.shape, generator=g) for side in (keys, values))
    sign = torch.randn(4000, 1, generator=g).sign()
    shape = {"d_in": 256, "d_k": 16, "d_v": 16, "d_sae": 24 * 24, "f_key": 24, "f_value": 24}
    cfg = config("native", seed, 150, 64, **shape)
    sae: Any = train(cfg, LowRank.rank_one(sign * keys, sign * values))
    for side, atoms in zip(planted, (sae.key_atoms, sae.value_atoms)):
        cosines = side @ normalize(atoms.detach(), dim=1).T
        assert (cosines.abs().amax(1) > 0.95).all()


def test_of_directions_near_to_each_other_the_first_is_distinct() -> None:
    a, b, c = torch.eye(3)
    rows = torch.stack([a, 2 * a, b, a, -b, c])
    assert_close(distinct_rows(rows, either_sign=False), torch.stack([a, b, -b, c]))
    assert_close(distinct_rows(rows, either_sign=True), torch.stack([a, b, c]))


def test_rows_in_either_sign_are_brought_into_one_orientation() -> None:
    keys, values, rows = world(256)
    moved = _oriented_writes(rows)
    assert_close(moved.dense(), rows.dense())
    for side, planted in ((moved.keys[:, 0], keys), (moved.values[:, 0], values)):
        cosines = normalize(side, dim=1) @ planted.T
        nearest = cosines.abs().argmax(1)
        signs = cosines.gather(1, nearest[:, None])[:, 0].sign()
        agreement = torch.stack([signs[nearest == each].mean().abs() for each in range(len(planted))])
        assert agreement.min() > 0.9


def test_atoms_turn_with_their_means() -> None:
    """The sum of the mean contributions stays."""
    sae = build(encoder="pursuit")
    sae.mean_contribution.copy_(normal(24))

    def total() -> Tensor:
        return sae.key_atoms.T @ sae.mean_contribution.view(4, 6) @ sae.value_atoms

    before = total()
    sae._turn_to_positive()
    assert_close(total(), before)


def test_starts_and_resampling_go_side_by_side() -> None:
    keys, values, rows = world(200)
    sae = WriteProductTrainingSAE(config("native", resample_every=10).sae)
    assert train_step(sae, rows, 0).loss < 0.2 * rows.norm().square().mean()
    started = [normalize(side.detach(), dim=1) for side in (sae.key_atoms, sae.value_atoms)]
    assert ((keys @ started[0].T).abs().amax(1) > 0.999).all()
    assert ((values @ started[1].T).abs().amax(1) > 0.999).all()
    grid = torch.zeros(8, 20, dtype=torch.bool)
    grid[2] = True
    grid[3, 4] = True  # a silent pair of living sides
    before = [p.detach().clone() for p in (sae.key_atoms, sae.value_atoms)]
    sae.key_atoms.data[2] = sae.key_encoder.data[2] = before[0][2] * 1e-3
    assert train_step(sae, rows, 10, grid.flatten()).metrics["resampled_atoms"] <= 1
    with torch.no_grad():
        sae.value_atoms.mul_(torch.randn(20, 1).abs())
        sae.value_encoder.zero_()
    dead = torch.ones(8, 20, dtype=torch.bool)
    dead[1:] = False
    assert train_step(sae, rows, 20, dead.flatten()).metrics["resampled_atoms"] == 1
    assert_close(sae.value_encoder.data, torch.zeros(20, 10))
    assert ((keys @ normalize(sae.key_atoms.detach()[:1], dim=1).T).abs().amax() > 0.999).all()


def test_a_side_is_put_on_rows_of_large_writes() -> None:
    """Its error counts by the size of the other side: 60 writes of next to nothing draw no atom."""
    sae = build()
    rows = LowRank(normal(64, 1, K), normal(64, 1, V, seed=2))
    rows.keys[4:] *= 1e-6
    sae.resample(rows, torch.arange(24) % 6 == 0)
    cosines = normalize(rows.values[:, 0], dim=1) @ normalize(sae.value_atoms[0].detach(), dim=0)
    assert cosines.abs().argmax() < 4


# ---------------------------------------------------------------------------------------- on a model
