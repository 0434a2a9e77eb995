"""Writes replaced by parts of their code: exact codes, partial sums by hand, and verdicts of known samples."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from saes import LAYER, logits_with_write, native_writes, rank_one_exact_sae, tied_sae
from torch import Tensor

from writesae.evaluations.multi_atom import ALL, MultiAtom, rows_of
from writesae.experiment.evaluation import Result

SMALL: dict[str, Any] = {
    "n_atoms": 4,
    "firings_per_atom": 1,
    "counts": (1, 3),
    "horizon": 3,
    "mean_write_sequences": 2,
}


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(1, 64, (4, 20), generator=torch.Generator().manual_seed(7))


def run(model64: Any, sae: Any, tokens: Tensor, **changes: Any) -> Result:
    return MultiAtom(**SMALL | changes).run(model64, sae, tokens, progress=False)


def kl_of_write(model64: Any, sequence: Tensor, position: int, written: Tensor) -> float:
    """KL(native || edited), mean over position..position + 3, of a full pass that writes `written` at `position`."""

    def change(writes: Tensor) -> Tensor:
        writes[position] = written
        return writes

    window = slice(position, position + 4)
    native = logits_with_write(model64, sequence, lambda writes: writes)[window].log_softmax(-1)
    edited = logits_with_write(model64, sequence, change)[window].log_softmax(-1)
    return float((native.exp() * (native - edited)).sum(-1).mean())


def test_an_exact_code_is_the_native_write_with_all_atoms_and_not_before(model64: Any, tokens: Tensor) -> None:
    result = run(model64, rank_one_exact_sae(model64), tokens)
    every = rows_of(result, "code", "coefficient", ALL)
    assert (every["count"] == 48).all()  # one for each entry of 8 x 6
    np.testing.assert_allclose(every[["norm", "cosine"]], 1, atol=1e-6)
    assert every["kl"].abs().max() < 1e-10 < 1e-6 < rows_of(result, "code", "coefficient", 3)["kl"].median()
    noop = rows_of(result, "native")
    assert noop["kl"].abs().max() < 1e-10 and rows_of(result, "delete")["kl"].min() > 1e-6
    claim = result.claims()[0]
    assert claim.outcome == "inconclusive" and claim.n == len(noop) < 20 and claim.number is None
    assert result.info["n_edited_runs"] == len(result.tables["writes"])


@pytest.mark.parametrize("scale", ["coefficient", "matched"])
def test_partial_sums_are_the_strongest_atoms(model64: Any, tokens: Tensor, scale: str) -> None:
    row = rows_of(run(model64, rank_one_exact_sae(model64), tokens), "code", scale, 3).iloc[0]
    sequence, t = tokens[[int(row["sequence"])]], int(row["position"])
    keys, values = native_writes(model64, sequence)
    native = torch.outer(keys[t], values[t])
    written = torch.where(native.abs() >= native.abs().flatten().topk(3).values[-1], native, 0)
    written *= native.norm() / written.norm() if scale == "matched" else 1
    assert row["kl"] == pytest.approx(kl_of_write(model64, sequence, t, written), rel=1e-4)
    assert row["norm"] == pytest.approx(float(written.norm() / native.norm()), rel=1e-5)
    assert row["cosine"] == pytest.approx(float((written * native).sum() / written.norm() / native.norm()), rel=1e-5)


def table(kl: dict[str, float], n: int = 24) -> Result:
    """Every write has the same KL under each condition, with one atom or all of two, but for a little noise."""
    rng = np.random.default_rng(0)
    rows = []
    for place in range(n):
        shared = {"sequence": place // 2, "position": place, "terms": 1, "kl_at": 0.1, "norm": 1.0, "cosine": 0.5}
        for condition, value in kl.items():
            row = shared | {"condition": condition, "kl": value * np.exp(0.01 * rng.standard_normal())}
            if condition in ("native", "delete"):
                rows.append(row | {"scale": "none", "count": 0, "all": False})
            else:
                rows += [row | {"scale": "coefficient", "count": n, "all": n == 2} for n in (1, 2)]
    evaluation = MultiAtom(scales=("coefficient",))
    return Result(evaluation, {"target": "write", "label": "x"}, {"writes": pd.DataFrame(rows)})


@pytest.mark.parametrize(
    "kl, outcome",
    [
        ({"delete": 1.0, "code": 0.2, "mean": 0.5, "state": 2.0, "state_after": 0.01}, "holds"),
        ({"delete": 1.0, "code": 0.2, "mean": 0.1, "state": 2.0, "state_after": 0.01}, "confounded"),
        ({"delete": 1.0, "code": 1.5, "mean": 0.1, "state": 2.0, "state_after": 0.01}, "fails"),
        ({"delete": 1.0, "code": 1e-12, "mean": 1e-13, "state": 2.0, "state_after": 1.0}, "confounded"),  # both are 0
        ({"delete": 1.0, "code": 1e-13, "mean": 1e-12, "state": 2.0, "state_after": 1.0}, "confounded"),
        ({"delete": 1e-12, "code": 1e-13, "mean": 1.0, "state": 1.0, "state_after": 1.0}, "below the floor"),
    ],
)
def test_verdicts_of_known_samples(kl: dict[str, float], outcome: str) -> None:
    claim = table({"native": 1e-11} | kl).claims()[0]
    assert claim.outcome == outcome and claim.n == 24 and claim.unit == "writes in 12 sequences"
    if outcome == "holds":
        assert claim.measured.startswith("0.20 [") and "mean write at the atom's norm 0.50 [" in claim.controls


def test_writes_of_no_norm_are_left_out_and_counted(model64: Any, tokens: Tensor) -> None:
    shape = model64.cfg.layer(LAYER)
    one = torch.nn.functional.normalize(torch.ones(1, shape.K, dtype=torch.float64)), torch.ones(1, shape.V).double()
    always = tied_sae(*one, 1, bias=5.0)  # fires on nothing, too

    def mute(positions: slice) -> Any:
        def hook(value: Tensor, hook: Any) -> Tensor:
            value = value.clone()
            value[:, positions] = 0
            return value

        return model64.hooks(fwd_hooks=[(f"blocks.{LAYER}.mixer.hook_v", hook)])

    with mute(slice(0, 10)):
        result = run(model64, always, tokens, firings_per_atom=8)
    skipped: Any = result.info["n_skipped"]
    left_out = skipped["positions with a zero native write"]
    assert 0 < left_out < 8 and len(rows_of(result, "native")) == 8 - left_out
    assert result.tables["writes"]["position"].min() >= 10
