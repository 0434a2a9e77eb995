"""Writes replaced by parts of their code: exact codes, partial sums by hand, and verdicts of known samples."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from planted import LAYER, exact_sae, logits_with_write, make_sae, native_writes, random_sae
from torch import Tensor

from sae_lens_writesae.multi_atom import MultiAtom, MultiAtomConfig, run_multi_atom
from sae_lens_writesae.multi_atom_result import ALL

SMALL = {"n_atoms": 4, "firings_per_atom": 1, "counts": (1, 3), "horizon": 3, "mean_write_sequences": 2}


@pytest.fixture
def model(model64: Any) -> Any:
    return model64


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(1, 64, (4, 20), generator=torch.Generator().manual_seed(7))


def run(model: Any, sae: Any, tokens: Tensor, **changes: Any) -> MultiAtom:
    return run_multi_atom(model, sae, tokens, MultiAtomConfig(**SMALL | changes), progress=False)


def kl_of_write(model: Any, sequence: Tensor, position: int, written: Tensor) -> float:
    """KL(native || edited), mean over position..position + 3, of a full pass that writes `written` at `position`."""

    def change(writes: Tensor) -> Tensor:
        writes[position] = written
        return writes

    window = slice(position, position + 4)
    native = logits_with_write(model, sequence, lambda writes: writes)[window].log_softmax(-1)
    edited = logits_with_write(model, sequence, change)[window].log_softmax(-1)
    return float((native.exp() * (native - edited)).sum(-1).mean())


def test_an_exact_code_is_the_native_write_with_all_atoms_and_not_before(model: Any, tokens: Tensor) -> None:
    found = run(model, exact_sae(model), tokens)
    every = found.part("code", "coefficient", ALL)
    assert (every["count"] == 48).all()  # one for each entry of 8 x 6
    np.testing.assert_allclose(every[["norm", "cosine"]], 1, atol=1e-6)
    assert every["kl"].abs().max() < 1e-10 < 1e-6 < found.part("code", "coefficient", 3)["kl"].median()
    noop = found.part("native")
    assert noop["kl"].abs().max() < 1e-10 and found.part("delete")["kl"].min() > 1e-6
    claim = found.claims()[0]
    assert claim.outcome == "inconclusive" and claim.n == len(noop) < 20 and claim.number is None


@pytest.mark.parametrize("scale", ["coefficient", "matched"])
def test_partial_sums_are_the_strongest_atoms(model: Any, tokens: Tensor, scale: str) -> None:
    sae = exact_sae(model)
    found = run(model, sae, tokens)
    place, row = next(iter(found.part("code", scale, 3).iterrows()))
    sequence, t = place
    keys, values = native_writes(model, tokens[[sequence]])
    native = torch.outer(keys[t], values[t])
    written = torch.where(native.abs() >= native.abs().flatten().topk(3).values[-1], native, 0)
    if scale == "matched":
        written *= native.norm() / written.norm()
    assert row["kl"] == pytest.approx(kl_of_write(model, tokens[[sequence]], t, written), rel=1e-4)
    assert row["norm"] == pytest.approx(float(written.norm() / native.norm()), rel=1e-5)
    assert row["cosine"] == pytest.approx(float((written * native).sum() / written.norm() / native.norm()), rel=1e-5)
    delete = found.part("delete").loc[[place]].iloc[0]
    assert delete["kl"] == pytest.approx(kl_of_write(model, tokens[[sequence]], t, torch.zeros_like(native)), rel=1e-6)


def test_a_bias_is_counted_apart(model: Any, tokens: Tensor) -> None:
    """All atoms of an exact code, with a bias on top: `bias` alone writes it, `code + bias` is off by it."""
    sae = exact_sae(model)
    torch.manual_seed(1)
    with torch.no_grad():
        sae.b_dec.copy_(0.1 * torch.randn(48))
        sae.cfg.apply_b_dec_to_input = False
    found = run(model, sae, tokens)
    place, row = next(iter(found.part("bias", "coefficient").iterrows()))
    sequence, t = place
    bias = sae.b_dec.detach().view(8, 6)
    assert row["kl"] == pytest.approx(kl_of_write(model, tokens[[sequence]], t, bias), rel=1e-4)
    keys, values = native_writes(model, tokens[[sequence]])
    both = found.part("code + bias", "coefficient", ALL).loc[[place]].iloc[0]
    whole = torch.outer(keys[t], values[t]) + bias
    assert both["kl"] == pytest.approx(kl_of_write(model, tokens[[sequence]], t, whole), rel=1e-4)
    assert found.part("code", "coefficient", ALL)["kl"].abs().max() < 1e-10


@pytest.mark.parametrize("target", ["write", "state"])
def test_controls_have_the_terms_and_the_norm_of_the_partial_sum(model: Any, tokens: Tensor, target: str) -> None:
    found = run(model, random_sae(model, target=target), tokens)
    for scale in ("coefficient", "matched"):
        code = found.part("code", scale, 1)
        for control in ("mean", "state", "state_after"):
            other = found.part(control, scale, 1).loc[code.index]
            np.testing.assert_allclose(other["norm"], code["norm"], rtol=1e-5)
            assert (other["terms"] == code["terms"]).all()
    assert not found.tables["writes"].isna().any(axis=None)
    assert any("states" in note for note in found.notes()) == (target == "state")


def table(kl: dict[str, float], n: int = 24) -> MultiAtom:
    """Every write has the same KL under each condition, with one atom or all of two, but for a little noise."""
    rng = np.random.default_rng(0)
    rows = []
    for place in range(n):
        shared = {"sequence": place // 2, "position": place, "terms": 1, "kl_at": 0.1, "norm": 1.0, "cosine": 0.5}
        for condition, value in kl.items():
            own = shared | {"condition": condition, "kl": value * np.exp(0.01 * rng.standard_normal())}
            if condition in ("native", "delete"):
                rows.append(own | {"scale": "none", "count": 0, "all": False})
            else:
                rows += [own | {"scale": "coefficient", "count": n, "all": n == 2} for n in (1, 2)]
    config = {"scales": ["coefficient"], "controls": ["mean", "state", "state_after"]}
    return MultiAtom({"config": config, "target": "write", "label": "x"}, {"writes": pd.DataFrame(rows)})


@pytest.mark.parametrize(
    "kl, outcome",
    [
        ({"delete": 1.0, "code": 0.2, "mean": 0.5, "state": 2.0, "state_after": 0.01}, "holds"),
        ({"delete": 1.0, "code": 0.2, "mean": 0.1, "state": 2.0, "state_after": 0.01}, "confounded"),
        ({"delete": 1.0, "code": 1.5, "mean": 0.1, "state": 2.0, "state_after": 0.01}, "fails"),
        ({"delete": 1e-12, "code": 1e-13, "mean": 1.0, "state": 1.0, "state_after": 1.0}, "below the floor"),
    ],
)
def test_verdicts_of_known_samples(kl: dict[str, float], outcome: str) -> None:
    claim = table({"native": 0.0} | kl).claims()[0]
    assert claim.outcome == outcome and claim.n == 24 and claim.unit == "writes in 12 sequences"
    if outcome == "holds":
        assert "KL ratio to delete 0.20" in claim.measured and "mean: ratio to delete 0.50" in claim.controls


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"counts": (2, 1)}, r"counts rise from 1 or more, found \(2, 1\)"),
        ({"counts": ()}, "counts rise"),
        ({"scales": ("least_squares",)}, "scales must be among coefficient, matched, found least_squares"),
        ({"controls": ("random",)}, "controls must be among mean, state, state_after, found random"),
        ({"horizon": 0}, "horizon must be at least 1, found 0"),
    ],
)
def test_settings_that_make_no_sense(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MultiAtomConfig(**SMALL | changes)


def test_writes_of_no_norm_are_left_out_and_counted(model: Any, tokens: Tensor) -> None:
    shape = model.cfg.layer(LAYER)
    one = torch.nn.functional.normalize(torch.ones(1, shape.K, dtype=torch.float64)), torch.ones(1, shape.V).double()
    always = make_sae(*one, 1, bias=5.0)  # fires on nothing, too

    def mute(positions: slice) -> Any:
        def hook(value: Tensor, hook: Any) -> Tensor:
            value = value.clone()
            value[:, positions] = 0
            return value

        return model.hooks(fwd_hooks=[(f"blocks.{LAYER}.mixer.hook_v", hook)])

    with mute(slice(None)), pytest.raises(ValueError, match="every native write at the drawn positions is zero"):
        run(model, always, tokens, firings_per_atom=8)
    with mute(slice(0, 10)):
        found = run(model, always, tokens, firings_per_atom=8)
    left_out = found.info["omitted"]["positions with a zero native write"]
    assert 0 < left_out < 8 and len(found.part("native")) == 8 - left_out
    assert found.tables["writes"]["position"].min() >= 10
