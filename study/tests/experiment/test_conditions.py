"""What each condition writes: norms, projections and directions, against dense matrices in float64."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pandas as pd
import pytest
import torch
from saes import close, random_sae
from saes import random_low_rank as draw
from torch import Tensor

from hookpoints import HookedRecurrent
from sae_lens_writesae.atom.low_rank import LowRank
from writesae_study.experiment import conditions as C
from writesae_study.experiment.bench import Bench

N = 6


@pytest.mark.parametrize("rank", [1, 3])
def test_scales(rank: int) -> None:
    native, atom = draw(1, 0), draw(rank, 1)
    assert C.scaled(atom, native, "coefficient") is atom
    matched, fit = (C.scaled(atom, native, scale) for scale in ("matched", "least_squares"))
    close(matched.norm(), native.norm())
    assert (matched.inner(atom) > 0).all()
    residual = native.dense() - fit.dense()
    close((residual * atom.dense()).sum((1, 2)), torch.zeros(N, dtype=torch.float64))  # orthogonal to the atom
    close(fit.norm(), native.norm() * native.cosine(atom).abs())
    for scale in get_args(C.Scale):
        assert not C.scaled(atom * 0.0, native, scale).dense().any()  # nothing has no size to rescale


def test_conditions_list_and_norms() -> None:
    native, atom = draw(1, 0), draw(2, 1)
    controls = {name: draw(rank, 2 + rank) for rank, name in enumerate(C.DIRECTIONS, 1)}
    listed = C.conditions(native, atom, controls | {"drawn": draw(1, 7)}, get_args(C.Scale))
    names = [(c.name, c.scale) for c in listed]
    assert names[:2] == [("native", "none"), ("delete", "none")]
    assert listed[0].written is native and listed[1].written is None
    assert names[2:] == [(name, scale) for scale in get_args(C.Scale) for name in ("atom", *C.DIRECTIONS, "drawn")]
    written = {(c.name, c.scale): c.written for c in listed if c.written is not None}
    for scale in get_args(C.Scale):
        close(written["drawn", scale].dense(), C.scaled(draw(1, 7), native, scale).dense())
        for name, direction in controls.items():
            close(written[name, scale].norm(), written["atom", scale].norm())
            close(written[name, scale].cosine(direction), torch.ones(N, dtype=torch.float64))  # a sign of its own
    with pytest.raises(ValueError, match="zero"):  # a control without a direction
        C.conditions(native, atom, {"random": atom * 0.0}, ("matched",))


# -- directions of the controls, on a model


@pytest.fixture
def lab(model64: HookedRecurrent, varied: Tensor) -> Bench:
    return Bench(model64, {"": random_sae(model64, d_sae=20, k=3)}, varied[:3], seed=5)


def some_firings(lab: Bench, sequence: int = 1) -> pd.DataFrame:
    table = lab.firings().frame().query("sequence == @sequence and position > 2").head(8)
    return table.assign(written_atom=table["atom"]).reset_index(drop=True)


def directions(lab: Bench, firings: pd.DataFrame, names: tuple[str, ...], **more: Any) -> dict[str, LowRank]:
    site = lab.site(1, firings)
    atom = lab.atoms(firings["written_atom"].to_numpy()).to(site.writes.values)
    arguments = {"alive": lab.firings().alive(10**6), "mean": lab.native_writes([0]).rows([0])} | more
    return C.controls_at(lab, site, atom, names, **arguments)


def test_drawn_controls_are_never_those_of_the_position_itself(lab: Bench) -> None:
    """Over several seeds, since one that fires there, or the write itself, would be drawn sooner or later."""
    firings = some_firings(lab)
    atoms, writes = lab.atoms(np.arange(20)).to(torch.float64), lab.site(1).writes
    active = lab.firings().frame().query("sequence == 1").groupby("position")["atom"].agg(set)
    for seed in range(8):
        made = directions(Bench(lab.model, lab.saes, lab.tokens, seed=seed), firings, ("shuffled", "elsewhere"))
        drawn, places = (
            made[n].cosines(all).argmax(1).tolist() for n, all in (("shuffled", atoms), ("elsewhere", writes))
        )
        close(made["shuffled"].cosine(atoms.rows(drawn)), torch.ones(len(firings), dtype=torch.float64))
        close(made["elsewhere"].norm(), writes.rows(places).norm())
        for atom, place, row in zip(drawn, places, firings.itertuples()):
            assert atom not in active[row.position] | {row.written_atom} and place != row.position
