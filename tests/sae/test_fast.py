"""Training on factors: the step is SAELens' own on matrices, and dictionaries that train together are those that train
alone."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens import LoggingConfig
from saes import runner_config, train_step
from torch import Tensor, nn

from sae_lens_writesae import train
from sae_lens_writesae.atom.low_rank import LowRank
from sae_lens_writesae.sae import TRAINING, fast, fused
from sae_lens_writesae.sae import rows as rows_
from sae_lens_writesae.sae.metric import Metric

K, V, F, N = 6, 4, 24, 900
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def writes(seed: int = 0, dtype: torch.dtype = torch.float64, terms: int = 1) -> LowRank:
    """Writes near 8 directions."""
    g = torch.Generator().manual_seed(seed)
    which = torch.randint(8, (N,), generator=g)
    sides = [torch.randn(8, terms, n, generator=g)[which] + 0.2 * torch.randn(N, terms, n, generator=g) for n in (K, V)]
    return LowRank(*sides).to(dtype)


def config(seed: int = 0, steps: int = 6, name: str = "writesae_topk", **changes: Any) -> Any:
    options: dict[str, Any] = {"d_in": K * V, "d_k": K, "d_v": V, "d_sae": F, "dtype": "float64"}
    options |= {"k": 2} if name == "writesae_topk" else {}
    options |= {"resample_every": 4, "unit_norm_every": 3, "decoder_init": "native"}
    # Not 1: with one active atom of unit norm, equal to its encoder, the gradient of the activation is exactly zero,
    # and Adam makes steps of its rounding.
    options |= {"decoder_init_norm": 0.7} | changes
    hook = "blocks.1.mixer.heads.0.hook_write_vec"
    return runner_config(TRAINING[name][1](**options), steps, 32, hook_name=hook, seed=seed, dead_feature_window=1)


def state(sae: nn.Module) -> dict[str, Tensor]:
    """Weights and BatchTopK's threshold, without the atoms of the start: where rows are resampled they are of fp32."""
    tensors = sae.state_dict()
    return {name: tensors[name] for name in (*dict(sae.named_parameters()), "topk_threshold") if name in tensors}


@st.composite
def on_factors(draw: Any) -> dict[str, Any]:
    """Fields of a config that trains on factors. Few active atoms a row, and all; BatchTopK's rows may have more."""
    name = draw(st.sampled_from(["writesae_topk", "writesae_batchtopk"]))
    few = [1, 2, 5] if name == "writesae_topk" else [0.5, 2.5, 5]
    rescaled = draw(st.booleans())
    return {
        "name": name,
        "k": draw(st.sampled_from([*few, F])),
        "rank": draw(st.integers(1, 2)),
        "encoder": draw(st.sampled_from(["bilinear", "tied"])),
        "apply_b_dec_to_input": draw(st.booleans()),
        "rescale_acts_by_decoder_norm": rescaled,
        "unit_norm_every": 3 if rescaled else 0,
        "aux_loss_coefficient": draw(st.sampled_from([0.0, 0.3])),
    }


WIDE: dict[str, Any] = {"d_in": 96, "d_k": 12, "d_v": 8}
"""Large enough that the loss of dead atoms takes inner products, and not matrices as with K V."""


