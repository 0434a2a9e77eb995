"""Objectives: reconstruction against dense matrices, a dictionary that loses nothing, fixed verdicts, the command."""

from typing import Any

import pandas as pd
import pytest
import torch
from fake_substitution import CONFOUNDED, FAILS, HOLDS, NO_EFFECT, fake_result
from small_saes import HEAD, HOOK, LAYER, STATE, K, V, exact_sae, make_sae, planted

from sae_lens_writesae import objectives_compare as compare
from sae_lens_writesae.eval_cli import _groups, comparable, run_evaluations
from sae_lens_writesae.firings import HeadHook
from sae_lens_writesae.objectives import Objectives, ObjectivesConfig, objective, run_objectives
from sae_lens_writesae.objectives_claims import standings
from sae_lens_writesae.reconstruction import head_matrices, reconstruction
from sae_lens_writesae.suite import Scope

SMALL = ObjectivesConfig(sequences=4, n_atoms=6, firings_per_atom=2, min_firings=1, horizon=4)


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


@pytest.fixture
def tokens() -> torch.Tensor:
    """[6,24] token ids."""
    return torch.randint(1, 64, (6, 24), generator=torch.Generator().manual_seed(1))


# -- reconstruction


@pytest.mark.parametrize("hook", [HOOK, STATE])
def test_an_exact_dictionary_explains_everything(model: Any, tokens: Any, hook: str) -> None:
    table: Any = reconstruction(model, {"exact": exact_sae(hook)}, tokens).table
    assert table["sequence"].tolist() == [*range(6)]
    assert table["explained"].to_numpy() == pytest.approx(1, abs=1e-6)
    assert table["reads"].to_numpy() == pytest.approx(1, abs=1e-6)
    assert (table["l0"] > 1).all()


@pytest.mark.parametrize("hook", [HOOK, STATE])
def test_shares_are_those_of_the_dense_matrices(model: Any, tokens: Any, hook: str) -> None:
    sae = make_sae(model, hook=hook)
    row: Any = reconstruction(model, {"a": sae}, tokens).table.iloc[2]
    one = model.recurrence(tokens, LAYER).select(heads=HEAD)
    x = (one.states() if "state" in hook else one.write())[:, :, 0].flatten(2)
    error = x[2] - sae.decode(sae.encode(x[2])).detach()
    explained = 1 - error.square().sum() / (x[2] - x.mean((0, 1))).square().sum()
    assert row["explained"] == pytest.approx(float(explained), abs=1e-4)
    lost = sum((e.view(K, V).T @ q).square().sum() for e, q in zip(error, one.q[2, :, 0]))
    read = sum((e.view(K, V).T @ q).square().sum() for e, q in zip(x[2], one.q[2, :, 0]))
    assert row["reads"] == pytest.approx(1 - float(lost / read), abs=1e-4)


def test_reads_of_states_are_what_the_layer_reads(model: Any, tokens: Any) -> None:
    found = head_matrices(model, tokens[:1], HeadHook.parse(STATE))
    one = model.recurrence(tokens[:1], LAYER).select(heads=HEAD)
    assert torch.allclose(torch.einsum("tkv,tk->tv", found.matrices, found.queries) * one.scale, one.outputs()[0, :, 0])


def test_sequences_without_variance_are_left_out_and_counted(model: Any, tokens: Any) -> None:
    same = tokens[:1, :1].expand(3, 1)  # one token: one write, the mean of all
    found = reconstruction(model, {"a": make_sae(model)}, same)
    assert found.table.empty and found.without_variance == 3


# -- the comparison


def test_the_exact_dictionary_wins_reconstruction(model: Any, tokens: Any, tmp_path: Any) -> None:
    saes = {"exact": exact_sae(), "random": make_sae(model), "states": make_sae(model, hook=STATE)}
    result = run_objectives(model, saes, tokens, SMALL, progress=False)
    assert result.tables["dictionaries"]["target"].tolist() == ["write", "write", "state"]
    found = standings(result)
    assert found["explained/write"] == ("exact", []) and found["reads/write"] == ("exact", [])
    assert "explained/state" not in found  # nothing to compare it with
    contrasts: Any = result.tables["contrasts"].set_index(["measure", "a", "b"])
    assert ("explained", "exact", "states") not in contrasts.index
    assert contrasts.loc[("explained", "exact", "random"), "low"] > 0
    for measure, a, b in contrasts.index:
        there, back = (contrasts.loc[(measure, *pair), "difference"] for pair in ((a, b), (b, a)))
        assert there == pytest.approx(-back)
    for table in result.tables.values():
        assert not table.isna().to_numpy().any()
    loaded = Objectives.load(result.save(tmp_path / "objectives"))
    assert loaded.claims() == result.claims() and loaded.notes() == result.notes()
    assert [f.svg for f in loaded.figures()] == [f.svg for f in result.figures()] and len(result.figures()) == 2


