"""The substitution test end to end, exact against full forwards with the write replaced by hand (embedded model)."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sae_lens.saes.sae import SAEMetadata
from torch import Tensor

from hookpoints import HookedRecurrent, embedded
from sae_lens_writesae import substitution
from sae_lens_writesae.conditions import CONTROLS, SCALES
from sae_lens_writesae.firings import collect_firings
from sae_lens_writesae.head_memory import half_lives, head_writes
from sae_lens_writesae.sae import WriteTopKSAE, WriteTopKSAEConfig
from sae_lens_writesae.substitution_config import SubstitutionConfig
from sae_lens_writesae.substitution_draw import draw
from sae_lens_writesae.substitution_result import METRICS

LAYER, HEAD, T = 2, 3, 40
SMALL = SubstitutionConfig(
    n_atoms=4, firings_per_atom=2, horizon=5, mean_write_sequences=2, last_position_firings=None, mean_write_energy=0.9
)


@pytest.fixture(scope="module")
def model() -> Any:
    """Float64 throughout, so that two ways to the same number agree to more than KL needs."""
    return HookedRecurrent.from_pretrained("embedded", dtype=torch.float64, backend="recurrence", device="cpu")


@pytest.fixture(scope="module")
def tokens(model: Any) -> Tensor:
    ids = model.to_tokens(embedded.text("test")[:2000])[0]
    return ids[: 3 * T].view(3, T)


def make_sae(model: Any, target: str = "write", rank: int = 1) -> Any:
    """Untrained: its atoms are random, which is all that plumbing needs."""
    shape = model.cfg.layer(LAYER)
    torch.manual_seed(0)
    hook = f"blocks.{LAYER}.mixer.heads.{HEAD}.hook_{target}_vec"
    config = WriteTopKSAEConfig(
        d_in=shape.K * shape.V, d_sae=24, k=3, d_k=shape.K, rank=rank, metadata=SAEMetadata(hook_name=hook)
    )
    return WriteTopKSAE(config)


@pytest.fixture(scope="module")
def result(model: Any, tokens: Tensor) -> Any:
    return run_substitution(model, make_sae(model), tokens, SMALL)


def changed(**fields: Any) -> SubstitutionConfig:
    return SubstitutionConfig(**SMALL.to_dict() | fields)


def run_substitution(model: Any, sae: Any, tokens: Tensor, config: SubstitutionConfig) -> Any:
    return substitution.run_substitution(model, sae, tokens, config, progress=False)


def replaced_by_hand(model: Any, sequence: Tensor, position: int, written: Tensor) -> Tensor:
    """Logits [T,vocab] of a full forward in which hook_write gives `written` [K,V] at `position`."""

    def hook(writes: Tensor, hook: Any) -> Tensor:
        writes = writes.clone()
        writes[0, position] = written
        return writes

    with torch.no_grad():
        return model.run_with_hooks(
            sequence[None], fwd_hooks=[(f"blocks.{LAYER}.mixer.heads.{HEAD}.hook_write", hook)]
        )[0]


def metrics_by_hand(native: Tensor, patched: Tensor, t: int, horizon: int) -> list[float]:
    """METRICS from logits [T,vocab], position by position with torch's own KL."""
    log_p, log_q = native.log_softmax(-1), patched.log_softmax(-1)
    found = []
    for x, y in ((log_q, log_p), (log_p, log_q)):
        kl = torch.nn.functional.kl_div(x, y, log_target=True, reduction="none").sum(-1)
        found += [kl[t : t + horizon + 1].mean(), kl[t], kl[t + 1], kl[-1]]
    return [float(value) for value in found]


