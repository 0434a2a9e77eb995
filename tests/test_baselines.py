"""Baselines: planted dictionaries, principal components, exact replacement, parameter counts, fixed verdicts."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sae_lens.saes.sae import SAEMetadata
from small_saes import HEAD, HOOK, LAYER, STATE, K, V, exact_sae, make_sae

from hookpoints import WriteEdit
from sae_lens_writesae import VARIANTS
from sae_lens_writesae.baselines import (
    Baselines,
    BaselinesConfig,
    fit_pca,
    matched_flat,
    parameters,
    run_baselines,
    variant,
)
from sae_lens_writesae.baselines.replacement import Above, Basis, replace_all
from sae_lens_writesae.baselines.selectivity import selectivity
from sae_lens_writesae.baselines.writes import Setting, exchanged
from sae_lens_writesae.conditions import rank_one
from sae_lens_writesae.firings import Firings, HeadHook
from sae_lens_writesae.sae import INFERENCE, WriteTopKSAE, WriteTopKSAEConfig

SMALL = BaselinesConfig(
    test_sequences=4, pca_ranks=(1, 3), pca_writes=40, replacement_sequences=3, horizon=4, min_firings=2
)


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


@pytest.fixture
def tokens() -> torch.Tensor:
    """[8,24] token ids."""
    return torch.randint(1, 64, (8, 24), generator=torch.Generator().manual_seed(1))


def flat_of(writes: torch.Tensor, k: int = 1) -> Any:
    """A flat dictionary whose atoms, and encoder atoms, are the directions of writes [F,K,V]."""
    sae = _flat(len(writes), k)
    atoms = torch.nn.functional.normalize(writes.flatten(1), dim=1)
    sae.decoder_matrix.data, sae.encoder_matrix.data = atoms.clone(), atoms.T.contiguous()
    return sae


def _flat(d_sae: int, k: int) -> Any:
    fields = {"d_in": K * V, "d_k": K, "d_sae": d_sae, "k": k, "encoder": "dense", "decoder": "flat"}
    return WriteTopKSAE(WriteTopKSAEConfig(**fields, metadata=SAEMetadata(hook_name=HOOK, model_name="")))


# -- principal components


@pytest.mark.parametrize("shape", [(12, 30), (60, 30)])
def test_components_of_rank_r_data_are_exact_at_r(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    rows = torch.randn(shape[0], 4) @ torch.randn(4, shape[1]) + torch.randn(shape[1])
    pca = fit_pca(rows, 10)
    assert pca.components.shape == (4, shape[1])
    assert torch.allclose(pca.components @ pca.components.T, torch.eye(4), atol=1e-5)
    assert torch.allclose(pca.project(rows, 4), rows, atol=1e-4)
    errors = [float((pca.project(rows, r) - rows).square().sum()) for r in range(5)]
    sigma = torch.linalg.svdvals(rows.double() - rows.double().mean(0))
    expected = [float(sigma[r:].square().sum()) for r in range(4)]
    assert errors[:4] == pytest.approx(expected, rel=1e-4) and errors[4] < 1e-6 * errors[0]


def test_equal_rows_have_a_mean_and_no_component() -> None:
    rows = torch.ones(5, 6) * torch.arange(6.0)
    pca = fit_pca(rows, 3)
    assert pca.components.shape == (0, 6) and torch.equal(pca.project(rows, 3), rows)
    with pytest.raises(ValueError, match="at least two rows"):
        fit_pca(rows[:1], 1)


# -- what is written


def setting(model: Any, saes: dict[str, Any], tokens: Any, **config: Any) -> Setting:
    one = model.recurrence(tokens, LAYER).select(heads=HEAD)
    rows = one.write()[:, :, 0].flatten(0, 1).flatten(1)
    mean = rank_one(one.k[0, :1, 0], one.u[0, :1, 0])
    return Setting(model, saes, HeadHook.parse(HOOK), BaselinesConfig(horizon=4, **config), fit_pca(rows, 48), mean)


def rows_of(found: list[dict[str, Any]], sae: str, condition: str) -> Any:
    table: Any = pd.DataFrame(found)
    return table[(table["sae"] == sae) & (table["condition"] == condition)].reset_index(drop=True)


@pytest.mark.parametrize("scale", ["matched", "coefficient"])
def test_a_planted_flat_dictionary_is_recovered_by_svd(model: Any, tokens: Any, scale: str) -> None:
    writes = model.recurrence(tokens[:1], LAYER).write(HEAD)[0, :, 0]
    sae = flat_of(writes)
    found = exchanged(
        setting(model, {"flat": sae}, tokens, scale=scale, positions_per_sequence=6, pca_ranks=(48,)), tokens[:1], 0
    )
    delete = rows_of(found, "", "delete")
    assert len(delete) == 6 and (delete["kl"] > 1e-9).all()
    for sae_label, condition in (("flat", "atom"), ("flat", "atom svd"), ("flat", "svd"), ("", "pca 48")):
        own = rows_of(found, sae_label, condition)
        assert own["cosine"].to_numpy() == pytest.approx(1, abs=1e-4)
        assert own["norm"].to_numpy() == pytest.approx(1, abs=1e-3)
        assert (own["kl"] < 1e-3 * delete["kl"]).all()
    assert rows_of(found, "", "native")["kl"].max() < 1e-9
    for control in ("random", "mean", "state", "state_after"):
        own = rows_of(found, "", control)
        size = 1 if scale == "matched" else own["cosine"]  # a projection has the cosine as its norm
        assert own["norm"].to_numpy() == pytest.approx(size, abs=1e-4) and own["cosine"].abs().max() < 0.999


def test_nothing_is_written_where_no_atom_fires(model: Any, tokens: Any) -> None:
    silent = make_sae(model)
    silent.b_enc.data -= 1e6
    found = exchanged(setting(model, {"silent": silent}, tokens), tokens[:1], 0)
    atom, delete = rows_of(found, "silent", "atom"), rows_of(found, "", "delete")
    assert (atom["norm"] == 0).all() and atom["kl"].to_numpy() == pytest.approx(delete["kl"].to_numpy(), rel=1e-3)


def test_atoms_of_a_dictionary_of_states_are_those_of_the_state(model: Any, tokens: Any) -> None:
    sae = make_sae(model, hook=STATE)
    own = setting(model, {"s": sae}, tokens)._replace(hook=HeadHook.parse(STATE))
    row = rows_of(exchanged(own, tokens[:1], 0), "s", "atom").iloc[0]
    one = model.recurrence(tokens[:1], LAYER).select(heads=HEAD)
    acts = sae.encode(one.states()[0, int(row["position"]), 0].flatten())
    strongest = int((acts * sae.decoder_norm()).argmax())
    write = one.write()[0, int(row["position"]), 0].flatten()
    assert row["cosine"] == pytest.approx(torch.cosine_similarity(sae.W_dec[strongest], write, dim=0).item(), abs=1e-5)


# -- whole-matrix replacement


@pytest.mark.parametrize("hook", [HOOK, STATE])
def test_replacing_all_by_itself_changes_nothing(model: Any, tokens: Any, hook: str) -> None:
    place = HeadHook.parse(hook)
    pca = fit_pca(torch.randn(9, K * V), 2)
    saes = {"exact": exact_sae(hook), "other": make_sae(model, hook=hook)}
    found = replace_all(model, saes, tokens[:1], place, Basis(pca, torch.zeros(K * V)), (2,), (1, 2, V))
    cost = {(each.hook, each.sae, each.method): each.nats for each in found}
    kind = place.target
    assert cost[kind, "", "itself"] == 0
    assert cost[kind, "exact", "dictionary"] == pytest.approx(0, abs=1e-6)
    assert abs(cost[kind, "other", "dictionary"]) > 1e-6
    assert cost[kind, "", "mean"] == cost[kind, "", "zero"]  # the mean that was given is zero
    assert [each.method for each in found if each.hook == "state" and each.method.startswith("rank")] == [
        "rank 1",
        "rank 2",
    ]  # V is the full rank
    assert ((kind, "", "pca 2") in cost) == (kind == "write")


def test_zero_writes_are_the_writes_deleted(model: Any, tokens: Any) -> None:
    basis = Basis(fit_pca(torch.randn(9, K * V), 2), torch.zeros(K * V))
    found = replace_all(model, {}, tokens[:1], HeadHook.parse(HOOK), basis, (2,), (1,))
    zero = next(each for each in found if each.method == "zero")
    session = model.edit_session(tokens[:1])
    rows = [[WriteEdit(LAYER, HEAD, t, mode="delete") for t in range(tokens.shape[1])]]
    logits = session.run(rows).logits
    nats = torch.nn.functional.cross_entropy(logits[0, :-1].double(), tokens[0, 1:])
    assert zero.nats + zero.native_nats == pytest.approx(float(nats), abs=1e-6)
    assert zero.native_nats == pytest.approx(Above.of(model, tokens[:1], LAYER).nats()) and abs(zero.nats) > 1e-5


def test_states_of_rank_one_are_cut_without_loss(model: Any, tokens: Any) -> None:
    """A single token's state is its own write, of rank 1."""
    basis = Basis(fit_pca(torch.randn(9, K * V), 2), torch.zeros(K * V))
    found = replace_all(model, {}, tokens[:1, :2], HeadHook.parse(STATE), basis, (2,), (1, 2))
    cost = {each.method: each.nats for each in found}
    assert cost["rank 2"] == pytest.approx(0, abs=1e-6)  # two tokens: rank 2