def test_alive_and_wins_are_those_of_the_substitution_test(model: Any, tokens: Any) -> None:
    from sae_lens_writesae.substitution import run_substitution

    saes = {"a": planted(model, tokens), "b": make_sae(model)}
    result = run_objectives(model, saes, tokens, SMALL, progress=False)
    measures: Any = result.tables["measures"].set_index(["sae", "measure"])
    for label, sae in saes.items():
        test = run_substitution(model, sae, tokens, SMALL.substitution(), progress=False)
        wide: Any = test.wide()
        assert measures.loc[(label, "alive"), "value"] == pytest.approx(test.info.n_alive / sae.cfg.d_sae)
        for scale in compare.SCALES:
            assert measures.loc[(label, scale), "value"] == (wide[f"atom/{scale}"] < wide["delete"]).mean()
        assert measures.loc[(label, "state"), "value"] == (wide["state/coefficient"] < wide["delete"]).mean()


def test_the_objective_is_read_from_the_metadata() -> None:
    assert objective(exact_sae(STATE)) == ("state", "mse")
    assert objective(exact_sae(STATE, loss="reads", seqpos_slice=(-1, None))) == ("last_state", "reads")
    assert objective(exact_sae(HOOK, loss="write", seqpos_slice=(None,))) == ("write", "write")


def test_errors_name_what_was_found(model: Any, tokens: Any) -> None:
    a, other = make_sae(model), make_sae(model, hook=HOOK.replace("heads.2", "heads.0"))
    with pytest.raises(ValueError, match="at least two SAEs to compare, found 1"):
        run_objectives(model, {"a": a}, tokens)
    with pytest.raises(ValueError, match="a: layer 1, head 2; other: layer 1, head 0"):
        run_objectives(model, {"a": a, "other": other}, tokens)
    with pytest.raises(ValueError, match="reads 20 numbers"):
        run_objectives(model, {"a": a, "b": exact_sae(k=5, v=4)}, tokens)
    dead = make_sae(model)
    dead.b_enc.data -= 1e6
    with pytest.raises(ValueError, match="dead: no atom can be tested"):
        run_objectives(model, {"a": a, "dead": dead}, tokens, SMALL, progress=False)
    with pytest.raises(ValueError, match="one of coefficient, matched, found 'least_squares'"):
        ObjectivesConfig(scale="least_squares")
    with pytest.raises(ValueError, match="sequences must be at least 2, found 1"):
        ObjectivesConfig(sequences=1)


# -- verdicts


def made_up(own: dict[str, float], base: dict[str, float] = FAILS, target: str = "state") -> Objectives:
    """A dictionary of writes with effects `own` beside one of `target` with `base`."""
    scales: Any = compare.SCALES
    controls = ("random", "state")
    tests = {
        label: fake_result(medians, seed=i, floor=1e-11, scales=scales, controls=controls)
        for i, (label, medians) in enumerate({"new": own, "old": base}.items())
    }
    fits = pd.DataFrame(
        [(label, i, 0.5, 0.5, 3.0) for label in tests for i in range(3)],
        columns=["sae", "sequence", "explained", "reads", "l0"],
    )
    config = ObjectivesConfig(controls=controls)
    targets = {"new": ("write", "mse"), "old": (target, "mse")}
    units = compare.units(fits, tests)
    saes: Any = {label: exact_sae() for label in tests}
    tables = {
        "dictionaries": compare.dictionaries(saes, targets, fits, tests, "coefficient"),
        "measures": compare.measures(units, tests, config),
        "contrasts": compare.contrasts(units, targets, 0),
        "firings": compare.firings(tests),
    }
    return Objectives({"config": {"scale": "coefficient", "controls": list(controls)}}, tables)


