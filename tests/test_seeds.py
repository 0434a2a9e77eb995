"""Seeds: identical dictionaries up to order and sign, random ones, fixed verdicts."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from small_saes import HOOK, make_sae, planted

from sae_lens_writesae.atom.matching import match_atoms
from sae_lens_writesae.conditions import Factors
from sae_lens_writesae.seeds import SAMPLES, Seeds, SeedsConfig, _summed, run_seeds


def dictionary(seed: int, n: int = 40, rank: int = 1) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    return Factors(*(torch.randn(n, rank, size, generator=generator) for size in (9, 7)))


@pytest.mark.parametrize("rank", [1, 3])
def test_order_and_sign_do_not_matter(rank: int) -> None:
    a = dictionary(0, rank=rank)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    sign = torch.where(torch.arange(40) % 2 == 0, 1.0, -1.0)[:, None, None]
    found = match_atoms(a, Factors(a.keys[order] * 3, (a.values * sign)[order]))
    assert found.cosine == pytest.approx(np.ones(40), abs=1e-6)
    assert order[found.second].tolist() == found.first.tolist()


def test_matching_is_the_best_assignment_and_not_greedy() -> None:
    """Greedy takes 0.9 and is left with 0; the best sum is 0.8 + 0.8."""
    angle = torch.tensor([[0.9, 0.8], [0.8, 0.0]]).acos()
    a = Factors(torch.eye(4)[:2][:, None], torch.ones(2, 1, 1))
    rows = torch.zeros(2, 1, 4)
    rows[:, 0, :2] = angle.cos()
    rows[:, 0, 2] = (1 - rows[:, 0, :2].square().sum(-1)).clamp_min(0).sqrt()
    assert torch.allclose(rows[1].norm(), torch.tensor(1.0))
    rows[0, 0] = rows[0, 0] / rows[0, 0].norm()
    found = match_atoms(a, Factors(rows, torch.ones(2, 1, 1)))
    assert found.second.tolist() == [1, 0]


def test_random_dictionaries_do_not_match() -> None:
    found = match_atoms(dictionary(0), dictionary(1, n=30))
    assert len(found.cosine) == 30 and len(set(found.second)) == 30
    assert np.median(found.cosine) < 0.5
    with pytest.raises(ValueError, match="0 and 40"):
        match_atoms(dictionary(0).rows([]), dictionary(1))


def test_the_same_dictionary_twice_matches_wholly(model: Any, tokens: Any, tmp_path: Any) -> None:
    sae, twin = planted(model, tokens), planted(model, tokens)
    order = torch.arange(29, -1, -1)
    for name in ("v", "w", "v_enc", "w_enc"):
        getattr(twin, name).data = getattr(sae, name).data[order].clone()
    twin.w.data, twin.v.data = -twin.w.data, -twin.v.data
    result = run_seeds(model, {"a": sae, "b": twin}, tokens, SeedsConfig(min_firings=2), progress=False)
    counts = result.tables["counts"].set_index("sae")
    assert counts.loc["a"].tolist() == counts.loc["b"].tolist()
    matches = result.tables["matches"].set_index("sample")
    assert matches.loc["atoms", "share_same"] == 1 and matches.loc["atoms", "median"] == pytest.approx(1)
    assert matches.loc["random", "share_same"] < 0.2
    pairs: Any = result.tables["pairs"]
    atoms = pairs[pairs["sample"] == "atoms"]
    assert (atoms["first"] + atoms["second"] == 29).mean() > 0.9  # atoms are writes, of which two may be alike
    kinds, beyond = result.claims()
    assert kinds.outcome == "fails" and "are the same" in kinds.sentence
    assert beyond.number is None and beyond.n == len(atoms)
    loaded = Seeds.load(result.save(tmp_path / "seeds"))
    assert loaded.claims() == result.claims() and loaded.figures() == result.figures()


def made(alive: list[int], register: list[int], atoms: Any, random: Any, writes: Any) -> Seeds:
    n = len(alive)
    counts = pd.DataFrame({"sae": list("abc")[:n], "alive": alive, "register": register, "dead": 0})
    cosines = dict(zip(SAMPLES, (atoms, random, writes)))
    parts = [
        pd.DataFrame({"a": "a", "b": "b", "sample": name, "first": range(len(x)), "second": 0, "cosine": x})
        for name, x in cosines.items()
    ]
    pairs, config = pd.concat(parts, ignore_index=True), SeedsConfig()
    info = {"config": {"largest_spread": 0.12, "largest_share": 0.01, "same": 0.9}, "label": "made"}
    return Seeds(info, {"counts": counts, "matches": _summed(pairs, config), "pairs": pairs})


LOW, HIGH = np.linspace(0.1, 0.3, 200), np.linspace(0.4, 0.7, 200)


@pytest.mark.parametrize(
    "alive, atoms, random, writes, outcomes, words",
    [
        ([100, 95], HIGH, LOW, LOW, ("holds", "holds"), "Counts agree"),
        ([100, 50], HIGH, LOW, LOW, ("fails", "holds"), "Counts vary"),
        ([100, 99], HIGH + 0.25, LOW, LOW, ("fails", "holds"), "are the same"),
        ([100, 99], LOW, LOW, LOW, ("inconclusive", "fails"), "nothing shows"),
        ([12, 12], HIGH[:12], LOW[:12], LOW[:12], ("inconclusive", "inconclusive"), "too few"),
        ([100, 99], HIGH, LOW, HIGH + 0.1, ("holds", "confounded"), "Counts agree"),
    ],
)
def test_verdicts(alive: Any, atoms: Any, random: Any, writes: Any, outcomes: Any, words: str) -> None:
    kinds, beyond = made(alive, alive, atoms, random, writes).claims()
    assert (kinds.outcome, beyond.outcome) == outcomes and words in kinds.sentence
    assert (kinds.number, kinds.n) == (20, 2)


def test_untrained_dictionaries_do_not_hold(model: Any, tokens: Any) -> None:
    """Random atoms of two seeds have nothing in common, and agree in their counts: that is no finding."""
    saes = {}
    for seed in (0, 1):
        sae = make_sae(model)
        torch.manual_seed(10 + seed)
        for factor in (sae.v, sae.w):
            factor.data = torch.nn.functional.normalize(torch.randn_like(factor), dim=-1)
        saes[str(seed)] = sae
    kinds = run_seeds(model, saes, tokens, SeedsConfig(min_firings=1), progress=False).claims()[0]
    assert kinds.number == 20 and kinds.outcome in ("inconclusive", "fails")


def test_errors_name_the_fault(model: Any, tokens: Any) -> None:
    sae = planted(model, tokens)
    with pytest.raises(ValueError, match="at least two SAEs to compare, found 1"):
        run_seeds(model, {"a": sae}, tokens, progress=False)
    other = make_sae(model, hook=HOOK.replace("heads.2", "heads.1"))
    with pytest.raises(ValueError, match="on one hook"):
        run_seeds(model, {"a": sae, "b": other}, tokens, progress=False)
    with pytest.raises(ValueError, match="a has no atom that fires 9999 times"):
        run_seeds(model, {"a": sae, "b": sae}, tokens, SeedsConfig(min_firings=9999), progress=False)
    with pytest.raises(ValueError, match="same"):
        SeedsConfig(same=1.5)
