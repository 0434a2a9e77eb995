"""The substitution test: planted truths, and verdicts on made-up tables."""

from __future__ import annotations

import itertools
from typing import Any, cast, get_args

import numpy as np
import pandas as pd
import pytest
import torch
from made_up import CONFOUNDED, FAILS, HOLDS, NO_EFFECT, made_up, runner
from sae_lens import SAE
from saes import native_writes, random_sae, tied_sae
from torch import Tensor
from transformers.models.qwen3_5 import modeling_qwen3_5

from hookpoints import HookedRecurrent, embedded
from writesae_study.evaluations.substitution import Substitution
from writesae_study.experiment.at_firings import wide_firings
from writesae_study.experiment.conditions import DIRECTIONS, Scale
from writesae_study.experiment.evaluation import Result
from writesae_study.experiment.readout import KL_METRICS
from writesae_study.head.baselines import BASELINES
from writesae_study.verdict.finding import Claim, Finding
from writesae_study.verdict.names import NAMES

T, HORIZON = 18, 4
run = runner(
    Substitution,
    **{
        "n_atoms": 4,
        "firings_per_atom": 2,
        "horizon": HORIZON,
        "mean_write_sequences": 2,
    },
)


def nearer(result: Result, scale: str) -> Finding:
    """Claim 1 of the first choice of atom at one scale."""
    return cast(Substitution, result.evaluation).nearer(wide_firings(result), scale)


def firings_of(result: Result) -> pd.DataFrame:
    return result.tables["firings"]


# -- planted truths


def test_atoms_that_are_the_writes_recover_the_whole_effect(
    model64: HookedRecurrent, equal_rows: Tensor, planted: SAE
) -> None:
    more: Any = {"n_atoms": None, "firings_per_atom": 6, "atom_choice": ("dominant",), "controls": DIRECTIONS}
    result = run(model64, planted, equal_rows, scales=get_args(Scale), **more)
    wide = wide_firings(result)
    assert (wide["atom"] == wide["position"]).all() and np.allclose(wide["cosine"], 1, atol=1e-6)
    for scale in get_args(Scale):
        finding = nearer(result, scale)
        assert finding.shown["atom"].mean == pytest.approx(1, abs=1e-6) and finding.verdict.outcome == "holds"
        assert "wins 100.0%" in finding.measured
    assert result.claims()[0].number == 1 and result.claims()[0].n == len(wide) == 6 * (T - HORIZON - 1)