@pytest.mark.parametrize(
    "own, base, outcome",
    [
        (HOLDS, FAILS, "holds"),
        (FAILS, HOLDS, "fails"),
        (HOLDS, HOLDS, "fails"),  # neither is ahead
        ({"delete": 1.0, "atom": 1.05}, {"delete": 1.0, "atom": 4.0}, "fails"),  # ahead, but no better than deletion
        (CONFOUNDED, FAILS, "confounded"),
        (NO_EFFECT, FAILS, "below the floor"),
    ],
)
def test_verdicts_follow_the_rules(own: Any, base: Any, outcome: str) -> None:
    if outcome == "below the floor":
        own = {**own, "atom": 1e-14}
    claim = made_up(own, base).claims()[0]
    assert claim.outcome == outcome, claim
    assert "states by mse" in claim.claim and claim.n == 480 and claim.unit == "firings of 40 atoms"


def test_without_states_there_is_nothing_to_beat() -> None:
    claims = made_up(HOLDS, FAILS, target="last_state").claims()
    assert claims[0].outcome == "not tested" and "states by mse" in claims[0].sentence


def test_what_wins_where_is_said() -> None:
    best = made_up(HOLDS, FAILS).claims()[-1]
    assert best.outcome == "holds" and "substitution at its own coefficient: new" in best.measured
    tied = made_up(HOLDS, HOLDS).claims()[-1]
    assert tied.outcome == "fails" and "does not beat" in tied.sentence


# -- the command


def test_eval_all_takes_a_comparison_only_of_what_differs_in_nothing_else(model: Any) -> None:
    a, same, wide = make_sae(model), make_sae(model), make_sae(model, d_sae=40)
    states, flat, other = (
        make_sae(model, hook=STATE),
        make_sae(model, "flat"),
        make_sae(model, hook=HOOK.replace("heads.2", "heads.0")),
    )

    def fitting(*saes: Any) -> list[str]:
        return [scope.name for scope in (Scope.SEEDS, Scope.TARGETS, Scope.VARIANTS) if comparable(scope, saes)]

    assert fitting(a, same) == ["SEEDS"]
    assert fitting(a, states) == ["TARGETS"]
    assert fitting(a, flat) == fitting(a, wide) == ["VARIANTS"]
    assert fitting(states, flat) == fitting(a, other) == []


def test_many_evaluations_compare_the_dictionaries_of_each_head(model: Any) -> None:
    other = "heads.0"
    saes = {
        "a": make_sae(model),
        "b": make_sae(model, hook=STATE),
        "c": make_sae(model, hook=HOOK.replace("heads.2", other)),
        "d": make_sae(model, hook=STATE.replace("heads.2", other)),
    }
    assert {cell: list(own) for cell, own in _groups("objectives", saes, many=True).items()} == {
        "L1H2": ["a", "b"],
        "L1H0": ["c", "d"],
    }
    assert _groups("seeds", saes, many=True) == {} and list(_groups("sign", saes, many=True)) == ["L1H2", "L1H0"]
    assert list(_groups("erasure", saes, many=True)) == list(saes)
    assert _groups("objectives", saes, many=False) == {"all": saes}
    with pytest.raises(ValueError, match=r"seeds compares dictionaries .* found one"):
        _groups("seeds", {"a": saes["a"]}, many=False)


def test_eval_objectives_from_folders(embedded: Any, tmp_path: Any) -> None:
    shape = embedded.cfg.layer(1)
    for target in ("write", "state"):
        hook = f"blocks.1.mixer.heads.0.hook_{target}_vec"
        sae = exact_sae(hook, "embedded", shape.K, shape.V)
        sae.save_model(tmp_path / target)
    settings = {"sequences": 2, "n_atoms": 2, "firings_per_atom": 1, "controls": ["random"], "horizon": 2}
    said: list[str] = []
    files = run_evaluations(
        ["objectives"],
        [tmp_path / "write", tmp_path / "state"],
        tmp_path / "out",
        sequences=2,
        context_size=16,
        settings=settings,
        say=said.append,
    )
    assert files.html.exists() and said[0].startswith("objectives: L1H0 objectives")
    loaded = Objectives.load(tmp_path / "out" / "objectives" / "L1H0-objectives")
    assert loaded.tables["dictionaries"]["sae"].tolist() == ["write", "state"]
    assert loaded.info["model"] == embedded.cfg.model_name
