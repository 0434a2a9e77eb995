"""Summaries of made-up results with a known answer, verdict rules, and saving."""

import json
from pathlib import Path
from typing import Any

import fake_substitution as fake
import numpy as np
import pandas as pd
import pytest
from fake_substitution import CONFOUNDED, FAILS, HOLDS, NO_EFFECT

from sae_lens_writesae.substitution_config import SubstitutionConfig
from sae_lens_writesae.substitution_evaluation import Substitution
from sae_lens_writesae.substitution_result import SubstitutionInfo, SubstitutionResult
from sae_lens_writesae.verdict import statistics as stats


def fake_result(*args: Any, **kwargs: Any) -> Any:
    return fake.fake_result(*args, **kwargs)


@pytest.fixture(scope="module")
def holds() -> Any:
    return fake_result(HOLDS)


@pytest.fixture(scope="module")
def summary(holds: Any) -> Any:
    return holds.summary()


@pytest.mark.parametrize(
    "medians, floor, outcome, controls",
    [
        (HOLDS, 0.0, "holds", ()),
        (FAILS, 0.0, "fails", ()),
        (CONFOUNDED, 0.0, "confounded", ("state",)),
        (NO_EFFECT, 1e-12, "below the floor", ()),
    ],
)
def test_verdicts(medians, floor, outcome, controls) -> None:
    verdicts = fake_result(medians, floor=floor, scales=("coefficient", "matched")).summary().verdicts
    assert {v.outcome for v in verdicts.values()} == {outcome}
    assert {v.controls for v in verdicts.values()} == {controls}
    assert set(verdicts) == {"coefficient", "matched"}


def test_a_control_that_beats_deletion_but_loses_to_the_atom_explains_nothing() -> None:
    summary = fake_result({"delete": 1.0, "atom": 0.1, "state": 0.5}, scales=("matched",)).summary()
    assert summary.rate("state", "delete", "matched")["boot_low"] > 0.5
    assert summary.verdicts["matched"].outcome == "holds"


def test_the_state_after_the_write_is_shown_and_confounds_nothing() -> None:
    summary = fake_result({"delete": 1.0, "atom": 0.3, "state_after": 0.01}, scales=("matched",)).summary()
    assert summary.rate("state_after", "delete", "matched")["boot_low"] > 0.5
    assert summary.rate("atom", "state_after", "matched")["boot_high"] < 0.5
    assert summary.verdicts["matched"].outcome == "holds"


@pytest.mark.parametrize("medians", [HOLDS, FAILS, CONFOUNDED])
@pytest.mark.parametrize("size", [(30, 1), (4, 10)])
def test_little_data_is_inconclusive(medians: Any, size: tuple[int, int]) -> None:
    """19 firings, or 4 sequences; and an interval that holds both chance and a relevant effect."""
    few = fake_result(medians, n_sequences=19 if size[1] == 1 else 4, per_sequence=size[1], scales=("matched",))
    assert few.summary().verdicts["matched"].outcome == "inconclusive"
    wide = fake_result({"delete": 1.0, "atom": 0.9}, n_sequences=20, per_sequence=2, scales=("matched",))
    assert wide.summary().verdicts["matched"].outcome == "inconclusive"


def test_a_control_that_is_neither_worse_nor_as_good_leaves_it_undecided() -> None:
    close = fake_result(
        {"delete": 1.0, "atom": 0.3, "state": 0.31}, n_sequences=20, per_sequence=3, scales=("matched",)
    )
    verdict = close.summary().verdicts["matched"]
    assert (verdict.outcome, verdict.controls) == ("undecided", ("state",))


def test_one_sequence_is_inconclusive_and_never_nan() -> None:
    one = Substitution.of(fake_result(HOLDS, n_sequences=1, per_sequence=40))
    assert {claim.outcome for claim in one.claims()} == {"inconclusive"}
    assert not any("nan" in claim.measured for claim in one.claims())


def test_claims_2_and_3_are_judged_at_matched_norm_with_intervals() -> None:
    def outcomes(medians: dict[str, float], **settings: Any) -> list[str]:
        return [c.outcome for c in Substitution.of(fake_result(medians, **settings)).claims() if c.number in (2, 3)]

    assert outcomes(HOLDS) == ["holds", "holds"]
    assert outcomes(FAILS) == ["fails", "fails"]
    assert outcomes(HOLDS | {"shuffled": 0.5}) == ["fails", "fails"]
    assert outcomes(NO_EFFECT, floor=1e-12) == ["below the floor", "below the floor"]
    assert outcomes({"delete": 1.0, "atom": 0.99, "shuffled": 1.01})[1] != "holds"  # in order, but by chance
    assert outcomes(HOLDS, scales=("coefficient",)) == ["not tested", "not tested"]


def test_without_controls_the_verdict_says_so() -> None:
    verdict = fake_result(HOLDS, controls=(), scales=("matched",)).summary().verdicts["matched"]
    assert verdict.outcome == "holds" and verdict.sentence.endswith("but no control was run.")


def test_numbers_are_those_of_the_statistics(holds: Any, summary: Any) -> None:
    wide = holds.wide()
    row = summary.rate("atom", "delete", "matched")
    rate = stats.win_rate(wide["atom/matched"], wide["delete"], wide["sequence"])
    assert row["rate"] == rate.rate == (wide["atom/matched"] < wide["delete"]).mean()
    assert (row["wilson_low"], row["boot_high"]) == (rate.wilson.low, rate.bootstrap.high)
    assert row["median_ratio"] == pytest.approx(np.median(wide["atom/matched"] / wide["delete"]))
    assert row["cliffs_delta"] == stats.cliffs_delta(wide["atom/matched"], wide["delete"])
    assert row["cliffs_delta"] != row["sign_rate"] == pytest.approx(1 - 2 * rate.rate)
    assert row["holm_p"] >= row["sign_flip_p"]
    chain = summary.chains.query("scale == 'matched'").set_index("chain")
    for last in ("shuffled", "random"):
        links: Any = (wide["atom/matched"] < wide["delete"]) & (wide["delete"] < wide[f"{last}/matched"])
        assert chain.loc[f"atom < delete < {last}", "rate"] == links.mean()
    assert summary.share_cosine_half == (wide["cosine"] > 0.5).mean()