# -- parameters


@pytest.mark.parametrize("architecture", ["writesae_topk", "writesae_jumprelu", "writesae_gated"])
@pytest.mark.parametrize("name", ["WriteSAE", "MatrixSAE", "WriteSAE-rank2", "FlatSAE"])
@pytest.mark.parametrize("d_sae", [7, 512])
def test_a_matched_flat_sae_differs_by_half_an_atom_at_most(architecture: str, name: str, d_sae: int) -> None:
    sae_class, config_class = INFERENCE[architecture]
    more = {"k": 3} if architecture == "writesae_topk" else {}

    def build(**fields: Any) -> Any:
        return sae_class(config_class(d_in=48, d_k=8, **{**more, **fields}))

    sae = build(d_sae=d_sae, **VARIANTS[name])
    fields = matched_flat(sae)
    flat = build(**fields)
    assert variant(sae) == name and variant(flat) == "FlatSAE"
    of_an_atom = (parameters(flat) - 48) / fields["d_sae"]
    assert abs(parameters(flat) - parameters(sae)) <= of_an_atom * (0.5 if fields["d_sae"] > 1 else 1)
    if name == "FlatSAE":
        assert fields["d_sae"] == d_sae
    if more:
        assert fields["k"] <= max(1, fields["d_sae"] // 2)


def test_the_papers_sizes_give_32_flat_atoms() -> None:
    config = WriteTopKSAEConfig(d_in=128 * 128, d_k=128, d_sae=2048, k=32, device="meta")
    assert matched_flat(WriteTopKSAE(config)) == {"d_sae": 32, "encoder": "dense", "decoder": "flat", "k": 16}


# -- selectivity


def test_an_atom_of_one_token_is_selective_and_one_of_all_tokens_is_not() -> None:
    ids = torch.tensor([[7, 1, 2, 7], [3, 7, 4, 7]])
    place = {0: [0, 3, 5, 7], 1: list(range(8)), 2: [1]}
    atom = np.concatenate([np.full(len(at), i) for i, at in place.items()])
    at = np.concatenate([np.array(at) for at in place.values()])
    order = np.argsort(at, kind="stable")
    at, atom = at[order], atom[order]
    firings = Firings(at // 4, at % 4, atom, np.ones(len(at), np.float32), 2, 4, 3)
    table = selectivity(firings, ids, 2).set_index("atom")
    assert table.index.tolist() == [0, 1]  # the third fires once
    assert table.loc[0, ["firings", "token", "share"]].tolist() == [4, 7, 1.0] and table.loc[0, "chance"] < 1
    assert table.loc[1, "share"] == table.loc[1, "chance"] == 0.5


# -- all of it


def test_run_on_variants(model: Any, tokens: Any, tmp_path: Any) -> None:
    saes = {
        "ours": make_sae(model),
        "two": make_sae(model, rank=2),
        "flat": _flat(30, 3),
        "exact": exact_sae(),
    }
    result = run_baselines(model, saes, tokens, SMALL, progress=False)
    table: Any = result.tables["dictionaries"].set_index("sae")
    assert table["variant"].tolist() == ["WriteSAE", "WriteSAE-rank2", "FlatSAE", "FlatSAE"]
    assert table.loc["exact", "explained"] == pytest.approx(1, abs=1e-5)
    assert (table["alive"] + table["dead"] == table["d_sae"]).all()
    assert table.loc["ours", "parameters"] == 30 * (2 * (K + V) + 1) + K * V
    assert result.conditions("ours") == ["atom", "svd"] and result.conditions("two") == ["atom", "atom svd", "svd"]
    for name, frame in result.tables.items():
        assert len(frame) and not frame.isna().to_numpy().any(), name
    assert result.cost("itself").mean == 0 and result.cost("dictionary", "exact").mean == pytest.approx(0, abs=1e-5)
    assert [claim.number for claim in result.claims()] == [15, 15, None, 16, 17, None, None]
    assert "not tested" not in {claim.outcome for claim in result.claims() if claim.number}
    loaded = Baselines.load(result.save(tmp_path / "baselines"))
    assert loaded.claims() == result.claims() and loaded.notes() == result.notes()
    assert [f.svg for f in loaded.figures()] == [f.svg for f in result.figures()] and len(result.figures()) == 4
    again = run_baselines(model, saes, tokens, SMALL, progress=False)
    pd.testing.assert_frame_equal(again.tables["writes"], result.tables["writes"])


def test_errors_name_what_was_found(model: Any, tokens: Any) -> None:
    a = make_sae(model)
    with pytest.raises(ValueError, match="at least two SAEs to compare, found 1"):
        run_baselines(model, {"a": a}, tokens)
    with pytest.raises(ValueError, match=r"a: .*hook_write_vec; s: .*hook_state_vec"):
        run_baselines(model, {"a": a, "s": make_sae(model, hook=STATE)}, tokens)
    with pytest.raises(ValueError, match="b reads 20 numbers"):
        run_baselines(model, {"a": a, "b": exact_sae(k=5, v=4)}, tokens)
    with pytest.raises(ValueError, match="at least 4 sequences, found 3"):
        run_baselines(model, {"a": a, "b": a}, tokens[:3], SMALL)
    with pytest.raises(ValueError, match=r"T >= 19, found \[8, 10\]"):
        run_baselines(model, {"a": a, "b": a}, tokens[:, :10])
    with pytest.raises(ValueError, match=r"pca_ranks rise from 1 or more, found \[2, 1\]"):
        BaselinesConfig(pca_ranks=(2, 1))
    with pytest.raises(ValueError, match="coefficient or matched, found 'own'"):
        BaselinesConfig(scale="own")  # type: ignore[arg-type]


# -- verdicts


def made_up(
    kl: dict[tuple[str, str], float] | None = None,
    nats: dict[tuple[str, str, str], float] | None = None,
    dead: dict[str, int] | None = None,
    share: dict[str, float] | None = None,
    drop: tuple[str, ...] = (),
    target: str = "write",
) -> Baselines:
    """KLs by (sae, condition), costs by (hook, sae, method), dead atoms and selectivity by dictionary, with noise."""
    rng = np.random.default_rng(0)
    saes = {"ours": "WriteSAE", "two": "WriteSAE-rank2", "flat": "FlatSAE", "small": "FlatSAE", "dense": "MatrixSAE"}
    saes = {label: name for label, name in saes.items() if label not in drop}
    rows = [
        {
            "sae": label,
            "variant": name,
            "d_sae": 20 if label == "small" else 400,
            "parameters": 1000 if label in ("ours", "small") else 9000,
            "explained": 0.5,
            "l0": 3.0,
            "dead": (dead or {}).get(label, 5),
        }
        for label, name in saes.items()
    ]
    dictionaries = pd.DataFrame(rows).assign(alive=lambda t: t["d_sae"] - t["dead"])
    base = {("", "native"): 1e-13, ("", "delete"): 1.0, ("ours", "atom"): 0.2, ("flat", "svd"): 3.0, ("", "mean"): 3.0}
    base |= {("ours", "svd"): 0.2, ("flat", "atom svd"): 3.0, ("", "pca 4"): 3.0}
    base |= {
        ("small", "svd"): 3.0,
        ("", "random"): 3.0,
        ("", "state"): 3.0,
        ("", "state_after"): 0.01,
        ("", "pca 1"): 3.0,
    } | (kl or {})
    places = [(sequence, position) for sequence in range(20) for position in (3, 9)]
    writes = pd.DataFrame(
        [
            {"sequence": s, "position": p, "sae": sae, "condition": c, "kl": k * np.exp(0.5 * rng.normal())}
            for (sae, c), k in base.items()
            for s, p in places
        ]
    ).assign(cosine=0.1, norm=1.0)
    costs = {(target, "", "itself"): 0.0, (target, "ours", "dictionary"): 0.01, (target, "two", "dictionary"): 0.01}
    costs |= {(target, "", "mean"): 0.1, (target, "", "zero"): 0.2, ("state", "", "rank 1"): 1e-4} | (nats or {})
    replacement = pd.DataFrame(
        [
            {"sequence": s, "sae": sae, "hook": h, "method": m, "nats": x * rng.uniform(0.8, 1.2), "native_nats": 3.0}
            for (h, sae, m), x in costs.items()
            for s in range(20)
        ]
    )
    shares = {"ours": 0.6, "flat": 0.3} | (share or {})
    chosen = pd.DataFrame(
        [
            {"sae": label, "atom": i, "firings": 9, "token": 1, "share": x + 0.05 * rng.normal(), "chance": 0.1}
            for label, x in shares.items()
            for i in range(50)
        ]
    )
    tables = {"dictionaries": dictionaries, "writes": writes, "replacement": replacement, "selectivity": chosen}
    info = {"config": {"seed": 0, "pca_ranks": [1, 4], "scale": "matched"}, "target": target, "saes": list(saes)}
    return Baselines(info, tables)


def test_atoms_of_rank_four_are_held_against_rank_one_by_the_same_rule() -> None:
    plain = made_up()
    two = {name: plain.tables[name].query("sae == 'two'") for name in ("dictionaries", "replacement")}
    for dearer, outcome in ((0.0, "holds"), (0.05, "fails")):
        four = {
            "dictionaries": two["dictionaries"].assign(sae="four", variant="WriteSAE-rank4"),
            "replacement": two["replacement"].assign(sae="four", nats=two["replacement"]["nats"] + dearer),
        }
        tables = {
            name: pd.concat([table, four[name]]) if name in four else table for name, table in plain.tables.items()
        }
        claims = Baselines(plain.info, tables).claims()
        (claim,) = [claim for claim in claims if "rank-4" in claim.claim]
        assert (claim.number, claim.outcome) == (None, outcome) and "at rank 4" in claim.measured
        assert len(claims) == len(plain.claims()) + 1


NOTHING: dict[tuple[str, str], float] = {("", "delete"): 1e-13, ("ours", "atom"): 1e-14, ("ours", "svd"): 1e-14}


@pytest.mark.parametrize(
    "changes, outcomes",
    [
        ({}, {0: "holds", 1: "holds", 2: "holds", 3: "holds", 4: "fails", 5: "holds", 6: "holds"}),
        ({"kl": {("flat", "atom svd"): 0.01}}, {0: "fails", 1: "holds", 2: "holds"}),
        ({"kl": {("flat", "svd"): 0.2}}, {0: "holds", 1: "fails", 2: "holds"}),  # neither is ahead
        ({"kl": {("ours", "atom"): 9.0, ("ours", "svd"): 9.0}}, {0: "fails", 1: "fails", 2: "fails"}),
        ({"kl": {("", "state"): 0.01}}, {0: "confounded", 1: "confounded", 2: "confounded"}),
        ({"kl": {("", "pca 4"): 0.01}}, {0: "holds", 1: "confounded", 2: "confounded"}),
        ({"kl": NOTHING}, {0: "below the floor", 1: "below the floor", 2: "below the floor"}),
        ({"drop": ("flat",)}, {0: "not tested", 1: "not tested", 2: "holds", 4: "not tested"}),
        ({"drop": ("small", "two")}, {0: "holds", 2: "not tested", 3: "not tested"}),
        ({"drop": ("ours",)}, {0: "not tested", 3: "not tested", 4: "not tested", 6: "not tested"}),
        ({"nats": {("write", "two", "dictionary"): 0.05}}, {3: "fails"}),
        ({"nats": {("write", "", "mean"): 0.005}}, {3: "confounded"}),
        ({"nats": {("write", "", "zero"): 1e-9}}, {3: "below the floor"}),
        ({"dead": {"flat": 300, "dense": 200}}, {4: "holds"}),
        ({"dead": {"flat": 300}}, {4: "confounded"}),  # so does the dense encoder
        ({"dead": {"flat": 300}, "drop": ("dense",)}, {4: "holds"}),
        ({"nats": {("state", "", "rank 1"): 0.002}}, {5: "fails"}),
        ({"target": "state", "nats": {("state", "", "zero"): 1e-9}}, {5: "below the floor"}),
        ({"share": {"ours": 0.1}}, {6: "fails"}),
        ({"share": {"flat": 0.7}}, {6: "confounded"}),
    ],
)
def test_verdicts_follow_the_rules(changes: dict[str, Any], outcomes: dict[int, str]) -> None:
    claims = made_up(**changes).claims()
    assert {i: claims[i].outcome for i in outcomes} == outcomes
    assert all(claim.n > 0 for claim in claims if claim.outcome != "not tested")


def test_points_and_costs_are_said_with_their_sign() -> None:
    claims = made_up({("flat", "svd"): 3.0}, {("write", "two", "dictionary"): 0.01}).claims()
    assert claims[0].measured.startswith("+") and "points" in claims[0].measured
    assert "state direction" in claims[0].controls and "1 principal component" in claims[0].controls
    assert "perplexity +1" in claims[3].measured and "mean matrix +1" in claims[3].controls
