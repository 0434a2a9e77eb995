"""The interventions as evaluations of the suite: tables, files, figures, what they refuse, verdicts of known cases."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from planted import random_sae
from torch import Tensor

from hookpoints import HookedRecurrent, UnknownHookError, UnsupportedModelError
from sae_lens_writesae.evaluation import Evaluation
from sae_lens_writesae.interventions.amplify import Amplify
from sae_lens_writesae.interventions.common import estimate, estimate_over_atoms
from sae_lens_writesae.interventions.draw import halves
from sae_lens_writesae.interventions.erasure import Erasure, ErasureConfig
from sae_lens_writesae.interventions.install import Install
from sae_lens_writesae.interventions.passage import Passage, PassageConfig
from sae_lens_writesae.interventions.readers import Readers, ReadersConfig
from sae_lens_writesae.interventions.sign import Sign
from sae_lens_writesae.suite import EVALUATIONS

SMALL: dict[str, dict[str, Any]] = {
    "erasure": {"n_atoms": 3, "select_firings": 3, "test_firings": 3, "min_firings": 2, "horizon": 2},
    "sign": {"n_positions": 8, "ranks": ((1, 10), (11, 60)), "first_position": 3},
    "install": {"pairs": 3, "prompt_tokens": 7, "new_tokens": 3},
    "amplify": {"n_tokens": 2, "min_count": 2, "min_firings": 1, "prompts": 3, "prompt_tokens": 5, "new_tokens": 6},
    "passage": {"passages": 3, "min_firings": 1},
    "readers": {"n_atoms": 3, "select_firings": 2, "test_firings": 2, "min_firings": 2, "horizon": 2},
    "multi_atom": {"n_atoms": 3, "firings_per_atom": 1, "counts": (1, 2), "horizon": 2, "mean_write_sequences": 2},
}
BY_ATOMS = [name for name in SMALL if name not in ("sign", "install")]


@pytest.fixture(scope="module")
def model(hf: Any) -> Any:
    return HookedRecurrent.from_hf(hf)


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(1, 64, (8, 21), generator=torch.Generator().manual_seed(9))


def run(name: str, model: Any, sae: Any, tokens: Tensor, **changes: Any) -> Evaluation:
    entry = EVALUATIONS[name]
    return entry.run(model, sae, tokens, entry.config_class(**SMALL[name] | changes), progress=False)


@pytest.mark.parametrize("target", ["write", "state"])
@pytest.mark.parametrize("name", SMALL)
def test_every_table_is_whole_and_a_loaded_result_says_the_same(
    model: Any, tokens: Tensor, tmp_path: Any, name: str, target: str
) -> None:
    found = run(name, model, random_sae(model, target=target), tokens, label="here")
    for table in found.tables.values():
        numbers = table.select_dtypes("number").to_numpy(float)
        assert len(table) and np.isfinite(numbers).all() and not table.isna().any(axis=None)
    assert (found.info["target"], found.label) == (target, "here") and found.info["seconds"] > 0
    assert found.info["conditions"] > 0 and re.fullmatch(r"\d+ s, [\d,]+ conditions, \d+ a second", found.pace)
    loaded = type(found).load(found.save(tmp_path / name))
    assert loaded.claims() == found.claims() and loaded.notes() == found.notes()
    for fresh, kept in zip(found.figures(), loaded.figures(), strict=True):
        assert fresh.svg == kept.svg and fresh.svg.startswith("<svg") and "nan" not in fresh.svg.lower()
    for claim in found.claims():
        assert claim.n > 0 and claim.sentence and "nan" not in claim.measured + claim.controls


@pytest.mark.parametrize("name", SMALL)
def test_a_dictionary_of_something_else_is_refused(model: Any, tokens: Tensor, name: str) -> None:
    for place, message in (({"head": 7}, "7"), ({"layer": 3}, "blocks.3"), ({"layer": 9}, "9")):
        sae = random_sae(model)
        sae.cfg.metadata.hook_name = f"blocks.{place.get('layer', 1)}.mixer.heads.{place.get('head', 2)}.hook_write_vec"
        with pytest.raises((ValueError, UnknownHookError, UnsupportedModelError), match=message):
            run(name, model, sae, tokens)
    sae = random_sae(model)
    sae.cfg.metadata.hook_name = "blocks.1.hook_resid_post"
    with pytest.raises(ValueError, match=r"must read a head's write or state .* 'blocks\.1\.hook_resid_post'"):
        run(name, model, sae, tokens)
    sae = random_sae(model)
    sae.cfg.d_in = 12
    with pytest.raises(ValueError, match=r"reads 12 numbers, but .* has 8 x 6 = 48"):
        run(name, model, sae, tokens)


@pytest.mark.parametrize("name", SMALL)
def test_too_little_text_is_refused(model: Any, tokens: Tensor, name: str) -> None:
    for few in (tokens[:1], tokens[:, :2]):
        with pytest.raises(ValueError, match=r"tokens must be \[N,T\] with N >= 2 and T >= \d+, found"):
            run(name, model, random_sae(model), few)


@pytest.mark.parametrize("name", BY_ATOMS)
def test_a_dictionary_without_alive_atoms_is_refused(model: Any, tokens: Tensor, name: str) -> None:
    with pytest.raises(ValueError, match=r"fire|alive"):
        run(name, model, random_sae(model, bias=-1e6), tokens)


@pytest.mark.parametrize("name", ["erasure", "readers", "passage"])
def test_too_few_sequences_or_firings_are_refused(model: Any, tokens: Tensor, name: str) -> None:
    with pytest.raises(ValueError, match="at least 4 sequences, found 3"):
        run(name, model, random_sae(model), tokens[:3])
    many = {"select_firings": 300, "test_firings": 300} if name == "erasure" else {}
    with pytest.raises(ValueError, match=r"no atom .*300 times"):
        run(name, model, random_sae(model), tokens, min_firings=300, **many)


def test_atoms_that_are_not_there(model: Any, tokens: Tensor) -> None:
    with pytest.raises(ValueError, match=r"atoms \[99\] cannot be tested: .* the SAE has 12 atoms"):
        run("erasure", model, random_sae(model), tokens, atoms=(99,))
    with pytest.raises(ValueError, match=r"classes name atoms \[12\], the SAE has atoms 0 to 11"):
        run("passage", model, random_sae(model), tokens, classes={"mine": (3, 12)})
    for make, message in (
        (lambda: ErasureConfig(atoms=()), "atoms is an empty list"),
        (lambda: ErasureConfig(min_firings=20), r"min_firings \(20\) is above"),
        (lambda: ErasureConfig(erase="all"), "erase must be 'component' or 'write', found 'all'"),  # type: ignore[arg-type]
        (lambda: PassageConfig(classes={"none": ()}), "none of them empty"),
        (lambda: ReadersConfig(atoms=(3, 3)), "at least two atoms, named once each"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_two_kinds_of_atom_are_told_apart_by_the_rule(model: Any, tokens: Tensor) -> None:
    found = run("passage", model, random_sae(model), tokens, threshold=-2.0)
    assert found.classes == ["register"]  # type: ignore[attr-defined]
    assert set(found.tables["classes"]["class"]) == {"register"}


def test_halves_and_estimates() -> None:
    split = halves(9, 1)
    assert sorted([*split.select, *split.test]) == list(range(9)) and len(split.select) == 4
    assert all((a == b).all() for a, b in zip(split, halves(9, 1))) and not (halves(9, 2).test == split.test).all()
    rng = np.random.default_rng(0)
    values, sequences = rng.standard_normal(400) + 1, np.arange(400) % 40
    found = estimate(values, sequences)
    assert found.mean == pytest.approx(values.mean()) and (found.n, found.n_clusters) == (400, 40)
    assert found.low < 1 < found.high and found.high - found.low == pytest.approx(
        4 / 20, rel=0.25
    )  # +- 1.96 / sqrt(400)
    # An effect of the atom alone: the interval must be about atoms, as wide as that of their 8 values.
    atoms = np.arange(400) // 50
    wide = estimate_over_atoms(atoms.astype(float), sequences, atoms)
    assert wide.mean == 3.5 and wide.high - wide.low > 2
    alone = estimate_over_atoms(values, sequences, np.zeros(400))
    assert alone == found
    with pytest.raises(ValueError, match="an interval needs at least 2 clusters, found 1 with 3 values"):
        estimate([1.0, 2.0, 3.0], [0, 0, 0])


# ---------------------------------------------------------------------- verdicts of samples with a known answer

RNG = np.random.default_rng(3)
NOISE = 0.02 * RNG.standard_normal(64)


def erasure(**means: float) -> Erasure:
    """64 firings of eight atoms in eight sequences."""
    n = np.arange(64)
    columns = {"effect": 0.0, "elsewhere": 0.0, "random": 0.0, "wrong": 0.0} | means
    firings = pd.DataFrame({"atom": n % 8, "sequence": n // 8, "position": n, "activation": 1.0})
    for name, mean in columns.items():
        firings[name] = mean * (1 + NOISE)
    atoms = firings.groupby("atom")[list(columns)].mean().reset_index()
    atoms = atoms.assign(token=1, text="a", n_select=8, n=8, selected=2 * means["effect"], p=0.01)
    return Erasure({"label": "x"}, {"firings": firings.assign(elsewhere_position=0), "atoms": atoms})


@pytest.mark.parametrize(
    "means, outcome, single",
    [
        ({"effect": -0.1, "random": -0.05}, "holds", "holds"),
        ({"effect": -0.1, "random": -0.15}, "confounded", "fails"),
        ({"effect": -0.1, "wrong": -0.1}, "confounded", "fails"),
        ({"effect": 0.1}, "fails", "fails"),
        ({"effect": -1e-6}, "below the floor", "holds"),
    ],
)
def test_verdicts_of_erasure(means: dict[str, float], outcome: str, single: str) -> None:
    first, second = erasure(**means).claims()
    assert (first.number, first.outcome, second.outcome) == (8, outcome, single)
    assert first.n == 64 and first.unit == "firings of 8 atoms in 8 sequences"
    assert erasure(**means).selected == pytest.approx(2 * means["effect"])


def sign(right: float, wrong: float, flip: int = 1) -> Sign:
    """A linear readout: the logit moves by `flip` times what F0 says on a share of writes, else the other way."""
    rows = []
    for n in range(200):
        for m in (1.0, -1.0):
            for direction, share in (("direct", right), ("gradient", 1.0), ("random", 0.5), ("wrong", wrong)):
                gain = 1 if (n * 37 % 200) / 200 < share else -1
                predicted = {"f0": 0.5 * m, "f2": 0.5 * m * gain * flip, "aimed": np.sign(m)}
                described = {"sequence": n // 4, "position": n, "token": 1, "text": "a", "rank": 3}
                rows.append(described | predicted | {"direction": direction, "m": m, "measured": 0.5 * m * gain * flip})
    return Sign({"label": "x"}, {"writes": pd.DataFrame(rows)})


def test_signs_of_a_linear_readout_flip_with_it() -> None:
    found, flipped = sign(1.0, 0.5), sign(1.0, 0.5, flip=-1)
    assert found.rate("direct", "f0").rate == 1 and found.rate("direct", "written").rate == 1
    assert flipped.rate("direct", "f0").rate == 0 and flipped.rate("direct", "f2").rate == 1
    assert [f.claims()[0].outcome for f in (found, flipped)] == ["holds", "fails"]
    assert found.claims()[0].n == 200 and found.claims()[1].outcome == "holds"
    sizes = flipped.sizes().set_index("direction")
    assert sizes.loc["direct", "f2_r2"] == pytest.approx(1) and sizes.loc["direct", "f0_r2"] == pytest.approx(-3)
    assert sizes.loc["direct", "f0_r"] == pytest.approx(-1)


@pytest.mark.parametrize("n", [0, 1])
def test_few_firings_are_inconclusive(n: int) -> None:
    """19 firings; and firings of four sequences."""
    whole = erasure(effect=-0.1)
    table = whole.tables["firings"]
    few = table.iloc[::3][:19] if n == 0 else table[table["sequence"] < 4]
    claims = Erasure(whole.info, whole.tables | {"firings": few}).claims()
    assert claims[0].outcome == "inconclusive"


@pytest.mark.parametrize("right, wrong, outcome", [(0.9, 0.5, "holds"), (0.8, 0.8, "confounded"), (0.5, 0.9, "fails")])
def test_verdicts_of_signs(right: float, wrong: float, outcome: str) -> None:
    claim = sign(right, wrong).claims()[0]
    assert (claim.number, claim.outcome) == (9, outcome)


def install(target: float, random: float, wrong: float, nothing: float = 0.0) -> Install:
    rows = []
    for pair in range(40):
        described = {"pair": pair, "sequence": pair // 2, "stratum": "100-1000", "token": 1, "text": "a", "rank": 200}
        place = pair * 7 % 40 / 40
        for condition, m, share in (("nothing", 0.0, nothing), ("target", 3.0, target), ("random", 3.0, random)):
            hits = {"hit": place < share, "wrong_hit": place < wrong, "first": 0 if place < share else -1}
            rows.append(described | hits | {"wrong": 2, "condition": condition, "m": m, "log_prob_change": 0.1})
    return Install({"label": "x", "config": {"headline": 3.0, "sizes": [3.0]}}, {"continuations": pd.DataFrame(rows)})


@pytest.mark.parametrize(
    "shares, outcome",
    [
        ((0.95, 0.1, 0.1), "holds"),
        ((0.5, 0.5, 0.0), "confounded"),
        ((0.5, 0.0, 0.6), "confounded"),
        ((0.3, 0.0, 0.0, 0.3), "fails"),
    ],
)
def test_verdicts_of_installs(shares: tuple[float, ...], outcome: str) -> None:
    claim = install(*shares).claims()[0]
    assert (claim.number, claim.outcome, claim.n, claim.unit) == (10, outcome, 40, "prompt x target pairs")
    assert ("as in the paper" in claim.sentence) == (shares[0] > 0.9)


def passage(**costs: float) -> Passage:
    rows = [
        {"sequence": n, "class": "register", "condition": name, "bits": bits * (1 + NOISE[n])}
        | {"native_bits": 2.0, "tokens_edited": 9, "norm": 0.5}
        for name, bits in ({"deleted": 0.0, "own": 0.0, "removed": 0.0, "inserted": 0.0, "random": 0.0} | costs).items()
        for n in range(20)
    ]
    members = pd.DataFrame({"class": ["register"] * 2, "atom": [3, 4]})
    return Passage({"label": "x"}, {"passages": pd.DataFrame(rows), "classes": members})


@pytest.mark.parametrize(
    "costs, outcome",
    [
        ({"deleted": 0.01, "random": 0.2, "removed": 0.05}, "holds"),
        ({"deleted": 0.01, "random": 0.2, "removed": 0.01}, "confounded"),
        ({"deleted": 0.3, "random": 0.2, "removed": 0.01}, "fails"),
        ({"deleted": 1e-8}, "below the floor"),
    ],
)
def test_verdicts_of_passages(costs: dict[str, float], outcome: str) -> None:
    claim = passage(**costs).claims()[0]
    assert (claim.number, claim.outcome, claim.n) == (19, outcome, 20) and "2 atoms" in claim.claim


def readers(atom: float, random: float, other: float, elsewhere: float = 1.0) -> Readers:
    """Head 0 of layer 2 is the reader; at the other head the atom is as loud as `elsewhere` times the random one."""
    rows = []
    for n in range(64):
        described = {"firing": n, "half": ("select", "test")[n // 32], "atom": n % 8, "sequence": n // 4, "position": n}
        for head in (0, 1):
            loud = {"atom": atom if head == 0 else elsewhere * random, "random": random, "other": other}
            for condition, change in loud.items():
                change *= 1 + NOISE[n] if condition == "atom" else 1
                place = {"layer": 2, "mixer": "recurrence", "head": head}
                rows.append(described | place | {"condition": condition, "change": change, "peak": 1})
    return Readers({"label": "x"}, {"changes": pd.DataFrame(rows)})


@pytest.mark.parametrize(
    "changes, outcome",
    [
        ((0.4, 0.1, 0.1), "holds"),
        ((0.4, 0.1, 0.4), "confounded"),
        ((0.4, 0.1, 0.1, 4.0), "confounded"),
        ((0.1, 0.2, 0.01, 0.1), "fails"),
        ((4e-8, 1e-8, 1e-8), "below the floor"),
    ],
)
def test_verdicts_of_readers(changes: tuple[float, ...], outcome: str) -> None:
    found = readers(*changes)
    claim = found.claims()[0]
    assert (claim.outcome, claim.n) == (outcome, 32)
    if outcome == "holds":
        assert (found.readers()["head"] == 0).all() and len(found.readers()) == 8
        assert np.exp(found.at_readers()["random"].mean()) == pytest.approx(4, rel=0.02)


def amplify(atom: float, random: float = 0.0, other: float = 0.0) -> Amplify:
    """Mean changes of counts over 20 prompts and five tokens, whole numbers but for `other`."""
    rows = []
    for token in range(5):
        for prompt in range(20):
            native, wobble = float(RNG.integers(3, 8)), float(RNG.integers(-1, 2)) if atom else 0.0
            described = {"token": token, "text": "abcde"[token], "prompt": prompt, "sequence": prompt, "fires": 2.0}
            rows.append(described | {"condition": "nothing", "factor": 1.0, "count": native})
            changes = {"atom": atom + wobble, "random": random, "other": other}
            rows += [described | {"condition": c, "factor": 4.0, "count": native + x} for c, x in changes.items()]
    atoms = pd.DataFrame({"token": range(5), "text": list("abcde"), "atom": range(5), "count": 30})
    atoms = atoms.assign(phi=0.5, phi_test=0.4, precision=0.5, recall=0.5)
    config = {"headline": 4.0, "factors": [4.0], "new_tokens": 64, "aligned": "current"}
    return Amplify({"label": "x", "config": config}, {"atoms": atoms, "counts": pd.DataFrame(rows)})


@pytest.mark.parametrize(
    "changes, outcome, single",
    [
        ((3.0, 0.0, 0.5), "holds", 5),
        ((-2.0, 0.0, 0.0), "holds", 5),  # either direction moves the token
        ((3.0, 3.0, 0.0), "confounded", 0),
        ((3.0, 0.0, 3.0), "confounded", 0),
        ((0.0, 1.0, 0.0), "below the floor", 0),
    ],
)
def test_verdicts_of_scaled_atoms(changes: tuple[float, ...], outcome: str, single: int) -> None:
    first, second = amplify(*changes).claims()
    assert (first.number, first.outcome, first.n) == (18, outcome, 100)
    assert second.measured.startswith(f"{single} of 5 tokens") and (second.outcome == "holds") == (single > 0)
