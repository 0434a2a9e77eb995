"""What each condition writes: norms, projections and directions, against dense matrices in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from planted import HEAD, LAYER, random_sae
from torch import Tensor

from hookpoints import HookedRecurrent
from sae_lens_writesae.atom.low_rank import LowRank
from sae_lens_writesae.errors import NothingToMeasureError
from writesae.experiment import conditions as C
from writesae.experiment.head import state_direction
from writesae.experiment.lab import Lab
from writesae.verdict.names import DEFINITIONS, NAMES, SCALE_DEFINITIONS, SCALE_NAMES

N, K, V = 6, 5, 7


def draw(rank: int, seed: int, n: int = N) -> LowRank:
    g = torch.Generator().manual_seed(seed)
    keys = torch.randn(n, rank, K, generator=g, dtype=torch.float64)
    return LowRank(keys, torch.randn(n, rank, V, generator=g, dtype=torch.float64))


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rank", [1, 3])
def test_scales(rank: int) -> None:
    native, atom, activation = draw(1, 0), draw(rank, 1), torch.arange(1.0, N + 1)
    close(C.atom_coefficient("coefficient", atom, native, activation), activation.double())
    matched = atom * C.atom_coefficient("matched", atom, native, activation)
    close(matched.norm(), native.norm())
    assert (matched.inner(atom) > 0).all()
    fit = atom * C.atom_coefficient("least_squares", atom, native, activation)
    residual = native.dense() - fit.dense()
    close((residual * atom.dense()).sum((1, 2)), torch.zeros(N, dtype=torch.float64))  # orthogonal to the atom
    assert (residual.norm(dim=(1, 2)) < native.norm()).all()  # closer to the write than nothing
    close(fit.norm(), native.norm() * native.cosine(atom).abs())


def test_matched_atom_beats_nothing_only_above_cosine_one_half() -> None:
    native, atom = draw(1, 0, 200), draw(1, 1, 200)
    matched = atom * C.atom_coefficient("matched", atom, native, torch.ones(200))
    closer = (native.dense() - matched.dense()).norm(dim=(1, 2)) < native.norm()
    assert closer.any() and torch.equal(closer, native.cosine(atom) > 0.5)


def test_unknown_scale_and_control_are_named() -> None:
    a = draw(1, 0)
    with pytest.raises(ValueError, match="frobenius"):
        C.atom_coefficient("frobenius", a, a, torch.ones(N))
    with pytest.raises(ValueError, match="psalm"):
        C.conditions(a, a, torch.ones(N), {"psalm": a}, C.SCALES)


def test_conditions_list_and_norms() -> None:
    native, atom = draw(1, 0), draw(2, 1)
    activation = torch.linspace(0.1, 3, N, dtype=torch.float64)
    controls = dict(zip(C.DIRECTIONS, [draw(2, 2), draw(2, 3), draw(1, 4), draw(1, 6), draw(4, 5, 1).expand(N)]))
    listed = C.conditions(native, atom, activation, controls, C.SCALES[:3])
    names = [(c.name, c.scale) for c in listed]
    assert names[:2] == [("native", "none"), ("delete", "none")] and listed[1].written is None
    assert names[2:] == [(name, scale) for scale in C.SCALES[:3] for name in ("atom", *C.DIRECTIONS)]
    assert listed[0].written is native
    written = {(c.name, c.scale): c.written for c in listed if c.written is not None}
    for scale in C.SCALES[:3]:
        for name, direction in controls.items():
            close(written[name, scale].norm(), written["atom", scale].norm())
            close(written[name, scale].cosine(direction), torch.ones(N, dtype=torch.float64))  # a sign of its own


def test_every_condition_and_scale_has_a_name_and_a_definition() -> None:
    assert set(NAMES) == set(DEFINITIONS) == {"native", "delete", "atom", *C.CONTROLS, *C.REFERENCES}
    assert set(SCALE_NAMES) == set(C.SCALES) and set(SCALE_DEFINITIONS) == {*C.SCALES, "none"}


def test_a_zero_control_has_no_direction() -> None:
    zero = draw(1, 0) * torch.tensor([1.0, 0, 1, 1, 1, 1])
    with pytest.raises(ValueError, match="zero"):
        C.conditions(draw(1, 1), draw(1, 2), torch.ones(N), {"random": zero}, ("matched",))


# -- directions of the controls, on a model


@pytest.fixture
def lab(model64: HookedRecurrent) -> Lab:
    tokens = torch.randint(1, 64, (3, 24), generator=torch.Generator().manual_seed(4))
    return Lab(model64, {"": random_sae(model64, d_sae=20, k=3)}, tokens, seed=5)


def some_firings(lab: Lab, sequence: int = 1) -> pd.DataFrame:
    table = lab.firings().frame().query("sequence == @sequence and position > 2").head(8)
    return table.assign(written_atom=table["atom"]).reset_index(drop=True)


def directions(lab: Lab, firings: pd.DataFrame, names: tuple[str, ...], **more: Any) -> dict[str, LowRank]:
    site = lab.site(1, firings)
    atom = lab.atoms(firings["written_atom"].to_numpy()).to(site.writes.values)
    mean = lab.native_writes([0])
    arguments = {"alive": lab.firings().alive(10**6), "mean": LowRank.cat([mean.rows([0])])} | more
    return C.control_directions(lab, site, firings, atom, names, **arguments)


def states_by_hook(lab: Lab, sequence: int, kind: str) -> Tensor:
    name = f"blocks.{LAYER}.mixer.heads.{HEAD}.hook_{kind}"
    with torch.no_grad():
        return lab.model.run_with_cache(lab.tokens[[sequence]], names_filter=[name])[1][name][0]


def test_state_is_the_top_direction_of_the_state_before_the_write(lab: Lab) -> None:
    """S_t - W_t, which has the decay and the erase of token t in it, and nothing of the write."""
    firings = some_firings(lab)
    at = firings["position"].to_list()
    made = directions(lab, firings, ("state", "state_after"))
    after, writes = states_by_hook(lab, 1, "state")[at], states_by_hook(lab, 1, "write")[at]
    close(lab.site(1).state_before(at), after - writes)
    close(lab.site(1).state_after(at), after)
    for name, states in (("state", after - writes), ("state_after", after)):
        close(made[name].cosine(state_direction(states)), torch.ones(len(at), dtype=torch.float64))
        close((made[name].dense() * states).sum((1, 2)), torch.linalg.matrix_norm(states, 2))
    assert (made["state"].cosine(made["state_after"]) < 1 - 1e-6).any()  # they are not the same control


def test_shuffled_is_another_atom_that_does_not_fire_there(lab: Lab) -> None:
    firings = some_firings(lab)
    lab_of_many = [
        Lab(lab.model, lab.saes, lab.tokens, seed=seed) for seed in range(8)
    ]  # an atom that fires there would be drawn sooner or later
    table = lab.firings().frame()
    atoms = lab.atoms(np.arange(20)).to(torch.float64)
    for each in lab_of_many:
        shuffled = directions(each, firings, ("shuffled",))["shuffled"]
        drawn = shuffled.cosines(atoms).argmax(1).tolist()
        close(shuffled.cosine(atoms.rows(drawn)), torch.ones(len(firings), dtype=torch.float64))
        for atom, row in zip(drawn, firings.itertuples()):
            firing_there = set(table.query("sequence == 1 and position == @row.position")["atom"])
            assert atom not in firing_there | {row.written_atom}


def test_elsewhere_is_a_write_of_another_position_and_mean_is_the_mean(lab: Lab) -> None:
    firings = some_firings(lab)
    mean = lab.native_writes([2]).rows([3])
    made = directions(lab, firings, ("elsewhere", "mean", "random"), mean=mean)
    writes = lab.site(1).writes
    drawn = made["elsewhere"].cosines(writes).argmax(1)
    close(made["elsewhere"].norm(), writes.rows(drawn).norm())
    assert (drawn != torch.tensor(firings["position"].to_numpy())).all()
    close(made["mean"].dense(), mean.dense().expand(len(firings), -1, -1))
    assert made["random"].rank == 1 and len(made["random"]) == len(firings)


def test_elsewhere_is_never_the_write_of_the_position_itself(lab: Lab) -> None:
    firings = some_firings(lab)
    own = lab.site(1).writes.rows(firings["position"].to_list())
    for seed in range(20):  # sooner or later it would be
        drawn = directions(Lab(lab.model, lab.saes, lab.tokens, seed=seed), firings, ("elsewhere",))["elsewhere"]
        assert (drawn.cosine(own) < 1 - 1e-9).all()


def test_a_control_has_a_random_stream_of_its_own(lab: Lab) -> None:
    firings = some_firings(lab)
    alone = directions(lab, firings, ("elsewhere",))["elsewhere"]
    together = directions(lab, firings, ("random", "shuffled", "elsewhere"))
    assert torch.equal(alone.keys, together["elsewhere"].keys)
    again = directions(Lab(lab.model, lab.saes, lab.tokens, seed=6), firings, ("random",))["random"]
    assert not torch.equal(again.keys, together["random"].keys)


def test_a_control_without_anything_to_draw_says_so(lab: Lab) -> None:
    firings = some_firings(lab)
    with pytest.raises(NothingToMeasureError, match="shuffled"):
        directions(lab, firings, ("shuffled",), alive=firings["atom"].to_numpy()[:1])


def test_edits_replace_an_additive_write_and_add_to_a_corrected_one(lab: Lab) -> None:
    native, atom = draw(1, 0), draw(2, 1)
    nothing, written = C.Condition("delete", "none", None), C.Condition("atom", "matched", atom)
    at = list(range(N))
    assert [e.mode for e in C.edits_of(lab, nothing, native, at, "additive")] == ["delete"] * N
    for n, edit in enumerate(C.edits_of(lab, written, native, at, "additive")):
        assert (edit.mode, edit.position, edit.layer, edit.head) == ("replace", n, LAYER, HEAD)
        close(edit.keys.mT @ edit.values, atom.dense()[n])
    for condition, expected in ((nothing, -native.dense()), (written, atom.dense() - native.dense())):
        for n, edit in enumerate(C.edits_of(lab, condition, native, at, "corrected")):
            assert edit.mode == "add"
            close(edit.keys.reshape(-1, K).mT @ edit.values.reshape(-1, V), expected[n])
