"""Training on factors: the same step as on matrices, planted writes, seeds."""

import copy
from typing import Any, cast

import pytest
import torch
from sae_lens import LanguageModelSAERunnerConfig, LoggingConfig, SAETrainer
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from torch import Tensor
from torch.nn.functional import normalize

from sae_lens_writesae import calibrate_threshold, preset_b_dec, train_on_writes
from sae_lens_writesae.atom.low_rank import LowRank
from sae_lens_writesae.sae import TRAINING, WriteBatchTopKTrainingSAE
from sae_lens_writesae.sae.training import MatrixTrainingSAE, pack, unpack
from sae_lens_writesae.sae.writes import on_factors, shuffled_rows

K, V, F, N = 6, 7, 24, 30
FIELDS: dict[str, dict[str, Any]] = {
    "writesae_topk": {"k": 3},
    "writesae_batchtopk": {"k": 1.5},
    "writesae_matryoshka": {"k": 2, "matryoshka_widths": [8, 24]},
    "writesae_jumprelu": {"jumprelu_bandwidth": 2.0, "jumprelu_init_threshold": 0.1},
    "writesae_standard": {},
    "writesae_gated": {},
}


def make(name: str = "writesae_topk", dtype: torch.dtype = torch.float64, **fields: Any) -> MatrixTrainingSAE:
    """An SAE with no parameter at a special value."""
    torch.manual_seed(1)
    sae_class, config_class = TRAINING[name]
    options = {"d_in": K * V, "d_k": K, "d_v": V, "d_sae": F, "dtype": str(dtype)[6:]} | FIELDS[name] | fields
    sae: Any = sae_class(config_class(**options))  # pyright: ignore
    for parameter in sae.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return sae


def writes(terms: int = 1, dtype: torch.dtype = torch.float64, n: int = N) -> LowRank:
    g = torch.Generator().manual_seed(2)
    return LowRank(torch.randn(n, terms, K, generator=g).to(dtype), torch.randn(n, terms, V, generator=g).to(dtype))


def step(sae: MatrixTrainingSAE, x: Tensor, n_dead: int = 0, at: int = 1) -> TrainStepOutput:
    dead = torch.arange(F) % 4 < (n_dead > 0)
    dead &= dead.cumsum(0) <= n_dead
    coefficients = dict.fromkeys(sae.get_coefficients(), 0.3)
    output = sae.training_forward_pass(TrainStepInput(x, coefficients, dead, at, False))
    output.loss.backward()
    return output


def differences(a: MatrixTrainingSAE, b: MatrixTrainingSAE, one: TrainStepOutput, two: TrainStepOutput) -> list[float]:
    """Relative differences of losses, activations and all gradients."""
    pairs = [(one.feature_acts, two.feature_acts), (one.hidden_pre, two.hidden_pre), (one.loss, two.loss)]
    pairs += [(one.losses[name], two.losses[name]) for name in one.losses]
    for p, q in zip(a.parameters(), b.parameters()):
        assert p.grad is not None and q.grad is not None
        pairs.append((p.grad, q.grad))
    return [float((x - y).detach().norm() / x.detach().norm().clamp_min(1e-12)) for x, y in pairs]


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("encoder", ["bilinear", "tied"])
@pytest.mark.parametrize("rank, terms", [(1, 1), (2, 1), (1, 2), (4, 2)])
@pytest.mark.parametrize("n_dead", [0, 5])
def test_a_step_on_factors_is_the_step_on_matrices(name: str, encoder: str, rank: int, terms: int, n_dead: int) -> None:
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        dense = make(name, dtype, encoder=encoder, rank=rank)
        sae, rows = copy.deepcopy(dense), writes(terms, dtype)
        one, two = step(dense, rows.dense().flatten(1), n_dead), step(sae, pack(rows), n_dead)
        assert isinstance(two.sae_in, LowRank) and one.feature_acts.count_nonzero() > 0
        assert max(differences(dense, sae, one, two)) < tolerance


@pytest.mark.parametrize("k", [1, 24])
@pytest.mark.parametrize("k_aux", [2, 0])
def test_the_step_whatever_the_number_of_active_and_of_auxiliary_atoms(k: int, k_aux: int) -> None:
    dense = make(k=k, k_aux=k_aux)
    sae, rows = copy.deepcopy(dense), writes()
    one, two = step(dense, rows.dense().flatten(1), 5), step(sae, pack(rows), 5)
    assert one.losses["auxiliary_reconstruction_loss"] > 0
    assert max(differences(dense, sae, one, two)) < 1e-10


