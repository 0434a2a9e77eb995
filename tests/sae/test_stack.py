"""Dictionaries that train side by side are those that train alone."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from sae_lens import LanguageModelSAERunnerConfig, LoggingConfig
from sae_lens.saes.sae import TrainStepInput
from torch import Tensor

from sae_lens_writesae.atom.low_rank import LowRank
from sae_lens_writesae.sae import TRAINING
from sae_lens_writesae.sae.metric import Metric
from sae_lens_writesae.sae.stack import _Stack, shape_of, train_many_on_writes
from sae_lens_writesae.sae.writes import train_on_writes, writes_trainer

K, V, F, N = 6, 4, 24, 900
NAMES = ("v", "w", "v_enc", "w_enc", "b_enc", "b_dec")
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def writes(seed: int = 0, dtype: torch.dtype = torch.float64) -> LowRank:
    """Writes near 8 directions."""
    g = torch.Generator().manual_seed(seed)
    which = torch.randint(8, (N,), generator=g)
    sides = [torch.randn(8, n, generator=g)[which] + 0.2 * torch.randn(N, n, generator=g) for n in (K, V)]
    return LowRank.rank_one(*sides).to(dtype)


def config(seed: int = 0, steps: int = 6, **changes: Any) -> LanguageModelSAERunnerConfig[Any]:
    options: dict[str, Any] = {"d_in": K * V, "d_k": K, "d_v": V, "d_sae": F, "k": 2, "dtype": "float64"}
    options |= {"resample_every": 4, "unit_norm_every": 3, "decoder_init": "native"}
    # Not 1: with one active atom of unit norm, equal to its encoder, the gradient of the activation is exactly zero,
    # and Adam makes steps of its rounding.
    options |= {"decoder_init_norm": 0.7} | changes
    return LanguageModelSAERunnerConfig(
        sae=TRAINING["writesae_topk"][1](**options),
        hook_name="blocks.1.mixer.heads.0.hook_write_vec",
        seed=seed,
        lr=1e-2,
        training_tokens=steps * 32,
        train_batch_size_tokens=32,
        dead_feature_window=1,
        logger=LoggingConfig(log_to_wandb=False),
        checkpoint_path=None,
        device="cpu",
    )


def state(sae: torch.nn.Module) -> dict[str, Tensor]:
    """Weights and running means, without the atoms of the start: where rows are resampled they are of fp32."""
    return {name: value for name, value in sae.state_dict().items() if not name.startswith("start_")}


CHANGES: list[dict[str, Any]] = [
    {},
    {"k": 1},
    {"k_aux": 3},
    {"apply_b_dec_to_input": False},
    {"aux_loss_coefficient": 0.0, "b_dec_init": "zeros", "b_dec_rows": 64},
]


@pytest.mark.parametrize("changes", CHANGES)
def test_losses_and_gradients_are_those_of_the_single_steps(changes: dict[str, Any]) -> None:
    g = torch.Generator().manual_seed(1)
    trainers = [writes_trainer(config(seed, **changes), writes()) for seed in (0, 1, 2)]
    for trainer in trainers:
        for parameter in trainer.sae.parameters():
            parameter.data = torch.randn(parameter.shape, generator=g, dtype=parameter.dtype)
    dead = torch.rand(3, F, generator=g) < torch.tensor([0.0, 0.2, 0.6])[:, None]
    rows = torch.randn(3, 32, K + V, generator=g, dtype=torch.float64)
    expected = []
    for trainer, x, mask in zip(trainers, rows, dead):
        output = trainer.sae.training_forward_pass(TrainStepInput(x, {}, mask, 1, False))
        output.loss.backward()
        expected.append((output.loss.item(), output.feature_acts.bool().sum(0), trainer.sae))
    gradients = {name: torch.stack([s.get_parameter(name).grad for *_, s in expected]) for name in NAMES}
    stack = _Stack(trainers, [[torch.get_rng_state()]] * 3)
    loss, fired = stack._loss(*rows.split([K, V], dim=-1), dead)
    loss.backward()
    assert loss.item() == pytest.approx(sum(value for value, *_ in expected), rel=1e-12)
    assert torch.equal(fired, torch.stack([each for _, each, _ in expected]).float())
    for name in NAMES:
        torch.testing.assert_close(stack.parameters[name].grad, gradients[name], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("changes", CHANGES)
def test_each_dictionary_is_the_one_that_trains_alone(changes: dict[str, Any]) -> None:
    configs = [config(seed, **changes) for seed in (0, 1, 2)]
    rows = [writes(0), writes(0), writes(1)]
    together = train_many_on_writes(configs, rows)
    for cfg, each, sae in zip(configs, rows, together):
        alone = train_on_writes(cfg, each.keys, each.values)
        torch.testing.assert_close(state(sae), state(alone), **CLOSE)
        assert sae.cfg.metadata.l0 == pytest.approx(alone.cfg.metadata.l0)
        assert sae.cfg.metadata.num_dead_features == alone.cfg.metadata.num_dead_features
        assert sae.start_cosine() == pytest.approx(alone.start_cosine())


def test_numbers_of_active_atoms_may_differ() -> None:
    configs = [config(0, k=k) for k in (1, 4)]
    for cfg, sae in zip(configs, train_many_on_writes(configs, [writes(), writes()])):
        alone = train_on_writes(cfg, writes().keys, writes().values)
        torch.testing.assert_close(state(sae), state(alone), **CLOSE)


def test_a_stack_is_made_again_bit_for_bit_and_shares_no_memory() -> None:
    configs, rows = [config(seed, dtype="float32") for seed in (0, 1, 2)], [writes(0, torch.float32)] * 3
    before = torch.get_rng_state()
    three = train_many_on_writes(configs, rows)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    for sae, again in zip(three, train_many_on_writes(configs, rows)):
        assert all(torch.equal(value, state(again)[name]) for name, value in state(sae).items())
    three[1].v.data.zero_()
    assert three[0].v.abs().min() > 0


@pytest.mark.filterwarnings("ignore::UserWarning")  # of SAELens, on a config without a model
def test_a_metric_is_folded_in() -> None:
    g = torch.Generator().manual_seed(0)
    sides = [torch.randn(n, n, generator=g, dtype=torch.float64) for n in (K, V)]
    key_side, value_side = (side @ side.mT + torch.eye(len(side)) for side in sides)
    metric = Metric.of(key_side, value_side, 1.0, 0.1, 8)
    cfg = config(3, metric="gauss_newton")
    (sae,) = train_many_on_writes([cfg], [writes()], [metric])
    alone = train_on_writes(cfg, writes().keys, writes().values, metric=metric)
    torch.testing.assert_close(state(sae), state(alone), **CLOSE)


def test_what_has_another_shape_trains_alone() -> None:
    tied, plain = config(0, encoder="tied"), config(0)
    assert shape_of(tied) is None
    assert shape_of(config(1, k=1)) == shape_of(plain) != shape_of(config(0, d_sae=16))
    assert shape_of(dataclasses.replace(plain, n_checkpoints=2, checkpoint_path="x")) is None
    done: list[int] = []
    a, b = train_many_on_writes([tied, plain], [writes(), writes()], say=done.append)
    torch.testing.assert_close(state(a), state(train_on_writes(tied, writes().keys, writes().values)))
    assert b.cfg.encoder == "bilinear" and done == [1, 2]


def test_what_does_not_fit_is_refused_before_any_training() -> None:
    done: list[int] = []
    with pytest.raises(ValueError, match="K, V"):
        train_many_on_writes([config(0), config(1, d_k=V, d_v=K)], [writes(), writes()], say=done.append)
    with pytest.raises(ValueError, match="NaN"):
        broken = writes()
        broken.keys[:] = torch.nan
        train_many_on_writes([config(0)], [broken])
    assert not done
