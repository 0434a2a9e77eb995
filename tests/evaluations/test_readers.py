"""Readers against full passes with the write changed by hand; which heads are downstream; verdicts of known changes."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import make_hf
from sae_lens import SAE
from saes import native_and_edited, random_sae, runner
from torch import Tensor

from hookpoints import HookedRecurrent
from sae_lens_writesae.errors import NothingToMeasureError
from writesae.evaluations.readers import Readers, at_readers, readers_of_atoms
from writesae.experiment.evaluation import Result
from writesae.experiment.firings import halves

run = runner(Readers, **{"n_atoms": 3, "select_firings": 2, "test_firings": 2, "min_firings": 2, "horizon": 3})


@pytest.mark.parametrize("layer, head, name", [(2, 3, "blocks.2.mixer.hook_read"), (3, 1, "blocks.3.attn.hook_z")])
def test_readers_are_later_heads_and_change_as_in_a_full_pass(
    model64: HookedRecurrent, equal_rows: Tensor, planted: SAE, layer: int, head: int, name: str
) -> None:
    table = run(model64, planted, equal_rows).tables["changes"]
    heads = {(row.layer, row.mixer, row.head) for row in table.itertuples()}
    assert heads == {*((2, "recurrence", h) for h in range(4)), *((3, "attention", h) for h in range(2))}
    rows = table[(table["condition"] == "atom") & (table["layer"] == layer) & (table["head"] == head)]
    for row in rows.drop_duplicates("position").itertuples():
        outputs: list[Tensor] = []
        with model64.hooks(fwd_hooks=[(name, lambda value, hook: outputs.append(value[0, :, head].clone()))]):  # noqa: B023
            native_and_edited(model64, equal_rows[:1], torch.zeros_like, row.position)
        native, edited = outputs
        assert torch.equal(native[: row.position], edited[: row.position])  # what comes before cannot read
        window = slice(row.position, row.position + 4)
        gap = (edited - native)[window]
        assert row.change == pytest.approx(float(gap.norm() / native[window].norm()), rel=1e-4)


def test_the_last_layer_has_no_readers(varied: Tensor) -> None:
    model = HookedRecurrent.from_hf(make_hf("mamba2"))
    last = model.cfg.n_layers - 1
    sae = random_sae(model, layer=last)
    with pytest.raises(NothingToMeasureError, match=f"layer {last}"):
        run(model, sae, varied)
    result = Readers().run(model, sae, varied, progress=False, or_skip=True)
    claim = result.claims()[0]
    assert (claim.outcome, claim.n) == ("not tested", 0) and f"after layer {last}" in claim.sentence


def test_a_head_that_reads_nothing_is_left_out_and_counted(
    model64: HookedRecurrent, equal_rows: Tensor, planted: SAE
) -> None:
    deaf = torch.tensor([1.0, 0, 1, 1])[:, None]  # the second head
    with model64.hooks(fwd_hooks=[("blocks.2.mixer.hook_read", lambda value, hook: value * deaf)]):
        result = run(model64, planted, equal_rows)
    table = result.tables["changes"]
    assert set(table.query("layer == 2")["head"]) == {0, 2, 3} and not table["change"].isna().any()
    assert result.info["n_skipped"] == {"firings x heads that natively give zero": table["firing"].nunique()}


def test_readers_are_chosen_on_one_half(model64: HookedRecurrent, varied: Tensor) -> None:
    result = run(model64, random_sae(model64, layer=0), varied)
    split, table = halves(len(varied), 0), result.tables["changes"]
    for half, sequences in zip(("select", "test"), split):
        assert set(table.loc[table["half"] == half, "sequence"]) <= set(sequences.tolist())
    constant = table.assign(change=table["change"].where(table["half"] == "select", 1))
    blind = Result(result.evaluation, result.info, {"changes": constant})
    assert readers_of_atoms(blind).equals(readers_of_atoms(result))
    assert (at_readers(blind)[["random", "other", "excess"]] == 0).all(axis=None)
    with pytest.raises(NothingToMeasureError, match="second atom"):  # the control is another atom
        run(model64, random_sae(model64, layer=0), varied, atoms=(int(table["atom"].iloc[0]),))


NOISE = 0.02 * np.random.default_rng(3).standard_normal(96)


def sampled(
    atom: float, random: float, other: float, elsewhere: float = 1.0, heads: tuple[int, ...] = (0, 1)
) -> Result:
    """Six atoms in 24 sequences. Head 0 of layer 2 is the reader; at the other head the atom is `elsewhere` times as
    loud as the random direction."""
    rows = [
        {"firing": n, "half": ("select", "test")[n // 48], "atom": n % 6, "sequence": n // 4, "position": n}
        | {"layer": 2, "mixer": "recurrence", "head": head, "condition": condition}
        | {"change": change * (1 + NOISE[n] if condition == "atom" else 1)}
        for n in range(96)
        for head in heads
        for condition, change in (
            ("atom", atom if head == 0 else elsewhere * random),
            ("random", random),
            ("other", other),
        )
    ]
    return Result(Readers(), {"label": "x", "floor": 1e-6}, {"changes": pd.DataFrame(rows)})


def test_the_reader_is_the_head_that_hears_the_atom_above_a_random_direction() -> None:
    result = sampled(0.4, 0.1, 0.1)
    assert readers_of_atoms(result)["head"].tolist() == [0] * 6
    assert np.exp(at_readers(result)["random"].mean()) == pytest.approx(4, rel=0.02)