@settings(max_examples=40, deadline=None, derandomize=True)
@given(on_factors(), st.sampled_from([{}, WIDE]), st.integers(1, 2), st.sampled_from([fused.BLOCK, 64]), st.booleans())
def test_losses_and_gradients_are_those_of_the_dense_step(
    fields: dict[str, Any], shape: dict[str, Any], terms: int, block: int, in_double: bool
) -> None:
    """SAELens' own losses, that of dead atoms among them, and autograd, for three dictionaries side by side."""
    g, real = torch.Generator().manual_seed(1), torch.float64 if in_double else torch.float32
    saes: list[Any] = [rows_.new_sae(config(seed, **fields | shape)) for seed in (0, 1, 2)]
    for sae in saes:
        for parameter in sae.parameters():
            parameter.data = torch.randn(parameter.shape, generator=g, dtype=parameter.dtype)
        getattr(sae, "encoder_scale", torch.ones(F)).uniform_(0.5, 2.0, generator=g)
    cfg = saes[0].cfg
    dead = torch.rand(3, F, generator=g) < torch.tensor([0.0, 0.2, 0.6])[:, None]
    keys, values = (torch.randn(3, 32, terms, n, generator=g, dtype=torch.float64) for n in (cfg.d_k, cfg.d_v))
    outputs = [train_step(sae, LowRank(keys[m], values[m]), 1, dead[m]) for m, sae in enumerate(saes)]
    stacked, buffers = torch.func.stack_module_state(saes)
    p = {name: nn.Parameter(x.data.to(real)) for name, x in stacked.items()}
    p_and_buffers: dict[str, Any] = p | {name: x.to(real) for name, x in buffers.items()}
    few = fused.Dead(dead, int(dead.sum(1).max()) + 2)  # a bound, as on a device that is not waited for
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "BLOCK", block)
        done = fused.step_on_writes(
            p_and_buffers, keys.to(real), values.to(real), [cfg.k] * 3, cfg, few if cfg.aux_loss_coefficient else None
        )
    pairs = [(done.errors.mean(1), [output.losses["mse_loss"] for output in outputs])]
    if done.aux is not None:
        auxiliary = [output.losses["auxiliary_reconstruction_loss"] for output in outputs]
        pairs.append((cfg.aux_loss_coefficient * done.aux, auxiliary))
    for output in outputs:
        output.loss.backward()
    pairs += [(parameter.grad, [sae.get_parameter(name).grad for sae in saes]) for name, parameter in p.items()]
    for fused_step, saelens_steps in pairs:
        dense = torch.stack([x.detach().double() for x in saelens_steps])
        assert (fused_step - dense).abs().max() <= (1e-10 if in_double else 5e-5) * dense.abs().max()
    active = torch.stack([output.feature_acts.to_dense().bool().sum(0) for output in outputs])
    counts = torch.zeros(active.numel()).index_add_(0, done.atoms.flatten(), (done.code > 0).flatten().float())
    assert torch.equal(counts.view_as(active), active.float())


@pytest.mark.parametrize("F, k", [(1024, 16), (96, 5), (40, 1)])
def test_atoms_on_top_are_exact(F: int, k: int) -> None:
    scores = torch.randn(2, 7, F, generator=torch.Generator().manual_seed(0))
    assert torch.equal(fused.top_atoms(scores, k, ordered=True), scores.topk(k).indices)