@pytest.mark.usefixtures("_keep_float64")
def test_the_kl_of_a_substitution_is_that_of_the_formulas(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shipped Gated DeltaNet in transformers alone, with its recurrence written out: S <- (1 - beta k k^T)
    exp(g) S + beta k v^T, of which the last term is an atom at one token of one head, and o = S^T q."""
    written: dict[tuple[int, int, int], Tensor] = {}  # by number of the call, token and head
    calls = itertools.count()

    def delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, **_: Any) -> tuple[Tensor, None]:
        q, k = (x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for x in (q, k))
        q, k = (x.repeat_interleave(v.shape[2] // x.shape[2], 2) for x in (q / q.shape[-1] ** 0.5, k))
        layer, state, read = next(calls), torch.zeros(*v.shape[::2], k.shape[-1], v.shape[-1]).to(v), []
        for t in range(v.shape[1]):
            state = state * g[:, t].exp()[..., None, None]
            erased = torch.einsum("bhk,bhj,bhjv->bhkv", k[:, t], k[:, t], state)
            write = torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
            erased, write = (beta[:, t, :, None, None] * each for each in (erased, write))
            for head in range(v.shape[2]):
                write[:, head] = written.get((layer, t, head), write[:, head])
            state = state - erased + write
            read.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]))
        return torch.stack(read, 1), None

    model = HookedRecurrent.from_pretrained("embedded", dtype="float64")
    tokens, (layer, head) = model.to_tokens(embedded.text("test")[:800])[0, :144].view(6, 24), (2, 2)
    sae = random_sae(model, layer=layer, head=head)
    table = firings_of(run(model, sae, tokens, scales=("coefficient",), controls=("shuffled",)))
    row = table.query("condition == 'atom'").iloc[0]
    hf = modeling_qwen3_5.Qwen3_5ForCausalLM.from_pretrained(embedded.path("embedded"), dtype=torch.float64)
    monkeypatch.setattr(modeling_qwen3_5, "torch_chunk_gated_delta_rule", delta_rule)
    log_p = []
    for write in (
        {},
        {(layer - 1, row["position"], head): row["activation"] * sae.W_dec[row["written_atom"]].view(64, 32)},
    ):
        calls, written = itertools.count(), write
        with torch.no_grad():
            log_p.append(hf(tokens[[row["sequence"]]], use_cache=False).logits[0, row["position"] :].log_softmax(-1))
    native, edited = log_p
    kl = (native.exp() * (native - edited)).sum(-1)[: HORIZON + 1]
    back = (edited.exp() * (edited - native)).sum(-1)[: HORIZON + 1]
    expected = [x for each in (kl, back) for x in (each.mean(), each[0], each[1])]
    assert row[list(KL_METRICS)].tolist() == pytest.approx([float(x) for x in expected], rel=1e-4)
    assert float(kl[0]) > 1e-5


def each_write(model: HookedRecurrent, tokens: Tensor) -> SAE:
    """An atom for each position of each sequence, which fires there alone."""
    sides = [native_writes(model, row[None]) for row in tokens]
    keys, values = (torch.nn.functional.normalize(torch.cat(side), dim=1) for side in zip(*sides))
    return tied_sae(keys, values, 1)


BESIDE: dict[str, Any] = {"atom_choice": ("dominant",), "n_atoms": None, "firings_per_atom": 1, "scales": ("matched",)}
"""All firings of a planted dictionary; at matched norm no size stands between what points along the write and it."""


def test_atoms_that_know_more_than_other_text_hold(model64: HookedRecurrent, varied: Tensor) -> None:
    """Each write is one of the atoms, and other sequences hold none of these writes."""
    result = run(model64, each_write(model64, varied), varied, **BESIDE)
    found = nearer(result, "matched")
    verdict, share = found.verdict, found.shown["atom"]
    assert share.low > 0.9 and (verdict.outcome, verdict.unbeaten_controls) == ("holds", ())
    free = {name: found.shown[NAMES[name]].mean for name in BASELINES}
    assert free["head_mean"] < free["drawn"] and max(free.values()) < 0.9


def test_the_dominant_atom_is_written_beside_the_firings_own(model64: HookedRecurrent, equal_rows: Tensor) -> None:
    """Atom t is the write at t, atom T + t the same at 0.9 of its norm: both fire there, and the first dominates."""
    keys, values = (torch.nn.functional.normalize(side, dim=1) for side in native_writes(model64, equal_rows[:1]))
    sae = tied_sae(torch.cat([keys, keys]), torch.cat([values, 0.9 * values]), 2)
    table = firings_of(run(model64, sae, equal_rows, atoms=tuple(range(T + 5, T + 11))))
    own, dominant = (table[table["choice"] == choice] for choice in ("own", "dominant"))
    assert list(table["choice"].unique()) == ["dominant", "own"]  # the first one is the headline
    assert (own["written_atom"] == own["atom"]).all() and (own["atom"] >= T).all()
    assert (dominant["written_atom"] == dominant["position"]).all()  # the atom that is the write itself
    assert not dominant.drop_duplicates("firing").duplicated(["sequence", "position"]).any()


# -- verdicts of made-up tables


def claims(medians: dict[str, float], **settings: Any) -> dict[int | None, Claim]:
    return {claim.number: claim for claim in made_up(medians, **settings).claims()}


@pytest.mark.parametrize(
    ("medians", "floor", "outcome", "unbeaten"),
    [
        (HOLDS, 0.0, "holds", ()),
        (FAILS, 0.0, "fails", ()),
        (CONFOUNDED, 0.0, "confounded", ("state before the write",)),
        (NO_EFFECT, 1e-12, "below the floor", ()),
        ({"delete": 1.0, "atom": 0.1, "state": 0.5}, 0.0, "holds", ()),  # a control that beats deletion, not the atom
        ({"delete": 1.0, "atom": 0.3, "state_after": 0.01}, 0.0, "holds", ()),  # a reference confounds nothing
    ],
)
def test_verdicts(medians: dict[str, float], floor: float, outcome: str, unbeaten: tuple[str, ...]) -> None:
    result = made_up(medians, floor=floor, scales=("coefficient",))
    verdict = nearer(result, "coefficient").verdict
    assert (verdict.outcome, verdict.unbeaten_controls) == (outcome, unbeaten)
    assert result.claims()[0].outcome == outcome


@pytest.mark.parametrize(
    ("medians", "expected"),
    [
        (HOLDS, {2: "holds", 3: "holds"}),
        (FAILS, {2: "fails", 3: "fails"}),
        (HOLDS | {"shuffled": 0.5}, {2: "fails"}),
        (NO_EFFECT, {2: "below the floor", 3: "below the floor"}),
        ({"delete": 1.0, "atom": 0.9, "shuffled": 1.01}, {3: "inconclusive"}),  # in order, but by chance
        (HOLDS | {"shuffled": 0.1}, {3: "confounded"}),  # another atom moves the model less
        (HOLDS | {"pair_mean": 0.1}, {3: "confounded"}),  # so does the mean write of the token pair
        (HOLDS | {"quantised": 0.1}, {3: "confounded"}),
    ],
)
def test_claims_2_and_3_are_judged_at_matched_norm_with_intervals(
    medians: dict[str, float], expected: dict[int, str]
) -> None:
    made = claims(medians, floor=1e-12)
    assert {number: made[number].outcome for number in expected} == expected


@pytest.mark.parametrize(
    ("info", "number"),
    [
        ({"rule": "Mamba-2"}, 11),
        ({"rule": "RWKV-7"}, 12),
        ({"rule": "DeltaNet"}, 13),
        ({"rule": "GLA"}, 1),
        ({"model": "Qwen/Qwen3.5-4B-Base"}, 14),
    ],
)
def test_the_claim_of_a_rule_and_of_the_larger_model(info: dict[str, str], number: int) -> None:
    result = made_up(HOLDS, scales=("matched",))
    result.info.update(info)
    assert result.claims()[0].number == number


def test_all_heads_of_a_layer() -> None:
    heads = [made_up(HOLDS if n < 3 else FAILS, head=n, seed=n, scales=("matched",)) for n in range(4)]
    ((label, claim),) = Substitution.across(heads)
    assert (label, claim.number, claim.n, claim.outcome) == ("L1 write-trained", 5, 4, "fails")
    assert Substitution.across(heads[:3])[0][1].outcome == "holds"
    assert Substitution.across(heads[:1]) == []  # one head says nothing about others
    assert Substitution.across([*heads, heads[0]]) == []  # which dictionary of that head would be a choice
    rates = [(w["atom/matched"] < w["delete"]).mean() for w in map(wide_firings, heads)]
    assert f"{100 * np.mean(rates):.1f}" in claim.measured


def test_how_much_is_the_total_and_a_typical_sequence_is_named_so() -> None:
    """The atom recovers 90% where deletions do most, and nothing in most sequences: the total is large, the typical
    share 0."""
    result = made_up({"delete": 1.0}, scales=("matched",), controls=("state",), n_sequences=40)
    table = result.tables["firings"]
    large = table["sequence"] % 4 == 0
    deleted = table.loc[table["condition"] == "delete"].set_index("firing")["kl_window"]
    kl = table["firing"].map(deleted) * np.where(large, 50.0, 1.0)
    recovers = (table["condition"] == "atom") & large
    table["kl_window"] = np.where(table["condition"] == "native", 0.0, np.where(recovers, 0.1 * kl, kl))
    claim, finding = result.claims()[0], result.findings()[0]
    assert finding.effect is not None and 0.8 < finding.effect.mean < 0.9
    assert claim.outcome == "holds" and "total" in claim.measured
    assert "; 0.0% [0.0%, 0.0%] in a typical sequence; " in claim.measured


def test_wins_are_shown_by_quartile() -> None:
    """The paper's table 13 and figure 14."""
    result = made_up(HOLDS, scales=("matched",))
    (panel,) = result.evaluation.panels(result)
    assert "Q4 of deletion's effect" in panel.svg and "Q1 of the cosine with the write" in panel.svg
