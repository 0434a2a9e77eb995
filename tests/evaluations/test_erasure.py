"""Erasure against full passes with the write changed by hand, on dictionaries with a known code; its verdicts."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
import torch
from sae_lens import SAE
from saes import LAYER, logits_with_write, one_atom_a_position, random_sae
from torch import Tensor

from hookpoints import HookedRecurrent
from sae_lens_writesae.atom.low_rank import LowRank
from sae_lens_writesae.errors import NothingToMeasureError
from writesae.evaluations.erasure import Erasure
from writesae.experiment.evaluation import Result
from writesae.experiment.firings import collect_firings, halves
from writesae.experiment.lab import Lab

SMALL = {"n_atoms": 3, "select_firings": 4, "test_firings": 3, "min_firings": 2, "horizon": 3}


@pytest.fixture
def planted(model64: HookedRecurrent, equal_rows: Tensor) -> SAE:
    return one_atom_a_position(model64, equal_rows[:1])


def run(model: HookedRecurrent, sae: SAE, equal_rows: Tensor, **changes: object) -> Result:
    return Erasure(**SMALL | changes).run(model, sae, equal_rows, progress=False)


def test_erasing_an_atom_that_is_the_write_is_deleting_the_write(
    model64: HookedRecurrent, equal_rows: Tensor, planted: SAE
) -> None:
    tables = run(model64, planted, equal_rows).tables
    firings, token = tables["firings"], tables["atoms"].set_index("atom")["token"]
    assert (firings["atom"] == firings["position"]).all() and len(firings) == 9  # an atom is the write of its position
    native = logits_with_write(model64, equal_rows[:1], lambda writes: writes).log_softmax(-1)
    for row in firings.drop_duplicates("atom").itertuples():

        def silenced(writes: Tensor, position: int = row.position) -> Tensor:
            writes[position] = 0
            return writes

        edited = logits_with_write(model64, equal_rows[:1], silenced).log_softmax(-1)
        change = (edited - native)[row.position : row.position + 4].mean(0)
        assert row.effect == pytest.approx(float(change[token[row.atom]]), rel=1e-4)
        assert change.argmin() == token[row.atom]  # sequences are equal, so that both halves choose the same token


def test_an_atom_elsewhere_takes_the_same_norm_from_the_write_there_or_is_put_in(
    model64: HookedRecurrent, equal_rows: Tensor, planted: SAE
) -> None:
    """All sequences are equal, so that the median activation is that of each firing."""
    result = run(model64, planted, equal_rows)
    row = result.tables["firings"].iloc[0]
    token = int(result.tables["atoms"].set_index("atom")["token"][row["atom"]])
    there, atom = int(row["elsewhere_position"]), planted.W_dec[int(row["atom"])].detach().double()
    assert there != row["position"]
    doses = result.tables["doses"].query("atom == @row.atom and sequence == @row.sequence and position == @there")

    def moved(change: Callable[[Tensor], Tensor]) -> float:
        def at(writes: Tensor) -> Tensor:
            writes[there] += change(writes[there])
            return writes

        native, edited = (
            logits_with_write(model64, equal_rows[:1], how).log_softmax(-1) for how in (lambda writes: writes, at)
        )
        return float((edited - native)[there : there + 4, token].mean())

    taken = moved(lambda write: -row["activation"] * write / torch.linalg.matrix_norm(write))
    put_in = moved(lambda write: 4 * row["activation"] * atom.view_as(write))
    assert row["elsewhere"] == pytest.approx(taken, rel=1e-4)
    assert doses.set_index("dose")["effect"][4.0] == pytest.approx(put_in, rel=1e-4)


def test_the_choice_of_tokens_never_sees_the_test_half(model64: HookedRecurrent, varied: Tensor) -> None:
    sae, split = random_sae(model64), halves(len(varied), 0)
    changed = varied.clone()
    changed[split.test] = varied[split.test].flip(1)
    often = [np.bincount(collect_firings(model64, sae, LAYER, ids).atom, minlength=12) for ids in (varied, changed)]
    atoms = tuple(np.argsort(-np.minimum(*often))[:3].tolist())
    one, other = (run(model64, sae, ids, n_atoms=None, atoms=atoms).tables for ids in (varied, changed))
    same = ["atom", "token", "n_select", "selected"]
    assert one["atoms"][same].equals(other["atoms"][same])
    assert not np.allclose(one["atoms"]["effect"], other["atoms"]["effect"])
    assert set(one["firings"]["sequence"]) <= set(split.test.tolist()) and not set(split.test) & set(split.select)


def test_the_random_direction_fits_the_firings_best_and_wrong_tokens_are_others(
    model64: HookedRecurrent, varied: Tensor
) -> None:
    sae, test = random_sae(model64), Erasure(**SMALL)
    with torch.no_grad():
        lab = Lab(model64, {"": sae}, varied)
        atoms, select, _ = test._draw(lab)
        directions = {"effect": lab.atoms(atoms), "random": test._fitting(lab, select, lab.atoms(atoms))}
        fitting = directions["random"].dense().flatten(1)
        drawn = LowRank(torch.empty(12, 1, 8), torch.empty(12, 1, 6)).random_like(torch.Generator().manual_seed(0))
        every = torch.nn.functional.normalize(drawn.dense().flatten(1))
        for column, rows in select.groupby("column"):
            writes = [lab.native_writes([s]).rows([t]).dense().flatten() for s, t in zip(rows.sequence, rows.position)]
            best = every[(torch.stack(writes).to(every) @ every.T).mean(0).argmax()]
            torch.testing.assert_close(fitting[int(str(column))], best, rtol=1e-5, atol=1e-6, check_dtype=False)
        chosen, _ = test._choose(lab, select, directions)
    assert chosen["wrong"].shape == (3, 8) and not (chosen["wrong"] == chosen["effect"]).any()


def test_what_cannot_be_measured_is_refused(model: HookedRecurrent, varied: Tensor) -> None:
    always = random_sae(model, k=12, bias=10.0)  # every atom fires everywhere, so that there is no place elsewhere
    with pytest.raises(NothingToMeasureError, match="elsewhere"):
        run(model, always, varied)
    with pytest.raises(ValueError, match="min_firings"):
        Erasure(min_firings=20)


NOISE = 0.02 * np.random.default_rng(3).standard_normal(64)


def dosed(raised: float, wrong: float = 0.0) -> pd.DataFrame:
    """A table `doses` of 64 firings of eight atoms: effects of `raised` nats a dose."""
    n = np.arange(64)
    parts = [
        pd.DataFrame({"atom": n % 8, "sequence": n // 8, "position": n, "dose": m}).assign(
            effect=m * raised * (1 + NOISE), wrong=m * wrong
        )
        for m in (1.0, 2.0, 4.0)
    ]
    return pd.concat(parts, ignore_index=True)


def sampled(**means: float) -> Result:
    """64 firings of eight atoms in eight sequences."""
    n = np.arange(64)
    columns = {"effect": 0.0, "elsewhere": 0.0, "random": 0.0, "wrong": 0.0} | means
    firings = pd.DataFrame({"atom": n % 8, "sequence": n // 8, "position": n, "activation": 1.0})
    for name, mean in columns.items():
        firings[name] = mean * (1 + NOISE)
    atoms = firings.groupby("atom")[list(columns)].mean().reset_index()
    atoms = atoms.assign(token=1, text="a", n_select=8, n=8, selected=2 * means["effect"], p=0.01)
    tables = {"firings": firings, "atoms": atoms, "doses": dosed(-means["effect"])}
    return Result(Erasure(), {"label": "x", "floor": 1e-5}, tables)


@pytest.mark.parametrize(
    "means, outcome, single",
    [
        ({"effect": -0.1, "random": -0.05}, "holds", "holds"),
        ({"effect": -0.1, "random": -0.15}, "confounded", "fails"),
        ({"effect": -0.1, "wrong": -0.1}, "confounded", "fails"),
        ({"effect": 0.1}, "fails", "fails"),
        ({"effect": -0.1, "random": -0.095}, "holds", "fails"),  # a lead, but none that matters
        ({"effect": -1e-6}, "below the floor", "fails"),
    ],
)
def test_verdicts(means: dict[str, float], outcome: str, single: str) -> None:
    result = sampled(**means)
    first, second, *_ = result.claims()
    assert (first.number, first.outcome, second.outcome) == (8, outcome, single)
    assert first.n == 64 and first.unit == "firings of 8 atoms in 8 sequences"
    assert f"{2 * means['effect']:+.2g} on the half" in first.measured or outcome == "below the floor"


@pytest.mark.parametrize(
    "doses, outcome",
    [
        ({"raised": 0.1}, "holds"),
        ({"raised": -0.1}, "fails"),  # as in the paper
        ({"raised": 0.1, "wrong": 0.1}, "confounded"),
        ({"raised": 0.0}, "below the floor"),
    ],
)
def test_verdicts_where_atoms_are_put_in(doses: dict[str, float], outcome: str) -> None:
    result = sampled(effect=-0.1)
    result = Result(result.evaluation, result.info, result.tables | {"doses": dosed(**doses)})
    *two, put_in = result.claims()
    assert (put_in.number, put_in.outcome) == (24, outcome)
    plain = Result(Erasure(injected=()), result.info, result.tables | {"doses": dosed(0)[:0]})
    assert plain.claims() == two