def test_every_condition_equals_a_full_forward_with_the_write_replaced(
    model: Any, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    measure = substitution.measure

    def spy(session: Any, edits: Any, positions: Any, to_end: Any, config: Any) -> Any:
        seen.append((session.tokens[0], edits, measure(session, edits, positions, to_end, config)))
        return seen[-1][-1]

    monkeypatch.setattr(substitution, "measure", spy)
    frame = run_substitution(model, make_sae(model), tokens, SMALL).frame
    checked = 0
    for sequence, edits, measured in seen:
        with torch.no_grad():
            native = model(sequence[None])[0]
            write = model.recurrence(sequence[None], LAYER).write(HEAD)[0, :, 0]
        for per_condition, values in zip(edits, measured):
            edit = per_condition[-1]
            dense = torch.zeros_like(write[0]) if edit.mode == "delete" else edit.keys.mT @ edit.values
            patched = replaced_by_hand(model, sequence, edit.position, dense)
            expected = metrics_by_hand(native, patched, edit.position, SMALL.horizon)
            np.testing.assert_allclose(values[-1], expected, rtol=1e-6, atol=1e-15)
            checked += 1
    assert checked == len(seen) * (2 + len(SCALES) * (1 + len(CONTROLS))) and frame[list(METRICS)].notna().all(
        axis=None
    )


def test_written_norms_and_the_tidy_table(result: Any) -> None:
    frame = result.frame
    n = frame["firing"].nunique()
    assert n == 8 and len(frame) == n * (2 + len(SCALES) * (1 + len(CONTROLS)))
    native = frame[frame["condition"] == "native"]
    assert np.allclose(native["norm"], native["write_norm"]) and (native["kl_window"] < 1e-15).all()
    assert (frame.loc[frame["condition"] == "delete", "norm"] == 0).all()
    matched = frame[frame["scale"] == "matched"]
    assert np.allclose(matched["norm"], matched["write_norm"], rtol=1e-5)
    scaled = frame[frame["scale"] != "none"]
    assert np.allclose(scaled.groupby(["firing", "scale"])["norm"].std(), 0, atol=1e-6)
    fit = frame[(frame["scale"] == "least_squares") & (frame["condition"] == "atom")]
    assert np.allclose(fit["norm"], fit["write_norm"] * fit["cosine"].abs(), rtol=1e-5)
    effects = frame.groupby("condition")["kl_window"].median()
    assert (effects.drop("native") > 1e-9).all()


def test_activations_and_cosines_are_those_of_the_sae_and_the_write(model: Any, tokens: Tensor, result: Any) -> None:
    sae = make_sae(model)
    for row in result.frame.drop_duplicates("firing").itertuples():
        with torch.no_grad():
            write = (
                model.recurrence(tokens[row.sequence][None], LAYER).write(HEAD)[0, row.position, 0].flatten().float()
            )
            activation = sae.encode(write[None])[0, row.atom]
        assert row.activation == pytest.approx(float(activation), rel=1e-5)
        assert row.cosine == pytest.approx(
            float(torch.cosine_similarity(write, sae.W_dec[row.atom].detach(), dim=0)), abs=1e-5
        )


def test_the_state_direction_is_that_of_the_state_after_the_write(model: Any, tokens: Tensor) -> None:
    config = changed(controls=("state",), scales=("matched",))
    row = run_substitution(model, make_sae(model), tokens, config).wide().iloc[0]
    sequence, t = tokens[int(row["sequence"])], int(row["position"])
    name = f"blocks.{LAYER}.mixer.heads.{HEAD}.hook_state"
    with torch.no_grad():
        native, cache = model.run_with_cache(sequence[None], names_filter=[name])
    left, _, right = torch.linalg.svd(cache[name][0, t])
    patched = replaced_by_hand(model, sequence, t, row["write_norm"] * left[:, :1] @ right[:1])
    assert row["state/matched"] == pytest.approx(metrics_by_hand(native[0], patched, t, SMALL.horizon)[0], rel=1e-6)


def test_batching_order_and_other_controls_change_nothing(model: Any, tokens: Tensor, result: Any) -> None:
    one_by_one = changed(rows_per_run=7, controls=("shuffled", "random"))
    again = run_substitution(model, make_sae(model), tokens, one_by_one).frame
    keys = ["firing", "condition", "scale"]
    both = again.merge(result.frame, on=keys, suffixes=("", "_first"))
    assert len(both) == len(again)
    for metric in METRICS:
        np.testing.assert_allclose(both[metric], both[f"{metric}_first"], rtol=1e-6, atol=1e-15)


def test_firings_that_stop_early_measure_the_same_window(model: Any, tokens: Tensor, result: Any) -> None:
    some = changed(last_position_firings=3)
    short = run_substitution(model, make_sae(model), tokens, some)
    assert short.frame.groupby("firing")["kl_last"].first().notna().sum() == 3
    assert len(short.wide("kl_last")) == 3 and len(short.wide()) == 8
    for metric in ("kl_window", "reverse_kl_at"):
        np.testing.assert_allclose(short.frame[metric], result.frame[metric], rtol=1e-6, atol=1e-15)


def test_corrected_writes_take_their_erase_along(model: Any, tokens: Tensor) -> None:
    """Deleting k u~^T leaves alpha S_{t-1}: the same as no write and no erase at t."""
    config = changed(write="corrected", controls=())
    wide = run_substitution(model, make_sae(model), tokens, config).wide()
    assert (wide["native"] < 1e-15).all()
    row = wide.iloc[0]
    sequence, t = tokens[int(row["sequence"])], int(row["position"])

    def silence(beta: Tensor, hook: Any) -> Tensor:
        beta = beta.clone()
        beta[0, t, HEAD] = 0
        return beta

    with torch.no_grad():
        native = model(sequence[None])[0]
        patched = model.run_with_hooks(sequence[None], fwd_hooks=[(f"blocks.{LAYER}.mixer.hook_beta", silence)])[0]
    assert row["delete"] == pytest.approx(metrics_by_hand(native, patched, t, SMALL.horizon)[0], rel=1e-6)


def test_state_trained_atoms_replace_the_write(model: Any, tokens: Tensor) -> None:
    sae = make_sae(model, "state")
    found = run_substitution(model, sae, tokens, SMALL)
    assert found.info.target == "state" and found.info.label == "state-trained"
    row = found.frame.iloc[0]
    recurrence = model.recurrence(tokens[row["sequence"]][None], LAYER)
    with torch.no_grad():
        state = recurrence.states(HEAD)[0, row["position"], 0].flatten().float()
        activation = sae.encode(state[None])[0, row["atom"]]
    assert row["activation"] == pytest.approx(float(activation), rel=1e-5)
    assert row["write_norm"] == pytest.approx(
        float(recurrence.write(HEAD)[0, row["position"], 0].detach().norm()), rel=1e-6
    )


def test_argmax_and_silent_positions(model: Any, tokens: Tensor) -> None:
    sae = make_sae(model)
    firings = collect_firings(model, sae, tokens)
    argmax: Any = draw(firings, changed(atom_choice="argmax")).table
    best = firings.strongest(argmax)
    assert (argmax["written_atom"] == best["atom"]).all() and (argmax["activation"] >= best["activation"]).all()
    silent = draw(firings, changed(positions="silent")).table
    fires = set(zip(firings.sequence, firings.position, firings.atom))
    assert not fires & set(zip(silent["sequence"], silent["position"], silent["atom"])) and len(silent) == 8
    config = changed(positions="silent", controls=(), scales=("matched",))
    assert len(run_substitution(model, sae, tokens, config).frame) == 8 * 3


def test_the_draw_is_seeded_and_says_what_it_drew_from(model: Any, tokens: Tensor) -> None:
    firings = collect_firings(model, make_sae(model), tokens)
    one, two = draw(firings, SMALL), draw(firings, SMALL)
    pd.testing.assert_frame_equal(one.table, two.table)
    other = draw(firings, changed(seed=1)).table
    assert not other.equals(one.table)
    assert one.alive_tokens == tokens.numel() and set(one.table["atom"]) <= set(one.alive)
    assert one.n_testable <= len(one.alive) <= 24
    picked = draw(firings, changed(atoms=tuple(one.alive[:2]))).table
    assert set(picked["atom"]) == set(one.alive[:2].tolist())


def test_errors(model: Any, tokens: Tensor) -> None:
    sae = make_sae(model)
    with pytest.raises(ValueError, match="T >= 18"):
        run_substitution(model, sae, tokens[:, :17], SubstitutionConfig())
    with pytest.raises(ValueError, match=r"\[999\] cannot be tested"):
        run_substitution(model, sae, tokens, SubstitutionConfig(atoms=(999,), horizon=5))
    with torch.no_grad():
        sae.b_enc.fill_(-1e6)
    with pytest.raises(ValueError, match="0 of 24 fire on 120 tokens"):
        run_substitution(model, sae, tokens, SMALL)


def test_rank_two_atoms(model: Any, tokens: Tensor) -> None:
    config = changed(controls=("random",), n_atoms=2)
    frame = run_substitution(model, make_sae(model, rank=2), tokens, config).frame
    matched = frame[frame["scale"] == "matched"]
    assert np.allclose(matched["norm"], matched["write_norm"], rtol=1e-5)


def test_float32_floor_is_exact(tokens: Tensor) -> None:
    model = HookedRecurrent.from_pretrained("embedded", device="cpu")
    config = changed(controls=())
    summary = run_substitution(model, make_sae(model), tokens, config).summary()
    assert summary.floor_is_exact and summary.floor < 1e-10


def test_half_life_counts_tokens_until_half_of_the_norm_is_gone(model: Any, tokens: Tensor) -> None:
    recurrence = model.recurrence(tokens[:1], LAYER)
    writes = head_writes(recurrence, HEAD, "additive")
    lives = half_lives(writes.recurrence, n_starts=3)
    limit, p = T // 2, recurrence.k[0, 0, HEAD]
    half, step = p.norm() / 2, 0
    while p.norm() >= half and step < limit:
        step += 1
        decay = recurrence.log_decay[0, step, HEAD].exp()
        p = decay * p + recurrence.a[0, step, HEAD] * (recurrence.b[0, step, HEAD] @ p)
    assert lives[0] == step and lives.max() <= limit
