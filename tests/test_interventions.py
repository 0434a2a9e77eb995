"""Erasure, passages and readers against full passes with the write changed by hand; dictionaries with a known code."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_hf
from planted import HEAD, LAYER, logits_with_write, one_atom_a_position, random_sae
from torch import Tensor

from hookpoints import HookedRecurrent
from sae_lens_writesae.firings import collect_firings
from sae_lens_writesae.interventions.draw import halves
from sae_lens_writesae.interventions.erasure import ErasureConfig, run_erasure
from sae_lens_writesae.interventions.passage import PassageConfig, run_passage
from sae_lens_writesae.interventions.readers import ReadersConfig, run_readers

T = 18
ERASURE = {"n_atoms": 3, "select_firings": 4, "test_firings": 3, "min_firings": 2, "horizon": 3}
READERS = {"n_atoms": 3, "select_firings": 2, "test_firings": 2, "min_firings": 2, "horizon": 3}


@pytest.fixture
def model(model64: Any) -> Any:
    return model64


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    """[6,T], all rows alike: an atom planted at a position of one fires at that position of all."""
    return torch.randint(1, 64, (1, T), generator=torch.Generator().manual_seed(5)).repeat(6, 1)


@pytest.fixture(scope="module")
def varied() -> Tensor:
    return torch.randint(1, 64, (8, 24), generator=torch.Generator().manual_seed(6))


@pytest.fixture
def planted(model: Any, tokens: Tensor) -> Any:
    return one_atom_a_position(model, tokens[:1])


def silenced(position: int) -> Any:
    def change(writes: Tensor) -> Tensor:
        writes[position] = 0
        return writes

    return change


def test_erasing_an_atom_that_is_the_write_is_deleting_the_write(model: Any, tokens: Tensor, planted: Any) -> None:
    component = run_erasure(model, planted, tokens, ErasureConfig(**ERASURE), progress=False)
    whole = run_erasure(model, planted, tokens, ErasureConfig(**ERASURE, erase="write"), progress=False)
    own, other = (found.tables["firings"] for found in (component, whole))
    assert list(component.tables["atoms"]["token"]) == list(whole.tables["atoms"]["token"])
    for column in ("effect", "wrong"):
        np.testing.assert_allclose(own[column], other[column], rtol=1e-4, atol=1e-7)
    token = component.tables["atoms"].set_index("atom")["token"]
    assert (own["atom"] == own["position"]).all() and len(own) == 9  # an atom is the write of its position
    native = logits_with_write(model, tokens[:1], lambda writes: writes).log_softmax(-1)
    for row in own.drop_duplicates("atom").itertuples():
        edited = logits_with_write(model, tokens[:1], silenced(row.position)).log_softmax(-1)
        change = (edited - native)[row.position : row.position + 4].mean(0)
        assert row.effect == pytest.approx(float(change[token[row.atom]]), rel=1e-4)
        assert (
            change.argmin() == token[row.atom]
        )  # all sequences are alike, so that the choice is the same on both halves


def test_an_atom_elsewhere_takes_the_same_norm_from_the_write_there(model: Any, tokens: Tensor, planted: Any) -> None:
    found = run_erasure(model, planted, tokens, ErasureConfig(**ERASURE, token=7), progress=False)
    row = found.tables["firings"].iloc[0]
    there = int(row["elsewhere_position"])
    assert there != row["position"]

    def change(writes: Tensor) -> Tensor:
        writes[there] *= 1 - row["activation"] / torch.linalg.matrix_norm(writes[there])
        return writes

    native = logits_with_write(model, tokens[:1], lambda writes: writes).log_softmax(-1)
    edited = logits_with_write(model, tokens[:1], change).log_softmax(-1)
    assert row["elsewhere"] == pytest.approx(float((edited - native)[there : there + 4, 7].mean()), rel=1e-4)
    assert (found.tables["atoms"]["token"] == 7).all()


def test_the_choice_of_tokens_never_sees_the_test_half(model: Any, varied: Tensor) -> None:
    sae, split = random_sae(model), halves(len(varied), 0)
    changed = varied.clone()
    changed[split.test] = varied[split.test].flip(1)
    often = [np.bincount(collect_firings(model, sae, ids).atom, minlength=12) for ids in (varied, changed)]
    atoms = tuple(np.argsort(-np.minimum(*often))[:3].tolist())
    config = ErasureConfig(**ERASURE | {"n_atoms": None}, atoms=atoms)
    one, other = (run_erasure(model, sae, ids, config, progress=False).tables for ids in (varied, changed))
    same = ["atom", "token", "n_select", "selected"]
    assert one["atoms"][same].equals(other["atoms"][same])
    assert not np.allclose(one["atoms"]["effect"], other["atoms"]["effect"])
    assert set(one["firings"]["sequence"]) <= set(split.test.tolist()) and not set(split.test) & set(split.select)


def test_a_passage_without_its_only_class_is_one_whose_head_writes_nothing(
    model: Any, tokens: Tensor, planted: Any
) -> None:
    config = PassageConfig(passages=2, classes={"all": range(T)})
    found = run_passage(model, planted, tokens, config, progress=False)

    def bits(logits: Tensor) -> float:
        return float(torch.nn.functional.cross_entropy(logits[:-1], tokens[0, 1:])) / math.log(2)

    native = bits(logits_with_write(model, tokens[:1], lambda writes: writes))
    gone = bits(logits_with_write(model, tokens[:1], torch.zeros_like))
    table = found.tables["passages"]
    for condition in ("deleted", "own"):  # own: the same norm of the same writes, which is all of them
        own = table[table["condition"] == condition]
        np.testing.assert_allclose(own["bits"], gone - native, rtol=1e-5)
    np.testing.assert_allclose(table["native_bits"], native, rtol=1e-9)
    assert (table["tokens_edited"] == T).all() and np.allclose(table["norm"], 1) and abs(gone - native) > 1e-4
    assert len(set(table["bits"].round(9))) > 2  # the controls do something else


@pytest.mark.parametrize("place, name", [("L2H3", "blocks.2.mixer.hook_read"), ("L3A1", "blocks.3.attn.hook_z")])
def test_readers_are_later_heads_and_change_as_in_a_full_pass(
    model: Any, tokens: Tensor, planted: Any, place: str, name: str
) -> None:
    found = run_readers(model, planted, tokens, ReadersConfig(**READERS), progress=False).tables["changes"]
    heads = {(r.layer, r.mixer, r.head) for r in found.itertuples()}
    assert heads == {*((2, "recurrence", head) for head in range(4)), *((3, "attention", head) for head in range(2))}
    layer, head = int(place[1]), int(place[3])
    row = found[(found["condition"] == "atom") & (found["layer"] == layer) & (found["head"] == head)].iloc[0]
    position, reads = int(row["position"]), []

    def keep(value: Tensor, hook: Any) -> None:
        reads.append(value[0, :, head].clone())

    with model.hooks(fwd_hooks=[(name, keep)]):
        logits_with_write(model, tokens[:1], lambda writes: writes)
        logits_with_write(model, tokens[:1], silenced(position))
    native, edited = reads
    assert torch.equal(native[:position], edited[:position])  # what comes before cannot read
    window = slice(position, position + 4)
    gap = (edited - native)[window]
    assert row["change"] == pytest.approx(float(gap.norm() / native[window].norm()), rel=1e-4)
    assert row["peak"] == int(gap.norm(dim=1).argmax())


@pytest.mark.parametrize("layer", [0, 1])
def test_no_reader_of_the_same_or_an_earlier_layer(model: Any, varied: Tensor, layer: int) -> None:
    sae = random_sae(model, layer=layer)
    found = run_readers(model, sae, varied, ReadersConfig(**READERS), progress=False)
    assert set(found.tables["changes"]["layer"]) == set(range(layer + 1, 4))
    assert set(found.readers()["layer"]) <= set(range(layer + 1, 4))


def test_after_the_last_recurrent_layer_only_attention_reads(model: Any, varied: Tensor) -> None:
    found = run_readers(model, random_sae(model, layer=2), varied, ReadersConfig(**READERS), progress=False)
    assert set(found.tables["changes"]["mixer"]) == {"attention"} and "L3A" in found.claims()[0].measured


def test_the_last_layer_has_no_readers(varied: Tensor, tmp_path: Any) -> None:
    model = HookedRecurrent.from_hf(make_hf("mamba2"))
    last = model.cfg.n_layers - 1
    found = run_readers(model, random_sae(model, layer=last), varied, progress=False)
    claim = found.claims()[0]
    assert (claim.outcome, claim.n) == ("not tested", 0) and f"comes after layer {last}" in claim.sentence
    loaded = type(found).load(found.save(tmp_path / "readers"))
    assert loaded.claims() == [claim] and loaded.tables["changes"].empty and loaded.figures() == []


def test_a_head_that_reads_nothing_is_left_out_and_counted(model: Any, tokens: Tensor, planted: Any) -> None:
    def deaf(value: Tensor, hook: Any) -> Tensor:
        value = value.clone()
        value[:, :, 1] = 0
        return value

    with model.hooks(fwd_hooks=[("blocks.2.mixer.hook_read", deaf)]):
        found = run_readers(model, planted, tokens, ReadersConfig(**READERS), progress=False)
    table = found.tables["changes"]
    assert set(table.query("layer == 2")["head"]) == {0, 2, 3} and not table["change"].isna().any()
    assert found.info["omitted"] == {"firings x heads that natively give zero": table["firing"].nunique()}


def test_readers_are_chosen_on_one_half(model: Any, varied: Tensor) -> None:
    found = run_readers(model, random_sae(model, layer=0), varied, ReadersConfig(**READERS), progress=False)
    split, table = halves(len(varied), 0), found.tables["changes"]
    for half, sequences in zip(("select", "test"), split):
        assert set(table.loc[table["half"] == half, "sequence"]) <= set(sequences.tolist())
    blind = type(found)(
        found.info, {"changes": table.assign(change=table["change"].where(table["half"] == "select", 1))}
    )
    assert blind.readers().equals(found.readers())
    assert (blind.at_readers()[["random", "other", "excess"]] == 0).all(axis=None)


def test_head_and_layer_names_are_those_of_the_sae(model: Any, tokens: Tensor, planted: Any) -> None:
    found = run_erasure(model, planted, tokens, ErasureConfig(**ERASURE), progress=False)
    assert (found.info["layer"], found.info["head"]) == (LAYER, HEAD) and found.info["seconds"] > 0
