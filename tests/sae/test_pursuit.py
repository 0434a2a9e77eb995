"""`writesae_product` with pursuit: pairs of atoms that matrices are sums of, as an autoencoder and as training finds
them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from oracles.pursuit import pursued_pairs
from saes import normal, runner_config, train_step
from test_product import PURSUIT, K, N, V, assert_gradients, build
from torch import Tensor
from torch.nn.functional import normalize
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hookpoints import embedded as shipped
from sae_lens_writesae import collect, train, training_config
from sae_lens_writesae.sae import WriteProductTrainingSAE, WriteProductTrainingSAEConfig
from sae_lens_writesae.sae.pursuit import pairs_of
from writesae.experiment.tokens import sample_sequences

# ---------------------------------------------------------------------------------------- the code


@pytest.mark.parametrize("stop", [1e-3, 0.3, 0.6])
@pytest.mark.parametrize("n", [1, 5])
def test_pairs_are_those_of_pursuit_step_by_step(n: int, stop: float) -> None:
    keys = normalize(normal(9, K), dim=1)
    values = normalize(normal(11, V, seed=2), dim=1)
    matrices = normal(N, K, V, seed=3)
    matrices[3] = 0
    matrices[4] = 2 * torch.outer(keys[2], values[3])
    pairs = pairs_of(matrices, keys, values, n, stop)
    counts = []
    for row, matrix in enumerate(matrices):
        wanted = pursued_pairs(matrix, keys, values, n, stop)
        counts.append(len(wanted))
        assert (pairs.coefficients[row] != 0).sum() == len(wanted)
        for at, (i, j, coefficient) in enumerate(wanted):
            assert (int(pairs.keys[row, at]), int(pairs.values[row, at])) == (i, j)
            assert_close(float(pairs.coefficients[row, at]), coefficient, rtol=1e-10, atol=1e-10)
    assert counts[3:5] == [0, 1]


def test_an_activation_is_the_coefficient_of_its_pair() -> None:
    sae, x = build(**PURSUIT), normal(2, N, K * V)
    acts = sae.encode(x)
    keys, values = sae.directions
    assert_close(keys.norm(dim=1), torch.ones(4).double())
    for row, matrix in enumerate(x.view(-1, K, V)):
        wanted = torch.zeros(4, 6).double()
        for i, j, coefficient in pursued_pairs(matrix, keys, values, 3, sae.cfg.stop):
            wanted[i, j] = coefficient
        assert_close(acts.flatten(0, 1)[row], wanted.flatten(), rtol=1e-10, atol=1e-10)
    assert (acts < 0).any()
    assert_close(sae.encode(-3 * x), -3 * acts)


def test_gradients_are_those_of_the_best_error() -> None:
    """Of the least squares over the chosen pairs as a function of the atoms; and in the matrices."""
    sae, x = build(0, **PURSUIT), normal(N, K * V)
    total = torch.zeros(()).double()
    for matrix in x.view(-1, K, V):
        keys, values = sae.directions
        chosen = pursued_pairs(matrix, keys, values, 3, 0.05)
        columns = [torch.outer(keys[i], values[j]).flatten() for i, j, _ in chosen]
        basis = torch.linalg.qr(torch.stack(columns, 1)).Q
        total = total + matrix.square().sum() - (basis.T @ matrix.flatten()).square().sum()
    assert_gradients(sae, x, total / N, ["key_atoms", "value_atoms"])


class Largest(TorchDispatchMode):
    """How many numbers the largest tensor has that is made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.numel = max(self.numel, *(leaf.numel() for leaf in tree_leaves(made) if isinstance(leaf, Tensor)), 0)
        return made


@pytest.mark.parametrize("encoder", ["topk", "pursuit"])
def test_at_128_by_128_no_matrix_of_all_pairs_is_built(encoder: str) -> None:
    n, sides, size = 6, 32, 128
    shape: dict[str, Any] = {"d_in": size**2, "d_k": size, "d_sae": sides**2, "encoder": encoder}
    sae: Any = WriteProductTrainingSAE(WriteProductTrainingSAEConfig(**shape, resample_every=1, decoder_init="native"))
    x = (normal(n, size, 1) @ normal(n, 1, size, seed=2)).float().flatten(1)
    with Largest() as largest:
        for at in (0, 1):
            train_step(sae, x, at).loss.backward()
        sae(x)
        sae.settle_b_dec()
    # Pairs of a side are views; scores and activations of all rows are as large as anything.
    assert largest.numel <= max(n * sides**2, n * size**2, sides * sides * size)


# ---------------------------------------------------------------------------------------- configs and files


# ---------------------------------------------------------------------------------------- training


