"""Partition: cosines against dense matrices, planted mixtures, fixed verdicts, degenerate samples."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from fake_substitution import CONFOUNDED, FAILS, HOLDS, NO_EFFECT, fake_result
from small_saes import HEAD, HOOK, LAYER, K, V, make_sae, planted

from hookpoints import UnknownHookError
from sae_lens_writesae.conditions import Factors
from sae_lens_writesae.firings import collect_firings
from sae_lens_writesae.partition import Partition, PartitionConfig, evaluate_partition, run_partition
from sae_lens_writesae.partition_claims import by_kind, compared
from sae_lens_writesae.verdict.mixtures import fisher_z, fit_mixtures
from sae_lens_writesae.write_cosines import cosines, firing_cosines

QUICK: Any = {"scales": ("coefficient",), "controls": ("state",)}


@pytest.mark.parametrize("decoder, rank", [("rank", 1), ("rank", 2), ("flat", 1)])
def test_cosines_are_those_of_the_dense_matrices(model: Any, tokens: Any, decoder: str, rank: int) -> None:
    sae = make_sae(model, decoder, rank)
    firings = collect_firings(model, sae, tokens)
    alive = firings.alive(tokens.numel())
    found: Any = firing_cosines(model, sae, tokens, firings, alive).table
    assert len(found) == len(firings)
    writes = model.recurrence(tokens, LAYER).write(HEAD)[:, :, 0].flatten(2)
    atoms = sae.W_dec.detach()
    for row in found.sample(20, random_state=0).itertuples():
        expected = torch.cosine_similarity(writes[row.sequence, row.position], atoms[row.atom], dim=0)
        assert row.cosine == pytest.approx(expected.item(), abs=1e-5)
    # a shuffled cosine is that of some other write of the same sequence
    row = found.iloc[0]
    every = torch.cosine_similarity(writes[int(row["sequence"])], atoms[int(row["atom"])], dim=-1)
    assert (every - row["shuffled"]).abs().min() < 1e-5


def test_signed_cosine_of_rank_one_is_the_product_of_cosines() -> None:
    torch.manual_seed(0)
    k, u, v, w = (torch.randn(4, n) for n in (K, V, K, V))
    found = cosines(Factors(k[:, None], u[:, None]), Factors(v[:, None], w[:, None]))
    expected = torch.cosine_similarity(k, v) * torch.cosine_similarity(u, w)
    assert torch.allclose(found.diagonal(), expected, atol=1e-6) and (found < 0).any()
    assert cosines(Factors(k[:, None] * 0, u[:, None]), Factors(v[:, None], w[:, None])).abs().max() == 0


def test_planted_atoms_are_registers_beyond_both_nulls(model: Any, tokens: Any) -> None:
    result = run_partition(
        model, planted(model, tokens), tokens, PartitionConfig(min_firings=2, restarts=1), progress=False
    )
    atoms: Any = result.tables["atoms"]
    assert len(atoms) >= 20 and (atoms["kind"] == "register").mean() > 0.9
    assert atoms["cosine"].median() > atoms["shuffled"].median() + 0.2 and abs(atoms["random"].median()) < 0.05
    aligned = result.claims()[1]
    assert (aligned.outcome, aligned.n) == ("holds", len(atoms))
    assert result.info["n_alive"] + result.info["dead"] <= 30


def test_roundtrip_gives_the_same_page(model: Any, tokens: Any, tmp_path: Any) -> None:
    result = run_partition(
        model, planted(model, tokens), tokens, PartitionConfig(min_firings=2, restarts=1), progress=False
    )
    loaded = Partition.load(result.save(tmp_path / "partition"))
    assert loaded.claims() == result.claims() and loaded.notes() == result.notes()
    assert [f.svg for f in loaded.figures()] == [f.svg for f in result.figures()] and len(result.figures()) == 3
    for table in result.tables.values():
        assert not table.isna().to_numpy().any()


# -- mixtures


def test_planted_mixture_is_found() -> None:
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(0.0, 0.02, 300), rng.normal(0.4, 0.05, 100)])
    fits = fit_mixtures(x)
    assert fits.preferred == 2 and not fits.omitted
    two = fits.table[fits.table["components"] == 2]
    assert two["mean"].tolist() == pytest.approx([0, 0.4], abs=0.02)
    assert two["weight"].tolist() == pytest.approx([0.75, 0.25], abs=0.02)
    assert two["sd"].tolist() == pytest.approx([0.02, 0.05], abs=0.01)


def test_one_gaussian_needs_one_component_whose_bic_is_the_closed_form() -> None:
    x = np.random.default_rng(1).normal(size=400)
    fits = fit_mixtures(x)
    assert fits.preferred == 1
    log_likelihood = -200 * (np.log(2 * np.pi * x.var()) + 1)
    assert fits.table["bic"].iloc[0] == pytest.approx(2 * np.log(400) - 2 * log_likelihood, rel=1e-4)
    scaled = fit_mixtures(1000 * x)  # BIC of all moves by the same amount
    moved = scaled.table["bic"] - fits.table["bic"]
    assert moved.to_numpy() == pytest.approx(800 * np.log(1000), rel=1e-3)


@pytest.mark.parametrize("values, fitted", [([0.3] * 50, 0), ([0.1, 0.2, 0.3], 0), (np.linspace(0, 1, 7), 1)])
def test_degenerate_samples_are_said_to_be_so(values: Any, fitted: int) -> None:
    fits: Any = fit_mixtures(values)
    assert fits.table["components"].nunique() == fitted and "distinct values" in fits.omitted
    assert fits.preferred == (1 if fitted else None) and not fits.table.isna().to_numpy().any()


def test_fisher_z_is_finite() -> None:
    assert fisher_z([0, 0.5, 1, -1])[:2] == pytest.approx([0, 0.5493], abs=1e-4)
    assert np.isfinite(fisher_z([1, -1])).all()


# -- verdicts


def made(cosine: Any, shuffled: Any, dead: int = 7, **info: Any) -> Partition:
    """A result from chosen medians, with real fits."""
    from sae_lens_writesae import partition

    cosine, shuffled = np.asarray(cosine, float), np.asarray(shuffled, float)
    n, config = len(cosine), PartitionConfig(restarts=1, components=3)
    atoms = pd.DataFrame({"atom": range(n), "firings": 9, "cosine": cosine, "shuffled": shuffled})
    atoms["random"], atoms["z"] = np.random.default_rng(9).normal(0, 0.01, n), fisher_z(cosine)
    atoms["kind"] = np.where(cosine >= config.threshold, "register", "bundle")
    mixtures, _ = partition._mixtures(atoms, config)
    base = {"config": {"min_atoms": 20, "threshold": 0.05, "seed": 0, "min_firings": 5}, "dead": dead, "n_alive": n}
    described = {"hook_name": HOOK, "d_sae": 512, "alive_tokens": 1000, "label": "made"}
    tables = {"atoms": atoms, "mixtures": mixtures, "sweep": partition._sweep(atoms, config)}
    return Partition(base | described | info, tables | {"substitution": by_kind(None, atoms, described)})


def rng_normal(mean: float, sd: float, n: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(mean, sd, n)


def test_verdict_holds_for_two_kinds_beyond_a_null_of_one() -> None:
    two = np.concatenate([rng_normal(0.0, 0.01, 150), rng_normal(0.4, 0.05, 150)])
    claim = made(two, rng_normal(0, 0.01, 300, 3)).claims()[0]
    assert (claim.outcome, claim.n, claim.number) == ("holds", 300, 6)
    assert "150 register / 150 bundle / 7 dead" in claim.measured


@pytest.mark.parametrize(
    "cosine, shuffled, outcome, words",
    [
        (rng_normal(0.3, 0.05, 300), rng_normal(0, 0.01, 300, 1), "fails", "prefers 1"),
        (
            np.concatenate([rng_normal(0, 0.01, 150), rng_normal(0.4, 0.05, 150)]),
            np.concatenate([rng_normal(0, 0.01, 150, 5), rng_normal(0.4, 0.05, 150, 6)]),
            "confounded",
            "shuffled positions",
        ),
        (
            np.concatenate([rng_normal(-0.4, 0.01, 150), rng_normal(-0.2, 0.01, 150)]),
            rng_normal(0, 0.001, 300),
            "confounded",
            "as many registers",
        ),
        (np.full(300, 0.3), rng_normal(0, 0.01, 300), "not tested", "too alike"),
        (rng_normal(0.3, 0.1, 12), rng_normal(0, 0.1, 12), "not tested", "too few"),
    ],
)
def test_verdicts_of_two_kinds(cosine: Any, shuffled: Any, outcome: str, words: str) -> None:
    claim = made(cosine, shuffled).claims()[0]
    assert claim.outcome == outcome and words in claim.sentence


def test_atoms_no_nearer_than_shuffled_fail() -> None:
    same = rng_normal(0.1, 0.05, 100)
    assert made(same, same[::-1]).claims()[1].outcome == "fails"


@pytest.mark.parametrize(
    "medians, outcome", [(HOLDS, "holds"), (FAILS, "fails"), (CONFOUNDED, "confounded"), (NO_EFFECT, "below the floor")]
)
def test_register_against_bundle(medians: dict[str, float], outcome: str) -> None:
    test = fake_result(medians, floor=1e-12, head=2, **QUICK)
    result = made(np.tile([0.3, 0.0], 10), np.zeros(20))
    info = result.info | {"hook_name": test.info.hook_name, "d_sae": test.info.d_sae}
    atoms = result.tables["atoms"]
    tables = result.tables | {"substitution": by_kind(test, atoms, info)}
    claim = Partition(info | compared(test, atoms, 0), tables).claims()[2]
    assert (claim.number, claim.outcome, claim.n) == (4, outcome, 240)
    assert "difference [" in claim.measured


def test_kinds_that_differ_are_not_alike() -> None:
    test = fake_result(HOLDS, n_sequences=60, **QUICK)
    atoms = made(np.tile([0.3, 0.0], 10), np.zeros(20)).tables["atoms"]
    frame: Any = test.frame
    worse = (frame["condition"] == "atom") & (frame["written_atom"] % 2 == 1) & (frame["position"] % 3 == 0)
    frame.loc[worse, "kl_window"] *= 100
    found = compared(test, atoms, 0)
    assert found["difference"]["low"] > 0.1 and found["difference"]["p_value"] < 0.01
    info = {"hook_name": test.info.hook_name, "d_sae": test.info.d_sae}
    result = made(np.tile([0.3, 0.0], 10), np.zeros(20), **info, **found)
    claim = Partition(result.info, result.tables | {"substitution": by_kind(test, atoms, info)}).claims()[2]
    assert claim.outcome == "fails" and "not alike" in claim.sentence


def test_the_evaluation_tests_as_many_atoms_of_each_kind(model: Any, tokens: Any) -> None:
    sae = planted(model, tokens)
    plain = run_partition(model, sae, tokens, PartitionConfig(min_firings=2, restarts=1), progress=False)
    middle = float(plain.tables["atoms"]["cosine"].median())
    config = PartitionConfig(min_firings=2, restarts=1, threshold=middle, tested_atoms=4, controls=("state",))
    result = evaluate_partition(model, sae, tokens, config, progress=False)
    found: Any = result.tables["substitution"]
    assert dict(zip(found["kind"], found["n_atoms"])) == {"register": 4, "bundle": 4}
    claim = result.claims()[2]
    assert (claim.number, claim.n) == (4, int(found["n"].sum())) and "p = " in claim.measured
    assert 0 < result.info["difference"]["p_value"] <= 1
    none = evaluate_partition(model, sae, tokens, PartitionConfig(min_firings=2, restarts=1, threshold=-1), False)
    claim = none.claims()[2]
    assert none.tables["substitution"].empty and claim.outcome == "not tested" and "and 0 bundle" in claim.sentence


def test_a_single_atom_gives_no_interval() -> None:
    result = made([0.3], [0.1])
    for claim in result.claims():
        assert claim.outcome == "not tested" and "nan" not in claim.measured + claim.controls


# -- bad input


def test_errors_name_the_fault(model: Any, tokens: Any) -> None:
    sae = planted(model, tokens)
    with pytest.raises(ValueError, match="no atom is alive"):
        run_partition(model, sae, tokens, PartitionConfig(min_firings=10_000), progress=False)
    with pytest.raises(ValueError, match="of the same SAE"):
        run_partition(model, sae, tokens, PartitionConfig(min_firings=2), False, substitution=fake_result(HOLDS))
    with pytest.raises(UnknownHookError, match="no hook named"):
        run_partition(model, make_sae(model, hook=HOOK.replace(".1.", ".99.")), tokens, progress=False)


@pytest.mark.parametrize("field, value", [("min_firings", 0), ("threshold", 2.0), ("sweep", (0.1, -3))])
def test_config_checks_itself(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field):
        PartitionConfig(**{field: value})
