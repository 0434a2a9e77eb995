"""Training on factors: the same step as on matrices, planted writes, seeds."""

import copy
from typing import Any

import pytest
import torch
from sae_lens import LanguageModelSAERunnerConfig, LoggingConfig
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from torch import Tensor
from torch.nn.functional import normalize

from sae_lens_writesae import train_on_writes
from sae_lens_writesae.atom.low_rank import LowRank
from sae_lens_writesae.sae import TRAINING
from sae_lens_writesae.sae.training import MatrixTrainingSAE, pack

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


@pytest.mark.parametrize("name", TRAINING)
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
