"""Logit change: small edits are predicted, rows equal full forwards, and verdicts of tables whose answers are known."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import VOCAB, KeepFloat64, hooked_in_float64
from sae_lens.saes.sae import SAEMetadata
from torch import Tensor

from hookpoints import HookedRecurrent, embedded
from sae_lens_writesae.errors import NothingToMeasureError
from sae_lens_writesae.sae import WriteTopKSAE, WriteTopKSAEConfig
from sae_lens_writesae.sae.target import HeadHook
from writesae.evaluations.logit_change import SCORED, ZERO_ATOM, ZERO_WRITE, LogitChange
from writesae.experiment.evaluation import Result
from writesae.experiment.firings import collect_firings
from writesae.verdict.fits import error_order, per_cell_table, score, scores_table, with_control

SMALL: dict[str, Any] = {
    "n_atoms": 3,
    "firings_per_atom": 2,
    "horizons": (0, 3),
    "ranks": ((1, 1), (2, 5)),
    "eps": (1e-5, 1e-4),
    "first_position": 4,
}

float64 = pytest.mark.usefixtures("_keep_float64")

tiny = lru_cache(maxsize=4)(partial(hooked_in_float64, backend="recurrence"))


def some_tokens(n: int = 3, length: int = 24) -> Tensor:
    return torch.randint(1, VOCAB, (n, length), generator=torch.Generator().manual_seed(1))


def make_sae(model: HookedRecurrent, layer: int | None = None, rank: int = 1) -> WriteTopKSAE:
    """Untrained: its atoms are random, which is all that plumbing needs."""
    layer = model.cfg.recurrent_layers[0] if layer is None else layer
    shape = model.cfg.layer(layer)
    torch.manual_seed(0)
    meta = SAEMetadata(hook_name=f"blocks.{layer}.mixer.heads.{shape.H - 1}.hook_write_vec")
    sizes = {"d_in": shape.K * shape.V, "d_k": shape.K, "d_sae": 24, "k": 3, "rank": rank, "dtype": "float64"}
    return WriteTopKSAE(WriteTopKSAEConfig(**sizes, metadata=meta))


def run(
    model: HookedRecurrent, sae: WriteTopKSAE | None = None, tokens: Tensor | None = None, **changes: Any
) -> Result:
    tokens = some_tokens() if tokens is None else tokens
    return LogitChange(**SMALL | changes).run(model, make_sae(model) if sae is None else sae, tokens, progress=False)


@pytest.fixture(scope="module")
def result() -> Result:
    with KeepFloat64():
        return run(tiny("mamba2"))


# -- measuring


@float64
@pytest.mark.parametrize(("kind", "eps"), [("qwen3_5", 1e-5), ("mamba2", 1e-3), ("kimi_linear", 1e-2)])
def test_small_edits_are_predicted_and_what_is_left_is_curvature(kind: str, eps: float) -> None:
    model = tiny(kind)
    small = run(model, make_sae(model, rank=2), some_tokens(8), n_atoms=6, eps=(eps, 3 * eps))
    assert (
        score(small.tables["scores"], "F2", eps=eps)["r2"] > 0.999
        and score(small.tables["scores"], "F2", quantity="log_prob", eps=eps)["r2"] > 0.999
    )
    assert error_order(small.tables["cells"]) == pytest.approx(2, abs=0.2)
    claim = small.claims()[2]
    assert claim.outcome == "holds", claim


@float64
def test_rows_equal_full_forwards_with_the_write_changed_by_hand(result: Result) -> None:
    model = tiny("mamba2")
    sae, tokens = make_sae(model), some_tokens()
    layer = model.cfg.recurrent_layers[0]
    head = model.cfg.layer(layer).H - 1
    rows = result.tables["cells"].query("eps == 1e-4")
    assert set(rows["rank"]) == {"1", "2-5"} and set(rows["horizon"]) == {0, 3}
    assert len(rows) == 2 * 2 * 2 * int(str(result.info["n_firings"]))
    for row in rows.itertuples():
        sequence = tokens[row.sequence][None]
        with torch.no_grad():
            plain = model(sequence)[0]
            write = model.recurrence(sequence, layer).write(head)[0, row.position, 0]
            atom = sae.W_dec[row.atom].detach().double().view_as(write)
            edit = row.eps * write.norm() * atom / atom.norm()

            def hook(writes: Tensor, hook: object, position: int = row.position, edit: Tensor = edit) -> Tensor:
                writes = writes.clone()
                writes[0, position] += edit
                return writes

            name = f"blocks.{layer}.mixer.heads.{head}.hook_write"
            edited = model.run_with_hooks(sequence, fwd_hooks=[(name, hook)])[0]
        assert row.unit == pytest.approx(float(write.norm()), rel=1e-6)
        at = row.position + row.horizon
        if row.quantity == "log_prob":
            plain, edited = plain.log_softmax(-1), edited.log_softmax(-1)
        assert row.measured == pytest.approx(float(edited[at, row.token] - plain[at, row.token]), rel=1e-4, abs=1e-12)
        assert row.native_rank == 1 + int((plain[at] > plain[at, row.token]).sum())
        low, high = (1, 1) if row.rank == "1" else (2, 5)
        assert low <= row.native_rank <= high


@float64
def test_batches_and_repeats_change_nothing(result: Result) -> None:
    again = run(tiny("mamba2"), rows_per_run=1).tables["cells"]
    pd.testing.assert_frame_equal(again, result.tables["cells"], rtol=1e-5, atol=1e-13)
    other = run(tiny("mamba2"), seed=1).tables["cells"]
    assert not other[["atom", "position"]].equals(again[["atom", "position"]])


@float64
def test_nothing_is_left_behind_and_inference_mode_is_no_obstacle(result: Result) -> None:
    model, tokens = tiny("mamba2"), some_tokens()
    with torch.no_grad():
        before = model(tokens)
    with torch.inference_mode():
        again = run(model, make_sae(model), tokens.clone())
    pd.testing.assert_frame_equal(again.tables["cells"], result.tables["cells"])
    with torch.no_grad():
        assert torch.equal(model(tokens), before)
    assert all(parameter.grad is None for parameter in model.hf_model.parameters())
    assert not any(len(point.fwd_hooks) for point in model.hook_dict.values())


@float64
def test_the_coefficient_as_unit() -> None:
    model = tiny("mamba2")
    sae = make_sae(model)
    by_coefficient = run(model, sae, unit="coefficient")
    firings = (
        collect_firings(model, sae, HeadHook.of(sae).layer, some_tokens())
        .frame()
        .set_index(["sequence", "position", "atom"])
    )
    for row in by_coefficient.tables["cells"].drop_duplicates("firing").itertuples():
        activation = firings.loc[(row.sequence, row.position, row.atom), "activation"]
        size = float(activation) * float(sae.W_dec[row.atom].detach().norm())
        assert row.unit == pytest.approx(size, rel=1e-5)
    assert "own coefficient" in by_coefficient.notes()[0]


@float64
def test_a_score_that_was_not_measured_is_named(result: Result) -> None:
    with pytest.raises(KeyError, match="there are"):
        score(result.tables["scores"], "F2", eps=7)


def test_mamba2_is_set_beside_the_papers_number(result: Result) -> None:
    (claim,) = [claim for claim in result.claims() if claim.number == 7]
    assert "the paper reports -0.07" in claim.measured and claim.n == 4 * int(str(result.info["n_firings"]))


def test_held_out_positions_of_the_embedded_model() -> None:
    model = HookedRecurrent.from_pretrained("embedded", device="cpu")
    ids = model.to_tokens(embedded.text("test")[:3000])[0]
    evaluation = LogitChange(n_atoms=6, firings_per_atom=1, eps=(0.1, 0.3))
    measured = evaluation.run(model, make_sae(model, 2), ids[: 6 * 40].view(6, 40), progress=False)
    for horizon in evaluation.horizons:
        assert score(measured.tables["scores"], "F2", horizon=horizon, eps=0.1)["r2"] > 0.95
    medians = measured.tables["per_cell"].query("quantity == 'logit'").set_index("predictor")["median_r2"]
    assert score(measured.tables["scores"], "F0", eps=0.1)["r2"] < 0.5 < medians["shuffled"]
    assert 0 <= float(str(measured.info["floor"])) < 1e-4


# -- judging, on tables whose answers are known


def made_up(*, curve: float = 0.0, first: float = 0.0, noise: float = 1.0) -> pd.DataFrame:
    """Cells whose change is `s eps + curve s eps^2` with F2 = s eps; F0 = first s eps + noise."""
    rng = np.random.default_rng(0)
    index = pd.MultiIndex.from_product(
        [["log_prob", "logit"], range(40), [0, 4], ["1", "50"]], names=["quantity", "firing", "horizon", "rank"]
    )
    slope = rng.normal(size=len(index))
    wrong = first * slope + noise * rng.normal(size=len(index))
    frames = []
    for eps in (0.1, 1.0):
        table = index.to_frame(index=False).assign(eps=eps, F0=eps * wrong, F1=eps * wrong, F2=eps * slope)
        frames.append(table.assign(measured=slope * eps * (1 + curve * eps)))
    cells = pd.concat(frames, ignore_index=True)
    extra = {"position": 3, "atom": 0, "unit": 1.0, "token": 1, "native_rank": 1}
    return with_control(cells.assign(sequence=cells["firing"] // 4, **extra), "F2", 0)


def made_result(cells: pd.DataFrame, floor: float = 1e-9) -> Result:
    evaluation = LogitChange(horizons=(0, 4), ranks=((1, 1), (50, 50)), eps=(0.1, 1.0))
    tables = {"cells": cells, "scores": scores_table(cells, SCORED), "per_cell": per_cell_table(cells, SCORED)}
    return Result(evaluation, {"rule": "Gated DeltaNet", "floor": floor, "label": "made up"}, tables)


def outcomes(result: Result) -> list[str]:
    """Of F0, F1 and F2."""
    return [claim.outcome for claim in result.claims()][:3]


@pytest.mark.parametrize(
    "cells, rule, expected",
    [
        (made_up(first=2.0, noise=0.1), "Gated DeltaNet", {22: "holds"}),  # a factor of 2 is what a scale is for
        (made_up(first=0.3, noise=1.0), "Mamba-2", {22: "fails", 23: "fails"}),  # F0 is mostly noise
        (made_up(noise=1.0).assign(F1=lambda t: 3 * t["measured"]), "Mamba-2", {22: "fails", 23: "holds"}),
        (made_up(first=1.0, noise=0.0).assign(shuffled=lambda t: t["F2"]), "Mamba-2", {22: "confounded"}),
    ],
)
def test_the_rebuttals_numbers_are_held_out(cells: pd.DataFrame, rule: str, expected: dict[int, str]) -> None:
    result = made_result(cells)
    result = Result(result.evaluation, result.info | {"rule": rule}, result.tables)
    found = {claim.number: claim for claim in result.claims() if claim.number in (22, 23)}
    assert (23 in found) == (rule == "Mamba-2")
    assert {number: found[number].outcome for number in expected} == expected
    assert "at 10 of the rebuttal's 5,000 positions" in found[22].measured


def test_verdicts() -> None:
    wrong = made_result(made_up())
    assert outcomes(wrong) == ["confounded", "fails", "holds"]
    assert "reach 1.000 as well" in wrong.claims()[0].sentence
    assert outcomes(made_result(made_up(first=1, noise=0.1))) == ["holds", "holds", "holds"]
    curved = made_result(made_up(curve=10.0))
    assert outcomes(curved)[2] == "fails" and "eps^2.00" in curved.claims()[2].sentence
    assert outcomes(made_result(made_up(), floor=10.0)) == ["below the floor"] * 3
    jumping = made_up()  # what an eps-free change does: no scale per cell helps
    jumping["measured"] = np.random.default_rng(1).normal(size=len(jumping))
    assert outcomes(made_result(jumping)) == ["fails", "fails", "fails"]
    few = made_up()
    assert outcomes(made_result(few[few["sequence"] < 4])) == ["inconclusive"] * 3


def test_a_formula_that_the_shuffled_control_equals_is_confounded() -> None:
    """Where every firing does the same, the control knows as much as the formula."""
    cells = made_up()
    for name in ("measured", "F0", "F1", "F2", "shuffled"):
        cells[name] = cells["eps"] * np.where(cells["horizon"] == 0, 1.0, -1.0) * np.where(cells["rank"] == "1", 2, 1)
    assert outcomes(made_result(cells)) == ["confounded"] * 3


def test_a_world_without_change_is_said_not_scored() -> None:
    still = made_result(made_up().assign(measured=0.0))
    assert still.tables["scores"].empty and still.tables["per_cell"].empty
    assert outcomes(still) == ["below the floor"] * 3
    assert still.figures() == [] and still.notes() == []


def test_a_horizon_below_the_floor_is_not_held_against_f2() -> None:
    cells = made_up()
    late = cells["horizon"] == 4
    cells.loc[late, "measured"] = 1e-12 * np.random.default_rng(0).normal(size=int(late.sum()))
    cells.loc[late, "F2"] = 0.0
    assert outcomes(made_result(cells))[2] == "holds"
    assert outcomes(made_result(cells, floor=1e-15))[2] == "fails"


# -- bad input


@float64
def test_bad_input() -> None:
    model = tiny("mamba2")
    sae = make_sae(model)
    for changes, words in (
        ({"tokens": some_tokens(length=7)}, "8 tokens"),
        ({"tokens": some_tokens(1)}, "2 sequences"),
        ({"ranks": (1, (60, 65))}, "64 tokens"),
        ({"atoms": (999,)}, "999"),
    ):
        with pytest.raises(ValueError, match=words):
            run(model, sae, **changes)
    with torch.no_grad():
        sae.b_enc.fill_(-1e6)
    with pytest.raises(NothingToMeasureError):
        run(model, sae)


@float64
def test_writes_and_atoms_of_zero_are_left_out() -> None:
    model = tiny("qwen3_5", seed=5)
    sae = make_sae(model)
    with torch.no_grad():
        sae.b_enc.fill_(1.0)
        sae.w[:12] = 0
    every = {"n_atoms": None, "horizons": (0,)}
    measured = run(model, sae, **every)
    skipped = measured.info["n_skipped"]
    assert isinstance(skipped, dict) and set(skipped) == {ZERO_ATOM} and measured.tables["cells"]["atom"].min() >= 12
    with torch.no_grad():
        for name, parameter in model.hf_model.named_parameters():
            if name.endswith("linear_attn.in_proj_qkv.weight"):
                parameter.zero_()
    with pytest.raises(NothingToMeasureError, match=ZERO_WRITE):
        run(model, sae, **every)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"eps": (0.1,)}, "eps"),
        ({"eps": (0.0, 1.0)}, "eps"),
        ({"horizons": (-1,)}, "horizons"),
        ({"horizons": ()}, "horizons"),
        ({"horizons": (1, 1)}, "horizons"),
        ({"ranks": ((3, 2),)}, "ranks"),
        ({"unit": "parsec"}, "parsec"),
        ({"n_atoms": 0}, "n_atoms"),
    ],
)
def test_bad_settings(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        LogitChange(**changes)


def test_settings_survive_json() -> None:
    settings: dict[str, Any] = {"horizons": [4, 0], "ranks": [1, [2, 5]], "eps": [3, 1], "atoms": [2, 1]}
    evaluation = LogitChange(**settings)
    assert evaluation.horizons == (0, 4) and evaluation.ranks == ((1, 1), (2, 5)) and evaluation.eps == (1.0, 3.0)
    assert evaluation.atoms == (1, 2) and LogitChange(**evaluation.to_dict()) == evaluation
