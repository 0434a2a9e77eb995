"""Baselines: planted dictionaries, selectivity of known firings, runs on variants, fixed verdicts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sae_lens import SAE
from sae_lens.saes.sae import SAEMetadata
from saes import HEAD, HOOK, LAYER, STATE, K, V, logits_with_write, make_sae
from torch import Tensor

from hookpoints import HookedRecurrent
from sae_lens_writesae.atom.low_rank import LowRank
from sae_lens_writesae.sae import WriteTopKSAE, WriteTopKSAEConfig
from writesae.evaluations.baselines import Baselines
from writesae.experiment.evaluation import Result
from writesae.experiment.lab import Lab
from writesae.experiment.pca import MatrixPca
from writesae.experiment.reconstruction import Basis, exchanged
from writesae.experiment.selectivity import direction_selectivity

pytestmark = pytest.mark.usefixtures("no_grad")

SMALL = Baselines(test_sequences=4, pca_ranks=(1, 3), pca_writes=40, replacement_sequences=3, horizon=4)


@pytest.fixture
def tokens() -> Tensor:
    """[8,24] token ids."""
    return torch.randint(1, 64, (8, 24), generator=torch.Generator().manual_seed(1))


def flat_sae(d_sae: int, k: int) -> WriteTopKSAE:
    fields: dict[str, Any] = {"d_in": K * V, "d_k": K, "d_sae": d_sae, "k": k, "encoder": "dense", "decoder": "flat"}
    return WriteTopKSAE(WriteTopKSAEConfig(**fields, metadata=SAEMetadata(hook_name=HOOK, model_name="")))


def flat_of(writes: Tensor) -> WriteTopKSAE:
    """A flat dictionary whose atoms, and encoder atoms, are the directions of writes [F,K,V]."""
    sae = flat_sae(len(writes), 1)
    atoms = torch.nn.functional.normalize(writes.flatten(1), dim=1)
    sae.decoder_matrix.data, sae.encoder_matrix.data = atoms.clone(), atoms.T.contiguous()
    return sae


# -- what is written


def of_one_sequence(model: HookedRecurrent, saes: Mapping[str, SAE], tokens: Tensor, **settings: Any) -> pd.DataFrame:
    """The table `writes` of sequence 0, indexed by dictionary and condition."""
    one = model.recurrence(tokens, LAYER).select(heads=HEAD)
    rows = one.write()[:, :, 0].flatten(0, 1).flatten(1)
    pca = MatrixPca(rows.mean(0), torch.linalg.svd(rows - rows.mean(0)).Vh)
    basis = Basis(pca, LowRank.rank_one(one.k[0, :1, 0], one.u[0, :1, 0]), torch.zeros(K * V))
    lab, test = Lab(model, saes, tokens), Baselines(horizon=4, **settings)
    positions = test._positions(lab, lab.site(0))
    table = exchanged(lab, lab.site(0), positions, basis, test.pca_ranks, test.scale, 5)
    return table.set_index(["sae", "condition"])


@pytest.mark.parametrize("scale", ["matched", "coefficient"])
def test_a_planted_flat_dictionary_is_recovered_by_svd(model: HookedRecurrent, tokens: Tensor, scale: str) -> None:
    sae = flat_of(model.recurrence(tokens[:1], LAYER).write(HEAD)[0, :, 0])
    table = of_one_sequence(
        model, {"flat": sae}, tokens, scale=scale, positions_per_sequence=6, pca_ranks=(48,)
    ).sort_index()
    delete = table.loc[("", "delete"), "kl"].to_numpy()
    assert len(delete) == 6 and (delete > 1e-9).all()
    for key in (("flat", "atom"), ("flat", "atom svd"), ("flat", "svd"), ("", "pca 48")):
        assert table.loc[key, "cosine"].to_numpy() == pytest.approx(1, abs=1e-4)
        assert table.loc[key, "norm"].to_numpy() == pytest.approx(1, abs=1e-3)
        assert (table.loc[key, "kl"].to_numpy() < 1e-3 * delete).all()
    assert table.loc[("", "native"), "kl"].max() < 1e-9
    for control in ("random", "mean", "state", "state_after"):
        rows = table.loc[("", control)]
        size = 1 if scale == "matched" else rows["cosine"].to_numpy()  # a projection has the cosine as its norm
        assert rows["norm"].to_numpy() == pytest.approx(size, abs=1e-4) and rows["cosine"].abs().max() < 0.999


def test_nothing_is_written_where_no_atom_fires(model: HookedRecurrent, tokens: Tensor) -> None:
    silent = make_sae(model)
    silent.b_enc.data -= 1e6
    table = of_one_sequence(model, {"silent": silent}, tokens).sort_index()
    atom, delete = table.loc[("silent", "atom")], table.loc[("", "delete")]
    assert (atom["norm"] == 0).all() and atom["kl"].to_numpy() == pytest.approx(delete["kl"].to_numpy(), rel=1e-3)


def test_selectivity_is_one_minus_the_overlap_of_moved_tokens(model64: HookedRecurrent, tokens: Tensor) -> None:
    lab = Lab(model64, {"a": make_sae(model64)}, tokens)
    site, t, at = lab.site(0), 6, torch.tensor([6])
    write = site.at([t])
    generator = torch.Generator().manual_seed(int(lab.rng(13, 0).integers(2**62)))
    random, other = (write.random_like(generator) for _ in range(2))

    def top(direction: LowRank) -> set[int]:
        added = (direction * (write.norm() / direction.norm())).dense()[0]
        native, edited = (
            logits_with_write(model64, tokens[:1], lambda writes, m=m: writes.index_add(0, at, m * added[None]))[t]
            for m in (0, 1)
        )
        return set((edited.log_softmax(-1) - native.log_softmax(-1)).abs().topk(5).indices.tolist())

    table = direction_selectivity(lab, site, [t], {"same": random * 3.0, "other": other, "none": write * 0.0}, 5)
    expected = 1 - len(top(random) & top(other)) / 5
    assert table.set_index("sae")["selectivity"].to_dict() == pytest.approx({"same": 0.0, "other": expected})
    assert table["chance"].tolist() == pytest.approx([expected] * 2)


# -- all of it


def test_errors_name_the_fault(model: HookedRecurrent, tokens: Tensor) -> None:
    a = make_sae(model)
    for saes, text, words in (
        ({"a": a}, tokens, "at least two"),
        ({"a": a, "s": make_sae(model, hook=STATE)}, tokens, "one hook"),
        ({"a": a, "b": a}, tokens[:, :10], "19"),
    ):
        with pytest.raises(ValueError, match=words):
            Baselines().run(model, saes, text, progress=False)


# -- verdicts


SAES = {"ours": "WriteSAE", "two": "WriteSAE-rank2", "flat": "FlatSAE", "small": "FlatSAE", "dense": "MatrixSAE"}


def made_up(
    kl: dict[tuple[str, str], float] | None = None,
    nats: dict[tuple[str, str, str], float] | None = None,
    dead: dict[str, int] | None = None,
    drop: tuple[str, ...] = (),
    target: str = "write",
    n_sequences: int = 20,
    selectivity: float = 0.99,
) -> Result:
    """KLs by (sae, condition), costs by (hook, sae, method), dead atoms and selectivity by dictionary, with noise."""
    rng = np.random.default_rng(0)
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
        for label, name in SAES.items()
        if label not in drop
    ]
    dictionaries = pd.DataFrame(rows).assign(alive=lambda t: t["d_sae"] - t["dead"])
    base = {("", "native"): 1e-13, ("", "delete"): 1.0, ("ours", "atom"): 0.2, ("ours", "svd"): 0.2}
    base |= dict.fromkeys([("flat", "svd"), ("flat", "atom svd"), ("small", "svd")], 3.0)
    base |= {("", name): 3.0 for name in ("random", "mean", "state", "pca 1", "pca 4")} | {("", "state_after"): 0.01}
    writes = [
        {"sequence": s, "position": p, "sae": sae, "condition": c, "kl": k * np.exp(0.5 * rng.normal())}
        for (sae, c), k in (base | (kl or {})).items()
        for s in range(n_sequences)
        for p in (3, 9)
    ]
    costs = {(target, "", "itself"): 0.0, (target, "ours", "dictionary"): 0.01, (target, "two", "dictionary"): 0.01}
    costs |= {(target, "", "mean"): 0.1, (target, "", "zero"): 0.2, ("state", "", "rank 1"): 1e-4} | (nats or {})
    replacement = [
        {"sequence": s, "sae": sae, "hook": h, "method": m, "nats": x * rng.uniform(0.95, 1.05), "native_nats": 3.0}
        for (h, sae, m), x in costs.items()
        for s in range(n_sequences)
    ]
    directions = [
        {"sae": "ours", "sequence": s, "position": 3, "selectivity": x + 0.001 * rng.normal(), "chance": 0.99}
        for s in range(n_sequences)
        for x in [selectivity]
    ]
    tables = {
        "dictionaries": dictionaries,
        "writes": pd.DataFrame(writes).assign(cosine=0.1, norm=1.0),
        "replacement": pd.DataFrame(replacement),
        "selectivity": pd.DataFrame(directions),
    }
    return Result(
        Baselines(pca_ranks=(1, 4), scale="matched"),
        {"target": target, "label": "made up", "n_positions": 64, "d_vocab": 4096},
        tables,
    )


NOTHING: dict[tuple[str, str], float] = {("", "delete"): 1e-13, ("ours", "atom"): 1e-14, ("ours", "svd"): 1e-14}


@pytest.mark.parametrize(
    ("changes", "outcomes"),
    [
        # As in the paper, any direction is as selective.
        ({}, {0: "holds", 1: "holds", 2: "holds", 3: "holds", 4: "fails", 5: "holds", 6: "fails"}),
        ({"kl": {("flat", "atom svd"): 0.01}, "n_sequences": 40}, {0: "fails", 1: "holds", 2: "holds"}),
        ({"kl": {("flat", "atom svd"): 0.01}}, {0: "inconclusive"}),  # 20 sequences that are all alike
        ({"kl": {("flat", "svd"): 0.2}}, {0: "holds", 1: "fails", 2: "holds"}),  # neither is ahead
        ({"kl": {("ours", "atom"): 9.0, ("ours", "svd"): 9.0}}, {0: "fails", 1: "fails", 2: "fails"}),
        ({"kl": {("", "state"): 0.01}}, {0: "confounded", 1: "confounded", 2: "confounded"}),
        ({"kl": {("", "pca 4"): 0.01}}, {0: "holds", 1: "confounded", 2: "confounded"}),
        ({"kl": NOTHING}, {0: "below the floor", 1: "below the floor", 2: "below the floor"}),
        ({"drop": ("flat",)}, {0: "not tested", 1: "not tested", 2: "holds", 4: "not tested"}),
        ({"drop": ("small", "two")}, {0: "holds", 2: "not tested", 3: "not tested"}),
        ({"drop": ("ours",)}, {0: "not tested", 3: "not tested", 4: "not tested", 6: "not tested"}),
        ({"nats": {("write", "two", "dictionary"): 0.05}}, {3: "fails"}),
        ({"nats": {("write", "two", "dictionary"): 0.0105}}, {3: "holds"}),  # 0.05 % more does not matter
        ({"nats": {("write", "", "mean"): 0.005}}, {3: "confounded"}),
        ({"nats": {("write", "", "zero"): 1e-9, ("write", "", "itself"): 1e-8}}, {3: "below the floor"}),
        ({"n_sequences": 4}, {0: "inconclusive", 3: "inconclusive", 5: "inconclusive"}),
        ({"dead": {"flat": 300, "dense": 200}}, {4: "holds"}),
        ({"dead": {"flat": 300}}, {4: "confounded"}),  # so does the dense encoder
        ({"dead": {"flat": 300}, "drop": ("dense",)}, {4: "holds"}),
        ({"nats": {("state", "", "rank 1"): 0.002}}, {5: "fails"}),
        (
            {"target": "state", "nats": {("state", "", "zero"): 1e-9, ("state", "", "itself"): 1e-8}},
            {5: "below the floor"},
        ),
        ({"selectivity": 0.999}, {6: "holds"}),
    ],
)
def test_verdicts_follow_the_rules(changes: dict[str, Any], outcomes: dict[int, str]) -> None:
    claims = made_up(**changes).claims()
    assert {i: claims[i].outcome for i in outcomes} == outcomes
    assert all(claim.n > 0 for claim in claims if claim.outcome != "not tested")
