"""Thresholds that are exported, and the upkeep that serves matrices: start, unit norm, resampling, means."""

from pathlib import Path
from typing import Any

import pytest
import torch
from planted import K, Planted, V, trained
from planted import untrained as make
from saes import train_step
from torch import Tensor
from torch.nn.functional import normalize

import sae_lens_writesae as W
from sae_lens_writesae import sae as S
from sae_lens_writesae.sae.training import draw_rows

D_IN = K * V


# ---------------------------------------------------------------------------------------- thresholds


def exported_l0(sae: Any, x: Tensor, folder: Path) -> float:
    sae.save_inference_model(folder)
    return (W.load_sae(folder).encode(x) > 0).float().sum(-1).mean().item()


@pytest.mark.parametrize(("name", "lr"), [("writesae_batchtopk", 3e-4), ("writesae_matryoshka", 3e-3)])
def test_exported_threshold_is_right_after_fifty_steps(name: str, lr: float, tmp_path: Path) -> None:
    data = Planted()
    sae = trained(name, data, 50, lr)
    fresh = torch.cat([next(data) for _ in range(4)])
    assert exported_l0(sae, fresh, tmp_path) == pytest.approx(2, rel=0.1)
    W.calibrate_threshold(sae, fresh)
    assert exported_l0(sae, fresh, tmp_path) == pytest.approx(2, abs=0.005)


def test_calibration_of_an_inference_sae_sets_any_l0(tmp_path: Path) -> None:
    data = Planted()
    trained("writesae_batchtopk", data, 100, 3e-3).save_inference_model(tmp_path)
    sae: Any = W.load_sae(tmp_path)
    x = next(data)
    sae.v.data *= 2  # thresholds follow the contribution, not the activation
    sae.requires_grad_(False)
    contributions = (((x - sae.b_dec) @ sae.W_enc + sae.b_enc) * sae.decoder_norm()).flatten().sort(descending=True)[0]
    for l0 in (1.0, 3.5):
        threshold, n = W.calibrate_threshold(sae, x, l0), round(l0 * len(x))
        assert int((sae.encode(x) > 0).sum()) == n  # not one more
        assert threshold == pytest.approx(float(contributions[n - 1 : n + 1].mean()), rel=1e-6)
        torch.testing.assert_close(sae.threshold * sae.decoder_norm(), torch.full((32,), threshold))
    assert W.calibrate_threshold(sae, x, 0) > contributions[0] and not sae.encode(x).any()
    with pytest.raises(ValueError, match=r"l0: expected .* got 32"):
        W.calibrate_threshold(sae, x, 32)


# ---------------------------------------------------------------------------------------- upkeep


def test_first_batch_centres() -> None:
    sae, x = make(), torch.randn(64, D_IN) + 3
    train_step(sae, x, 0)
    torch.testing.assert_close(sae.b_dec.data, x.mean(0))
    train_step(sae, x + 1, 0)
    torch.testing.assert_close(sae.b_dec.data, x.mean(0))
    zeros = make(b_dec_init="zeros")
    train_step(zeros, x, 0)
    assert not zeros.b_dec.any()


def test_norms_move_into_the_encoder_when_it_is_due() -> None:
    """`test_invariants.py` has what the fold leaves unchanged."""
    sae = make(unit_norm_every=5, decoder_init_norm=0.4, resample_every=0)
    x = torch.randn(32, D_IN)
    for n in (0, 4):
        train_step(sae, x, n)
        assert (sae.decoder_norm() - 1).abs().min() > 0.1
    train_step(sae, x, 5)
    torch.testing.assert_close(sae.decoder_norm(), torch.ones(32))
    torch.testing.assert_close(sae.v.norm(dim=-1), sae.w.norm(dim=-1))


@pytest.mark.parametrize(("name", "fields"), [*zip(S.TRAINING, W.VARIANTS.values(), strict=True)])
def test_resampling_takes_dead_atoms_to_the_residual(name: str, fields: Any) -> None:
    sae = make(name, resample_every=10, unit_norm_every=0, b_dec_init="zeros", **fields)
    common = 3 * torch.randn(D_IN)
    sae.b_dec.data.copy_(common)
    x = torch.randn(64, D_IN) + common
    dead = torch.zeros(32, dtype=torch.bool)
    dead[[3, 7, 20]] = True
    before, residual = sae.atoms().dense(), (x - sae(x)).detach()
    assert train_step(sae, x, 9, dead).metrics["resampled_atoms"] == 0
    torch.testing.assert_close(sae.atoms().dense(), before)
    assert train_step(sae, x, 10, dead).metrics["resampled_atoms"] == 3
    after = sae.atoms().dense()
    torch.testing.assert_close(after[~dead], before[~dead])
    alive_norm = before[~dead].flatten(1).norm(dim=1).mean()
    torch.testing.assert_close(after[dead].flatten(1).norm(dim=1), alive_norm.expand(3))
    # Each new atom is the leading part of a residual of its own, and its encoder looks the same way.
    cosine = normalize(after[dead].flatten(1), dim=1) @ normalize(residual, dim=1).T
    assert cosine.amax(1).min() > 0.5 and cosine.argmax(1).unique().numel() == 3
    singular = torch.linalg.svdvals(after[dead])
    assert (singular[:, fields["rank"] :] < 1e-4 * singular[:, :1]).all()
    torch.testing.assert_close(normalize(sae.W_enc.T[dead], dim=1), normalize(after[dead].flatten(1), dim=1))
    if hasattr(sae, "b_enc"):
        assert not sae.b_enc[dead].any()
    assert train_step(sae, x[:2], 20, dead).metrics["resampled_atoms"] == 2  # one a row at most