@pytest.mark.parametrize("terms, rank", [(1, 2), (2, 1)])
def test_writes_start_the_atoms_that_their_matrices_start(terms: int, rank: int) -> None:
    saes: list[Any] = [rows_.new_sae(config(rank=rank)) for _ in range(2)]
    rows = writes(terms=terms)
    for sae, x in zip(saes, (rows, rows.dense().flatten(1))):
        with rows_.seeded(0, 0):
            n = sae.start_from_rows(x)
    torch.testing.assert_close(saes[0].W_dec, saes[1].W_dec, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(saes[0].v[:n].norm(dim=-1), saes[0].w[:n].norm(dim=-1))
    assert n >= 6


@settings(max_examples=8, deadline=None, derandomize=True)
@given(on_factors(), st.sampled_from(["none", "expected_average_only_in"]))
def test_each_dictionary_is_the_one_that_trains_alone(fields: dict[str, Any], normalize: str) -> None:
    configs = [config(seed, **fields, normalize_activations=normalize) for seed in (0, 1, 2)]
    configs[2].sae.k = 1  # numbers of active atoms may differ
    assert len({fast.shape_of(cfg) for cfg in configs} - {None}) == 1
    configs.insert(1, config(name="writesae_standard"))  # of another shape, trained by itself on rows
    rows = [writes(0), writes(0), writes(0), writes(1) * 3.0]
    for cfg, each, sae in zip(configs, rows, train(configs, rows)):
        alone = train(cfg, each)
        assert sae.cfg.architecture() == cfg.sae.architecture()
        torch.testing.assert_close(state(sae), state(alone), **CLOSE)
        assert sae.cfg.metadata.l0 == pytest.approx(alone.cfg.metadata.l0)
        assert sae.cfg.metadata.num_dead_features == alone.cfg.metadata.num_dead_features


@settings(max_examples=10, deadline=None, derandomize=True)
@given(on_factors())
def test_a_run_is_the_one_of_saelens_trainer(fields: dict[str, Any]) -> None:
    """On the same rows from the same start; the output bias is then calibrated by one and averaged by the other."""
    cfg = config(steps=12, **fields, b_dec_rows=0, decoder_init="random", resample_every=0)
    matrices = rows_.train_on_rows(cfg, rows_.rows_of_writes(cfg, writes()))
    torch.testing.assert_close(state(train(cfg, writes())), state(matrices), rtol=1e-7, atol=1e-9)


def test_a_seed_is_a_dictionary_and_shares_no_memory() -> None:
    configs, rows = [config(seed, dtype="float32") for seed in (0, 1, 2)], [writes(0, torch.float32)] * 3
    before = torch.get_rng_state()
    three = train(configs, rows)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    for sae, again in zip(three, train(configs, rows)):
        torch.testing.assert_close(state(sae), state(again), rtol=0, atol=0)
    assert not torch.allclose(three[0].v, three[1].v)
    three[1].v.data.zero_()
    assert three[0].v.abs().min() > 0


def test_reconstructions_are_right_on_average() -> None:
    rows = writes(dtype=torch.float32)
    x = rows.dense().flatten(1)
    residual = (x - train(config(steps=30, dtype="float32"), rows)(x)).detach()
    assert residual.mean(0).square().sum() < 1e-6 * x.square().sum(1).mean()


@pytest.mark.filterwarnings("ignore::UserWarning")  # of SAELens, on a config without a model
@pytest.mark.parametrize(("encoder", "normalize"), [("bilinear", "expected_average_only_in"), ("tied", "none")])
def test_a_metric_is_folded_in(encoder: str, normalize: str) -> None:
    """Rows are scaled as the dictionary sees them: after the metric."""
    g = torch.Generator().manual_seed(0)
    sides = [torch.randn(n, n, generator=g, dtype=torch.float64) for n in (K, V)]
    metric = Metric.of(*(side @ side.mT + torch.eye(len(side)) for side in sides), 1.0, 0.1, 8)
    how = {"encoder": encoder, "normalize_activations": normalize, "b_dec_rows": 0}
    cfg, rows = config(3, metric="gauss_newton", **how), writes()
    sae = train(cfg, rows, metric=metric)
    moved = metric.move(rows)
    plain = metric.fold(train(config(3, **how), moved))
    torch.testing.assert_close(state(sae), state(plain), **CLOSE)


def test_numbers_are_logged_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    logged: list[dict[str, float]] = []
    monkeypatch.setattr("wandb.sdk.wandb_run.Run.log", lambda run, data, step: logged.append(data | {"at": step}))
    configs = [config(seed) for seed in (0, 1)]
    for cfg in configs:
        cfg.logger = LoggingConfig(log_to_wandb=True, wandb_project="p", wandb_log_frequency=3)
    train(configs, [writes(), writes()])
    assert [each["at"] for each in logged] == [3, 3, 6, 6]
    assert 0 < logged[-1]["metrics/explained_variance"] < 1 and 0 < logged[-1]["metrics/l0"] <= 2


def test_every_row_is_seen_equally_often() -> None:
    drawn = torch.cat(list(islice(rows_.row_orders(10, 4, seed=1), 10)))
    assert drawn.bincount().tolist() == [4] * 10 and drawn[:10].tolist() != sorted(drawn[:10].tolist())
    assert len({tuple(epoch) for epoch in drawn.view(4, 10).tolist()}) == 4
    assert torch.equal(next(rows_.row_orders(10, 4, seed=1, step=7)), drawn[28:32])


def test_matrices_are_the_sums_of_their_rows() -> None:
    """Those of BatchTopK in SAELens' own step, however large they are."""
    matrices = torch.randn(96, 64, 64, generator=torch.Generator().manual_seed(0))
    shape = {"d_in": 64 * 64, "d_k": 64, "d_v": 64, "dtype": "float32", "k": 2}
    for name in ("writesae_topk", "writesae_batchtopk"):
        cfg = config(0, 3, name, **shape)
        cfg.hook_name = cfg.hook_name.replace("write", "state")
        sae = train(cfg, matrices)
        rows = LowRank(torch.eye(64).expand(96, -1, -1), matrices)
        torch.testing.assert_close(state(sae), state(train(cfg, rows)), rtol=0, atol=0)
        assert float(sae.state_dict().get("topk_threshold", 1)) > 0


def test_swapped_sides_are_refused() -> None:
    swapped = LowRank(writes().values, writes().keys)
    for data in (swapped, swapped.dense()):
        with pytest.raises(ValueError, match=r"d_k, d_v, d_in: expected .*\(4, 6, 24\).*, got \(6, 4, 24\)"):
            train(config(), data)


@pytest.mark.parametrize(
    ("configs", "data", "message"),
    [
        (
            [config(0), config(name="writesae_jumprelu")],
            [writes(), writes()],
            "checkpoint: .* one shape, got 2",
        ),
        ([config(0), config(1)], [writes()], "shorter"),
        ([config()], [writes() * torch.nan], "NaN"),
        ([config(metric="gauss_newton")], [writes()], "metric: expected one"),
    ],
    ids=["shapes", "lengths", "NaN", "metric"],
)
def test_what_does_not_fit_is_refused(configs: list[Any], data: list[Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        train(configs, data, checkpoint=tmp_path / "run")
