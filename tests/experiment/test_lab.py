"""The only place that runs edited passes: against full forwards with the write changed by hand, in float64."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import pytest
import torch
from numpy.typing import NDArray
from saes import HEAD, LAYER, logits_with_write, random_sae
from torch import Tensor

from hookpoints import HookedRecurrent, UnknownHookError
from writesae.experiment.lab import EditedRows, Lab, Trial

T, WINDOW = 26, 5
TEXT = torch.randint(1, 64, (3, T), generator=torch.Generator().manual_seed(8))


def make_lab(model: HookedRecurrent) -> Lab:
    return Lab(model, {"": random_sae(model)}, TEXT)


def trials_of(lab: Lab, window: int | None) -> tuple[list[Trial], list[Tensor | None]]:
    """Deletions, replacements by another write, and additions at random places, in no order; and, for each, what is
    written there by hand, or None where it is added."""
    site, rng = lab.site(1), np.random.default_rng(0)
    other = lab.site(0).writes
    trials, written = [], []
    for n in range(12):
        position = int(rng.integers(0, T - (window or 1)))
        native, foreign = site.writes.dense()[position], other.dense()
        edit, by_hand = [
            (lab.replace(position, None), torch.zeros_like(native)),
            (lab.replace(position, other, 3 + n), foreign[3 + n]),
            (lab.add(position, other * 0.5, n), native + 0.5 * foreign[n]),
        ][n % 3]
        trials.append(Trial({"n": n, "position": position}, position, edit))
        written.append(by_hand)
    return trials, written


@pytest.mark.parametrize("window", [WINDOW, None])
def test_an_edited_run_is_a_full_forward_with_the_write_changed(model64: HookedRecurrent, window: int | None) -> None:
    lab = make_lab(model64)
    trials, written = trials_of(lab, window)
    full = {}
    for n, (trial, matrix) in enumerate(zip(trials, written)):

        def change(writes: Tensor, at: int = trial.position, to: Tensor | None = matrix) -> Tensor:
            writes[at] = to
            return writes

        full[n] = logits_with_write(model64, TEXT[1:2], change)

    def gap(rows: EditedRows) -> Mapping[str, NDArray[np.float64]]:
        gaps = []
        for n, trial in enumerate(rows.trials):
            by_hand = full[int(str(trial.row["n"]))][rows.start : rows.start + rows.logits.shape[1]]
            gaps.append(float((rows.logits[n] - by_hand).abs().max()))
            assert rows.logits.shape[1] >= (T if window is None else trial.position + window) - rows.start
        assert rows.plain is not None
        native = rows.native[rows.start : rows.start + len(rows.plain)]
        torch.testing.assert_close(rows.plain, native, rtol=0, atol=1e-10)
        return {"gap": np.array(gaps)}

    table = lab.read(lab.site(1), trials, gap, window, plain=True)
    assert table["n"].tolist() == list(range(12))  # one row a trial, in their order
    assert table["gap"].max() < 1e-10
    assert lab.counts["runs"] == 12  # the plain rows are no conditions


def test_batches_are_small_and_near_and_change_nothing(model64: HookedRecurrent) -> None:
    """A batch starts at its first position: two trials 60 tokens apart would run 60 tokens for a window of 2."""
    seen: list[tuple[int, int]] = []

    def spy(rows: EditedRows) -> Mapping[str, NDArray[np.generic]]:
        seen.append(tuple(rows.logits.shape[:2]))
        return {"logits": rows.window.numpy()}

    text = torch.randint(1, 64, (1, 80), generator=torch.Generator().manual_seed(2))
    tables = []
    for rows_per_run in (256, 1):
        lab = Lab(model64, {"": random_sae(model64)}, text, rows_per_run=rows_per_run)
        trials = [Trial({}, t, lab.replace(t, None)) for t in (70, 5, 6, 71)]
        tables.append(np.stack(lab.read(lab.site(0), trials, spy, 2)["logits"]))
    np.testing.assert_allclose(tables[0], tables[1], rtol=0, atol=1e-12)
    assert seen == [(2, 3)] * 2 + [(1, 2)] * 4


def test_sites_have_the_head_and_the_rows_of_each_sequence(model64: HookedRecurrent) -> None:
    lab = make_lab(model64)
    units = pd.DataFrame({"sequence": [2, 0, 2], "position": [3, 4, 5]})
    sites = list(lab.sites(units, "units"))
    assert [site.sequence for site in sites] == [0, 2] and sites[1].rows["position"].tolist() == [3, 5]
    name = f"blocks.{LAYER}.mixer.heads.{HEAD}.hook_write"
    for site in sites:
        with torch.no_grad():
            logits, cache = model64.run_with_cache(TEXT[[site.sequence]], names_filter=[name])
        torch.testing.assert_close(site.writes.dense(), cache[name][0], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(site.session.logits, logits, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(site.at([3, 1]).dense(), cache[name][0, [3, 1]], rtol=1e-10, atol=1e-12)
        assert site.recurrence.B == site.recurrence.H == 1
        torch.testing.assert_close(site.state_after([5, 1, 5]), site.recurrence.states()[0, [5, 1, 5], 0])
    part = lab.site(1, span=slice(4, 10))  # a text of its own, which begins at token 4
    assert part.writes.keys.shape[0] == 6
    both = lab.native_writes([2, 0])
    torch.testing.assert_close(both.rows(slice(T, None)).dense(), sites[0].writes.dense())


@pytest.mark.parametrize(
    ("heads", "error", "word"),
    [((), ValueError, "none"), ((2, 0), ValueError, "one head"), ((17,), UnknownHookError, "17")],
)
def test_a_lab_is_of_one_head_and_fits_its_model(
    model64: HookedRecurrent, heads: tuple[int, ...], error: type[Exception], word: str
) -> None:
    with pytest.raises(error, match=word):
        Lab(model64, {str(head): random_sae(model64, head=head) for head in heads}, TEXT)