def test_means_are_of_the_batches_since_an_atom_began() -> None:
    """The t-th batch weighs t among inputs, and t (t+1) (t+2) (t+3) (t+4) among contributions; a new run begins anew,
    and so does an atom that is replaced."""
    sae = make("writesae_standard", resample_every=0, unit_norm_every=0, dtype="float64")
    batches = [1 + torch.randn(64, D_IN, dtype=torch.float64) for _ in range(3)]
    for n in range(2):
        train_step(sae, 5 * batches[2], n)

    def contribution(n: int) -> Tensor:
        return train_step(sae, batches[n], n).feature_acts.detach().mean(0) * sae.decoder_norm().detach()

    first = contribution(0)
    replaced = first.topk(2).indices
    sae.replace_atoms(replaced, sae.atoms(replaced), torch.ones(32, dtype=torch.bool))
    second, third = contribution(1), contribution(2)
    torch.testing.assert_close(sae.mean_input, sum((n + 1) / 6 * x.mean(0) for n, x in enumerate(batches)))
    expected = (120 * first + 720 * second + 2520 * third) / (120 + 720 + 2520)
    expected[replaced] = ((120 * second + 720 * third) / (120 + 720))[replaced]
    torch.testing.assert_close(sae.mean_contribution, expected)


def test_means_forget_what_is_older_than_their_rows() -> None:
    """Of 128 rows in batches of 64: from the second batch on, the last one is half of the mean."""
    sae = make("writesae_standard", b_dec_rows=128)
    for x in [*torch.zeros(9, 64, D_IN), torch.ones(64, D_IN)]:
        sae.update_means(x, x[:, :32])
    torch.testing.assert_close(sae.mean_input, torch.full((D_IN,), 0.5))


# ---------------------------------------------------------------------------------------- the rest


def test_input_that_is_not_finite_stops_training() -> None:
    sae, x = make(), torch.randn(16, D_IN).index_fill(1, torch.tensor(2), torch.nan)
    with pytest.raises(ValueError, match="sae_in"):
        train_step(sae, x, 0)
    assert all(tensor.isfinite().all() for tensor in sae.state_dict().values()) and sae._built is None
    sae.b_dec.data[3] = torch.inf
    with pytest.raises(ValueError, match="b_dec"):
        train_step(sae, x.nan_to_num(), 1)


# ---------------------------------------------------------------------------------------- the start


@pytest.mark.parametrize("fields", [{}, {"encoder": "tied"}, {"decoder": "flat", "encoder": "dense"}, {"rank": 2}])
def test_atoms_start_from_rows_of_the_first_batches(fields: Any) -> None:
    sae = make(d_sae=40, decoder_init="native", **fields)
    rank = fields.get("rank", 1)
    batches = [torch.randn(24, rank, K, generator=torch.Generator().manual_seed(n)) for n in range(3)]
    matrices = [(left.mT @ left[..., :V]).flatten(1) for left in batches]  # of rank R
    for n, x in enumerate(matrices):
        train_step(sae, x, n)
        atoms = sae.atoms().dense().flatten(1)
        cosines = normalize(atoms, dim=1) @ normalize(torch.cat(matrices), dim=1).T
        assert int((cosines.amax(1) > 0.999).sum()) == (24, 40, 40)[n]  # 24 rows a batch for 40 atoms
    assert len(cosines.argmax(1).unique()) == 40
    torch.testing.assert_close(sae.encoder_norm().data, torch.ones(40), rtol=1e-4, atol=1e-4)


def test_opposite_directions_start_two_atoms() -> None:
    """Activations are positive, so that an atom has no use for the other."""
    sae = make(d_sae=2, decoder_init="native")
    atom = Planted().atoms[:1]
    train_step(sae, torch.cat([atom, -atom]).repeat(20, 1), 0)
    torch.testing.assert_close(sae.W_dec.detach().sum(0), torch.zeros(D_IN))


def test_rows_are_drawn_in_proportion_to_their_errors() -> None:
    torch.manual_seed(0)
    drawn = sum(int(draw_rows(torch.tensor([1.0, 9.0]), 1)) for _ in range(400))
    assert drawn / 400 == pytest.approx(0.9, abs=0.05)


def test_near_copies_start_one_atom() -> None:
    sae = make(d_sae=12, decoder_init="native")
    few = Planted().atoms[:5]
    for n in range(3):
        train_step(sae, few.repeat(20, 1) * (1 + n), n)
    cosines = normalize(sae.atoms().dense().flatten(1), dim=1) @ few.T
    assert (cosines > 0.99).sum(0).tolist() == [1] * 5  # the other seven stay random
    before = sae.W_dec.detach().clone()
    train_step(sae, Planted().atoms, 20)
    assert torch.equal(before, sae.W_dec)  # later batches start no atom
