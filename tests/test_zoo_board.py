"""`writesae zoo`: a dictionary that is right scores as one, one without information scores as none, and a scorer that
cannot tell them apart is caught."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import normalize, one_hot

from hookpoints import zoo
from sae_lens_writesae import training_config
from sae_lens_writesae.sae.rows import new_sae
from writesae.cli import main
from writesae.known import board as boards
from writesae.known import sides
from writesae.known.board import scored
from writesae.known.scores import attributed, purity
from writesae.known.sides import HeadCode, of_labels, of_product, of_sides
from writesae.known.states import pursue_pairs, share_held
from writesae.known.world import Facts, World
from writesae.zoo import Zoo


@pytest.fixture(scope="module")
def world() -> World:
    return World.of("recall", 256)


def board(world: World, facts: int = 64) -> tuple[dict[str, float], dict[str, float]]:
    """Rows of the vectors of the symbols, and of the same for other rows: the truth, and a null."""
    symbols = one_hot(world.key_symbols).float(), world.parts(world.value_symbols)
    truth = of_sides(*map(of_labels, (world.keys[0], world.values[0]), symbols))
    mixed = torch.randperm(len(symbols[0]), generator=torch.Generator().manual_seed(0))
    null = HeadCode._make(x[mixed] if isinstance(x, torch.Tensor) and len(x) == len(mixed) else x for x in truth)
    drawn = Facts.draw(world, facts)
    rows = (scored("", [[code]], world, drawn) for code in (truth, null))
    found = [{name: x["mean"] if isinstance(x, dict) else x for name, x in row.items()} for row in rows]
    return found[0], found[1]


def check(truth: dict[str, float], null: dict[str, float]) -> None:
    for name in ("keys found", "values found", "key purity", "value purity", "changed", "kept"):
        assert truth[name] > 0.97, name
    for name in ("keys found", "values found", "changed"):
        assert null[name] < 0.1, name
    assert null["kept"] > 0.97


def test_the_truth_scores_as_truth_and_a_null_as_chance(world: World) -> None:
    check(*board(world))


@pytest.mark.parametrize(
    ("owner", "name", "broken"),
    [
        (boards, "purity", lambda atoms, parts: (1.0, 1.0)),
        (Facts, "ask", lambda facts, world, writes: {each: facts.new >= 0 for each in facts.questions}),
        (Facts, "ask", lambda facts, world, writes, ask=Facts.ask: ask(facts, world, None)),
    ],
    ids=["every atom is pure", "every answer is right", "nothing is written"],
)
def test_a_broken_scorer_is_caught(
    world: World, monkeypatch: pytest.MonkeyPatch, owner: object, name: str, broken: object
) -> None:
    monkeypatch.setattr(owner, name, broken)
    with pytest.raises(AssertionError):
        check(*board(world))


def test_purity_by_hand() -> None:
    """Atom 0 has three rows of symbol 0 and one of symbol 1; atom 1 three of symbol 2; atom 2 too few rows."""
    atoms = torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 2])
    symbols = one_hot(torch.tensor([0, 0, 0, 1, 2, 2, 2, 3, 3])).float()
    assert purity(atoms, symbols) == (pytest.approx((3 / 4 + 1) / 2), pytest.approx(1 / 4))
    assert purity(torch.zeros(9, dtype=torch.long), symbols) == (pytest.approx(1 / 3), 0)


def test_attribution_finds_the_writes_that_hold_a_fact(world: World) -> None:
    found = attributed(world, 3)
    assert found["writes found"] > 0.9 > 10 * found["null"]


def test_the_models_of_a_board_are_in_the_zoo_by_default() -> None:
    assert Zoo().models and {*Zoo().models} <= {*zoo.names()}


def test_rows_are_put_into_a_board_of_the_same_settings_alone(tmp_path: Path) -> None:
    command = Zoo(only="writesae_product", out=tmp_path)
    settings = {"models": ("recall",), "seeds": 2}
    (tmp_path / "zoo.json").write_text(json.dumps({"settings": settings, "boards": []}))
    assert command._saved(settings)["boards"] == []
    with pytest.raises(ValueError, match=r"only: expected .*zoo\.json of the settings"):
        command._saved(settings | {"seeds": 3})


def test_a_state_is_read_back_as_its_facts() -> None:
    g = torch.Generator().manual_seed(0)
    keys, values = (normalize(torch.randn(40, 32, generator=g), dim=1) for _ in range(2))
    held = (
        torch.stack([torch.randperm(40, generator=g)[:8] for _ in range(20)]),
        torch.randint(40, (20, 8), generator=g),
    )
    sizes = 0.5 + torch.rand(20, 8, generator=g)
    states = torch.einsum("bn,bnk,bnv->bkv", sizes, keys[held[0]], values[held[1]])
    facts = 40 * held[0] + held[1]
    found = (pursue_pairs(states, keys, torch.arange(40), values, 8, refit=refit) for refit in (True, False))
    pursuit, strongest = (share_held(40 * k + v, facts) for k, v in found)
    assert pursuit > 0.95 and strongest < pursuit


def test_additive_books_find_the_parts_of_sums_and_one_book_is_enough_for_whole_values() -> None:
    """Three books of four in 8 dimensions, 12 numbers of codes in all: twelve words of k-means cannot name 64 sums."""
    g = torch.Generator().manual_seed(0)
    books, chosen = torch.randn(3, 4, 8, generator=g), torch.randint(4, (600, 3), generator=g)
    noise = 0.05 * torch.randn(600, 8, generator=g)
    sums = books[torch.arange(3), chosen].sum(1) + noise

    def unexplained(side: sides.Side, rows: torch.Tensor) -> float:
        return float((side.code @ side.atoms - rows).square().sum() / (rows - rows.mean(0)).square().sum())

    found = sides.additive(sums, 12, 0)
    assert found.atoms.shape == (12, 8) and found.bits == 6 and (found.code.sum(1) == 3).all()
    assert unexplained(found, sums) < 0.01 and unexplained(sides.kmeans(sums, 12, 0), sums) > 0.2
    words = torch.randn(12, 8, generator=g)[torch.arange(600) % 12] + noise
    whole = sides.additive(words, 12, 0)
    assert whole.bits == pytest.approx(math.log2(12)) and unexplained(whole, words) < 0.01


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_command_writes_its_page_and_its_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sides, "GRID", (8,))
    tiny = ["--seeds", "2", "--sequences", "128", "--facts", "16", "--steps", "3", "--out", str(tmp_path / "zoo")]
    main(["zoo", "--models", "recall", *tiny])
    written = json.loads((tmp_path / "zoo" / "zoo.json").read_text())
    page, table = ((tmp_path / "zoo" / name).read_text() for name in ("index.html", "zoo.md"))
    (of_recall,) = written["boards"]
    assert {"writesae_product", "null: another pair's write"} < {row["method"] for row in of_recall["rows"]}
    assert of_recall["attribution"]["writes found"] > 0.9 > 10 * of_recall["attribution"]["null"]
    assert [row["pairs"] for row in of_recall["states"]] == [4, 8, 12, 16]
    assert all(row["method"].split(" (")[0] in page and row["method"] in table for row in of_recall["rows"][:1])
    one = ["--only", "additive quantizers of k and of u"]
    main(["zoo", "--models", "recall", *tiny, *one])  # the same rows, of which one was measured again
    assert json.loads((tmp_path / "zoo" / "zoo.json").read_text()) == written
    with pytest.raises(SystemExit):
        main(["zoo", "--models", "composition", *tiny, *one])


def test_a_product_dictionary_counts_the_same_in_either_orientation(world: World) -> None:
    cfg = training_config(world.model, 1, 1, architecture="writesae_product", d_sae=64, sae={"k_value": 2})
    sae: Any = new_sae(cfg)
    before = of_product(sae, world.keys[0], world.values[0])
    for parameter in sae.parameters():
        parameter.data.neg_()
    after = of_product(sae, world.keys[0], world.values[0])
    torch.testing.assert_close(before.contribution, after.contribution)
    torch.testing.assert_close(before.values, after.values)
