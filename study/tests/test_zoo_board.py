"""`writesae zoo`: a dictionary that is right scores as one, one without information scores as none, and a scorer that
cannot tell them apart is caught."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from saes import HOOK, random_low_rank, sae_of
from torch.nn.functional import normalize, one_hot

from hookpoints import files, zoo
from hookpoints.files import read_sealed_json, sealed_json
from sae_lens_writesae import training_config
from sae_lens_writesae.sae.rows import new_sae
from writesae.cli import main
from writesae_study.known import board as boards
from writesae_study.known import readers, sides
from writesae_study.known.board import scored
from writesae_study.known.readers import READERS, WRONG_SIZES, ReaderJob
from writesae_study.known.scores import attributed, features, purity
from writesae_study.known.sides import HeadCode, of_labels, of_product, of_sides
from writesae_study.known.states import TERMS, HeadReader, Reader, ReadShares, Told, pursue
from writesae_study.known.world import FactChanges, World
from writesae_study.zoo import Zoo


@pytest.fixture(scope="module")
def world() -> World:
    return World.of("recall", 256)


def board(world: World, facts: int = 64) -> tuple[dict[str, float], dict[str, float]]:
    """Rows of the vectors of the symbols, and of the same for other rows: the truth, and a null."""
    symbols = one_hot(world.key_symbols).float(), world.parts(world.value_symbols)
    truth = of_sides(*map(of_labels, (world.keys[0], world.values[0]), symbols))
    mixed = torch.randperm(len(symbols[0]), generator=torch.Generator().manual_seed(0))
    null = HeadCode._make(x[mixed] if isinstance(x, torch.Tensor) and len(x) == len(mixed) else x for x in truth)
    drawn = FactChanges.draw(world, facts)
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
        (FactChanges, "ask", lambda facts, world, writes: {each: facts.new >= 0 for each in facts.questions}),
        (FactChanges, "ask", lambda facts, world, writes, ask=FactChanges.ask: ask(facts, world, None)),
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


def test_features_follow_the_parts_of_values_among_the_writes_of_a_key(world: World) -> None:
    """An atom for each value of each key, which is active at no other key."""
    parts = world.parts(world.value_symbols)
    n_parts = parts.shape[1]
    n_atoms = (int(world.key_symbols.max()) + 1) * n_parts
    atoms = world.key_symbols * n_parts + parts.argmax(1)
    axes = torch.eye(n_atoms)
    code = HeadCode(atoms, atoms, axes[atoms], axes, axes[:0], 0, 0.0)
    share, vectors = features(code, world)
    there = atoms.unique()
    assert share == pytest.approx(len(there) / n_atoms)
    assert torch.allclose(vectors.flatten(0, 1)[there], axes[there])


def test_attribution_finds_the_writes_that_hold_a_fact(world: World) -> None:
    found = attributed(world, 3)
    assert found["writes found"] > 0.9 > 10 * found["null"]


def test_an_attribute_is_replaced_along_the_native_key() -> None:
    """The new one's vector instead of the old one's."""
    world = World.of("composition", 8)
    drawn = FactChanges.draw(world, 1)
    parts = world.parts(torch.stack([drawn.new[0], drawn.base.symbols["values"][0, drawn.asked[0]]]))
    of_key = torch.randn(parts.shape[1], world.values.shape[-1])
    written, _ = drawn.writes(world, [], [of_key.expand(64, -1, -1)] * len(world.holder.heads))
    r = world.model.recurrence(drawn.base.tokens, world.holder.layer)
    k, u = (side[0, drawn.at[0], world.holder.heads[0]].detach() for side in (r.k, r.u))
    new, old = parts @ of_key
    torch.testing.assert_close(written[0, 0], torch.outer(k, u + new - old), rtol=1e-4, atol=1e-5)


def test_the_example_asks_for_a_word_that_its_text_tells(world: World) -> None:
    *text, answer, changed = boards.in_words(world, FactChanges.draw(world, 4))
    told = dict(zip(text[:-1:2], text[1:-1:2]))
    assert told[text[-1]] == answer != changed


def test_the_models_of_a_board_are_in_the_zoo_by_default() -> None:
    assert Zoo().models and {*Zoo().models} <= {*zoo.names()}


def test_rows_are_put_into_a_board_of_the_same_settings_alone(tmp_path: Path) -> None:
    command = Zoo(models=("recall",), only="writesae_product", out=tmp_path)
    of_recall = {"model": "recall", "rows": []}
    content = {"settings": {"seeds": 2}, "boards": [of_recall], "readings": []}
    file = tmp_path / "zoo.json"
    file.write_text(sealed_json(content))
    assert command._saved_boards({"seeds": 2}) == ({"recall": of_recall}, {})
    with pytest.raises(ValueError, match=r"only: expected .*zoo\.json of the models .'recall',. with the settings"):
        command._saved_boards({"seeds": 3})
    file.write_text(file.read_text().replace("2}", "3}"))
    with pytest.raises(ValueError, match=r"zoo\.json: expected values of the SHA-256"):
        command._saved_boards({"seeds": 3})


def test_models_that_were_measured_are_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[str] = []

    def read(name: str, *sizes: int) -> dict[str, object]:
        measured.append(name)
        if name == "facts" and len(measured) == 2:
            raise KeyboardInterrupt
        return {"model": name, "rows": [{"reader": "pairs"}], "heads": 1}

    monkeypatch.setattr(boards, "readings", read)
    command = Zoo(models=("recall", "facts"), writes=False, out=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        command.run()
    page = command.run()
    assert measured == ["recall", "facts", "facts"]
    assert [reading["model"] for reading in json.loads((tmp_path / "zoo.json").read_text())["readings"]] == [
        "recall",
        "facts",
    ]
    assert "facts" in page.read_text()
    Zoo(models=("recall",), writes=False, seeds=2, out=tmp_path).run()
    assert measured[3:] == ["recall"]
    monkeypatch.setattr(files, "versions", lambda: {"sae-lens-writesae": "another"})
    Zoo(models=("recall",), writes=False, seeds=2, out=tmp_path).run()
    assert measured[4:] == ["recall"]


Sides = tuple[torch.Tensor, torch.Tensor]


def directions(g: torch.Generator) -> Sides:
    """24 keys and 24 values of norm 1 in 16 dimensions."""
    keys, values = normalize(torch.randn(2, 24, 16, generator=g), dim=2)
    return keys, values


def products(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """[24,24,256] of all pairs."""
    return (keys[:, None, :, None] * values[:, None]).flatten(2)


def planted(n: int, pairs: int, seed: int) -> tuple[Told, list[Sides]]:
    """States of two heads that are sums of pairs of 24 keys and 24 values, and these."""
    g = torch.Generator().manual_seed(0)
    books = [directions(g), directions(g)]
    g.manual_seed(seed)
    key = torch.rand(n, 24, generator=g).argsort(1)[:, :pairs]
    value = torch.randint(24, (n, pairs), generator=g)
    sizes = 0.5 + torch.rand(n, pairs, 2, generator=g)
    atoms = torch.stack([products(*book)[key, value] for book in books], dim=2)
    states = (sizes[..., None] * atoms).sum(1)
    noisy = states + 0.02 * torch.randn(states.shape, generator=g)
    facts = torch.zeros(n, 24 * 24, dtype=torch.bool).scatter(1, 24 * key + value, True)
    return Told(noisy.unflatten(-1, (16, 16)), facts.unflatten(1, (24, 24))), books


def read(books: Sequence[Sides]) -> ReadShares:
    """Of the heads whose books these are, or of the first of them."""
    naming, _ = planted(1500, 3, 1)
    reader = Reader.of_heads([HeadReader.of_pairs(*book, TERMS) for book in books], naming)
    return ReadShares.of(reader, planted(200, 4, 2)[0])


def test_the_atoms_of_states_read_their_facts_and_others_do_not() -> None:
    _, books = planted(1, 1, 0)
    told = read(books)
    assert told.recall.mean() > 0.97
    assert told.recall_above.mean() > 0.95
    assert told.precision_above.mean() > 0.9
    assert told.other.mean() < 0.05
    assert read(books[:1]).recall.mean() <= told.recall.mean()
    g = torch.Generator().manual_seed(3)
    order = torch.randperm(16, generator=g)
    mixed = [(keys[:, order], values[:, order.flip(0)]) for keys, values in books]
    for null in ([directions(g), directions(g)], mixed):
        assert read(null).recall.mean() < 0.35


def test_pairs_as_atoms_of_their_own_are_coded_as_they_are_as_pairs() -> None:
    told, books = planted(50, 3, 5)
    keys, values = books[0]
    every = products(keys, values).flatten(0, 1)
    as_pairs = HeadReader.of_pairs(keys, values, TERMS)
    as_atoms = HeadReader.of_atoms(every, every.numel(), as_pairs.bits)
    assert as_atoms.bits == pytest.approx(as_pairs.bits)
    states = told.states[:, 0]
    pairs, code = as_pairs.code(states), as_atoms.code(states)
    assert (24 * pairs.keys + pairs.values == code.keys)[:, :3].float().mean() > 0.99
    first = pursue(states.flatten(1), every, 3)
    found = torch.zeros(50, 576, dtype=torch.bool).scatter(1, first[0], True)
    assert (found & told.facts.flatten(1)).sum() > 0.97 * 150
    sums = (first[1][:, None] @ every[first[0]])[:, 0]
    assert (states.flatten(1) - sums).square().mean() < 1.05 * 0.02**2  # the noise
    for reader in (as_pairs, as_atoms):
        assert (states.flatten(1) - reader.decode(reader.code(states))).square().mean() < 0.02**2


@pytest.mark.parametrize(("name", "facts", "end"), [("recall", 4, 10), ("composition", 12, 10), ("facts", 4, 20)])
def test_texts_have_the_facts_that_they_tell(name: str, facts: int, end: int) -> None:
    """Written with the words of the texts."""
    world = World.of(name, 128)
    told = Told.of(world, 4, 3, seed=8)
    assert told.facts.sum((1, 2)).tolist() == [facts] * 3
    batch = world.task.batch(3, torch.Generator().manual_seed(8), pairs=4)
    vocabulary = world.task.vocabulary
    for text, held in zip(batch.tokens, told.facts):
        words = [vocabulary[token] for token in text]
        for subject, value in held.nonzero().tolist():
            name_of = vocabulary.index("Ada") + subject
            word = vocabulary[-held.shape[1] + value] if name != "recall" else vocabulary[65 + value]
            at = words.index(vocabulary[name_of])
            assert any(word in after for after in words[at:])
    state = world.model.recurrence(batch.tokens[:, :end], world.holder.layer).final_state()
    torch.testing.assert_close(told.states, state[:, list(world.holder.heads)])


@torch.no_grad()
def test_atoms_are_read_in_units_of_what_they_write() -> None:
    """Of no norm in particular."""
    states = torch.randn(9, 5, 7)
    sae = sae_of(HOOK, None, random_low_rank(1, 0, n=12).to(states), 3)
    decoded = readers._decoded_states(sae, readers._strongest_terms(sae, 3, states))
    torch.testing.assert_close(decoded, sae.decode(sae.encode(states.flatten(1))))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", READERS)
def test_every_reader_scores_every_fact_in_the_bits_of_the_pairs(
    world: World, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "PROBED", 200)
    monkeypatch.setattr(readers, "PRINCIPAL", 16)
    job = ReaderJob(world, Told.of(world, 4, 200, 1), Told.of(world, 4, 100, 2), steps=2, seed=0, times=0.5)
    (head,) = job.heads
    reader = READERS[name](job)
    scores = reader.scores(job.naming.states[:8])
    assert scores.shape == (8, 64, 64) and scores.isfinite().all()
    if not name.startswith("labels"):  # whose number of atoms is that of the symbols
        assert reader.bits <= 1.05 * head.bits
    if "pairs" in name or "equal numbers" in name:
        assert reader.numbers == pytest.approx(head.numbers, rel=0.05)


def test_writes_are_clustered_by_direction(world: World) -> None:
    """Their sizes do not count."""
    told = Told.of(world, 4, 100, 1)
    larger = world._replace(keys=world.keys * torch.linspace(0.1, 10, len(world.keys[0]))[:, None])
    both = (readers.means_of_writes(ReaderJob(each, told, told, steps=2, seed=0)) for each in (world, larger))
    torch.testing.assert_close(*(reader.scores(told.states[:8]) for reader in both))


def test_the_page_of_reading_has_the_numbers_of_the_board() -> None:
    study = Path(__file__).parents[1]
    readings = cast(Any, read_sealed_json(study / "docs" / "zoo_states.json"))["readings"]
    table = (study.parent / "docs" / "reading.md").read_text().split("## On equal terms")[1].split("##")[0]
    head, _, *lines = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("|")]
    assert head[1:] == [f"`{reading['model']}`" for reading in readings]
    for name, *cells in lines:
        for cell, reading in zip(cells, readings, strict=True):
            row = {row["reader"]: row for row in reading["rows"]}[name]
            shown = [float(share) for share in cell.split(" / ")]
            assert shown == pytest.approx([row[f"{pairs} pairs"]["mean"] for pairs in (4, 8)], abs=0.0051)


def test_additive_books_find_the_parts_of_sums_and_one_book_is_enough_for_whole_values() -> None:
    """Three books of four in 8 dimensions, 12 numbers of codes in all: twelve words of k-means cannot name 64 sums."""
    g = torch.Generator().manual_seed(0)
    books, chosen = torch.randn(3, 4, 8, generator=g), torch.randint(4, (600, 3), generator=g)
    noise = 0.05 * torch.randn(600, 8, generator=g)
    sums = books[torch.arange(3), chosen].sum(1) + noise

    def unexplained(side: sides.CodedSide, rows: torch.Tensor) -> float:
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
    few = ("pairs (writesae_product)", "null: random pairs")
    monkeypatch.setattr(boards, "READERS", {name: READERS[name] for name in few})
    monkeypatch.setattr(readers, "FITTED", 200)
    monkeypatch.setattr(readers, "NAMING", 100)
    tiny = ["--seeds", "2", "--sequences", "128", "--facts", "16", "--steps", "5", "--out", str(tmp_path / "zoo")]
    main(["zoo", "--models", "recall", *tiny])
    written = json.loads((tmp_path / "zoo" / "zoo.json").read_text())
    page, table = ((tmp_path / "zoo" / name).read_text() for name in ("index.html", "zoo.md"))
    (of_recall,) = written["boards"]
    assert {"writesae_product", "null: another pair's write"} < {row["method"] for row in of_recall["rows"]}
    assert of_recall["attribution"]["writes found"] > 0.9 > 10 * of_recall["attribution"]["null"]
    (read_of_recall,) = written["readings"]
    assert [row["reader"] for row in read_of_recall["rows"]][:2] == [*few]
    assert len(read_of_recall["rows"]) == 2 + len(WRONG_SIZES)
    assert all(row["reader"].split(" (")[0] in page and row["reader"] in table for row in read_of_recall["rows"])
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