def test_tables_cover_every_condition_scale_and_pair(summary: Any) -> None:
    assert len(summary.conditions) == 2 + 3 * 7
    assert len(summary.comparisons) == 3 * (7 + 6)
    assert len(summary.quartiles) == 3 * 7 * 4
    one = summary.quartiles.query("scale == 'matched' and condition == 'atom'")
    assert one["n"].tolist() == [60] * 4 and one["delete_median"].is_monotonic_increasing
    assert summary.atoms.query("scale == 'matched'")["n"].sum() == 240
    json.dumps(summary.to_dict(), allow_nan=False)
    with pytest.raises(KeyError, match="atom < delete at matched"):
        summary.rate("delete", "atom", "matched")


def test_medians_and_the_floor(summary: Any) -> None:
    assert summary.floor == 0 and summary.floor_is_exact
    result = fake_result(HOLDS, floor=0.5, scales=("matched",))
    summary = result.summary()
    table = summary.conditions.set_index(["condition", "scale"])
    assert table.loc[("atom", "matched"), "median"] == pytest.approx(result.wide()["atom/matched"].median())
    assert summary.floor == pytest.approx(result.wide()["native"].quantile(0.95))
    assert table.loc[("atom", "matched"), "below_floor"] and not table.loc[("delete", "none"), "below_floor"]
    assert summary.share_below_floor == (result.wide()["delete"] <= summary.floor).mean() > 0
    assert not summary.floor_is_exact


def test_what_is_resampled_can_be_chosen(holds: Any, summary: Any) -> None:
    assert (summary.cluster, summary.n_clusters) == ("sequence", 30)
    by_atom = holds.summary(cluster="atom")
    assert by_atom.n_clusters == 20
    assert by_atom.rate("atom", "delete", "matched")["n_clusters"] == 20
    with pytest.raises(ValueError, match="'prompt'"):
        holds.summary(cluster="prompt")


def test_metrics_that_were_not_measured_are_refused() -> None:
    result = fake_result(HOLDS, last_position=False)
    assert "kl_last" not in result.metrics and "kl_at" in result.metrics
    with pytest.raises(ValueError, match="'kl_last'"):
        result.summary("kl_last")


def test_save_and_load(tmp_path: Path) -> None:
    result = fake_result(HOLDS, label="write-trained", last_position=False)
    path = result.save(tmp_path / "deep" / "result")
    assert [p.name for p in path.parent.iterdir()] == ["result.parquet"]  # nothing left beside it
    loaded = SubstitutionResult.load(path)
    assert loaded.info == result.info
    pd.testing.assert_frame_equal(loaded.frame, result.frame)


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = fake_result(HOLDS).save(tmp_path / "result")
    before = path.read_bytes()
    monkeypatch.setattr("pyarrow.parquet.write_table", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        fake_result(FAILS).save(path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_load_says_what_is_wrong(tmp_path: Path) -> None:
    other = tmp_path / "other.parquet"
    pd.DataFrame({"x": [1]}).to_parquet(other)
    with pytest.raises(ValueError, match="no substitution test"):
        SubstitutionResult.load(other)
    other.write_bytes(b"cut")
    with pytest.raises(ValueError, match="no parquet file"):
        SubstitutionResult.load(other)
    with pytest.raises(ValueError, match="d_sae"):
        SubstitutionInfo.from_dict({"config": {}})


def test_results_are_checked() -> None:
    result = fake_result(HOLDS)
    with pytest.raises(ValueError, match="cosine"):
        SubstitutionResult(result.frame.drop(columns="cosine"), result.info)
    with pytest.raises(ValueError, match="empty"):
        SubstitutionResult(result.frame.iloc[:0], result.info)
    with pytest.raises(ValueError, match="two rows"):
        SubstitutionResult(pd.concat([result.frame, result.frame.iloc[:1]]), result.info)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"atom_choice": "best"}, "dominant, own, found 'best'"),
        ({"positions": "silent"}, "own"),
        ({"write": "state"}, "additive, corrected"),
        ({"scales": ("matched", "unit")}, "found unit"),
        ({"scales": ()}, "found none"),
        ({"controls": ("random", "random")}, "once each"),
        ({"horizon": 0}, "at least 1, found 0"),
        ({"mean_write_energy": 1.5}, "found 1.5"),
        ({"atoms": ()}, "empty"),
        ({"atoms": (3, 3)}, "once each"),
        ({"n_atoms": 0}, "n_atoms"),
    ],
)
def test_config_refuses_nonsense(settings, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SubstitutionConfig(**settings)


def test_config_survives_json() -> None:
    config = SubstitutionConfig(atoms=(4, 2), scales=("matched",), label="x")
    assert SubstitutionConfig(**json.loads(json.dumps(config.to_dict()))) == config


def test_labels_say_what_departs_from_the_default() -> None:
    assert fake_result(HOLDS).info.label == "write-trained"
    info = fake_result(HOLDS, target="state", atom_choice="own", write="corrected").info
    assert info.label == "state-trained, own atom, corrected write"
    assert fake_result(HOLDS, label="mine", positions="silent", atom_choice="own").info.label == "mine"
