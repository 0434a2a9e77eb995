"""Finding, drawing and moving firings, on made-up activations."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from sae_lens_writesae import firings as F
from sae_lens_writesae.conditions import norm

N, T, ATOMS = 12, 40, 9


def dense(seed: int = 0) -> torch.Tensor:
    """Activations [N,T,F]: atom i fires with probability (i + 1) / 20; atom 8 never."""
    g = torch.Generator().manual_seed(seed)
    chance = (torch.arange(ATOMS) + 1) / 20
    chance[8] = 0
    return torch.rand(N, T, ATOMS, generator=g) * (torch.rand(N, T, ATOMS, generator=g) < chance)


class FakeModel:
    """Hands out the position as the hook's activation, so that a fake SAE can look its activations up."""

    def run_with_cache(self, tokens: torch.Tensor, names_filter: list[str], stop_at_layer: int):
        assert stop_at_layer == 4 and tokens.shape == (1, T)
        return None, {names_filter[0]: tokens[..., None].float()}


class FakeSAE(torch.nn.Module):
    def __init__(
        self, activations: torch.Tensor, hook: str = "blocks.3.mixer.heads.1.hook_write_vec", norm: str = "none"
    ):
        super().__init__()
        self.activations = activations
        self.cfg = SimpleNamespace(metadata=SimpleNamespace(hook_name=hook), normalize_activations=norm)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return self.activations.flatten(0, 1)[x[:, 0].long()]


def collected(activations: torch.Tensor) -> F.Firings:
    return F.collect_firings(FakeModel(), FakeSAE(activations), torch.arange(N * T).view(N, T))


def test_collected_firings_are_the_positive_activations() -> None:
    activations = dense()
    found = collected(activations)
    again = torch.zeros_like(activations)
    again[found.sequence, found.position, found.atom] = torch.tensor(found.activation)
    assert torch.equal(again, activations) and len(found) == int((activations > 0).sum())
    assert (found.n_sequences, found.n_positions, found.n_atoms) == (N, T, ATOMS)


def test_alive_counts_the_first_tokens_only() -> None:
    activations = torch.zeros(N, T, ATOMS)
    activations[0, 5, 2] = activations[1, 3, 4] = activations[1, 4, 4] = 1
    found = collected(activations)
    assert found.alive(N * T).tolist() == [2, 4]
    assert found.alive(T + 3).tolist() == [2]  # token T + 3 is not among the first T + 3
    assert found.alive(T + 4).tolist() == [2, 4]
    assert found.alive(N * T, min_firings=2).tolist() == [4]


def test_strongest_atom_of_a_position() -> None:
    activations = dense()
    found = collected(activations)
    at: Any = pd.DataFrame({"sequence": [3, 7, 3], "position": [5, 0, 5]}, index=[30, 10, 20])
    best: Any = found.strongest(at)
    assert best.index.tolist() == [30, 10, 20]
    for (s, p), row in zip([(3, 5), (7, 0), (3, 5)], best.itertuples()):
        assert row.activation == activations[s, p].max() and row.atom == activations[s, p].argmax()
    nothing: Any = collected(dense() * 0 + (torch.arange(T) == 1)[None, :, None]).strongest(at)
    assert nothing["atom"].isna().all()


def test_the_sample_is_spread_over_sequences() -> None:
    found = collected(dense())
    sample: Any = F.sample_firings(found, np.arange(ATOMS), 6, first=2, last=30, rng=np.random.default_rng(0))
    assert sample["position"].between(2, 30).all() and not sample.duplicated(["sequence", "position", "atom"]).any()
    for atom, part in sample.groupby("atom"):
        inside = (found.atom == atom) & (found.position >= 2) & (found.position <= 30)
        assert len(part) == min(6, inside.sum())
        if len(np.unique(found.sequence[inside])) >= 6:
            assert part["sequence"].is_unique
    assert 8 not in set(sample["atom"])


def test_a_second_turn_only_begins_when_the_first_is_over() -> None:
    found = collected(dense())
    sample: Any = F.sample_firings(found, np.array([7]), 18, first=0, last=T - 1, rng=np.random.default_rng(1))
    counts = sample["sequence"].value_counts()
    assert counts.max() - counts.reindex(range(N), fill_value=0).min() == 1 and len(sample) == 18


def test_sequences_have_the_same_chance_however_often_an_atom_fires_in_them() -> None:
    """One firing in one sequence, nine in another: when one is drawn, each sequence has it half of the time."""
    activations = torch.zeros(N, T, ATOMS)
    activations[0, 5, 0] = 1
    activations[1, 6:15, 0] = 1
    found, rng = collected(activations), np.random.default_rng(0)
    draws = [F.sample_firings(found, np.array([0]), 1, first=0, last=T - 1, rng=rng)["sequence"][0] for _ in range(150)]
    assert np.mean(draws) == pytest.approx(0.5, abs=0.12)  # 3 standard errors


def test_silent_positions_keep_everything_but_the_position() -> None:
    activations = dense()
    found = collected(activations)
    rng = np.random.default_rng(0)
    sample: Any = F.sample_firings(found, np.arange(8), 5, first=1, last=30, rng=rng)
    moved: Any = F.silent_positions(sample, found, first=1, last=30, rng=rng)
    assert len(moved) == len(sample) and moved["position"].between(1, 30).all()
    assert (activations[moved["sequence"], moved["position"], moved["atom"]] == 0).all()
    assert sorted(moved["activation"]) == sorted(sample["activation"])


def test_atoms_that_are_never_silent_are_dropped() -> None:
    activations = torch.zeros(N, T, ATOMS)
    activations[:, :, 0] = activations[:, 3, 1] = 1
    found, rng = collected(activations), np.random.default_rng(0)
    sample: Any = F.sample_firings(found, np.array([0, 1]), 2, first=1, last=30, rng=rng)
    assert set(F.silent_positions(sample, found, first=1, last=30, rng=rng)["atom"]) == {1}


def test_hook_names() -> None:
    hook = F.HeadHook.parse("blocks.12.mixer.heads.3.hook_state_vec")
    assert hook[1:] == (12, 3, "state")
    for other in (
        "blocks.1.hook_resid_pre",
        "blocks.1.mixer.heads.2.hook_write",
        "xblocks.1.mixer.heads.2.hook_write_vec",
    ):
        with pytest.raises(ValueError, match="write or state"):
            F.HeadHook.parse(other)


def test_activations_must_be_coefficients() -> None:
    with pytest.raises(ValueError, match="expected_average_only_in"):
        F.collect_firings(FakeModel(), FakeSAE(dense(), norm="expected_average_only_in"), torch.zeros(1, T))
    with pytest.raises(ValueError, match="NaN or infinite activations on sequence 0"):
        collected(dense().index_fill(1, torch.tensor([4]), torch.nan))


def test_atom_factors() -> None:
    v, w = torch.randn(6, 2, 3), torch.randn(6, 2, 5)
    sae = SimpleNamespace(v=v, w=w)
    assert torch.equal(F.atom_factors(sae, [4, 1], 3, 5).keys, v[[4, 1]])
    flat: Any = SimpleNamespace(W_dec=(v.mT @ w).flatten(1))
    found = F.atom_factors(flat, np.array([4, 1]), 3, 5)
    torch.testing.assert_close(found.dense(), (v.mT @ w)[[4, 1]])
    torch.testing.assert_close(norm(found), flat.W_dec[[4, 1]].norm(dim=1))
