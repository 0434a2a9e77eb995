"""What each condition writes: norms, projections and directions, against dense matrices in float64."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest
import torch
from saes import close, random_sae
from saes import random_low_rank as draw
from torch import Tensor

from hookpoints import HookedRecurrent
from writesae_study.experiment import conditions as C
from writesae_study.experiment.bench import Bench

N = 6


@pytest.mark.parametrize("rank", [1, 3])
def test_scales(rank: int) -> None:
    """Matched: the norm of the write, along the atom. Least squares: what is left is orthogonal to the atom."""
    native, atom = draw(1, 0), draw(rank, 1)
    coefficient, matched, fit = (C.scaled(atom, native, scale) for scale in get_args(C.Scale))
    assert coefficient is atom
    close(matched.dense(), (atom * (native.norm() / atom.norm())).dense())
    close(fit.inner(atom), native.inner(atom))
    close(fit.norm(), native.norm() * native.cosine(atom).abs())
    assert not any(C.scaled(atom * 0.0, native, scale).dense().any() for scale in get_args(C.Scale))  # nothing stays so


def test_a_direction_has_the_norm_of_the_atom_and_a_baseline_its_own_size() -> None:
    native, atom = draw(1, 0), draw(2, 1)
    controls = {name: draw(rank, 2 + rank) for rank, name in enumerate((*C.DIRECTIONS, "drawn"), 1)}
    listed = C.conditions(native, atom, controls, get_args(C.Scale))
    written: Any = {(c.name, c.scale): c.written for c in listed}
    assert written["native", "none"] is native and written["delete", "none"] is None
    for scale in get_args(C.Scale):
        close(written["drawn", scale].dense(), C.scaled(controls["drawn"], native, scale).dense())
        for name in C.DIRECTIONS:
            close(written[name, scale].norm(), written["atom", scale].norm())
            close(written[name, scale].cosine(controls[name]), torch.ones(N, dtype=torch.float64))  # keeps its sign
    with pytest.raises(ValueError, match="zero"):  # a control without a direction
        C.conditions(native, atom, {"random": atom * 0.0}, ("matched",))


def test_drawn_controls_are_never_those_of_the_position_itself(model64: HookedRecurrent, varied: Tensor) -> None:
    """Over several seeds, since one that fires there, or the write itself, would be drawn sooner or later."""
    lab = Bench(model64, {"": random_sae(model64, d_sae=20, k=3)}, varied[:3])
    table = lab.firings().frame().query("sequence == 1")
    active = table.groupby("position")["atom"].agg(set)
    firings = table.query("position > 2").head(8).assign(written_atom=lambda t: t["atom"])
    site, atoms = lab.site(1, firings), lab.atoms(np.arange(20))
    for lab.seed in range(8):
        own = atoms.rows(firings["atom"].tolist())
        made = C.controls_at(lab, site, own, ("shuffled", "elsewhere"), alive=np.arange(20), mean=own)
        drawn = made["shuffled"].cosines(atoms).argmax(1).tolist()
        places = made["elsewhere"].cosines(site.writes).argmax(1).tolist()
        close(made["shuffled"].dense(), atoms.rows(drawn).dense())
        close(made["elsewhere"].dense(), site.writes.rows(places).dense())
        for atom, place, position in zip(drawn, places, firings["position"]):
            assert atom not in active[position] and place != position
