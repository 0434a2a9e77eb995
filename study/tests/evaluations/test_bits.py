"""Codes of all writes of a head: what is replaced, what training lowers, and heads as units of a claim."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from saes import HEAD, LAYER, logits_with_write, random_low_rank
from torch.testing import assert_close

from hookpoints import HookedRecurrent
from sae_lens_writesae.sae.rows import row_orders
from writesae.head.upper import UpperModel
from writesae_study.codes.books import centered, descend, of_books, pursued, residual_quantizer
from writesae_study.evaluations.bits import RIVAL, WAYS, Bits, contender, divergence, whitening
from writesae_study.experiment.evaluation import Result
from writesae_study.experiment.terms import Terms, TermsError

TEXT = torch.randint(1, 64, (6, 24), generator=torch.Generator().manual_seed(3))


def test_streams_are_replaced_as_by_hand_and_tuning_lowers_their_divergence(model: HookedRecurrent) -> None:
    with torch.no_grad():
        writes, upper = Terms(model, TEXT).writes(LAYER, HEAD), UpperModel.of(model, [LAYER], TEXT)[LAYER]
        plain = upper().log_softmax(-1)
    code = centered(of_books("", 32.0, residual_quantizer(writes, 4, 2, 0)), writes)
    assert float(sum((code.written(writes) - writes.dense()).mean(0).flatten().abs()).detach()) < 1e-4
    found = divergence(upper, plain, HEAD, code).detach()
    for row, kl in zip(TEXT, found):
        own = Terms(model, row[None]).writes(LAYER, HEAD)
        native, edited = (
            logits_with_write(model, row[None], lambda _, x=x: x).log_softmax(-1)
            for x in (own.dense(), code.written(own).detach())
        )
        assert float(kl) == pytest.approx(float((native.exp() * (native - edited)).sum(-1).mean().detach()), rel=1e-3)
    loss = lambda _: 100 * divergence(upper, plain, HEAD, code).mean()  # noqa: E731
    descend(code.parameters, loss, row_orders(6, 2, 0), 60, 3e-4)
    assert float(divergence(upper, plain, HEAD, code).mean().detach()) < 0.95 * float(found.mean())
    assert all(each.grad is None for each in model.parameters())


def test_codes_have_no_more_bits_than_their_budget_and_what_is_no_code_has_none(model: HookedRecurrent) -> None:
    few = Bits(budgets=(16,), steps=1, tune_steps=0, whitened=True)
    found = few.run(model, (LAYER, HEAD), TEXT, reference=Terms(model, TEXT.flip(1)), progress=False).tables["codes"]
    bits = found.groupby("code")["bits"].max()
    assert bits[["native", "delete"]].tolist() == [0, 0]
    coded = bits.drop(["native", "delete"])
    assert len(coded) > 5 and (coded <= 16).all() and (coded > 0).all()
    assert {*found["way"]} == {"", *few.ways} and "whitened" in few.ways


@pytest.mark.parametrize("rank", [1, 2])
def test_whitened_writes_have_second_moments_near_the_identity(rank: int) -> None:
    """Those of the writes are far from it, and sizes stay."""
    writes = random_low_rank(rank, 5, n=4000)
    writes = type(writes)(writes.keys * torch.arange(1, writes.keys.shape[-1] + 1), writes.values)
    moved = whitening(writes).move(writes)
    assert float(moved.norm().square().mean()) == pytest.approx(float(writes.norm().square().mean()), rel=1e-4)
    spreads = []
    for matrices in (writes.dense(), moved.dense()):
        sizes = torch.linalg.eigvalsh((matrices @ matrices.mT).mean(0))
        spreads.append(float(sizes[-1] / sizes[0]))
    assert spreads[0] > 10 and spreads[1] < 1.6


@pytest.mark.parametrize("seed", range(4))
def test_a_book_has_no_codes_of_rounding(seed: int) -> None:
    """Of fewer matrices than codes each is a code, and what rounding leaves of it depends on the device."""
    writes = random_low_rank(1, seed, n=40).to(torch.zeros(()))
    first, second, third = residual_quantizer(writes, 64, 3, seed)
    assert len(first) == 40 and second is first and third is first
    assert_close(pursued(writes, [first, second, third]).dense(), writes.dense(), rtol=1e-4, atol=1e-5)


def made(head: int, lead: float, rows: int = 100, *, noise: float = 0.0) -> Result:
    """Shares of 0.8 of the rival, and more by `lead` of the dictionary; with `noise`, each varies by itself."""
    rng = np.random.default_rng(head)
    both, own = 0.2 + 0.01 * rng.random(40), noise * rng.standard_normal((2, 40))
    kl = {"native": 0 * both, "delete": 1 + 0 * both, f"{RIVAL} 1": both + own[0], contender(16): both - lead + own[1]}
    table = pd.concat([pd.DataFrame({"kl": x, "code": name}).rename_axis("sequence") for name, x in kl.items()])
    table = table.reset_index().assign(bits=16.0, parameters=1)
    ways = [table.assign(way=way, budget=16 * table["code"].str.contains("1").astype(int)) for way in WAYS]
    info = {"label": "", "model": "m", "hook_name": f"{head}", "n_sequences": 40, "n_positions": rows, "rules": ""}
    return Result(Bits(budgets=(16,)), info, {"codes": pd.concat(ways)})


@pytest.mark.parametrize("lead", [0.1, -0.1])
def test_a_lead_is_what_the_dictionary_recovers_more_than_a_rival(lead: float) -> None:
    found = made(0, lead).findings()
    assert found and all(finding.against[f"{RIVAL} 1"].contrast.mean == pytest.approx(lead) for finding in found)


def test_a_method_is_judged_over_heads_of_equal_terms() -> None:
    outcomes = [{claim.outcome for _, claim in Bits.across([made(n, lead) for n in range(6)])} for lead in (0.1, -0.1)]
    assert outcomes == [{"holds"}, {"fails"}] and not Bits.across([made(0, 0.1)])
    other = made(1, 0.1)
    for unequal in (made(1, 0.1, rows=99), replace(other, evaluation=replace(other.evaluation, steps=9))):
        with pytest.raises(TermsError):
            Bits.across([made(0, 0.1), unequal])