@pytest.mark.parametrize("mode", ["tanh", "quadratic"])
def test_the_penalties_of_jumprelu_are_those_of_saelens(mode: str) -> None:
    fields: dict[str, Any] = {"jumprelu_sparsity_loss_mode": mode, "target_l0": 3.0, "pre_act_loss_coefficient": 0.2}
    dense = make("writesae_jumprelu", **fields)
    sae, rows = copy.deepcopy(dense), writes()
    dense.calculate_aux_loss = super(type(sae), dense).calculate_aux_loss  # SAELens', which builds W_dec
    one, two = step(dense, rows.dense().flatten(1), 5), step(sae, pack(rows), 5)
    assert set(one.losses) == {"mse_loss", "l0_loss", "pre_act_loss"}
    assert max(differences(dense, sae, one, two)) < 1e-10


@pytest.mark.parametrize("name", ["writesae_topk", "writesae_gated"])
def test_atoms_along_the_write_need_no_further_columns(name: str) -> None:
    dense = make(name, loss="write", loss_weight=0.7)
    sae, rows = copy.deepcopy(dense), writes(2)
    one, two = step(dense, torch.cat([rows.dense().flatten(1), pack(rows)], dim=1)), step(sae, pack(rows))
    assert "write_loss" in one.losses and max(differences(dense, sae, one, two)) < 1e-10


@pytest.mark.parametrize("fields", [{"encoder": "dense"}, {"decoder": "flat"}, {"encoder": "tied", "decoder": "flat"}])
def test_variants_without_factors_get_the_matrices(fields: dict[str, Any]) -> None:
    dense = make(**fields)
    sae, rows = copy.deepcopy(dense), writes(2)
    one, two = step(dense, rows.dense().flatten(1), 5), step(sae, pack(rows), 5)
    assert isinstance(two.sae_in, Tensor) and two.sae_in.shape == (N, K * V)
    assert max(differences(dense, sae, one, two)) < 1e-12


def test_thresholds_and_means_come_from_factors_too() -> None:
    sae, rows = cast(WriteBatchTopKTrainingSAE, make("writesae_batchtopk")), writes(2)
    dense = rows.dense().flatten(1)
    assert calibrate_threshold(sae, [rows], 2.0) == pytest.approx(calibrate_threshold(sae, [dense], 2.0), rel=1e-10)
    torch.testing.assert_close(preset_b_dec(sae, [rows, rows.rows(slice(4))]), preset_b_dec(sae, [dense, dense[:4]]))
    with pytest.raises(ValueError):
        preset_b_dec(sae, [rows * torch.nan])


def test_upkeep_is_the_same() -> None:
    """Centring, unit norm, running means, and resampling, whose draws are the same ones."""
    for at, n_dead in ((0, 0), (500, 6)):
        dense = make(resample_every=250, b_dec_init="mean")
        dense.b_dec.data.mul_(at > 0)
        sae, rows = copy.deepcopy(dense), writes(2)
        outputs = []
        for each, x in ((dense, rows.dense().flatten(1)), (sae, pack(rows))):
            torch.manual_seed(4)
            outputs.append(step(each, x, n_dead, at))
        resampled = outputs[1].metrics["resampled_atoms"]
        assert resampled == outputs[0].metrics["resampled_atoms"] and (resampled == n_dead or n_dead > resampled > 0)
        assert dense.mean_contribution.any() and dense.mean_input.any()
        for p, q in zip(dense.state_dict().values(), sae.state_dict().values(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9)


def test_low_precision_keeps_the_loss_exact() -> None:
    """The squared error is the difference of large terms: bf16 terms would leave nothing of it."""
    exact = make(dtype=torch.float32, k=1)
    rows = exact.atoms(torch.arange(16)).to(torch.float32)
    rows = LowRank(rows.keys, rows.values) * 3
    exact.b_dec.data.zero_()
    expected = step(copy.deepcopy(exact), pack(rows)).losses["mse_loss"]
    with torch.autocast("cpu", torch.bfloat16):
        found = step(copy.deepcopy(exact), pack(rows)).losses["mse_loss"]
    low = copy.deepcopy(exact).to(torch.bfloat16)
    assert low.v.dtype == torch.bfloat16 and step(low, pack(rows)).losses["mse_loss"].dtype == torch.float32
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0)


# ------------------------------------------------------------------------------------------------ SAELens' trainer


