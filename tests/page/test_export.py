"""Atoms as other tools read them, checked against schemas written from the source of these tools."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from planted_atoms import HOOK, SMALL, held_out, planted_sae
from pydantic import BaseModel, ConfigDict
from safetensors.numpy import load_file
from torch import Tensor

from hookpoints import HookedRecurrent
from hookpoints import embedded as shipped
from sae_lens_writesae.sae import WriteTopKSAE
from writesae.experiment.lab import Lab
from writesae.page.atoms import collect
from writesae.page.atoms.export import neuronpedia_batch, write_delphi
from writesae.page.atoms.measure import Facts
from writesae.show import Export


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class DashboardActivation(_Strict):
    """`NeuronpediaDashboardActivation.to_dict`, SAEDashboard 0.8.0, sae_dashboard/neuronpedia/neuronpedia_dashboard.py;
    fields of direct feature attribution left out."""

    bin_min: float
    bin_max: float
    bin_contains: float
    tokens: list[str]
    values: list[float]
    qualifying_token_index: int


class DashboardFeature(_Strict):
    """`NeuronpediaDashboardFeature.to_dict`, of the same file."""

    feature_index: int
    neuron_alignment_indices: list[int]
    neuron_alignment_values: list[float]
    neuron_alignment_l1: list[float]
    correlated_neurons_indices: list[int]
    correlated_neurons_l1: list[float]
    correlated_neurons_pearson: list[float]
    correlated_features_indices: list[int]
    correlated_features_l1: list[float]
    correlated_features_pearson: list[float]
    neg_str: list[str]
    neg_values: list[float]
    pos_str: list[str]
    pos_values: list[float]
    frac_nonzero: float
    freq_hist_data_bar_values: list[float]
    freq_hist_data_bar_heights: list[float]
    logits_hist_data_bar_heights: list[float]
    logits_hist_data_bar_values: list[float]
    n_prompts_total: int
    n_tokens_in_prompt: int
    dataset: str
    decoder_weights_dist: list[float]
    activations: list[DashboardActivation]
    vector: list[float]


class DashboardBatch(_Strict):
    """`NeuronpediaDashboardBatch.to_dict`, of the same file."""

    model_id: str
    layer: int
    sae_set: str
    sae_id_suffix: str | None
    features: list[DashboardFeature]


class CacheConfig(_Strict):
    """`CacheConfig` of eai-delphi 0.1.3, delphi/config.py, and the name that `LatentCache.save_config` adds."""

    dataset_repo: str
    dataset_split: str
    dataset_name: str
    dataset_column: str
    batch_size: int
    cache_ctx_len: int
    n_tokens: int
    n_splits: int
    model_name: str


@pytest.fixture(scope="module")
def tokens(embedded: HookedRecurrent) -> Tensor:
    return held_out(embedded)


@pytest.fixture(scope="module")
def planted(embedded: HookedRecurrent, tokens: Tensor) -> WriteTopKSAE:
    return planted_sae(embedded, tokens)


def test_neuronpedia_gets_the_numbers_of_the_pages(
    embedded: HookedRecurrent, planted: WriteTopKSAE, tokens: Tensor
) -> None:
    data = SMALL.collect(embedded, planted, tokens, progress=False)
    facts = Facts(SMALL, embedded, planted, tokens, progress=False)
    batch = DashboardBatch.model_validate_json(json.dumps(neuronpedia_batch(facts, "speeches")))
    assert batch.model_id == data.info["model"] and batch.layer == data.info["layer"]
    for page, feature in zip(data.atoms, batch.features, strict=True):
        assert (
            feature.feature_index == page.atom and feature.frac_nonzero == page.rate and feature.dataset == "speeches"
        )
        assert sum(feature.freq_hist_data_bar_heights) == page.n_firings
        assert len(feature.logits_hist_data_bar_heights) == len(feature.logits_hist_data_bar_values)
        assert page.effect is not None and feature.pos_str == [t.text for t in page.effect.tokens.high]
        top = [a for a in feature.activations if a.bin_contains == -1]
        assert [a.values[a.qualifying_token_index] for a in top] == [c.values[c.at] for c in page.top]
        bands = [a for a in feature.activations if a.bin_contains > 0]
        assert len(bands) == page.n_firings  # all of them, with these settings
        assert all(a.bin_min <= a.values[a.qualifying_token_index] <= a.bin_max for a in bands)
        assert all(len(a.tokens) == len(a.values) for a in feature.activations)
    assert not {"writes", "traces", "nearest", "direct"} & vars(facts).keys()  # what no dashboard shows


def test_what_no_other_tool_shows_is_not_measured(
    planted: WriteTopKSAE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Quality needs a pass of the model for every sequence and replacement; cosines, memory and neighbors cost, too."""
    for name in ("qualities", "_page"):
        monkeypatch.setattr(collect, name, lambda *_: pytest.fail("was measured"))
    planted.save_model(tmp_path / "sae")
    (text := tmp_path / "text.txt").write_text(shipped.text("test")[:3000])
    for to, file in (("neuronpedia", "batch-0.json"), ("delphi", HOOK)):
        export = Export(sae=tmp_path / "sae", to=to, text=text, context_size=48, splits=2, out=tmp_path / to)
        assert export.run(SMALL, progress=False) == tmp_path / to / file
    DashboardBatch.model_validate_json((tmp_path / "neuronpedia" / "batch-0.json").read_text())


def test_delphi_gets_every_firing_at_its_place(
    embedded: HookedRecurrent, planted: WriteTopKSAE, tokens: Tensor, tmp_path: Path
) -> None:
    """As `TensorBuffer.load` of eai-delphi 0.1.3 (delphi/latents/loader.py) reads it: atoms count from the first of the
    file's name; every entry of the folder is a hook with a config."""
    lab = Lab(embedded, {"": planted}, tokens)
    folder = write_delphi(lab, tmp_path / "cache", n_splits=4, dataset="speeches")
    assert [entry.name for entry in folder.parent.iterdir()] == [HOOK]
    config = CacheConfig.model_validate_json((folder / "config.json").read_text())
    assert config.cache_ctx_len == tokens.shape[1] and config.n_tokens == tokens.numel() and config.n_splits == 4
    found, next_atom = torch.zeros(*tokens.shape, int(planted.cfg.d_sae)), 0
    for file in sorted(folder.glob("*.safetensors"), key=lambda file: int(file.stem.split("_")[0])):
        first, last = map(int, file.stem.split("_"))
        split = load_file(file)
        assert first == next_atom and set(split) == {"locations", "activations", "tokens"}
        assert split["locations"].dtype == np.uint16 and split["activations"].dtype == np.float16
        np.testing.assert_array_equal(split["tokens"], tokens.numpy())
        sequence, position, atom = split["locations"].astype(np.int64).T
        assert len(atom) == 0 or atom.max() <= last - first
        found[sequence, position, atom + first] = torch.from_numpy(split["activations"].astype(np.float32))
        next_atom = last + 1
    _, cache = embedded.run_with_cache(tokens, names_filter=[HOOK])
    expected = planted.encode(cache[HOOK]).detach()
    assert next_atom == planted.cfg.d_sae and (expected > 0).sum() > 0
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    with pytest.raises(ValueError, match="splits"):
        write_delphi(lab, tmp_path / "many", n_splits=7)