def test_spare_atoms_are_put_on_what_is_left() -> None:
    """One that nothing uses, and the less used one of two that are alike up to their sign."""
    keys = normalize(normal(4, K), dim=1)
    values = normalize(normal(6, V, seed=2), dim=1)
    which = torch.Generator().manual_seed(0)
    chosen = torch.randint(24, (200,), generator=which)
    x = (keys[chosen // 6, :, None] * values[chosen % 6, None]).flatten(1)
    sae = build(0, encoder="pursuit", n_pairs=1, resample_every=2, stop=0.01)
    sae.key_atoms.data.copy_(3 * keys)
    sae.value_atoms.data.copy_(values)
    sae.key_atoms.data[1] = -keys[0]  # so that key 1 and value 2 are missing
    sae.value_atoms.data[2] = values[3]
    dead = torch.zeros(24, dtype=torch.bool)
    before = train_step(sae, x, 1, dead).loss
    out = train_step(sae, x, 2, dead)
    assert out.metrics["resampled_atoms"] == 2 and out.loss < 0.8 * before
    for side, kept in zip(sae.directions, (keys[[0, 2, 3]], values[[0, 1, 3, 4, 5]])):
        assert (side @ side.T).abs().fill_diagonal_(0).max() < 0.95
        assert_close((kept @ side.T).abs().amax(1), torch.ones(len(kept)).double())
    assert train_step(sae, x, 4, dead).metrics["resampled_atoms"] == 0


class World:
    """States of three pairs of 24 planted keys and 24 planted values, with noise."""

    def __init__(self, seed: int):
        self.seed = seed
        g = torch.Generator().manual_seed(seed)
        self.keys = normalize(torch.randn(24, 16, generator=g), dim=1)
        self.values = normalize(torch.randn(24, 16, generator=g), dim=1)

    def draw(self, n: int, part: int) -> tuple[Tensor, Tensor]:
        """[n,16,16] states, and the numbers of their facts [n,3]."""
        g = torch.Generator().manual_seed(1000 * self.seed + part)
        k = torch.rand(n, 24, generator=g).argsort(1)[:, :3]
        v = torch.randint(24, (n, 3), generator=g)
        sizes = 0.5 + torch.rand(n, 3, generator=g)
        states = torch.einsum("np,npk,npv->nkv", sizes, self.keys[k], self.values[v])
        return states + 0.02 * torch.randn(n, 16, 16, generator=g), k * 24 + v

    def scores(self, keys: Tensor, values: Tensor) -> tuple[float, float]:
        """Share of the planted pairs that are among those of atoms, and of the facts that are read from new states."""
        of_keys = self.keys @ keys.T
        of_values = self.values @ values.T
        cosines = torch.outer(of_keys.abs().amax(1), of_values.abs().amax(1))
        states, facts = self.draw(512, 2)
        pairs = pairs_of(states, keys, values, 3, 0.01)
        read = of_keys.abs().argmax(0)[pairs.keys] * 24 + of_values.abs().argmax(0)[pairs.values]
        return float((cosines > 0.9).float().mean()), float((facts[:, :, None] == read[:, None]).any(2).float().mean())


def config(steps: int, seed: int = 0) -> Any:
    """Of states [16,16]."""
    options: dict[str, Any] = {"encoder": "pursuit", "decoder_init": "native", "resample_every": 25, "n_pairs": 3}
    cfg = WriteProductTrainingSAEConfig(d_in=256, d_k=16, d_sae=36**2, **options)
    return runner_config(cfg, steps, 96, seed=seed, lr_scheduler_name="cosineannealing")


@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.nightly) for n in (1, 2))])
def test_planted_pairs_are_found_in_states_alone(seed: int) -> None:
    world = World(seed)
    states, _ = world.draw(1000, 1)
    sae: Any = train(config(400, seed), states)
    found, read = world.scores(*(side.detach() for side in sae.directions))
    assert found >= 0.95 and read >= 0.95
    acts = sae.encode(states.flatten(1))
    assert (acts > 0).sum() > 0.9 * acts.count_nonzero()
    g = torch.Generator().manual_seed(100 + seed)
    random = [normalize(torch.randn(24, 16, generator=g), dim=1) for _ in range(2)]
    assert world.scores(*random)[1] <= 0.16


def test_a_collection_of_states_trains_it(embedded: Any, tmp_path: Path) -> None:
    text = sample_sequences(embedded, shipped.text("train"), 16, 32)
    collection = collect(embedded, text, [2], [1], tmp_path / "collection", targets=["state"])
    how: dict[str, Any] = {"target": "state", "architecture": "writesae_product", "d_sae": 32**2, "verbose": False}
    cfg = training_config(collection, 2, 1, sae={"encoder": "pursuit", "n_pairs": 6}, training_tokens=96 * 60, **how)
    assert (cfg.lr, cfg.sae.resample_every) == (1e-2, 25)
    rows = collection.rows(2, 1, "state")
    assert (train(cfg)(rows) - rows).square().sum() < 0.8 * (rows - rows.mean(0)).square().sum()
