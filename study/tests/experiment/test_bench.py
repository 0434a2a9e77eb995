"""The floor of a laboratory, and text that is apart from what is tested."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from saes import HEAD, LAYER, random_sae

from hookpoints import HookedRecurrent
from writesae.experiment.lab import EditedRows, Trial
from writesae_study.experiment import bench as bench_module
from writesae_study.experiment.bench import Bench
from writesae_study.experiment.readout import kl_window

WINDOW = 5
TEXT = torch.randint(1, 64, (3, 26), generator=torch.Generator().manual_seed(8))


def test_the_floor_is_the_95th_percentile_of_what_a_no_op_moves(model64: HookedRecurrent) -> None:
    lab, values = Bench(model64, {"": random_sae(model64)}, TEXT), []
    deleted = [Trial({}, t, lab.replace(t, None)) for t in range(4, 12)]
    effect = lab.read(lab.site(0), deleted, kl_window, WINDOW)["kl"].median()
    assert 0 <= lab.floor(kl_window, "kl", WINDOW) < 1e-14 < effect
    assert lab.counts["runs"] == 8  # a reader counts conditions, not the floor

    def read(rows: EditedRows) -> Mapping[str, NDArray[np.float64]]:
        values.extend(trial.position for trial in rows.trials)
        return {"x": -rows.positions[:, 0].double().numpy()}

    assert lab.floor(read, "x", WINDOW) == np.quantile(values, 0.95) > np.median(values)


@pytest.mark.usefixtures("no_grad")
def test_each_sequence_has_its_own_recurrence(model64: HookedRecurrent, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one pass takes several, as on a GPU."""
    monkeypatch.setattr(bench_module, "in_one_pass", lambda tokens, device: [slice(0, len(tokens))])
    for sequence, batched in zip(range(3), Bench(model64, {"": random_sae(model64)}, TEXT).recurrences(3), strict=True):
        own = model64.recurrence(TEXT[[sequence]], LAYER).select(heads=HEAD)
        torch.testing.assert_close(batched.u, own.u)