def trained(inputs: str, **fields: Any) -> tuple[Any, dict[str, Any]]:
    """20 steps of SAELens' trainer, and its log of the last one."""
    sae, rows = make(**fields), writes(2, n=200)
    batches = shuffled_rows(rows, 50, torch.Generator().manual_seed(0))
    if inputs == "matrices":
        batches = (unpack(b, K, V).dense().flatten(1) for b in batches)
    cfg = SAETrainerConfig(1000, 50, lr=1e-3, lr_end=1e-3, n_batches_for_norm_estimate=3)
    trainer = SAETrainer(cfg, sae, cast(Any, batches))
    if inputs == "factors":
        on_factors(trainer)
    logs: dict[str, Any] = {}
    forward = sae.training_forward_pass

    def logged(step_input: TrainStepInput) -> TrainStepOutput:
        output = forward(step_input)
        with torch.no_grad():
            logs.update(trainer.build_train_step_log_dict(output, trainer.n_training_samples))
        return output

    sae.training_forward_pass = logged  # pyright: ignore[reportAttributeAccessIssue]
    trainer.fit()
    return trainer.sae, logs


@pytest.mark.parametrize("normalize_activations", ["none", "expected_average_only_in"])
def test_training_and_logs_are_those_of_matrices(normalize_activations: str) -> None:
    fields = {"normalize_activations": normalize_activations}
    (dense, expected), (sae, found) = trained("matrices", **fields), trained("factors", **fields)
    for p, q in zip(dense.parameters(), sae.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)
    assert found.keys() == expected.keys() and 0 < found["metrics/explained_variance"] < 1
    assert found == pytest.approx(expected, rel=1e-6)


# ------------------------------------------------------------------------------------------------ training


def config(seed: int = 0, steps: int = 300, batch: int = 128, **fields: Any) -> LanguageModelSAERunnerConfig[Any]:
    options: dict[str, Any] = {"d_in": K * V, "d_k": K, "d_v": V, "d_sae": F, "k": 1} | fields
    return LanguageModelSAERunnerConfig(
        sae=TRAINING["writesae_topk"][1](**options),
        seed=seed,
        lr=1e-2,
        training_tokens=steps * batch,
        train_batch_size_tokens=batch,
        dead_feature_window=20,
        logger=LoggingConfig(log_to_wandb=False),
        checkpoint_path=None,
        device="cpu",
    )


def planted() -> tuple[LowRank, LowRank]:
    """16 atoms, and writes each of which is one of them times a number."""
    g = torch.Generator().manual_seed(3)
    atoms = LowRank(
        normalize(torch.randn(16, 1, K, generator=g), dim=-1), normalize(torch.randn(16, 1, V, generator=g), dim=-1)
    )
    which = torch.randint(16, (2000,), generator=g)
    return atoms, atoms.rows(which) * (1 + torch.rand(2000, generator=g))


def test_planted_writes_are_found() -> None:
    atoms, rows = planted()
    sae = train_on_writes(config(), rows.keys, rows.values)
    found = atoms.cosines(sae.atoms()).abs().amax(1)
    assert found.min() > 0.95
    with torch.no_grad():
        error = sae.decode(sae.encode(rows.dense().flatten(1))) - rows.dense().flatten(1)
    assert error.square().sum() < 0.05 * rows.norm().square().sum()


def test_a_write_of_one_term_needs_no_axis_for_it() -> None:
    _, rows = planted()
    sides = (rows.keys, rows.values), (rows.keys[:, 0], rows.values[:, 0])
    both = [train_on_writes(config(0, 5), keys, values) for keys, values in sides]
    assert all(torch.equal(p, q) for p, q in zip(both[0].parameters(), both[1].parameters(), strict=True))
    for keys, values in ((rows.values, rows.keys), (rows.keys[:, 0, 0], rows.values), (rows.keys[None], rows.values)):
        with pytest.raises(ValueError, match=rf"keys, values: .*K, V = {K}, {V} .*got \["):
            train_on_writes(config(), keys, values)


def test_a_seed_is_a_dictionary() -> None:
    _, rows = planted()

    def weights(seed: int) -> Tensor:
        sae = train_on_writes(config(seed, 60, resample_every=20), rows.keys, rows.values)
        return torch.cat([p.detach().flatten() for p in sae.parameters()])

    before = torch.get_rng_state()
    first = weights(5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert torch.equal(first, weights(5)) and not torch.allclose(first, weights(6))


def test_what_does_not_fit_is_refused_before_any_work() -> None:
    rows = writes(n=200)
    with pytest.raises(ValueError):
        train_on_writes(config(d_in=K * V, d_k=V, d_v=K), rows.keys, rows.values)
    with pytest.raises(ValueError):
        train_on_writes(config(batch=256), rows.keys, rows.values)
    with pytest.raises(ValueError):
        train_on_writes(config(), rows.keys, rows.values[:50])
    with pytest.raises(ValueError):
        step(make(), torch.randn(N, K + V + 1))
